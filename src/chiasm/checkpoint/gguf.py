"""GGUF: read llama.cpp's single-file checkpoints without llama.cpp.

Source: the GGUF description in the ggml repository, versions 2 and 3, little-endian. A file is a header, typed
metadata, a directory of tensors, and an aligned data section; it is memory-mapped and every tensor is decoded on
request. F16 and BF16 are widened, quantised types expanded to float32 with ggml's own arithmetic:

    Q8_0  32 values a block: fp16 d, 32 x int8 q               y = q * d
    Q4_1  32 values a block: fp16 d, fp16 m, 16 bytes of two    y = q * d + m   (low nibbles are values 0-15,
          4-bit q                                                               high nibbles values 16-31)

Both products are exact in float32, so the result does not depend on fused or separate multiply-add.

A header is untrusted: each length is compared with the bytes that are left before anything is allocated.

Shape legend: O output rows, I input columns (ggml lists the fastest axis first; tensors here have torch's order).
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chiasm.errors import CheckpointError

__all__ = ["GGUFFile", "TensorInfo", "hf_llama_shapes", "llama_config", "to_hf_llama"]

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4  # ggml's own limit
_MAX_NESTING = 4  # arrays of arrays; real files have none
_MAX_KEY_BYTES = 65_535

# Metadata value types of fixed width, by code: (struct format, numpy dtype).
_SCALARS: dict[int, tuple[str, str]] = {
    0: ("<B", "<u1"),
    1: ("<b", "<i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("<?", "<u1"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9

_Q8_0_BLOCK = np.dtype([("d", "<f2"), ("q", "i1", (32,))])
_Q4_1_BLOCK = np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", (16,))])

# Tensor types that can be decoded, by code: (name, values per block, bytes per block).
_DECODED: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    3: ("Q4_1", 32, _Q4_1_BLOCK.itemsize),
    8: ("Q8_0", 32, _Q8_0_BLOCK.itemsize),
    30: ("BF16", 1, 2),
}
# Names only, so that the message about a type that cannot be decoded says which one it is.
_OTHER_NAMES = {
    2: "Q4_0",
    6: "Q5_0",
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One line of the tensor directory.

    ``shape`` is in torch's order (rows first), ``offset`` counts bytes from the start of the file, ``nbytes`` is the
    stored size, or ``None`` for a type that this reader cannot decode.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int | None


class GGUFFile:
    """A memory-mapped GGUF file.

    ``metadata`` maps keys to Python values (arrays become lists), ``tensors`` maps names to ``TensorInfo`` in the
    file's order, ``tensor(name)`` decodes one. Usable as a context manager; tensors stay valid after ``close``.

    Raises:
        CheckpointError: not a GGUF file, or damaged; the message names the file and the byte.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as handle:
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise CheckpointError(f"{self.path}: empty file, not GGUF: download it again") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise CheckpointError(f"{self.path}: cannot be opened ({reason}): check the path") from error
        try:
            cursor = _Cursor(self.path, self._map)
            self.version, tensor_count, value_count = _read_header(cursor)
            self.metadata: dict[str, Any] = _read_metadata(cursor, value_count)
            self.tensors: dict[str, TensorInfo] = _read_directory(cursor, tensor_count, self.metadata)
        except BaseException:
            self._map.close()
            raise

    def tensor(self, name: str) -> torch.Tensor:
        """Decode the tensor ``name`` to a new contiguous float32 tensor, on the CPU, in torch's axis order.

        Raises:
            CheckpointError: no such tensor, or a type other than F32, F16, BF16, Q4_1, Q8_0.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.path}: no tensor {name!r} among {len(self.tensors)}: another model's file?"
            )
        if info.nbytes is None:
            supported = ", ".join(spec[0] for spec in _DECODED.values())
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has type {info.type}, not supported: use a file with {supported}"
            )
        raw = np.frombuffer(self._map, dtype=np.uint8, count=info.nbytes, offset=info.offset)
        values = np.empty(math.prod(info.shape), dtype=np.float32)
        _decode(info.type, raw, values)
        return torch.from_numpy(values).reshape(info.shape)

    def close(self) -> None:
        """Unmap the file; harmless when repeated."""
        self._map.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _decode(kind: str, raw: np.ndarray, out: np.ndarray) -> None:
    """Expand the stored bytes ``raw`` into the flat float32 ``out``."""
    # An infinite or NaN scale stays what it is, as in ggml; it needs no numpy warning.
    with np.errstate(invalid="ignore", over="ignore"):
        if kind == "F32":
            out[:] = raw.view("<f4")
        elif kind == "F16":
            out[:] = raw.view("<f2")
        elif kind == "BF16":  # the upper half of a float32
            out.view("<u4")[:] = raw.view("<u2").astype("<u4") << 16
        elif kind == "Q8_0":
            blocks = raw.view(_Q8_0_BLOCK)
            scale = blocks["d"].astype(np.float32)[:, None]
            np.multiply(blocks["q"], scale, out=out.reshape(-1, 32))
        else:
            blocks = raw.view(_Q4_1_BLOCK)
            scale = blocks["d"].astype(np.float32)[:, None]
            least = blocks["m"].astype(np.float32)[:, None]
            values = out.reshape(-1, 32)
            np.multiply(blocks["q"] & 0x0F, scale, out=values[:, :16])
            np.multiply(blocks["q"] >> 4, scale, out=values[:, 16:])
            values += least


class _Cursor:
    """A reading position in a mapped file that refuses to run past the end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def fail(self, what: str, at: int | None = None) -> CheckpointError:
        place = self.at if at is None else at
        return CheckpointError(f"{self.path}: {what} at byte {place}: the file is damaged, download it again")

    def need(self, count: int, unit: int, what: str) -> None:
        """Refuse ``count`` things of at least ``unit`` bytes when they cannot fit in the rest of the file."""
        if count * unit > self.left:
            raise self.fail(f"{what} needs {count * unit} bytes where {self.left} are left")

    def scalar(self, code: int, what: str) -> Any:
        form = _SCALARS[code][0]
        self.need(1, struct.calcsize(form), what)
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def u32(self, what: str) -> int:
        return self.scalar(4, what)

    def u64(self, what: str) -> int:
        return self.scalar(10, what)

    def string(self, what: str, limit: int | None = None) -> str:
        start = self.at
        length = self.u64(f"length of {what}")
        if limit is not None and length > limit:
            raise self.fail(f"{what} of {length} bytes (at most {limit})", start)
        self.need(length, 1, what)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8", start) from None

    def value(self, code: int, what: str, depth: int = 0) -> Any:
        if code in _SCALARS:
            return self.scalar(code, what)
        if code == _STRING:
            return self.string(what)
        if code != _ARRAY:
            raise self.fail(f"{what} has unknown value type {code}")
        if depth >= _MAX_NESTING:
            raise self.fail(f"{what} nests arrays deeper than {_MAX_NESTING}")
        item = self.u32(f"item type of {what}")
        count = self.u64(f"length of {what}")
        if item in _SCALARS:
            dtype = np.dtype(_SCALARS[item][1])
            self.need(count, dtype.itemsize, what)
            values = np.frombuffer(self.data, dtype=dtype, count=count, offset=self.at)
            self.at += count * dtype.itemsize
            return (values != 0).tolist() if item == _BOOL else values.tolist()
        # A string takes at least its length field, an array its item type and length.
        self.need(count, 12 if item == _ARRAY else 8, what)
        return [self.value(item, what, depth + 1) for _ in range(count)]


