"""Setting text for pages and charts: faces, measured lines, wrapping, turned labels.

A face is a font file of the split (``worlds.fonts``) or the font that Pillow bundles; ``faces("train", "bundled")``
needs no file at all. Lines are wrapped by the sum of their words' widths, so a line never runs over.

Frame: pixels, origin at the top left corner, y down; boxes (x0, y0, x1, y1) with exclusive ends.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont

from chiasm.errors import DataError
from chiasm.worlds.fonts import find_fonts, font_hash, load_font

__all__ = ["Face", "Fonts", "draw_turned", "faces", "ink_box", "text_width", "word_boxes", "wrap"]

Fonts = Literal["auto", "found", "bundled"]
Box = tuple[int, int, int, int]

#: Faces that are too ornate, too light or too wide for small print.
_UNFIT = ("Comfortaa", "AccanthisADFStd", "Quicksand")


@dataclass(frozen=True, slots=True)
class Face:
    """A font at any size: ``stem`` names it, ``path`` is its file (empty: Pillow's own)."""

    stem: str
    path: str = ""

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """Return the font at ``size`` pixels per em."""
        return load_font(self.path, size) if self.path else _bundled(size)

    def digest(self) -> str:
        """Return what identifies its glyphs: a hash of the file, or Pillow's version."""
        if self.path:
            return font_hash(self.path)
        import PIL

        return f"pillow {PIL.__version__}"


@functools.lru_cache(maxsize=256)
def _bundled(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(float(size))
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise DataError("this Pillow was built without FreeType: install its wheel (pip install pillow)")
    return font


def faces(split: str, fonts: Fonts = "auto", folder: str | Path | None = None) -> tuple[Face, ...]:
    """Return the faces that a split may use.

    Args:
        split: "train", "dev" or "test".
        fonts: "bundled" is Pillow's own font alone; "found" those of ``worlds.fonts``; "auto" the latter, or the
            former where there are none.
        folder: the prepared assets.

    Raises:
        DataError: unknown ``fonts``; or "found" and there are none.
    """
    if fonts not in ("auto", "found", "bundled"):
        raise DataError(f"fonts={fonts!r}: choose auto, found or bundled")
    if fonts != "bundled":
        try:
            found = find_fonts(split, folder)
        except DataError:
            if fonts == "found":
                raise
        else:
            fit = {stem: path for stem, path in found.items() if not stem.startswith(_UNFIT)} or found
            return tuple(Face(stem, str(path)) for stem, path in fit.items())
    return (Face("bundled"),)


@functools.lru_cache(maxsize=65536)
def text_width(face: Face, size: int, text: str) -> float:
    """Return the advance width of a text in pixels."""
    return face.at(size).getlength(text)


def wrap(face: Face, size: int, text: str, width: float) -> list[str]:
    """Break a text into lines of at most ``width`` pixels; a word that is longer alone is broken by letters."""
    space = text_width(face, size, " ")
    lines: list[str] = []
    line: list[str] = []
    used = 0.0
    for word in text.split():
        w = text_width(face, size, word)
        while w > width and len(word) > 1:
            if line:
                lines.append(" ".join(line))
                line, used = [], 0.0
            cut = len(word) - 1
            while cut > 1 and text_width(face, size, word[:cut]) > width:
                cut -= 1
            lines.append(word[:cut])
            word = word[cut:]
            w = text_width(face, size, word)
        if line and used + space + w > width:
            lines.append(" ".join(line))
            line, used = [], 0.0
        used += w + (space if line else 0.0)
        line.append(word)
    return [*lines, " ".join(line)] if line else lines


def ink_box(face: Face, size: int, text: str, x: float, y: float) -> Box:
    """Return the box around what ``draw.text((x, y), text)`` inks, rounded outwards."""
    left, top, right, bottom = face.at(size).getbbox(text)
    return (math.floor(x + left), math.floor(y + top), math.ceil(x + right), math.ceil(y + bottom))


def word_boxes(face: Face, size: int, line: str, x: float, y: float) -> list[tuple[str, Box]]:
    """Return every word of a drawn line with the box around its ink (to a pixel: kerning across spaces is not seen)."""
    out = []
    at = 0
    for word in line.split(" "):
        out.append((word, ink_box(face, size, word, x + face.at(size).getlength(line[:at]), y)))
        at += len(word) + 1
    return out


def draw_turned(
    canvas: Image.Image, face: Face, size: int, text: str, right: int, top: int, angle: int, fill: Any
) -> Box:
    """Draw a text turned by 45 or 90 degrees so that its end is at (right, top); return the box that it takes."""
    left, up, w, h = face.at(size).getbbox(text)
    strip = Image.new("L", (math.ceil(w - left) + 2, math.ceil(h - up) + 2))
    ImageDraw.Draw(strip).text((1 - left, 1 - up), text, fill=255, font=face.at(size))
    turned = strip.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    x = right - turned.width if angle != 90 else right - turned.width // 2
    canvas.paste(fill, (x, top), turned)
    return (x, top, x + turned.width, top + turned.height)
