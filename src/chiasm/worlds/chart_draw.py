"""Drawing charts: bars (grouped, stacked, lying), lines, pies, points; axes, ticks, legends, titles.

What is filled is drawn at twice the size and reduced, text is set at its own size on top. Bars begin and end on
whole pixels, so the boxes in ``marks`` are exactly what is drawn, and a value can be read back from a box: over H
pixels of axis a value is known to (hi - lo) / H.

Frame: pixels, origin at the top left corner, y down; boxes (x0, y0, x1, y1) with exclusive ends. Angles of a pie
are degrees clockwise from 12 o'clock.

Shape legend: H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from chiasm.worlds.tables import Table, show
from chiasm.worlds.typeset import Face, draw_turned, ink_box, text_width, wrap

__all__ = ["KINDS", "PALETTE", "ChartKind", "ChartSpec", "Drawn", "draw_chart", "nice_ticks"]

ChartKind = Literal["bar", "stacked", "horizontal", "line", "pie", "scatter"]
KINDS: tuple[ChartKind, ...] = ("bar", "stacked", "horizontal", "line", "pie", "scatter")
#: Colour name -> RGB; a name is an answer, so they are far apart.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "blue": (31, 90, 200),
    "green": (40, 150, 50),
    "orange": (250, 135, 20),
    "purple": (130, 60, 170),
    "yellow": (240, 205, 30),
    "brown": (125, 80, 45),
    "pink": (245, 130, 190),
    "gray": (128, 128, 128),
    "cyan": (25, 185, 205),
}
_INK, _GRID = (35, 35, 40), (222, 222, 226)
_FINE = 2
#: Radius of a point in pixels.
_DOT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartSpec:
    """What is to be drawn.

    Attributes:
        kind: one of KINDS.
        table: the numbers; of a pie and a single row of bars the first column, of points (x, y) the first two.
        colours: names in PALETTE, of the columns; of a pie, or of bars that each have their own, of the rows.
        each: bars have a colour each.
        values: print numbers at the marks where all of them find room.
        grid: lines at the ticks.
        paper: RGB of the background.
        compact: bars or slices alone, for pictures of 48 to 160 pixels.
    """

    kind: ChartKind
    table: Table
    colours: tuple[str, ...]
    each: bool = False
    values: bool = False
    grid: bool = True
    paper: tuple[int, int, int] = (255, 255, 255)
    compact: bool = False


@dataclass(slots=True, kw_only=True)
class Drawn:
    """A finished chart: the picture, what stands where, and whether the numbers are printed."""

    image: Image.Image
    plot: tuple[int, int, int, int] = (0, 0, 0, 0)
    axis: dict[str, Any] = field(default_factory=dict)
    marks: list[dict[str, Any]] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)
    printed: bool = False


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most ``most`` + 1 evenly spaced round numbers that enclose ``low`` and ``high``."""
    span = max(high - low, abs(high) * 1e-6, 1e-9)
    power = math.floor(math.log10(span / most)) - 1
    while True:
        for digit in (1, 2, 2.5, 5):
            step = digit * 10.0**power
            first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
            if last - first <= most:
                return [round(k * step, max(0, 1 - power)) for k in range(first, max(last, first + 1) + 1)]
        power += 1


class _Board:
    """A picture in two layers: fills at twice the size, texts on top."""

    def __init__(self, spec: ChartSpec, width: int, height: int, face: Face) -> None:
        self.spec, self.width, self.height, self.face = spec, width, height, face
        self.fine = Image.new("RGB", (width * _FINE, height * _FINE), spec.paper)
        self.pen = ImageDraw.Draw(self.fine)
        self.size = min(17, max(9, round(min(width, height) / 26)))
        self.later: list[tuple[str, int, float, float, int]] = []  # text, size, x, y, angle
        self.out = Drawn(image=self.fine)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: tuple[int, int, int]) -> None:
        if x1 > x0 and y1 > y0:
            self.pen.rectangle(
                (x0 * _FINE, y0 * _FINE, x1 * _FINE - 1, y1 * _FINE - 1),
                fill=fill,
            )

    def text(
        self, text: str, x: float, y: float, *, size: int = 0, anchor: str = "left", role: str = ""
    ) -> None:
        """Set a text whose ink begins at ``y``; anchors: left, middle, right of ``x``."""
        size = size or self.size
        left, top, right, _ = self.face.at(size).getbbox(text)
        x = {"left": x, "middle": x - (left + right) / 2, "right": x - right}[anchor]
        self.place(text, size, round(x), round(y - top), 0, role)

    def place(self, text: str, size: int, x: int, y: int, angle: int, role: str) -> None:
        self.later.append((text, size, x, y, angle))
        if angle == 0:
            box = ink_box(self.face, size, text, x, y)
            self.out.texts.append({"text": text, "role": role, "box": list(box)})

    def finish(self) -> Drawn:
        image = self.fine.reduce(_FINE)
        pen = ImageDraw.Draw(image)
        for text, size, x, y, angle in self.later:
            if angle:
                box = draw_turned(image, self.face, size, text, int(x), int(y), angle, _INK)
                self.out.texts.append({"text": text, "role": "label", "box": list(box)})
            else:
                pen.text((x, y), text, fill=_INK, font=self.face.at(size))
        self.out.image = image
        return self.out

    def high(self, size: int = 0) -> int:
        """The height of capitals and descenders."""
        _, top, _, bottom = self.face.at(size or self.size).getbbox("Ag0")
        return math.ceil(bottom - top)


