import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import DataError
from chiasm.eval.intervals import bootstrap_mean, mcnemar, paired_difference, wilson


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (3, 10), (81, 263), (500, 1000), (1, 2000)])
def test_wilson_equals_scipy(correct, n):
    from scipy.stats import binomtest

    expected = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    assert wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_golden():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20 by the score method.
    assert [round(v, 4) for v in wilson(81, 263)] == [0.2553, 0.3662]
    assert [round(v, 4) for v in wilson(0, 20)] == [0.0, 0.1611]


@settings(max_examples=30)
@given(n=st.integers(1, 3000), data=st.data())
def test_wilson_holds_the_share_and_narrows_with_the_level(n, data):
    correct = data.draw(st.integers(0, n))
    low, high = wilson(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    inner = wilson(correct, n, level=0.5)
    assert low <= inner[0] <= inner[1] <= high


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 5), (12, 3), (400, 200)])
def test_mcnemar_equals_the_binomial_test(wins, losses):
    from scipy.stats import binomtest

    ours = [True] * wins + [False] * losses + [True] * 7 + [False] * 2
    theirs = [False] * wins + [True] * losses + [True] * 7 + [False] * 2
    expected = binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0
    assert mcnemar(ours, theirs) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_many_items_does_not_overflow():
    ours, theirs = np.ones(5000, bool), np.zeros(5000, bool)
    assert mcnemar(ours, theirs) == 0.0


def test_paired_difference_equals_resampling_item_by_item():
    rng = np.random.default_rng(1)
    ours = rng.random(200) < 0.7
    theirs = rng.random(200) < 0.55
    difference, low, high = paired_difference(ours, theirs)
    assert difference == pytest.approx(ours.mean() - theirs.mean())
    change = ours.astype(int) - theirs.astype(int)
    slow = np.quantile([change[rng.integers(200, size=200)].mean() for _ in range(10_000)], (0.025, 0.975))
    assert (low, high) == pytest.approx(tuple(slow), abs=0.008)
    assert paired_difference(ours, theirs) == (difference, low, high)


def test_paired_difference_of_equal_answers_is_zero():
    assert paired_difference([True, False], [True, False]) == (0.0, 0.0, 0.0)


def test_bootstrap_mean_is_near_the_normal_interval():
    values = np.random.default_rng(2).normal(3.0, 0.5, 60)
    mean, low, high = bootstrap_mean(values)
    half = 1.96 * values.std(ddof=1) / 60**0.5
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.02)


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson(1, 0),
        lambda: wilson(3, 2),
        lambda: wilson(1, 2, level=1.0),
        lambda: paired_difference([True], [True, False]),
        lambda: paired_difference([], []),
        lambda: mcnemar([True], []),
        lambda: bootstrap_mean([1.0]),
    ],
)
def test_impossible_inputs_are_named(call):
    with pytest.raises(DataError):
        call()
