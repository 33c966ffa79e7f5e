"""What a data set holds: rows, tokens by part, tiles, turns, picture sizes, answer lengths; in bounded memory.

Counted from headers, by the code that training lays out with. Distributions are counters of whole numbers; when there
are too many different ones, neighbours are put together, so that memory does not grow with the rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the linter fills these statistics and is above them
    from chiasm.data.lint.sample import Sample

__all__ = [
    "PARTS",
    "Bin",
    "Distribution",
    "SetStats",
    "aspect_bins",
    "bars",
    "length_bins",
    "merged",
    "whole_bins",
]

PARTS = ("system", "question", "answer", "image", "video")
_MOST_VALUES = 4096
_SQUARE = 20_000  # an aspect of 1, so that all are whole numbers above 0
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_BLOCKS = " ▏▎▍▌▋▊▉"


class Distribution:
    """Counts of whole numbers >= 0. Exact up to 4,096 different values; beyond, rounded down to a growing step."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.step = 1
        self.n = self.total = self.high = 0
        self.low: int | None = None

    def add(self, value: int, times: int = 1) -> None:
        """Count a value."""
        self.counts[value // self.step * self.step] += times
        self.n += times
        self.total += value * times
        self.high = max(self.high, value)
        self.low = value if self.low is None else min(self.low, value)
        while len(self.counts) > _MOST_VALUES:
            self.step *= 2
            coarse: Counter[int] = Counter()
            for old, count in self.counts.items():
                coarse[old // self.step * self.step] += count
            self.counts = coarse

    def update(self, other: Distribution) -> None:
        """Take in another distribution."""
        total, low, high = self.total + other.total, other.low, max(self.high, other.high)
        if other.n and low is not None:
            for value, count in other.counts.items():
                self.add(value, count)
            self.low = low if self.low is None else min(self.low, low)
            self.total, self.high = total, high

    @property
    def mean(self) -> float:
        """0 if nothing was counted."""
        return self.total / self.n if self.n else 0.0

    def quantile(self, share: float) -> int:
        """The smallest value that at least this share of all values does not exceed; 0 if nothing was counted."""
        need, seen = share * self.n, 0
        for value, count in sorted(self.counts.items()):
            seen += count
            if seen >= need:
                return value
        return 0

    def as_dict(self) -> dict[str, Any]:
        """Mean, range and quantiles as plain data."""
        if not self.n:
            return {"n": 0}
        found = {name: self.quantile(share) for name, share in _QUANTILES.items()}
        return {
            "n": self.n,
            "total": self.total,
            "mean": round(self.mean, 3),
            "min": self.low,
            **found,
            "max": self.high,
        }


@dataclass(slots=True)
class SetStats:
    """What was seen of one set (or of several together).

    Attributes:
        name: of the set.
        rows: seen.
        unusable: rows that training would refuse, which are in none of the distributions.
        tokens: of a row, media included.
        learned: tokens of a row that are learned.
        tiles: of a row's pictures (thumbnails included) and frames.
        images: pictures of a row.
        videos: of a row that has any; frames: likewise, of all its videos.
        shown: tokens of a row's pictures and frames, every repeat counted; rows without any are left out.
        turns: questions and answers of a row.
        answers: characters of an answer.
        widths, heights: of pictures, upright, in pixels.
        aspects: 1000 log2(width / height) of pictures, plus 20,000.
        parts: tokens by part.
    """

    name: str
    rows: int = 0
    unusable: int = 0
    tokens: Distribution = field(default_factory=Distribution)
    learned: Distribution = field(default_factory=Distribution)
    tiles: Distribution = field(default_factory=Distribution)
    images: Distribution = field(default_factory=Distribution)
    videos: Distribution = field(default_factory=Distribution)
    frames: Distribution = field(default_factory=Distribution)
    shown: Distribution = field(default_factory=Distribution)
    turns: Distribution = field(default_factory=Distribution)
    answers: Distribution = field(default_factory=Distribution)
    widths: Distribution = field(default_factory=Distribution)
    heights: Distribution = field(default_factory=Distribution)
    aspects: Distribution = field(default_factory=Distribution)
    parts: Counter[str] = field(default_factory=Counter)

    def see(self, sample: Sample) -> None:
        """Take in one row."""
        self.rows += 1
        if sample.tokens is None or sample.refused or not sample.learned:
            self.unusable += 1
            return
        self.tokens.add(sample.tokens)
        self.learned.add(sample.learned)
        self.tiles.add(sum(sample.tiles) + sample.frame_tiles)
        self.images.add(len(sample.pictures))
        if sample.videos:
            self.videos.add(len(sample.videos))
            self.frames.add(sample.frames)
        if seen := sample.parts["image"] + sample.parts["video"]:
            self.shown.add(seen)
        self.turns.add(sum(role != "system" for _, role, _ in sample.said))
        self.parts.update(sample.parts)
        for _, role, text in sample.said:
            if role == "assistant":
                self.answers.add(len(text))
        for picture in sample.pictures:
            width, height = picture.size
            if picture.known and width and height:
                self.widths.add(width)
                self.heights.add(height)
                self.aspects.add(max(0, round(1000 * math.log2(width / height)) + _SQUARE))

    @property
    def distributions(self) -> dict[str, Distribution]:
        """By name."""
        names = (
            *("tokens", "learned", "tiles", "images", "videos", "frames", "shown", "turns", "answers"),
            *("widths", "heights", "aspects"),
        )
        return {name: getattr(self, name) for name in names}

    def as_dict(self) -> dict[str, Any]:
        """Plain data; aspects as width / height."""
        found = {name: d.as_dict() for name, d in self.distributions.items() if name != "aspects"}
        aspects: dict[str, Any] = {"n": self.aspects.n}
        if self.aspects.n:
            low, high = self.aspects.low or 0, self.aspects.high
            at = {"min": low, "p50": self.aspects.quantile(0.5), "max": high}
            aspects |= {name: round(2 ** ((value - _SQUARE) / 1000), 3) for name, value in at.items()}
        return {
            "rows": self.rows,
            "unusable": self.unusable,
            "parts": {part: self.parts[part] for part in PARTS},
            **found,
            "aspects": aspects,
        }


def merged(stats: Sequence[SetStats], name: str = "all") -> SetStats:
    """Several sets as one."""
    whole = SetStats(name)
    for one in stats:
        whole.rows += one.rows
        whole.unusable += one.unusable
        whole.parts.update(one.parts)
        for key, distribution in whole.distributions.items():
            distribution.update(one.distributions[key])
    return whole


# Histograms ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """A bar: values of low <= value < high."""

    label: str
    low: float
    high: float
    count: int


def length_bins(distribution: Distribution, most: int = 14) -> list[Bin]:
    """Bins whose borders grow by equal ratios (1, 1.5, 2, 3, 4, 6, 8, …), from the smallest to the largest value."""
    if not distribution.n:
        return []
    borders = sorted({0, 1, *(2**k for k in range(1, 40)), *(3 * 2**k for k in range(40))})
    low = distribution.quantile(0.0)
    first = max(n for n, border in enumerate(borders) if border <= low)
    last = next(n for n, border in enumerate(borders) if border > distribution.high)
    while last - first > most:  # every second border will do
        borders = [*borders[:first], *borders[first::2]]
        last = next(n for n, border in enumerate(borders) if border > distribution.high)
    return _binned(distribution, borders[first : last + 1])


def whole_bins(distribution: Distribution, most: int = 16) -> list[Bin]:
    """Bins of equal width, a whole number, from the smallest value to the largest."""
    if not distribution.n:
        return []
    low = distribution.quantile(0.0)
    width = max(1, -(-(distribution.high - low + 1) // most), distribution.step)
    return _binned(distribution, list(range(low, distribution.high + width + 1, width)))


_ASPECTS = (1 / 20, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 9 / 10, 10 / 9, 4 / 3, 3 / 2, 2, 3, 4, 20)


def aspect_bins(stats: SetStats) -> list[Bin]:
    """Width / height in 13 bins around the usual shapes; the outer two hold everything beyond."""
    counts = [0] * (len(_ASPECTS) - 1)
    for value, count in stats.aspects.counts.items():
        aspect = 2 ** ((value - _SQUARE) / 1000)
        at = sum(aspect >= border for border in _ASPECTS[1:-1])
        counts[at] += count
    labels = (
        "under 1:4",
        "1:4",
        "1:3",
        "1:2",
        "2:3",
        "3:4",
        "1:1",
        "10:9",
        "4:3",
        "3:2",
        "2:1",
        "3:1",
        "over 4:1",
    )
    if not stats.aspects.n:
        return []
    return [
        Bin(label=label, low=low, high=high, count=count)
        for label, low, high, count in zip(labels, _ASPECTS, _ASPECTS[1:], counts, strict=False)
    ]


def _binned(distribution: Distribution, borders: list[int]) -> list[Bin]:
    bins = []
    for low, high in pairwise(borders):
        count = sum(c for value, c in distribution.counts.items() if low <= value < high)
        label = f"{low:,}" if high == low + 1 else f"{low:,}–{high - 1:,}"
        bins.append(Bin(label=label, low=low, high=high, count=count))
    while bins and not bins[-1].count:
        bins.pop()
    return bins


def bars(title: str, bins: Sequence[Bin], *, width: int = 40) -> list[str]:
    """A histogram in text: a line for each bin, the longest bar `width` characters."""
    if not bins:
        return []
    most, total = max(b.count for b in bins), sum(b.count for b in bins)
    room, digits = max(len(b.label) for b in bins), len(f"{most:,}")
    lines = [title]
    for one in bins:
        eighths = round(8 * width * one.count / most) if most else 0
        if one.count:
            eighths = max(1, eighths)
        bar = "█" * (eighths // 8) + (_BLOCKS[eighths % 8] if eighths % 8 else "")
        share = f"{one.count / total:4.0%}" if total else ""
        lines.append(f"  {one.label:>{room}}  {one.count:>{digits},} {share} {bar}".rstrip())
    return lines