def draw_chart(spec: ChartSpec, width: int, height: int, face: Face) -> Drawn | None:
    """Draw a chart; None where its labels do not fit into the size."""
    board = _Board(spec, width, height, face)
    pad = max(2, round(min(width, height) / 50)) if spec.compact else max(6, round(min(width, height) / 40))
    top = pad
    if not spec.compact:
        title_size = round(board.size * 1.25)
        lines = wrap(face, title_size, spec.table.title, width - 2 * pad)
        if len(lines) > 2:
            return None
        for line in lines:
            board.text(line, width / 2, top, size=title_size, anchor="middle", role="title")
            top += board.high(title_size) + 3
        top += pad // 2
    if spec.kind == "pie":
        return board.finish() if _pie(board, pad, top) else None
    if len(spec.table.columns) > 1 and spec.kind != "scatter":
        bottom = _legend(board, spec.table.columns, pad, top, width - 2 * pad)
        if bottom is None:
            return None
        top = bottom + pad // 2
    if spec.kind == "scatter":
        return board.finish() if _scatter(board, pad, top) else None
    return board.finish() if _axes_and_marks(board, pad, top) else None


def _legend(board: _Board, names: tuple[str, ...], x: int, y: int, width: int) -> int | None:
    """Set swatches and names in as many lines as needed; return the lower edge, or None beyond three lines."""
    high, left, rows = board.high(), x, 1
    for name, colour in zip(names, board.spec.colours, strict=False):
        need = high + 4 + math.ceil(text_width(board.face, board.size, name)) + board.size
        if need > width:
            return None
        if left + need > x + width:
            left, rows, y = x, rows + 1, y + high + 4
        if rows > 3:
            return None
        board.box(left, y, left + high, y + high, PALETTE[colour])
        board.text(name, left + high + 4, y, role="legend")
        left += need
    return y + high


