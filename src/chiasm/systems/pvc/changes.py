"""What each repeat adds: how much every token differs from the token of the repeat before, over the picture.

Where all repeats say the same, nothing changes anywhere (the symmetry fact: without the time they must be equal); where
they divide the work, each lights up what it adds.

Shape legend: N tiles of a picture, R repeats, K = R_ x Q_ tokens of a tile (rows, columns), C width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from chiasm.errors import UsageError
from chiasm.systems.pvc.load import PVCChat
from chiasm.systems.pvc.plan import repeat_times

__all__ = ["change_maps", "draw_changes"]


@torch.inference_mode()
def change_maps(chat: PVCChat, image: Any, repeats: int | None = None) -> np.ndarray:
    """How much each token of a picture changes from repeat to repeat.

    Args:
        chat: the model.
        image: anything that it takes as a picture; it is shown as one tile.
        repeats: how often; None: as the model does.

    Returns:
        (R - 1, rows, columns) float32: norm of the difference to the token one repeat before, over the token's norm.

    Raises:
        UsageError: fewer than two repeats.
        ImageError: the picture cannot be read.
    """
    from chiasm.media.image import open_image
    from chiasm.media.pixels import normalize

    count = chat.spec.repeats if repeats is None else repeats
    if count < 2:
        raise UsageError(f"{count} repeat(s) cannot differ from each other: show at least 2")
    embedder: Any = chat.model.embedder
    weight = embedder.vision.patch_embedding.weight
    tile = chat.spec.tiles.tile(open_image(image, orient=chat.spec.tiles.orient), 1)
    pixels = normalize(tile.to(weight.device), chat.spec.tiles, dtype=weight.dtype)
    times = repeat_times(count, chat.config)
    tokens_RKC: Tensor = embedder.until_settled(pixels, times, 0.0)[0].float()
    change_RK = (tokens_RKC[1:] - tokens_RKC[:-1]).norm(dim=-1) / tokens_RKC[1:].norm(dim=-1).clamp_min(1e-12)
    side = math.isqrt(change_RK.shape[1])
    maps = change_RK.unflatten(1, (side, side)).cpu()
    if chat.config.unshuffle == "v1":  # its tokens run column by column
        maps = maps.transpose(1, 2)
    return maps.numpy()


def draw_changes(image: Image.Image, maps: np.ndarray, *, side: int = 224) -> Image.Image:
    """The picture, then one copy for each repeat, the redder the more its tokens change; all by one scale.

    Args:
        image: the picture.
        maps: of `change_maps`.
        side: of each copy in pixels.
    """
    picture = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    sheet = Image.new("RGB", ((1 + len(maps)) * side, side + 16), "white")
    draw = ImageDraw.Draw(sheet)
    sheet.paste(picture, (0, 16))
    draw.text((4, 2), "picture", fill="black")
    grey = np.asarray(picture.convert("L"), dtype=np.float32)
    most = max(float(maps.max(initial=0.0)), 1e-12)
    for n, map_RQ in enumerate(maps):
        heat = Image.fromarray((255 * map_RQ / most).astype(np.uint8)).resize(
            (side, side), Image.Resampling.NEAREST
        )
        share = np.asarray(heat, dtype=np.float32)[..., None] / 255
        plain = np.repeat(grey[..., None], 3, axis=2)
        mixed = plain * (1 - 0.7 * share) + np.array([255.0, 0.0, 0.0], dtype=np.float32) * 0.7 * share
        left = (1 + n) * side
        sheet.paste(Image.fromarray(mixed.astype(np.uint8)), (left, 16))
        draw.text(
            (left + 4, 2), f"repeat {n + 2}: mean {map_RQ.mean():.2f}, most {map_RQ.max():.2f}", fill="black"
        )
    return sheet
