"""The report: verdicts, every seed, plots, cost and surroundings, as JSON for programs and Markdown for people.

What: ``compose`` (plain data from stored results), ``markdown`` (the page), ``write_report``
(``reports/<system>/<scale>.json``,
``.md`` and ``<scale>/<claim>.svg``). Only confirmation runs enter a report. A claim is judged when *all* of
its seeds are
there, so that nobody stops when the result pleases; before that it is "not run yet".
"""

from __future__ import annotations

import inspect
import json
import math
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chiasm.errors import UsageError
from chiasm.eval.store import write_atomic
from chiasm.lab.claim import Claim, Experiment
from chiasm.lab.plots import plot
from chiasm.lab.runner import Result, Store, as_results
from chiasm.lab.verdict import Judgement, judge

__all__ = ["compose", "judged", "markdown", "summary", "write_report"]

Judged = list[tuple[Experiment, Claim, Judgement | None]]


def judged(experiments: Sequence[Experiment], store: Store, seeds: Sequence[int] | None = None) -> Judged:
    """Return every claim with its judgement; None where runs of its seeds are missing.

    Args:
        experiments: whose claims.
        store: of the results.
        seeds: that must be there; default: each experiment's registered ones.
    """
    out: Judged = []
    for experiment in experiments:
        wanted = list(range(experiment.seeds)) if seeds is None else list(seeds)
        table = as_results(store.results(experiment, wanted))
        for claim in experiment.claims:
            needed = {side.arm for side in claim.all_sides}
            whole = all(needed <= table.get(seed, {}).keys() for seed in wanted)
            out.append((experiment, claim, judge(claim, table) if whole else None))
    return out


def compose(experiments: Sequence[Experiment], store: Store, module: Any = None) -> dict[str, Any]:
    """Return the whole report as JSON-compatible data.

    Args:
        experiments: all of the system's, run or not, that have this scale.
        store: of confirmation results.
        module: where the claims are written; its file's last commit is stated.

    Raises:
        UsageError: the store holds tuning runs, or runs at a scale that has no verdicts.
    """
    if store.purpose != "confirmation" or store.scale == "ci":
        raise UsageError(f"{store.purpose} runs at scale {store.scale} are no evidence: they enter no report")
    data: dict[str, Any] = {
        "system": store.system,
        "scale": store.scale,
        "claims_file": _claims_file(module),
        "experiments": {},
        "claims": [],
    }
    for experiment, claim, judgement in judged(experiments, store):
        if experiment.id not in data["experiments"]:
            data["experiments"][experiment.id] = _experiment(experiment, store)
        data["claims"].append(_claim(experiment, claim, judgement, store.scale))
    for experiment in experiments:  # those without claims are shown all the same: curves
        data["experiments"].setdefault(experiment.id, _experiment(experiment, store))
    runs = [run for e in data["experiments"].values() for run in e["runs"]]
    data["cpu_seconds"] = round(sum(run["cpu_seconds"] for run in runs), 1)
    data["surroundings"] = _surroundings(runs)
    return data


def write_report(
    experiments: Sequence[Experiment], store: Store, out: str | Path, module: Any = None
) -> tuple[Path, dict[str, Any]]:
    """Write the report of all results that are there; return the Markdown file and the data.

    Raises:
        UsageError: see `compose`.
    """
    data = compose(experiments, store, module)
    home = Path(out) / store.system
    plots = {}
    for _, claim, judgement in judged(experiments, store):
        if judgement is not None:
            plots[claim.id] = f"{store.scale}/{claim.id}.svg"
            write_atomic(home / plots[claim.id], plot(claim, judgement))
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(home / f"{store.scale}.json", text + "\n")
    page = home / f"{store.scale}.md"
    write_atomic(page, markdown(data, plots))
    return page, data


def summary(data: dict[str, Any]) -> list[str]:
    """Return one line a claim: verdict, id, effect."""
    return [f"{c['verdict'] or 'not run yet':<14} {c['id']:<28} {_effect(c)}" for c in data["claims"]]


# --- plain data ---------------------------------------------------------------------------------------------


def _experiment(experiment: Experiment, store: Store) -> dict[str, Any]:
    results = store.results(experiment, range(experiment.seeds))
    definition = experiment.definition(store.scale)
    return {
        "about": experiment.about,
        "fingerprint": experiment.fingerprint(store.scale),
        "version": experiment.version,
        "arms": definition["arms"],
        "budget": definition["budget"],
        "seeds": experiment.seeds,
        "other_definitions": store.others(experiment),
        "cpu_seconds": round(sum(r.cpu_seconds for r in results), 1),
        "runs": [_run(result) for result in results],
    }


