"""A language model as llama.cpp's GGUF: names, keys and the order of rows, in both directions.

Source: llama.cpp's converter (`conversion/*.py`), its constants (`gguf-py`) and the graphs that read the result
(`src/models/*.cpp`), release v0.5.0. A family becomes one of llama.cpp's architectures:

    qwen2 -> qwen2      llama, internlm3 -> llama      phi3 -> phi3 (q|k|v and gate|up stay fused)
    qwen3 -> qwen3      internlm2 -> internlm2

llama and internlm2 rotate neighbouring channels where everyone here rotates the two halves of a head, so the rows of
their q and k are written in another order: (head, half, pair) becomes (head, pair, half). The others are not touched:
llama.cpp rotates those by halves.

Rotary scaling: linear is a pair of keys; llama3 and longrope are tables of divisors of the frequencies, one for each
pair (llama.cpp takes longrope's long table whenever the *context* it was started with is longer than the first
training, not when the text is). `dynamic` has no counterpart and changes nothing up to `max_positions`, so it is left
out, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from chiasm.checkpoint.adapters import Entry, entries
from chiasm.checkpoint.gguf import GGUFFile
from chiasm.checkpoint.gguf_write import BLOCK, GGUFTensor
from chiasm.errors import CheckpointError
from chiasm.nn.rope import Rope
from chiasm.parts.language.config import LanguageConfig

__all__ = [
    "ARCHITECTURES",
    "FILE_TYPES",
    "language_metadata",
    "language_notes",
    "language_tensors",
    "read_language",
    "stored_type",
]

ARCHITECTURES = {
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "llama": "llama",
    "internlm3": "llama",
    "internlm2": "internlm2",
    "phi3": "phi3",
}
"""Family -> llama.cpp's architecture."""

FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
"""`general.file_type` of a file whose matrices are of an element type."""

_FAMILY_OF = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama", "internlm2": "internlm2", "phi3": "phi3"}
_PAIRED = ("llama", "internlm2")  # architectures that rotate neighbouring channels
_NEEDS_HEAD = ("internlm2",)  # architectures whose graph has no tied words

# Native name within a layer -> names of its pieces, whose rows are stacked in that order.
_BLOCK = {
    "norm1.weight": ("attn_norm.weight",),
    "norm2.weight": ("ffn_norm.weight",),
    "attn.qkv.weight": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    "attn.qkv.bias": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "attn.qk_norm.weight": ("attn_q_norm.weight", "attn_k_norm.weight"),
    "attn.out.weight": ("attn_output.weight",),
    "ffn.gate_up.weight": ("ffn_gate.weight", "ffn_up.weight"),
    "ffn.down.weight": ("ffn_down.weight",),
}
_FUSED = {"attn.qkv.weight": ("attn_qkv.weight",), "ffn.gate_up.weight": ("ffn_up.weight",)}
_TOP = {
    "embedder.words.weight": ("token_embd.weight",),
    "trunk.norm.weight": ("output_norm.weight",),
    "head.weight": ("output.weight",),
}
_ROPE_FREQS, _ROPE_LONG, _ROPE_SHORT = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a native tensor, their name in the file, and the heads whose rows are paired anew (0: none)."""

    name: str
    first: int
    rows: int
    heads: int


def stored_type(wanted: str, name: str, shape: tuple[int, ...]) -> str:
    """Element type of a tensor that would be `wanted` if it were a matrix.

    llama.cpp computes with vectors and norms in F32 only; Q8_0 takes whole blocks, other rows become F16.
    """
    if len(shape) == 1 or name.endswith("_norm.weight"):
        return "F32"
    return "F16" if wanted == "Q8_0" and shape[-1] % BLOCK else wanted


def language_metadata(config: LanguageConfig) -> dict[str, Any]:
    """The keys of the architecture (not of the tokenizer, nor `general.*` but the architecture's name)."""
    arch = ARCHITECTURES[config.family]
    out: dict[str, Any] = {
        "block_count": config.layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.freq_base": float(config.rope_theta),
    }
    if arch == "llama":
        out["vocab_size"] = config.vocab_size
    if arch in ("llama", "phi3"):
        out["rope.dimension_count"] = config.head_dim
    if arch == "qwen3" or config.head_dim * config.heads != config.hidden_size:
        out |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    rope = config.rope
    if rope.kind == "linear":
        out |= {"rope.scaling.type": "linear", "rope.scaling.factor": float((rope.scaling or {})["factor"])}
    if arch == "phi3":
        out["attention.sliding_window"] = 0
        out["rope.scaling.original_context_length"] = rope.switch or config.max_positions
        if rope.kind == "longrope":
            out["rope.scaling.attn_factor"] = rope.attention_factor
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in out.items()}


