"""The one generation loop, for every system and every batch size.

A `Decoding` holds documents that are being written. They join at any time (`add`) and leave when they have ended or
are cancelled. Each pass reads one flat ragged row (no padding, so nothing to mask wrongly): one row of every document
being written, and behind them as many rows of prompts as are allowed at once. Only the last row of a prompt reaches
the head.

A document joins by having its prompt embedded: its pictures are encoded once, as a whole, and the rows that the trunk
reads wait beside the document. Chunks are cut from those rows, anywhere, also inside a picture. A document that grows
past the length at which its rotary factors change (`Rope.switch`, Phi-3) is read again as a whole in that pass.

Slots of the cache: one that becomes free is the next one's, without a copy. When less than half of them are in use,
the documents left are copied into a smaller cache, so that a batch of N that runs empty copies at most 2 N documents.

Legend: N documents of a pass, C width, V vocabulary.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from chiasm.data.sequence import TEXT, Sequence
from chiasm.errors import ChiasmError, ConfigError
from chiasm.model.causal import CausalVLM
from chiasm.model.prefix import PrefixCache, Rows, steady_length
from chiasm.model.static import StaticPass, fits
from chiasm.nn.attention import Segments
from chiasm.nn.products import single_row_products
from chiasm.nn.sampling import Sampling, choose
from chiasm.parts.contracts import ModelCache

STEADY = 8
"""Passes with the same cache before one of fixed shapes is made for it."""
ROOM = 256
"""Rows for an answer that are allocated at once; longer ones grow the cache by doubling."""


@dataclass(frozen=True, slots=True)
class Event:
    """One emission of document `doc`: a token id or a group of codes; `finish` is set on its last one.

    finish: "stop" (a stop id, which is included as `id`), "length" (token limit), "error" (no token could be chosen,
    and `error` says why). `hidden` (C,) is the state that the emission was read from, where asked for.
    """

    doc: int
    id: int | None
    codes: list[int] | None = None
    finish: str | None = None
    hidden: Tensor | None = None
    error: ChiasmError | None = None


@dataclass(slots=True, eq=False)
class _Document:
    number: int
    generator: torch.Generator
    sampling: Sampling
    limit: int
    seen: set[int]
    position: float
    rows: int
    """Rows of its prompt."""
    slot: int = -1
    written: int = 0
    reused: int = 0
    ended: bool = False
    error: ChiasmError | None = None
    whole: bool = False
    """Its prompt must be read in one pass."""
    unread_TC: Tensor | None = None
    """Embedded rows that wait to be read, with their kinds and positions."""
    kind_T: Tensor | None = None
    pos_T: Tensor | None = None
    history: list[Sequence] | None = None
    """All that was read of it, where it may have to be read again."""
    known: Rows | None = None
    """Its prompt as the prefix cache compares it."""
    text: list[int] = field(default_factory=list)
    """Tokens that it wrote, as long as they are all text."""

    @property
    def unread(self) -> int:
        """Rows that wait to be read."""
        return 0 if self.unread_TC is None else len(self.unread_TC)

    @property
    def need(self) -> int:
        """Most rows that it can come to have in the cache."""
        return self.rows + self.limit


class Decoding:
    """Documents being written.

    Args:
        model: any CausalVLM in eval mode.
        prompts: one Sequence a document (a packed one is refused); more may join later (`add`).
        sampling: one for all, or one a document.
        limit: new emissions at most, one for all or one a document.
        stop_ids: text ids that end a document.
        keep_hidden: put the hidden state behind every emission into its Event (segmentation heads read it).
        prefixes: where beginnings of prompts that were read are found and kept. Not used with `keep_hidden`, for
            heads with a state of their own, and for documents whose rotations depend on their length.
        max_rows: most rows of prompts in one pass, shared evenly among those being read, so that none waits for
            another; None reads every prompt at once. Prompts of heads with a state of their own, and those longer than
            the length at which their rotations begin to depend on it, are read whole in any case.
        max_running, max_tokens: documents and rows that the cache may be made for, the rows being slots times the
            longest document (prompt and limit). Bounds of memory only: who adds documents sees to it that they fit
            (`chiasm.model.queue` does).
        isolate: a document of which no token can be chosen (its logits are no numbers) ends by itself, with an Event
            that holds the error; else the error is raised.

    Raises:
        ConfigError: numbers of samplings or limits differ from that of the prompts, or one of them is no document.
    """

    def __init__(
        self,
        model: CausalVLM,
        prompts: Seq[Sequence] = (),
        *,
        sampling: Sampling | Seq[Sampling] | None = None,
        limit: int | Seq[int] = 256,
        stop_ids: Seq[int] = (),
        keep_hidden: bool = False,
        prefixes: PrefixCache | None = None,
        max_rows: int | None = None,
        max_running: int | None = None,
        max_tokens: int | None = None,
        isolate: bool = False,
    ) -> None:
        n = len(prompts)
        samplings = [sampling or Sampling()] * n if isinstance(sampling, Sampling | None) else list(sampling)
        limits = [limit] * n if isinstance(limit, int) else list(limit)
        if len(samplings) != n or len(limits) != n:
            raise ConfigError(
                f"{n} prompts with {len(samplings)} samplings and {len(limits)} limits: need one each"
            )
        if max_rows is not None and max_rows < 1:
            raise ConfigError(f"max_rows must be at least 1 or None, found {max_rows}")
        self.model = model
        self.stop_ids = frozenset(stop_ids)
        self.keep_hidden, self.isolate = keep_hidden, isolate
        self.max_rows, self.max_running, self.max_tokens = max_rows, max_running, max_tokens
        self._documents: dict[int, _Document] = {}
        self._count = 0
        self._next: Sequence | None = None  # one row of every document of _writing
        self._writing: list[_Document] = []
        self._reading: list[_Document] = []
        self._switch: int | None = getattr(getattr(model.trunk, "rope", None), "switch", None)
        self._steady = steady_length(model)
        self._begin = getattr(
            model.head, "begin", None
        )  # heads with a memory of their own look at the prompts
        self._prefixes = None if keep_hidden or self._begin else prefixes
        if self._prefixes is not None:
            self._prefixes.bind(model)
        self._pick = _Picker(self._choose, self._documents)
        wanted = model.device.type == "cuda" if model.static is None else bool(model.static)
        self._fixed = wanted and fits(model)
        self._static: StaticPass | None = None
        self._seen = 0
        self._steady_passes = 0
        self._free: list[int] = list(range(n))
        documents = [self._document(p, s, m) for p, s, m in zip(prompts, samplings, limits, strict=True)]
        longest = max((d.rows + min(d.limit, ROOM) for d in documents), default=0)
        self._cache: ModelCache = model.new_cache(n, capacity=longest)
        if n:
            self._join(documents, prompts)

    @property
    def live(self) -> list[int]:
        """Documents that are being read or written, in the order in which they joined."""
        return [number for number, document in self._documents.items() if not document.ended]

    def reused(self, doc: int) -> int:
        """Rows of a living document's prompt that were not read, because its beginning was remembered."""
        return self._documents[doc].reused

    @torch.inference_mode()
    def add(self, prompt: Sequence, sampling: Sampling | None = None, limit: int = 256) -> int:
        """Let a document join: its pictures are encoded now, its rows read from the next pass on.

        Returns:
            its number, which its events carry. Numbers count up and are never given again.

        Raises:
            ConfigError: the prompt is not one document, or the limit is below 1. Whatever is raised, here or by the
                embedder, the other documents are not affected.
        """
        document = self._document(prompt, sampling or Sampling(), limit)
        self._drop_ended()
        self._make_room(document)
        self._join([document], [prompt])
        return document.number

    def cancel(self, doc: int) -> None:
        """End a document (a stop string was found, the reader went away); the others are not affected."""
        document = self._documents.get(doc)
        if document is not None and not document.ended:
            self._end(document)

    def step(self) -> list[Event]:
        """Pass until there are emissions: one for every document being written; empty when all have ended."""
        while True:
            events = self.advance()
            if events or not self.live:
                return events

    @torch.inference_mode()
    def advance(self) -> list[Event]:
        """One pass. Empty also when all that it read were beginnings of prompts (`live` tells)."""
        self._drop_ended()
        self._start_over()
        chunks = self._share()
        documents = self._writing + [document for document, _ in chunks]
        if not documents:
            return []
        lengths = [1] * len(self._writing) + [rows for _, rows in chunks]
        segments = Segments.of(lengths, [document.slot for document in documents])
        hidden_TC = None if chunks else self._read_static()
        if hidden_TC is None:
            with single_row_products(segments.total == 1):
                hidden_TC = self._read(chunks, segments)
        for document, rows in chunks:
            _mark_read(document, rows)
        ready = [n for n, document in enumerate(documents) if not document.unread]
        if not ready:
            return []
        last = segments.last_rows
        hidden_NC = hidden_TC if len(ready) == segments.total else hidden_TC[[last[n] for n in ready]]
        return self._emit([documents[n] for n in ready], hidden_NC)

    def _read_static(self) -> Tensor | None:
        """The same for documents being written, in a pass of fixed shapes; None where there can be none."""
        rows, cache = self._next, self._cache.trunk
        if not self._fixed or rows is None or rows.spans or rows.pos_T.dim() > 1:
            return None
        if bool((rows.kind_T != TEXT).any()):
            return None
        if self._static is None or not self._static.matches(cache):
            self._static = None  # and with it the memory of the cache it was made for
            # A graph pays for being recorded when it is replayed: not before the cache has kept its size for a while.
            buffers = cache.buffers()
            same = bool(buffers) and self._seen == buffers[0][0].data_ptr()
            self._steady_passes = self._steady_passes + 1 if same else 0
            self._seen = buffers[0][0].data_ptr() if buffers else 0
            if self._steady_passes < STEADY:
                return None
            self._static = StaticPass(self.model, cache, compile=self.model.static == "compile")
        if not self._static.room():
            return None
        slots = [document.slot for document in self._writing]
        return self._static(rows.ids_T.tolist(), rows.pos_T.tolist(), slots)

    def _read(self, chunks: list[tuple[_Document, int]], segments: Segments) -> Tensor:
        """Hidden states of the next row of documents being written, then of these rows of those being read."""
        device = self.model.device
        x, kind, pos = [], [], []
        if self._next is not None:
            rows = self._next.to(device)
            view = self._cache.view([document.slot for document in self._writing])
            x.append(self.model.embedder(rows, view).x_TC)
            kind.append(rows.kind_T)
            pos.append(rows.pos_T)
        for document, n in chunks:
            assert document.unread_TC is not None
            assert document.kind_T is not None
            assert document.pos_T is not None
            x.append(document.unread_TC[:n])
            kind.append(document.kind_T[:n].to(device))
            pos.append(document.pos_T[:n].to(device))
        axes = max(p.dim() for p in pos)
        pos = [p if p.dim() == axes else p[:, None].expand(-1, pos[-1].shape[1]) for p in pos]
        return self.model.trunk(
            x[0] if len(x) == 1 else torch.cat(x),
            kind_T=kind[0] if len(kind) == 1 else torch.cat(kind),
            segments=segments,
            pos_T=pos[0] if len(pos) == 1 else torch.cat(pos),
            cache=self._cache.trunk,
        )

    def _emit(self, documents: list[_Document], hidden_NC: Tensor) -> list[Event]:
        numbers = [document.number for document in documents]
        with single_row_products(len(documents) == 1):
            emission = self.model.head.step(hidden_NC, numbers, self._pick, self._cache)  # type: ignore[operator]
        positions, events = [], []
        for n, document in enumerate(documents):
            token = emission.ids[n]
            if document.error is not None:  # nothing of it is remembered
                events.append(Event(document.number, None, finish="error", error=document.error))
                positions.append(document.position)
                continue
            if not document.written and document.known is not None and self._prefixes is not None:
                self._remember(document)  # others with the same picture need not wait for the answer's end
            if token is not None and len(document.text) == document.written:
                document.text.append(token)
            document.written += 1
            if token is not None and document.sampling.repetition_penalty != 1:
                document.seen.add(token)
            length = "length" if document.written >= document.limit else None
            finish = "stop" if token in self.stop_ids else length
            if finish is not None:
                self._end(document)
            positions.append(document.position)
            document.position += 1
            codes = emission.codes[n] if emission.codes else None
            events.append(
                Event(document.number, token, codes, finish, hidden_NC[n] if self.keep_hidden else None)
            )
        self._next = replace(emission.next, pos_T=torch.tensor(positions))
        self._writing = documents
        self._reading = [document for document in self._reading if document.unread]
        return events

    def _document(self, prompt: Sequence, sampling: Sampling, limit: int) -> _Document:
        if prompt.docs != 1:
            raise ConfigError("every prompt must be one document: split packed sequences first")
        if limit < 1:
            raise ConfigError(f"the number of new tokens must be at least 1, found {limit}")
        return _Document(
            number=-1,
            generator=torch.Generator().manual_seed(sampling.seed),
            sampling=sampling,
            limit=limit,
            seen=set(prompt.ids_T.tolist()) if sampling.repetition_penalty != 1 else set(),
            position=float(prompt.pos_T.max()) + 1,
            rows=len(prompt),
        )

    @torch.inference_mode()
    def _join(self, documents: list[_Document], prompts: Seq[Sequence]) -> None:
        """Give documents their slots and numbers, begin them with what is remembered, and embed the rest."""
        taken: list[int] = []
        try:
            rest = []
            for document, prompt in zip(documents, prompts, strict=True):
                document.slot = heapq.heappop(self._free)
                taken.append(document.slot)
                rest.append(self._reuse(document, prompt))
                steady = self._steady is None or document.rows <= self._steady
                document.whole = self._begin is not None or not steady
                if self._switch is not None and document.rows <= self._switch < document.need:
                    document.history = [prompt]
            self._embed(documents, rest)
        except BaseException:
            for slot in taken:
                self._cache.restart(slot)
                heapq.heappush(self._free, slot)
            raise
        for document in documents:
            document.number = self._count
            self._documents[document.number] = document
            self._count += 1
        self._reading += documents
        if self._begin is not None:
            scratch = ModelCache(self._cache.trunk)
            self._begin(list(prompts), scratch)
            for n, document in enumerate(documents):
                self._cache.state[document.number] = scratch.state[n]

    def _reuse(self, document: _Document, prompt: Sequence) -> Sequence:
        """The rows of a prompt that must be read, after its slot was begun with what is remembered."""
        if self._prefixes is None or (self._steady is not None and document.need > self._steady):
            return prompt
        own = getattr(self.model.embedder, "own_rows", None)
        document.known = Rows.of(prompt, own(prompt) if own else None)
        found = self._prefixes.find(document.known)
        if found is None:
            return prompt
        self._cache.put(document.slot, found.past, found.rows, found.own_rows)
        document.reused = found.rows
        parts = replace(prompt, doc_T=(torch.arange(len(prompt)) >= found.rows).to(prompt.doc_T.dtype))
        return parts.split()[1]

    def _embed(self, documents: list[_Document], rows: list[Sequence]) -> None:
        """Compute what the trunk will read of these documents."""
        packed = Sequence.pack(rows).to(self.model.device)
        embedded = self.model.embedder(packed, self._cache.view([d.slot for d in documents]))
        parts = embedded.x_TC.split([len(r) for r in rows])
        for document, sequence, x_TC in zip(documents, rows, parts, strict=True):
            document.unread_TC, document.kind_T, document.pos_T = x_TC, sequence.kind_T, sequence.pos_T

    def _start_over(self) -> None:
        """Put documents whose next row is the first behind the switch among those to be read, as a whole."""
        if self._switch is None or self._next is None:
            return
        again = []
        for n, document in enumerate(self._writing):
            if document.history is None:
                continue
            document.history.append(_rows_at(self._next, [n]))
            if self._cache.trunk.lengths[document.slot] == self._switch:
                again.append(document)
        for document in again:
            assert document.history is not None
            whole = Sequence.pack(document.history)
            document.history = None
            self._cache.restart(document.slot)
            self._embed([document], [replace(whole, doc_T=torch.zeros_like(whole.doc_T))])
            document.whole = True
        self._leave_writing(again)
        self._reading += again

    def _share(self) -> list[tuple[_Document, int]]:
        """Which prompts are read in this pass, and how many rows of each: shortest first, in even shares."""
        left, chunks = self.max_rows, []
        order = sorted(self._reading, key=lambda document: document.unread)
        for n, document in enumerate(order):
            rows = document.unread
            if left is not None and not document.whole:
                rows = min(rows, max(left // (len(order) - n), 1))
            if left is not None:
                left = max(left - rows, 0)
            chunks.append((document, rows))
        return sorted(chunks, key=lambda chunk: chunk[0].number)

    def _choose(self, logits_V: Tensor, doc: int) -> int:
        document = self._documents[doc]
        seen = torch.tensor(sorted(document.seen), dtype=torch.int64)
        try:
            return choose(logits_V.cpu(), document.sampling, seen, document.generator)
        except ChiasmError as error:
            if not self.isolate:
                raise
            document.error, document.ended = error, True
            return 0  # never read

    def _end(self, document: _Document) -> None:
        document.ended = True
        if document.known is not None and not document.unread:
            self._remember(document)

    @torch.inference_mode()
    def _remember(self, document: _Document) -> None:
        """Keep what was read of a document for prompts that begin like it."""
        assert self._prefixes is not None
        assert document.known is not None
        read = self._cache.trunk.lengths[document.slot]
        rows = document.known.then_text(document.text[: read - document.rows])
        own = self._cache.embed
        if len(rows) != read or (own is not None and own.lengths[document.slot] != _own(rows)):
            return  # it wrote what is no text, or was interrupted in the middle of a pass
        self._prefixes.put(rows, lambda: self._cache.take(document.slot))

    def _leave_writing(self, gone: list[_Document]) -> None:
        """Take documents out of those being written, and their rows out of the next ones."""
        keep = [n for n, document in enumerate(self._writing) if document not in gone]
        if len(keep) == len(self._writing) or self._next is None:
            return
        self._writing = [self._writing[n] for n in keep]
        self._next = _rows_at(self._next, keep) if keep else None

    def _drop_ended(self) -> None:
        """Take ended documents out of the batch and free their slots."""
        ended = [document for document in self._documents.values() if document.ended]
        if not ended:
            return
        self._leave_writing(ended)
        self._reading = [document for document in self._reading if not document.ended]
        for document in ended:
            del self._documents[document.number]
            self._cache.state.pop(document.number, None)
            self._cache.restart(document.slot)
            heapq.heappush(self._free, document.slot)
        if 2 * len(self._documents) < self._cache.trunk.slots:
            self._resize(len(self._documents))

    def _make_room(self, document: _Document) -> None:
        """See that there is a free slot, by doubling them, and that the cache stays within its bound."""
        living, trunk = len(self._documents), self._cache.trunk
        longest = max([document.need, *(d.need for d in self._documents.values())])
        most = max(living + 1, self.max_running or 2 * living)
        if self.max_tokens is not None:
            most = max(living + 1, min(most, self.max_tokens // longest))
            trunk.bound = longest
        slots = trunk.slots if self._free else min(max(2 * living, 1), most)
        over = self.max_tokens is not None and slots * max(trunk.capacity, longest) > self.max_tokens
        if over:  # made for others: longer ones that are gone, or more of them
            slots = min(slots, most)
        if over or slots != trunk.slots:
            room = document.rows + min(document.limit, ROOM)
            self._resize(slots, max(min(trunk.capacity, longest), room))

    def _resize(self, slots: int, capacity: int | None = None) -> None:
        """Copy the living documents into a cache of this size."""
        self._static = None
        documents = list(self._documents.values())
        self._cache.resize([document.slot for document in documents], slots, capacity)
        for n, document in enumerate(documents):
            document.slot = n
        self._free = list(range(len(documents), slots))


class _Picker:
    """What heads choose ids with (`chiasm.parts.contracts.Pick`)."""

    def __init__(self, one: Callable[[Tensor, int], int], documents: dict[int, _Document]) -> None:
        self._one, self._documents = one, documents

    def __call__(self, logits_V: Tensor, doc: int) -> int:
        return self._one(logits_V, doc)

    def rows(self, logits_NV: Tensor, docs: list[int]) -> list[int]:
        """The likeliest ids of all rows are looked for at once, and the device is waited for once."""
        likeliest_N = logits_NV.argmax(-1)
        broken_N = logits_NV.amax(-1).isnan()
        found = torch.stack((likeliest_N, broken_N.to(likeliest_N.dtype))).tolist()
        ids = []
        for n, doc in enumerate(docs):
            sampling = self._documents[doc].sampling
            simple = sampling.greedy and sampling.repetition_penalty == 1 and not found[1][n]
            ids.append(found[0][n] if simple else self._one(logits_NV[n], doc))
        return ids


def _own(rows: Rows) -> int:
    return len(rows) if rows.own is None else int(rows.own[-1])


def _rows_at(rows: Sequence, keep: list[int]) -> Sequence:
    """Some of the documents of a sequence that has one row of each."""
    if rows.spans:
        pieces = rows.split()
        return Sequence.pack([pieces[n] for n in keep])
    return Sequence(
        ids_T=rows.ids_T[keep],
        kind_T=rows.kind_T[keep],
        doc_T=torch.arange(len(keep), dtype=torch.int32),
        pos_T=rows.pos_T[keep],
    )


def _mark_read(document: _Document, rows: int) -> None:
    """Drop the rows that were read from those that wait."""
    assert document.unread_TC is not None
    assert document.kind_T is not None
    assert document.pos_T is not None
    left = None if rows == len(document.unread_TC) else rows
    document.unread_TC = None if left is None else document.unread_TC[left:]
    document.kind_T = None if left is None else document.kind_T[left:]
    document.pos_T = None if left is None else document.pos_T[left:]


def generate(model: CausalVLM, prompts: Seq[Sequence], **options: object) -> list[list[int]]:
    """All token ids that each prompt is answered with (stop id included); options as of `Decoding`."""
    run = Decoding(model, prompts, **options)  # type: ignore[arg-type]
    out: list[list[int]] = [[] for _ in prompts]
    while events := run.step():
        for event in events:
            if event.id is not None:
                out[event.doc].append(event.id)
    return out
