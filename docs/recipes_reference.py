"""Write the tables of docs/recipes.md from the recipes themselves: ``python docs/recipes_reference.py``.

The page is committed, so that it can be read without a build; a test fails when a table is out of date.
"""

from pathlib import Path

from chiasm.cli.dry_run import GPU_SHARE
from chiasm.model.cost import named_machine
from chiasm.model.train_cost import flops_lines, nominal_tokens, step_seconds
from chiasm.model.train_memory import memory_lines
from chiasm.systems.internvl.presets import PRESETS
from chiasm.systems.internvl.released import released
from chiasm.systems.internvl.table import RECIPES, SIZES, STAGE_TOKENS
from chiasm.systems.internvl.training_plan import job_of

PAGE = Path(__file__).with_name("recipes.md")
GPUS = 512


def _names() -> list[str]:
    return [name for name in RECIPES if name not in ("sft", "lora")]


def settings() -> str:
    """What each recipe sets, beside the tokens of the paper."""
    lines = [
        "| recipe | trains | lr | packs | DropPath | warm-up | decay | steps | tokens, nominal | paper |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    trains = {
        "stage1": "projector",
        "stage15": "encoder, projector",
        "stage2": "everything",
        "sft": "projector, language model",
        "lora": "adapters of rank 16",
    }
    for name in _names():
        recipe = released(name)
        stage, _, size = name.partition("_")
        schedule = recipe.schedule
        warmup = f"{schedule.warmup} steps" if schedule.warmup else f"{schedule.warmup_ratio:.0%}"
        tokens = nominal_tokens(recipe.steps, recipe.batch, recipe.data.max_tokens) / 1e9
        paper = STAGE_TOKENS.get(stage, {}).get(size)
        lines.append(
            f"| `internvl/{name}` | {trains[stage]} | {recipe.optim.lr:g} "
            f"| {recipe.batch:,} x {recipe.data.max_tokens:,} | {recipe.drop_path:g} | {warmup} "
            f"| {recipe.optim.weight_decay:g} | {recipe.steps:,} | {tokens:.4g} B "
            f"| {'' if paper is None else f'{paper} B'} |"
        )
    return "\n".join(lines)


def plans() -> str:
    """The stages of the paper on so many H100."""
    machine = named_machine("h100", GPU_SHARE)
    lines = [
        "| recipe | trained | memory of a device, peak | FLOP of a step | computed again | a step | the run |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in [name for name in _names() if name.startswith("stage")]:
        recipe = released(name)
        job, _ = job_of(recipe, gpus=GPUS)
        flops, peak = flops_lines(job), memory_lines(job)["peak"].value
        seconds = step_seconds(job, machine.flops, machine.flops_share)
        again = flops["recomputed"].value / flops["total"].value if "recomputed" in flops else 0
        lines.append(
            f"| `internvl/{name}` | {job.trained / 1e9:,.3f} B | {peak / 1e9:.1f} GB | {flops['total'].value:.3g} "
            f"| {again:.0%} | {seconds:.2f} s | {seconds * recipe.steps / 3600:.1f} h |"
        )
    return "\n".join(lines)


def unverified() -> str:
    """What the sizes of a plan rest on from memory."""
    doubts = {size: PRESETS[release].unverified for size, release in SIZES.items()}
    return "; ".join(f"{size}: {', '.join(words)}" for size, words in doubts.items() if words)


TABLES = {"settings": settings, "plans": plans, "unverified": unverified}


def render(page: str) -> str:
    """The page with its tables made anew."""
    for name, table in TABLES.items():
        begin, end = f"% {name}: begin\n", f"% {name}: end"
        head, _, rest = page.partition(begin)
        _, _, tail = rest.partition(end)
        page = f"{head}{begin}\n{table()}\n\n{end}{tail}"
    return page


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
