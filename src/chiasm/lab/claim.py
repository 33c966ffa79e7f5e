"""The claim: what is said, how it is tested and what would refute it, fixed before the test is run.

What: ``Arm`` (one way of doing something), ``Experiment`` (arms that are run on the same seeds, and the claims that are
judged on their results), ``Claim`` (statement, source, compared sides, kind of verdict, effect size, competence gates).
Source: the house's contract of claims (docs/claims.md); kinds and verdicts are in `chiasm.lab.verdict`.

Pre-registration: ``Experiment.fingerprint`` hashes everything that a verdict depends on: arms, settings of the scale,
seeds, and every claim with its effect size and gates. Results carry it and results of another one are never read, so
whoever moves a threshold after having seen results must run again, and the report says so.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from chiasm.errors import ConfigError, UsageError

__all__ = [
    "CONFIRMATION",
    "FIRST_TUNING",
    "KINDS",
    "SCALES",
    "Arm",
    "Claim",
    "Experiment",
    "Gate",
    "Side",
    "Trial",
    "split_of",
]

Kind = Literal["superior", "noninferior", "equivalent", "ratio", "monotone", "exact"]
KINDS: tuple[str, ...] = ("superior", "noninferior", "equivalent", "ratio", "monotone", "exact")
SCALES = ("ci", "mini", "gpu")
CONFIRMATION = range(5)
"""Seeds of confirmation runs: on the test split, once."""
FIRST_TUNING = 100
"""Seeds from here on are for tuning: on the dev split, never in a report."""
Value = str | int | float | bool


def split_of(seed: int) -> Literal["dev", "test"]:
    """Return the split that a seed may see.

    Raises:
        UsageError: the seed is for neither purpose.
    """
    if seed in CONFIRMATION:
        return "test"
    if seed >= FIRST_TUNING:
        return "dev"
    raise UsageError(
        f"seed {seed} is neither for confirmation (0 to {CONFIRMATION[-1]}, test split) nor for tuning "
        f"({FIRST_TUNING} and above, dev split)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way of doing it: ``settings`` are what tells it from the other arms, ``what`` says so in words."""

    name: str
    what: str
    settings: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name("arm", self.name)


