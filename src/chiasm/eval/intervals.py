"""Intervals and paired comparisons of scores, on a few hundred to a few thousand items.

What: Wilson's interval of a proportion, the percentile bootstrap of a paired difference and of a mean, the exact
McNemar test; and, where several questions share a picture, standard errors and a bootstrap over pictures.
Sources: Wilson 1927; McNemar 1947; Efron 1979; Liang & Zeger 1986 (clusters). Everything is seeded and a function of
its arguments.

Shape legend: N items, G clusters (pictures), R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import NormalDist

import numpy as np

from chiasm.errors import DataError

__all__ = [
    "RESAMPLES",
    "Interval",
    "bootstrap_mean",
    "cluster_bootstrap",
    "cluster_draws",
    "clustered_mean",
    "mcnemar",
    "paired_difference",
    "share_interval",
    "wilson",
]

Interval = tuple[float, float]
"""(low, high)."""

RESAMPLES = 10_000


def wilson(correct: int, n: int, level: float = 0.95) -> Interval:
    """Return Wilson's score interval of the proportion ``correct / n``.

    It stays inside [0, 1] and keeps its coverage near 0 and 1, where the textbook interval collapses.

    Raises:
        DataError: no items, or more correct than there are.
    """
    if n < 1 or not 0 <= correct <= n:
        raise DataError(f"no interval for {correct} correct of {n}: score at least one item")
    return _wilson(correct / n, n, level)


def _wilson(share: float, n: float, level: float) -> Interval:
    z = _z(level)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the exact bound is 0 or 1; rounding must not move it.
    low = 0.0 if share == 0 else max(0.0, middle - half)
    high = 1.0 if share == 1 else min(1.0, middle + half)
    return low, high


def paired_difference(
    ours_N: Sequence[bool] | np.ndarray,
    theirs_N: Sequence[bool] | np.ndarray,
    level: float = 0.95,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return (difference of accuracies, low, high) of two answerers on the same items, by resampling items.

    An item's difference is -1, 0 or 1, so a resample of N items is one multinomial draw of how often each occurs:
    the same distribution as drawing items one by one, in no time.

    Raises:
        DataError: no items, or the two do not have the same items.
    """
    ours, theirs = _pair(ours_N, theirs_N)
    n = len(ours)
    wins, losses = int((ours & ~theirs).sum()), int((~ours & theirs).sum())
    rng = np.random.Generator(np.random.PCG64(seed))
    draws = rng.multinomial(n, [wins / n, losses / n, 1 - (wins + losses) / n], size=resamples)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, _tails(level))
    return (wins - losses) / n, float(low), float(high)


def bootstrap_mean(
    values_N: Sequence[float] | np.ndarray,
    level: float = 0.95,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return (mean, low, high) by resampling the values.

    Raises:
        DataError: fewer than two values.
    """
    values = np.asarray(values_N, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise DataError(f"no interval for values of shape {values.shape}: give at least two")
    rng = np.random.Generator(np.random.PCG64(seed))
    # Resamples in blocks, so that memory does not grow with R times N.
    means = [
        values[rng.integers(len(values), size=(min(1000, resamples - start), len(values)))].mean(1)
        for start in range(0, resamples, 1000)
    ]
    low, high = np.quantile(np.concatenate(means), _tails(level))
    return float(values.mean()), float(low), float(high)


def mcnemar(ours_N: Sequence[bool] | np.ndarray, theirs_N: Sequence[bool] | np.ndarray) -> float:
    """Return the exact two-sided p-value that both answer equally well.

    Only items that exactly one of them answers correctly count; under the hypothesis each side wins half of them.

    Raises:
        DataError: no items, or the two do not have the same items.
    """
    ours, theirs = _pair(ours_N, theirs_N)
    wins, losses = int((ours & ~theirs).sum()), int((~ours & theirs).sum())
    n = wins + losses
    # Integers of any length: exact, where a product of small floats would underflow.
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, float(2 * tail / 2**n)) if n else 1.0


def clustered_mean(
    values_N: Sequence[float] | np.ndarray, groups_N: Sequence[Hashable]
) -> tuple[float, float | None, int]:
    """Return (mean, its standard error, number of clusters) when items of a cluster are not independent.

    se² = G / (G - 1) * sum over clusters of (sum of its deviations from the mean)² / N²; with clusters of one item each
    that is the textbook error. None with a single cluster, which says nothing about others.

    Raises:
        DataError: no items, or not a group for each.
    """
    values = np.asarray(values_N, np.float64)
    if values.ndim != 1 or not len(values) or len(values) != len(groups_N):
        raise DataError(
            f"cannot average values of shape {values.shape} in {len(groups_N)} groups: one group an item"
        )
    mean = float(values.mean())
    index_N, count = _index(groups_N)
    if count < 2:
        return mean, None, count
    sums_G = np.bincount(index_N, weights=values - mean, minlength=count)
    return mean, float(math.sqrt(count / (count - 1) * (sums_G**2).sum()) / len(values)), count


def share_interval(share: float, error: float | None, clusters: int, level: float = 0.95) -> Interval:
    """Return the interval of a share whose standard error is known: Wilson's, with share (1 - share) / error² items.

    That many independent items would have this error. Where the error is 0 or unknown (all right, all wrong, one
    cluster) every cluster counts as one item.
    """
    n = share * (1 - share) / error**2 if error else float(clusters)
    return _wilson(min(1.0, max(0.0, share)), max(n, 1e-9), level)


def cluster_draws(groups_N: Sequence[Hashable], *, resamples: int = 1000, seed: int = 0) -> list[np.ndarray]:
    """Return R arrays (N,): how often each item stands in a resample that draws whole clusters with replacement."""
    index_N, count = _index(groups_N)
    rng = np.random.Generator(np.random.PCG64(seed))
    return [
        rng.multinomial(count, np.full(count, 1 / count))[index_N].astype(np.float64)
        for _ in range(resamples)
    ]


def cluster_bootstrap(
    statistic: Callable[[np.ndarray], Mapping[str, float]],
    groups_N: Sequence[Hashable],
    level: float = 0.95,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float, float]]:
    """Return name -> (standard error, low, high) of a statistic that takes a weight for each item.

    Args:
        statistic: weights (N,) -> values by name, the same names for all weights.
        groups_N: the cluster of each item.
        level: of the percentile interval.
        resamples: number of draws.
        seed: of the draws.

    Raises:
        DataError: fewer than two clusters.
    """
    if len(set(groups_N)) < 2:
        raise DataError("no interval from one picture: score questions about at least two")
    values = [statistic(weights) for weights in cluster_draws(groups_N, resamples=resamples, seed=seed)]
    out = {}
    for name in values[0]:
        column = np.array([value[name] for value in values])
        low, high = np.quantile(column, _tails(level))
        out[name] = (float(column.std(ddof=1)), float(low), float(high))
    return out


def _index(groups: Sequence[Hashable]) -> tuple[np.ndarray, int]:
    """Clusters as 0 … G - 1, in the order of their first items."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(group, len(known)) for group in groups], np.int64), len(known)


def _pair(
    ours: Sequence[bool] | np.ndarray, theirs: Sequence[bool] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(ours, bool), np.asarray(theirs, bool)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise DataError(
            f"cannot pair scores of shapes {a.shape} and {b.shape}: score the same items in order"
        )
    return a, b


def _z(level: float) -> float:
    return NormalDist().inv_cdf(_tails(level)[1])


def _tails(level: float) -> Interval:
    if not 0 < level < 1:
        raise DataError(f"confidence level {level} is outside (0, 1): give 0.95 for 95 %")
    return (1 - level) / 2, (1 + level) / 2
