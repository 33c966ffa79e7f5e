"""Sequence: what a model reads. The heart of the house.

One flat row of T positions (never padded), possibly several documents one after the other, and beside it the
media that some positions stand for. It is built without running any model, so that packer, planner, linter,
server and trainer agree on every token count. Pixels stay uint8 until they reach the device.

Legend: T positions, N media items (tiles, frames, code groups) of one batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from chiasm.errors import DataError
from chiasm.nn.attention import Segments
from chiasm.nn.losses import IGNORE, Count, token_weights

__all__ = [
    "CODES",
    "IGNORE",
    "IMAGE",
    "POINTS",
    "TEXT",
    "VIDEO",
    "MediaBatch",
    "Sequence",
    "Span",
]

TEXT, IMAGE, VIDEO, POINTS, CODES = range(5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Positions [start, start + length) stand for items [first, first + items) of `media[name]`.

    Where items are encoded several times, their rows are length = repeats * items * K; in which order they lie is the
    model's to know (`chiasm.data.layout.LayoutSpec.repeat_order`).
    """

    media: str
    start: int
    length: int
    first: int
    items: int
    key: str = ""
    """Content hash of these items together: features computed from them may be cached under it."""
    group: int = -1
    """Spans of one group (>= 0) are one temporal sequence: the frames of a video, the repeats of an image."""
    repeats: int = 1
    """How often each item is encoded. Features depend on it, and on the earlier spans of a group: `key` is of the
    items alone."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise DataError(f"a span's repeats must be at least 1, found {self.repeats}")

    def shifted(self, rows: int, items: int, groups: int = 0) -> Span:
        """The same span in a sequence that begins `rows`, `items` and `groups` further on."""
        return replace(
            self,
            start=self.start + rows,
            first=self.first + items,
            group=self.group if self.group < 0 else self.group + groups,
        )


@dataclass(frozen=True, slots=True)
class MediaBatch:
    """Raw media of one kind: `data` (N, …), uint8 pixels (N, 3, S, S) for images, points, code groups, …

    `times_N` are seconds, where items are moments: float64 (single precision knows a thousandth of a second for two
    hours only), and always on the CPU, where they decide which items are encoded together and how.
    """

    data: Tensor
    times_N: Tensor | None = None

    def __post_init__(self) -> None:
        if self.times_N is not None and self.times_N.shape != self.data.shape[:1]:
            raise DataError(f"media has {len(self)} items but {self.times_N.numel()} time stamps")

    def to(self, device: torch.device | str) -> MediaBatch:
        """On another device; the times stay."""
        return MediaBatch(self.data.to(device), self.times_N)

    def items(self, low: int, high: int) -> MediaBatch:
        """Items low … high - 1."""
        return MediaBatch(self.data[low:high], None if self.times_N is None else self.times_N[low:high])

    @classmethod
    def join(cls, batches: Seq[MediaBatch]) -> MediaBatch:
        """One batch of all; DataError when some have time stamps and others none."""
        timed = [b.times_N for b in batches if b.times_N is not None]
        if timed and len(timed) < len(batches):
            raise DataError("some media of this batch have time stamps and others none: give all or none")
        return cls(torch.cat([b.data for b in batches]), torch.cat(timed) if timed else None)

    def __len__(self) -> int:
        return self.data.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """T positions and their media.

    Attributes:
        ids_T: int64 token ids (a placeholder id where media stand).
        kind_T: int8, one of TEXT, IMAGE, VIDEO, POINTS, CODES.
        doc_T: int32 document numbers 0, 1, …, each in one contiguous run.
        pos_T: float32 positions, (T,) or (T, 3), restarting with every document.
        labels_T: int64, already shifted: what row t must predict, or IGNORE. None when only read.
        weight_T: float32 loss weight of every row. None means 1.
        spans: which rows stand for which media items, in order.
        media: name -> MediaBatch.
    """

    ids_T: Tensor
    kind_T: Tensor
    doc_T: Tensor
    pos_T: Tensor
    labels_T: Tensor | None = None
    weight_T: Tensor | None = None
    spans: tuple[Span, ...] = ()
    media: dict[str, MediaBatch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        T = self.ids_T.shape[0]
        for name in ("kind_T", "doc_T", "pos_T", "labels_T", "weight_T"):
            value = getattr(self, name)
            if value is not None and value.shape[0] != T:
                raise DataError(f"sequence field {name} has {value.shape[0]} rows but ids_T has {T}")
        for span in self.spans:
            batch = self.media.get(span.media)
            if batch is None or span.first + span.items > len(batch) or span.start + span.length > T:
                raise DataError(
                    f"span at rows {span.start}+{span.length} points outside its sequence or media"
                )

    @classmethod
    def of_text(cls, ids: Seq[int], *, start: int = 0) -> Sequence:
        """One document of plain text whose first position is `start`."""
        T = len(ids)
        return cls(
            ids_T=torch.as_tensor(ids, dtype=torch.int64).reshape(T),
            kind_T=torch.zeros(T, dtype=torch.int8),
            doc_T=torch.zeros(T, dtype=torch.int32),
            pos_T=torch.arange(start, start + T, dtype=torch.float32),
        )

    @classmethod
    def of_rows(cls, ids: Seq[int], kinds: Seq[int] | None = None) -> Sequence:
        """N documents of one row each, as one decoding step reads them (positions are filled in by the loop)."""
        N = len(ids)
        return cls(
            ids_T=torch.tensor(ids, dtype=torch.int64),
            kind_T=torch.zeros(N, dtype=torch.int8)
            if kinds is None
            else torch.tensor(kinds, dtype=torch.int8),
            doc_T=torch.arange(N, dtype=torch.int32),
            pos_T=torch.zeros(N),
        )

    def __len__(self) -> int:
        return self.ids_T.shape[0]

    @property
    def docs(self) -> int:
        """Number of documents."""
        return int(self.doc_T[-1]) + 1 if len(self) else 0

    def segments(self, slots: Seq[int] | None = None) -> Segments:
        """Lengths of the documents, with their cache rows (default 0, 1, …)."""
        return Segments.from_docs(self.doc_T, slots)

    def spans_of(self, media: str) -> tuple[Span, ...]:
        """Spans of one medium, in order."""
        return tuple(s for s in self.spans if s.media == media)

    def to(self, device: torch.device | str) -> Sequence:
        """On another device."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        rows = ("ids_T", "kind_T", "doc_T", "pos_T", "labels_T", "weight_T")
        moved = {name: move(getattr(self, name)) for name in rows}
        return replace(self, **moved, media={k: b.to(device) for k, b in self.media.items()})

    @classmethod
    def pack(cls, sequences: Seq[Sequence]) -> Sequence:
        """Several sequences as one; documents are renumbered, nothing is padded. Inverse: `split`.

        Raises DataError when some carry labels and others do not, or positions differ in rank.
        """
        if not sequences:
            raise DataError("cannot pack zero sequences")
        if len(sequences) == 1:
            return sequences[0]
        if len({s.labels_T is None for s in sequences}) > 1 or len({s.pos_T.dim() for s in sequences}) > 1:
            raise DataError("packed sequences must agree on having labels and on the rank of their positions")
        docs, spans, rows, groups = [], [], 0, 0
        doc = 0
        media: dict[str, list[MediaBatch]] = {}
        counts: dict[str, int] = {}
        for s in sequences:
            docs.append(s.doc_T + doc)
            doc += s.docs
            spans += [span.shifted(rows, counts.get(span.media, 0), groups) for span in s.spans]
            groups += max((span.group + 1 for span in s.spans), default=0)
            for name, batch in s.media.items():
                media.setdefault(name, []).append(batch)
                counts[name] = counts.get(name, 0) + len(batch)
            rows += len(s)

        def join(name: str) -> Tensor | None:
            values = [getattr(s, name) for s in sequences]
            if all(v is None for v in values):
                return None
            if name == "weight_T":  # absent means 1
                values = [
                    torch.ones(len(s)) if v is None else v for s, v in zip(sequences, values, strict=True)
                ]
            return torch.cat(values)

        return cls(
            ids_T=torch.cat([s.ids_T for s in sequences]),
            kind_T=torch.cat([s.kind_T for s in sequences]),
            doc_T=torch.cat(docs),
            pos_T=torch.cat([s.pos_T for s in sequences]),
            labels_T=join("labels_T"),
            weight_T=join("weight_T"),
            spans=tuple(spans),
            media={name: MediaBatch.join(parts) for name, parts in media.items()},
        )

    def split(self) -> list[Sequence]:
        """The documents as sequences of their own. Items of media must lie in span order (as `pack` leaves them)."""
        out, at = [], 0
        for n in self.segments().lengths:
            out.append(self._part(at, at + n))
            at += n
        return out

    def piece(
        self, start: int, stop: int, *, power: float | None = None, count: Count = "sample"
    ) -> Sequence:
        """Rows start … stop - 1 of one document as a document of its own, whose positions begin at 0.

        The last row predicts nothing where the document goes on: the token after it is not there. The first row of
        the next piece is therefore never predicted; a cut inside an answer costs one label.

        Args:
            start: first row. stop: row after the last one.
            power: of the loss weights, which are made anew from the piece's own labels, so that a piece weighs what
                any document of its labels weighs (`token_weights`). None: every row keeps its weight.
            count: likewise.

        Raises:
            DataError: there is more than one document, the range is empty or outside, or it cuts a span.
        """
        T = len(self)
        if self.docs != 1:
            raise DataError(f"only one document can be cut into pieces, found {self.docs}: split it first")
        if not 0 <= start < stop <= T:
            raise DataError(f"rows {start}:{stop} are no piece of a document of {T} rows")
        for span in self.spans:
            end = span.start + span.length
            if span.start < start < end or span.start < stop < end:
                raise DataError(
                    f"rows {start}:{stop} cut the {span.media} at rows {span.start}:{end}: cut before or behind it"
                )
        part = self._part(start, stop)
        labels_T, weight_T = part.labels_T, part.weight_T
        if labels_T is not None:
            labels_T = labels_T.clone()
            if stop < T:
                labels_T[-1] = IGNORE
            if power is not None:
                weight_T = token_weights(labels_T, part.doc_T, power, count)
            elif weight_T is not None:
                weight_T = weight_T * (labels_T != IGNORE)
        return replace(part, pos_T=part.pos_T - part.pos_T[:1], labels_T=labels_T, weight_T=weight_T)

    def padded(self, rows: int, items: int = 0, *, media: str = "image", shape: Seq[int] = ()) -> Sequence:
        """Fill up to `rows` rows and to `items` media items in all, so that every batch has the same sizes.

        The rows are one more document of word 0 that nobody reads and that learns nothing. The items (uint8 zeros of
        `shape`, or of the shape of those that are there) stand nowhere: an embedder encodes them and leaves them.

        Raises:
            DataError: there is already more, or the shape of an item is not known.
        """
        missing, more = rows - len(self), items - sum(map(len, self.media.values()))
        if missing < 0 or (items and more < 0):
            there = f"{len(self)} rows and {items - more} items"
            raise DataError(f"cannot pad {there} to {rows} rows and {items} items: it must not be less")
        media_of = dict(self.media)
        if items and more:
            own = media_of.get(media)
            if own is None and not shape:
                raise DataError(f"padding needs the shape of one {media} item")
            size = tuple(own.data.shape[1:]) if own is not None else tuple(shape)
            blank = torch.zeros((more, *size), dtype=torch.uint8 if own is None else own.data.dtype)
            if own is None:
                media_of[media] = MediaBatch(blank)
            else:
                times_N = None if own.times_N is None else torch.zeros(more, dtype=torch.float64)
                media_of[media] = MediaBatch.join([own, MediaBatch(blank, times_N)])
        filled = replace(self, media=media_of)
        if not missing:
            return filled
        tail = Sequence(
            ids_T=torch.zeros(missing, dtype=torch.int64),
            kind_T=torch.full((missing,), TEXT, dtype=torch.int8),
            doc_T=torch.zeros(missing, dtype=torch.int32),
            pos_T=torch.arange(missing, dtype=torch.float32)
            .view(-1, *[1] * (self.pos_T.dim() - 1))
            .expand(missing, *self.pos_T.shape[1:]),
            labels_T=None if self.labels_T is None else torch.full((missing,), IGNORE, dtype=torch.int64),
            weight_T=None if self.labels_T is None else torch.zeros(missing),
        )
        return Sequence.pack([filled, tail])

    def _part(self, start: int, stop: int) -> Sequence:
        """Rows start … stop - 1, which cut no span, with their media; positions as they are."""
        rows = slice(start, stop)
        spans: list[Span] = []
        media = {}
        for name, batch in self.media.items():
            mine = [s for s in self.spans if s.media == name and start <= s.start < stop]
            if not mine:
                continue
            low, high = min(s.first for s in mine), max(s.first + s.items for s in mine)
            spans += [s.shifted(-start, -low) for s in mine]
            media[name] = batch.items(low, high)
        base = min((s.group for s in spans if s.group >= 0), default=0)
        spans = [s.shifted(0, 0, -base) for s in spans]
        return Sequence(
            ids_T=self.ids_T[rows],
            kind_T=self.kind_T[rows],
            doc_T=torch.zeros_like(self.doc_T[rows]),
            pos_T=self.pos_T[rows],
            labels_T=None if self.labels_T is None else self.labels_T[rows],
            weight_T=None if self.weight_T is None else self.weight_T[rows],
            spans=tuple(sorted(spans, key=lambda s: s.start)),
            media=media,
        )
