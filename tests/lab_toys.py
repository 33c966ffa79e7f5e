"""A system of toy claims whose runs cost nothing, for the tests of the lab; also found by name in other processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from chiasm.errors import DataError
from chiasm.lab.claim import Arm, Claim, Experiment, Gate, Trial

ERROR = 1e-7
ARMS = tuple(Arm(name=name, what=f"way {name}") for name in "abc")


def nothing(trial: Trial) -> dict[str, float]:
    return {}


def measure(trial: Trial) -> dict[str, float]:
    """Arm b is better by 0.3, c worse by 0.1; every call is noted where the test asks for it."""
    log = os.environ.get("LAB_TOYS_LOG")
    if log:
        with Path(log).open("a") as out:
            out.write(f"{trial.arm.name} {trial.seed} {trial.split} {trial.budget['steps']}\n")
    if os.environ.get("LAB_TOYS_FAIL") == f"{trial.arm.name}{trial.seed}":
        raise DataError("the data is gone: bring it back")
    if os.environ.get("LAB_TOYS_PIDS"):
        (Path(os.environ["LAB_TOYS_PIDS"]) / str(os.getpid())).touch()
        time.sleep(120)
    time.sleep(float(trial.budget.get("sleep", 0)))
    gain = {"a": 0.0, "b": 0.3, "c": -0.1}[trial.arm.name]
    return {"accuracy": 0.5 + gain + 0.01 * trial.seed, "error": ERROR, "odd": float("inf")}


TOY = Experiment(
    id="toy",
    about="Three ways, all else equal.",
    run=measure,
    arms=ARMS,
    claims=(
        Claim(
            id="better",
            statement="b beats a.",
            source="this test",
            kind="superior",
            compare=("a:accuracy", "b:accuracy"),
            delta=0.2,
            gates=(Gate(side="a:accuracy", at_least=0.4),),
        ),
        Claim(
            id="same",
            statement="c is as good as a.",
            source="this test",
            kind="equivalent",
            compare=("a:accuracy", "c:accuracy"),
            margin=0.05,
        ),
        Claim(
            id="order",
            statement="Accuracy rises from c over a to b.",
            source="this test",
            kind="monotone",
            compare=("c:accuracy", "a:accuracy", "b:accuracy"),
            delta=0.1,
        ),
        Claim(
            id="tiny", statement="The error is tiny.", source="this test",
            kind="exact", compare=("a:error",), margin=1e-5,
        ),
        Claim(
            id="blind",
            statement="c beats a, were a any good.",
            source="this test",
            kind="superior",
            compare=("a:accuracy", "c:accuracy"),
            delta=0.2,
            gates=(Gate(side="a:accuracy", at_least=0.99),),
        ),
    ),
    budgets={"ci": {"steps": 1}, "mini": {"steps": 3, "sleep": 0.0}},
    seeds=3,
)  # fmt: skip

TIMED = Experiment(
    id="timed",
    about="Alone.",
    run=measure,
    arms=ARMS[:2],
    claims=(
        Claim(
            id="faster", statement="b is faster.", source="this test", kind="ratio",
            compare=("a:accuracy", "b:accuracy"), delta=1.5,
        ),
    ),
    budgets={"mini": {"steps": 2}},
    seeds=3,
    alone=True,
)  # fmt: skip

EXPERIMENTS = (TOY, TIMED)
