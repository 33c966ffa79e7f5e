"""Charts of real and made-up tables, with questions that have exact answers.

Kinds: bars (single, grouped, stacked, lying), lines, pies, points (``worlds.chart_draw``); tables from
``worlds.tables``, which are divided among the splits, as are fonts and the words of made-up labels. Answers are
numbers as the table has them (to be scored by relaxed accuracy, 5 %, as ChartQA does), labels of the chart,
colours, or yes and no. Where an answer follows from comparing marks, those differ by at least ``CLEAR`` of the
axis, so that it can be seen.

Pictures under 160 pixels are *compact*: two to five bars or slices, each named by its colour, without axes and titles.

Frame: pixels, origin at the top left corner, y down; boxes (x0, y0, x1, y1) with exclusive ends.
Shape legend: H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chiasm.errors import DataError
from chiasm.worlds.chart_draw import KINDS, PALETTE, ChartKind, ChartSpec, Drawn, draw_chart
from chiasm.worlds.scenes import pixels_of
from chiasm.worlds.tables import Table, made_up, show, tables_of, view
from chiasm.worlds.typeset import Fonts, faces
from chiasm.worlds.world import Sample, Thing, World

__all__ = ["CLEAR", "QUESTIONS", "ChartsWorld"]

#: Question kinds; which of them a chart allows depends on its kind.
QUESTIONS = (
    *("value", "highest", "lowest", "count", "compare", "difference", "sum", "colour"),
    *("above", "series", "title"),
)
#: Smallest difference of two compared marks, as a share of the axis (of a pie: of the whole).
CLEAR = 0.04
#: Smallest side of a chart with axes.
_COMPACT = 160

_WORDINGS: dict[str, tuple[str, ...]] = {
    "value": ("What is the {column} of {row}?", "What value does {row} have for {column}?"),
    "value_one": ("What is the value for {row}?", "Which value does {row} have?"),
    "highest": ("Which {label} has the highest {column}?", "For which {label} is {column} highest?"),
    "highest_one": ("Which {label} has the highest value?", "Which {label} is highest?"),
    "lowest": ("Which {label} has the lowest {column}?", "For which {label} is {column} lowest?"),
    "lowest_one": ("Which {label} has the lowest value?", "Which {label} is lowest?"),
    "count": ("How many {marks} are there?", "How many {marks} does the chart show?"),
    "compare": ("Is {row} higher than {other} for {column}?",),
    "compare_one": ("Is {row} higher than {other}?", "Is the value of {row} higher than that of {other}?"),
    "difference": ("What is the difference between {row} and {other} for {column}?",),
    "difference_one": ("What is the difference between {row} and {other}?",),
    "sum": ("What is the sum of {row} and {other} for {column}?",),
    "sum_one": ("What is the sum of {row} and {other}?",),
    "colour": ("What colour stands for {name}?", "In which colour is {name} drawn?"),
    "above": ("For how many {labels} is {column} above {limit}?",),
    "above_one": ("How many {labels} are above {limit}?",),
    "series": ("Which entry of the legend is highest for {row}?", "What is highest for {row}?"),
    "title": ("What is the title of the chart?", "What is the chart about?"),
}


class ChartsWorld(World):
    """Questions about drawn charts.

    Args:
        split: "train", "dev" or "test"; decides tables, words and fonts.
        seed: changes the charts.
        size: number of samples (default 20,000 for train, 2,000 else).
        pixels: side or (width, height), at least 48; default: 320..640 x 240..480, another size for each chart.
        kinds: kinds of charts.
        questions: question kinds, chosen evenly among those that a chart allows.
        rounds: questions a chart; further ones are of other kinds.
        real: share of charts of real tables, 0..1; compact ones are always made up.
        fonts: see ``typeset.faces``.
        folder: where the prepared assets are.

    Raises:
        DataError: unknown kind or question, numbers out of range, or no fonts.
    """

    family = "charts"

    def __init__(
        self,
        split: str,
        *,
        seed: int = 0,
        size: int | None = None,
        pixels: int | Sequence[int] | None = None,
        kinds: Sequence[ChartKind] = KINDS,
        questions: Sequence[str] = QUESTIONS,
        rounds: int = 1,
        real: float = 0.6,
        fonts: Fonts = "auto",
        folder: str | Path | None = None,
    ) -> None:
        super().__init__(split, seed=seed)
        self.pixels = None if pixels is None else pixels_of(pixels, 48)
        self.compact = self.pixels is not None and min(self.pixels) < _COMPACT
        self.kinds: tuple[ChartKind, ...] = (kinds,) if isinstance(kinds, str) else tuple(kinds)  # type: ignore[assignment]
        self.asked = (questions,) if isinstance(questions, str) else tuple(questions)
        for given, known in ((self.kinds, KINDS), (self.asked, QUESTIONS)):
            unknown = [name for name in given if name not in known]
            if unknown or not given:
                raise DataError(f"unknown {unknown} of charts: choose from {', '.join(known)}")
        if self.compact:
            self.kinds = tuple(kind for kind in self.kinds if kind in ("bar", "horizontal", "pie"))
            if not self.kinds:
                raise DataError("charts under 160 pixels are of the kinds bar, horizontal and pie")
        if not 0.0 <= real <= 1.0 or not 1 <= rounds <= len(QUESTIONS):
            raise DataError(
                f"real={real} rounds={rounds}: give a share 0..1 and 1..{len(QUESTIONS)} questions"
            )
        self.rounds, self.real = rounds, real
        self.faces = faces(split, fonts, folder)
        self.tables = tables_of(split)
        self._size = size if size is not None else (20_000 if split == "train" else 2_000)

    def __len__(self) -> int:
        return self._size

    def sample(self, index: int) -> Sample:
        """Return sample ``index``.

        ``meta``: ``kind``, ``table`` (with its source), ``plot`` box, ``axis`` (lo, hi, ticks), ``marks`` (row, series,
        colour and box, point or angles), ``texts`` (text, role, box), ``printed`` (numbers at the marks), ``font``
        and, for each question, ``asked`` (kind, row, column, …).
        """
        i = self.checked(index)
        spec, drawn, rounds, asked, stem = self._chart(i)
        return Sample(
            image=np.asarray(drawn.image),
            question=rounds[0][0],
            answer=rounds[0][1],
            family=self.family,
            key=self.key(i),
            more=tuple(rounds[1:]),
            meta={
                "kind": spec.kind,
                "table": spec.table.to_json(),
                "plot": list(drawn.plot),
                "axis": drawn.axis,
                "marks": drawn.marks,
                "texts": drawn.texts,
                "printed": drawn.printed,
                "font": stem,
                "asked": asked,
            },
        )

    def things(self, index: int) -> list[Thing]:
        """Return the bars with their boxes, points with those of their dots; a pie has none."""
        spec, drawn, *_ = self._chart(self.checked(index))
        label = {"line": "point", "scatter": "point"}.get(spec.kind, "bar")
        boxes = [
            mark["box"]
            if "box" in mark
            else [mark["point"][0] - 3, mark["point"][1] - 3, mark["point"][0] + 3, mark["point"][1] + 3]
            for mark in drawn.marks
            if "start" not in mark
        ]
        return [Thing(label=label, box=(box[0], box[1], box[2], box[3])) for box in boxes]

    def manifest(self) -> dict[str, Any]:
        """Return the base facts, options, tables and fonts with hashes."""
        return super().manifest() | {
            "pixels": None if self.pixels is None else list(self.pixels),
            "kinds": list(self.kinds),
            "questions": list(self.asked),
            "rounds": self.rounds,
            "real": self.real,
            "tables": [table.id for table in self.tables],
            "fonts": {face.stem: face.digest() for face in self.faces},
        }

    # --- one chart ------------------------------------------------------------------------------------------

    def _chart(self, index: int) -> tuple[ChartSpec, Drawn, list[tuple[str, str]], list[dict[str, Any]], str]:
        """Try tables and sizes until one can be drawn and asked about."""
        rng = self.random(index)
        kind = self.kinds[index % len(self.kinds)]
        wanted = self.asked[int(rng.integers(len(self.asked)))]
        for attempt in range(400):
            face = self.faces[int(rng.integers(len(self.faces)))]
            spec = self._spec(kind, rng)
            width, height = self.pixels or (int(rng.integers(320, 641)), int(rng.integers(240, 481)))
            # The first tries insist on the wished question, so that rare kinds are not rarer still.
            first = wanted if attempt < 12 else self.asked[int(rng.integers(len(self.asked)))]
            if spec is None or not _allowed(spec, first):
                continue
            drawn = draw_chart(spec, width, height, face)
            if drawn is None:
                continue
            found = _question(first, spec, drawn, rng, self.split == "train")
            if found is None:
                continue
            rounds, asked = [(found[0], found[1])], [found[2]]
            for name in (self.asked[int(k)] for k in rng.permutation(len(self.asked))):
                if len(rounds) == self.rounds:
                    break
                if name != first and _allowed(spec, name):
                    more = _question(name, spec, drawn, rng, self.split == "train")
                    if more is not None:
                        rounds.append((more[0], more[1]))
                        asked.append(more[2])
            return spec, drawn, rounds, asked, face.stem
        raise DataError(
            f"no chart of the kind {kind} fits {self.pixels} with the questions {', '.join(self.asked)}: "
            "allow more kinds, questions or pixels"
        )

    def _spec(self, kind: ChartKind, rng: np.random.Generator) -> ChartSpec | None:
        if self.compact:
            return _compact_spec(kind, rng)
        columns = {"stacked": (2, 4), "pie": (1, 1), "scatter": (2, 2)}.get(kind, (1, 3))
        rows = {"pie": (3, 7), "scatter": (5, 24), "line": (4, 12), "stacked": (3, 9)}.get(kind, (3, 12))
        if rng.random() < self.real:
            fit = [
                table
                for table in self.tables
                if len(table.columns) >= columns[0]
                and (kind != "line" or table.kind == "time")
                and (kind not in ("pie", "stacked") or table.adds_up)
            ]
            if not fit:
                return None
            table = view(fit[int(rng.integers(len(fit)))], rng, rows=rows, columns=columns)
        else:
            table = made_up(self.split, rng, rows=rows, columns=columns, adds_up=kind in ("pie", "stacked"))
            if kind == "scatter":
                table = _paired(table)
        if any(value < 0 for _, values in table.rows for value in values):
            return None
        count = len(table.rows) if kind == "pie" else len(table.columns)
        names = list(PALETTE)
        colours = tuple(names[int(k)] for k in rng.permutation(len(names))[:count])
        tone = 255 - rng.integers(0, 12, 3)
        return ChartSpec(
            kind=kind,
            table=table,
            colours=colours,
            values=bool(rng.random() < 0.5),
            grid=bool(rng.random() < 0.7),
            paper=(int(tone[0]), int(tone[1]), int(tone[2])),
        )


def _compact_spec(kind: ChartKind, rng: np.random.Generator) -> ChartSpec:
    """A few bars or slices that are named by their colours."""
    count = int(rng.integers(2, 6))
    names = list(PALETTE)
    colours = tuple(names[int(k)] for k in rng.permutation(len(names))[:count])
    values = rng.permutation(np.arange(5, 100))[:count]
    table = Table(
        id="made-up",
        title="",
        kind="items",
        label="slice" if kind == "pie" else "bar",
        columns=("Value",),
        units="",
        rows=tuple((colour, (int(value),)) for colour, value in zip(colours, values, strict=True)),
        source="made up",
    )
    tone = 255 - rng.integers(0, 30, 3)
    return ChartSpec(
        kind=kind,
        table=table,
        colours=colours,
        each=True,
        values=kind != "pie" and bool(rng.random() < 0.5),
        grid=False,
        paper=(int(tone[0]), int(tone[1]), int(tone[2])),
        compact=True,
    )


def _paired(table: Table) -> Table:
    """Name the two columns of made-up points, which are no years."""
    return Table(
        id=table.id,
        title=table.title,
        kind=table.kind,
        label=table.label,
        columns=("Size", table.units.capitalize() if table.units != "%" else "Share"),
        units=table.units,
        rows=table.rows,
        source=table.source,
        adds_up=table.adds_up,
    )


# --- questions ------------------------------------------------------------------------------------------------


def _allowed(spec: ChartSpec, name: str) -> bool:
    """Whether a question of this kind makes sense for this kind of chart."""
    many = len(spec.table.columns) > 1
    if spec.kind == "scatter":
        return name in ("count", "above", "title")
    if spec.compact:
        return name in (("highest", "lowest", "count", "compare", "value", "difference", "sum"))
    if spec.kind == "pie":
        return name in ("value", "highest", "lowest", "count", "compare", "colour", "sum", "title")
    if name == "series":
        return many
    if name == "colour":
        return many
    # Parts of a stack do not begin at zero: reading them off is arithmetic, comparing them a guess.
    if spec.kind == "stacked":
        return name in ("count", "colour", "title", "series", "value", "highest", "lowest")
    return True


def _question(
    name: str, spec: ChartSpec, drawn: Drawn, rng: np.random.Generator, varied: bool
) -> tuple[str, str, dict[str, Any]] | None:
    """Return question, answer and what it is about; None where this chart gives no clear answer."""
    table = spec.table
    rows, many = len(table.rows), len(table.columns) > 1
    r, other = (int(k) for k in rng.permutation(rows)[:2]) if rows > 1 else (0, 0)
    c = int(rng.integers(len(table.columns)))
    if spec.kind == "scatter":
        c = 1
    column = table.column(c)
    scale = sum(column) if spec.kind == "pie" else drawn.axis["hi"] - drawn.axis["lo"]
    label = table.label.lower() if not spec.compact else table.label

    def row_name(k: int) -> str:
        return f"the {table.rows[k][0]} {table.label}" if spec.compact else table.rows[k][0]

    def say(**names: Any) -> str:
        wordings = _WORDINGS[name if many or f"{name}_one" not in _WORDINGS else f"{name}_one"]
        text = wordings[int(rng.integers(len(wordings))) if varied else 0]
        return text.format(label=label, labels=_plural(label), column=table.columns[c], **names)

    def apart(a: float, b: float) -> bool:
        return a != b and (drawn.printed or abs(a - b) >= CLEAR * scale)

    about: dict[str, Any] = {"kind": name, "column": c}
    if name in ("value", "difference", "sum"):
        if (spec.kind == "pie" or spec.compact) and not drawn.printed:
            return None  # there is no axis to read from
        if spec.kind == "stacked" and c > 0:
            return None
        if name == "value":
            return say(row=row_name(r)), show(column[r]), about | {"row": r}
        first, second = (r, other) if column[r] >= column[other] else (other, r)
        if name == "difference" and not apart(column[first], column[second]):
            return None
        number = column[first] - column[second] if name == "difference" else column[first] + column[second]
        return (
            say(row=row_name(first), other=row_name(second)),
            show(number),
            about | {"row": first, "other": second},
        )
    if name in ("highest", "lowest"):
        if spec.kind == "stacked" and c > 0:
            return None
        order = sorted(range(rows), key=lambda k: -column[k] if name == "highest" else column[k])
        if rows < 2 or not apart(column[order[0]], column[order[1]]):
            return None
        return say(), table.rows[order[0]][0], about | {"row": order[0]}
    if name == "count":
        if spec.kind == "scatter":
            return say(marks="points"), str(rows), about
        if spec.kind in ("bar", "horizontal") and not many:
            return say(marks="bars"), str(rows), about
        if spec.kind == "pie":
            return say(marks="slices"), str(rows), about
        if spec.kind == "line" and many and rng.random() < 0.5:
            return say(marks="lines"), str(len(table.columns)), about
        return say(marks=_plural(label)), str(rows), about
    if name == "compare":
        if rows < 2 or not apart(column[r], column[other]):
            return None
        yes = column[r] > column[other]
        return (
            say(row=row_name(r), other=row_name(other)),
            "yes" if yes else "no",
            about | {"row": r, "other": other},
        )
    if name == "colour":
        k = r if spec.kind == "pie" else c
        named = table.rows[k][0] if spec.kind == "pie" else table.columns[k]
        return say(name=named), spec.colours[k], about | {"row": k if spec.kind == "pie" else None}
    if name == "above":
        ticks = [
            t
            for t in drawn.axis.get("ticks", [])[1:-1]
            if all(abs(v - t) >= CLEAR / 2 * scale for v in column)
        ]
        if not ticks or spec.kind in ("pie", "stacked"):
            return None
        limit = ticks[int(rng.integers(len(ticks)))]
        number = sum(v > limit for v in column)
        if spec.kind == "scatter":
            wording = f"How many points have a {table.columns[1]} above {show(limit, 4)}?"
            return wording, str(number), about | {"limit": limit}
        return say(limit=show(limit, 4)), str(number), about | {"limit": limit}
    if name == "series":
        values = table.rows[r][1]
        order = sorted(range(len(values)), key=lambda k: -values[k])
        if not apart(values[order[0]], values[order[1]]):
            return None
        return say(row=row_name(r)), table.columns[order[0]], about | {"row": r, "column": order[0]}
    return say(), table.title, about


def _plural(word: str) -> str:
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")
