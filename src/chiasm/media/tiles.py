"""The tile policy: into how many S x S tiles a picture is cut, and the cutting; one object for all uses.

Source: InternVL 2.5 section on dynamic resolution. All grids (columns, rows) with min_tiles <= columns *
rows <= max_tiles compete; the one nearest to the picture's aspect ratio wins; of exactly equal ones a
larger replaces a smaller where the picture has more than half of the larger one's pixels. The whole picture
is resized to the grid (which distorts it a little), cut row by row, and, if there is more than one tile,
the whole picture at S x S comes last (the thumbnail).

Modes:
- ``chiasm`` (default): the rules above, on the picture turned upright by its EXIF orientation.
- ``original``: the released remote code: the same, on the picture as stored (no EXIF rotation).
- ``hf``: the processor of transformers: as stored; the thumbnail is not optional; no square padding;
  several images do not share the tile budget (each may have max_tiles).

Given the same picture and limit, the grid, the uint8 tiles and the float pixels (`pixels.normalize`) are
the same in all three modes, bit for bit.

Resizing: ``resize="exact"`` is Pillow's bicubic filter, hence bit-identical to the released pipelines
beside the same Pillow (Pillow 13 changed the order of its two passes for some shapes, which moves a few
values there). ``"fast"`` is torch's antialiased bicubic filter on uint8, several times quicker. Measured
against ``exact`` (Pillow 13, torch 2.13, CPU with AVX2; smooth, noisy and black-and-white synthetic
pictures of nine sizes): at most 2 grey levels, mean below 0.011, under 1.1 % of the values touched. Without
AVX2 torch takes another route, whose rounding may differ.

Shape legend: N tiles (thumbnail included), 3 channels RGB, S tile side, H x W picture.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import InitVar, dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from chiasm.errors import ConfigError, ImageError
from chiasm.media.image import to_rgb
from chiasm.shapes import UInt8

__all__ = ["NORMALIZATIONS", "Mode", "Resize", "TilePolicy", "closest_grid", "grids", "pad2square"]

Mode = Literal["chiasm", "original", "hf"]
Resize = Literal["exact", "fast"]
Colour = tuple[float, float, float]

NORMALIZATIONS: dict[str, tuple[Colour, Colour]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and std by the name that training scripts give them (``normalize_type``)."""


