"""What the five skeletons share: tiny sizes, and documents built by hand.

A skeleton is a system reduced to what it asks of the contracts: untrained, a few thousand parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from chiasm.data.sequence import IGNORE, MediaBatch, Sequence, Span
from chiasm.model.causal import CausalVLM
from chiasm.parts.language.config import LanguageConfig

VOCAB, WIDTH = 37, 16
LANGUAGE = LanguageConfig(
    family="llama",
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
)


@dataclass(frozen=True)
class Skeleton:
    """build() -> an initialised model; documents(train) -> sequences of one document each, unequal lengths."""

    name: str
    build: Callable[[], CausalVLM]
    documents: Callable[[bool], list[Sequence]]
    limit: int = 7


def initialise(model: nn.Module, seed: int = 0) -> CausalVLM:
    """Normal(0, 0.3) everywhere: large enough that every path matters to the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(1)
    assert isinstance(model, CausalVLM)
    return model.double().eval()


def document(
    rows: list[int | tuple[str, int, int, int]],
    media: dict[str, MediaBatch],
    *,
    train: bool,
    group: int = -1,
    ignore: tuple[int, ...] = (),
) -> Sequence:
    """One document from text ids and (medium, kind, rows, items) spans; every text id after row 0 is a label."""
    ids: list[int] = []
    kinds: list[int] = []
    spans: list[Span] = []
    used: dict[str, int] = {}
    for row in rows:
        if isinstance(row, int):
            ids.append(row)
            kinds.append(0)
            continue
        name, kind, length, items = row
        first = used.get(name, 0)
        spans.append(
            Span(
                media=name,
                start=len(ids),
                length=length,
                first=first,
                items=items,
                key=f"{id(media)}{first}",
                group=group,
            )
        )
        used[name] = first + items
        ids += [0] * length
        kinds += [kind] * length
    T = len(ids)
    labels = torch.full((T,), IGNORE, dtype=torch.int64)
    for t in range(T - 1):
        if kinds[t + 1] == 0 and ids[t + 1] not in ignore:
            labels[t] = ids[t + 1]
    return Sequence(
        ids_T=torch.tensor(ids),
        kind_T=torch.tensor(kinds, dtype=torch.int8),
        doc_T=torch.zeros(T, dtype=torch.int32),
        pos_T=torch.arange(T, dtype=torch.float32),
        labels_T=labels if train else None,
        weight_T=torch.ones(T) if train else None,
        spans=tuple(spans),
        media=media,
    )


def extend(prompt: Sequence, rows: Sequence) -> Sequence:
    """The document with more rows behind it."""
    both = Sequence.pack([prompt, rows])
    return replace(
        both, doc_T=torch.zeros_like(both.doc_T), pos_T=torch.arange(len(both), dtype=torch.float32)
    )


def noise(*shape: int, seed: int) -> torch.Tensor:
    """uint8 pixels."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
