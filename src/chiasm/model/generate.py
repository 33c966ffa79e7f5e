"""The one generation loop, for every system and every batch size.

A `Decoding` holds N documents that are being written. The prompts are read together as one flat ragged row (no
padding, so nothing to mask wrongly); then each `step` gives one emission a document until all have ended. Only
the last row of every prompt reaches the head. Documents that end leave the batch and its cache. A document that grows
past the length at which its rotary factors change (`Rope.switch`, Phi-3) is read again as a whole in that step.

Legend: N live documents, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from chiasm.data.sequence import Sequence
from chiasm.errors import ConfigError
from chiasm.model.causal import CausalVLM
from chiasm.nn.products import single_row_products
from chiasm.nn.sampling import Sampling, choose


@dataclass(frozen=True, slots=True)
class Event:
    """One emission of document `doc`: a token id or a group of codes; `finish` is set on its last one.

    finish: "stop" (a stop id, which is included as `id`), "length" (token limit). `hidden` (C,) is the state that
    the emission was read from, where asked for.
    """

    doc: int
    id: int | None
    codes: list[int] | None = None
    finish: str | None = None
    hidden: Tensor | None = None


@dataclass(slots=True)
class _Document:
    generator: torch.Generator
    sampling: Sampling
    limit: int
    seen: set[int]
    position: float
    written: int = 0
    ended: bool = field(default=False)


class Decoding:
    """N documents being written.

    Args:
        model: any CausalVLM in eval mode.
        prompts: one Sequence a document (a packed one is refused).
        sampling: one for all, or one a document.
        limit: new emissions at most, one for all or one a document.
        stop_ids: text ids that end a document.
        keep_hidden: put the hidden state behind every emission into its Event (segmentation heads read it).
    """

    def __init__(
        self,
        model: CausalVLM,
        prompts: Seq[Sequence],
        *,
        sampling: Sampling | Seq[Sampling] | None = None,
        limit: int | Seq[int] = 256,
        stop_ids: Seq[int] = (),
        keep_hidden: bool = False,
    ) -> None:
        n = len(prompts)
        samplings = [sampling or Sampling()] * n if isinstance(sampling, Sampling | None) else list(sampling)
        limits = [limit] * n if isinstance(limit, int) else list(limit)
        if not n or len(samplings) != n or len(limits) != n:
            raise ConfigError(
                f"{n} prompts with {len(samplings)} samplings and {len(limits)} limits: need one each"
            )
        if any(p.docs != 1 for p in prompts):
            raise ConfigError("every prompt must be one document: split packed sequences first")
        if any(m < 1 for m in limits):
            raise ConfigError(f"the number of new tokens must be at least 1, found {min(limits)}")
        self.model = model
        self.stop_ids = frozenset(stop_ids)
        self.keep_hidden = keep_hidden
        self._documents = [
            _Document(
                generator=torch.Generator().manual_seed(s.seed),
                sampling=s,
                limit=m,
                seen=set(p.ids_T.tolist()) if s.repetition_penalty != 1 else set(),
                position=float(p.pos_T.max()) + 1,
            )
            for p, s, m in zip(prompts, samplings, limits, strict=True)
        ]
        self._live = list(range(n))
        self._cache = model.new_cache(
            n,
            # Longer answers grow the cache by doubling: room for the longest allowed one may never be needed.
            capacity=max(len(p) + min(m, 256) for p, m in zip(prompts, limits, strict=True)),
        )
        self._next: Sequence | None = Sequence.pack(list(prompts))
        self._switch: int | None = getattr(getattr(model.trunk, "rope", None), "switch", None)
        self._read: list[
            tuple[list[int], Sequence]
        ] = []  # (documents, their rows) of every step; only with a switch
        begin = getattr(model.head, "begin", None)  # heads with a memory of their own look at the prompts
        if begin:
            begin(list(prompts), self._cache)

    @property
    def live(self) -> list[int]:
        """Documents still being written, in order."""
        return [d for d in self._live if not self._documents[d].ended]

    def cancel(self, doc: int) -> None:
        """End a document (a stop string was found, the reader went away); the others are not affected."""
        self._documents[doc].ended = True

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One emission for every live document; empty when all have ended."""
        if not self._drop_ended() or self._next is None:
            return []
        rows = self._rows(self._next).to(self.model.device)
        with single_row_products(len(rows) == 1):
            hidden_TC = self.model.hidden(rows, self._cache)
        hidden_NC = hidden_TC if rows.docs == len(rows) else hidden_TC[rows.segments().last_rows]
        with single_row_products(len(self._live) == 1):
            emission = self.model.head.step(hidden_NC, self._live, self._pick, self._cache)  # type: ignore[operator]
        positions, events = [], []
        for n, doc in enumerate(self._live):
            state = self._documents[doc]
            token = emission.ids[n]
            state.written += 1
            if token is not None and state.sampling.repetition_penalty != 1:
                state.seen.add(token)
            finish = "stop" if token in self.stop_ids else "length" if state.written >= state.limit else None
            state.ended = finish is not None
            positions.append(state.position)
            state.position += 1
            events.append(
                Event(
                    doc,
                    token,
                    emission.codes[n] if emission.codes else None,
                    finish,
                    hidden_NC[n] if self.keep_hidden else None,
                )
            )
        self._next = replace(emission.next, pos_T=torch.tensor(positions))
        return events

    def _rows(self, following: Sequence) -> Sequence:
        """What is read in this step: the next row of every document, or all rows of one that starts over."""
        if self._switch is None:
            return following
        lengths = [self._cache.trunk.lengths[n] for n in range(len(self._live))]
        if all(length > self._switch for length in lengths):  # nothing will have to be read again
            self._read.clear()
            return following
        self._read.append((self._live, following))
        over = [n for n, length in enumerate(lengths) if length == self._switch]
        if not over:
            return following
        pieces = following.split()
        for n in over:
            doc = self._live[n]
            parts = [rows.split()[docs.index(doc)] for docs, rows in self._read if doc in docs]
            whole = Sequence.pack(parts)
            pieces[n] = replace(whole, doc_T=torch.zeros_like(whole.doc_T))
            self._cache.restart(n)
        return Sequence.pack(pieces)

    def _pick(self, logits_V: Tensor, doc: int) -> int:
        state = self._documents[doc]
        seen = torch.tensor(sorted(state.seen), dtype=torch.int64)
        return choose(logits_V.cpu(), state.sampling, seen, state.generator)

    def _drop_ended(self) -> bool:
        """Take ended documents out of the batch, the next rows and the cache; True while any is left."""
        keep = [n for n, doc in enumerate(self._live) if not self._documents[doc].ended]
        if len(keep) < len(self._live):
            if keep:
                pieces = self._next.split() if self._next is not None else []
                self._next = Sequence.pack([pieces[n] for n in keep])
                self._cache.keep(keep)
            self._live = [self._live[n] for n in keep]
        return bool(self._live)


def generate(model: CausalVLM, prompts: Seq[Sequence], **options: object) -> list[list[int]]:
    """All token ids that each prompt is answered with (stop id included); options as of `Decoding`."""
    run = Decoding(model, prompts, **options)  # type: ignore[arg-type]
    out: list[list[int]] = [[] for _ in prompts]
    while events := run.step():
        for event in events:
            if event.id is not None:
                out[event.doc].append(event.id)
    return out