@dataclass(frozen=True, slots=True)
class Side:
    """One number of a result: metric ``metric`` of arm ``arm``. Written ``arm:metric``."""

    arm: str
    metric: str

    @classmethod
    def parse(cls, text: str) -> Side:
        """Read ``arm:metric``."""
        arm, colon, metric = text.partition(":")
        if not (arm and colon and metric):
            raise ConfigError(f"side {text!r} must be written arm:metric")
        return cls(arm, metric)

    def __str__(self) -> str:
        return f"{self.arm}:{self.metric}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A competence gate: the mean of ``side`` over the seeds must lie within the bounds, else the verdict is invalid.

    It keeps comparisons between models that cannot do the task at all, or that all do it perfectly, from counting.
    """

    side: str
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        Side.parse(self.side)
        if self.at_least is None and self.at_most is None:
            raise ConfigError(f"the gate on {self.side} has no bound: give at_least or at_most")

    def passes(self, mean: float) -> bool:
        """Whether the mean of the gate's side is within the bounds; False for NaN."""
        low = self.at_least is None or mean >= self.at_least
        return low and (self.at_most is None or mean <= self.at_most)

    def __str__(self) -> str:
        low = "" if self.at_least is None else f" >= {self.at_least:g}"
        high = "" if self.at_most is None else f" <= {self.at_most:g}"
        return self.side + " and".join(bound for bound in (low, high) if bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A statement that a run can refute.

    Attributes:
        id: short and stable, as in ``--claim``.
        statement: one sentence that is true if the claim holds.
        source: where the claim comes from (paper and section), or that it is ours.
        kind: superior, noninferior, equivalent, ratio (of the last side to the first), monotone, exact.
        compare: sides ``arm:metric``. Two-sided kinds: (reference, treatment). monotone: three or more, in the order in
            which the metric is said to rise. exact: one side, a deviation.
        delta: superior, monotone: smallest difference that counts; ratio: smallest ratio that counts (above 1).
        margin: noninferior, equivalent: how much worse (how different) is still the same; exact: largest deviation.
        better: whether higher or lower values of the metric are better.
        gates: competence gates.
    """

    id: str
    statement: str
    source: str
    kind: Kind
    compare: tuple[str, ...]
    delta: float | None = None
    margin: float | None = None
    better: Literal["higher", "lower"] = "higher"
    gates: tuple[Gate, ...] = ()

    def __post_init__(self) -> None:
        _check_name("claim", self.id)
        if self.kind not in KINDS:
            raise ConfigError(f"claim {self.id}: kind {self.kind!r} is unknown: use {', '.join(KINDS)}")
        wanted = {"exact": (1, 1), "monotone": (3, 99)}.get(self.kind, (2, 2))
        if not wanted[0] <= len(self.compare) <= wanted[1]:
            raise ConfigError(f"claim {self.id}: kind {self.kind} compares another number of sides")
        _ = self.all_sides  # all must be readable
        uses = "delta" if self.kind in ("superior", "monotone", "ratio") else "margin"
        other = "margin" if uses == "delta" else "delta"
        value = getattr(self, uses)
        if value is None or getattr(self, other) is not None:
            raise ConfigError(f"claim {self.id}: kind {self.kind} needs {uses}, and no {other}")
        least = {"ratio": 1.0}.get(self.kind, 0.0)
        if value < least or (value == least and self.kind != "exact"):
            raise ConfigError(f"claim {self.id}: {uses} must be above {least:g}, got {value}")
        if self.kind == "exact" and self.better != "higher":
            raise ConfigError(f"claim {self.id}: a deviation has no better side: leave better as it is")

    @property
    def sides(self) -> tuple[Side, ...]:
        """The compared sides."""
        return tuple(Side.parse(text) for text in self.compare)

    @property
    def all_sides(self) -> tuple[Side, ...]:
        """The compared sides and those of the gates."""
        return (*self.sides, *(Side.parse(gate.side) for gate in self.gates))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run to be made: what an experiment's ``run`` is given."""

    arm: Arm
    seed: int
    scale: str
    split: Literal["dev", "test"]
    """The only split that may be evaluated on; training data is always the train split."""
    budget: Mapping[str, Value]
    """Settings of the scale: steps, batch, sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """Arms that are run on the same seeds, and the claims that are judged on them.

    Attributes:
        id: short and stable.
        about: what is varied and what is held equal, in a sentence or two.
        run: makes one trial; returns metric -> number. It must depend on nothing but the trial.
        arms: what is compared.
        claims: judged on the results.
        budgets: scale -> settings; a scale that is absent is not run.
        seeds: confirmation seeds.
        alone: nothing else may run at the same time (timings).
        version: raise it when the code of ``run`` changes what is measured.
    """

    id: str
    about: str
    run: Callable[[Trial], Mapping[str, float]]
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    budgets: Mapping[str, Mapping[str, Value]]
    seeds: int = 5
    alone: bool = False
    version: int = 1

    def __post_init__(self) -> None:
        _check_name("experiment", self.id)
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names) or not names:
            raise ConfigError(f"experiment {self.id}: arms need different names, and there must be one")
        for claim in self.claims:
            for side in claim.all_sides:
                if side.arm not in names:
                    raise ConfigError(f"claim {claim.id}: {side} names no arm of experiment {self.id}")
        for scale in self.budgets:
            if scale not in SCALES:
                raise ConfigError(f"experiment {self.id}: scale {scale!r} must be one of {', '.join(SCALES)}")
        if not 1 <= self.seeds <= len(CONFIRMATION):
            raise ConfigError(f"experiment {self.id}: seeds must be 1 to {len(CONFIRMATION)}")

    def arm(self, name: str) -> Arm:
        """Return the arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def trial(self, arm: str, seed: int, scale: str) -> Trial:
        """Return one trial; the seed decides the split (`split_of`).

        Raises:
            UsageError: the experiment has no such scale, or the seed is for neither purpose.
        """
        if scale not in self.budgets:
            raise UsageError(f"experiment {self.id} has no scale {scale}: it has {', '.join(self.budgets)}")
        return Trial(
            arm=self.arm(arm), seed=seed, scale=scale, split=split_of(seed), budget=self.budgets[scale]
        )

    def definition(self, scale: str) -> dict[str, Any]:
        """Return all that a verdict at this scale depends on, as plain data."""
        return {
            "experiment": self.id,
            "version": self.version,
            "arms": {arm.name: {"what": arm.what, "settings": dict(arm.settings)} for arm in self.arms},
            "scale": scale,
            "budget": dict(self.budgets[scale]),
            "seeds": self.seeds,
            "claims": [
                {
                    "id": claim.id,
                    "statement": claim.statement,
                    "kind": claim.kind,
                    "compare": list(claim.compare),
                    "delta": claim.delta,
                    "margin": claim.margin,
                    "better": claim.better,
                    "gates": [[gate.side, gate.at_least, gate.at_most] for gate in claim.gates],
                }
                for claim in self.claims
            ],
        }

    def fingerprint(self, scale: str) -> str:
        """Return 12 hex digits of the hash of `definition`."""
        text = json.dumps(self.definition(scale), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_name(what: str, name: str) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", name):
        raise ConfigError(f"{what} {name!r}: names are small letters, digits, and _ . - (they name files)")
