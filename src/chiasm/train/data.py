"""Source: the protocol of a training set made of named families, which a trainer reads by index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from chiasm.data.mixture import Draw

__all__ = ["Source"]


@runtime_checkable
class Source(Protocol):
    """A training set: families of samples that can be read by index.

    ``fetch`` may augment; all its randomness must come from the generator it is given.
    """

    @property
    def sizes(self) -> Mapping[str, int]:
        """Family -> number of training samples."""
        ...

    @property
    def weights(self) -> Mapping[str, float]:
        """Family -> relative share of the draws; a family that is absent or 0 is never drawn."""
        ...

    def fetch(self, draws: Sequence[Draw], random: torch.Generator) -> Any:
        """Return one batch (with a method ``to(device)``) of these samples, on the CPU."""
        ...
