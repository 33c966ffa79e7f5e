"""What a step held and what it took: sizes of batches, memory.

What: ``Sizes`` and ``sizes_of`` (anything else than a ``Sequence`` counts nothing), ``memory_mib``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from chiasm.data.sequence import IGNORE, Sequence

__all__ = ["Sizes", "memory_mib", "sizes_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Counts of one or more batches.

    Attributes:
        docs: documents. tokens: positions. learned: those with a label. tiles: media items (tiles, frames).
    """

    docs: int = 0
    tokens: int = 0
    learned: int = 0
    tiles: int = 0

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(
            docs=self.docs + other.docs,
            tokens=self.tokens + other.tokens,
            learned=self.learned + other.learned,
            tiles=self.tiles + other.tiles,
        )


def sizes_of(batch: Any) -> Sizes:
    """Return the counts of a batch that is still on the CPU."""
    if not isinstance(batch, Sequence):
        return Sizes()
    return Sizes(
        docs=batch.docs,
        tokens=len(batch),
        learned=0 if batch.labels_T is None else int((batch.labels_T != IGNORE).sum()),
        tiles=sum(len(media) for media in batch.media.values()),
    )


def memory_mib(device: torch.device) -> float | None:
    """Return the peak so far, in MiB: allocated on a GPU, else resident in this process; None where unknown."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
