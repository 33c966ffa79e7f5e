"""HoVLE: no encoder. Patches and words go together through causal layers of the *embedder*, which keeps its own
cache; the trunk reads what comes out.

The 'post' variant (`expand` = 4) runs every visual token as four rows inside the embedder and hands one to the
trunk, so the embedder's past is longer than the trunk's.
"""

from __future__ import annotations

import torch
from tests.contracts.skeleton import LANGUAGE, VOCAB, WIDTH, Skeleton, document, initialise, noise
from torch import Tensor, nn

from chiasm.data.sequence import IMAGE, MediaBatch, Sequence
from chiasm.model.causal import CausalVLM
from chiasm.nn.attention import KVCache, Segments
from chiasm.parts.contracts import Embedded, ModelCache
from chiasm.parts.embed import WordTable
from chiasm.parts.heads.text import TextHead
from chiasm.parts.language.decoder import build_decoder

PATCH, SIDE = 4, 8


class HolisticEmbedder(nn.Module):
    def __init__(self, expand: int) -> None:
        super().__init__()
        self.expand = expand  # rows inside the embedder for one row of the trunk
        self.words = WordTable(VOCAB, WIDTH)
        self.patch = nn.Linear(3 * PATCH * PATCH, WIDTH)
        self.place = nn.Parameter(torch.empty(4, WIDTH))
        self.layers = build_decoder(LANGUAGE, norm=nn.Identity())
        self.fold = nn.Linear(expand * WIDTH, WIDTH)

    def new_cache(self, slots: int) -> KVCache:
        return self.layers.new_cache(slots)

    def own_rows(self, sequence: Sequence) -> Tensor:
        return torch.where(sequence.kind_T == IMAGE, self.expand, 1)

    def patches(self, data: Tensor) -> Tensor:
        N = data.shape[0]
        x = data.to(self.patch.weight.dtype) / 255
        x = x.view(N, 3, 2, PATCH, 2, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(N, 4, -1)
        x = self.patch(x) + self.place
        if self.expand == 1:  # 'pre': four patches are one token before the layers
            x = x.mean(1, keepdim=True)
        return x.flatten(0, 1)

    def forward(self, sequence: Sequence, cache: ModelCache | None = None) -> Embedded:
        E = self.expand
        many = self.own_rows(sequence)
        start = many.cumsum(0) - many
        x = self.words(sequence.ids_T.repeat_interleave(many))
        kind = sequence.kind_T.repeat_interleave(many)
        if "image" in sequence.media:
            x = x.index_copy(0, (kind == IMAGE).nonzero()[:, 0], self.patches(sequence.media["image"].data))
        segments = Segments.from_docs(sequence.doc_T.repeat_interleave(many))
        own = None if cache is None else cache.embed
        past = own.past(segments) if own is not None else (0,) * len(segments.lengths)
        # Positions count the embedder's own rows, so they come from its cache, not from the sequence.
        position = torch.cat([torch.arange(p, p + n) for p, n in zip(past, segments.lengths, strict=True)])
        x = self.layers(x, kind_T=kind, segments=segments, pos_T=position, cache=own)
        if E == 1:
            return Embedded(x)
        out = x[start]
        image = (sequence.kind_T == IMAGE).nonzero()[:, 0]
        if image.numel():
            rows = start[image][:, None] + torch.arange(E)
            out = out.index_copy(0, image, self.fold(x[rows].flatten(1)))
        return Embedded(out)


def documents(train: bool) -> list[Sequence]:
    image = {"image": MediaBatch(noise(2, 3, SIDE, SIDE, seed=1))}
    return [
        document([1, ("image", IMAGE, 2, 2), 2, 3, 4], image, train=train),
        document([5, 6, 7], {}, train=train),
        document([1, ("image", IMAGE, 1, 1), 8, ("image", IMAGE, 1, 1), 9], image, train=train),
    ]


def _build(expand: int) -> CausalVLM:
    model = CausalVLM(HolisticEmbedder(expand), build_decoder(LANGUAGE), TextHead(VOCAB, WIDTH))
    return initialise(model)


PRE = Skeleton("hovle-pre", lambda: _build(1), documents)
POST = Skeleton("hovle-post", lambda: _build(4), documents)
