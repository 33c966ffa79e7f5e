"""MORE3D: points become scene tokens; the hidden state at each <SEG> is a query whose product with the per-point
features is that object's mask.

Asks of the contracts: an embedder that hands dense features past the trunk to the head, hidden states read at
positions (in training, and of tokens written in generation), and a head whose masks have their own loss parts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.contracts.skeleton import LANGUAGE, VOCAB, WIDTH, Skeleton, document, initialise
from torch import Tensor, nn

from chiasm.data.sequence import POINTS, MediaBatch, Sequence
from chiasm.model.causal import CausalVLM
from chiasm.parts.contracts import Embedded, Emission, LossPart, LossParts, ModelCache, Pick
from chiasm.parts.embed import WordTable, overwrite_rows
from chiasm.parts.heads.text import TextHead
from chiasm.parts.language.decoder import build_decoder

SEG, POINTS_N, TOKENS, F_DIM = 34, 12, 3, 8


class SceneEmbedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = WordTable(VOCAB, WIDTH)
        self.points = nn.Sequential(nn.Linear(6, F_DIM), nn.GELU(), nn.Linear(F_DIM, F_DIM))
        self.connect = nn.Linear(F_DIM, WIDTH)

    def forward(self, sequence: Sequence, cache: ModelCache | None = None) -> Embedded:
        x_TC = self.words(sequence.ids_T)
        spans = sequence.spans_of("points")
        if not spans:
            return Embedded(x_TC)
        dense_NPF = self.points(sequence.media["points"].data.to(x_TC.dtype))  # one scene an item
        tokens = self.connect(dense_NPF.view(len(spans), TOKENS, -1, F_DIM).mean(2))  # pooled superpoints
        rows = overwrite_rows(x_TC, list(zip(spans, tokens, strict=True)))
        return Embedded(rows, {"points": dense_NPF})


class SegmentingHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text = TextHead(VOCAB, WIDTH)
        self.query = nn.Linear(WIDTH, F_DIM)

    def masks(self, hidden_KC: Tensor, dense_KPF: Tensor) -> Tensor:
        """K states at <SEG> and the points of their scenes -> (K, P) mask logits."""
        return torch.einsum("kf,kpf->kp", self.query(hidden_KC), dense_KPF)

    def loss(self, hidden_TC: Tensor, sequence: Sequence, features: dict[str, Tensor]) -> LossParts:
        parts = dict(self.text.loss(hidden_TC, sequence).parts)
        at = (sequence.ids_T == SEG).nonzero()[:, 0]
        if at.numel():
            # Which scene a <SEG> belongs to: that of its document.
            scenes = {int(sequence.doc_T[s.start]): s.first for s in sequence.spans_of("points")}
            scene = torch.tensor([scenes[int(d)] for d in sequence.doc_T[at]])
            logits = self.masks(hidden_TC[at], features["points"][scene])
            target = sequence.media["masks"].data.to(logits.dtype)
            total = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
            parts["masks"] = LossPart(total, total.new_tensor(float(target.numel())), scale=0.5)
        return LossParts(parts)

    def step(self, hidden_NC: Tensor, docs: list[int], pick: Pick, cache: ModelCache) -> Emission:
        return self.text.step(hidden_NC, docs, pick, cache)


def documents(train: bool) -> list[Sequence]:
    generator = torch.Generator().manual_seed(5)
    out = []
    for n, tail in enumerate(([SEG, 4, SEG, 5], [6, SEG], [7, 8, 9, SEG, SEG, SEG])):
        points = torch.rand(1, POINTS_N, 6, generator=generator)
        masks = torch.rand(tail.count(SEG), POINTS_N, generator=generator) > 0.5
        media = {"points": MediaBatch(points)} | ({"masks": MediaBatch(masks)} if train else {})
        out.append(document([1, ("points", POINTS, TOKENS, 1), 2 + n, *tail], media, train=train))
    return out


def build() -> CausalVLM:
    return initialise(CausalVLM(SceneEmbedder(), build_decoder(LANGUAGE), SegmentingHead()))


SKELETON = Skeleton("more3d", build, documents)
