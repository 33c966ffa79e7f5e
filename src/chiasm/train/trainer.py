"""The one trainer.

What: ``Trainer`` runs a ``Recipe`` in a ``RunFolder``: sample, forward, backward, clip, step, measure, evaluate,
save. Single process.

Exact resume: nothing that a step depends on lives outside of the checkpoint, the recipe and the step number. Samples
come from the stateless ``Mixture``; augmentation, dropout and DropPath draw from generators that are seeded anew for
every step from (seed, step); the learning rate is a function of the step. So a run that was killed and resumed goes
through the same numbers, to the bit, as one that was not.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.data.mixture import Draw, Mixture, derive_seed, generator
from chiasm.errors import CheckpointError, ChiasmError, UsageError
from chiasm.train.objective import Loss
from chiasm.train.optim import load_optimizer_tensors, make_optimizers, optimizer_tensors, trainable
from chiasm.train.progress import Progress
from chiasm.train.recipe import Recipe, difference, resolved
from chiasm.train.run import Checkpoint, RunFolder

__all__ = ["Result", "Trainer", "TrainingError", "build_parts", "check_workers"]


class TrainingError(ChiasmError):
    """The run cannot go on: the loss or the gradient is not a number."""


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
    source = recipe.data.open()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, "model"))
        model = recipe.model.build()
        torch.manual_seed(derive_seed(recipe.seed, "objective"))
        objective = recipe.objective.build(model, source)
    return source, model, objective


def check_workers(recipe: Recipe, workers: int, device: str | torch.device) -> None:
    """Raise UsageError unless so many micro-batches of the recipe can be computed at once on that device."""
    if not 1 <= workers <= recipe.accumulate or (workers > 1 and torch.device(device).type != "cpu"):
        raise UsageError(
            f"{workers} workers on {device}: on the CPU give 1 to {recipe.accumulate}, the micro-batches of a step "
            "(--set accumulate=N makes more); elsewhere 1"
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
        progress: how to report; by default a bar on a terminal and plain lines elsewhere, on stderr.

    Attributes:
        model, objective, source: what the recipe described.
        step: optimiser steps done.

    Raises:
        UsageError: the folder's run was started with a different recipe (the message names the first difference), or
            there are more workers than micro-batches, or workers beside a GPU.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        *,
        device: str | torch.device = "cpu",
        workers: int = 1,
        progress: Progress | None = None,
    ) -> None:
        check_workers(recipe, workers, device)
        changed = difference(run.info["recipe"], resolved(recipe))
        if changed:
            raise UsageError(f"{run.path} was started with another recipe ({changed[0]}): start a new run")
        self.recipe, self.run, self.device, self.workers = recipe, run, torch.device(device), workers
        self.source, self.model, self.objective = build_parts(recipe)
        self.model.to(self.device)
        self.objective.to(self.device)
        self.parameters = trainable(self.model, self.objective, recipe.optim)
        self.optimizers = make_optimizers(self.parameters, recipe.optim)
        self.mixture = Mixture(self.source.sizes, self.source.weights, batch=recipe.batch, seed=recipe.seed)
        self.progress = progress or Progress(recipe.steps, sys.stderr)
        self.step = 0
        self.scores: dict[str, float] = {}
        self._stop = False
        if run.checkpoints():
            self._restore(run.load())

    # --- the loop ---

    def fit(self, until: int | None = None) -> Result:
        """Train up to the recipe's last step, or stop after step ``until`` (with a checkpoint) to be resumed.

        SIGTERM and SIGINT let the current step end, save, and return with ``finished=False``.

        Raises:
            TrainingError: loss or gradient norm is not finite; names the step. Checkpoints stay as they are.
        """
        recipe, last = self.recipe, min(until or self.recipe.steps, self.recipe.steps)
        self._say(
            f"{recipe.name}: {sum(p.numel() for p in self.parameters.values()):,} trained parameters, "
            f"{recipe.steps} steps of {recipe.batch}, from step {self.step}, in {self.run.path}"
        )
        passes = self.mixture.epochs(recipe.steps)
        self._say("passes over the data: " + ", ".join(f"{name} {n:.3g}" for name, n in passes.items()))
        with torch.random.fork_rng(devices=[]), self._signals(), self.progress:
            while self.step < last and not self._stop:
                row = self._train_step()
                self.step += 1
                if self.step % recipe.log_every == 0 or self.step == recipe.steps:
                    self.run.measure(row)
                self.progress.update(self.step, row, recipe.batch)
                if recipe.eval_every and (self.step % recipe.eval_every == 0 or self.step == recipe.steps):
                    self._evaluate()
                if self.step % recipe.save_every == 0 or self.step == recipe.steps:
                    self._save()
        finished = self.step >= recipe.steps
        if not finished:
            self._save()
            self._say(f"stopped at step {self.step}: continue with --resume {self.run.path}")
        return Result(step=self.step, finished=finished, scores=self.scores)

    def _train_step(self) -> dict[str, Any]:
        """One optimiser step; returns its row of metrics (step counted from 1)."""
        recipe, step, started, worked = self.recipe, self.step, time.perf_counter(), time.process_time()
        rate = recipe.optim.lr * recipe.schedule.factor(step, recipe.steps)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate * group["scale"]
        self.model.train()
        self.objective.train()
        draws = self.mixture.batch_indices(step)
        losses = self._together(draws) if self.workers > 1 else self._in_turn(draws)
        weight = max(sum(float(loss.weight) for loss in losses), 1e-12)
        mean = sum(float(loss.total.detach()) for loss in losses) / weight
        norm = self._finish_gradients(1.0 / weight)
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise TrainingError(
                f"step {step + 1}: loss {mean:g}, gradient norm {norm:g}; lower optim.lr or look at its samples, "
                f"for example {draws[0][0]} {draws[0][1]}"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        row = {"step": step + 1, "loss": mean, "lr": rate, "grad_norm": norm} | _mean_metrics(losses)
        return row | {
            "seconds": round(time.perf_counter() - started, 4),
            "cpu_seconds": round(time.process_time() - worked, 4),
        }

    def _in_turn(self, draws: list[Draw]) -> list[Loss]:
        """Add the gradients of the micro-batches, one after the other."""
        losses = []
        for part in range(self.recipe.accumulate):
            # Dropout and DropPath draw from the global generators: the only reason why they are seeded here.
            torch.manual_seed(derive_seed(self.recipe.seed, "step", self.step, part))
            loss = self._loss(draws, part)
            loss.total.backward()
            losses.append(loss)
        return losses

    def _together(self, draws: list[Draw]) -> list[Loss]:
        """Like ``_in_turn``, in threads: none touches a shared gradient, and the sums are made in order afterwards."""
        parameters = list(self.parameters.values())

        def part_of(part: int) -> tuple[Loss, tuple[Tensor | None, ...]]:
            loss = self._loss(draws, part)
            return loss, torch.autograd.grad(loss.total, parameters, allow_unused=True)

        torch.manual_seed(derive_seed(self.recipe.seed, "step", self.step, 0))
        state, versions = torch.get_rng_state(), self._buffer_versions()
        with ThreadPoolExecutor(self.workers) as pool:
            done = list(pool.map(part_of, range(self.recipe.accumulate)))
        if not torch.equal(state, torch.get_rng_state()) or versions != self._buffer_versions():
            raise TrainingError(
                f"{self.recipe.name} draws random numbers or keeps statistics while it trains (dropout, DropPath, "
                "BatchNorm), in an order that threads would change: use one worker"
            )
        for parameter, *parts in zip(parameters, *(gradients for _, gradients in done), strict=True):
            there = [gradient for gradient in parts if gradient is not None]
            # The first may be shared with the graph's buffers (an expanded view): accumulate into a copy.
            parameter.grad = there[0].clone(memory_format=torch.contiguous_format) if there else None
            for gradient in there[1:]:
                parameter.grad.add_(gradient)  # type: ignore[union-attr]
        return [loss for loss, _ in done]

    def _buffer_versions(self) -> list[int]:
        """How often each buffer was written in place."""
        return [b._version for module in (self.model, self.objective) for b in module.buffers()]

    def _loss(self, draws: list[Draw], part: int) -> Loss:
        """Return the loss of one micro-batch of the step."""
        recipe = self.recipe
        size = recipe.batch // recipe.accumulate
        batch = self.source.fetch(
            draws[part * size : (part + 1) * size], generator(recipe.seed, "augment", self.step, part)
        ).to(self.device)
        # Autocast keeps its casts of weights in one cache for all threads, which any thread that leaves empties: with
        # it, in which precision the gradients of a weight used twice are added would depend on the other threads.
        with torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=recipe.compute == "bfloat16",
            cache_enabled=self.device.type != "cpu",
        ):
            return self.objective.loss(self.model, batch)

    def _finish_gradients(self, scale: float) -> float:
        """Turn the gradient of the sum into that of the mean, clip it, and return its norm before clipping."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not gradients:
            raise TrainingError(
                f"step {self.step + 1}: no trained parameter received a gradient; look at optim.freeze"
            )
        for gradient in gradients:
            gradient.mul_(scale)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.recipe.optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.recipe.optim.clip, norm)
        return float(norm)

    @torch.no_grad()
    def _evaluate(self) -> None:
        self.model.eval()
        self.objective.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.compute == "bfloat16"):
            scores = self.objective.evaluate(self.model, self.source)
        if scores:
            self.scores = {name: round(float(value), 6) for name, value in scores.items()}
            self.run.measure({"step": self.step, "eval": self.scores})
            self._say(f"step {self.step} dev " + " ".join(f"{k} {v:.4g}" for k, v in self.scores.items()))

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
        weights = {name: t.detach().cpu().clone() for name, t in self.state_tensors().items()}
        state = {"samples": self.step * self.recipe.batch, "scores": self.scores}
        checkpoint = Checkpoint(
            step=self.step, weights=weights, optimizer=optimizer_tensors(self.optimizers), state=state
        )
        folder = self.run.save(checkpoint)
        self.run.prune(keep_last=self.recipe.keep_last, keep_every=self.recipe.keep_every)
        self.run.log(f"saved {folder.name}")

    def _restore(self, checkpoint: Checkpoint) -> None:
        targets = self.state_tensors()
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
        self.run.rewind(self.step)

    # --- the outside world ---

    def _say(self, line: str) -> None:
        self.run.log(line)
        self.progress.say(line)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT ask for a clean stop; elsewhere than in the main thread they stay as they are."""

        def ask(number: int, frame: FrameType | None) -> None:
            self._stop = True

        self._stop = False
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


def _mean_metrics(losses: list[Loss]) -> dict[str, float]:
    """Merge the (sum, count) metrics of micro-batches into means; a metric that counted nothing is left out."""
    sums: dict[str, list[float]] = {}
    for loss in losses:
        for name, (total, count) in loss.metrics.items():
            into = sums.setdefault(name, [0.0, 0.0])
            into[0] += float(total)
            into[1] += float(count)
    return {name: total / count for name, (total, count) in sums.items() if count}
