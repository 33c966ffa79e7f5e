"""Statistics of verdicts against SciPy, printed tables, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from chiasm.errors import DataError
from chiasm.lab.statistics import (
    Estimate,
    binomial_tail,
    paired_difference,
    paired_ratio,
    student_cdf,
    student_quantile,
    t_interval,
)

# Two-sided 95 % points as any textbook prints them.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize(("df", "value"), TABLE.items())
def test_quantiles_are_those_of_the_table(df: int, value: float) -> None:
    assert student_quantile(0.975, df) == pytest.approx(value, abs=5e-4)
    assert student_quantile(0.025, df) == pytest.approx(-student_quantile(0.975, df), rel=1e-12)


def test_distribution_and_quantile_equal_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 2, 3, 4, 7, 29, 100, 1000, 2.5):
        for p in (1e-6, 0.025, 0.2, 0.5, 0.6, 0.95, 0.975, 0.9995):
            assert student_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-10, abs=1e-12)
        for t in (-50.0, -3.0, -0.1, 0.0, 0.7, 2.0, 40.0):
            assert student_cdf(t, df) == pytest.approx(stats.t.cdf(t, df), rel=1e-10, abs=1e-15)
    assert student_cdf(math.inf, 3) == 1.0
    assert student_cdf(-math.inf, 3) == 0.0


def test_intervals_equal_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    for n in (2, 3, 5, 12):
        a, b = random.normal(1, 2, n), random.normal(0, 2, n)
        low, high = stats.t.interval(0.95, n - 1, (a - b).mean(), stats.sem(a - b))
        found = paired_difference(a.tolist(), b.tolist())
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
        a, b = np.exp(a), np.exp(b)
        ratio = paired_ratio(a.tolist(), b.tolist())
        logs = np.log(a / b)
        low, high = stats.t.interval(0.95, n - 1, logs.mean(), stats.sem(logs))
        assert (ratio.mean, ratio.low, ratio.high) == pytest.approx(
            tuple(np.exp([logs.mean(), low, high])), rel=1e-9
        )
    for n, k, p in ((5, 5, 0.5), (5, 3, 1 / 6), (10, 0, 0.3), (4, 5, 0.5)):
        assert binomial_tail(k, n, p) == pytest.approx(stats.binom.sf(k - 1, n, p), abs=1e-12)


def test_the_interval_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    intervals = [t_interval(random.normal(3.0, 1.0, 4).tolist()) for _ in range(2000)]
    covered = sum(e.low <= 3.0 <= e.high for e in intervals) / 2000
    assert 0.935 < covered < 0.965


def test_few_and_equal_values() -> None:
    assert t_interval([2.0]) == Estimate(2.0, -math.inf, math.inf, 1)
    assert t_interval([0.25] * 4) == Estimate(0.25, 0.25, 0.25, 4)
    one = paired_ratio([3.0], [2.0])
    assert (one.mean, one.low, one.high) == (pytest.approx(1.5), 0.0, math.inf)


@pytest.mark.parametrize(
    "call",
    [
        lambda: t_interval([]),
        lambda: t_interval([1.0, math.nan]),
        lambda: student_quantile(1.0, 3),
        lambda: student_quantile(0.5, 0),
        lambda: paired_difference([1.0], [1.0, 2.0]),
        lambda: paired_ratio([1.0], [0.0]),
    ],
)
def test_what_has_no_answer_is_refused(call) -> None:
    with pytest.raises(DataError):
        call()
