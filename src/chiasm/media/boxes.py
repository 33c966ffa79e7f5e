"""Boxes: coordinate frames, reading them from answers, writing them into prompts, drawing them.

Source: InternVL 2.5's grounding format, ``<ref>name</ref><box>[[x1,y1,x2,y2],[…]]</box>``, whole numbers
0..1000.

Frames. All have the origin at the top left corner of the *whole picture as the model got it*: upright after
EXIF rotation where the tile policy orients, before any tiling. x runs right, y runs down; (x1, y1) is the
top left and (x2, y2) the bottom right corner.
- pixels: 0..width, 0..height, continuous: the picture's right edge is x = width.
- thousand: 0..1000 of width and height each; what models of this family read and write.
- unit: 0..1 of width and height each.
Tiles, their padding and their resizing never enter: a tile is not a frame.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "XYXY",
    "Box",
    "draw_boxes",
    "format_box",
    "iou",
    "parse_boxes",
    "pixels_to_thousand",
    "pixels_to_unit",
    "thousand_to_pixels",
    "thousand_to_unit",
    "unit_to_pixels",
    "unit_to_thousand",
]

XYXY = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """One box of an answer.

    Attributes:
        label: the text of its ``<ref>``, without surrounding blanks; empty when it has none.
        xyxy: corners in the frame ``thousand``, each within 0..1000, in the order in which they were
            written (a model may err and write x2 < x1).
        span: ``text[span[0]:span[1]]`` is this box's four numbers with their brackets.
    """

    label: str
    xyxy: XYXY
    span: tuple[int, int] = (0, 0)


def pixels_to_thousand(xyxy: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """Pixels -> whole numbers 0..1000 by the official rule ``round(x / width * 1000)`` (Python's rounding)."""
    x1, y1, x2, y2 = xyxy
    return (
        round(x1 / width * 1000),
        round(y1 / height * 1000),
        round(x2 / width * 1000),
        round(y2 / height * 1000),
    )


def thousand_to_pixels(xyxy: Sequence[float], width: int, height: int) -> XYXY:
    """0..1000 -> pixels, not rounded."""
    return unit_to_pixels(thousand_to_unit(xyxy), width, height)


def pixels_to_unit(xyxy: Sequence[float], width: int, height: int) -> XYXY:
    """Pixels -> 0..1."""
    x1, y1, x2, y2 = xyxy
    return (x1 / width, y1 / height, x2 / width, y2 / height)


def unit_to_pixels(xyxy: Sequence[float], width: int, height: int) -> XYXY:
    """0..1 -> pixels, not rounded."""
    x1, y1, x2, y2 = xyxy
    return (x1 * width, y1 * height, x2 * width, y2 * height)


def thousand_to_unit(xyxy: Sequence[float]) -> XYXY:
    """0..1000 -> 0..1."""
    x1, y1, x2, y2 = xyxy
    return (x1 / 1000, y1 / 1000, x2 / 1000, y2 / 1000)


def unit_to_thousand(xyxy: Sequence[float]) -> tuple[int, int, int, int]:
    """0..1 -> whole numbers 0..1000."""
    x1, y1, x2, y2 = xyxy
    return (round(x1 * 1000), round(y1 * 1000), round(x2 * 1000), round(y2 * 1000))


# Every repetition is bounded or followed by what it cannot match, so that no text makes the search go back
# far.
_NUMBER = r"\s*([+-]?\d{1,7}(?:\.\d{0,20})?|[+-]?\.\d{1,20})\s*"
_TOKEN = re.compile(
    rf"(?P<quad>\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\])"
    r"|(?P<open>\[(?=\s*\[))|(?P<ref><ref>)|(?P<endref></ref>)|(?P<box><box>)|(?P<endbox></box>)"
)
_BETWEEN = re.compile(r"[\s,]*\Z")


def parse_boxes(text: str) -> list[Box]:
    """All boxes of an answer, in order; whatever is not a box is passed over, nothing raises.

    Accepted: ``<ref>name</ref><box>[[x1,y1,x2,y2], …]</box>``; a ``<box>`` alone, with one pair of
    brackets, or cut off before its end; and ``[[x1,y1,x2,y2], …]`` without tags. A bare ``[1,2,3,4]`` is
    not a box: lists of numbers occur in ordinary answers. A ``<ref>`` names the boxes of the next list
    after it.

    Numbers are taken as 0..1000, or as 0..1 when all four are at most 1 and one has a decimal point; what
    lies beyond 0..1000 is brought to the edge.
    """
    boxes: list[Box] = []
    label, label_start, label_used = "", None, False
    in_box = False
    list_end: int | None = None  # where a list of boxes stands open: its next item must follow here
    for token in _TOKEN.finditer(text):
        kind = token.lastgroup
        follows, list_end = _follows(text, list_end, token), None
        if kind == "quad" and (in_box or follows):
            boxes.append(Box(label=label, xyxy=_read(token), span=token.span()))
            label_used, list_end = True, token.end()
        elif kind == "ref":
            label, label_start, label_used = "", token.end(), False
        elif kind == "endref" and label_start is not None:
            label, label_start = text[label_start : token.start()].strip(), None
        elif kind == "endbox":
            in_box, label = False, ""
        elif kind == "box" or (kind == "open" and not in_box):
            in_box, label_start = kind == "box", None
            label, label_used = ("" if label_used else label), False
        if kind == "open":
            list_end = token.end()
    return boxes


def _follows(text: str, list_end: int | None, token: re.Match[str]) -> bool:
    """Whether nothing but blanks and commas stands between an open list's end and the token."""
    return list_end is not None and _BETWEEN.match(text, list_end, token.start()) is not None


def _read(token: re.Match[str]) -> XYXY:
    digits = token.groups()[1:5]
    values = [float(number) for number in digits]
    if all(0 <= value <= 1 for value in values) and any("." in number for number in digits):
        values = [value * 1000 for value in values]
    x1, y1, x2, y2 = (min(1000.0, max(0.0, value)) for value in values)
    return (x1, y1, x2, y2)


def format_box(label: str, *boxes: Sequence[float]) -> str:
    """Write boxes (frame ``thousand``) of one name as training data has them; an empty label leaves ``<ref>`` out."""
    quads = ",".join("[" + ",".join(str(round(value)) for value in box) + "]" for box in boxes)
    named = f"<ref>{label}</ref>" if label else ""
    return f"{named}<box>[{quads}]</box>"


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes of one frame; a box with x2 <= x1 or y2 <= y1 has no area and gives 0."""
    inner = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - inner
    return inner / union if inner > 0 and union > 0 else 0.0


def _area(xyxy: Sequence[float]) -> float:
    return max(0.0, xyxy[2] - xyxy[0]) * max(0.0, xyxy[3] - xyxy[1])


# Eight colours that stay apart for most colour-blind readers; further labels begin anew.
_COLOURS = ("#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#332288")


def draw_boxes(image: Image.Image, boxes: Iterable[Box]) -> Image.Image:
    """Draw boxes and their labels on a copy of the picture, which is returned in RGB.

    Boxes of one label share a colour; outline and letters grow with the picture. The letters come from
    Pillow's own
    font: scripts that it lacks (such as Chinese) show as empty frames.

    Args:
        image: the picture to which the boxes refer, upright if the model got it upright.
        boxes: in the frame ``thousand``; corners in the wrong order are put right for drawing.
    """
    canvas = image.convert("RGB")
    if canvas is image:
        canvas = image.copy()
    draw = ImageDraw.Draw(canvas)
    width, height = canvas.size
    stroke = max(1, round(min(width, height) / 160))
    font = ImageFont.load_default(size=float(min(48, max(10, round(min(width, height) / 26)))))
    colours: dict[str, str] = {}
    placed: list[tuple[Box, tuple[int, int, int, int]]] = []
    for box in boxes:
        colours.setdefault(box.label, _COLOURS[len(colours) % len(_COLOURS)])
        x1, y1, x2, y2 = thousand_to_pixels(box.xyxy, width, height)
        left, right = sorted((min(width - 1, round(x1)), min(width - 1, round(x2))))
        top, bottom = sorted((min(height - 1, round(y1)), min(height - 1, round(y2))))
        # A stroke wider than the box cannot be drawn inside it.
        line = max(1, min(stroke, (right - left) // 2, (bottom - top) // 2))
        draw.rectangle((left, top, right, bottom), outline=colours[box.label], width=line)
        placed.append((box, (left, top, right, bottom)))
    # All labels come after all outlines, so that none is crossed by a line.
    for box, (left, top, _, _) in placed:
        if box.label:
            _draw_label(draw, box.label, (left, top), font, colours[box.label], (width, height))
    return canvas


def _draw_label(
    draw: ImageDraw.ImageDraw,
    label: str,
    corner: tuple[int, int],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    colour: str,
    size: tuple[int, int],
) -> None:
    """Write a label on a field of its colour, above the corner or, where there is no room, below it; in the picture."""
    width, height = size
    whole = text = " ".join(label.split())[:80]
    kept = len(whole)
    while kept > 1 and draw.textlength(text, font=font) > 0.9 * width:
        kept = kept * 3 // 4
        text = whole[:kept] + "…"
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = max(1, round((bottom - top) / 5))
    field_width, field_height = round(right - left) + 2 * pad, round(bottom - top) + 2 * pad
    x = max(0, min(corner[0], width - field_width))
    y = (
        corner[1] - field_height
        if corner[1] >= field_height
        else max(0, min(corner[1], height - field_height))
    )
    draw.rectangle((x, y, x + field_width - 1, y + field_height - 1), fill=colour)
    draw.text((x + pad - left, y + pad - top), text, font=font, fill=_ink(colour))


def _ink(colour: str) -> str:
    """Black or white, whichever reads better on the colour (relative luminance of sRGB, gamma taken as 2.2)."""
    red, green, blue = ((int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5))
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "white"
