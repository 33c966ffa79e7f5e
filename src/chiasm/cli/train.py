"""``chiasm train RECIPE``: run a recipe in a run folder, or resume one.

A recipe is named ``system/function`` (``internvl/debug``) or ``./file.py:function`` (the user's own). The folder of
the run is printed on stdout; what happens goes to stderr.

Several GPUs or machines: ``torchrun --nproc-per-node 8 -m chiasm train RECIPE --device cuda``. Each process is told by
torchrun which one it is; the first one writes and speaks.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from chiasm.errors import ChiasmError, UsageError

if TYPE_CHECKING:
    from chiasm.train.recipe import Recipe

__all__ = ["RECIPE_HOMES", "find_recipe", "is_recipe", "train", "train_command"]

RECIPE_HOMES = {
    "internvl": "chiasm.systems.internvl.recipes",
    "pvc": "chiasm.systems.pvc.recipes",
}
"""System -> module whose ``__all__`` names its recipe functions."""


def is_recipe(name: str) -> bool:
    """Whether a name is to be a recipe's; a checkpoint folder that is called like a system is none."""
    from chiasm.hub import existing

    if ".py:" in name:
        return True
    folder = existing(name)
    return name.partition("/")[0] in RECIPE_HOMES and not (folder and (folder / "config.json").is_file())


def find_recipe(reference: str) -> Callable[[], Recipe]:
    """Return the recipe function that ``system/function`` or ``path.py:function`` names.

    Raises:
        UsageError: no such system, file or function; the message lists what there is.
    """
    if ":" in reference:
        file, _, function = reference.rpartition(":")
        module = _load_file(Path(file))
        found = getattr(module, function, None)
        if not callable(found):
            raise UsageError(f"{file} has no function {function!r} that returns a recipe")
        return cast("Callable[[], Recipe]", found)
    from chiasm.train.recipe import did_you_mean

    system, _, function = reference.partition("/")
    if system not in RECIPE_HOMES:
        raise UsageError(
            f"no recipe {reference!r}{did_you_mean(system, RECIPE_HOMES)}: name it system/function with a system of "
            f"{', '.join(RECIPE_HOMES)}, or ./file.py:function"
        )
    module = importlib.import_module(RECIPE_HOMES[system])
    if function not in module.__all__:
        near, names = did_you_mean(function, module.__all__), list(module.__all__)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UsageError(
            f"system {system!r} has no recipe {function!r}{near}; it has {', '.join(names[:3])}{more} "
            "(chiasm list recipes)"
        )
    return getattr(module, function)


