"""Sprites: the fast raster against a point-by-point twin, textures, pasting, backgrounds."""

import math

import numpy as np
import pytest

from chiasm.worlds import sprites
from chiasm.worlds.sprites import (
    ANGLES,
    COLOURS,
    SHAPES,
    TEXTURES,
    background,
    box_of,
    paste,
    second_colour,
    shape_alpha,
    sprite_colours,
    texture,
)


def slow_alpha(shape: str, width: int, height: int, angle: int) -> np.ndarray:
    """Coverage at 4 x 4 points a pixel; inside by the winding number, point by point."""
    out = np.zeros((height, width))
    corners = [(0.0, 0.0)]
    if shape not in ("circle", "ring"):
        turn = math.radians(angle)
        corners = [
            (x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn))
            for x, y in sprites._OUTLINES[shape]
        ]
        xs, ys = [x for x, _ in corners], [y for _, y in corners]
        corners = [
            ((x - min(xs)) / (max(xs) - min(xs)) * 2 - 1, (y - min(ys)) / (max(ys) - min(ys)) * 2 - 1)
            for x, y in corners
        ]
    for row in range(height * 4):
        for column in range(width * 4):
            x, y = (column + 0.5) / (width * 2) - 1, (row + 0.5) / (height * 2) - 1
            if shape in ("circle", "ring"):
                inside = math.hypot(x, y) <= 1 and (shape == "circle" or math.hypot(x, y) >= sprites._HOLE)
            else:
                winding = 0.0
                for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
                    a, b = math.atan2(ay - y, ax - x), math.atan2(by - y, bx - x)
                    winding += (b - a + math.pi) % (2 * math.pi) - math.pi
                inside = abs(winding) > math.pi
            out[row // 4, column // 4] += inside / 16
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_equals_the_slow_twin(shape):
    for width, height, angle in ((9, 9, 0), (12, 8, ANGLES[shape][-1])):
        fast, slow = shape_alpha(shape, width, height, angle), slow_alpha(shape, width, height, angle)
        # Points exactly on an edge may fall on either side.
        assert np.abs(fast - slow).max() <= 0.26
        assert np.abs(fast - slow).mean() < 0.03


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_box_up_to_its_tips(shape):
    for angle in ANGLES[shape]:
        x0, y0, x1, y1 = box_of(shape_alpha(shape, 20, 24, angle) >= 0.5)
        assert (x0, y0) <= (2, 2)
        assert x1 >= 18
        assert y1 >= 21


def test_shapes_and_textures_differ_from_each_other():
    alphas = [shape_alpha(shape, 12, 12) for shape in SHAPES]
    for k, one in enumerate(alphas):
        for other in alphas[:k]:
            assert np.abs(one - other).sum() > 10
    fields = [texture(kind, 16, 16) for kind in TEXTURES[1:]]
    for field in fields:
        assert field is not None
        assert 0.15 < field.mean() < 0.6
    assert texture("plain", 16, 16) is None
    red = np.array(COLOURS["red"], np.float32)
    filled = sprite_colours(red, "striped", 10, 10)
    assert filled is not None
    tones = np.unique(filled.reshape(-1, 3), axis=0)
    np.testing.assert_allclose(tones, [second_colour(red), red], rtol=1e-5)


def test_pasting_is_cut_at_the_edges():
    image = np.zeros((6, 6, 3), np.float32)
    paste(image, np.ones((4, 4), np.float32), np.full(3, 9.0, np.float32), -2, 4)
    assert image[4:, :2].min() == 9.0
    assert image.sum() == 9.0 * 3 * 4
    paste(image, np.ones((2, 2), np.float32), np.full(3, 5.0, np.float32), 20, 20)
    assert image.sum() == 9.0 * 3 * 4


def test_backgrounds_are_far_from_the_colours_on_them():
    rng = np.random.default_rng(3)
    kinds = set()
    for _ in range(60):
        colours = [np.array(COLOURS[name], np.float32) for name in rng.choice(list(COLOURS), 4)]
        image, facts = background(rng, 40, 30, colours)
        kinds.add((facts["kind"], facts["tone"]))
        assert image.shape == (30, 40, 3)
        assert (image.mean() < 128) == (facts["tone"] == "dark")
        for colour in colours:
            assert np.linalg.norm(image - colour, axis=-1).min() > 50
    assert len(kinds) == 8


def test_the_box_of_nothing_is_empty():
    assert box_of(np.zeros((3, 3), bool)) == (0, 0, 0, 0)