def language_notes(config: LanguageConfig) -> tuple[str, ...]:
    """What llama.cpp computes otherwise than the model; one sentence each.

    Raises:
        CheckpointError: it would compute something else for every text.
    """
    kind = config.rope.kind
    if kind == "longrope" and ARCHITECTURES[config.family] != "phi3":
        raise CheckpointError(
            f"llama.cpp reads rotary scaling of type longrope for Phi-3 only, not for {config.family}: "
            "serve the original layout instead"
        )
    if kind == "dynamic":
        return (
            f"llama.cpp has no dynamic rotary scaling: answers are the same up to {config.max_positions} tokens only",
        )
    if config.rope.switch is not None:
        return (
            f"llama.cpp chooses the rotary factors by its context, not by the text: start it with a context of at most "
            f"{config.rope.switch} tokens, unless texts are longer",
        )
    return ()


def language_tensors(
    config: LanguageConfig, wanted: Callable[[Entry], str], read: Callable[[Entry], Tensor]
) -> list[GGUFTensor]:
    """The tensors of a file, in the order of the plan.

    Args:
        config: the decoder.
        wanted: element type of a native tensor where it is a matrix, a key of `FILE_TYPES`.
        read: gives a native tensor of the plan, when its first piece is written.
    """
    out: list[GGUFTensor] = []
    held = _Held(read)
    for entry in entries(language=config):
        pieces = _pieces(config, entry)
        tied = config.tie_words and ARCHITECTURES[config.family] in _NEEDS_HEAD
        if tied and entry.native == "embedder.words.weight":
            pieces.append(_Piece("output.weight", 0, entry.shape[0], 0))
        for piece in pieces:
            shape = (piece.rows, *entry.shape[1:])
            kind = stored_type(wanted(entry), piece.name, shape)
            out.append(GGUFTensor(piece.name, shape, kind, _reader(held, entry, piece)))
    for name, divisors in _rope_tables(config.rope).items():
        out.append(GGUFTensor(name, tuple(divisors.shape), "F32", lambda divisors=divisors: divisors))
    return out


class _Held:
    """Native tensors as they are asked for; the last one is kept, for the pieces of one are written in a row."""

    def __init__(self, read: Callable[[Entry], Tensor]) -> None:
        self._read = read
        self._last: tuple[Entry, Tensor] | None = None

    def tensor(self, entry: Entry) -> Tensor:
        if self._last is None or self._last[0] is not entry:
            self._last = None  # before the next is read: one in memory, not two
            self._last = (entry, self._read(entry))
        return self._last[1]


def _reader(held: _Held, entry: Entry, piece: _Piece) -> Callable[[], Tensor]:
    def read() -> Tensor:
        rows = held.tensor(entry)[piece.first : piece.first + piece.rows]
        return _paired(rows, piece.heads) if piece.heads else rows

    return read


def _pieces(config: LanguageConfig, entry: Entry) -> list[_Piece]:
    """Names and rows of what one native tensor becomes."""
    arch = ARCHITECTURES[config.family]
    if entry.native in _TOP:
        return [_Piece(_TOP[entry.native][0], 0, entry.shape[0], 0)]
    _, _, layer, rest = entry.native.split(".", 3)
    names = _FUSED[rest] if arch == "phi3" and rest in _FUSED else _BLOCK[rest]
    if len(names) == 1:
        return [_Piece(f"blk.{layer}.{names[0]}", 0, entry.shape[0], 0)]
    out, first = [], 0
    for name, rows in zip(names, entry.rows, strict=True):
        heads = 0
        if arch in _PAIRED and name.startswith(("attn_q.", "attn_k.")):
            heads = config.heads if name.startswith("attn_q.") else config.kv_heads
        out.append(_Piece(f"blk.{layer}.{name}", first, rows, heads))
        first += rows
    return out