def _axes_and_marks(board: _Board, pad: int, top: int) -> bool:
    spec, table, size, face = board.spec, board.spec.table, board.size, board.face
    rows = len(table.rows)
    lying, stacked = spec.kind == "horizontal", spec.kind == "stacked"
    totals = [sum(values) for _, values in table.rows] if stacked else [v for _, vs in table.rows for v in vs]
    low, high = min(totals), max(totals)
    if spec.kind != "line" or low < 0.5 * high:
        low = min(0.0, low)
    ticks = nice_ticks(low, high, 6 if (board.width if lying else board.height) > 260 else 4)
    names = [label for label, _ in table.rows]
    widest = max(text_width(face, size, name) for name in names)
    tick_texts = [show(t, 4) for t in ticks]
    ink = board.high()
    if spec.compact:
        left, right, bottom = pad, board.width - pad, board.height - pad
    else:
        side = widest if lying else max(text_width(face, size, t) for t in tick_texts)
        left, right = pad + math.ceil(side) + 8, board.width - pad - (ink if lying else 0)
        bottom = board.height - pad - ink - 6
        if table.units:
            board.text(f"in {table.units}", pad, top, size=max(9, size - 1), role="units")
            top += (
                ink + 5 + (0 if lying else ink // 2 + 2)
            )  # half of the highest tick's number stands above the plot
        if not lying:
            board.text(table.label, (left + right) / 2, bottom + 2, anchor="middle", role="axis")
        bottom -= 2
    if lying:
        bottom = board.height - pad - (0 if spec.compact else ink + 8)
    slot = ((bottom - top) if lying else (right - left)) / rows
    if not spec.compact and not lying:
        if widest + 4 <= slot:
            bottom -= ink + 5
        elif slot >= ink + 2 and widest < 0.35 * board.height:
            bottom -= math.ceil(widest) + 8
        else:
            return False
    elif lying and not spec.compact and (slot < ink + 2 or widest > 0.45 * board.width):
        return False
    values = _value_room(board, slot, lying)
    if values and not lying:
        top += ink + 2
    if values and lying:
        right -= math.ceil(max(text_width(face, size, show(v)) for _, vs in table.rows for v in vs)) + 3
    if bottom - top < (16 if spec.compact else 60) or right - left < (16 if spec.compact else 60):
        return False
    lo, hi = ticks[0], ticks[-1]
    board.out.plot = (left, top, right, bottom)
    board.out.axis = {"lo": lo, "hi": hi, "ticks": ticks, "along": "x" if lying else "y"}
    board.out.printed = values

    def place(value: float) -> int:
        share = (value - lo) / (hi - lo)
        return round(left + share * (right - left)) if lying else round(bottom - share * (bottom - top))

    if not spec.compact:
        for tick, text in zip(ticks, tick_texts, strict=True):
            at = place(tick)
            if lying:
                if spec.grid:
                    board.box(at, top, at + 0.5, bottom, _GRID)
                board.text(text, at, bottom + 4, anchor="middle", role="tick")
            else:
                if spec.grid:
                    board.box(left, at, right, at + 0.5, _GRID)
                board.box(left - 3, at, left, at + 1, _INK)
                board.text(text, left - 5, at - ink / 2 + 1, anchor="right", role="tick")
        for k, name in enumerate(names):
            middle = (top if lying else left) + (k + 0.5) * slot
            if lying:
                board.text(name, left - 5, middle - ink / 2, anchor="right", role="label")
            elif widest + 4 <= slot:
                board.text(name, middle, bottom + 5, anchor="middle", role="label")
            else:
                board.place(name, size, round(middle), bottom + 5, 90, "label")
    if spec.kind == "line":
        _lines(board, left, slot, place)
    elif not _bars(board, (top if lying else left), slot, place, lying=lying, stacked=stacked):
        return False
    if lying:
        board.box(left - 1, top, left, bottom, _INK)
    else:
        board.box(left, bottom, right, bottom + 1, _INK)
        if not spec.compact:
            board.box(left - 1, top, left, bottom + 1, _INK)
    return True


def _value_room(board: _Board, slot: float, lying: bool) -> bool:
    """Whether every number can be printed at its mark."""
    spec = board.spec
    if not spec.values or spec.kind in ("stacked", "line"):
        return False
    series = len(spec.table.columns)
    if lying:
        return slot * 0.8 / series >= board.high()
    room = slot * (0.95 if series == 1 else 0.8 / series)
    return all(
        text_width(board.face, board.size, show(v)) + 2 <= room for _, vs in spec.table.rows for v in vs
    )


def _bars(board: _Board, start: float, slot: float, place: Any, *, lying: bool, stacked: bool) -> bool:
    """Draw the bars; False if one is too short to be seen (a part of a stack that is, has no mark)."""
    spec, table = board.spec, board.spec.table
    series = len(table.columns)
    base = place(max(0.0, board.out.axis["lo"]))
    for r, (_, values) in enumerate(table.rows):
        done = 0.0
        for c, value in enumerate(values):
            if stacked:
                a, b = start + (r + 0.15) * slot, start + (r + 0.85) * slot
                near, far = place(done), place(done + value)
                done += value
            else:
                a = start + (r + 0.1 + 0.8 * c / series) * slot
                b = start + (r + 0.1 + 0.8 * (c + 1) / series) * slot
                near, far = base, place(value)
            a, b = round(a), max(round(a) + 1, round(b))
            if far == near and stacked:
                continue
            if far == near:
                return False
            cells = (near, a, far, b) if lying else (a, far, b, near)
            colour = spec.colours[r if spec.each else c]
            board.box(*cells, PALETTE[colour])
            board.out.marks.append({"row": r, "series": c, "colour": colour, "box": list(cells)})
            if board.out.printed:
                if lying:
                    board.text(show(value), far + 3, (a + b) / 2 - board.high() / 2, role="value")
                else:
                    board.text(
                        show(value), (a + b) / 2, far - board.high() - 1, anchor="middle", role="value"
                    )
    return True


def _lines(board: _Board, start: float, slot: float, place: Any) -> None:
    for c, name in enumerate(board.spec.colours[: len(board.spec.table.columns)]):
        points = []
        for r, (_, values) in enumerate(board.spec.table.rows):
            x, y = round(start + (r + 0.5) * slot), place(values[c])
            points.append((x * _FINE, y * _FINE))
            board.out.marks.append({"row": r, "series": c, "colour": name, "point": [x, y]})
        board.pen.line(points, fill=PALETTE[name], width=2 * _FINE, joint="curve")
        for x, y in points:
            r = _DOT * _FINE
            board.pen.ellipse((x - r, y - r, x + r, y + r), fill=PALETTE[name])


def _pie(board: _Board, pad: int, top: int) -> bool:
    spec, table, size = board.spec, board.spec.table, board.size
    values = table.column(0)
    total = sum(values)
    if min(values) <= 0 or min(values) < 0.02 * total:
        return False
    texts = [
        f"{label} ({show(value)})" if spec.values else label
        for label, value in zip((r[0] for r in table.rows), values, strict=True)
    ]
    high = board.high()
    width = 0 if spec.compact else math.ceil(max(text_width(board.face, size, t) for t in texts)) + high + 8
    if not spec.compact and table.units and spec.values:
        board.text(f"in {table.units}", pad, top, size=max(9, size - 1), role="units")
        top += high + 5
    room = min(board.width - 2 * pad - width, board.height - pad - top)
    if room < (24 if spec.compact else 80) or (
        not spec.compact and len(texts) * (high + 5) > board.height - top - pad
    ):
        return False
    side = room
    x, y = pad + (board.width - 2 * pad - width - side) // 2, top + (board.height - pad - top - side) // 2
    board.out.plot = (x, y, x + side, y + side)
    board.out.printed = spec.values and not spec.compact
    angle = 0.0
    for r, value in enumerate(values):
        turn = 360.0 * value / total
        box = (x * _FINE, y * _FINE, (x + side) * _FINE - 1, (y + side) * _FINE - 1)
        board.pen.pieslice(
            box, angle - 90, angle + turn - 90, fill=PALETTE[spec.colours[r]], outline=spec.paper
        )
        board.out.marks.append(
            {
                "row": r,
                "series": 0,
                "colour": spec.colours[r],
                "start": round(angle, 3),
                "end": round(angle + turn, 3),
            }
        )
        angle += turn
    if not spec.compact:
        left = board.width - pad - width + 4
        y = top + max(0, (board.height - pad - top - len(texts) * (high + 5)) // 2)
        for r, text in enumerate(texts):
            board.box(left, y, left + high, y + high, PALETTE[spec.colours[r]])
            board.text(text, left + high + 4, y, role="legend")
            y += high + 5
    return True


def _scatter(board: _Board, pad: int, top: int) -> bool:
    spec, table, size, face = board.spec, board.spec.table, board.size, board.face
    ink = board.high()
    xs, ys = np.array(table.column(0)), np.array(table.column(1))
    x_ticks = nice_ticks(float(xs.min()), float(xs.max()), 6)
    y_ticks = nice_ticks(float(ys.min()), float(ys.max()), 5)
    board.text(table.columns[1], pad, top, role="axis")
    top += ink + 8
    left = pad + math.ceil(max(text_width(face, size, show(t, 4)) for t in y_ticks)) + 8
    right, bottom = board.width - pad - ink, board.height - pad - 2 * ink - 10
    if bottom - top < 60 or right - left < 60:
        return False
    if text_width(face, size, show(max(x_ticks, key=abs), 4)) * len(x_ticks) * 1.3 > right - left:
        return False
    board.text(table.columns[0], (left + right) / 2, bottom + ink + 9, anchor="middle", role="axis")
    board.out.plot = (left, top, right, bottom)
    board.out.axis = {"lo": y_ticks[0], "hi": y_ticks[-1], "ticks": y_ticks, "along": "y", "x_ticks": x_ticks}
    board.out.printed = False
    at_x = [round(left + (v - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - left)) for v in xs]
    at_y = [round(bottom - (v - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top)) for v in ys]
    for a in range(len(xs)):
        for b in range(a):
            if math.hypot(at_x[a] - at_x[b], at_y[a] - at_y[b]) < 2 * _DOT + 3:
                return False  # points that touch cannot be counted
    for tick in x_ticks:
        x = round(left + (tick - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - left))
        if spec.grid:
            board.box(x, top, x + 0.5, bottom, _GRID)
        board.text(show(tick, 4), x, bottom + 4, anchor="middle", role="tick")
    for tick in y_ticks:
        y = round(bottom - (tick - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top))
        if spec.grid:
            board.box(left, y, right, y + 0.5, _GRID)
        board.text(show(tick, 4), left - 5, y - ink / 2 + 1, anchor="right", role="tick")
    board.box(left, bottom, right, bottom + 1, _INK)
    board.box(left - 1, top, left, bottom + 1, _INK)
    colour = spec.colours[0]
    for r, (x, y) in enumerate(zip(at_x, at_y, strict=True)):
        d = _DOT * _FINE
        board.pen.ellipse((x * _FINE - d, y * _FINE - d, x * _FINE + d, y * _FINE + d), fill=PALETTE[colour])
        board.out.marks.append({"row": r, "series": 0, "colour": colour, "point": [x, y]})
    return True
