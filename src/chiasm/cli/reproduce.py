"""``chiasm reproduce SYSTEM``: run the claims of a system and write the report with their verdicts.

Scales: ``ci`` runs every arm at toy size to see that it works and judges nothing; ``mini`` is the real thing on a few
cores; ``gpu`` the same larger. Seeds 0 to 4 confirm (test split, report); seeds from 100 are for tuning (dev split, no
report). The verdict does not change the exit status: a claim that does not hold is a result.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiasm.errors import ChiasmError, UsageError

if TYPE_CHECKING:
    from chiasm.lab.claim import Experiment
    from chiasm.lab.runner import Store

__all__ = ["CLAIM_HOMES", "reproduce", "reproduce_command"]

CLAIM_HOMES = {"internvl": "chiasm.systems.internvl.claims", "pvc": "chiasm.systems.pvc.claims"}
"""System -> module with its ``EXPERIMENTS``."""
CHECK_SEED = 100
"""The seed of ``ci``: a tuning seed, so that mechanics are checked without a look at the test split."""


def find_claims(system: str) -> ModuleType:
    """Return the claims module of a system.

    Raises:
        UsageError: no such system; the message lists what there is.
    """
    if system not in CLAIM_HOMES:
        raise UsageError(f"system {system!r} has no claims; these have: {', '.join(CLAIM_HOMES)}")
    return importlib.import_module(CLAIM_HOMES[system])


def choose(experiments: Sequence[Experiment], claims: Sequence[str], scale: str) -> list[Experiment]:
    """Return the experiments that have this scale and, if claims (or experiments) are named, one of them.

    Raises:
        UsageError: unknown scale or name, or a named claim without this scale.
    """
    from chiasm.lab.claim import SCALES

    if scale not in SCALES:
        raise UsageError(f"--scale {scale}: must be one of {', '.join(SCALES)}")
    known = {name: e for e in experiments for name in (e.id, *(claim.id for claim in e.claims))}
    for name in claims:
        if name not in known:
            ids = ", ".join(claim.id for e in experiments for claim in e.claims)
            raise UsageError(f"--claim {name}: no such claim; there are {ids}")
        if scale not in known[name].budgets:
            raise UsageError(f"--claim {name} has no scale {scale}: it has {', '.join(known[name].budgets)}")
    wanted = {known[name].id for name in claims}
    return [e for e in experiments if scale in e.budgets and (not wanted or e.id in wanted)]


def reproduce(
    system: str,
    *,
    claims: Sequence[str] = (),
    scale: str = "mini",
    seeds: Sequence[int] | None = None,
    out: str | Path = "reports",
    work: str | Path = "runs/lab",
    jobs: int = 1,
) -> dict[str, Any]:
    """Run what is missing and return the outcome as plain data; the report is written for confirmation runs only.

    Args:
        system: a name of `CLAIM_HOMES`.
        claims: ids of claims (or experiments); none for all.
        scale: ci, mini or gpu.
        seeds: other seeds than the registered ones.
        out: folder of reports.
        work: folder of results, from which an interrupted run goes on.
        jobs: runs made at once.

    Raises:
        UsageError: unknown system, claim or scale, or seeds for neither purpose.
        ChiasmError: a run failed; at scale ci also when a mechanism does not work.
    """
    from chiasm.lab.claim import CONFIRMATION
    from chiasm.lab.report import write_report
    from chiasm.lab.runner import Store, purpose_of, run_trials

    if jobs < 1:
        raise UsageError(f"--jobs {jobs}: must be at least 1")
    module = find_claims(system)
    chosen = choose(module.EXPERIMENTS, claims, scale)
    if not chosen:
        raise UsageError(f"no claim of {system} has scale {scale}: see chiasm reproduce {system} --list")
    if scale == "ci" and seeds is None:
        seeds = (CHECK_SEED,)
    purpose = "confirmation" if seeds is None else purpose_of(seeds)
    if scale == "ci" and purpose == "confirmation":
        raise UsageError(
            f"--scale ci judges nothing: leave --seeds out, or give seeds outside of 0 to {CONFIRMATION[-1]}"
        )
    todo = {e.id: list(range(e.seeds)) if seeds is None else list(seeds) for e in chosen}
    home = CLAIM_HOMES[system]
    if scale == "ci":  # kept results would say that yesterday's code works
        with tempfile.TemporaryDirectory(prefix="chiasm-ci-") as folder:
            store = Store(folder, system, scale, purpose)
            run_trials(chosen, store, todo, jobs=jobs, home=home, say=_say)
            return _check(chosen, store, todo)
    store = Store(work, system, scale, purpose)
    run_trials(chosen, store, todo, jobs=jobs, home=home, say=_say)
    if purpose == "confirmation":
        everything = [e for e in module.EXPERIMENTS if scale in e.budgets]
        page, data = write_report(everything, store, out, module)
        return {"report": str(page)} | data
    return _tuned(chosen, store, todo)


def _tuned(experiments: Sequence[Experiment], store: Store, seeds: dict[str, list[int]]) -> dict[str, Any]:
    """Means of tuning runs; no verdict, no report."""
    rows = []
    for experiment in experiments:
        for result in store.results(experiment, seeds[experiment.id]):
            rows.append(
                {"experiment": experiment.id, "arm": result.arm, "seed": result.seed, "split": result.split}
                | {"metrics": result.metrics, "cpu_seconds": result.cpu_seconds}
            )
    return {"system": store.system, "scale": store.scale, "purpose": store.purpose, "runs": rows}


def _check(experiments: Sequence[Experiment], store: Store, seeds: dict[str, list[int]]) -> dict[str, Any]:
    """See that every side of every claim was measured, and that exact claims are exact; ChiasmError if not."""
    from chiasm.lab.runner import as_results

    data = _tuned(experiments, store, seeds)
    for experiment in experiments:
        for seed, arms in as_results(store.results(experiment, seeds[experiment.id])).items():
            for claim in experiment.claims:
                for side in claim.all_sides:
                    value = arms[side.arm].get(side.metric, float("nan"))
                    if value != value:
                        raise ChiasmError(f"claim {claim.id}, seed {seed}: {side} was not measured")
                    exact = claim.kind == "exact" and side in claim.sides
                    if exact and claim.margin is not None and abs(value) > claim.margin:
                        raise ChiasmError(
                            f"claim {claim.id}: {side} is {value:.3g}, allowed {claim.margin:g}"
                        )
    return data | {"mechanics": "ok", "claims": [c.id for e in experiments for c in e.claims]}


def listing(system: str) -> list[dict[str, Any]]:
    """Return every claim of a system as plain data."""
    return [
        {
            "id": claim.id,
            "experiment": experiment.id,
            "kind": claim.kind,
            "statement": claim.statement,
            "scales": list(experiment.budgets),
            "seeds": experiment.seeds,
            "fingerprints": {scale: experiment.fingerprint(scale) for scale in experiment.budgets},
        }
        for experiment in find_claims(system).EXPERIMENTS
        for claim in experiment.claims
    ]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def reproduce_command(
    system: Annotated[str, typer.Argument(help="Whose claims: internvl or pvc.", show_default=False)],
    claim: Annotated[
        list[str] | None,
        typer.Option("--claim", help="A claim or experiment by id (repeatable); default all."),
    ] = None,
    scale: Annotated[str, typer.Option(help="ci (mechanics only), mini or gpu.")] = "mini",
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated; 0 to 4 confirm, from 100 tune on the dev split without a report."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of reports.")] = Path("reports"),
    work: Annotated[
        Path, typer.Option(help="Folder of single results; what lies there is not run again.")
    ] = Path("runs/lab"),
    jobs: Annotated[int, typer.Option(help="Runs made at once, one thread each; timings run alone.")] = 1,
    list_claims: Annotated[bool, typer.Option("--list", help="List the claims and run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Run a system's claims and write their verdicts.

    What was run before is kept. The exit status is 0 whatever the verdicts; 1 when something could not run.
    """
    if list_claims:
        rows = listing(system)
        if as_json:
            print(json.dumps(rows, ensure_ascii=False))
            return
        for row in rows:
            print(f"{row['id']:<28} {row['kind']:<12} {'/'.join(row['scales']):<12} {row['statement']}")
        return
    data = reproduce(
        system,
        claims=claim or (),
        scale=scale,
        seeds=None if seeds is None else _parse_seeds(seeds),
        out=out,
        work=work,
        jobs=jobs,
    )
    if as_json:
        print(json.dumps(data, ensure_ascii=False))
    elif "report" in data:
        from chiasm.lab.report import summary

        print("\n".join([*summary(data), data["report"]]))
    else:
        for row in data["runs"]:
            shown = ", ".join(f"{k} {v:.4g}" for k, v in row["metrics"].items() if v is not None)
            print(f"{row['experiment']} {row['arm']} seed {row['seed']} ({row['split']}): {shown}")
        print("mechanics: ok, no verdicts" if "mechanics" in data else "tuning runs: no verdicts, no report")


def _parse_seeds(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        found = []
    if not found:
        raise UsageError(f"--seeds {text!r}: give whole numbers separated by commas, such as 7001,7002")
    return list(dict.fromkeys(found))
