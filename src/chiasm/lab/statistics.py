"""The statistics of verdicts: small samples of paired runs, no SciPy.

What: Student's t (distribution and quantile), the t-interval of a mean, of a paired difference and of a paired
ratio, the
binomial tail behind the sign test. Sources: Student 1908; regularised incomplete beta function by Lentz's continued
fraction (Abramowitz & Stegun 26.5.8); every value is compared with SciPy in the tests.

With fewer than ``FEWEST`` seeds no interval decides anything: a variance estimated from two values is no estimate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from chiasm.errors import DataError

__all__ = [
    "FEWEST",
    "LEVEL",
    "Estimate",
    "binomial_tail",
    "paired_difference",
    "paired_ratio",
    "student_cdf",
    "student_quantile",
    "t_interval",
]

LEVEL = 0.95
FEWEST = 3
"""Seeds below which every verdict that rests on an interval is "inconclusive"."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean (of ratios: the geometric one) with its interval; infinite bounds where there is one value only."""

    mean: float
    low: float
    high: float
    n: int


def student_cdf(t: float, df: float) -> float:
    """Return P(T <= t) for Student's t with ``df`` > 0 degrees of freedom."""
    if df <= 0:
        raise DataError(f"Student's t needs degrees of freedom above 0, got {df}: give at least two values")
    if math.isinf(t):
        return 0.0 if t < 0 else 1.0
    # With y near 1 the tail itself is computed, so that it keeps its digits.
    tail = 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + t * t))
    return tail if t < 0 else 1.0 - tail


def student_quantile(p: float, df: float) -> float:
    """Return the t with P(T <= t) = p, by bisection on the tail (accurate to a relative 1e-12).

    Raises:
        DataError: p is outside (0, 1), or there are no degrees of freedom.
    """
    if not 0 < p < 1:
        raise DataError(f"no quantile at p = {p}: give a probability in (0, 1)")
    if p == 0.5:
        student_cdf(0.0, df)  # checks df
        return 0.0
    tail = min(p, 1 - p)
    low, high = 0.0, 1.0
    while student_cdf(-high, df) > tail:
        low, high = high, high * 2
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if student_cdf(-middle, df) > tail else (low, middle)
    found = 0.5 * (low + high)
    return found if p > 0.5 else -found


def t_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Return mean and t-interval of the mean.

    Raises:
        DataError: no values, or one that is not finite.
    """
    n = len(values)
    if not n or not all(math.isfinite(v) for v in values):
        raise DataError(f"no interval of {list(values)}: give finite values")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    half = student_quantile(0.5 + level / 2, n - 1) * math.sqrt(variance / n)
    return Estimate(mean, mean - half, mean + half, n)


def paired_difference(ours: Sequence[float], theirs: Sequence[float], level: float = LEVEL) -> Estimate:
    """Return the t-interval of ours - theirs, seed by seed.

    Raises:
        DataError: they are not of the same seeds in number, or see `t_interval`.
    """
    return t_interval([a - b for a, b in _pairs(ours, theirs)], level)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], level: float = LEVEL) -> Estimate:
    """Return the interval of ours / theirs: the t-interval of the logarithms, turned back.

    Raises:
        DataError: a value is not above 0, or see `paired_difference`.
    """
    pairs = _pairs(ours, theirs)
    if any(a <= 0 or b <= 0 for a, b in pairs):
        raise DataError("a ratio needs values above 0")
    logs = t_interval([math.log(a / b) for a, b in pairs], level)
    high = math.inf if logs.high > 700 else math.exp(logs.high)
    return Estimate(math.exp(logs.mean), math.exp(logs.low), high, logs.n)


def binomial_tail(wins: int, n: int, chance: float) -> float:
    """Return P(X >= wins) of n independent trials that succeed with probability ``chance`` each."""
    return math.fsum(
        math.comb(n, k) * chance**k * (1 - chance) ** (n - k) for k in range(max(wins, 0), n + 1)
    )


def _pairs(ours: Sequence[float], theirs: Sequence[float]) -> list[tuple[float, float]]:
    if len(ours) != len(theirs):
        raise DataError(f"{len(ours)} values cannot be paired with {len(theirs)}: give one of each seed")
    return list(zip(ours, theirs, strict=True))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b)."""
    if x <= 0:
        return 0.0
    if x >= 1:
        return 1.0
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, its mirror image does not
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    return front * _beta_fraction(a, b, x) / a


def _beta_fraction(a: float, b: float, x: float) -> float:
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 10_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + numerator * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + numerator / c
            c = c if abs(c) > tiny else tiny
            value *= d * c
        if abs(d * c - 1.0) < 1e-15:
            return value
    raise DataError(f"the incomplete beta function did not converge at a={a}, b={b}, x={x}")
