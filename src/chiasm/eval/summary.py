"""From graded questions to scores with standard errors: plain means and the statistics that are no means.

What: ``Row``, ``STATISTICS``, ``summarise``. A statistic takes rows and a weight for each; the first name that it
returns is its headline. Means get the analytic clustered error, all others a bootstrap over pictures (1000 draws,
seed 0).

Shape legend: N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from chiasm.errors import DataError
from chiasm.eval.intervals import Interval, cluster_bootstrap, clustered_mean, share_interval
from chiasm.eval.metrics.yesno import f1_of, mme_sums

__all__ = ["STATISTICS", "Estimate", "Row", "summarise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One graded question.

    Attributes:
        key: of the question. group: of its picture; questions of one group are not independent.
        grade: 0 … 1 (captions: the score of the metric).
        category: "" where there are none.
        value: what was parsed, None for an unparsed reply.
        label: the right answer where a statistic needs it ("yes", "no").
        chance: what a guess would get, 0 where nobody would guess.
        units: other groups whose questions belong together, by name ("figure", "question", "circle").
    """

    key: str
    group: str
    grade: float
    category: str = ""
    value: Any = None
    label: str = ""
    chance: float = 0.0
    units: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; empty fields are left out."""
        whole = asdict(self)
        return {k: v for k, v in whole.items() if k in ("key", "group", "grade", "value") or v}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with its standard error (None where it cannot be known) and 95 % interval."""

    value: float
    error: float | None
    interval: Interval | None
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"interval": None if self.interval is None else list(self.interval)}


Statistic = Callable[[Sequence[Row]], Callable[[np.ndarray], dict[str, float]]]
"""Rows -> (weights (N,) -> values by name). What does not depend on weights is computed once for all resamples."""


class _Groups:
    """Questions that must all be right together, vectorised; the slow twin is `all_right`."""

    def __init__(self, grades_N: np.ndarray, names: Sequence[str]) -> None:
        _, self.index_N = np.unique(np.array(names), return_inverse=True)
        self.sizes_G = np.bincount(self.index_N)
        self.right_G = np.bincount(self.index_N, weights=grades_N != 1) == 0

    def share(self, weights_N: np.ndarray) -> float:
        """Weighted share of groups that are all right."""
        weights_G = np.bincount(self.index_N, weights=weights_N) / self.sizes_G
        return _ratio(weights_G[self.right_G].sum(), weights_G.sum())


def _grades(rows: Sequence[Row]) -> np.ndarray:
    return np.array([row.grade for row in rows], np.float64)


