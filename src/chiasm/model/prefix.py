"""Prefix cache: keys and values of prompts that were read, so that a common beginning is not read again.

The second question about a picture begins like the first: same system message, same picture, other words. So does
the next turn of a conversation. What was read of a prompt and its answer is kept here, and a new prompt starts with
the longest beginning that it shares with one of them.

Two rows are the same when their token, kind and position are, and, inside a span of media, the whole span: where it
begins, how long it is, its content key, its times, and where its group begins. Spans without a key are like no other.
A cut never falls inside a span, nor inside a group of spans (later frames of a video may be encoded with a view of
earlier ones), and at least one row of the prompt remains, for the head to read.

A row is four or more int64 numbers, and two prompts are compared by one numpy expression. Entries are few (a gigabyte
holds 25 conversations of 3,400 rows of a model of 1B), so a prompt is compared with each of them, in less time than
reading a single row takes there. It is exact, and has no blocks that would decide where a beginning may
end, as a chain of hashes has.

Legend: T rows of a prompt, W numbers a row.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from chiasm.data.sequence import Sequence, Span
from chiasm.errors import ConfigError
from chiasm.nn.rope import Rope
from chiasm.parts.contracts import Past
from chiasm.parts.embed import weights_version

__all__ = ["Found", "PrefixCache", "Rows", "steady_length"]

_unique = itertools.count()


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a document, as they are compared.

    Attributes:
        codes: (W, T) int64; equal columns are equal rows.
        closed: [start, end) of every span and group, in order: no cut inside.
        own: (T + 1,) rows that the embedder has of its own before each of these; None where they are as many.
    """

    codes: np.ndarray
    closed: tuple[tuple[int, int], ...] = ()
    own: np.ndarray | None = None

    def __len__(self) -> int:
        return self.codes.shape[1]

    @classmethod
    def of(cls, sequence: Sequence, own_T: torch.Tensor | None = None) -> Rows:
        """The rows of a document; `own_T` are the embedder's own for each, where they differ."""
        sequence = sequence.to("cpu")
        position = (
            (sequence.pos_T if sequence.pos_T.dim() > 1 else sequence.pos_T[:, None]).float().contiguous()
        )
        bits = position.view(torch.int32).numpy().astype(np.int64).T
        token = sequence.ids_T.numpy().astype(np.int64) * 8 + sequence.kind_T.numpy()
        content = np.zeros((2, len(sequence)), dtype=np.int64)
        groups: dict[tuple[str, int], tuple[int, int]] = {}
        closed = []
        for span in sequence.spans:
            begin, end = span.start, span.start + span.length
            if span.group >= 0:
                begin = groups.get((span.media, span.group), (begin, 0))[0]
                groups[span.media, span.group] = begin, end
            closed.append((span.start, end))
            content[:, span.start : end] = _content(sequence, span, begin)[:, None]
        own = None if own_T is None else np.concatenate(([0], own_T.cpu().numpy().cumsum()))
        return cls(
            np.concatenate((token[None], content, bits)), tuple(sorted({*closed, *groups.values()})), own
        )

    def then_text(self, ids: list[int]) -> Rows:
        """These rows and, behind them, a text of these tokens."""
        text = Sequence.of_text(ids)
        more = Rows.of(replace(text, pos_T=text.pos_T + self._end))
        codes = np.concatenate((self.codes, self._as_wide(more.codes)), axis=1)
        own = (
            None
            if self.own is None
            else np.concatenate((self.own, self.own[-1] + 1 + np.arange(len(ids), dtype=np.int64)))
        )
        return Rows(codes, self.closed, own)

    @property
    def _end(self) -> float:
        """Position behind the last row: the generation loop goes on from the largest."""
        bits = self.codes[3:].astype(np.int32)
        return float(bits.view(np.float32).max()) + 1 if len(self) else 0.0

    def _as_wide(self, codes: np.ndarray) -> np.ndarray:
        """Rows with one position as rows with as many as these have."""
        axes = self.codes.shape[0] - 3
        return np.concatenate((codes[:3], np.repeat(codes[3:], axes, axis=0)))

    def common(self, other: Rows) -> int:
        """Length of the longest beginning that both share and that may be cut off in both."""
        n = min(len(self), len(other))
        if self.codes.shape[0] != other.codes.shape[0]:
            return 0
        differ = (self.codes[:, :n] != other.codes[:, :n]).any(axis=0)
        return self.cut(other, int(differ.argmax()) if differ.any() else n)

    def cut(self, other: Rows, at: int) -> int:
        """The last place up to `at` that is inside no span or group of either."""
        for start, end in sorted({*self.closed, *other.closed}, reverse=True):
            if start < at < end:  # latest first: where it moves to may lie in one that began earlier
                at = start
        return at


