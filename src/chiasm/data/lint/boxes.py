"""The linter's rules for boxes: their spelling, their range, and which convention they look like.

Source: InternVL 2.5's grounding format, `<ref>name</ref><box>[[x1,y1,x2,y2],[…]]</box>`, whole numbers 0..1000 of the
picture's width and height (see `chiasm.media.boxes`). What comes in practice: pixels; fractions 0..1; x, y, width,
height; Qwen's `(x1,y1),(x2,y2)`; PaliGemma's `<loc0123>`. Which of them it looks like is said, because nothing else in
a data set is mistaken so often and so silently: a wrong convention trains without an error.

Only what stands between `<box>` and `</box>` (or in a marked other convention) is judged; `[[1,2,3,4]]` alone may be a
matrix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from chiasm.data.lint.rules import Context, declare, rule
from chiasm.data.lint.sample import Sample

__all__ = ["BoxConvention", "FoundBox", "boxes_of", "looks_like"]

_NUMBER = r"\s*[+-]?(?:\d{1,7}(?:\.\d{0,20})?|\.\d{1,20})\s*"
_QUAD = rf"\[{_NUMBER}(?:,{_NUMBER}){{3}}\]"
_BODY = re.compile(rf"\s*(?:\[\s*{_QUAD}(?:\s*,?\s*{_QUAD})*\s*\]|{_QUAD})\s*")
_QUADS = re.compile(_QUAD)
_NUMBERS = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")
_BOX = re.compile(r"<box>(.*?)</box>", re.DOTALL)
_QWEN = re.compile(r"\(\s*\d+\s*,\s*\d+\s*\)\s*,\s*\(\s*\d+\s*,\s*\d+\s*\)")
_OTHER = (
    (re.compile(r"<loc\d{4}>(?:\s*<loc\d{4}>){3}"), "PaliGemma's <loc….> tokens (y1, x1, y2, x2 of 1024)"),
    (re.compile(r"<\|box_start\|>"), "Qwen2-VL's <|box_start|>"),
    (re.compile(r'"bbox(?:_2d)?"\s*:\s*\['), "JSON with bbox, as Qwen2.5-VL and COCO have it"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundBox:
    """Four numbers as they are written (not clamped), and where: the turn and `text[start:]`."""

    turn: int
    start: int
    xyxy: tuple[float, float, float, float]
    decimal: bool


def boxes_of(sample: Sample) -> list[FoundBox]:
    """All well-spelled boxes between `<box>` and `</box>`."""
    found: list[FoundBox] = []
    for n, _role, text in sample.said:
        if "<box>" not in text:
            continue
        for body in _BOX.finditer(text):
            if _BODY.fullmatch(body[1]) is None:
                continue
            for quad in _QUADS.finditer(body[1]):
                digits = _NUMBERS.findall(quad[0])
                x1, y1, x2, y2 = map(float, digits)
                found.append(
                    FoundBox(
                        turn=n,
                        start=body.start(1) + quad.start(),
                        xyxy=(x1, y1, x2, y2),
                        decimal=any("." in d for d in digits),
                    )
                )
    return found


def _written(box: FoundBox) -> str:
    return "[" + ", ".join(f"{value:g}" for value in box.xyxy) + "]"


def looks_like(box: FoundBox, sizes: list[tuple[int, int]]) -> str:
    """The convention a single box seems to follow: "thousand", "fractions", "pixels", "xywh" or "unknown".

    Args:
        box: as written.
        sizes: (width, height) of the conversation's pictures.
    """
    x1, y1, x2, y2 = box.xyxy
    if min(box.xyxy) >= 0 and max(box.xyxy) <= 1 and (box.decimal or box.xyxy == (0, 0, 1, 1)):
        return "fractions"
    if min(box.xyxy) < 0:
        return "unknown"
    if max(box.xyxy) > 1000:
        inside = any(x1 < x2 <= w and y1 < y2 <= h for w, h in sizes)
        return "pixels" if inside or not sizes else "unknown"
    if x2 < x1 or y2 < y1:
        return "xywh" if x2 > 0 and y2 > 0 and x1 + x2 <= 1000 and y1 + y2 <= 1000 else "unknown"
    return "thousand"


def _sizes(sample: Sample) -> list[tuple[int, int]]:
    return [picture.size for picture in sample.pictures if all(picture.size)]


@rule(
    "C301",
    "box-spelling",
    "error",
    says="box markup that cannot be read, tags that do not pair up, or the markup of another model",
    example="<box>(10,20),(300,400)</box>",
    remedy="write <ref>name</ref><box>[[x1,y1,x2,y2]]</box> (chiasm.media.boxes.format_box)",
)
def box_spelling(sample: Sample, _: Context) -> Iterator[str]:
    """One message a turn and kind of fault."""
    for n, _role, text in sample.said:
        for what, at in (other for other in ((w, r.search(text)) for r, w in _OTHER) if other[1]):
            yield f"turn {n}: {at[0]!r:.40} looks like {what}" if at else ""
        for tag in ("box", "ref"):
            opened, closed = text.count(f"<{tag}>"), text.count(f"</{tag}>")
            if opened != closed:
                yield f"turn {n}: {opened} <{tag}> but {closed} </{tag}>"
        for body in _BOX.finditer(text):
            if _BODY.fullmatch(body[1]) is None:
                hint = " looks like Qwen-VL's (x1,y1),(x2,y2)" if _QWEN.search(body[1]) else " is no box"
                yield f"turn {n}: {body[0]!r:.60}{hint}"
                break


@rule(
    "C302",
    "box-pixels",
    "error",
    says="a box beyond 1000: it looks like pixels, or lies outside the picture",
    example="[[120, 80, 1600, 900]] with a picture of 1920x1080",
    remedy="write round(x / width * 1000) and round(y / height * 1000) (chiasm.media.boxes.pixels_to_thousand)",
)
def box_pixels(sample: Sample, _: Context) -> Iterator[str]:
    """Says the size that it would fit."""
    sizes = _sizes(sample)
    for box in boxes_of(sample):
        if max(box.xyxy) <= 1000 and min(box.xyxy) >= 0:
            continue
        said = f"turn {box.turn}: {_written(box)}"
        if looks_like(box, sizes) == "pixels":
            of = next(
                (f" of its {w}x{h} picture" for w, h in sizes if box.xyxy[2] <= w and box.xyxy[3] <= h), ""
            )
            yield f"{said} looks like pixels{of}"
        else:
            yield f"{said} is outside 0..1000" + (" and outside its picture in pixels" if sizes else "")
        return


@rule(
    "C303",
    "box-fractions",
    "error",
    says="a box of fractions 0..1",
    example="[[0.12, 0.08, 0.83, 0.9]]",
    remedy="write round(x * 1000) (chiasm.media.boxes.unit_to_thousand)",
)
def box_fractions(sample: Sample, _: Context) -> Iterator[str]:
    """Reading answers accepts them; teaching them beside thousandths is a second convention."""
    for box in boxes_of(sample):
        if looks_like(box, []) == "fractions":
            yield f"turn {box.turn}: {_written(box)} looks like fractions 0..1"
            return


@rule(
    "C304",
    "box-inverted",
    "error",
    says="a box whose second corner lies left of or above the first",
    example="[[600, 500, 80, 120]]",
    remedy="order the corners; if the numbers are x, y, width, height, write [x, y, x + width, y + height]",
)
def box_inverted(sample: Sample, _: Context) -> Iterator[str]:
    """Says so where it would be a box as x, y, width, height."""
    for box in boxes_of(sample):
        x1, y1, x2, y2 = box.xyxy
        if x2 < x1 or y2 < y1:
            also = " looks like x, y, width, height" if looks_like(box, []) == "xywh" else " is inverted"
            yield f"turn {box.turn}: {_written(box)}{also}"
            return


@rule(
    "C305",
    "box-flat",
    "warning",
    says="a box without area",
    example="[[500, 500, 500, 700]]",
    remedy="remove it, or widen what rounding has made flat",
)
def box_flat(sample: Sample, _: Context) -> Iterator[str]:
    """Its overlap with anything is 0."""
    for box in boxes_of(sample):
        x1, y1, x2, y2 = box.xyxy
        if (x1 == x2 and y2 >= y1) or (y1 == y2 and x2 >= x1):
            yield f"turn {box.turn}: {_written(box)} has no area"
            return


@rule(
    "C306",
    "box-without-picture",
    "warning",
    says="boxes in a row that shows nothing",
    example='<box>[[1,2,3,4]]</box> without "image"',
    remedy="add the picture or remove the row",
)
def box_without_picture(sample: Sample, _: Context) -> Iterator[str]:
    """Learned as numbers from nowhere."""
    shows = sample.pictures or any(turn.of_kind("video") for turn in sample.spoken)
    if not shows and (boxes := boxes_of(sample)):
        yield f"turn {boxes[0].turn}: {_written(boxes[0])} without a picture"


declare(
    "C307",
    "boxes-within-pixels",
    "warning",
    says="a set's boxes, in pictures smaller than 1000 pixels, never leave the picture's size in pixels",
    example="boxes up to 638 x 479 in pictures of 640x480",
    remedy="they are probably pixels: write thousandths (chiasm.media.boxes.pixels_to_thousand)",
)


class BoxConvention:
    """Whether all of a set's boxes lie within the pixels of pictures smaller than 1000: then they probably are pixels.

    If they were thousandths with corners anywhere, a picture of width w would keep a box's right edge below w with a
    chance of about w / 1000, and likewise its lower edge. The product over all pictures (one box each, the largest) is
    the chance that this is an accident.
    """

    CHANCE = 1e-4
    LEAST = 5

    def __init__(self) -> None:
        self.pictures = 0
        self.outside = False
        self.log_chance = 0.0
        self.largest = (0.0, 0.0)

    def see(self, sample: Sample) -> None:
        """Take in one row; only rows of one picture count, where it is known what a box refers to."""
        if self.outside or len(sample.pictures) != 1 or not sample.pictures[0].known:
            return
        width, height = sample.pictures[0].size
        boxes = [box.xyxy for box in boxes_of(sample) if looks_like(box, []) in ("thousand", "xywh")]
        if not boxes or min(width, height) >= 1000 or 0 in (width, height):
            return
        right, lower = max(box[2] for box in boxes), max(box[3] for box in boxes)
        self.outside = right > width or lower > height
        self.pictures += 1
        self.log_chance += math.log(min(1.0, width / 1000)) + math.log(min(1.0, height / 1000))
        self.largest = max(self.largest[0], right), max(self.largest[1], lower)

    def finish(self) -> Iterator[str]:
        """The finding, if there is one."""
        if not self.outside and self.pictures >= self.LEAST and self.log_chance < math.log(self.CHANCE):
            right, lower = self.largest
            yield (
                f"in {self.pictures} pictures smaller than 1000 pixels no box leaves the picture's size in pixels "
                f"(the largest reach x {right:g}, y {lower:g})"
            )
