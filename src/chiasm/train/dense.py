"""What each 8 x 8 patch of a drawn picture shows: labels for every place, from the worlds' exact ground truth.

A picture's one answer teaches a small encoder slowly; sixty-four local answers teach it what letters and shapes look
like long before it can read or count. A word's letters are found by the font's own advance widths along the word's
slanted middle line, objects by their circles; both are right to a pixel or two, and a patch has eight.

Grounding scenes and charts have marks: their shape, their colour, and the box around them, so that a token knows edges
finer than its patch.

Shape legend: Q = 64 patches, row-major from the top left. Labels are -100 where a family has no such fact.
"""

from __future__ import annotations

import math

import numpy as np

from chiasm.worlds import sprites
from chiasm.worlds.chart_draw import PALETTE
from chiasm.worlds.counting import COLOURS, SHAPES
from chiasm.worlds.fonts import load_font
from chiasm.worlds.world import SIZE, Sample

__all__ = ["FACTS", "MARKED", "MARKS", "PATCHES", "dense_facts", "dense_marks"]

PATCH = 8
GRID = SIZE // PATCH
PATCHES = GRID * GRID
FACTS: dict[str, int] = {"glyph": 27, "shape": len(SHAPES) + 1, "colour": len(COLOURS) + 1}
"""Fact -> number of classes; the last class is "nothing here"."""

MARKED = ("grounding", "charts")
"""Families that have marks."""
PAINTS = (*sprites.COLOURS, *(name for name in PALETTE if name not in sprites.COLOURS))
MARKS: dict[str, int] = {"mark": len(sprites.SHAPES) + 1, "paint": len(PAINTS) + 1}
"""Like `FACTS`, of marks."""
_NEAR = 40.0
"""Distance in RGB up to which a pixel of a chart has a colour of the palette."""

_COLOURS = {name: i for i, name in enumerate(COLOURS)}
_SHAPES = {name: i for i, name in enumerate(SHAPES)}


def dense_facts(sample: Sample, *, font: str | None = None, mirrored: bool = False) -> np.ndarray:
    """Return (3, Q) int64: glyph, shape and colour under the centre of every patch.

    Args:
        sample: of the word or counting world; any other family gives -100 everywhere.
        font: path of the font that a word was drawn with.
        mirrored: the picture was mirrored left to right (never for words).
    """
    facts_FQ = np.full((len(FACTS), PATCHES), -100, np.int64)
    centres_G = (np.arange(GRID) + 0.5) * PATCH
    y_GG, x_GG = np.meshgrid(centres_G, centres_G, indexing="ij")
    if sample.family == "words":
        facts_FQ[0] = _glyphs(sample, font, x_GG, y_GG).ravel()
    elif sample.family == "counting":
        shape_GG = np.full((GRID, GRID), len(SHAPES))
        colour_GG = np.full((GRID, GRID), len(COLOURS))
        for thing in sample.meta["objects"]:
            x = SIZE - thing["x"] if mirrored else thing["x"]
            inside_GG = np.hypot(x_GG - x, y_GG - thing["y"]) <= 0.9 * thing["radius"]
            shape_GG[inside_GG], colour_GG[inside_GG] = _SHAPES[thing["shape"]], _COLOURS[thing["colour"]]
        facts_FQ[1], facts_FQ[2] = shape_GG.ravel(), colour_GG.ravel()
    return facts_FQ


def _glyphs(sample: Sample, font: str | None, x_GG: np.ndarray, y_GG: np.ndarray) -> np.ndarray:
    """Return the letter under each place, 26 outside of the word."""
    word, (x0, y0, x1, y1) = sample.answer, sample.meta["box"]
    if font is None:
        ends = np.arange(1, len(word) + 1) / len(word)
    else:
        face = load_font(font, 64)
        ends = np.array([face.getlength(word[: i + 1]) for i in range(len(word))])
        ends = ends / ends[-1]
    # The box is that of the rotated word: its middle line slants, and its height includes the slant's rise.
    slope = -math.tan(math.radians(sample.meta.get("angle", 0.0)))
    half = max((y1 - y0 - abs(slope) * (x1 - x0)) / 2, 2.0)
    middle_GG = (y0 + y1) / 2 + slope * (x_GG - (x0 + x1) / 2)
    along_GG = (x_GG - x0) / (x1 - x0)
    inside_GG = (along_GG >= 0) & (along_GG < 1) & (np.abs(y_GG - middle_GG) <= half)
    letter_GG = np.array([ord(c) - ord("a") for c in word])[
        np.searchsorted(ends[:-1], along_GG, side="right")
    ]
    return np.where(inside_GG, letter_GG, 26)


def dense_marks(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Return what is marked under the centre of every patch.

    Args:
        sample: of the grounding world (drawn shapes) or of compact charts; any other family gives no facts.

    Returns:
        facts: (2, Q) int64, shape and colour. A chart's marks have no shape: -100 throughout.
        boxes: (Q, 4) float32, (x0, y0, x1, y1) in shares of the picture; NaN where nothing with a box is.
    """
    facts_FQ = np.full((len(MARKS), PATCHES), -100, np.int64)
    boxes_QL = np.full((PATCHES, 4), np.nan, np.float32)
    if sample.family not in MARKED:
        return facts_FQ, boxes_QL
    centres_G = (np.arange(GRID) + 0.5) * PATCH
    y_Q, x_Q = (part.ravel() for part in np.meshgrid(centres_G, centres_G, indexing="ij"))
    grounded = sample.family == "grounding"
    facts_FQ[1] = len(PAINTS)
    if grounded:
        facts_FQ[0] = len(sprites.SHAPES)
    else:
        facts_FQ[1] = _paints(sample)
    for thing in sample.meta["objects" if grounded else "marks"]:
        if "box" not in thing:
            continue
        x0, y0, x1, y1 = thing["box"]
        inside_Q = (x_Q >= x0) & (x_Q < x1) & (y_Q >= y0) & (y_Q < y1)
        boxes_QL[inside_Q] = np.array([x0, y0, x1, y1], np.float32) / SIZE
        if grounded:
            facts_FQ[0, inside_Q] = sprites.SHAPES.index(thing["shape"])
            facts_FQ[1, inside_Q] = PAINTS.index(thing["colour"])
    return facts_FQ, boxes_QL


def _paints(sample: Sample) -> np.ndarray:
    """Return the colour of a chart's mark at the centre of every patch, the last class where there is none."""
    there = sorted({mark["colour"] for mark in sample.meta["marks"]})
    middle = PATCH // 2
    pixels_Q3 = sample.image[middle::PATCH, middle::PATCH].reshape(-1, 3).astype(np.float32)
    # Only of its own marks: paper and soft edges may look like another colour of the palette.
    inks_M3 = np.array([PALETTE[name] for name in there], np.float32)
    distance_QM = np.linalg.norm(pixels_Q3[:, None] - inks_M3[None], axis=-1)
    nearest_Q = np.array([PAINTS.index(name) for name in there])[distance_QM.argmin(1)]
    return np.where(distance_QM.min(1) <= _NEAR, nearest_Q, len(PAINTS))
