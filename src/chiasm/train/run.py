"""The run folder: everything a run leaves on disk, and how it is found again.

What: ``RunFolder``. Layout of ``runs/<id>/``:
  ``run.json``        recipe reference, overrides, resolved recipe, versions, git revision, machine
  ``metrics.jsonl``   one JSON object a line, flushed: training steps ``{"step", "loss", …}`` and evaluations
                      ``{"step", "eval": {…}}``
  ``log.txt``         what was said
  ``step-000123/``    a checkpoint after 123 steps: ``weights.safetensors`` (what is trained, and buffers),
                      ``optimizer.safetensors``, ``state.json``

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
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from chiasm.errors import CheckpointError, UsageError
from chiasm.train.recipe import Recipe, resolved

__all__ = ["Checkpoint", "RunFolder", "environment"]

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
            UsageError: the run exists already.
        """
        path = Path(root) / (run_id or f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        if (path / "run.json").exists():
            raise UsageError(f"{path} exists: continue it with --resume {path}, or choose another --id")
        path.mkdir(parents=True, exist_ok=True)
        content = {
            "reference": reference,
            "overrides": list(overrides),
            "recipe": resolved(recipe),
            "environment": environment(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        _write_atomic(path / "run.json", json.dumps(content, indent=1) + "\n")
        return cls(path)

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
        """Append one line, with the time, to log.txt."""
        with (self.path / "log.txt").open("a") as out:
            out.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    def measure(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl and hand it to the operating system."""
        with self._metrics_path.open("a") as out:
            out.write(json.dumps(row) + "\n")

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

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint atomically and return its folder; one that exists for this step stays as it is."""
        final = self.folder(checkpoint.step)
        if final.exists():
            return final
        for left in self.path.glob(".partial-*"):  # of a run that was killed while saving
            shutil.rmtree(left)
        partial = self.path / f".partial-{checkpoint.step}-{os.getpid()}"
        partial.mkdir()
        save_file({k: v.contiguous() for k, v in checkpoint.weights.items()}, partial / "weights.safetensors")
        save_file(
            {k: v.contiguous() for k, v in checkpoint.optimizer.items()}, partial / "optimizer.safetensors"
        )
        (partial / "state.json").write_text(
            json.dumps({"step": checkpoint.step} | checkpoint.state, indent=1) + "\n"
        )
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        os.rename(partial, final)
        _sync(self.path)
        return final

    def load(self, step: int | None = None) -> Checkpoint:
        """Read the checkpoint after ``step`` steps, by default the last one.

        Raises:
            CheckpointError: there is none, or a file of it is missing or damaged.
        """
        steps = self.checkpoints()
        if not steps or (step is not None and step not in steps):
            have = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(
                f"{self.path} has no checkpoint{'' if step is None else f' of step {step}'} (has: {have})"
            )
        folder = self.folder(steps[-1] if step is None else step)
        try:
            state = json.loads((folder / "state.json").read_text())
            weights = load_file(folder / "weights.safetensors")
            optimizer = load_file(folder / "optimizer.safetensors")
        except (OSError, json.JSONDecodeError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} is damaged ({error}): delete it to resume from the one before"
            ) from error
        return Checkpoint(step=state["step"], weights=weights, optimizer=optimizer, state=state)

    def prune(self, *, keep_last: int, keep_every: int) -> None:
        """Delete checkpoints that are neither among the last ``keep_last`` nor at a multiple of ``keep_every``."""
        for step in self.checkpoints()[:-keep_last]:
            if not keep_every or step % keep_every:
                shutil.rmtree(self.folder(step))


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
