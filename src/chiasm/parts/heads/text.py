"""TextHead: logits over the vocabulary, and the next-token loss that never materialises them all.

Legend: T rows, C width, N rows asked for, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextHead(nn.Module):
    """One (V, C) matrix; `weight` may be the word table's own parameter (tied)."""

    def __init__(self, vocab_size: int, width: int, *, tied: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width)) if tied is None else tied

    def logits(self, hidden_NC: Tensor) -> Tensor:
        """(N, C) -> (N, V) float32."""
        return F.linear(hidden_NC, self.weight).float()
