"""The verdict rules: a table over all kinds, with their borders, gates, missing values and few seeds."""

from __future__ import annotations

import math

import pytest

from chiasm.errors import ConfigError, UsageError
from chiasm.lab.claim import Claim, Experiment, Gate, Side, split_of
from chiasm.lab.verdict import judge
from lab_toys import ARMS, nothing

# Five differences with mean m and an interval of m ± 0.1 exactly: the t-quantile of 4 degrees is 2.7764451051977987.
UNIT = 0.1 * math.sqrt(5) / 2.7764451051977987 / math.sqrt(2.5)
SPREAD = [-2 * UNIT, -UNIT, 0.0, UNIT, 2 * UNIT]


def claim(kind: str, **more) -> Claim:
    sides = {"exact": ("a:x",), "monotone": ("a:x", "b:x", "c:x")}.get(kind, ("a:x", "b:x"))
    return Claim(**{"id": "it", "statement": "s", "source": "t", "kind": kind, "compare": sides, **more})


def results(**rows: list[float]):
    return {
        seed: {arm: {"x": values[seed]} for arm, values in rows.items()} for seed in range(len(rows["a"]))
    }


def differing(mean: float):
    return results(a=[1.0] * 5, b=[1.0 + mean + s for s in SPREAD])


@pytest.mark.parametrize(
    ("kind", "limit", "mean", "verdict"),
    [
        ("superior", 0.2, 0.25, "holds"),
        ("superior", 0.2, 0.201, "holds"),
        ("superior", 0.2, 0.199, "inconclusive"),  # above 0, not yet by so much
        ("superior", 0.05, 0.09, "inconclusive"),  # large enough, but 0 is within
        ("superior", 0.05, 0.101, "holds"),
        ("superior", 0.2, 0.101, "inconclusive"),
        ("superior", 0.2, 0.099, "does not hold"),  # surely smaller than what counts
        ("superior", 0.3, 0.15, "does not hold"),  # better, but surely by less than what counts
        ("superior", 0.2, -0.5, "does not hold"),
        ("noninferior", 0.15, -0.049, "holds"),
        ("noninferior", 0.15, -0.051, "inconclusive"),
        ("noninferior", 0.15, -0.249, "inconclusive"),
        ("noninferior", 0.15, -0.251, "does not hold"),
        ("noninferior", 0.15, 0.9, "holds"),
        ("equivalent", 0.15, 0.0, "holds"),
        ("equivalent", 0.15, 0.049, "holds"),
        ("equivalent", 0.15, 0.051, "inconclusive"),
        ("equivalent", 0.15, -0.051, "inconclusive"),
        ("equivalent", 0.15, 0.251, "does not hold"),
        ("equivalent", 0.15, -0.251, "does not hold"),
        ("equivalent", 0.09, 0.0, "inconclusive"),  # too few data to call them equal
    ],
)
def test_two_sided_kinds(kind: str, limit: float, mean: float, verdict: str) -> None:
    name = "delta" if kind == "superior" else "margin"
    found = judge(claim(kind, **{name: limit}), differing(mean))
    assert found.verdict == verdict, found.reason
    assert found.estimate is not None
    assert found.estimate.mean == pytest.approx(mean)
    assert found.estimate.high - found.estimate.low == pytest.approx(0.2)
    # The same with a metric of which less is better.
    turned = {s: {arm: {"x": -m["x"]} for arm, m in arms.items()} for s, arms in differing(mean).items()}
    assert judge(claim(kind, **{name: limit}, better="lower"), turned).verdict == verdict


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (1.7, "holds"),
        (1.501, "holds"),
        (1.499, "inconclusive"),
        (1.36, "inconclusive"),
        (1.34, "does not hold"),
    ],
)
def test_ratio(ratio: float, verdict: str) -> None:
    rows = results(a=[2.0] * 5, b=[2 * ratio * math.exp(s) for s in SPREAD])  # interval: factor e^±0.1
    found = judge(claim("ratio", delta=1.5), rows)
    assert found.verdict == verdict, found.reason
    assert found.estimate is not None
    assert found.estimate.mean == pytest.approx(ratio)
    turned = {s: {"a": arms["b"], "b": arms["a"]} for s, arms in rows.items()}  # seconds: less is better
    assert judge(claim("ratio", delta=1.5, better="lower"), turned).verdict == verdict
    assert judge(claim("ratio", delta=1.5), results(a=[1.0, 0.0, 1.0], b=[2.0] * 3)).verdict == "invalid"


