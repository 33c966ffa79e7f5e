"""Pixel unshuffle: fold each f x f neighbourhood of patches into the channels of one token.

Source: InternVL 1.5 (arXiv 2404.16821), there called pixel shuffle, with ``downsample_ratio`` 1/f (0.5) and
``ps_version``. v2, of all 2.x models: ``out[r, q, (di*f + dj)*C + ch] = in[f*r + di, f*q + dj, ch]``. v1, of
the oldest chat models: the same values with the rows and columns of the *output* grid exchanged.

Shape legend: N images, P = R * Q patches (row-major, no class token), C channels, f = 1 / ratio,
U = P / f^2 tokens, V = C * f^2 channels out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.shapes import Float

__all__ = ["Unshuffle", "pixel_unshuffle", "pixel_unshuffle_reference"]


def _factor(ratio: float) -> int:
    """Return f = 1 / ratio as an integer."""
    factor = round(1.0 / ratio) if 0.0 < ratio <= 1.0 else 0
    if not factor or not math.isclose(factor * ratio, 1.0, rel_tol=1e-6):
        raise ConfigError(f"unshuffle ratio {ratio} is not 1 over a whole number: use 0.5, 0.25 or 1")
    return factor


def _grid(patches: int, factor: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Return (rows, columns), checked against the number of patches and the factor."""
    rows, columns = grid if grid is not None else (math.isqrt(patches), math.isqrt(patches))
    if rows * columns != patches:
        remedy = "pass grid=(rows, columns)" if grid is None else "drop the class token or correct the grid"
        raise ConfigError(f"unshuffle: {patches} patches do not fill a grid of {rows}x{columns}: {remedy}")
    if rows % factor or columns % factor:
        raise ConfigError(
            f"unshuffle: a grid of {rows}x{columns} patches is no multiple of {factor}: change the image size"
        )
    return rows, columns


def _check_version(version: str) -> None:
    if version not in ("v1", "v2"):
        raise ConfigError(f"unshuffle version {version!r} is unknown: use 'v2' (all 2.x models) or 'v1'")


def pixel_unshuffle(
    x_NPC: Float[Tensor, "N P C"],
    ratio: float = 0.5,
    version: str = "v2",
    grid: tuple[int, int] | None = None,
) -> Float[Tensor, "N U V"]:
    """Fold f x f neighbourhoods of patches into channels, f = 1 / ratio.

    Args:
        x_NPC: (N, P, C) patch features, row-major, without the class token.
        ratio: 1 over a whole number; 0.5 turns 4 patches into 1 token of 4 C channels.
        version: ``"v2"``, or ``"v1"`` whose tokens run column by column.
        grid: (rows, columns) of patches; ``None`` for a square.

    Returns:
        (N, P * ratio^2, C / ratio^2), tokens row-major in v2.

    Raises:
        ConfigError: the ratio or version is unknown, or the patches do not form a grid divisible by f.
    """
    f = _factor(ratio)
    _check_version(version)
    N, P, C = x_NPC.shape
    R, Q = _grid(P, f, grid)
    x_NRfQfC = x_NPC.reshape(N, R // f, f, Q // f, f, C)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return x_NRfQfC.permute(order).reshape(N, P // (f * f), C * f * f)


def pixel_unshuffle_reference(
    x_NPC: Tensor, ratio: float = 0.5, version: str = "v2", grid: tuple[int, int] | None = None
) -> Tensor:
    """Slow twin of `pixel_unshuffle`: one copy per output token and neighbour."""
    f = _factor(ratio)
    _check_version(version)
    N, P, C = x_NPC.shape
    R, Q = _grid(P, f, grid)
    x_NRQC = x_NPC.reshape(N, R, Q, C)
    out_NUV = torch.empty(N, P // (f * f), C * f * f, dtype=x_NPC.dtype, device=x_NPC.device)
    for r in range(R // f):
        for q in range(Q // f):
            token = r * (Q // f) + q if version == "v2" else q * (R // f) + r
            for di in range(f):
                for dj in range(f):
                    start = (di * f + dj) * C
                    out_NUV[:, token, start : start + C] = x_NRQC[:, f * r + di, f * q + dj]
    return out_NUV


class Unshuffle(nn.Module):
    """`pixel_unshuffle` as a part of a model; has no parameters.

    Args:
        ratio: 1 over a whole number.
        version: ``"v2"`` or ``"v1"``.

    Raises:
        ConfigError: the ratio or the version is unknown.
    """

    def __init__(self, ratio: float = 0.5, version: str = "v2") -> None:
        super().__init__()
        self.factor = _factor(ratio)
        _check_version(version)
        self.ratio = ratio
        self.version = version

    def tokens(self, patches: int) -> int:
        """Return how many tokens so many patches become.

        Raises:
            ConfigError: the patches do not divide.
        """
        if patches % self.factor**2:
            raise ConfigError(
                f"unshuffle: {patches} patches do not group by {self.factor**2}: change the image size"
            )
        return patches // self.factor**2

    def width(self, channels: int) -> int:
        """Return the channels of a token made of patches with so many channels."""
        return channels * self.factor**2

    def forward(self, x_NPC: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Fold (N, P, C) into (N, tokens(P), width(C)); see `pixel_unshuffle`."""
        return pixel_unshuffle(x_NPC, self.ratio, self.version, grid)

    def extra_repr(self) -> str:
        """Show the setting in ``print(model)``."""
        return f"ratio={self.ratio}, version={self.version}"
