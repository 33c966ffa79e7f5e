"""The word table, and media features computed once and remembered by content.

An embedder of the InternVL kind looks every id up in the word table and overwrites the rows of media spans with
encoded features. Encoding dominates the time to the first token, so features are kept under the content hash of
their span: a second question about the same picture, another candidate answer, the rejected half of a preference
pair, all skip the encoder.
Legend: T rows, C width of the language model, N media items, K rows an item.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.data.sequence import Sequence, Span
from chiasm.errors import ConfigError


class WordTable(nn.Module):
    """(V, C) input embedding. A plain parameter, so that a head may share it."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, ids_T: Tensor) -> Tensor:
        """(T,) ids -> (T, C)."""
        return F.embedding(ids_T, self.weight)


def weights_version(module: nn.Module) -> int:
    """A number that changes when weights are replaced or written to (but not through `parameter.data`)."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return hash(tuple((x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors))


class FeatureCache:
    """Least-recently-used features by content key, bounded in bytes. `hits` and `misses` count spans.

    May be used by several threads at once.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        if max_bytes < 0:
            raise ConfigError(f"feature cache size must be >= 0 bytes, found {max_bytes}")
        self.max_bytes = max_bytes
        self.hits = self.misses = self.bytes = 0
        self._store: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.RLock()
        self._weights: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, as one of a whole model brings about, is empty and of the same size."""
        return FeatureCache, (self.max_bytes,)

    def bind(self, encoder: nn.Module) -> None:
        """Belong to these weights as they are now: what others have encoded is forgotten."""
        weights = weights_version(encoder)
        with self._lock:
            if weights != self._weights:
                if self._weights is not None:
                    self.clear()
                self._weights = weights

    def get(self, key: str) -> Tensor | None:
        """Features stored under this key, or None; counts a hit or a miss."""
        with self._lock:
            found = self._store.get(key) if key else None
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._store.move_to_end(key)
            return found

    def put(self, key: str, features: Tensor) -> None:
        """Store features, dropping the least recently used until they fit."""
        size = features.numel() * features.element_size()
        with self._lock:
            if not key or size > self.max_bytes or key in self._store:
                return
            self._store[key] = features
            self.bytes += size
            while self.bytes > self.max_bytes:
                _, old = self._store.popitem(last=False)
                self.bytes -= old.numel() * old.element_size()

    def clear(self) -> None:
        """Forget everything (the counters stay)."""
        with self._lock:
            self._store.clear()
            self.bytes = 0


def encode_spans(
    sequence: Sequence,
    media: str | tuple[str, ...],
    encode: Callable[[Tensor], Tensor],
    cache: FeatureCache | None = None,
    *,
    max_items: int = 16,
) -> list[tuple[Span, Tensor]]:
    """Features of every span of one medium, or of several that are encoded alike.

    Without a cache (training) every item of these media is encoded, also one that no span stands for: such items
    (`Sequence.padded`) keep the number of calls of the encoder the same in every batch, and the encoder in the graph
    of a batch that shows nothing. They reach no row, so their gradient is zero. Of a batch without any span, one
    empty span of no rows carries the graph.

    Args:
        encode: raw items (N, …) -> (N, K, C).
        cache: looked up and filled when given (inference only: cached features carry no gradient).
        max_items: items encoded at once, which bounds the memory of many-tile images; all spans together
            without a cache, each span on its own with one.

    Returns:
        (span, (span.length, C)) in span order, medium by medium. Several equal spans are encoded once.
    """
    names = [name for name in ((media,) if isinstance(media, str) else media) if name in sequence.media]
    spans = [span for name in names for span in sequence.spans_of(name)]
    if cache is None:
        if not names:
            return []
        data = [sequence.media[name].data for name in names]
        firsts = dict(zip(names, itertools.accumulate(map(len, data), initial=0), strict=False))
        items = torch.cat(data) if len(data) > 1 else data[0]
        encoded = torch.cat([encode(part) for part in items.split(max_items)])
        if not spans:
            return [(Span(media=names[0], start=0, length=0, first=0, items=0), encoded[:0].flatten(0, 1))]
        places = [(span, firsts[span.media] + span.first) for span in spans]
        return [(s, encoded[first : first + s.items].flatten(0, 1)) for s, first in places]
    # Each span on its own: what is remembered must not depend, in its last bits, on what stood beside it.
    done: dict[str, Tensor] = {}
    out = []
    for span in spans:
        features = done.get(span.key) if span.key in done else cache.get(span.key)
        if features is None:
            items = sequence.media[span.media].data[span.first : span.first + span.items]
            features = torch.cat([encode(part) for part in items.split(max_items)]).flatten(0, 1)
            cache.put(span.key, features)
        if span.key:
            done[span.key] = features
        out.append((span, features))
    return out


def overwrite_rows(x_TC: Tensor, features: list[tuple[Span, Tensor]]) -> Tensor:
    """Rows of each span replaced by its features (differentiable in both)."""
    if not features:
        return x_TC
    rows = torch.cat([torch.arange(s.start, s.start + s.length) for s, _ in features]).to(x_TC.device)
    return x_TC.index_copy(0, rows, torch.cat([f for _, f in features]).to(x_TC.dtype))
