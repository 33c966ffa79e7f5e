"""Random JPEG quality: the one augmentation of InternVL's training, so that models bear pictures as the web has them.

Source: InternVL 2.5 (fact sheet section 3.2): the quality is a uniform integer of 75..100, and the step is applied to
each tile after tiling, each with its own quality. Encoder and decoder are Pillow's, with its default subsampling.

Shape legend: N tiles, S pixels a side.
"""

from __future__ import annotations

import io
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from chiasm.errors import ConfigError

__all__ = ["jpeg_tiles"]


def jpeg_tiles(
    tiles_N3SS: Tensor,
    generator: torch.Generator,
    low: int = 75,
    high: int = 100,
    per: Literal["tile", "image"] = "tile",
) -> Tensor:
    """The tiles as they look after a JPEG of random quality.

    Args:
        tiles_N3SS: (N, 3, S, S) uint8 on the CPU, the tiles of one image; any height and width above 0 will do.
        generator: N numbers are drawn from it, or one with `per="image"`; the pixels depend on nothing else.
        low: least quality.
        high: greatest quality, included.
        per: whether each tile has its own quality or all share one.

    Returns:
        (N, 3, S, S) uint8, a tensor of its own.

    Raises:
        ConfigError: qualities out of 1..100 or in the wrong order, an unknown `per`, tiles of another type or shape.
    """
    if not 1 <= low <= high <= 100:
        raise ConfigError(f"JPEG qualities must satisfy 1 <= low <= high <= 100, got {low} and {high}")
    if per not in ("tile", "image"):
        raise ConfigError(f"per must be tile or image, got {per!r}")
    if tiles_N3SS.dtype != torch.uint8 or tiles_N3SS.ndim != 4 or tiles_N3SS.shape[1] != 3:
        shape = tuple(tiles_N3SS.shape)
        raise ConfigError(
            f"tiles must be uint8 of shape (N, 3, S, S), got {tiles_N3SS.dtype} of shape {shape}"
        )
    count = len(tiles_N3SS)
    if not count:
        return tiles_N3SS.clone()
    draws = torch.randint(low, high + 1, (count if per == "tile" else 1,), generator=generator).tolist()
    qualities = draws if per == "tile" else draws * count
    out_NSS3 = tiles_N3SS.permute(0, 2, 3, 1).contiguous()
    rows = out_NSS3.numpy()
    for n, quality in enumerate(qualities):
        coded = io.BytesIO()
        Image.fromarray(rows[n]).save(coded, "JPEG", quality=quality)
        with Image.open(coded, formats=("JPEG",)) as decoded:
            rows[n] = decoded
    return out_NSS3.permute(0, 3, 1, 2).contiguous()