@pytest.mark.parametrize(
    ("a", "b", "c", "verdict", "word"),
    [
        ([0.1, 0.2, 0.1], [0.3, 0.4, 0.3], [0.6, 0.7, 0.6], "holds", "3 of 3"),
        # Two of three in order are not more than chance (1 in 6) explains.
        ([0.1, 0.2, 0.1], [0.3, 0.4, 0.09], [0.6, 0.7, 0.6], "inconclusive", "2 of 3"),
        # Three of five are.
        ([0.1] * 5, [0.3, 0.3, 0.3, 0.05, 0.05], [0.6] * 5, "holds", "3 of 5"),
        # In order on average is asked for beside that.
        ([0.1] * 5, [0.2, 0.2, 0.2, -0.2, -0.2], [0.6] * 5, "inconclusive", "not in order"),
        # Ties are no order.
        ([0.1] * 5, [0.1] * 5, [0.6] * 5, "inconclusive", "0 of 5"),
        # The ends differ by less than what counts.
        ([0.1, 0.2, 0.1], [0.11, 0.21, 0.11], [0.12, 0.22, 0.12], "does not hold", "ends below"),
        # A step that surely goes the other way.
        ([0.1, 0.2, 0.1], [0.9, 1.0, 0.9], [0.5, 0.6, 0.5], "does not hold", "other way"),
        ([0.6, 0.7, 0.6], [0.3, 0.4, 0.3], [0.1, 0.2, 0.1], "does not hold", "0 of 3"),
    ],
)
def test_monotone(a, b, c, verdict: str, word: str) -> None:
    found = judge(claim("monotone", delta=0.1), results(a=a, b=b, c=c))
    assert (found.verdict, word in found.reason) == (verdict, True), found.reason


def test_exact() -> None:
    assert judge(claim("exact", margin=1e-5), results(a=[1e-6, -9e-6])).verdict == "holds"
    assert judge(claim("exact", margin=1e-5), results(a=[1e-6, -2e-5])).verdict == "does not hold"
    assert judge(claim("exact", margin=0.0), results(a=[0.0])).verdict == "holds"


@pytest.mark.parametrize("kind", ["superior", "ratio", "noninferior", "equivalent", "monotone"])
def test_two_seeds_decide_nothing(kind: str) -> None:
    limit = {"margin": 0.1} if kind in ("noninferior", "equivalent") else {"delta": 1.1}
    rows = results(a=[1.0, 1.0], b=[5.0, 5.0], c=[9.0, 9.0])
    found = judge(claim(kind, **limit), rows)
    assert (found.verdict, "needs 3" in found.reason) == ("inconclusive", True)


def test_a_gate_comes_before_the_verdict() -> None:
    gated = claim(
        "superior", delta=0.2, gates=(Gate(side="a:x", at_least=1.0), Gate(side="b:x", at_most=2.0))
    )
    assert judge(gated, differing(0.5)).verdict == "holds"  # the borders belong to it
    assert judge(gated, differing(1.1)).verdict == "invalid"
    weak = claim("superior", delta=0.2, gates=(Gate(side="a:x", at_least=1.01),))
    found = judge(weak, differing(0.5))
    assert found.verdict == "invalid"
    assert found.estimate is None
    assert "a:x >= 1.01, found 1" in found.reason
    # Of exact claims too: a control that shows no leak makes the test blind.
    blind = claim("exact", margin=1.0, gates=(Gate(side="b:x", at_least=0.5),))
    assert judge(blind, results(a=[0.0], b=[0.1])).verdict == "invalid"