def _run(result: Result) -> dict[str, Any]:
    row = asdict(result)
    for name in ("experiment", "fingerprint"):
        row.pop(name)
    return row


def _claim(experiment: Experiment, claim: Claim, j: Judgement | None, scale: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": claim.id,
        "experiment": experiment.id,
        "fingerprint": experiment.fingerprint(scale),
        "statement": claim.statement,
        "source": claim.source,
        "kind": claim.kind,
        "compare": list(claim.compare),
        "better": claim.better,
        "delta": claim.delta,
        "margin": claim.margin,
        "gates": [str(gate) for gate in claim.gates],
        "verdict": None,
    }
    if j is None:
        return row
    e = j.estimate
    return row | {
        "verdict": j.verdict,
        "reason": j.reason,
        "seeds": list(j.seeds),
        "values": {side: [_plain(v) for v in values] for side, values in j.values.items()},
        "effect": [_plain(v) for v in j.effect],
        "mean": None if e is None else _plain(e.mean),
        "low": None if e is None else _plain(e.low),
        "high": None if e is None else _plain(e.high),
        "gate_means": {gate: {"mean": _plain(mean), "met": met} for gate, (mean, met) in j.gates.items()},
        "steps": [[_plain(s.mean), _plain(s.low), _plain(s.high)] for s in j.steps],
        "p_value": j.p_value,
    }


