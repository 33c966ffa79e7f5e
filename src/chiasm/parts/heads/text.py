"""TextHead: logits over the vocabulary, the next-token loss that never materialises them all, one step of writing.

Legend: T rows, C width, N documents (one row each), V rows of the vocabulary, U of them in use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.data.sequence import Sequence
from chiasm.errors import DataError
from chiasm.nn.losses import cross_entropy
from chiasm.nn.quant import RoundedLinear
from chiasm.parts.contracts import Emission, LossPart, LossParts, ModelCache, Pick


class TextHead(nn.Module):
    """One (V, C) matrix; `weight` may be the word table's own parameter (tied).

    Public models round their tables up to a size that hardware likes. The rows after the tokenizer's last id are
    padding: no token is written from them and they are no logits, but training sees them, as their makers' did.
    """

    def __init__(self, vocab_size: int, width: int, *, tied: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width)) if tied is None else tied
        self.used: int | None = None
        """Leading rows that tokens have (U); None means all. Loaders set it from the tokenizer."""
        self.rounded: RoundedLinear | None = None
        """(N, C) -> (N, U) with rounded weights, in the place of `weight` (see `chiasm.model.quantize`)."""

    def logits(self, hidden_NC: Tensor) -> Tensor:
        """(N, C) -> (N, U) float32."""
        if self.rounded is not None:
            return self.rounded(hidden_NC.to(self.rounded.device)).float()
        return F.linear(hidden_NC.to(self.weight.device), self.weight[: self.used]).float()

    def loss(
        self, hidden_TC: Tensor, sequence: Sequence, features: dict[str, Tensor] | None = None
    ) -> LossParts:
        """Weighted cross-entropy of the rows that carry a label.

        Raises DataError when the sequence has no labels.
        """
        if sequence.labels_T is None:
            raise DataError("this sequence carries no labels: lay it out with train=True")
        weight_T = sequence.weight_T
        if weight_T is None:
            weight_T = torch.ones(len(sequence), device=hidden_TC.device)
        if self.rounded is not None:
            raise DataError("a head with rounded weights has no loss: load the model without quantize")
        total, weight = cross_entropy(hidden_TC, self.weight, sequence.labels_T, weight_T)
        return LossParts({"text": LossPart(total, weight)})

    def step(self, hidden_NC: Tensor, docs: list[int], pick: Pick, cache: ModelCache) -> Emission:
        """One token for every document."""
        ids = pick.rows(self.logits(hidden_NC), docs)
        return Emission(ids=list(ids), next=Sequence.of_rows(ids))
