"""GGUF: write llama.cpp's single-file checkpoints without llama.cpp.

Source: the GGUF description in the ggml repository, version 3, little-endian; `gguf.py` here reads what is written.
A file is a header, typed metadata, a directory of tensors, and a data section where every tensor starts at a multiple
of 32 bytes. The directory comes before the data, so shapes and types are planned first (`GGUFTensor`) and the values
are asked for one tensor at a time: memory holds one tensor, not a model.

Element types: F32, F16, BF16, and Q8_0 (32 values a block: fp16 d = max|y| / 127, then 32 x int8 round(y / d), halves
away from zero, as ggml's reference does it).
"""

from __future__ import annotations

import math
import os
import secrets
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from chiasm.errors import CheckpointError

__all__ = ["ALIGNMENT", "BLOCK", "TYPES", "GGUFTensor", "write_gguf"]

ALIGNMENT = 32
BLOCK = 32
"""Values of one Q8_0 block; a row must be whole blocks."""

TYPES: dict[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q8_0": (8, BLOCK, 34),
    "BF16": (30, 1, 2),
}
"""Name -> (code, values a block, bytes a block)."""

_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor that is to be written: its name, its shape in torch's order, its element type, and where to get it.

    `read` is called once, when its turn has come, and returns a tensor of that shape and of any floating dtype.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size in the file, without padding."""
        _, values, size = TYPES[self.type]
        return math.prod(self.shape) // values * size


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[GGUFTensor],
    *,
    shown: str | Path | None = None,
) -> int:
    """Write one GGUF file, atomically.

    Args:
        path: the file; replaced if it exists.
        metadata: keys and values: str, bool, float (32 bit), int, or a list of one of these, which must not be empty.
            An int is a count (unsigned, 32 bit), in a list a signed number (32 bit): what llama.cpp asks for.
        tensors: in the order of the file.
        shown: what an error calls the file; None for ``path``.

    Returns:
        Size of the file in bytes.

    Raises:
        CheckpointError: a name occurs twice, a value or shape cannot be written, a value does not fit the element type
            (a bfloat16 weight beyond float16's range), or the file cannot be written.
    """
    path = Path(path)
    head = _head(metadata, tensors)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(head)
            for tensor in tensors:
                _write_tensor(file, tensor)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {shown or path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return size


def _head(metadata: Mapping[str, Any], tensors: Sequence[GGUFTensor]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        code, raw = _value(key, value)
        parts += [_text(key), struct.pack("<I", code), raw]
    seen: set[str] = set()
    at = 0
    for tensor in tensors:
        if tensor.name in seen:
            raise CheckpointError(f"tensor name {tensor.name} occurs twice: rename one")
        seen.add(tensor.name)
        _check_shape(tensor)
        # ggml lists the fastest axis first.
        axes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        parts += [_text(tensor.name), axes, struct.pack("<IQ", TYPES[tensor.type][0], at)]
        at += _padded(tensor.nbytes)
    head = b"".join(parts)
    return head + bytes(-len(head) % ALIGNMENT)


def _check_shape(tensor: GGUFTensor) -> None:
    if tensor.type not in TYPES:
        raise CheckpointError(
            f"tensor {tensor.name}: no element type {tensor.type!r}: use {', '.join(TYPES)}"
        )
    if not 1 <= len(tensor.shape) <= _MAX_DIMENSIONS or not all(size > 0 for size in tensor.shape):
        raise CheckpointError(f"tensor {tensor.name} of shape {tensor.shape} cannot be written to GGUF")
    if tensor.shape[-1] % TYPES[tensor.type][1]:
        raise CheckpointError(
            f"tensor {tensor.name}: rows of {tensor.shape[-1]} values are no whole {tensor.type} blocks of {BLOCK}"
        )


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any, *, item: bool = False) -> tuple[int, bytes]:
    """(type code, bytes) of a metadata value, or of an item of a list."""
    if isinstance(value, list | tuple):
        items = [_value(key, one, item=True) for one in value]
        codes = {code for code, _ in items}
        if len(codes) != 1 or _ARRAY in codes:
            raise CheckpointError(
                f"GGUF metadata {key!r}: a list needs items of one plain kind, and at least one"
            )
        return _ARRAY, struct.pack("<IQ", codes.pop(), len(items)) + b"".join(raw for _, raw in items)
    whole: tuple[type, int, str] = (int, 5, "<i") if item else (int, 4, "<I")
    kinds: tuple[tuple[type, int, str], ...] = ((bool, 7, "<?"), whole, (float, 6, "<f"))
    for kind, code, form in kinds:
        if isinstance(value, kind):
            try:
                return code, struct.pack(form, value)
            except (struct.error, OverflowError):
                raise CheckpointError(
                    f"GGUF metadata {key!r} is {value!r}: it does not fit in 32 bits"
                ) from None
    if isinstance(value, str):
        return _STRING, _text(value)
    raise CheckpointError(
        f"GGUF metadata {key!r} is {value!r}: text, numbers and lists of them can be written"
    )


def _write_tensor(file: BinaryIO, planned: GGUFTensor) -> None:
    tensor = planned.read().detach().to("cpu")
    if tuple(tensor.shape) != planned.shape:
        raise CheckpointError(
            f"tensor {planned.name} should have shape {planned.shape}, found {tuple(tensor.shape)}"
        )
    for part in _encoded(planned, tensor):
        file.write(part.data)
    file.write(bytes(_padded(planned.nbytes) - planned.nbytes))


_CHUNK = 1 << 22  # values that are encoded at a time


def _encoded(planned: GGUFTensor, tensor: Tensor) -> Iterable[np.ndarray]:
    """The bytes of a tensor, piece by piece, so that a cast copies a piece and not the whole."""
    flat = tensor.contiguous().reshape(-1)
    for piece in flat.split(_CHUNK):  # a multiple of the block
        if planned.type == "Q8_0":
            yield _q8_0(planned.name, piece.float().numpy())
            continue
        kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[planned.type]
        cast = piece.to(kind)
        if planned.type == "F16" and piece.dtype != torch.float16:
            lost = torch.isinf(cast) & torch.isfinite(piece)
            if bool(lost.any()):
                value = float(piece[lost][0])
                raise CheckpointError(
                    f"tensor {planned.name} holds {value:g}, beyond what float16 can: write it as bf16 or f32"
                )
        yield cast.view(torch.uint8).numpy()


def _q8_0(name: str, values: np.ndarray) -> np.ndarray:
    blocks = values.reshape(-1, BLOCK)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        raise CheckpointError(f"tensor {name} holds infinite values or NaN: it cannot be quantised, use f32")
    scale = largest / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    size = np.abs(blocks * inverse)
    floor = np.floor(size)
    q = np.sign(blocks) * (floor + np.floor(2 * (size - floor)))  # half away from zero
    with np.errstate(over="ignore"):
        d = scale.astype(np.float16)
    if not np.isfinite(d).all():
        raise CheckpointError(f"tensor {name} holds {largest.max():g}, too large for Q8_0's scales: use f32")
    out = np.empty((len(blocks), 34), dtype=np.uint8)
    out[:, :2] = d.view(np.uint8)
    out[:, 2:] = q.astype(np.int8).view(np.uint8)
    return out.reshape(-1)