def _read_header(cursor: _Cursor) -> tuple[int, int, int]:
    """Return (version, number of tensors, number of metadata values)."""
    if cursor.data[:4] != _MAGIC:
        raise CheckpointError(f"{cursor.path}: does not start with 'GGUF' at byte 0: not a GGUF file")
    cursor.at = 4
    version = cursor.u32("version")
    if version not in (2, 3):
        hint = "big-endian file" if version in (2 << 24, 3 << 24) else f"version {version}"
        raise CheckpointError(
            f"{cursor.path}: GGUF {hint} at byte 4 is not supported: use a version 2 or 3 file"
        )
    tensor_count = cursor.u64("tensor count")
    value_count = cursor.u64("metadata count")
    cursor.need(value_count, 13, f"a table of {value_count} metadata values")
    cursor.need(tensor_count, 24, f"a table of {tensor_count} tensors")
    return version, tensor_count, value_count


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        start = cursor.at
        key = cursor.string("a metadata key", _MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.fail(f"metadata key {key[:80]!r} is there twice", start)
        metadata[key] = cursor.value(cursor.u32(f"type of {key[:80]!r}"), repr(key[:80]))
    return metadata


def _read_directory(cursor: _Cursor, count: int, metadata: Mapping[str, Any]) -> dict[str, TensorInfo]:
    rows: list[tuple[str, tuple[int, ...], int, int, int]] = []
    for _ in range(count):
        start = cursor.at
        name = cursor.string("a tensor name", _MAX_KEY_BYTES)
        rank = cursor.u32(f"rank of {name[:80]!r}")
        if rank > _MAX_DIMENSIONS:
            raise cursor.fail(f"tensor {name[:80]!r} has {rank} axes (at most {_MAX_DIMENSIONS})", start)
        shape = tuple(cursor.u64(f"shape of {name[:80]!r}") for _ in range(rank))[::-1]
        code = cursor.u32(f"type of {name[:80]!r}")
        rows.append((name, shape, code, cursor.u64(f"offset of {name[:80]!r}"), start))

    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if (
        not isinstance(alignment, int)
        or isinstance(alignment, bool)
        or alignment < 1
        or alignment & (alignment - 1)
    ):
        raise cursor.fail(f"general.alignment is {str(alignment)[:80]}, not a power of two")
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    taken: list[tuple[int, int, str]] = []
    for name, shape, code, offset, start in rows:
        if name in tensors:
            raise cursor.fail(f"tensor {name[:80]!r} is there twice", start)
        if offset % alignment:
            raise cursor.fail(
                f"tensor {name[:80]!r} lies at an offset that is no multiple of {alignment}", start
            )
        nbytes = None
        kind = _OTHER_NAMES.get(code, f"number {code}")
        if code in _DECODED:
            kind, per_block, block_bytes = _DECODED[code]
            if (shape[-1] if shape else 1) % per_block:
                raise cursor.fail(f"rows of tensor {name[:80]!r} are not whole {kind} blocks", start)
            nbytes = math.prod(shape) // per_block * block_bytes
        end = base + offset + (nbytes or 0)
        if end > len(cursor.data):
            raise cursor.fail(
                f"tensor {name[:80]!r} ends at byte {end} of a file of {len(cursor.data)}", start
            )
        if nbytes:
            taken.append((base + offset, end, name))
        tensors[name] = TensorInfo(name=name, shape=shape, type=kind, offset=base + offset, nbytes=nbytes)
    taken.sort()
    for (_, end, left), (begin, _, right) in itertools.pairwise(taken):
        if begin < end:
            raise cursor.fail(f"tensors {left[:80]!r} and {right[:80]!r} overlap", begin)
    return tensors


# --- the Llama family --------------------------------------------------------------------------------------------

# Our reading of llama.cpp's tensor names as transformers' LlamaForCausalLM calls them.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def llama_config(metadata: Mapping[str, Any], tensor_names: Collection[str]) -> dict[str, Any]:
    """Return the ``config.json`` of a ``LlamaForCausalLM`` for this metadata.

    The word table is tied exactly when the file has no ``output.weight``; metadata alone does not say it, therefore
    ``tensor_names`` is asked for.

    Raises:
        CheckpointError: another architecture, a missing or impossible value, or a feature that would change the
            result and is not supported (scaled or partial rotary embedding, attention biases).
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"GGUF architecture {architecture!r} is not supported: use a Llama-family file")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensor_names:
        raise CheckpointError(
            "GGUF file scales its rotary frequencies, which is not supported: use an unscaled one"
        )
    if any(name.endswith(".bias") for name in tensor_names):
        raise CheckpointError(
            "GGUF file has bias tensors, which are not supported: use a Llama file without them"
        )

    hidden = _count(metadata, "llama.embedding_length")
    heads = _count(metadata, "llama.attention.head_count")
    kv_heads = _count(metadata, "llama.attention.head_count_kv", heads)
    head_dim = _count(metadata, "llama.attention.key_length", max(1, hidden // heads))
    value_dim = _count(metadata, "llama.attention.value_length", head_dim)
    rotary = _count(metadata, "llama.rope.dimension_count", head_dim)
    if heads % kv_heads or head_dim % 2 or value_dim != head_dim or rotary != head_dim:
        raise CheckpointError(
            f"GGUF attention sizes do not fit: {heads} heads, {kv_heads} key heads, widths {head_dim}/{value_dim}, "
            f"rotary {rotary}: use a plain Llama file"
        )
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": _count(metadata, "llama.feed_forward_length"),
        "num_hidden_layers": _count(metadata, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": _count(metadata, "llama.vocab_size", len(tokens)),
        "max_position_embeddings": _count(metadata, "llama.context_length"),
        "rope_theta": _real(metadata, "llama.rope.freq_base", 10_000.0),
        "rms_norm_eps": _real(metadata, "llama.attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def hf_llama_shapes(gguf: GGUFFile) -> dict[str, tuple[int, ...]]:
    """Return transformers' parameter names and shapes, in the order in which ``to_hf_llama`` yields them.

    Raises:
        CheckpointError: the directory lacks a tensor of the configuration, has another shape, or has one too many.
    """
    return {name: shape for name, (_, shape) in _llama_plan(gguf, _config(gguf)).items()}


def to_hf_llama(gguf: GGUFFile) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (transformers' name, float32 tensor) one by one, so that memory holds one tensor at a time.

    llama.cpp stores the rows of the query and key projections so that the two halves of a rotary pair are
    neighbours; transformers keeps the first components of all pairs before the second ones. That is undone here.

    Raises:
        CheckpointError: as ``llama_config`` and ``hf_llama_shapes``.
    """
    config = _config(gguf)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for hf_name, (name, _) in _llama_plan(gguf, config).items():
        tensor = gguf.tensor(name)
        part = name.split(".")[-2]
        yield hf_name, (_unpermute(tensor, heads[part]) if part in heads else tensor)


def _unpermute(weight_OI: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (head, pair, half) -> (head, half, pair)."""
    rows, columns = weight_OI.shape
    return weight_OI.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _config(gguf: GGUFFile) -> dict[str, Any]:
    try:
        return llama_config(gguf.metadata, gguf.tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{gguf.path}: {error}") from None


def _llama_plan(gguf: GGUFFile, config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Map each of transformers' names to (name in the file, shape), checked against the directory."""
    layers = config["num_hidden_layers"]
    # Bounded by the directory, not by a number in the header, before any table is built from it.
    if layers * len(_LAYER_NAMES) > len(gguf.tensors):
        raise CheckpointError(
            f"{gguf.path}: {layers} layers but {len(gguf.tensors)} tensors: the file is incomplete"
        )
    width, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    layer_shapes = {
        "attn_norm": (width,),
        "attn_q": (query, width),
        "attn_k": (key, width),
        "attn_v": (key, width),
        "attn_output": (width, query),
        "ffn_norm": (width,),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    plan: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("token_embd.weight", (words, width)),
    }
    for index in range(layers):
        for part, shape in layer_shapes.items():
            plan[f"model.layers.{index}.{_LAYER_NAMES[part]}.weight"] = (f"blk.{index}.{part}.weight", shape)
    plan["model.norm.weight"] = ("output_norm.weight", (width,))
    if not config["tie_word_embeddings"]:
        plan["lm_head.weight"] = ("output.weight", (words, width))

    for name, shape in plan.values():
        info = gguf.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{gguf.path}: tensor {name!r} is missing: the file is incomplete, download it again"
            )
        if info.shape != shape:
            raise CheckpointError(
                f"{gguf.path}: tensor {name!r} has shape {info.shape}, the metadata say {shape}"
            )
    extra = sorted(set(gguf.tensors) - {name for name, _ in plan.values()})
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(f"{gguf.path}: no place in a Llama model for tensor {extra[0][:80]!r}{more}")
    return plan


def _count(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise CheckpointError(
            f"GGUF metadata {key!r} is {str(value)[:80]}, not a positive count: damaged file?"
        )
    return value


def _real(metadata: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = metadata.get(key, default)
    if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
        raise CheckpointError(
            f"GGUF metadata {key!r} is {str(value)[:80]}, not a positive number: damaged file?"
        )
    # Stored as float32: the shortest decimal that means the same float32 is what the author wrote (1e-05).
    return float(str(np.float32(value)))
