"""CausalVLM: embedder, trunk and head put together; nothing here knows which system it is.

Legend: T rows of all documents, C width.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chiasm.data.sequence import Sequence
from chiasm.errors import ConfigError
from chiasm.nn.quant import STAYS
from chiasm.parts.contracts import Embedded, LossParts, ModelCache


class CausalVLM(nn.Module):
    """A multimodal causal model made of three parts (see `chiasm.parts.contracts`).

    Args:
        embedder: Sequence -> rows. An embedder with causal layers of its own also has `new_cache(slots)`.
        trunk: rows -> hidden states.
        head: hidden states -> loss or emission.
    """

    def __init__(self, embedder: nn.Module, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.embedder, self.trunk, self.head = embedder, trunk, head
        self.quantized: str | None = None
        """How its weights have been rounded, see `chiasm.model.quantize`."""
        self.static: bool | Literal["compile"] | None = None
        """Whether passes that only decode have fixed shapes (`chiasm.model.static`); None: on CUDA devices.

        "compile" fuses their kernels first, which takes long and pays for long answers only.
        """

    @property
    def device(self) -> torch.device:
        """Where the embedder's weights are, and sequences go."""
        return next(itertools.chain(self.embedder.parameters(), self.trunk.parameters())).device

    def _apply(self, fn: Any, recurse: bool = True) -> CausalVLM:
        if self.quantized:  # before any of the parts is moved
            raise ConfigError(STAYS)
        return super()._apply(fn, recurse)

    def new_cache(self, slots: int = 1, *, capacity: int = 0) -> ModelCache:
        """An empty memory for `slots` documents; `capacity` tokens are allocated at once when given."""
        own = getattr(self.embedder, "new_cache", None)
        return ModelCache(
            trunk=self.trunk.new_cache(slots, capacity=capacity),  # type: ignore[operator]
            embed=own(slots) if own else None,
        )

    def hidden(self, sequence: Sequence, cache: ModelCache | None = None) -> Tensor:
        """(T, C) final hidden states; with a cache, documents are its rows 0, 1, … and continue their past."""
        return self._trunk(self.embedder(sequence, cache), sequence, cache)

    def loss(self, sequence: Sequence) -> LossParts:
        """Training loss of a (packed) sequence that carries labels."""
        sequence = sequence.to(self.device)
        embedded = self.embedder(sequence)
        return self.head.loss(self._trunk(embedded, sequence), sequence, embedded.features)  # type: ignore[operator]

    def document_losses(self, sequence: Sequence) -> Tensor:
        """(docs,) float32: the mean loss of every document of a packed sequence, from one pass."""
        sequence = sequence.to(self.device)
        embedded = self.embedder(sequence)
        hidden = self._trunk(embedded, sequence).split(sequence.segments().lengths)
        losses = [
            self.head.loss(rows_TC, document, embedded.features).mean  # type: ignore[operator]
            for rows_TC, document in zip(hidden, sequence.split(), strict=True)
        ]
        return torch.stack(losses).float()

    def _trunk(self, embedded: Embedded, sequence: Sequence, cache: ModelCache | None = None) -> Tensor:
        return self.trunk(
            embedded.x_TC,
            kind_T=sequence.kind_T,
            segments=sequence.segments(),
            pos_T=sequence.pos_T,
            cache=None if cache is None else cache.trunk,
        )

    def forward(self, sequence: Sequence) -> Tensor:
        """Alias of `hidden` without a cache, so that wrappers which call modules work."""
        return self.hidden(sequence)
