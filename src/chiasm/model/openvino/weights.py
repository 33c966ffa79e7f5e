"""Matrices as constants of an OpenVINO graph, whole or compressed, and what a compressed matrix stands for.

The words are those of `chiasm.model.quantize`, the rounding is the plainest that OpenVINO's CPU plugin is fast with:

- no word: float16 (float32 where a model is to be exact, or where a value does not fit float16);
- `int8`: symmetric, one scale an output row. `vision-w8a8` is the same for the encoder;
- `int4`: symmetric, one scale for each group of inputs of a row. The sign of a scale is that of minus the group's
  largest value, which lets that value be -8: one step more than ±7. Matrices whose width is no multiple of the group
  are int8, and so is the head, which has the last word.

A compressed constant is written as the subgraph integers -> convert -> multiply by scales, which OpenVINO's CPU
plugin keeps compressed in memory and expands inside its matrix products. No data are needed and no compression
package: rounding to nearest is twenty lines here.

Legend: O output rows, I inputs, Q groups of a row, R inputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chiasm.errors import UsageError, missing_extra
from chiasm.model.quantize import Quantization

__all__ = [
    "INT8",
    "Compressed",
    "Scheme",
    "compress",
    "core",
    "matrix",
    "openvino",
    "rounded",
    "schemes",
    "whole",
]

_HALF_MAX = 65504.0


def openvino() -> Any:
    """The package; MissingExtraError, which names the extra, where it is not installed."""
    try:
        import openvino as ov
    except ImportError as error:
        raise missing_extra("openvino", "openvino") from error
    return ov


@cache
def core() -> Any:
    """The one `openvino.Core` of this process, which is never let go.

    The CPU plugin of every core gives the thread that makes it an alternate signal stack, and frees it with the core.
    Of two cores that do not end in reverse order, a freed stack stays registered, and the next signal (Ctrl-C) ends
    the process with a segmentation fault (seen with openvino 2026.4.1).
    """
    return openvino().Core()


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a matrix is compressed: `bits` of its integers (8 or 4), and inputs that share a scale (0: a whole row)."""

    bits: int
    group: int = 0


INT8 = Scheme(8)


def schemes(quantize: str | None) -> tuple[Scheme | None, Scheme | None]:
    """Schemes of the language model and of the encoder; UsageError for words that this backend does not have."""
    if quantize is None:
        return None, None
    how = Quantization.parse(quantize)
    if how.language == "w8a8":
        raise UsageError(
            f"quantize {quantize!r}: the openvino backend has no w8a8 for the language model, its int8 rounds "
            "activations too: use int8"
        )
    language = {None: None, "int8": INT8, "int4": Scheme(4, how.group)}[how.language]
    return language, INT8 if how.vision else None


@dataclass(frozen=True, slots=True)
class Compressed:
    """Integers (O, Q, R) as int8 and their float32 scales (O, Q, 1); `bits` of the integers is 8 or 4."""

    values_OQR: Tensor
    scales_OQ1: Tensor
    bits: int

    @property
    def matrix_OI(self) -> Tensor:
        """(O, I) float32: what the integers stand for."""
        return (self.values_OQR.float() * self.scales_OQ1).flatten(1)


def compress(weight_OI: Tensor, scheme: Scheme) -> Compressed:
    """Round a matrix to the nearest values of a scheme; see the module."""
    inputs = weight_OI.shape[1]
    grouped = scheme.bits == 4 and inputs % scheme.group == 0
    w_OQR = weight_OI.detach().float().unflatten(1, (-1, scheme.group if grouped else inputs))
    largest_OQ1 = w_OQR.gather(2, w_OQR.abs().argmax(2, keepdim=True))
    bits, low, high = (4, -8, 7) if grouped else (8, -127, 127)
    scales_OQ1 = largest_OQ1 / low if grouped else largest_OQ1.abs() / high
    values_OQR = torch.where(scales_OQ1 == 0, 0.0, w_OQR / scales_OQ1).round().clamp(low, high)
    return Compressed(values_OQR.to(torch.int8), scales_OQ1, bits)


def rounded(weight: Tensor, scheme: Scheme | None, *, exact: bool = False) -> Tensor:
    """Float32 values that the graph computes with instead of this matrix; the slow twin of `matrix`."""
    weight = weight.detach()
    if scheme is not None:
        return compress(weight, scheme).matrix_OI
    return weight.float() if exact or not _fits_half(weight) else weight.half().float()


def matrix(weight: Tensor, scheme: Scheme | None, *, exact: bool = False) -> Any:
    """A node of float32 (O, I) for a matrix, compressed by `scheme`; `exact` keeps float32 where it is None."""
    ov = openvino()
    op = ov.opset13
    if scheme is None:
        return whole(weight, exact=exact)
    packed = compress(weight, scheme)
    outputs, groups, group = packed.values_OQR.shape
    values, scales = packed.values_OQR.numpy(), packed.scales_OQ1.numpy()
    if packed.bits == 8:  # one group, so a matrix
        return op.multiply(op.convert(op.constant(values[:, 0]), ov.Type.f32), op.constant(scales[:, 0]))
    pairs = values.reshape(-1, 2)
    nibbles = ((pairs[:, 0] & 15) | ((pairs[:, 1] & 15) << 4)).astype(np.uint8)
    # Copied (False): OpenVINO would not keep the array alive.
    constant = ov.op.Constant(ov.Tensor(nibbles, [outputs, groups, group], ov.Type.i4), False)
    expanded = op.multiply(op.convert(constant, ov.Type.f32), op.constant(scales))
    return op.reshape(expanded, op.constant(np.array([outputs, groups * group], np.int64)), False)


def whole(weight: Tensor, *, exact: bool = False) -> Any:
    """A float32 node for a weight of any shape, stored in float16 unless `exact` or out of its range."""
    ov = openvino()
    op = ov.opset13
    weight = weight.detach().cpu()
    if exact or not _fits_half(weight):
        return op.constant(weight.float().numpy())
    return op.convert(op.constant(weight.half().numpy()), ov.Type.f32)


def _fits_half(weight: Tensor) -> bool:
    return bool(weight.abs().max() <= _HALF_MAX) if weight.numel() else True
