"""Boxes named in replies against the right ones (RefCOCO, RefCOCO+, RefCOCOg): a hit is IoU >= 0.5.

Source: fact sheet InternVL 2.5, section 5. Boxes are in the frame 0..1000 of the whole picture (`chiasm.media.boxes`),
areas are (x2 - x1)(y2 - y1), without the + 1 of older scripts.

The released rule takes the first four comma-separated things in brackets and divides by 1000 when their sum is at least
4; without a box it puts (0, 0, 0, 0), a miss. Ours reads what `parse_boxes` reads, or else the first bare [x1, y1,
x2, y2]; no box is None, counted as unparsed and a miss too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from chiasm.errors import DataError
from chiasm.eval.metrics.extract import Mode
from chiasm.media.boxes import XYXY, iou, parse_boxes

__all__ = ["GROUNDING_VERSION", "THRESHOLD", "grounding_iou", "parse_box"]

GROUNDING_VERSION = 1
THRESHOLD = 0.5

_RELEASED = re.compile(r"\[*\[([^,\]]*),([^,\]]*),([^,\]]*),([^\]]*?)\]\]*")
_NUMBER = r"\s*([+-]?(?:\d{1,7}(?:\.\d{0,20})?|\.\d{1,20}))\s*"
_QUAD = re.compile(rf"[\[(]{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}[\])]")


def parse_box(reply: str, *, mode: Mode = "chiasm") -> XYXY | None:
    """Return the first box of a reply in the frame 0..1, or None. Never raises."""
    if mode == "chiasm":
        boxes = parse_boxes(reply)
        if boxes:
            x1, y1, x2, y2 = boxes[0].xyxy
            return (x1 / 1000, y1 / 1000, x2 / 1000, y2 / 1000)
    found = (_QUAD if mode == "chiasm" else _RELEASED).search(reply)
    if found is None:
        return None
    try:
        x1, y1, x2, y2 = (float(number) for number in found.groups())
    except ValueError:
        return None
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        return None
    return (x1 / 1000, y1 / 1000, x2 / 1000, y2 / 1000) if x1 + y1 + x2 + y2 >= 4 else (x1, y1, x2, y2)


def grounding_iou(box: Sequence[float] | None, answer: Sequence[float], width: float, height: float) -> float:
    """IoU of a box in 0..1 and the right one in pixels; 0 for None.

    Raises:
        DataError: the right box or the size of the picture cannot be.
    """
    if len(answer) != 4 or width <= 0 or height <= 0:
        raise DataError(
            f"box {list(answer)} in a picture of {width}x{height} pixels: give x1, y1, x2, y2 in pixels"
        )
    if box is None:
        return 0.0
    x1, y1, x2, y2 = box
    # In pixels: the shares of width and height cancel, but rounding should be that of the published numbers.
    scaled = (x1 * width, y1 * height, x2 * width, y2 * height)
    return iou(scaled, answer)