def test_missing_and_broken_values_are_invalid() -> None:
    it = claim("superior", delta=0.1)
    assert judge(it, {}).verdict == "invalid"
    assert judge(it, {0: {"a": {"x": 1.0}}}).verdict == "invalid"
    assert judge(it, {0: {"a": {"x": 1.0}, "b": {"y": 1.0}}}).verdict == "invalid"
    rows = differing(0.5)
    rows[3]["b"]["x"] = math.nan
    found = judge(it, rows)
    assert (found.verdict, "b:x" in found.reason) == ("invalid", True)
    del rows[3]["b"]
    assert judge(it, rows).seeds == (0, 1, 2, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "better", "delta": 0.1},
        {"kind": "superior"},
        {"kind": "superior", "delta": 0.1, "margin": 0.1},
        {"kind": "superior", "delta": 0.0},
        {"kind": "superior", "delta": 0.1, "compare": ("a:x",)},
        {"kind": "superior", "delta": 0.1, "compare": ("a:x", "b")},
        {"kind": "ratio", "delta": 1.0},
        {"kind": "equivalent", "delta": 0.1},
        {"kind": "monotone", "delta": 0.1, "compare": ("a:x", "b:x")},
        {"kind": "exact", "margin": -1.0},
        {"kind": "exact", "margin": 1.0, "better": "lower"},
        {"kind": "exact", "margin": 1.0, "id": "No Good"},
    ],
)
def test_claims_that_say_nothing_are_refused(wrong) -> None:
    with pytest.raises(ConfigError):
        claim(**wrong)


def experiment(**more) -> Experiment:
    settings = {
        "id": "e", "about": "b", "run": nothing, "arms": ARMS, "budgets": {"mini": {"steps": 3}, "ci": {"steps": 1}},
        "claims": (claim("superior", delta=0.1, gates=(Gate(side="a:x", at_least=0.5),)),),
    }  # fmt: skip
    return Experiment(**{**settings, **more})


def test_the_fingerprint_covers_what_a_verdict_depends_on() -> None:
    base = experiment()
    assert len(base.fingerprint("mini")) == 12
    assert base.fingerprint("mini") == experiment().fingerprint("mini")
    changes = [
        {"claims": (claim("superior", delta=0.11, gates=(Gate(side="a:x", at_least=0.5),)),)},
        {"claims": (claim("superior", delta=0.1, gates=(Gate(side="a:x", at_least=0.4),)),)},
        {"claims": (claim("superior", delta=0.1, gates=(), compare=("b:x", "a:x")),)},
        {"arms": ARMS[:2]},
        {"seeds": 4},
        {"version": 2},
        {"budgets": {"mini": {"steps": 4}, "ci": {"steps": 1}}},
    ]
    prints = {experiment(**change).fingerprint("mini") for change in changes}
    assert len(prints | {base.fingerprint("mini"), base.fingerprint("ci")}) == len(changes) + 2
    # The budget of one scale does not concern the other; sources and code may be reworded.
    other = experiment(budgets={"mini": {"steps": 3}, "ci": {"steps": 9}}, about="other words")
    assert other.fingerprint("mini") == base.fingerprint("mini")


def test_experiments_check_themselves() -> None:
    for wrong in (
        {"arms": ()},
        {"arms": (ARMS[0], ARMS[0])},
        {"claims": (claim("superior", delta=0.1, compare=("a:x", "z:x")),)},
        {"budgets": {"huge": {}}},
        {"seeds": 6},
    ):
        with pytest.raises(ConfigError):
            experiment(**wrong)
    with pytest.raises(ConfigError):
        Gate(side="a:x")
    assert str(Gate(side="a:x", at_least=0.5, at_most=0.9)) == "a:x >= 0.5 and <= 0.9"
    assert str(Side.parse("a:x/y")) == "a:x/y"


def test_seeds_know_their_split() -> None:
    assert [split_of(s) for s in (0, 4, 100, 7001)] == ["test", "test", "dev", "dev"]
    for seed in (-1, 5, 99):
        with pytest.raises(UsageError, match="neither"):
            split_of(seed)
    assert experiment().trial("b", 3, "mini").split == "test"
    with pytest.raises(UsageError, match="no scale gpu"):
        experiment().trial("b", 3, "gpu")
