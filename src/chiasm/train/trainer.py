"""The one trainer.

What: ``Trainer`` runs a ``Recipe`` in a ``RunFolder``: load, forward, backward, clip, step, measure, evaluate, save.
It is one process, or one of several that share the model (``train.parallel``); it is written for several, and alone
costs nothing.

Exact resume: nothing that a step depends on lives outside of the checkpoint, the recipe and the step number. A
checkpoint holds the feed's and the guard's state of exactly its step; augmentation, dropout and DropPath draw from
generators that are seeded anew from (seed, step, part); the learning rate is a function of the step. So a run that
was killed and resumed goes through the same numbers, to the bit, as one that was not. As seeds belong to parts of a
step and not to processes, so does a run that another number of processes continues, up to the order of additions.

Exact losses: micro-batches give sums and weights, gradients are added over parts and processes, and divided once by the
weight of the whole step.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.data.mixture import derive_seed
from chiasm.errors import CheckpointError, ChiasmError, UsageError
from chiasm.train.compute import Compute
from chiasm.train.data import open_data
from chiasm.train.feed import Feed, Loader, Step, open_feed
from chiasm.train.guard import TrainingError, Watch
from chiasm.train.meter import Sizes, memory_mib, sizes_of
from chiasm.train.objective import Loss
from chiasm.train.optim import (
    load_optimizer_tensors,
    make_optimizers,
    named_parameters,
    optimizer_tensors,
    trainable,
)
from chiasm.train.parallel import World, gathered, is_divided, shard
from chiasm.train.prepare import keep_features, prepare, require_compiler
from chiasm.train.progress import Progress
from chiasm.train.recipe import Recipe, difference, resolved
from chiasm.train.run import Checkpoint, RunFolder
from chiasm.train.writers import Writer, numbers, open_writers

__all__ = ["Result", "Trainer", "TrainingError", "build_parts", "check_workers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a call of ``Trainer.fit`` ended."""

    step: int
    finished: bool
    """False: stopped by a signal or by ``until``; a checkpoint of ``step`` is there to be resumed."""
    scores: dict[str, float]
    """The last evaluation, {} if none was made."""


def build_parts(recipe: Recipe) -> tuple[Any, nn.Module, Any]:
    """Return (source, model, objective) of a recipe; new weights are a function of its seed only."""
    source = open_data(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, "model"))
        model = recipe.model.build()
        torch.manual_seed(derive_seed(recipe.seed, "objective"))
        objective = recipe.objective.build(model, source)
    return source, prepare(model, recipe), objective


def check_workers(recipe: Recipe, workers: int, device: str | torch.device, processes: int = 1) -> None:
    """Raise UsageError unless the recipe can be computed with so many processes, and workers in each."""
    if recipe.accumulate % processes:
        raise UsageError(
            f"{processes} processes cannot share a step of {recipe.accumulate} micro-batches evenly: make them "
            f"--set accumulate={processes * math.ceil(recipe.accumulate / processes)} (recipe.batch is a multiple)"
        )
    if processes > 1 and any(group.optimizer == "muon" for group in recipe.optim.groups):
        raise UsageError(
            f"{recipe.name} trains with Muon, which needs whole matrices: use one process, or AdamW (optim.groups)"
        )
    most = 1 if processes > 1 else recipe.accumulate
    if not 1 <= workers <= most or (workers > 1 and torch.device(device).type != "cpu"):
        raise UsageError(
            f"{workers} workers on {device}: on the CPU give 1 to {most}, the micro-batches of a step "
            "(--set accumulate=N makes more); elsewhere, and beside other processes, 1"
        )


