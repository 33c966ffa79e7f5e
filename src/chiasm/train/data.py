"""Source: the protocol of a training set made of named families, which a trainer reads by index.

What: ``Source``, and ``open_data``, which opens the one of a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from chiasm.data.mixture import Draw

if TYPE_CHECKING:
    from chiasm.train.recipe import Recipe

__all__ = ["Source", "open_data"]


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


def open_data(recipe: Recipe) -> Any:
    """Open the source of a recipe; data that are laid out for a model (``open_for``) are told the recipe's model node.

    Raises:
        DataError: files are missing; the message says which, or what to set.
    """
    opener = getattr(recipe.data, "open_for", None)
    return recipe.data.open() if opener is None else opener(recipe.model)