def _load_file(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise UsageError(f"no Python file {path}: name a recipe as ./file.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up while it is executed
    spec.loader.exec_module(module)
    return module


def train(
    recipe: str | None = None,
    *,
    overrides: tuple[str, ...] = (),
    resume: Path | None = None,
    runs: Path = Path("runs"),
    run_id: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    workers: int = 1,
    loaders: int | None = None,
    until: int | None = None,
) -> Path:
    """Start a recipe or resume a run; return the run folder once it is finished or was asked to stop.

    Started by torchrun, the processes share the run.

    Args:
        recipe: name of the recipe; not given with ``resume``.
        overrides: ``path=value`` settings; not given with ``resume``.
        resume: folder of a run, which remembers its recipe and overrides.
        runs: folder that receives new runs.
        run_id: name of the new run.
        device: where to train.
        threads: of PyTorch on the CPU, for each worker.
        workers: micro-batches of a step that are computed at once.
        loaders: threads that read samples ahead; see ``Trainer``.
        until: stop after this step, to be resumed.

    Raises:
        UsageError: neither or both of recipe and resume, unknown recipe, wrong override, ``until`` below 1.
    """
    import torch

    from chiasm.train.parallel import join, leave
    from chiasm.train.recipe import Recipe, apply_overrides
    from chiasm.train.run import RunFolder
    from chiasm.train.trainer import Trainer, check_workers

    if (recipe is None) == (resume is None) or (resume is not None and (overrides or run_id)):
        raise UsageError("give either RECIPE (with --set and --id) or --resume RUN alone")
    if until is not None and until < 1:
        raise UsageError(f"--until {until}: give a step, at least 1")
    if threads is not None:
        torch.set_num_threads(threads)
    if resume is not None:
        info = RunFolder.open(resume).info
        recipe, overrides = info["reference"], tuple(info["overrides"])
    tree = apply_overrides(find_recipe(str(recipe))(), overrides)
    if not isinstance(tree, Recipe):
        raise UsageError(f"{recipe} returns a {type(tree).__name__}: a recipe function returns a Recipe")
    world = join(device)
    try:
        check_workers(tree, workers, world.device, world.size)  # a refusal leaves no folder behind
        begun: Path | ChiasmError | None = resume
        if resume is None and world.main:
            try:
                begun = RunFolder.create(
                    runs, tree, run_id=run_id, reference=str(recipe), overrides=tuple(overrides)
                ).path
            except ChiasmError as error:
                begun = error
        begun = world.tell(begun)  # the name of a new run holds the time of the first process
        if isinstance(begun, ChiasmError):
            raise begun
        run = RunFolder.open(cast("Path", begun))
        try:
            trainer = Trainer(tree, run, workers=workers, loaders=loaders, world=world)
        except ChiasmError:
            if resume is None and world.main:  # its name is free again for the mended recipe
                run.discard()
            raise
        trainer.fit(until=until)
    finally:
        leave(world)
    return run.path


def train_command(
    recipe: Annotated[
        str | None, typer.Argument(help="system/function, or ./file.py:function", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change one field: optim.lr=1e-4 (repeatable).")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run to the sample.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
    run_id: Annotated[str | None, typer.Option("--id", help="Name of the run.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads of PyTorch, for each worker.")] = None,
    workers: Annotated[
        int, typer.Option(help="Micro-batches computed at once (CPU; best with --threads 1; same result).")
    ] = 1,
    loaders: Annotated[
        int | None,
        typer.Option(help="Threads that read samples ahead; 0: none (same result).", show_default=False),
    ] = None,
    until: Annotated[int | None, typer.Option(help="Stop after this step, to be resumed.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same as --set seed=N.")] = None,
    dry: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print parameters, memory, FLOPs, time and data of the run; write nothing."
        ),
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="With --dry-run: the formula of each figure.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Train a recipe. Interrupt it at any time; --resume continues as if nothing had happened."""
    settings = tuple(overrides or ()) + (() if seed is None else (f"seed={seed}",))
    if explain and not dry:
        raise UsageError("--explain belongs to --dry-run")
    if dry:
        from chiasm.cli.dry_run import dry_run, training_lines
        from chiasm.train.recipe import apply_overrides

        if recipe is None or resume is not None:
            raise UsageError("--dry-run needs RECIPE, and no --resume")
        found = dry_run(apply_overrides(find_recipe(recipe)(), settings), device=device)
        print(json.dumps(found) if as_json else "\n".join(training_lines(found, explain=explain)))
        return
    path = train(
        recipe,
        overrides=settings,
        resume=resume,
        runs=runs,
        run_id=run_id,
        device=device,
        threads=threads,
        workers=workers,
        loaders=loaders,
        until=until,
    )
    if os.environ.get("RANK", "0") != "0":  # the first process speaks
        return
    if not as_json:
        print(path)
        return
    from chiasm.train.run import RunFolder

    run = RunFolder.open(path)
    rows = run.metrics()
    losses = [row for row in rows if "loss" in row]
    scores = [row["eval"] for row in rows if "eval" in row]
    result = {
        "run": str(path),
        "step": losses[-1]["step"] if losses else 0,
        "loss": losses[-1]["loss"] if losses else None,
        "scores": scores[-1] if scores else {},
    }
    print(json.dumps(result))