def _places(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Where the rows of each category stand."""
    names = np.array([row.category for row in rows])
    return {name: np.flatnonzero(names == name) for name in dict.fromkeys(row.category for row in rows)}


def _by_category(rows: Sequence[Row]) -> Callable[[np.ndarray], dict[str, float]]:
    """Mean of the categories' means (ChartQA: human and augmented); one without drawn rows is left out of it."""
    grades, places = _grades(rows), _places(rows)

    def compute(weights: np.ndarray) -> dict[str, float]:
        parts = {k: _ratio((weights[at] * grades[at]).sum(), weights[at].sum()) for k, at in places.items()}
        drawn = [parts[name] for name, at in places.items() if weights[at].sum()]
        head = {"mean of categories": float(np.mean(drawn)) if drawn else 0.0}
        return head | (parts if len(parts) > 1 else {})

    return compute


def _f1(rows: Sequence[Row]) -> Callable[[np.ndarray], dict[str, float]]:
    """POPE: the mean over categories of F1, and the other ratios over all questions."""
    positive = np.array([row.label == "yes" for row in rows], bool)
    yes = np.array([row.value == "yes" for row in rows], bool)
    said = np.where(np.array([row.value is not None for row in rows], bool), yes, ~positive)
    # VLMEvalKit's table asks a question once and lists the categories it belongs to.
    kinds = [row.category.split(",") for row in rows]
    names = dict.fromkeys(name for kind in kinds for name in kind)
    places = {name: np.flatnonzero([name in kind for kind in kinds]) for name in names}

    def compute(weights: np.ndarray) -> dict[str, float]:
        parts = {f"f1 {k}": f1_of(said[at], positive[at], weights[at])["f1"] for k, at in places.items()}
        whole = f1_of(said, positive, weights) | {"yes_ratio": _ratio(weights[yes].sum(), weights.sum())}
        head = {"f1": float(np.mean(list(parts.values())))}
        return head | {k: v for k, v in whole.items() if k != "f1"} | (parts if len(parts) > 1 else {})

    return compute


def _mme(rows: Sequence[Row]) -> Callable[[np.ndarray], dict[str, float]]:
    """MME's points; the slow twin is `mme_scores`."""
    grades, places = _grades(rows), _places(rows)
    pictures = {name: _Groups(grades[at], [rows[n].group for n in at]) for name, at in places.items()}

    def compute(weights: np.ndarray) -> dict[str, float]:
        parts = {}
        for name, at in places.items():
            accuracy = _ratio((weights[at] * (grades[at] == 1)).sum(), weights[at].sum())
            parts[name] = 100 * accuracy + 100 * pictures[name].share(weights[at])
        return mme_sums(parts) | parts

    return compute


def _hallusion(rows: Sequence[Row]) -> Callable[[np.ndarray], dict[str, float]]:
    """Mean of accuracy by answer (aAcc), figure (fAcc) and question (qAcc), and the three."""
    grades = _grades(rows)
    units = [("fAcc", "figure"), ("qAcc", "question")]
    groups = {name: _Groups(grades, [row.units.get(unit, row.key) for row in rows]) for name, unit in units}

    def compute(weights: np.ndarray) -> dict[str, float]:
        three = {"aAcc": _ratio((weights * grades).sum(), weights.sum())}
        three |= {name: group.share(weights) for name, group in groups.items()}
        return {"mean": float(np.mean(list(three.values())))} | three

    return compute


def _circular(rows: Sequence[Row]) -> Callable[[np.ndarray], dict[str, float]]:
    """MMBench: a question counts when all rotations of its options are answered right; and the plain mean."""
    grades = _grades(rows)
    circles = _Groups(grades, [row.units.get("circle", row.key) for row in rows])

    def compute(weights: np.ndarray) -> dict[str, float]:
        return {
            "circular": circles.share(weights),
            "vanilla": _ratio((weights * grades).sum(), weights.sum()),
        }

    return compute


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


#: Statistics that are no mean of grades, by name; "mean" is built in.
STATISTICS: dict[str, Statistic] = {
    "by_category": _by_category,
    "f1": _f1,
    "mme": _mme,
    "hallusion": _hallusion,
    "circular": _circular,
}


def summarise(rows: Sequence[Row], statistic: str = "mean", *, resamples: int = 1000) -> dict[str, Estimate]:
    """Return name -> estimate, headline first.

    For "mean": "accuracy" (any graded mean) and then each category with its own mean, if there are several.

    Raises:
        DataError: no rows, or an unknown statistic.
    """
    if not rows:
        raise DataError("nothing to score: no question was answered")
    groups = [row.group for row in rows]
    if statistic == "mean":
        out = {"accuracy": _mean(rows)}
        kinds = list(dict.fromkeys(row.category for row in rows))
        if len(kinds) > 1:
            out |= {name or "(none)": _mean([r for r in rows if r.category == name]) for name in kinds}
        return out
    if statistic not in STATISTICS:
        raise DataError(f"statistic {statistic!r} is unknown: use mean, {', '.join(STATISTICS)}")
    compute = STATISTICS[statistic](rows)
    values = compute(np.ones(len(rows)))
    spread: dict[str, tuple[float, float, float]] = {}
    if len(set(groups)) > 1:
        spread = cluster_bootstrap(compute, groups, resamples=resamples)
    return {
        name: Estimate(
            value=value,
            error=spread[name][0] if name in spread else None,
            interval=spread[name][1:] if name in spread else None,
            n=len(rows),
        )
        for name, value in values.items()
    }


def _mean(rows: Sequence[Row]) -> Estimate:
    grades = [row.grade for row in rows]
    mean, error, clusters = clustered_mean(grades, [row.group for row in rows])
    if min(grades) >= 0 and max(grades) <= 1:
        interval = share_interval(mean, error, clusters)
    else:
        interval = None if error is None else (mean - 1.96 * error, mean + 1.96 * error)
    return Estimate(value=mean, error=error, interval=interval, n=len(rows))
