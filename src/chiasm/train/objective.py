"""Objective: what a trainer minimises.

What: the protocol ``Objective`` and its result ``Loss``. An objective is an ``nn.Module`` beside the model; it may
own parameters of its own (distillation heads), which the trainer trains under the names ``objective.*`` and which
are thrown away afterwards.

A loss is a *sum* with its *weight* (images, supervised tokens, …), not a mean. Sums add up over micro-batches, packed
documents and processes, so that every way of dividing one step gives the same gradient.

A loss of several parts, each with a weight of its own (text, codes, masks), is a sum of quotients. Its gradient is
exact only if the whole step's weights are known before the first backward pass; an objective that can tell them from
the batches alone does so in ``denominators``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from chiasm.parts.contracts import LossPart
from chiasm.train.data import Source

__all__ = ["Loss", "Objective"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One micro-batch: ``total / weight`` is its mean loss.

    Attributes:
        total: scalar with a graph, the weighted sum over the micro-batch.
        weight: what ``total`` must be divided by to be a mean.
        metrics: name -> (sum, count), for the log only.
        parts: the parts of a loss that has several; ``total / weight`` is then what stands for them where their
            denominators are not known ahead.
    """

    total: Tensor
    weight: Tensor | float
    metrics: dict[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)
    parts: dict[str, LossPart] = field(default_factory=dict)


class Objective(nn.Module):
    """Base of objectives."""

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        """Return the loss of one micro-batch, already on the model's device."""
        raise NotImplementedError

    def denominators(self, model: nn.Module, batch: Any) -> dict[str, float] | None:
        """Return the weight of each part of the loss that ``loss`` will give for this batch, without the model's work.

        None: there is one part only, or the weights are not known ahead; the parts of micro-batches are then averaged
        as if they weighed the same.
        """
        return None

    def document_losses(self, model: nn.Module, batch: Any) -> Tensor | None:
        """Return the mean loss of each document of a batch on the model's device, to name the worst; None: unknown.

        Called in eval mode without gradients.
        """
        return None

    def evaluate(self, model: nn.Module, source: Source) -> dict[str, float]:
        """Return scores on the source's dev split, higher or lower as their names say; {} when there are none.

        Called in eval mode without gradients. It must draw no random numbers that training depends on.
        """
        return {}
