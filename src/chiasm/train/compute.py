"""What a step computes: gradients of its parts, in turn or in threads, exact over processes; and who spoiled it.

What: ``Compute``, between the loop (``train.trainer``) and the objective. It knows nothing of optimisers, schedules
and files.

Sums and weights stay apart until ``finish`` divides by the weight of the whole step, so that every way of dividing a
step into parts and processes gives the same gradient.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor, nn

from chiasm.data.mixture import derive_seed
from chiasm.train.feed import Feed, Part, Step
from chiasm.train.guard import TrainingError
from chiasm.train.objective import Loss, Objective
from chiasm.train.parallel import World, add_replicated, clip_by, gathered, total_norm
from chiasm.train.recipe import Recipe

__all__ = ["Compute"]


class Compute:
    """Computes the steps of one process.

    Args:
        recipe: its seed, dtype and clipping are read.
        world: the processes that share the step.
        model, objective: on the world's device, the model divided where there are several processes.
        feed: of the recipe, for names, and for a part of another process where this one's holds nothing.
        parameters: trained ones, by name.
        workers: parts computed at once, in threads.
    """

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        model: nn.Module,
        objective: Objective,
        feed: Feed,
        parameters: dict[str, nn.Parameter],
        workers: int = 1,
    ) -> None:
        self.recipe, self.world, self.device = recipe, world, world.device
        self.model, self.objective, self.feed = model, objective, feed
        self.parameters, self.workers = parameters, workers
        self._barren = 0

    def whole(self, data: Step) -> tuple[list[Part], list[bool]]:
        """The parts to compute, and which of them count.

        Alone, those that hold anything. Processes that share layers compute equally many, so one whose part holds
        nothing computes a part that another one counts, times zero.
        """
        there = [part for part in data.parts if part.batch is not None]
        told = self.world.share([part.number for part in there])
        missing = max(map(len, told)) - len(there)
        if missing:
            number = next(number for numbers in told for number in numbers)
            handle = data.handles[number]
            batch = self.feed.load(handle, step=data.step, part=number)
            if batch is None:
                raise TrainingError(
                    f"step {data.step + 1}: part {number} can be read in one process and not in another"
                )
            there += [Part(number=number, handle=handle, batch=batch)] * missing
        return there, [i < len(there) - missing for i in range(len(there))]

    def denominators(self, parts: list[Part], real: list[bool]) -> dict[str, float] | None:
        """The whole step's weight of each part of the loss, where it has several and they are known ahead."""
        own: dict[str, float] | None = {}
        for part, there in zip(parts, real, strict=True):
            known = self.objective.denominators(self.model, part.batch)
            if known is None:
                own = None
                break
            for name, weight in known.items():
                own[name] = own.get(name, 0.0) + (weight if there else 0.0)
        told = self.world.share(own)
        if any(one is None for one in told):
            return None
        names = {name for one in told for name in one}
        return {name: sum(one.get(name, 0.0) for one in told) for name in names} if len(names) > 1 else None

    def run(
        self, step: int, parts: list[Part], real: list[bool], denominators: dict[str, float] | None
    ) -> list[Loss]:
        """Leave the summed gradients of all parts in the parameters, and return the parts' losses."""
        if self.workers > 1:
            return self._together(step, parts, denominators)
        return self._in_turn(step, parts, real, denominators)

    def _in_turn(
        self, step: int, parts: list[Part], real: list[bool], denominators: dict[str, float] | None
    ) -> list[Loss]:
        """Add the gradients of the micro-batches, one after the other."""
        losses, versions = [], self._buffer_versions()
        for part, there in zip(parts, real, strict=True):
            # Dropout and DropPath draw from the global generators: the only reason why they are seeded here.
            torch.manual_seed(derive_seed(self.recipe.seed, "step", step, part.number))
            loss = self._loss(part, denominators)
            if not there:
                loss = Loss(total=0.0 * loss.total, weight=0.0)
            if loss.total.requires_grad:  # not where only the projector is trained and there are no pictures
                loss.total.backward()
            losses.append(loss)
        if self.world.size > 1:
            add_replicated(self.objective.parameters(), self.world)
            if versions != self._buffer_versions():
                raise TrainingError(
                    f"{self.recipe.name} keeps statistics while it trains (BatchNorm), which processes do not share: "
                    "use one process"
                )
        return losses

    def _together(self, step: int, parts: list[Part], denominators: dict[str, float] | None) -> list[Loss]:
        """Like ``_in_turn``, in threads: none touches a shared gradient, and the sums are made in order afterwards."""
        parameters = list(self.parameters.values())

        def part_of(part: Part) -> tuple[Loss, tuple[Tensor | None, ...]]:
            loss = self._loss(part, denominators)
            if not loss.total.requires_grad:
                return loss, (None,) * len(parameters)
            return loss, torch.autograd.grad(loss.total, parameters, allow_unused=True)

        torch.manual_seed(derive_seed(self.recipe.seed, "step", step, 0))
        state, versions = torch.get_rng_state(), self._buffer_versions()
        with ThreadPoolExecutor(self.workers) as pool:
            done = list(pool.map(part_of, parts))
        if not torch.equal(state, torch.get_rng_state()) or versions != self._buffer_versions():
            raise TrainingError(
                f"{self.recipe.name} draws random numbers or keeps statistics while it trains (dropout, DropPath, "
                "BatchNorm), in an order that threads would change: use one worker"
            )
        for parameter, *gradients in zip(parameters, *(gradients for _, gradients in done), strict=True):
            there = [gradient for gradient in gradients if gradient is not None]
            # The first may be shared with the graph's buffers (an expanded view): accumulate into a copy.
            parameter.grad = there[0].clone(memory_format=torch.contiguous_format) if there else None
            for gradient in there[1:]:
                parameter.grad.add_(gradient)  # type: ignore[union-attr]
        return [loss for loss, _ in done]

    def _buffer_versions(self) -> list[int]:
        """How often each buffer was written in place."""
        return [b._version for module in (self.model, self.objective) for b in module.buffers()]

    def _loss(self, part: Part, denominators: dict[str, float] | None = None) -> Loss:
        """Return the loss of one micro-batch of the step."""
        assert part.batch is not None
        batch = part.batch.to(self.device)
        with self.autocast():
            loss = self.objective.loss(self.model, batch)
        if denominators is None:
            return loss
        shares = [p.scale * p.total / max(denominators[name], 1e-12) for name, p in loss.parts.items()]
        return replace(loss, total=torch.stack(shares).sum())

    def autocast(self) -> torch.autocast:
        """Compute in the recipe's dtype within."""
        # Autocast keeps its casts of weights in one cache for all threads, which any thread that leaves empties: with
        # it, in which precision the gradients of a weight used twice are added would depend on the other threads.
        return torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.recipe.compute == "bfloat16",
            cache_enabled=self.device.type != "cpu",
        )

    def finish(self, step: int, scale: float) -> float:
        """Turn the gradient of the sum into that of the mean, clip it, and return its norm before clipping."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not gradients:
            # A step of text alone teaches a projector nothing. Ten in a row are no accident.
            self._barren += 1
            if self._barren >= 10:
                raise TrainingError(
                    f"step {step + 1}: for ten steps no trained parameter has received a gradient; look at "
                    "optim.train and optim.freeze"
                )
            for parameter in self.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            return 0.0
        self._barren = 0
        for gradient in gradients:
            gradient.mul_(scale)
        norm = total_norm(gradients)
        if self.recipe.optim.clip is not None:
            clip_by(self.parameters.values(), self.recipe.optim.clip, norm)
        return float(norm)

    @torch.no_grad()
    def culprits(self, parts: list[Part], real: list[bool]) -> list[str]:
        """The step's samples with their losses, worst first: computed again, by document where the objective can."""
        self.model.eval()
        self.objective.eval()
        found: list[tuple[float, str]] = []
        for part, there in zip(parts, real, strict=True):
            names = self.feed.names(part.handle)
            assert part.batch is not None
            with self.autocast(), gathered(self.model):
                each = self.objective.document_losses(self.model, part.batch.to(self.device))
                by_document = each is not None and len(each) == len(names)
                # What one process computes once more, all do: they share the layers.
                if not all(self.world.share(by_document)):
                    loss = self.objective.loss(self.model, part.batch.to(self.device))
                if each is None or not by_document:
                    mean = float(loss.total) / max(float(loss.weight), 1e-12)
                    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                    each, names = (
                        torch.tensor([mean]),
                        [f"{names[0]}{more}" if names else f"part {part.number}"],
                    )
            if there:
                found += zip(each.tolist(), names, strict=True)
        found = [pair for pairs in self.world.share(found) for pair in pairs]
        found.sort(key=lambda pair: -math.inf if math.isnan(pair[0]) else -pair[0])
        return [f"{name} (loss {loss:.4g})" for loss, name in found[:5]]
