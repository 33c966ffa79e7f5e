"""Light augmentation of uint8 pictures; all randomness comes from the generator given.

Shape legend: N pictures of S x S pixels, row 0 on top.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["augment", "mirror"]


def mirror(images_NSS3: Tensor, flipped_N: Tensor) -> Tensor:
    """Return the pictures, those of ``flipped_N`` mirrored left to right."""
    return torch.where(flipped_N.view(-1, 1, 1, 1), images_NSS3.flip(2), images_NSS3)


def augment(images_NSS3: Tensor, warped_N: Tensor, random: torch.Generator) -> Tensor:
    """Shift by up to 4 px and zoom by 0.9 to 1.15 where ``warped_N``; change brightness and contrast of all by 15 %.

    Returns uint8 like the input. The shift is a quarter of a token at most, so maps still belong to their places.
    """
    n, side = images_NSS3.shape[0], images_NSS3.shape[1]
    x_N3SS = images_NSS3.permute(0, 3, 1, 2).float()
    zoom_N = 0.9 + 0.25 * torch.rand(n, generator=random)
    shift_N2 = (torch.rand(n, 2, generator=random) * 2 - 1) * (8 / side)
    gain_N, offset_N = 0.85 + 0.3 * torch.rand(n, generator=random), 38 * torch.rand(n, generator=random) - 19
    theta_N23 = torch.zeros(n, 2, 3)
    theta_N23[:, 0, 0] = theta_N23[:, 1, 1] = 1 / zoom_N
    theta_N23[:, :, 2] = shift_N2
    rows = warped_N.nonzero().flatten()
    if len(rows):
        grid_NSS2 = F.affine_grid(theta_N23[rows], [len(rows), 3, side, side], align_corners=False)
        x_N3SS[rows] = F.grid_sample(x_N3SS[rows], grid_NSS2, padding_mode="border", align_corners=False)
    middle_N111 = x_N3SS.mean((1, 2, 3), keepdim=True)
    x_N3SS = (x_N3SS - middle_N111) * gain_N.view(-1, 1, 1, 1) + middle_N111 + offset_N.view(-1, 1, 1, 1)
    return x_N3SS.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
