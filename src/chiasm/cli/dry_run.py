"""``chiasm train RECIPE --dry-run`` and ``chiasm plan RECIPE``: a training run on paper.

Both print the same figures: parameters by part, memory, FLOPs, steps, tokens, time, data. A dry run is about one
machine, this one, whose matrix products are timed for a second; a plan is about N named GPUs. Nothing is written.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chiasm.cli.terminal import paint
from chiasm.errors import ChiasmError, UsageError

if TYPE_CHECKING:
    from chiasm.model.cost import Machine
    from chiasm.model.plan import Line
    from chiasm.train.recipe import Recipe

__all__ = ["GPU_SHARE", "HERE_SHARE", "dry_run", "plan_recipe", "training_lines"]

GPU_SHARE = 0.4
"""Assumed share of a GPU's peak that training reaches, recomputed layers counted: an assumption, not measured here."""
HERE_SHARE = 0.5
"""Likewise of the rate of a matrix product that is measured on this machine."""


def dry_run(recipe: Recipe, *, device: str = "cpu") -> dict[str, Any]:
    """What a run of this recipe would be, on this machine; nothing is saved.

    Raises:
        ChiasmError: the recipe's model cannot be understood.
    """
    from chiasm.model.cost import measure

    machine = measure(dtype=recipe.compute, seconds=1.0, flops_share=HERE_SHARE)
    return _planned(recipe, machine, gpus=1, cuda=device.startswith("cuda"))


def plan_recipe(recipe: Recipe, machine: Machine, *, gpus: int = 1, shard: str = "full") -> dict[str, Any]:
    """What a run of this recipe would be, on so many of these devices."""
    return _planned(recipe, machine, gpus=gpus, cuda=True, shard=shard)


def _planned(
    recipe: Recipe, machine: Machine, *, gpus: int, cuda: bool, shard: str = "full"
) -> dict[str, Any]:
    from chiasm.systems.internvl.training_plan import data_summary, job_of

    found: dict[str, Any] = {
        "recipe": recipe.name,
        "steps": recipe.steps,
        "batch": recipe.batch,
        "micro_batches": recipe.accumulate,
        "compute": recipe.compute,
        "gpus": gpus,
        "data": data_summary(recipe),
    }
    if not hasattr(recipe.model, "outline"):
        return found | _counted(recipe)
    from chiasm.model.train_cost import flops_lines, nominal_tokens, parameter_lines, step_seconds
    from chiasm.model.train_memory import memory_lines, moment_lines

    job, notes = job_of(recipe, gpus=gpus, shard=shard, cuda=cuda)  # type: ignore[arg-type]
    memory, flops = memory_lines(job), flops_lines(job)
    seconds = step_seconds(job, machine.flops, machine.flops_share)
    rows = recipe.accumulate * job.rows
    packed = hasattr(recipe.data, "max_tokens")
    useful = flops["model"].value / flops["total"].value
    found |= {
        "parameters": {
            name: {
                "value": line.value,
                "trained": name == "total" or line.formula == "trained",
                "formula": line.formula,
            }
            for name, line in parameter_lines(job).items()
        },
        "trained": job.trained,
        "memory": _plain(memory),
        "moments": _plain(moment_lines(job)),
        "flops": _plain(flops),
        "tokens": {
            "a step": rows,
            "nominal": nominal_tokens(recipe.steps, recipe.accumulate, job.rows) if packed else None,
            "tiles": recipe.accumulate * job.tiles * recipe.steps,
        },
        "machine": {
            "source": machine.source,
            "flops": machine.flops,
            "share": machine.flops_share,
            "mfu": machine.flops_share * useful,
            "memory": machine.memory,
            "fits": None if machine.memory is None else memory["peak"].value <= machine.memory,
        },
        "time": {
            "step": {
                "value": seconds,
                "formula": f"{flops['total'].value:.4g} FLOP / ({gpus} · {machine.flops:.3g} · "
                f"{machine.flops_share:g})",
            },
            "run": {"value": seconds * recipe.steps, "formula": f"steps {recipe.steps:,} · {seconds:.4g} s"},
            "devices": {
                "value": seconds * recipe.steps * gpus,
                "formula": f"{gpus} devices · {seconds * recipe.steps / 86400:.4g} days",
            },
        },
        "notes": list(notes),
    }
    return found


