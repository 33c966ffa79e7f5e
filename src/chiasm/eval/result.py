"""A benchmark result: scores with standard errors, every graded question, and the manifest; and comparing two of them.

What: ``Result``, ``compare_results``, ``Difference``. Two results are compared question by question; what their
manifests do not share, beyond what is compared on purpose, is refused by name.

Shape legend: N questions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from chiasm.errors import DataError
from chiasm.eval.intervals import Interval, cluster_draws, clustered_mean
from chiasm.eval.manifest import Manifest, first_difference
from chiasm.eval.store import write_atomic
from chiasm.eval.summary import STATISTICS, Estimate, Row

__all__ = ["Difference", "Result", "compare_results"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was measured.

    Attributes:
        manifest: what it depends on.
        statistic: how rows become scores (`chiasm.eval.summary`).
        unit: "%" (a share, shown times 100) or "points".
        scores: name -> estimate, headline first.
        rows: every graded question.
        unparsed: replies from which nothing could be parsed; they are scored as wrong.
        with_chance: the headline if each unparsed reply were guessed, in expectation; None where nobody would guess.
        cut: replies that reached the limit of tokens.
        tokens: {"prompt", "completion"} in all.
        extra: further numbers without an error (BLEU of the corpus, vote curves).
        record: CPU seconds, date.
    """

    manifest: Manifest
    statistic: str
    unit: str = "%"
    scores: Mapping[str, Estimate]
    rows: Sequence[Row]
    unparsed: int = 0
    with_chance: float | None = None
    cut: int = 0
    tokens: Mapping[str, int] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def headline(self) -> Estimate:
        """The first score."""
        return next(iter(self.scores.values()))

    @property
    def pictures(self) -> int:
        """Number of clusters."""
        return len({row.group for row in self.rows})

    def to_dict(self, *, rows: bool = True) -> dict[str, Any]:
        """Plain data; without rows for a summary."""
        whole = {
            "bench": self.manifest.bench,
            "score": self.headline.to_dict() | {"name": next(iter(self.scores)), "unit": self.unit},
            "scores": {name: estimate.to_dict() for name, estimate in self.scores.items()},
            "statistic": self.statistic,
            "unit": self.unit,
            "n": len(self.rows),
            "pictures": self.pictures,
            "unparsed": self.unparsed,
            "with_chance": self.with_chance,
            "cut": self.cut,
            "tokens": dict(self.tokens),
            "extra": dict(self.extra),
            "manifest": self.manifest.to_dict(),
            "record": dict(self.record),
        }
        return whole | ({"rows": [row.to_dict() for row in self.rows]} if rows else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "result") -> Result:
        """Read what `to_dict` wrote with rows.

        Raises:
            DataError: it is something else.
        """
        try:
            scores = {
                name: Estimate(
                    value=e["value"],
                    error=e["error"],
                    interval=None if e["interval"] is None else (e["interval"][0], e["interval"][1]),
                    n=e["n"],
                )
                for name, e in data["scores"].items()
            }
            rows = [Row(**row) for row in data["rows"]]
            plain = {k: data[k] for k in ("statistic", "unit", "unparsed", "with_chance", "cut")}
            rest = {k: data.get(k, {}) for k in ("tokens", "extra", "record")}
            manifest = Manifest.from_dict(data["manifest"], where=f"{where}: manifest")
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(
                f"{where} is no result of chiasm eval --bench ({type(error).__name__}: {error})"
            ) from error
        if not scores or not rows:
            raise DataError(f"{where} holds no scores: evaluate again")
        return cls(manifest=manifest, scores=scores, rows=rows, **plain, **rest)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, atomically."""
        write_atomic(Path(path), json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read a file of `save`; DataError when it cannot be."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as a result ({error})") from error
        if not isinstance(data, dict):
            raise DataError(f"{path}: a result is a JSON object, not a {type(data).__name__}")
        return cls.from_dict(data, where=str(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One result minus another on the same questions.

    Attributes:
        value, error, interval: of the headline's difference; clusters are pictures.
        p_value: two-sided: of the normal test for means, of the bootstrap otherwise.
        n, pictures: how many questions and pictures both have.
        notes: recorded differences that do not forbid comparing (versions of packages).
    """

    value: float
    error: float | None
    interval: Interval | None
    p_value: float | None
    n: int
    pictures: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"interval": None if self.interval is None else list(self.interval)}


def compare_results(
    ours: Result, theirs: Result, *, vary: Collection[str] = ("model",), resamples: int = 2000, seed: int = 0
) -> Difference:
    """Compare two results question by question.

    Args:
        ours: is compared.
        theirs: with this.
        vary: what is compared on purpose: fields of the manifest, "model" by default.
        resamples: draws of the bootstrap, for statistics that are no means.
        seed: of the draws.

    Raises:
        DataError: their manifests differ in something that matters and is not in `vary`, named in the message; or they
            do not hold the same questions.
    """
    found = first_difference(ours.manifest, theirs.manifest, vary=vary)
    if found:
        raise DataError(
            f"the results cannot be compared: {found}; evaluate both alike, or compare that on purpose (vary)"
        )
    if [row.key for row in ours.rows] != [
        row.key for row in theirs.rows
    ] or ours.statistic != theirs.statistic:
        raise DataError(
            "the results cannot be compared: they do not hold the same questions in the same order"
        )
    groups = [row.group for row in ours.rows]
    pictures = len(set(groups))
    interval: Interval | None = None
    error: float | None = None
    p_value: float | None = None
    if ours.statistic == "mean":
        pairs = zip(ours.rows, theirs.rows, strict=True)
        value, error, _ = clustered_mean([a.grade - b.grade for a, b in pairs], groups)
        if error is not None:
            interval = (value - 1.96 * error, value + 1.96 * error)
            p_value = 2 * NormalDist().cdf(-abs(value) / error) if error else float(value == 0)
    else:
        left, right = STATISTICS[ours.statistic](ours.rows), STATISTICS[ours.statistic](theirs.rows)

        def headline(weights: np.ndarray) -> float:
            return next(iter(left(weights).values())) - next(iter(right(weights).values()))

        value = headline(np.ones(len(groups)))
        if pictures > 1:
            drawn = np.array([headline(w) for w in cluster_draws(groups, resamples=resamples, seed=seed)])
            low, high = np.quantile(drawn, (0.025, 0.975))
            error, interval = float(drawn.std(ddof=1)), (float(low), float(high))
            # The share of draws on the other side of 0, both ways; at least one draw's worth.
            tail = min(float((drawn <= 0).mean()), float((drawn >= 0).mean()))
            p_value = min(1.0, max(2 * tail, 2 / resamples))
    versions = dict(ours.manifest.versions), dict(theirs.manifest.versions)
    notes = tuple(
        f"{name}: {versions[0].get(name)} and {versions[1].get(name)}"
        for name in dict.fromkeys((*versions[0], *versions[1]))
        if versions[0].get(name) != versions[1].get(name)
    )
    if not math.isfinite(value):
        raise DataError("the results cannot be compared: a score is not a number")
    return Difference(
        value=float(value),
        error=error,
        interval=interval,
        p_value=p_value,
        n=len(groups),
        pictures=pictures,
        notes=notes,
    )
