"""From logits to a token: penalties, temperature, top-k, top-p, each a pure function on one row.

Order of operations, as users of other tools expect it: repetition penalty, then (greedy ends here) temperature,
top-k, top-p, draw. Every request owns a generator, so what it draws does not depend on its neighbours in a batch.
Legend: V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from chiasm.errors import ConfigError, NumericsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is chosen. temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be finite and >= 0 (0 is greedy), found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], found {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be >= 0 (0 switches it off), found {self.top_k}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(
                f"repetition_penalty must be finite and > 0 (1 switches it off), found {self.repetition_penalty}"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


def penalize_repetition(logits_V: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of the token ids in `seen` by `penalty` (CTRL, 1909.05858)."""
    if penalty == 1.0 or seen.numel() == 0:
        return logits_V
    score = logits_V[seen]
    score = torch.where(score > 0, score / penalty, score * penalty)
    return logits_V.index_copy(0, seen, score)


def keep_top_k(logits_V: Tensor, k: int) -> Tensor:
    """All but the k largest logits become -inf (ties with the k-th stay)."""
    if k <= 0 or k >= logits_V.shape[-1]:
        return logits_V
    return logits_V.masked_fill(logits_V < logits_V.topk(k).values[-1], float("-inf"))


def keep_top_p(logits_V: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches p (at least one)."""
    if p >= 1.0:
        return logits_V
    ordered, order = logits_V.sort(descending=True)
    probability = ordered.softmax(-1)
    drop = probability.cumsum(-1) - probability >= p  # mass *before* the token already reaches p
    return logits_V.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), float("-inf"))


def choose(logits_V: Tensor, sampling: Sampling, seen: Tensor, generator: torch.Generator) -> int:
    """One token id from float32 logits (V,); `seen` are the unique ids of prompt and answer so far.

    Raises NumericsError when there is NaN among the logits.
    """
    if math.isnan(float(logits_V.max())):
        raise NumericsError(
            "the model's output is not a number: its activations passed the range of their dtype; load it with dtype "
            "bfloat16 or float32, and without quantize"
        )
    logits_V = penalize_repetition(logits_V, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return int(logits_V.argmax())
    logits_V = (logits_V - logits_V.max()) / sampling.temperature  # a tiny temperature must not overflow
    logits_V = keep_top_p(keep_top_k(logits_V, sampling.top_k), sampling.top_p)
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator))
