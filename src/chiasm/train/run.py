"""The run folder: everything a run leaves on disk, and how it is found again.

What: ``RunFolder``. Layout of ``runs/<id>/``:
  ``run.json``        recipe reference, overrides, resolved recipe, versions, git revision, machine
  ``metrics.jsonl``   one JSON object a line, flushed: training steps ``{"step", "loss", …}`` and evaluations
                      ``{"step", "eval": {…}}``
  ``log.txt``         what was said
  ``step-000123/``    a checkpoint after 123 steps: ``weights.safetensors`` (what is trained, and buffers),
                      ``optimizer.safetensors``, ``state.json``; of several processes, folders ``weights`` and
                      ``optimizer`` with a file of each (``train.shards``), which one process reads as well

A checkpoint is written into a temporary folder, flushed to the disk and renamed, so whatever carries the name
``step-…`` is whole. No random state is stored: all randomness of step s is seeded from (seed, s).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from chiasm.errors import CheckpointError, UsageError
from chiasm.train import shards
from chiasm.train.parallel import World
from chiasm.train.recipe import Recipe, resolved

__all__ = ["CLOCKS", "Checkpoint", "RunFolder", "environment"]

CLOCKS = ("seconds", "cpu_seconds", "wait_seconds", "memory_mib")
"""What a row of metrics says about the machine; all else in it is the same whenever the run is repeated."""

_STEP = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The contents of one checkpoint; ``step`` optimiser steps are done."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


class RunFolder:
    """One run on disk. Make it with ``create`` or ``open``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics_path = path / "metrics.jsonl"

    @classmethod
    def create(
        cls,
        root: str | Path,
        recipe: Recipe,
        *,
        run_id: str | None = None,
        reference: str = "",
        overrides: tuple[str, ...] = (),
    ) -> RunFolder:
        """Make ``root/<id>`` and write its run.json.

        Args:
            root: folder of runs; made if absent.
            recipe: what will be run.
            run_id: name of the run; by default the recipe's name and the time.
            reference: how the recipe was named (``internvl/debug``, ``./mine.py:run``), for ``--resume``.
            overrides: the ``--set`` settings that were applied, for ``--resume``.

        Raises:
            UsageError: the run exists already, or its folder cannot be made.
        """
        path = Path(root) / (run_id or f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        if (path / "run.json").exists():
            raise UsageError(f"{path} exists: continue it with --resume {path}, or choose another --id")
        content = {
            "reference": reference,
            "overrides": list(overrides),
            "recipe": resolved(recipe),
            "environment": environment(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        try:
            path.mkdir(parents=True, exist_ok=True)
            _write_atomic(path / "run.json", json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise UsageError(
                f"{path} cannot be made ({error.strerror}): name another folder of runs, --runs FOLDER"
            ) from error
        return cls(path)

    def discard(self) -> None:
        """Take back a run that nothing was written to; what else is in its folder stays."""
        if not self.checkpoints():
            (self.path / "run.json").unlink(missing_ok=True)
            with suppress(OSError):
                self.path.rmdir()

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open an existing run.

        Raises:
            UsageError: there is no run.json.
        """
        path = Path(path)
        if not (path / "run.json").is_file():
            raise UsageError(
                f"{path} is not a run folder (no run.json): give the folder that `chiasm train` printed"
            )
        return cls(path)

    @property
    def info(self) -> dict[str, Any]:
        """The content of run.json."""
        return json.loads((self.path / "run.json").read_text())

    # --- what is said and measured ---

    def log(self, line: str) -> None:
        """Append one line, with the time, to log.txt; CheckpointError where it cannot be written."""
        self._append("log.txt", f"{time.strftime('%H:%M:%S')} {line}\n")

    def measure(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl and hand it to the operating system; CheckpointError as `log`."""
        self._append("metrics.jsonl", json.dumps(row) + "\n")

    def _append(self, name: str, text: str) -> None:
        try:
            with (self.path / name).open("a") as out:
                out.write(text)
        except OSError as error:
            raise CheckpointError(
                f"{self.path / name} cannot be written ({error.strerror}); {self._intact()}: make room, then --resume"
            ) from error

    def _intact(self) -> str:
        have = self.checkpoints()
        return f"the checkpoint of step {have[-1]} is intact" if have else "there is no checkpoint yet"

    def metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl; a last line torn by a crash is left out."""
        if not self._metrics_path.is_file():
            return []
        rows = []
        for line in self._metrics_path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def rewind(self, step: int) -> None:
        """Drop the metrics of steps after ``step``: they will be measured again."""
        if not self._metrics_path.is_file():
            return
        kept = [row for row in self.metrics() if row["step"] <= step]
        _write_atomic(self._metrics_path, "".join(json.dumps(row) + "\n" for row in kept))

    # --- checkpoints ---

    def checkpoints(self) -> list[int]:
        """Return the steps of whole checkpoints, ascending."""
        found = (_STEP.fullmatch(p.name) for p in self.path.iterdir() if p.is_dir())
        return sorted(int(m.group(1)) for m in found if m)

    def folder(self, step: int) -> Path:
        """Return the folder of the checkpoint after ``step`` steps."""
        return self.path / f"step-{step:06d}"

    def save(self, checkpoint: Checkpoint, world: World | None = None) -> Path:
        """Write a checkpoint atomically and return its folder; one that exists for this step stays as it is.

        With several processes each of them calls this and writes its part of the tensors, which may be divided.

        Raises:
            CheckpointError: it could not be written; nothing is left of it, and all others are as they were.
        """
        world = world or World()
        final = self.folder(checkpoint.step)
        partial = self.path / f".partial-{checkpoint.step}"
        if world.tell(final.exists()):
            return final

        def begin() -> None:
            if world.main:
                for left in self.path.glob(".partial-*"):  # of a run that was killed while saving
                    shutil.rmtree(left)
                partial.mkdir()

        def fill() -> None:
            for name, tensors in (("weights", checkpoint.weights), ("optimizer", checkpoint.optimizer)):
                if world.size > 1:
                    shards.write(partial / name, tensors)
                else:
                    save_file(
                        {k: v.contiguous() for k, v in tensors.items()}, partial / f"{name}.safetensors"
                    )

        def finish() -> None:
            if world.main:
                content = {"step": checkpoint.step} | checkpoint.state
                (partial / "state.json").write_text(json.dumps(content, indent=1) + "\n")
                for file in (*partial.rglob("*"), partial):
                    _sync(file)
                os.rename(partial, final)
                _sync(self.path)

        for work in (begin, fill, finish):
            failed = None
            try:
                work()
            except (OSError, SafetensorError) as error:
                failed = " ".join(str(error).split())
            reasons = [reason for reason in world.share(failed) if reason]
            if reasons:
                if world.main:
                    shutil.rmtree(partial, ignore_errors=True)
                raise CheckpointError(
                    f"{self.path}: the checkpoint of step {checkpoint.step} could not be written ({reasons[0]}); "
                    f"{self._intact()}: make room, then --resume"
                )
        return final

    def _folder_of(self, step: int | None) -> Path:
        steps = self.checkpoints()
        if not steps or (step is not None and step not in steps):
            have = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(
                f"{self.path} has no checkpoint{'' if step is None else f' of step {step}'} (has: {have})"
            )
        return self.folder(steps[-1] if step is None else step)

    def load(self, step: int | None = None) -> Checkpoint:
        """Read the checkpoint after ``step`` steps, by default the last one, whole, however many processes wrote it.

        Raises:
            CheckpointError: there is none, or a file of it is missing or damaged.
        """
        folder = self._folder_of(step)
        with _damage(folder):
            state = json.loads((folder / "state.json").read_text())
            weights, optimizer = (
                shards.read_whole(folder / name)
                if (folder / name).is_dir()
                else load_file(folder / f"{name}.safetensors")
                for name in ("weights", "optimizer")
            )
        return Checkpoint(step=state["step"], weights=weights, optimizer=optimizer, state=state)

    def load_divided(self, empty: Callable[[str, str, tuple[int, ...], torch.dtype], Tensor]) -> Checkpoint:
        """Read the last checkpoint into divided tensors: each process its part, all at the same time.

        Args:
            empty: (``weights`` or ``optimizer``, name, whole shape, dtype) -> the tensor to fill.

        Raises:
            CheckpointError: as `load`.
        """
        folder = self._folder_of(None)
        with _damage(folder):
            state = json.loads((folder / "state.json").read_text())
            read: dict[str, dict[str, Tensor]] = {}
            for kind in ("weights", "optimizer"):
                # Of one process there are two files side by side, whose names do not clash.
                where = folder / kind if (folder / kind).is_dir() else folder
                known = shards.sizes(where)
                if where is folder:
                    with safe_open(folder / f"{kind}.safetensors", framework="pt") as file:
                        known = {name: known[name] for name in file.keys()}  # noqa: SIM118  # not a mapping
                into = {name: empty(kind, name, *facts) for name, facts in known.items()}
                shards.read(where, into, together=True)
                read[kind] = into
        return Checkpoint(step=state["step"], state=state, **read)

    def prune(self, *, keep_last: int, keep_every: int) -> None:
        """Delete checkpoints that are neither among the last ``keep_last`` nor at a multiple of ``keep_every``."""
        for step in self.checkpoints()[:-keep_last]:
            if not keep_every or step % keep_every:
                # Renamed first: killed half-way, none that lacks files must be left under a checkpoint's name.
                going = self.path / f".partial-{step}"
                shutil.rmtree(going, ignore_errors=True)
                os.rename(self.folder(step), going)
                shutil.rmtree(going)


@contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """Say in one line that a checkpoint cannot be read."""
    try:
        yield
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder} is damaged ({reason}): delete it to resume from the one before"
        ) from error


def environment() -> dict[str, Any]:
    """Return versions, machine and git revision: what a loss curve depends on beside its recipe."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        "versions": {
            name: version(name)
            for name in ("chiasm", "torch", "numpy", "safetensors", "tokenizers", "pillow")
        },
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": _cpu_flags(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git": _git_revision(),
    }


def _cpu_flags() -> str | None:
    """A short digest of the processor's model and instruction sets (Linux): kernels are chosen by them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    facts = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return hashlib.blake2s("\n".join(sorted(facts)).encode(), digest_size=6).hexdigest() if facts else None


def _git_revision() -> str | None:
    """The revision of the source tree, with ``+changes`` if files differ; None outside of a repository."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision = git("rev-parse", "HEAD")
    if revision is None:
        return None
    return revision + ("+changes" if git("status", "--porcelain", "--untracked-files=no", "--", ".") else "")


def _write_atomic(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk; folders cannot be opened for this on Windows."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
