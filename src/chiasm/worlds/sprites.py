"""What the drawn worlds share: shapes with exact masks, textures, backgrounds, pasting.

A sprite fills its box: the outline of a shape, turned by its angle, is stretched to (height, width). Coverage is
computed with NumPy at 4 x 4 points a pixel (no drawing library, so pixels do not depend on its version) and
remembered by (shape, width, height, angle); whoever draws thousands of scenes therefore keeps to whole sizes and
few angles. A pixel belongs to an object where its coverage is at least one half.

Shape legend: H x W pixels of a picture, h x w of a sprite.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from chiasm.worlds.counting import COLOURS

__all__ = [
    "ANGLES",
    "BACKGROUNDS",
    "COLOURS",
    "SHAPES",
    "TEXTURES",
    "background",
    "box_of",
    "paste",
    "second_colour",
    "shape_alpha",
    "sprite_colours",
    "texture",
]

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "ring")
TEXTURES = ("plain", "striped", "dotted", "checked")
BACKGROUNDS = ("plain", "noisy", "gradient", "blotched")
#: Angles in degrees that a shape is turned by; those that nothing would be seen of are left out.
ANGLES: dict[str, tuple[int, ...]] = {
    "circle": (0,),
    "square": (0, 10, -10),
    "triangle": (0, 15, -15),
    "star": (0, 12, 24, -12),
    "cross": (0, 15, -15),
    "diamond": (0, 10, -10),
    "heart": (0, 15, -15),
    "ring": (0,),
}
_SUPER = 4
#: Pixels of the largest sprite that counts as small.
_SMALL = 48 * 48
#: The dark second colour of a texture, as a share of the first.
_DARK = 0.4
#: A background keeps at least these RGB distances from the colours of the objects on it and from their second colours.
_DISTANCE, _DISTANCE_DARK = 90.0, 45.0
#: Inner radius of a ring, as a share of the outer.
_HOLE = 0.55


def _heart() -> list[tuple[float, float]]:
    turns = np.linspace(0.0, 2 * math.pi, 48, endpoint=False)
    xs = 16 * np.sin(turns) ** 3
    ys = -(13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns))
    return list(zip(xs.tolist(), ys.tolist(), strict=True))


def _spokes(points: int, inner: float) -> list[tuple[float, float]]:
    """Corners of a star with its first tip upwards."""
    radii = [1.0 if k % 2 == 0 else inner for k in range(2 * points)]
    return [
        (r * math.sin(math.pi * k / points), -r * math.cos(math.pi * k / points)) for k, r in enumerate(radii)
    ]


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(1, 1), (-1, 1), (-1, -1), (1, -1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "star": _spokes(5, 0.42),
    "cross": [
        *((1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)),
        *((-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1)),
    ],
    "diamond": [(0.68, 0), (0, 1), (-0.68, 0), (0, -1)],
    "heart": _heart(),
}


def shape_alpha(shape: str, width: int, height: int, angle: int = 0) -> np.ndarray:
    """Return the coverage (height, width) float32 in 0..1 of a shape that fills its box; read-only, shared."""
    return (_small_alpha if width * height <= _SMALL else _large_alpha)(shape, width, height, angle)


def _alpha(shape: str, width: int, height: int, angle: int) -> np.ndarray:
    x_W = (np.arange(width * _SUPER) + 0.5) / (width * _SUPER) * 2 - 1
    y_H = (np.arange(height * _SUPER) + 0.5) / (height * _SUPER) * 2 - 1
    if shape in ("circle", "ring"):
        radius = x_W[None, :] ** 2 + y_H[:, None] ** 2
        inside = (radius <= 1.0) & (radius >= (_HOLE**2 if shape == "ring" else 0.0))
    else:
        turn = math.radians(angle)
        corners = np.array(_OUTLINES[shape]) @ np.array(
            [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]
        )
        low, high = corners.min(0), corners.max(0)
        inside = _inside((corners - low) / (high - low) * 2 - 1, x_W, y_H)
    fine = inside.reshape(height, _SUPER, width, _SUPER)
    alpha = fine.mean((1, 3), dtype=np.float32)
    alpha.setflags(write=False)
    return alpha


# Many small sprites and few large ones are remembered: at most about 75 MB each.
_small_alpha = functools.lru_cache(maxsize=8192)(_alpha)
_large_alpha = functools.lru_cache(maxsize=512)(_alpha)


def _inside(corners: np.ndarray, x_W: np.ndarray, y_H: np.ndarray) -> np.ndarray:
    """Return (H, W) bool by the even-odd rule: how many edges a ray to the right crosses."""
    inside = np.zeros((len(y_H), len(x_W)), bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, 0), strict=True):
        if y1 == y2:
            continue
        spans = (y1 > y_H) != (y2 > y_H)
        crossing = x1 + (y_H - y1) / (y2 - y1) * (x2 - x1)
        inside ^= spans[:, None] & (x_W[None, :] < crossing[:, None])
    return inside


@functools.lru_cache(maxsize=1024)
def texture(kind: str, width: int, height: int, variant: int = 0) -> np.ndarray | None:
    """Return where the second colour lies, (height, width, 1) float32 of 0 and 1; None for "plain".

    ``variant`` 0, 1, 2 turns stripes (along rows, columns, the diagonal) and shifts dots and squares.
    """
    if kind == "plain":
        return None
    period = max(2, round(min(width, height) / 5))
    y, x = np.mgrid[:height, :width]
    if kind == "striped":
        along = (y, x, x + y)[variant % 3]
        field = (along // period) % 2 == 1
    elif kind == "checked":
        field = ((x + variant) // period + (y + variant) // period) % 2 == 1
    else:
        step = max(4, period * 2)
        shift = (variant * step) // 3
        dx, dy = (x + shift) % step - (step - 1) / 2, (y + shift) % step - (step - 1) / 2
        field = dx**2 + dy**2 <= (0.30 * step) ** 2 + 0.01
    out = field.astype(np.float32)[..., None]
    out.setflags(write=False)
    return out


def sprite_colours(
    colour: np.ndarray, kind: str, width: int, height: int, variant: int = 0
) -> np.ndarray | None:
    """Return the colours (height, width, 3) float32 of a textured sprite, or None where it is all ``colour``."""
    field = texture(kind, width, height, variant)
    return None if field is None else colour - field * (colour * (1.0 - _DARK))


def second_colour(colour: np.ndarray) -> np.ndarray:
    """Return the dark second colour of a texture."""
    return colour * _DARK


def paste(image: np.ndarray, alpha: np.ndarray, colours: np.ndarray, x: int, y: int) -> None:
    """Lay a sprite over ``image`` (H, W, 3) float32 in place; what lies outside the picture is cut off.

    Args:
        image: the picture.
        alpha: (h, w) coverage.
        colours: (3,) or (h, w, 3) float32.
        x: column of the sprite's left edge; may be negative.
        y: row of its top edge; may be negative.
    """
    top, left = max(0, y), max(0, x)
    bottom, right = min(image.shape[0], y + alpha.shape[0]), min(image.shape[1], x + alpha.shape[1])
    if bottom <= top or right <= left:
        return
    cut = (slice(top - y, bottom - y), slice(left - x, right - x))
    area = image[top:bottom, left:right]
    area += alpha[cut][..., None] * ((colours if colours.ndim == 1 else colours[cut]) - area)


def background(
    rng: np.random.Generator, width: int, height: int, colours: list[np.ndarray]
) -> tuple[np.ndarray, dict[str, str]]:
    """Return a light or dark background (H, W, 3) float32 that is far from every colour, and its facts.

    The facts are {"kind": one of BACKGROUNDS, "tone": "light" or "dark"}.
    """
    near = np.array(colours) if colours else np.zeros((0, 3))
    while True:
        dark = bool(rng.random() < 0.5)
        base = np.clip(
            (rng.uniform(0, 60) if dark else rng.uniform(190, 255)) + rng.uniform(-25, 25, 3), 0, 255
        )
        if not len(near) or (
            (((near - base) ** 2).sum(1) >= _DISTANCE**2).all()
            and (((near * _DARK - base) ** 2).sum(1) >= _DISTANCE_DARK**2).all()
        ):
            break
    kind = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    strength = float(rng.uniform(5.0, 15.0))
    image = np.empty((height, width, 3), np.float32)
    image[:] = base
    if kind == "noisy":
        image += (rng.random((height, width, 1), np.float32) * 2 - 1) * np.float32(strength)
    elif kind == "gradient":
        turn = rng.uniform(0.0, 2 * math.pi)
        ys = np.linspace(-1.0, 1.0, height, dtype=np.float32) * np.float32(math.cos(turn) * strength)
        xs = np.linspace(-1.0, 1.0, width, dtype=np.float32) * np.float32(math.sin(turn) * strength)
        image += (ys[:, None] + xs[None, :])[..., None]
    elif kind == "blotched":
        coarse = (rng.random((8, 8), np.float32) * 2 - 1) * np.float32(strength)
        rows, columns = np.arange(height) * 8 // height, np.arange(width) * 8 // width
        image += coarse[rows[:, None], columns[None, :]][..., None]
    return image, {"kind": kind, "tone": "dark" if dark else "light"}


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return (x0, y0, x1, y1), exclusive ends, around the True pixels of an (H, W) mask; zeros if there are none."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(ys):
        return (0, 0, 0, 0)
    return (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1)
