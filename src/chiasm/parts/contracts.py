"""The contracts between the parts of a causal multimodal model.

Five different systems were built on them first (`tests/contracts`); what they had to learn is in
`docs/architecture.md`. They lie at the bottom of the parts ring because the parts implement them.

    Sequence --Embedder--> rows --Trunk--> hidden --Head--> loss | emission --Embedder--> …

Anything that fits here is trained by the one trainer and generates through the one loop.
Legend: T rows of all documents, C width, N live documents (one row each), V vocabulary, K codes of one step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from chiasm.data.sequence import Sequence
from chiasm.nn.attention import KVCache, Segments


@runtime_checkable
class Pick(Protocol):
    """Chooses ids from logits. The generation loop owns sampling; a head may call it often in one step."""

    def __call__(self, logits_V: Tensor, doc: int) -> int:
        """One id from float32 logits (V,) of this document."""
        ...

    def rows(self, logits_NV: Tensor, docs: list[int]) -> list[int]:
        """One id from each row, (N, V) float32, row n being of document `docs[n]`: the same as one by one, sooner."""
        ...


Layers = list[tuple[Tensor, Tensor]]
"""Keys and values, (G, S, D) each, of one document in every layer of a stack."""


@dataclass(frozen=True, slots=True)
class Past:
    """What a model remembers of one document, taken out of any batch: `ModelCache.take`, `ModelCache.put`."""

    trunk: Layers
    embed: Layers | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all keys and values."""
        layers = self.trunk + (self.embed or [])
        return sum(x.numel() * x.element_size() for pair in layers for x in pair)


@dataclass(slots=True)
class ModelCache:
    """All that a model remembers of the documents it is writing.

    `trunk` is the decoder's; `embed` belongs to an embedder that runs causal layers of its own (HoVLE), whose
    lengths may differ from the trunk's.
    """

    trunk: KVCache
    embed: KVCache | None = None
    state: dict[int, Any] = field(default_factory=dict)
    """A head's own memory by document (a place inside an image grid)."""

    def view(self, slots: list[int]) -> ModelCache:
        """The same memory for a pass over some documents only, which are its rows 0, 1, …"""
        embed = None if self.embed is None else self.embed.view(slots)
        return ModelCache(self.trunk.view(slots), embed, self.state)

    def resize(self, keep: list[int], slots: int, capacity: int | None = None) -> None:
        """The documents `keep` as rows 0, 1, … of a cache for `slots` of `capacity` rows (see `KVCache.resize`)."""
        self.trunk.resize(keep, slots, capacity)
        if self.embed is not None:
            self.embed.resize(keep, slots)

    def restart(self, slot: int) -> None:
        """Forget what was read of one document; a head's memory of it stays."""
        self.trunk.restart(slot)
        if self.embed is not None:
            self.embed.restart(slot)

    def take(self, slot: int) -> Past:
        """A copy of what was read of one document."""
        return Past(self.trunk.take(slot), None if self.embed is None else self.embed.take(slot))

    def put(self, slot: int, past: Past, rows: int, own_rows: int) -> None:
        """Begin the document of an empty row with the first `rows` (in the embedder `own_rows`) of `past`."""
        self.trunk.put(slot, past.trunk, rows)
        if self.embed is not None and past.embed is not None:
            self.embed.put(slot, past.embed, own_rows)


@dataclass(frozen=True, slots=True)
class LossPart:
    """A summed loss, its denominator, and how much it counts beside other parts."""

    total: Tensor
    weight: Tensor
    scale: float = 1.0

    @property
    def mean(self) -> Tensor:
        """Total / weight; 0 (with a graph) where nothing is supervised."""
        return self.total / self.weight.clamp_min(1e-12)


@dataclass(frozen=True, slots=True)
class LossParts:
    """The parts of a loss by name (text, codes, masks, …), each with its own denominator.

    Numerators and denominators stay apart so that accumulation and data parallel can be exact.
    """

    parts: dict[str, LossPart]

    @property
    def mean(self) -> Tensor:
        """Σ scale · total / weight: what is minimised."""
        return torch.stack([p.scale * p.mean for p in self.parts.values()]).sum()

    @property
    def logs(self) -> dict[str, float]:
        """Mean of every part, for the log."""
        return {name: float(p.mean.detach()) for name, p in self.parts.items()}


@dataclass(frozen=True, slots=True)
class Embedded:
    """Rows for the trunk, and dense features by medium that a head may read (per-point features for masks)."""

    x_TC: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Emission:
    """What one step of a head gave for N documents.

    ids: a text token id per document, or None where it emitted codes. codes: K codes per document, or None.
    next: the rows to read next, one for each document in the same order (positions filled in by the loop).
    """

    ids: list[int | None]
    next: Sequence
    codes: list[list[int] | None] = field(default_factory=list)


class Embedder(Protocol):
    """Sequence -> (T, C). May run layers of its own, with its own cache; documents must not see each other.

    An embedder with a cache has `new_cache(slots)`. Where it spends several of its own rows on one of the sequence, it
    also has `own_rows(sequence)`, their numbers (T,) int64, so that the past of a prompt can be cut in both at once.
    """

    def __call__(self, sequence: Sequence, cache: ModelCache | None = None) -> Embedded:
        """See the class."""
        ...


class Trunk(Protocol):
    """(T, C) -> (T, C), causal within each document; may route rows by `kind_T`."""

    def __call__(
        self, x_TC: Tensor, *, kind_T: Tensor, segments: Segments, pos_T: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        """See the class."""
        ...

    def new_cache(self, slots: int = 1, *, capacity: int = 0) -> KVCache:
        """An empty cache for `slots` documents."""
        ...


class Head(Protocol):
    """Reads hidden states: a training loss over a whole sequence, or the next emission of N documents.

    A head with a state of its own also has `begin(prompts, cache)`, called once before the first step: it fills
    `cache.state[document]` from the prompts.
    """

    def loss(self, hidden_TC: Tensor, sequence: Sequence, features: dict[str, Tensor]) -> LossParts:
        """Training loss of a whole (packed) sequence."""
        ...

    def step(self, hidden_NC: Tensor, docs: list[int], pick: Pick, cache: ModelCache) -> Emission:
        """What N documents, one row each, emit next."""
        ...
