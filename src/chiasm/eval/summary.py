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
from chiasm.eval.metrics.yesno import all_right, binary_f1, mme_scores

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


Statistic = Callable[[Sequence[Row], np.ndarray], dict[str, float]]


def _by_category(rows: Sequence[Row], weights: np.ndarray) -> dict[str, float]:
    """Mean of the categories' means (ChartQA: human and augmented); one without drawn rows is left out of it."""
    parts = _parts(rows, weights)
    means = [value for value, weight in parts.values() if weight]
    return {"mean of categories": float(np.mean(means)) if means else 0.0} | {
        k: v for k, (v, _) in parts.items()
    }


def _parts(rows: Sequence[Row], weights: np.ndarray) -> dict[str, tuple[float, float]]:
    """(weighted mean, weight) of each category."""
    grades = np.array([row.grade for row in rows])
    names = np.array([row.category for row in rows])
    out = {}
    for name in dict.fromkeys(row.category for row in rows):
        at = names == name
        total = float(weights[at].sum())
        out[name] = (float((weights[at] * grades[at]).sum() / total) if total else 0.0, total)
    return out


def _f1(rows: Sequence[Row], weights: np.ndarray) -> dict[str, float]:
    """POPE: the mean over categories of F1, and the other ratios over all questions."""
    values, labels = [row.value for row in rows], [row.label for row in rows]
    names = np.array([row.category for row in rows])
    kinds = list(dict.fromkeys(row.category for row in rows))
    parts = {}
    for name in kinds:
        at = np.flatnonzero(names == name)
        parts[name] = binary_f1([values[n] for n in at], [labels[n] for n in at], weights[at])["f1"]
    whole = binary_f1(values, labels, weights)
    head = {"f1": float(np.mean(list(parts.values())))} | {k: v for k, v in whole.items() if k != "f1"}
    return head | ({f"f1 {name}": value for name, value in parts.items()} if len(kinds) > 1 else {})


def _mme(rows: Sequence[Row], weights: np.ndarray) -> dict[str, float]:
    return mme_scores([r.grade for r in rows], [r.group for r in rows], [r.category for r in rows], weights)


def _hallusion(rows: Sequence[Row], weights: np.ndarray) -> dict[str, float]:
    """Mean of accuracy by answer (aAcc), figure (fAcc) and question (qAcc), and the three."""
    grades = [row.grade for row in rows]
    three = {"aAcc": float((weights * np.array(grades)).sum() / weights.sum()) if weights.sum() else 0.0}
    for name, unit in (("fAcc", "figure"), ("qAcc", "question")):
        three[name] = all_right(grades, [row.units.get(unit, row.key) for row in rows], weights)
    return {"mean": float(np.mean(list(three.values())))} | three


def _circular(rows: Sequence[Row], weights: np.ndarray) -> dict[str, float]:
    """MMBench: a question counts when all rotations of its options are answered right; and the plain mean."""
    grades = [row.grade for row in rows]
    circles = [row.units.get("circle", row.key) for row in rows]
    plain = float((weights * np.array(grades)).sum() / weights.sum()) if weights.sum() else 0.0
    return {"circular": all_right(grades, circles, weights), "vanilla": plain}


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
    compute = STATISTICS[statistic]
    values = compute(rows, np.ones(len(rows)))
    spread: dict[str, tuple[float, float, float]] = {}
    if len(set(groups)) > 1:
        spread = cluster_bootstrap(lambda weights: compute(rows, weights), groups, resamples=resamples)
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