def _counted(recipe: Recipe) -> dict[str, Any]:
    """A model that tells no sizes is built, without weights where it can be (`blank`), and counted."""
    from torch import nn

    from chiasm.train.optim import trainable
    from chiasm.train.prepare import prepare

    blank = getattr(recipe.model, "blank", None)
    try:
        model = prepare(recipe.model.build() if blank is None else blank(), recipe)
        # Patterns for what the objective trains beside the model match nothing here.
        own = {
            name: tuple(p for p in getattr(recipe.optim, name) if not p.startswith("objective"))
            for name in ("train", "freeze")
        }
        optim = replace(recipe.optim, groups=(), **own)  # type: ignore[arg-type]
        trained = sum(p.numel() for p in trainable(model, nn.Module(), optim).values())
    except ChiasmError as error:
        raise UsageError(f"{recipe.name} cannot be planned: {error}") from error
    total = sum(p.numel() for p in model.parameters())
    parameters = {"trained": trained, "frozen": total - trained, "total": total}
    return {
        "parameters": {
            name: {"value": value, "trained": name == "trained", "formula": ""}
            for name, value in parameters.items()
        },
        "trained": trained,
        "memory": {
            "weights": {"value": 4.0 * total, "formula": f"parameters {total:,} · 4"},
            "gradients": {"value": 4.0 * trained, "formula": f"trained {trained:,} · 4"},
            "optimiser": {"value": 8.0 * trained, "formula": f"trained {trained:,} · two moments of 4"},
        },
        "notes": [
            f"{type(recipe.model).__name__} tells no sizes: activations, FLOPs and time are not planned, nor what "
            "the objective trains beside it"
        ],
    }


def _plain(lines: dict[str, Line]) -> dict[str, dict[str, Any]]:
    return {name: {"value": line.value, "formula": line.formula} for name, line in lines.items()}


# How it is printed -----------------------------------------------------------------------------------------------


def training_lines(found: dict[str, Any], *, explain: bool = False) -> list[str]:
    """The figures as text; with `explain`, the formula of each, and all moments of which one is the peak."""
    devices = f", {found['gpus']} devices" if found["gpus"] > 1 else ""
    out = [
        f"{paint(found['recipe'], 'bold')}: {found['steps']:,} steps of {found['batch']:,} in "
        f"{found['micro_batches']:,} micro-batches, {found['compute']}{devices}"
    ]

    def table(title: str, lines: dict[str, dict[str, Any]], spell: Any, formula: bool = explain) -> None:
        out.append("")
        out.append(paint(title, "bold"))
        for name, line in lines.items():
            how = line["formula"] if formula else ""
            out.append(f"  {name:32} {spell(line['value']):>14}  {how}".rstrip())

    table("parameters", found["parameters"], lambda n: f"{n:,.0f}", formula=True)
    table("memory of a device" if found["gpus"] > 1 else "memory", found["memory"], _bytes)
    machine = found.get("machine")
    if machine and machine["memory"] is not None:
        said = "fits in" if machine["fits"] else "does not fit in"
        out.append(f"  {'':32} {'':14}  {said} the {_bytes(machine['memory'])} of this device")
    if explain and "moments" in found:
        table("moments; the largest is the peak", found["moments"], _bytes)
    if "flops" in found:
        table("FLOPs of a step", found["flops"], lambda n: _scaled(n, "FLOP"))
    if "tokens" in found:
        tokens = found["tokens"]
        out += ["", paint("tokens", "bold")]
        out.append(f"  {'rows of a step':32} {tokens['a step']:>14,}")
        if tokens["nominal"] is not None:  # as the paper counts: slots, filled or not, in units of 2^20
            out.append(
                f"  {'of the run, nominal':32} {tokens['nominal'] / 1e9:>12.4g} B  padding included, in 2^20 tokens"
            )
        out.append(f"  {'tiles of the run, at most':32} {tokens['tiles']:>14,}")
    if machine:
        title = (
            f"time, estimated: {_scaled(machine['flops'], 'FLOP/s')} · {machine['share']:g} ({machine['source']}; the "
            f"share is an assumption; MFU {machine['mfu']:.2f})"
        )
        table(title, found["time"], _seconds)
    out += ["", paint("data", "bold")]
    data = found["data"]
    if "missing" in data:
        out.append(f"  {data['missing']}")
    for name, one in data.get("sets", {}).items():
        passes = f", {one['passes']:.3g} passes" if "passes" in one else ""
        repeat = f", repeated {one['repeat']:g}" if one.get("repeat", 1) != 1 else ""
        out.append(f"  {name:32} {one['rows']:>14,}  rows, {one['share']:.1%} of the draws{repeat}{passes}")
    return out + ([""] if found["notes"] else []) + [f"note: {text}" for text in found["notes"]]


def _bytes(count: float) -> str:
    return _scaled(count, "B")


def _scaled(value: float, unit: str) -> str:
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.2f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _seconds(value: float) -> str:
    for limit, size, name in ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "h"), (120, 60, "min")):
        if value >= limit:
            return f"{value / size:,.1f} {name}"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.2g} ms"
