"""Starting points for a small vision transformer that must learn from few pictures.

What: ``whiten_patches_`` (the patch projection starts as a damped PCA whitening of real patches) and
``sincos_positions_`` (positions start as 2-D sines and cosines). Both only choose initial values; every weight is
trained afterwards.
Why: pixel patches are dominated by their mean colour, with the edges that matter far weaker. A random
projection passes that imbalance on; whitening removes it.
Sources: whitened first layers as in fast CIFAR-10 training; sine-cosine positions as in plain ViT baselines
(arXiv 2205.01580).

Shape legend: N pictures of S x S pixels, M patches of E = 3 s^2 numbers, C width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.errors import ConfigError

__all__ = ["sincos_positions_", "whiten_patches_"]


@torch.no_grad()
def whiten_patches_(
    projection: nn.Conv2d, pixels_N3SS: Tensor, *, damping: float = 0.02, scale: float = 0.5
) -> None:
    """Set a patch projection to the leading axes of these normalised pixels' patches, each near unit variance.

    Args:
        projection: stride equal to kernel size; its C outputs become the C leading principal axes.
        pixels_N3SS: pictures as the encoder sees them.
        damping: share of the mean variance added to each axis's variance before it is scaled up, which keeps
            axes of pure noise small.
        scale: standard deviation of a strong axis afterwards.

    Raises:
        ConfigError: more outputs than numbers in a patch.
    """
    side, width = projection.kernel_size[0], projection.out_channels
    patches_ME = F.unfold(pixels_N3SS.double(), side, stride=side).transpose(1, 2).flatten(0, 1)
    if width > patches_ME.shape[1]:
        raise ConfigError(
            f"{width} outputs cannot be axes of patches of {patches_ME.shape[1]} numbers: do not whiten this encoder"
        )
    mean_E = patches_ME.mean(0)
    variance_E, axes_EE = torch.linalg.eigh((patches_ME - mean_E).T @ (patches_ME - mean_E) / len(patches_ME))
    # eigh fixes axes up to their sign; a fixed sign keeps the start the same across libraries.
    axes_EE = axes_EE * axes_EE.gather(0, axes_EE.abs().argmax(0, keepdim=True)).sign()
    variance_C, axes_EC = variance_E.flip(0)[:width], axes_EE.flip(1)[:, :width]
    weight_CE = (scale * axes_EC / (variance_C + damping * variance_E.mean()).sqrt()).T
    projection.weight.copy_(weight_CE.view_as(projection.weight))
    if projection.bias is not None:
        projection.bias.copy_(-(weight_CE @ mean_E))


@torch.no_grad()
def sincos_positions_(position_embedding: Tensor, grid: int, *, scale: float = 0.5) -> None:
    """Set a (1, 1 + grid^2, C) position embedding to 2-D sines and cosines; the class token's stays as it is.

    A quarter of the channels each: sine and cosine of the row, sine and cosine of the column.

    Raises:
        ConfigError: C is not a multiple of 4, or the embedding is for another grid.
    """
    width = position_embedding.shape[-1]
    if width % 4 or position_embedding.shape[1] != 1 + grid * grid:
        raise ConfigError(
            f"positions of shape {tuple(position_embedding.shape)} do not fit a grid of {grid} x {grid}: "
            "the width must be a multiple of 4"
        )
    rates_Q = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles_GQ = torch.arange(grid, dtype=torch.float64)[:, None] * rates_Q
    waves_GH = torch.cat([angles_GQ.sin(), angles_GQ.cos()], dim=1)
    rows_PH, columns_PH = waves_GH.repeat_interleave(grid, 0), waves_GH.repeat(grid, 1)
    position_embedding[0, 1:] = scale * torch.cat([rows_PH, columns_PH], dim=1)
