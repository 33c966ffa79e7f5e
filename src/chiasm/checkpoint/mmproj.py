"""InternViT and projector as llama.cpp's `mmproj` file, the half of a GGUF model that sees.

Source: llama.cpp's converter (`conversion/internvl.py`), and the graph that reads the result
(`tools/mtmd/models/internvl.cpp`, `tools/mtmd/clip.cpp`), release v0.5.0. Keys are `clip.*` and `clip.vision.*`.

The graph has less freedom than our encoder, and what it would compute otherwise is refused:

- Its norm is not in the file: RMSNorm exactly where the encoder is 3200 wide and 45 layers deep (InternViT-6B),
  LayerNorm everywhere else.
- Its tokens are unshuffled as `ps_version` v2, and it reads the last layer.
- It cuts every picture into tiles with an overview behind them (`mmproj_notes`), and normalises by the file's mean
  and std.

One thing is written otherwise than by that converter. The graph appends the class token behind the patches and then
adds the position rows in the order of the file, where the converter leaves the class token's row first: every patch
gets its neighbour's position. Here that row is written last (`class-last`), so that the graph computes what the model
does; `class-first` gives the converter's own bytes, for releases whose graph reads them right. Both were run
(docs/serving.md has the numbers); `chiasm.position_rows` in the file says which order it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from chiasm.checkpoint.adapters import Entry, entries
from chiasm.checkpoint.config import InternVLPublicConfig
from chiasm.checkpoint.gguf_write import GGUFTensor
from chiasm.checkpoint.llamacpp import stored_type
from chiasm.errors import CheckpointError, UsageError
from chiasm.media.tiles import TilePolicy
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig

__all__ = ["POSITION_ROWS", "RELEASE", "PositionRows", "mmproj_metadata", "mmproj_notes", "mmproj_tensors"]

PositionRows = Literal["class-last", "class-first"]
POSITION_ROWS: tuple[PositionRows, ...] = get_args(PositionRows)

RELEASE = "v0.5.0"
"""Last release of llama.cpp whose graph is known to want the class token's row last."""

_POSITIONS = "v.position_embd.weight"

_RMS_NORM_SHAPE = (3200, 45)  # width and layers of the encoder that llama.cpp takes for InternViT-6B

_TOP = {
    "class_embedding": "v.class_embd",
    "patch_embedding.weight": "v.patch_embd.weight",
    "patch_embedding.bias": "v.patch_embd.bias",
    "position_embedding": _POSITIONS,
}
_BLOCK = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn.proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_GAINS = {"ls1": "ls1.weight", "ls2": "ls2.weight"}
_CONNECT = {"norm": 0, "fc1": 1, "fc2": 3}  # 2 is the GELU between them


def mmproj_metadata(
    public: InternVLPublicConfig,
    vision: InternViTConfig,
    language: LanguageConfig,
    policy: TilePolicy,
    position_rows: PositionRows = "class-last",
) -> dict[str, Any]:
    """The keys of the file, all but `general.file_type`.

    Raises:
        CheckpointError: llama.cpp's graph would compute something else.
        UsageError: an unknown order of position rows.
    """
    if position_rows not in POSITION_ROWS:
        raise UsageError(
            f"unknown order of position rows {position_rows!r}: use one of {', '.join(POSITION_ROWS)}"
        )
    _check(public, vision, policy)
    tiles = (policy.min_tiles, policy.max_tiles) if policy.dynamic else (1, 1)
    return {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "internvl",
        "clip.use_gelu": True,
        "clip.vision.projection_dim": language.hidden_size,
        "clip.vision.image_size": public.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.block_count": vision.layers,
        "clip.vision.attention.head_count": vision.heads,
        "clip.vision.attention.layer_norm_epsilon": float(vision.norm_eps),
        "clip.vision.image_mean": [float(value) for value in policy.mean],
        "clip.vision.image_std": [float(value) for value in policy.std],
        "clip.vision.projector.scale_factor": round(1 / public.downsample_ratio),
        "clip.vision.preproc_min_tiles": tiles[0],
        "clip.vision.preproc_max_tiles": tiles[1],
        "general.description": _positions_note(position_rows),
        "chiasm.position_rows": position_rows,
    }


