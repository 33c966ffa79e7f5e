"""Objective: what a trainer minimises.

What: the protocol ``Objective`` and its result ``Loss``. An objective is an ``nn.Module`` beside the model; it may
own parameters of its own (distillation heads), which the trainer trains under the names ``objective.*`` and which
are thrown away afterwards.

A loss is a *sum* with its *weight* (images, supervised tokens, …), not a mean. Sums add up over micro-batches, packed
documents and, later, processes, so that every way of dividing one step gives the same gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from chiasm.train.data import Source

__all__ = ["Loss", "Objective"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One micro-batch: ``total / weight`` is its mean loss.

    Attributes:
        total: scalar with a graph, the weighted sum over the micro-batch.
        weight: what ``total`` must be divided by to be a mean.
        metrics: name -> (sum, count), for the log only.
    """

    total: Tensor
    weight: Tensor | float
    metrics: dict[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)


class Objective(nn.Module):
    """Base of objectives."""

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        """Return the loss of one micro-batch, already on the model's device."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, source: Source) -> dict[str, float]:
        """Return scores on the source's dev split, higher or lower as their names say; {} when there are none.

        Called in eval mode without gradients. It must draw no random numbers that training depends on.
        """
        return {}