def _content(sequence: Sequence, span: Span, begin: int) -> np.ndarray:
    """Two numbers that say what a span is: 128 bits of a hash, so that no two are taken for one."""
    times = sequence.media[span.media].times_N
    when = None if times is None else times[span.first : span.first + span.items].tolist()
    key = span.key or next(_unique)
    facts = repr((span.media, span.start, span.length, span.items, key, when, begin, span.group < 0))
    return np.frombuffer(hashlib.blake2b(facts.encode(), digest_size=16).digest(), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Found:
    """A past to begin with: its first `rows` rows, in the embedder's own cache `own_rows`."""

    past: Past
    rows: int
    own_rows: int


@dataclass(slots=True, eq=False)
class _Entry:
    rows: Rows
    past: Past
    bytes: int


class PrefixCache:
    """Least recently used beginnings of prompts, bounded in bytes.

    It belongs to one model, and forgets everything when it sees other weights or versions of them than before (what is
    written behind PyTorch's back, by `parameter.data`, it does not see: `clear` it then). Entries lie where the model
    lies; each is a copy of its own, so that a long picture asked about in ten ways is kept ten times, within the bound.
    Reuse changes last bits (the rest of a prompt is read in a smaller matrix product), nothing else. Several threads
    may use it.

    Args:
        max_bytes: of keys, values and the rows that they are found by; 0 remembers nothing.
        min_rows: a shorter common beginning is read again, bit-equal to a first reading.

    Attributes:
        hits: prompts that began with a remembered past. rows_reused: rows that were not read for it.
        bytes: held now.
    """

    def __init__(self, max_bytes: int = 1 << 30, *, min_rows: int = 64) -> None:
        if max_bytes < 0:
            raise ConfigError(f"prefix cache size must be >= 0 bytes, found {max_bytes}")
        if min_rows < 1:
            raise ConfigError(f"prefix cache min_rows must be at least 1, found {min_rows}")
        self.max_bytes, self.min_rows = max_bytes, min_rows
        self.hits = self.rows_reused = self.bytes = 0
        self._entries: list[_Entry] = []  # least recently used first
        self._lock = threading.Lock()
        self._model: weakref.ref[nn.Module] | None = None
        self._weights = 0

    def __len__(self) -> int:
        return len(self._entries)

    def bind(self, model: nn.Module) -> None:
        """Belong to this model with its weights of now; ConfigError when it belongs to another that is still in use."""
        owner = None if self._model is None else self._model()
        if owner is not None and owner is not model:
            raise ConfigError("a prefix cache holds the past of one model: give every model one of its own")
        weights = weights_version(model)
        if owner is None or weights != self._weights:
            self.clear()
            self._model, self._weights = weakref.ref(model), weights

    def find(self, rows: Rows) -> Found | None:
        """The longest remembered beginning of a prompt that leaves at least its last row to be read."""
        with self._lock:
            best, length = None, 0
            for entry in self._entries:
                if min(len(entry.rows), len(rows) - 1) > length:
                    n = rows.common(entry.rows)
                    n = n if n < len(rows) else rows.cut(entry.rows, len(rows) - 1)
                    if n > length:
                        best, length = entry, n
            if best is None or length < self.min_rows:
                return None
            self._entries.remove(best)
            self._entries.append(best)
            self.hits += 1
            self.rows_reused += length
            own = best.rows.own
            return Found(best.past, length, length if own is None else int(own[length]))

    def put(self, rows: Rows, take: Callable[[], Past]) -> None:
        """Remember a document; `take` copies its past and is called only if that is worth it.

        Nothing is stored where an entry already begins like it to its end; entries that are beginnings of it go.
        """
        if len(rows) < self.min_rows or not self.max_bytes:
            return
        with self._lock:
            for entry in self._entries:
                if len(entry.rows) >= len(rows) and _begins(entry.rows, rows):
                    self._entries.remove(entry)
                    self._entries.append(entry)
                    return
        past = take()
        size = past.bytes + rows.codes.nbytes + (0 if rows.own is None else rows.own.nbytes)
        if size > self.max_bytes:
            return
        with self._lock:
            shorter = [e for e in self._entries if len(e.rows) <= len(rows) and _begins(rows, e.rows)]
            for entry in shorter:
                self._drop(entry)
            self._entries.append(_Entry(rows, past, size))
            self.bytes += size
            while self.bytes > self.max_bytes:
                self._drop(self._entries[0])

    def clear(self) -> None:
        """Forget everything (the counters stay)."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0

    def _drop(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        self.bytes -= entry.bytes


def _begins(longer: Rows, shorter: Rows) -> bool:
    """Whether the longer one begins with all of the shorter one."""
    return longer.codes.shape[0] == shorter.codes.shape[0] and np.array_equal(
        longer.codes[:, : len(shorter)], shorter.codes
    )


def steady_length(model: nn.Module) -> int | None:
    """Rows up to which the rotations of a document do not depend on its length; None where they never do.

    Keys of a longer document of rotary kind `dynamic` or `longrope` were turned by other frequencies than those of
    its own beginning read alone, so that neither serves the other. Stacks of an embedder count, too.
    """
    limits = []
    for module in model.modules():
        rope = getattr(module, "rope", None)
        if isinstance(rope, Rope) and rope.kind in ("dynamic", "longrope"):
            limits.append(rope.max_positions if rope.switch is None else rope.switch)
    return min(limits, default=None)