def _plain(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _surroundings(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The different surroundings in which runs were made, with how many of them."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        key = json.dumps(run["environment"], sort_keys=True)
        found.setdefault(key, {**run["environment"], "runs": 0})["runs"] += 1
    return list(found.values())


def _claims_file(module: Any) -> dict[str, Any]:
    """Name and last commit of the file with the claims; ``changed`` when it differs from that commit."""
    if module is None:
        return {"name": None, "revision": None, "changed": None}
    path = Path(inspect.getfile(module))
    name = f"{module.__name__.replace('.', '/')}.py"

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(path.parent), *words, "--", path.name],
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision = git("log", "-1", "--format=%H") or None
    return {
        "name": name,
        "revision": revision,
        "changed": None if revision is None else bool(git("status", "--porcelain")),
    }


# --- the page -----------------------------------------------------------------------------------------------


def markdown(data: dict[str, Any], plots: dict[str, str]) -> str:
    """Return the page of a report; ``plots`` is claim id -> path of its SVG beside the page."""
    scale, system = data["scale"], data["system"]
    file = data["claims_file"]
    changed = " with later changes" if file["changed"] else ""
    lines = [
        f"# {system}: claims at scale {scale}",
        "",
        f"Written by `chiasm reproduce {system} --scale {scale}`; every number is of the test split, every "
        f"verdict of the "
        "code. How to read it: docs/claims.md.",
        "",
        f"Claims file: `{file['name']}`, last commit `{file['revision']}`{changed}. "
        f"CPU time: {_time(data['cpu_seconds'])} in {sum(len(e['runs']) for e in data['experiments'].values())} runs.",
        "",
        "| verdict | claim | effect (95 %) | asked for |",
        "| --- | --- | --- | --- |",
    ]
    for c in data["claims"]:
        verdict = c["verdict"] or "not run yet"
        lines.append(f"| **{verdict}** | {_link(c)} {c['statement']} | {_effect(c)} | {_asked(c)} |")
    lines += ["", *_nulls(data)]
    for c in data["claims"]:
        lines += _section(c, plots.get(c["id"]))
    lines += ["## Experiments", ""]
    for name, e in data["experiments"].items():
        lines += _experiment_page(name, e)
    return "\n".join([*lines, *_surroundings_page(data["surroundings"])]).rstrip() + "\n"


def _nulls(data: dict[str, Any]) -> list[str]:
    """What did not come out as claimed, said first."""
    lines = ["## What did not come out as claimed", ""]
    rest = [c for c in data["claims"] if c["verdict"] not in (None, "holds")]
    lines += [f"- {_link(c)} {c['verdict']}: {c['reason']}." for c in rest] or ["Nothing, of what was run."]
    return [*lines, ""]


def _section(c: dict[str, Any], image: str | None) -> list[str]:
    lines = [f"## {c['id']}", "", c["statement"], "", f"Source: {c['source']}. Asked for: {_asked(c)}."]
    lines += [f"Gate: {gate}." for gate in c["gates"]]
    if c["verdict"] is None:
        return [*lines, "", "Not run yet: all of its seeds are needed.", ""]
    lines += ["", f"**{c['verdict']}**: {c['reason']}. {_effect(c)}", ""]
    if image:
        lines += [f"![{c['id']}]({image})", ""]
    seeds = " | ".join(f"seed {s}" for s in c["seeds"])
    lines += [f"| | {seeds} | mean |", "| --- |" + " --- |" * (len(c["seeds"]) + 1)]
    for side, values in c["values"].items():
        lines.append(f"| {side} | {_cells(values)} |")
    if c["effect"] and c["kind"] != "exact":
        lines.append(f"| {_effect_name(c)} | {_cells(c['effect'], geometric=c['kind'] == 'ratio')} |")
    for gate, found in c["gate_means"].items():
        lines += ["", f"Gate {gate}: {_number(found['mean'])}, {'met' if found['met'] else '**not met**'}."]
    return [*lines, ""]


def _experiment_page(name: str, e: dict[str, Any]) -> list[str]:
    lines = [f"### {name}", "", e["about"], ""]
    lines.append(
        f"Definition `{e['fingerprint']}` (version {e['version']}), {e['seeds']} seeds, budget: {_pairs(e['budget'])}."
    )
    if e["other_definitions"]:
        others = ", ".join(f"`{o}`" for o in e["other_definitions"])
        lines += [
            "",
            f"**Other definitions of this experiment were run on the test split before: {others}.**",
        ]
    lines += ["", "| arm | what | runs | CPU time a run |", "| --- | --- | --- | --- |"]
    for arm, facts in e["arms"].items():
        costs = [run["cpu_seconds"] for run in e["runs"] if run["arm"] == arm]
        each = _time(sum(costs) / len(costs)) if costs else "-"
        lines.append(f"| {arm} | {facts['what']} | {len(costs)} | {each} |")
    metrics = sorted({m for run in e["runs"] for m in run["metrics"]})
    if metrics:
        lines += ["", "Every run:", "", f"| arm | seed | {' | '.join(metrics)} | CPU s |"]
        lines.append("| --- | --- |" + " --- |" * (len(metrics) + 1))
        for run in e["runs"]:
            cells = " | ".join(_number(run["metrics"].get(m)) for m in metrics)
            lines.append(f"| {run['arm']} | {run['seed']} | {cells} | {run['cpu_seconds']:.0f} |")
    return [*lines, ""]


def _surroundings_page(found: list[dict[str, Any]]) -> list[str]:
    lines = ["## Surroundings", ""]
    for s in found:
        versions = ", ".join(f"{k} {v}" for k, v in s.get("versions", {}).items())
        lines.append(
            f"- {s['runs']} runs: {s.get('cuda') or s.get('machine')}, {s.get('cpu')} (processor "
            f"{s.get('cpu_flags')}), "
            f"one thread a run, Python {s.get('python')}, {versions}; git `{s.get('git')}`."
        )
    return lines if found else [*lines, f"No runs yet (this machine: {platform.machine()})."]


def _link(c: dict[str, Any]) -> str:
    return f"[{c['id']}](#{c['id'].replace('.', '')})"


def _effect_name(c: dict[str, Any]) -> str:
    return {"ratio": "ratio", "monotone": "last - first"}.get(c["kind"], "difference")


def _effect(c: dict[str, Any]) -> str:
    if c["verdict"] is None or not c.get("effect"):
        return ""
    if c["kind"] == "exact":
        return f"largest deviation {_number(max(c['effect']))}"
    low, high = (_number(c[end]) if c[end] is not None else "?" for end in ("low", "high"))
    return f"{_effect_name(c)} {_number(c['mean'])} [{low}, {high}]"


def _asked(c: dict[str, Any]) -> str:
    sides = " < ".join(f"`{s}`" for s in c["compare"])
    if c["better"] == "lower":
        sides = " > ".join(f"`{s}`" for s in c["compare"])
    if c["kind"] == "exact":
        return f"{sides} at most {c['margin']:g}"
    if c["kind"] in ("noninferior", "equivalent"):
        first, last = (f"`{s}`" for s in c["compare"])
        word = "not below" if c["kind"] == "noninferior" else "as"
        return f"{last} {word} {first}, margin {c['margin']:g}"
    return f"{sides} by {'a factor of ' if c['kind'] == 'ratio' else ''}{c['delta']:g}"


def _cells(values: Sequence[float | None], geometric: bool = False) -> str:
    good = [v for v in values if v is not None]
    if geometric:
        mean = math.exp(math.fsum(map(math.log, good)) / len(good)) if good else None
    else:
        mean = math.fsum(good) / len(good) if good else None
    return " | ".join([*(_number(v) for v in values), _number(mean)])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items()) or "none"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.2f} h"