def _check(public: InternVLPublicConfig, vision: InternViTConfig, policy: TilePolicy) -> None:
    rms = (vision.hidden_size, vision.layers) == _RMS_NORM_SHAPE
    wrong = None
    if (vision.norm == "rms_norm") != rms:
        wrong = f"an encoder {vision.hidden_size} wide and {vision.layers} layers deep with {vision.norm}"
    elif vision.qk_norm and vision.norm != "rms_norm":
        wrong = "norms of queries and keys beside LayerNorm"
    elif public.ps_version != "v2":
        wrong = "the pixel unshuffle of ps_version 'v1'"
    elif public.select_layer != -1:
        wrong = f"the encoder's layer {public.select_layer} instead of the last"
    elif policy.pad2square:
        wrong = "pictures that are padded to a square"
    elif public.image_size != vision.image_size:
        wrong = f"tiles of {public.image_size} pixels with positions for {vision.image_size} (convert --image-size)"
    if wrong:
        raise CheckpointError(
            f"llama.cpp has no graph for {wrong}: serve the original or hf layout, or --to language and then to gguf"
        )


def mmproj_notes(policy: TilePolicy, position_rows: PositionRows = "class-last") -> tuple[str, ...]:
    """The order of the position rows, and how llama.cpp cuts pictures otherwise than the model; one sentence each."""
    notes = (_positions_note(position_rows),)
    if policy.dynamic and policy.max_tiles > 1 and not policy.thumbnail:
        return (*notes, "llama.cpp always adds an overview of a picture that it cuts; the source does not")
    return notes


def _positions_note(position_rows: PositionRows) -> str:
    if position_rows == "class-last":
        return (
            f"the encoder's position rows are written for llama.cpp up to {RELEASE} (class token last); for a release "
            "whose graph is fixed, or another program: --position-rows class-first"
        )
    return (
        "the encoder's position rows are in the order of llama.cpp's converter (class token first); its graph up to "
        f"{RELEASE} needs the other: --position-rows class-last"
    )


def mmproj_tensors(
    vision: InternViTConfig,
    language: LanguageConfig,
    downsample_ratio: float,
    wanted: Callable[[Entry], str],
    read: Callable[[Entry], Tensor],
    position_rows: PositionRows = "class-last",
) -> list[GGUFTensor]:
    """The tensors of the file; `read` gives a native tensor of the plan, `wanted` its element type as a matrix."""
    last = position_rows == "class-last"
    out: list[GGUFTensor] = []
    for entry in entries(language=language, vision=vision, downsample_ratio=downsample_ratio):
        if not entry.native.startswith(("embedder.vision.", "embedder.connect.")):
            continue
        names = _names(entry.native)
        shape = _squeezed(entry.shape)
        rows = entry.rows if len(names) > 1 else shape[:1]
        first = 0
        for name, count in zip(names, rows, strict=True):
            size = (count, *shape[1:])
            out.append(
                GGUFTensor(
                    name,
                    size,
                    _type(wanted(entry), name, size),
                    _reader(entry, read, shape, first, count, last),
                )
            )
            first += count
    return out


def _type(wanted: str, name: str, shape: tuple[int, ...]) -> str:
    """Positions are added to sums in F32, and the patches are a convolution, whose kernel is F16 or F32."""
    if name == _POSITIONS:
        return "F32"
    if name == "v.patch_embd.weight":
        return "F16" if wanted == "F16" else "F32"
    return stored_type(wanted, name, shape)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Class token and positions without their axes of one."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _reader(
    entry: Entry,
    read: Callable[[Entry], Tensor],
    shape: tuple[int, ...],
    first: int,
    count: int,
    class_last: bool,
) -> Callable[[], Tensor]:
    def read_rows() -> Tensor:
        rows = read(entry).reshape(shape)[first : first + count]
        if class_last and entry.native == "embedder.vision.position_embedding":
            return torch.cat((rows[1:], rows[:1]))
        return rows

    return read_rows


def _names(native: str) -> tuple[str, ...]:
    """Names of a native tensor's pieces."""
    _, part, rest = native.split(".", 2)
    if part == "connect":
        stem, _, leaf = rest.rpartition(".")
        return (f"mm.model.mlp.{_CONNECT[stem]}.{leaf}",)
    if rest in _TOP:
        return (_TOP[rest],)
    _, layer, name = rest.split(".", 2)
    base = f"v.blk.{layer}."
    if name in _GAINS:
        return (base + _GAINS[name],)
    stem, _, leaf = name.rpartition(".")
    if stem == "attn.qkv":
        return tuple(f"{base}attn_{which}.{leaf}" for which in "qkv")
    return (f"{base}{_BLOCK[stem]}.{leaf}",)