def _paired(rows: Tensor, heads: int) -> Tensor:
    """Rows (head, half, pair) -> (head, pair, half)."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).transpose(1, 2).reshape(shape)


def _halved(rows: Tensor, heads: int) -> Tensor:
    """The way back of `_paired`."""
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).transpose(1, 2).reshape(shape)


def _rope_tables(rope: Rope) -> dict[str, Tensor]:
    """Divisors of the frequencies, by tensor name."""
    scaling = rope.scaling or {}
    if rope.kind == "llama3":
        plain = replace(rope, scaling=None).inverse_frequencies()
        return {_ROPE_FREQS: plain / rope.inverse_frequencies()}
    if rope.kind == "longrope":
        return {
            name: torch.tensor(scaling[key], dtype=torch.float32)
            for name, key in ((_ROPE_LONG, "long_factor"), (_ROPE_SHORT, "short_factor"))
        }
    return {}


# --- the way back ----------------------------------------------------------------------------------------------------


def read_language(file: GGUFFile) -> tuple[LanguageConfig, Iterator[tuple[str, Tensor]]]:
    """The decoder in a GGUF file as `language_tensors` writes it: its config, and its native tensors one by one.

    Tensors are float32, whatever the file holds. Rotary scaling comes back as a table only where it was written as
    keys (linear); tables of divisors are left in the file, and so the config of such a file has none.

    Raises:
        CheckpointError: another architecture, an impossible value, or tensors that do not fit the metadata.
    """
    arch = file.metadata.get("general.architecture")
    family = _FAMILY_OF.get(arch) if isinstance(arch, str) else None
    if family is None:
        raise CheckpointError(
            f"{file.path}: GGUF architecture {str(arch)[:80]!r} is not a language model of here"
        )

    def get(key: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{arch}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise CheckpointError(f"{file.path}: metadata {arch}.{key} is {str(value)[:80]}: damaged file?")
        return value

    words = file.tensors.get("token_embd.weight")
    heads, width = get("attention.head_count"), get("embedding_length")
    scaling = None
    if file.metadata.get(f"{arch}.rope.scaling.type") == "linear":
        scaling = {"rope_type": "linear", "factor": get("rope.scaling.factor")}
    config = LanguageConfig(
        family=family,  # type: ignore[arg-type]
        vocab_size=0 if words is None else words.shape[0],
        hidden_size=width,
        intermediate_size=get("feed_forward_length"),
        layers=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length", max(1, width // heads)),
        rope_theta=get("rope.freq_base", 10_000.0),
        rope_scaling=scaling,
        norm_eps=get("attention.layer_norm_rms_epsilon"),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        tie_words="output.weight" not in file.tensors,
        max_positions=get("context_length"),
    )
    if config.layers * 4 > len(file.tensors):  # before a plan is made by the header's word
        raise CheckpointError(
            f"{file.path}: {config.layers} layers but {len(file.tensors)} tensors: the file is incomplete"
        )
    plan = entries(language=config)
    named = {piece.name: (entry, piece) for entry in plan for piece in _pieces(config, entry)}
    for name, (entry, piece) in named.items():
        found = file.tensors.get(name)
        expected = (piece.rows, *entry.shape[1:])
        if found is None or found.shape != expected:
            said = "is missing" if found is None else f"has shape {found.shape}"
            raise CheckpointError(f"{file.path}: tensor {name} {said}, the metadata say {expected}")
    extra = sorted(set(file.tensors) - set(named) - {_ROPE_FREQS, _ROPE_LONG, _ROPE_SHORT})
    if extra:
        raise CheckpointError(f"{file.path}: no place in a {arch} model for tensor {extra[0][:80]!r}")
    return config, _native(file, config, plan)


def _native(file: GGUFFile, config: LanguageConfig, plan: tuple[Entry, ...]) -> Iterator[tuple[str, Tensor]]:
    for entry in plan:
        parts = []
        for piece in _pieces(config, entry):
            rows = file.tensor(piece.name)
            parts.append(_halved(rows, piece.heads) if piece.heads else rows)
        yield entry.native, parts[0] if len(parts) == 1 else torch.cat(parts)