@lru_cache(maxsize=256)
def grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with ``min_tiles <= columns * rows <= max_tiles``, by rising number of tiles."""
    found = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


@lru_cache(maxsize=4096)
def closest_grid(width: int, height: int, min_tiles: int, max_tiles: int, side: int) -> tuple[int, int]:
    """The grid (columns, rows) for a picture of width x height; (1, 1) where no grid is within the limits."""
    aspect, area = width / height, width * height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in grids(min_tiles, max_tiles):
        distance = abs(aspect - columns / rows)
        enough = area > 0.5 * side * side * columns * rows
        if distance < best_distance or (distance == best_distance and enough):
            best, best_distance = (columns, rows), distance
    return best


def pad2square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centre a picture on a square of its longer side, filled with ``colour`` (0..255).

    An odd rest goes to the right or the bottom.
    """
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@dataclass(frozen=True, kw_only=True, slots=True)
class TilePolicy:
    """How pictures become tiles; see the module's first lines for the rules, the modes and the two resizers.

    Attributes:
        image_size: side S of a tile in pixels.
        min_tiles: least number of tiles of a grid.
        max_tiles: largest number of tiles of a grid, the thumbnail not counted; the budget of all images of
            a sample.
        thumbnail: append the whole picture at S x S when there is more than one tile.
        dynamic: choose a grid; False: always one tile.
        pad2square: pad to a square with the mean colour before resizing. As in the source it comes after
            cutting, so that it matters only with ``dynamic=False`` (tiles are square).
        mode: ``chiasm``, ``original`` or ``hf``.
        resize: ``exact`` or ``fast``.
        mean: per channel, scale 0..1 (default ImageNet).
        std: per channel, scale 0..1.
        normalize_type: not kept; ``imagenet``, ``clip`` or ``siglip`` sets mean and std by name.
    """

    image_size: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    dynamic: bool = True
    pad2square: bool = False
    mode: Mode = "chiasm"
    resize: Resize = "exact"
    mean: Colour = NORMALIZATIONS["imagenet"][0]
    std: Colour = NORMALIZATIONS["imagenet"][1]
    normalize_type: InitVar[str | None] = None

    def __post_init__(self, normalize_type: str | None) -> None:
        if normalize_type is not None:
            if normalize_type not in NORMALIZATIONS:
                raise ConfigError(
                    f"normalize_type {normalize_type!r} is unknown: {' | '.join(NORMALIZATIONS)}"
                )
            mean, std = NORMALIZATIONS[normalize_type]
            object.__setattr__(self, "mean", mean)
            object.__setattr__(self, "std", std)
        for name in ("mean", "std"):
            # Configs read from JSON bring lists; a frozen, hashable policy needs tuples.
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3 or (name == "std" and min(values) <= 0):
                raise ConfigError(
                    f"{name} must have three values{' above 0' * (name == 'std')}, not {values}"
                )
            object.__setattr__(self, name, values)
        for name in ("image_size", "min_tiles", "max_tiles"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.min_tiles > self.max_tiles:
            raise ConfigError(
                f"min_tiles {self.min_tiles} is above max_tiles {self.max_tiles}: lower one, raise one"
            )
        if self.mode not in get_args(Mode):
            raise ConfigError(f"tile mode {self.mode!r} is unknown: {' | '.join(get_args(Mode))}")
        if self.resize not in get_args(Resize):
            raise ConfigError(f"resize {self.resize!r} is unknown: {' | '.join(get_args(Resize))}")
        if self.mode == "hf" and (self.pad2square or not self.thumbnail):
            raise ConfigError(
                "mode hf always has a thumbnail and never pads: set mode='original' for other settings"
            )

    @property
    def orient(self) -> bool:
        """Whether pictures are turned upright by EXIF before tiling; pass it on to `open_image`."""
        return self.mode == "chiasm"

    @property
    def mean_colour(self) -> tuple[int, int, int]:
        """The mean as RGB of 0..255, rounded down as in the source; what `pad2square` fills with."""
        red, green, blue = (int(value * 255) for value in self.mean)
        return red, green, blue

    def budget(self, n_images: int) -> int:
        """Largest number of tiles for each of ``n_images`` of a sample (mode ``hf`` does not divide)."""
        if n_images < 1:
            raise ConfigError(f"a tile budget needs at least one image, not {n_images}")
        return self.max_tiles if self.mode == "hf" else max(1, self.max_tiles // n_images)

    def grid(self, width: int, height: int, max_tiles: int | None = None) -> tuple[int, int]:
        """The grid (columns, rows) for a picture of width x height pixels.

        Args:
            width: pixels, after orientation.
            height: pixels, after orientation.
            max_tiles: another limit than the policy's, as from `budget`; below ``min_tiles`` it gives (1,
                1).
        """
        if width < 1 or height < 1:
            raise ImageError(f"a picture of {width}x{height} pixels cannot be tiled; give one with pixels")
        if not self.dynamic:
            return (1, 1)
        limit = self.max_tiles if max_tiles is None else max_tiles
        return closest_grid(width, height, self.min_tiles, limit, self.image_size)

    def count(self, width: int, height: int, max_tiles: int | None = None) -> int:
        """How many tiles `tile` returns for a picture of this size, thumbnail included; needs no pixels."""
        columns, rows = self.grid(width, height, max_tiles)
        tiles = columns * rows
        return tiles + (self.thumbnail and tiles > 1)

    def counts(self, sizes: Iterable[tuple[int, int]]) -> list[int]:
        """Tiles of each image of one sample, given their (width, height), under the shared budget."""
        sizes = list(sizes)
        return [self.count(width, height, self.budget(len(sizes))) for width, height in sizes]

    def tile(self, image: Image.Image, max_tiles: int | None = None) -> UInt8[Tensor, "N 3 S S"]:
        """Cut a picture into (N, 3, S, S) uint8 tiles: the grid row by row, the thumbnail last.

        Args:
            image: a decoded picture, already upright if it shall be (`open_image`); other modes than RGB
                are converted by `to_rgb`.
            max_tiles: another limit than the policy's, as from `budget`.
        """
        rgb = image if image.mode == "RGB" else to_rgb(image)
        columns, rows = self.grid(rgb.width, rgb.height, max_tiles)
        side = self.image_size
        if self.pad2square and not self.dynamic:
            rgb = pad2square(rgb, self.mean_colour)
        sizes = [(columns * side, rows * side)]
        if self.thumbnail and columns * rows > 1:
            sizes.append((side, side))
        resized = _resize_exact(rgb, sizes) if self.resize == "exact" else _resize_fast(rgb, sizes)
        tiles_N3SS = torch.empty((columns * rows + len(sizes) - 1, 3, side, side), dtype=torch.uint8)
        grid_RC3SS = tiles_N3SS[: columns * rows].view(rows, columns, 3, side, side)
        grid_RC3SS.copy_(resized[0].view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4))
        if len(resized) > 1:
            tiles_N3SS[-1] = resized[1]
        return tiles_N3SS


def _resize_exact(image: Image.Image, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Resize to each (width, height) with Pillow's bicubic filter -> list of (3, H, W) uint8."""
    resized = [image.resize(size, Image.Resampling.BICUBIC) for size in sizes]
    return [_to_tensor(picture).permute(2, 0, 1) for picture in resized]


def _resize_fast(image: Image.Image, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Resize to each (width, height) with torch's antialiased bicubic filter -> list of (3, H, W) uint8."""
    # Channels stay last in memory: torch has a vectorised kernel for that layout.
    picture_13HW = _to_tensor(image).permute(2, 0, 1)[None]
    resized = []
    for width, height in sizes:
        source = picture_13HW
        # Between the two passes values are rounded and clipped, so their order shows (up to 9 grey levels
        # in noise). torch goes by rows first, always; Pillow 13 goes by columns first exactly under this
        # condition.
        if image.height - height > 2 * max(0, image.width - width):
            source = _interpolate(source, image.width, height)
        resized.append(_interpolate(source, width, height)[0])
    return resized


def _interpolate(picture_13HW: Tensor, width: int, height: int) -> Tensor:
    return F.interpolate(picture_13HW, size=(height, width), mode="bicubic", antialias=True)


def _to_tensor(image: Image.Image) -> UInt8[Tensor, "H W 3"]:
    """A picture's pixels, copied (H, W, 3): Pillow lends a read-only buffer, of which torch warns."""
    pixels_HW3 = torch.empty((image.height, image.width, 3), dtype=torch.uint8)
    np.copyto(pixels_HW3.numpy(), np.asarray(image))
    return pixels_HW3
