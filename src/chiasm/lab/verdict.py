"""The verdict: what the results of a claim's seeds mean. Written by code, by the rules below, never by hand.

Rules (95 % t-intervals of paired differences, seed by seed; d > 0 is the expected side)

- superior(delta): *holds*: interval wholly above 0 and mean >= delta. *does not hold*: interval wholly below delta.
- ratio(delta): the same on the ratio: interval wholly above 1 and geometric mean >= delta; wholly below delta.
- noninferior(margin): *holds*: interval wholly above -margin. *does not hold*: wholly below it.
- equivalent(margin): *holds*: interval within (-margin, margin). *does not hold*: wholly outside of it.
- monotone(delta): sides in the order in which the metric is said to rise. *holds*: the means rise strictly from side to
  side, the difference of the ends holds as in superior(delta), and the seeds whose values rise strictly at every step
  are more than chance explains (sign test: p <= 0.05, chance being 1 / (number of sides)!). *does not hold*:
  the interval
  of the ends lies wholly below delta, or that of some step wholly below 0.
- exact(margin): *holds*: no deviation of any seed is above the margin. *does not hold*: one is.

Everything else is *inconclusive*; so is, exact apart, whatever rests on fewer than three seeds. *invalid* comes before
all: a competence gate is not met, or a value is missing or not a number. An invalid claim is not a settled one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from chiasm.lab.claim import Claim, Side
from chiasm.lab.statistics import FEWEST, Estimate, binomial_tail, paired_difference, paired_ratio

__all__ = ["Judgement", "Results", "Verdict", "judge"]

Verdict = Literal["holds", "does not hold", "inconclusive", "invalid"]
Results = Mapping[int, Mapping[str, Mapping[str, float]]]
"""Seed -> arm -> metric -> value."""
SIGN_LEVEL = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A verdict and what it rests on.

    Attributes:
        verdict, reason: the word, and the clause of the rule that decided.
        seeds: that counted.
        values: side -> its value of every seed.
        effect: difference (or ratio, or deviation) of every seed, the expected side positive; [] when invalid.
        estimate: mean and interval of the effect; None when invalid, and for exact.
        gates: gate -> (mean, met).
        steps: monotone: the estimates of the steps.
        p_value: monotone: of the sign test.
    """

    verdict: Verdict
    reason: str
    seeds: tuple[int, ...] = ()
    values: dict[str, list[float]]
    effect: list[float]
    estimate: Estimate | None = None
    gates: dict[str, tuple[float, bool]]
    steps: tuple[Estimate, ...] = ()
    p_value: float | None = None


def judge(claim: Claim, results: Results) -> Judgement:
    """Return the verdict on a claim from the results of its seeds; seeds that lack an arm do not count."""
    needed = {side.arm for side in claim.all_sides}
    seeds = tuple(seed for seed in sorted(results) if needed <= results[seed].keys())
    values = {str(s): [_value(results[seed], s) for seed in seeds] for s in dict.fromkeys(claim.all_sides)}
    gates = {str(g): (_mean(values[g.side]), g.passes(_mean(values[g.side]))) for g in claim.gates}
    shown: dict[str, Any] = {"seeds": seeds, "values": values, "gates": gates}
    if not seeds:
        return Judgement(verdict="invalid", reason="no seed has results of all arms", effect=[], **shown)
    odd = [side for side, row in values.items() if not all(math.isfinite(v) for v in row)]
    if odd:
        return Judgement(verdict="invalid", reason=f"{odd[0]} is missing or not a number", effect=[], **shown)
    for gate, (mean, met) in gates.items():
        if not met:
            reason = f"competence gate not met: {gate}, found {mean:.4g}"
            return Judgement(verdict="invalid", reason=reason, effect=[], **shown)
    sides = [values[str(side)] for side in claim.sides]
    if claim.kind == "exact":
        return _exact(claim, sides[0], shown)
    if claim.better == "lower":
        sides = [[-v for v in row] for row in sides]
    if claim.kind == "monotone":
        return _monotone(claim, sides, shown)
    return _two_sided(claim, sides[0], sides[1], shown)