class Trainer:
    """Runs one recipe.

    Args:
        recipe: what to run.
        run: where; if it holds checkpoints, the last one is continued.
        device: where the model lives.
        workers: micro-batches of a step (``recipe.accumulate``) that are computed at once, each in a thread of its
            own. Their gradients are added in the order of the micro-batches: the result is that of one worker, to
            the bit.
        loaders: threads that read samples ahead; 0 reads when a step begins, None: as many as workers on the CPU, up
            to 8 beside a GPU. The result does not depend on it.
        world: the processes that share the run; each of them makes a Trainer. Its device replaces ``device``.
        progress: how to report; by default a bar on a terminal and plain lines elsewhere, on stderr.

    Attributes:
        model, objective, source, feed: what the recipe described.
        step: optimiser steps done.

    Raises:
        UsageError: the folder's run was started with a different recipe (the message names the first difference), or
            there are more workers than micro-batches, or workers beside a GPU; or processes that cannot share it.
        CheckpointError: the last checkpoint is damaged or of another model.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        *,
        device: str | torch.device = "cpu",
        workers: int = 1,
        loaders: int | None = None,
        world: World | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.world = world or World(device=torch.device(device))
        self.device = self.world.device
        check_workers(recipe, workers, self.device, self.world.size)
        if recipe.compile:
            require_compiler(self.device)
        changed = difference(run.info["recipe"], resolved(recipe))
        if changed:
            raise UsageError(f"{run.path} was started with another recipe ({changed[0]}): start a new run")
        self.recipe, self.run, self.workers = recipe, run, workers
        ahead = workers if self.device.type == "cpu" else min(8, os.cpu_count() or 1)
        self.loaders = ahead if loaders is None else loaders
        self.source, self.model, self.objective = build_parts(recipe)
        self.model.to(self.device)
        self.objective.to(self.device)
        if self.world.size > 1:
            shard(self.model, self.world, bfloat16=recipe.compute == "bfloat16")
        self.parameters = trainable(self.model, self.objective, recipe.optim)
        keep_features(self.model, recipe, processes=self.world.size)
        everything = named_parameters(self.model, self.objective)
        self.optimizers = make_optimizers(self.parameters, recipe.optim, everything)
        self.feed: Feed = open_feed(self.source, recipe, run)
        self.watch = Watch(recipe.guard)
        self.progress = progress or Progress(recipe.steps, sys.stderr)
        self.writers: list[Writer] = []
        self.step = 0
        self.scores: dict[str, float] = {}
        self._asked = self._stop = False
        self._feed_state = self.feed.state()
        if run.checkpoints():
            self._restore()
        elif self.world.main:
            run.rewind(0)  # what an earlier start measured before its first checkpoint

    # --- the loop ---

    def fit(self, until: int | None = None) -> Result:
        """Train up to the recipe's last step, or stop after step ``until`` (with a checkpoint) to be resumed.

        SIGTERM and SIGINT let the current step end, save, and return with ``finished=False``.

        Raises:
            TrainingError: the guard stops the run; names the step and its samples. Checkpoints stay as they are.
            CheckpointError: a checkpoint or a row of metrics could not be written; checkpoints before stay as they are.
        """
        recipe, last = self.recipe, min(until or self.recipe.steps, self.recipe.steps)
        together = f", {self.world.size} processes" if self.world.size > 1 else ""
        self._say(
            f"{recipe.name}: {sum(p.numel() for p in self.parameters.values()):,} trained parameters, "
            f"{recipe.steps} steps of {recipe.batch}, from step {self.step}, in {self.run.path}{together}"
        )
        about = getattr(self.feed, "about", None)
        if about is not None:
            self._say(about(recipe.steps))
        compute = Compute(
            recipe, self.world, self.model, self.objective, self.feed, self.parameters, self.workers
        )
        self.feed.restore(self._feed_state)  # an earlier call may have planned further
        loader = Loader(
            self.feed,
            first=self.step,
            stop=last,
            parts=self.world.parts(recipe.accumulate),
            threads=self.loaders,
        )
        with (
            torch.random.fork_rng(devices=[]),
            self._signals(),
            self._reports(),
            loader,
        ):
            steps = iter(loader)
            while self.step < last and not self._stop:
                data = self._next(steps)
                row = self._train_step(compute, data)
                self.step += 1
                self._feed_state = data.state
                if self.step % recipe.log_every == 0 or self.step == recipe.steps or "loss" not in row:
                    self._measure(row)
                if self.world.main:
                    self.progress.update(self.step, row, recipe.batch)
                if recipe.eval_every and (self.step % recipe.eval_every == 0 or self.step == recipe.steps):
                    self._evaluate()
                if self.step % recipe.save_every == 0 or self.step == recipe.steps:
                    self._save()
            finished = self.step >= recipe.steps
            if not finished:
                # Still here, for a second signal (torchrun passes Ctrl-C on) must not end the process while it saves.
                self._save()
        if not finished:
            self._say(f"stopped at step {self.step}: continue with --resume {self.run.path}")
        return Result(step=self.step, finished=finished, scores=self.scores)

    def _next(self, steps: Iterator[Step]) -> Step:
        """The next step's data; where reading fails in one process, all of them end with its error."""
        if self.world.size == 1:
            return next(steps)
        data: Step | ChiasmError
        try:
            data = next(steps)
        except ChiasmError as error:
            data = error
        for failed in self.world.share(data if isinstance(data, ChiasmError) else None):
            if failed is not None:
                raise failed
        assert isinstance(data, Step)
        return data

    def _train_step(self, compute: Compute, data: Step) -> dict[str, Any]:
        """One optimiser step; returns its row of metrics (step counted from 1)."""
        recipe, step, started, worked = self.recipe, self.step, time.perf_counter(), time.process_time()
        rate = recipe.optim.lr * recipe.schedule.factor(step, recipe.steps)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate * group["scale"]
        self.model.train()
        self.objective.train()
        parts, real = compute.whole(data)
        if not parts:
            self._say(f"step {step + 1} skipped: none of its samples can be used")
            return {"step": step + 1, "skipped": "no sample can be used"}
        denominators = compute.denominators(parts, real)
        losses = compute.run(step, parts, real, denominators)
        sizes = sum((sizes_of(part.batch) for part, there in zip(parts, real, strict=True) if there), Sizes())
        told = self.world.share((_plain(losses), sizes, self._asked))
        self._stop = any(stop for _, _, stop in told)
        sums = [loss for losses, _, _ in told for loss in losses]
        # With denominators known the sums are quotients already.
        weight = max(sum(weight for _, weight, _ in sums), 1e-12) if denominators is None else 1.0
        mean = sum(total for total, _, _ in sums) / weight
        norm = compute.finish(step, 1.0 / weight)
        complaint = self.watch.complaint(mean, norm)
        row: dict[str, Any] = {"step": step + 1}
        if complaint is not None:
            samples = compute.culprits(parts, real)
            self.watch.decide(step + 1, complaint, samples)
            self._say(f"step {step + 1} skipped: {complaint}; worst first: {', '.join(samples[:3])}")
            row |= {"skipped": complaint, "samples": samples}
        else:
            for optimizer in self.optimizers:
                optimizer.step()
            row |= {"loss": mean, "lr": rate, "grad_norm": norm} | _mean_metrics([m for _, _, m in sums])
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        row |= self._amounts(sum((sizes for _, sizes, _ in told), Sizes()), len(data.handles))
        return row | {
            "seconds": round(time.perf_counter() - started + data.waited, 4),
            "wait_seconds": round(data.waited, 4),
            "cpu_seconds": round(time.process_time() - worked, 4),
            "memory_mib": memory_mib(self.device),
        }

    @torch.no_grad()
    def _evaluate(self) -> None:
        self.model.eval()
        self.objective.eval()
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.compute == "bfloat16"),
            gathered(self.model),
        ):
            scores = self.objective.evaluate(self.model, self.source)
        if scores:
            self.scores = {name: round(float(value), 6) for name, value in scores.items()}
            self._measure({"step": self.step, "eval": self.scores})
            self._say(f"step {self.step} dev " + " ".join(f"{k} {v:.4g}" for k, v in self.scores.items()))

    def _amounts(self, sizes: Sizes, parts: int) -> dict[str, Any]:
        """What the step held, where its batches can tell."""
        if not sizes.tokens:
            return {}
        row: dict[str, Any] = {"tokens": sizes.tokens, "learned": sizes.learned, "tiles": sizes.tiles}
        row["docs"] = sizes.docs
        capacity = getattr(self.feed, "capacity", None) or {}
        for name, have in (("tokens", sizes.tokens), ("tiles", sizes.tiles)):
            if capacity.get(name):
                row["fill" if name == "tokens" else "tile_fill"] = round(have / (capacity[name] * parts), 4)
        return row

    # --- checkpoints ---

    def state_tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of model and objective: trained parameters and persistent buffers."""
        tensors: dict[str, Tensor] = {name: p.detach() for name, p in self.parameters.items()}
        for prefix, module in (("", self.model), ("objective.", self.objective)):
            buffers = {name for name, _ in module.named_buffers()}
            state = module.state_dict(keep_vars=True)
            tensors |= {prefix + name: state[name] for name in buffers if name in state}
        return tensors

    def _save(self) -> None:
        weights = {name: t.detach() for name, t in self.state_tensors().items()}
        if self.world.size == 1:
            weights = {name: t.cpu().clone() for name, t in weights.items()}
        state = {
            "samples": self.step * self.recipe.batch,
            "scores": self.scores,
            "feed": self._feed_state,
            "guard": self.watch.state(),
        }
        checkpoint = Checkpoint(
            step=self.step, weights=weights, optimizer=optimizer_tensors(self.optimizers), state=state
        )
        folder = self.run.save(checkpoint, self.world)
        if self.world.main:
            self.run.prune(keep_last=self.recipe.keep_last, keep_every=self.recipe.keep_every)
            self.run.log(f"saved {folder.name}")

    def _restore(self) -> None:
        targets = self.state_tensors()
        if self.world.size == 1:
            checkpoint = self.run.load()
        else:
            checkpoint = self.run.load_divided(lambda *facts: self._empty(targets, *facts))
        if targets.keys() != checkpoint.weights.keys():
            odd = sorted(targets.keys() ^ checkpoint.weights.keys())[0]
            raise CheckpointError(
                f"{self.run.path}: checkpoint and recipe disagree on {odd!r}: start a new run"
            )
        with torch.no_grad():
            for name, target in targets.items():
                saved = checkpoint.weights[name]
                if saved.shape != target.shape:
                    raise CheckpointError(
                        f"{name} is {tuple(saved.shape)} in the checkpoint, {tuple(target.shape)} here"
                    )
                target.copy_(saved)
        load_optimizer_tensors(self.optimizers, checkpoint.optimizer)
        self.step, self.scores = checkpoint.step, checkpoint.state.get("scores", {})
        self._feed_state = checkpoint.state.get("feed", {})
        self.feed.restore(self._feed_state)
        self.watch.restore(checkpoint.state.get("guard", {}))
        if self.world.main:
            self.run.rewind(self.step)

    def _empty(
        self, targets: dict[str, Tensor], kind: str, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """A tensor to read a checkpoint's into, divided like the parameter that it belongs to."""
        like = targets.get(name if kind == "weights" else name.rpartition("/")[0])
        if like is not None and is_divided(like) and tuple(like.shape) == shape:
            return torch.empty_like(like, dtype=dtype)
        return torch.empty(shape, dtype=dtype, device=self.device if len(shape) else "cpu")

    # --- the outside world ---

    def _say(self, line: str) -> None:
        if self.world.main:
            self.run.log(line)
            self.progress.say(line)

    def _measure(self, row: dict[str, Any]) -> None:
        if self.world.main:
            self.run.measure(row)
            for writer in self.writers:
                writer.row(row["step"], numbers(row))

    @contextmanager
    def _reports(self) -> Iterator[None]:
        """Progress and writers, of the main process."""
        if not self.world.main:
            yield
            return
        with ExitStack() as stack:
            config = resolved(self.recipe)
            self.writers = open_writers(self.recipe.writers, self.run.path, config, first=self.step + 1)
            for writer in self.writers:
                stack.callback(writer.close)
            stack.enter_context(self.progress)
            yield

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT ask for a clean stop; elsewhere than in the main thread they stay as they are."""

        def ask(number: int, frame: FrameType | None) -> None:
            self._asked = True

        self._asked = self._stop = False
        before = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                try:
                    before[number] = signal.signal(number, ask)
                except ValueError:  # not the main thread
                    break
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _plain(losses: list[Loss]) -> list[tuple[float, float, dict[str, tuple[float, float]]]]:
    """(Sum, weight, metrics) of each loss as numbers."""
    return [
        (
            float(loss.total.detach()),
            float(loss.weight),
            {name: (float(total), float(count)) for name, (total, count) in loss.metrics.items()},
        )
        for loss in losses
    ]


def _mean_metrics(metrics: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Merge the (sum, count) metrics of micro-batches into means; a metric that counted nothing is left out."""
    sums: dict[str, list[float]] = {}
    for one in metrics:
        for name, (total, count) in one.items():
            into = sums.setdefault(name, [0.0, 0.0])
            into[0] += total
            into[1] += count
    return {name: total / count for name, (total, count) in sums.items() if count}
