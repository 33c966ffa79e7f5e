"""SynerGen-VL: images are discrete codes, folded K at a time into one row of the trunk, which routes rows of codes
through vision experts; one step of the head unfolds a row's K codes autoregressively.

Asks of the contracts: routing by kind_T, a step that emits many codes and chooses its own next rows, a head with
a state of its own for each document (where in the image it is), two loss parts with denominators of their own,
and guidance: documents in pairs (conditional, unconditional) that must emit the same codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.contracts.skeleton import LANGUAGE, VOCAB, WIDTH, Skeleton, document, initialise
from torch import Tensor, nn

from chiasm.data.sequence import CODES, TEXT, MediaBatch, Sequence, Span
from chiasm.model.causal import CausalVLM
from chiasm.nn.block import Routed, SwiGLU
from chiasm.parts.contracts import Embedded, Emission, LossPart, LossParts, ModelCache, Pick
from chiasm.parts.embed import WordTable
from chiasm.parts.heads.text import TextHead
from chiasm.parts.language.decoder import build_decoder

BOOK, K, GROUPS, BOI, EOI = 11, 4, 3, 35, 36


class FoldEmbedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = WordTable(VOCAB, WIDTH)
        self.codes = nn.Embedding(BOOK, 6)
        self.fold = nn.Linear(K * 6, WIDTH)

    def forward(self, sequence: Sequence, cache: ModelCache | None = None) -> Embedded:
        x_TC = self.words(sequence.ids_T)
        if "codes" in sequence.media:
            folded = self.fold(self.codes(sequence.media["codes"].data).flatten(1))
            x_TC = x_TC.index_copy(0, (sequence.kind_T == CODES).nonzero()[:, 0], folded)
        return Embedded(x_TC)


class UnfoldHead(nn.Module):
    """A text head, and a GRU cell that unfolds one row into K codes."""

    def __init__(self, guidance: float = 1.0) -> None:
        super().__init__()
        self.text = TextHead(VOCAB, WIDTH)
        self.codes = nn.Embedding(BOOK, WIDTH)
        self.cell = nn.GRUCell(WIDTH, WIDTH)
        self.classify = nn.Linear(WIDTH, BOOK)
        self.guidance = guidance

    def loss(self, hidden_TC: Tensor, sequence: Sequence, features: dict[str, Tensor]) -> LossParts:
        parts = dict(self.text.loss(hidden_TC, sequence).parts)
        rows = (sequence.kind_T == CODES).nonzero()[:, 0]
        total = weight = hidden_TC.new_zeros(())
        if rows.numel():
            target = sequence.media["codes"].data
            h, x = hidden_TC[rows - 1], hidden_TC.new_zeros(rows.numel(), WIDTH)  # predicted one row earlier
            for k in range(K):
                h = self.cell(x, h)
                total = total + F.cross_entropy(self.classify(h), target[:, k], reduction="sum")
                x = self.codes(target[:, k])
            weight = total.new_tensor(float(target.numel()))
        return LossParts({**parts, "codes": LossPart(total, weight, scale=2.0)})

    def begin(self, prompts: list[Sequence], cache: ModelCache) -> None:
        for doc, prompt in enumerate(prompts):  # draws at once when the prompt ends in <boi>
            cache.state[doc] = 0 if int(prompt.ids_T[-1]) == BOI else -1

    def step(self, hidden_NC: Tensor, docs: list[int], pick: Pick, cache: ModelCache) -> Emission:
        ids: list[int | None] = []
        codes: list[list[int] | None] = []
        pair = self.guidance != 1.0
        for n, doc in enumerate(docs):
            drawn = cache.state[doc]  # -1: writing text, else groups drawn so far
            if 0 <= drawn < GROUPS:
                if pair and doc % 2:  # the unconditional twin repeats what its partner drew
                    codes.append(codes[-1])
                else:
                    codes.append(
                        self.unfold(hidden_NC[n : n + 2] if pair else hidden_NC[n : n + 1], doc, pick)
                    )
                ids.append(None)
                cache.state[doc] = drawn + 1
                continue
            token = EOI if drawn == GROUPS else pick(self.text.logits(hidden_NC[n]), doc)
            cache.state[doc] = 0 if token == BOI else -1
            ids.append(token)
            codes.append(None)
        return Emission(ids=ids, codes=codes, next=next_rows(ids, codes))

    def unfold(self, h: Tensor, doc: int, pick: Pick) -> list[int]:
        out, x = [], torch.zeros_like(h)
        for _ in range(K):
            h = self.cell(x, h)
            logits = self.classify(h)
            mixed = logits[-1] + self.guidance * (logits[0] - logits[-1])
            out.append(pick(mixed.float(), doc))
            x = self.codes(torch.tensor([out[-1]] * h.shape[0]))
        return out


def next_rows(ids: list[int | None], codes: list[list[int] | None]) -> Sequence:
    rows = Sequence.of_rows([i or 0 for i in ids], [TEXT if c is None else CODES for c in codes])
    groups = [c for c in codes if c is not None]
    if not groups:
        return rows
    where = [n for n, c in enumerate(codes) if c is not None]
    spans = tuple(Span(media="codes", start=n, length=1, first=i, items=1) for i, n in enumerate(where))
    return Sequence(
        ids_T=rows.ids_T,
        kind_T=rows.kind_T,
        doc_T=rows.doc_T,
        pos_T=rows.pos_T,
        spans=spans,
        media={"codes": MediaBatch(torch.tensor(groups))},
    )


def documents(train: bool) -> list[Sequence]:
    image = MediaBatch(torch.randint(0, BOOK, (GROUPS, K), generator=torch.Generator().manual_seed(3)))
    seen = [1, BOI, ("codes", CODES, GROUPS, GROUPS), EOI, 4, 5]
    if train:
        return [
            document(seen, {"codes": image}, train=True),
            document([6, 7, 8], {}, train=True),
            document([2, 3, *seen], {"codes": image}, train=True),
        ]
    # Prompts that end in <boi> draw at once; the last one is in the middle of reading.
    return [document([1, 2, BOI], {}, train=False), document(seen, {"codes": image}, train=False)]


def build(guidance: float = 1.0) -> CausalVLM:
    trunk = build_decoder(LANGUAGE, ffn=lambda i: Routed(SwiGLU(WIDTH, 24), {CODES: SwiGLU(WIDTH, 24)}))
    return initialise(CausalVLM(FoldEmbedder(), trunk, UnfoldHead(guidance)))


SKELETON = Skeleton("synergen", build, documents)
