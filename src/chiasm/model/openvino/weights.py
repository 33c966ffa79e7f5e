"""Matrices as constants of an OpenVINO graph, whole or compressed, and what a compressed matrix stands for.

Schemes, by the name that users give (``quantize=``):

- None: float16 (float32 where a model is to be exact, or where a value does not fit float16);
- ``int8``: symmetric, one scale an output row;
- ``int4``: symmetric, one scale for each group of 64 (else 32) inputs of a row. The sign of a scale is that
  of minus the group's largest value, which lets that value be -8: one step more than ±7. Matrices whose width is no
  multiple of 32, and the output matrix of the vocabulary, to whose rounding answers are most sensitive, are int8.

A compressed constant is written as the subgraph integers -> convert -> multiply by scales, which OpenVINO's CPU
plugin keeps compressed in memory and expands inside its matrix products. No data are needed and no compression
package: rounding to nearest is twenty lines here.

Legend: O output rows, I inputs, Q groups of a row, R inputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chiasm.errors import ConfigError, missing_extra

__all__ = ["SCHEMES", "Compressed", "check_scheme", "compress", "matrix", "openvino", "rounded", "whole"]

SCHEMES = ("int8", "int4")
"""What `quantize` may be, besides None."""

_GROUPS = (64, 32)
_HALF_MAX = 65504.0


def openvino() -> Any:
    """The package; MissingExtraError, which names the extra, where it is not installed."""
    try:
        import openvino as ov
    except ImportError as error:
        raise missing_extra("openvino", "openvino") from error
    return ov


def check_scheme(quantize: str | None) -> None:
    """Raise ConfigError unless it is None or one of SCHEMES."""
    if quantize is not None and quantize not in SCHEMES:
        raise ConfigError(
            f"quantize {quantize!r} is not known to the openvino backend: use {' or '.join(SCHEMES)}, or leave it out"
        )


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


def compress(weight_OI: Tensor, scheme: str) -> Compressed:
    """Round a matrix to the nearest values of a scheme; see the module."""
    inputs = weight_OI.shape[1]
    groups = [g for g in _GROUPS if inputs % g == 0] if scheme == "int4" else []
    w_OQR = weight_OI.detach().float().unflatten(1, (-1, groups[0] if groups else inputs))
    largest_OQ1 = w_OQR.gather(2, w_OQR.abs().argmax(2, keepdim=True))
    bits, low, high = (4, -8, 7) if groups else (8, -127, 127)
    scales_OQ1 = largest_OQ1 / low if groups else largest_OQ1.abs() / high
    values_OQR = torch.where(scales_OQ1 == 0, 0.0, w_OQR / scales_OQ1).round().clamp(low, high)
    return Compressed(values_OQR.to(torch.int8), scales_OQ1, bits)


def rounded(weight: Tensor, scheme: str | None, *, exact: bool = False) -> Tensor:
    """Float32 values that the graph computes with instead of this weight; the slow twin of `matrix`."""
    weight = weight.detach()
    if scheme is not None:
        return compress(weight, scheme).matrix_OI
    return weight.float() if exact or not _fits_half(weight) else weight.half().float()


def matrix(weight: Tensor, scheme: str | None, *, exact: bool = False) -> Any:
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
