"""Tables for pages and charts: real numbers with their source, and made-up ones that look real.

``tables.json`` holds 27 tables, each in one split: public-domain data from the packages statsmodels and vega-datasets,
and well-known facts compiled for this project; every table names its source. A chart shows a *view*: a few rows and
columns. Made-up tables have labels from the word list of their split (``worlds.words``).

Values have the decimals of the table; ``show`` writes a value as it is printed and answered.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import numpy as np

from chiasm.worlds.words import words_of

__all__ = ["Table", "made_up", "real_tables", "show", "tables_of", "view"]

Kind = Literal["time", "items"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of numbers.

    Attributes:
        id: its name in ``tables.json``; "made-up" otherwise.
        title: what it is about.
        kind: "time" (rows in order) or "items".
        label: what a row is ("Year", "State").
        columns: names of the number columns.
        units: of all numbers; may be empty.
        rows: (label, numbers) of each row.
        source: where the numbers are from.
        adds_up: the numbers are parts of a whole, so that slices and stacks mean something.
    """

    id: str
    title: str
    kind: Kind
    label: str
    columns: tuple[str, ...]
    units: str
    rows: tuple[tuple[str, tuple[float, ...]], ...]
    source: str
    adds_up: bool = False

    def column(self, k: int) -> list[float]:
        """Return the numbers of column ``k``."""
        return [values[k] for _, values in self.rows]

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain data."""
        return {
            "id": self.id,
            "title": self.title,
            "label": self.label,
            "units": self.units,
            "columns": list(self.columns),
            "rows": [[label, *values] for label, values in self.rows],
            "source": self.source,
        }


@functools.cache
def real_tables() -> tuple[tuple[str, Table], ...]:
    """Return (split, table) of every table of ``tables.json``."""
    text = resources.files("chiasm.worlds").joinpath("tables.json").read_text(encoding="utf-8")
    return tuple(
        (
            row["split"],
            Table(
                id=row["id"],
                title=row["title"],
                kind=row["kind"],
                label=row["label"],
                columns=tuple(row["columns"]),
                units=row["units"],
                rows=tuple((str(line[0]), tuple(line[1:])) for line in row["rows"]),
                source=row["source"],
                adds_up=row["id"] in _WHOLES,
            ),
        )
        for row in json.loads(text)
    )


def tables_of(split: str) -> tuple[Table, ...]:
    """Return the real tables of a split."""
    return tuple(table for home, table in real_tables() if home == split)


def view(
    table: Table, rng: np.random.Generator, *, rows: tuple[int, int], columns: tuple[int, int] = (1, 4)
) -> Table:
    """Choose some rows (of a "time" table: evenly spaced ones in order) and some columns.

    Args:
        table: the whole one.
        rng: chooses.
        rows: least and largest number of rows.
        columns: least and largest number of columns.
    """
    most = min(rows[1], len(table.rows))
    count = int(rng.integers(min(rows[0], most), most + 1))
    if table.kind == "time":
        step = int(rng.integers(1, max(1, min(10, (len(table.rows) - 1) // max(1, count - 1))) + 1))
        start = int(rng.integers(len(table.rows) - step * (count - 1)))
        chosen = [start + step * k for k in range(count)]
    else:
        chosen = [int(k) for k in rng.permutation(len(table.rows))[:count]]
    widest = min(columns[1], len(table.columns))
    width = int(rng.integers(min(columns[0], widest), widest + 1))
    kept = sorted(int(k) for k in rng.permutation(len(table.columns))[:width])
    return Table(
        id=table.id,
        title=table.title,
        kind=table.kind,
        label=table.label,
        columns=tuple(table.columns[k] for k in kept),
        units=table.units,
        rows=tuple((table.rows[k][0], tuple(table.rows[k][1][c] for c in kept)) for k in chosen),
        source=table.source,
        adds_up=table.adds_up,
    )


#: Real tables whose numbers are parts of a whole.
_WHOLES = frozenset(["areas", "oceans", "iowa", "us_gdp", "jobs", "crimea", "work", "rain"])
#: (title, row label, units, largest value, decimals, adds up) of made-up tables.
_TOPICS = (
    ("Visitors of the museum", "Town", "thousands", 900, 0, True),
    ("Sales of the shop", "Product", "pieces", 5000, 0, True),
    ("Points of the teams", "Team", "points", 120, 0, False),
    ("Price of a ticket", "Line", "euros", 40, 1, False),
    ("Weight of the parcels", "Parcel", "kg", 30, 1, True),
    ("Hours of sunshine", "Place", "hours", 300, 0, False),
    ("Votes at the meeting", "Name", "votes", 400, 0, True),
    ("Share of the answers", "Answer", "%", 60, 1, False),
    ("Length of the trails", "Trail", "km", 25, 1, False),
    ("Books lent by the library", "Branch", "books", 2400, 0, True),
)


def made_up(
    split: str,
    rng: np.random.Generator,
    *,
    rows: tuple[int, int],
    columns: tuple[int, int] = (1, 3),
    adds_up: bool = False,
) -> Table:
    """Make a table of random numbers whose labels are words of the split; of a whole if ``adds_up``."""
    topics = [topic for topic in _TOPICS if topic[5] or not adds_up]
    title, label, units, most, decimals, whole = topics[int(rng.integers(len(topics)))]
    words = words_of(split)
    count, width = int(rng.integers(rows[0], rows[1] + 1)), int(rng.integers(columns[0], columns[1] + 1))
    names = [words[int(k)].capitalize() for k in rng.permutation(len(words))[: count + 1]]
    year = 1990 + int(rng.integers(30))
    heads = (
        [str(year + k) for k in range(width)]
        if width > 1
        else [units.capitalize() if units != "%" else "Share"]
    )
    scale = most * float(rng.uniform(0.2, 1.0))
    values = np.round(rng.uniform(0.05, 1.0, (count, width)) * scale, decimals)
    values = np.maximum(values, 1.0 if decimals == 0 else 0.1)
    return Table(
        id="made-up",
        title=f"{title} in {names[-1]}",
        kind="items",
        label=label,
        columns=tuple(heads),
        units=units,
        rows=tuple(
            (names[k], tuple(float(v) if decimals else int(v) for v in values[k])) for k in range(count)
        ),
        source="made up",
        adds_up=whole,
    )


def show(value: float, decimals: int = 1) -> str:
    """Write a number as it is printed: whole numbers without point, others rounded and without trailing zeros."""
    text = f"{round(float(value), decimals):.{decimals}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text