def _two_sided(claim: Claim, theirs: list[float], ours: list[float], shown: dict[str, Any]) -> Judgement:
    if claim.kind == "ratio":
        theirs, ours = [abs(v) for v in theirs], [abs(v) for v in ours]
        if claim.better == "lower":
            theirs, ours = ours, theirs
        if min(*theirs, *ours) <= 0:
            return Judgement(verdict="invalid", reason="a ratio needs values above 0", effect=[], **shown)
        estimate = paired_ratio(ours, theirs)
        effect = [a / b for a, b in zip(ours, theirs, strict=True)]
    else:
        estimate = paired_difference(ours, theirs)
        effect = [a - b for a, b in zip(ours, theirs, strict=True)]
    verdict, reason = _rule(claim, estimate)
    return Judgement(verdict=verdict, reason=reason, effect=effect, estimate=estimate, **shown)


def _rule(claim: Claim, e: Estimate) -> tuple[Verdict, str]:
    """The rule of superior, ratio, noninferior and equivalent."""
    if e.n < FEWEST:
        return "inconclusive", f"{e.n} seed(s): an interval needs {FEWEST}"
    if claim.kind in ("superior", "ratio"):
        assert claim.delta is not None
        zero = 1.0 if claim.kind == "ratio" else 0.0
        if e.low > zero and e.mean >= claim.delta:
            return "holds", f"interval above {zero:g} and mean at least {claim.delta:g}"
        if e.high < claim.delta:
            return "does not hold", f"interval below {claim.delta:g}"
        if e.low > zero:
            return "inconclusive", f"interval above {zero:g}, but mean below {claim.delta:g}"
        return "inconclusive", f"interval holds {zero:g} and reaches {claim.delta:g}"
    assert claim.margin is not None
    m = claim.margin
    if claim.kind == "noninferior":
        if e.low > -m:
            return "holds", f"interval above -{m:g}"
        if e.high < -m:
            return "does not hold", f"interval below -{m:g}"
        return "inconclusive", f"interval reaches beyond -{m:g}"
    if -m < e.low and e.high < m:
        return "holds", f"interval within ±{m:g}"
    if e.high < -m or e.low > m:
        return "does not hold", f"interval outside of ±{m:g}"
    return "inconclusive", f"interval reaches beyond ±{m:g}"


def _monotone(claim: Claim, sides: list[list[float]], shown: dict[str, Any]) -> Judgement:
    assert claim.delta is not None
    ends = paired_difference(sides[-1], sides[0])
    pairs = list(pairwise(sides))
    steps = tuple(paired_difference(after, before) for before, after in pairs)
    n = ends.n
    ordered = sum(all(after[i] > before[i] for before, after in pairs) for i in range(n))
    p_value = binomial_tail(ordered, n, 1 / math.factorial(len(sides)))
    effect = [a - b for a, b in zip(sides[-1], sides[0], strict=True)]
    found: dict[str, Any] = {
        "effect": effect, "estimate": ends, "steps": steps, "p_value": p_value, **shown
    }  # fmt: skip
    said = f"{ordered} of {n} seeds wholly in order, sign test p = {p_value:.2g}"
    if n < FEWEST:
        return Judgement(verdict="inconclusive", reason=f"{n} seed(s): an interval needs {FEWEST}", **found)
    if ends.high < claim.delta:
        reason = f"interval of the ends below {claim.delta:g}; {said}"
        return Judgement(verdict="does not hold", reason=reason, **found)
    if any(step.high < 0 for step in steps):
        return Judgement(verdict="does not hold", reason=f"a step goes the other way; {said}", **found)
    rising = all(step.mean > 0 for step in steps)
    if rising and ends.low > 0 and ends.mean >= claim.delta and p_value <= SIGN_LEVEL:
        reason = f"means in order, interval of the ends above 0 and mean at least {claim.delta:g}; {said}"
        return Judgement(verdict="holds", reason=reason, **found)
    lacks = "means not in order" if not rising else "ends or order not certain"
    return Judgement(verdict="inconclusive", reason=f"{lacks}; {said}", **found)


def _exact(claim: Claim, deviations: list[float], shown: dict[str, Any]) -> Judgement:
    assert claim.margin is not None
    worst = max(abs(v) for v in deviations)
    met = worst <= claim.margin
    return Judgement(
        verdict="holds" if met else "does not hold",
        reason=f"largest deviation {worst:.3g}, allowed {claim.margin:g}",
        effect=[abs(v) for v in deviations],
        **shown,
    )


def _value(arms: Mapping[str, Mapping[str, float]], side: Side) -> float:
    return float(arms[side.arm].get(side.metric, math.nan))


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values and all(map(math.isfinite, values)) else math.nan
