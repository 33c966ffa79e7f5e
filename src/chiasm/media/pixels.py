"""From uint8 tiles to the float pixels that the encoder sees.

Source: InternVL 2.5, the eval transform (``x/255``, then ``(x - mean) / std``, all in float32);
transformers scales by ``1/255`` in float64, rounds to float32, and goes on alike. For each of the 256
values and the three presets the two give the same float32 number (tested over all of them), so that one
arithmetic serves every mode of `TilePolicy`.

Shape legend: N tiles, 3 colour channels, S tile side, D features, K kernel side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chiasm.errors import ImageError
from chiasm.media.tiles import TilePolicy
from chiasm.shapes import Float, UInt8

__all__ = ["normalize"]


def normalize(
    tiles_N3SS: UInt8[Tensor, "N 3 S S"],
    policy: TilePolicy,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Float[Tensor, "N 3 S S"]:
    """Normalise tiles by the policy's mean and std.

    The tiles move to the device as uint8 (a quarter of the bytes), the arithmetic runs there in float32,
    and the result is rounded to ``dtype`` last.

    Args:
        tiles_N3SS: (N, 3, S, S) uint8, RGB; N may be 0.
        policy: gives mean and std, in the scale 0..1.
        dtype: of the result.
        device: of the result; default: where the tiles are.

    Raises:
        ImageError: tiles of another type or shape.
    """
    if tiles_N3SS.dtype != torch.uint8 or tiles_N3SS.ndim != 4 or tiles_N3SS.shape[1] != 3:
        raise ImageError(
            f"cannot normalise {tiles_N3SS.dtype} of shape {tuple(tiles_N3SS.shape)}; "
            "give uint8 tiles (N, 3, S, S)"
        )
    # Divisors are tensors on the device: by a Python number, CUDA would multiply with the rounded
    # reciprocal instead.
    full = torch.tensor(255.0, device=device or tiles_N3SS.device)
    mean_C11 = torch.tensor(policy.mean, device=full.device).view(3, 1, 1)
    std_C11 = torch.tensor(policy.std, device=full.device).view(3, 1, 1)
    pixels_N3SS = tiles_N3SS.to(full.device).to(torch.float32)
    return pixels_N3SS.div_(full).sub_(mean_C11).div_(std_C11).to(dtype)
