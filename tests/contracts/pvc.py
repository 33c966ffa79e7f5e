"""PVC: frames of one group see earlier frames inside the encoder, conditioned on their time.

Asks of the contracts: which spans form one temporal sequence (Span.group) and when each item was (times_N).
A still image is a group of repeats; a video a group whose frames stand apart in the text.
"""

from __future__ import annotations

import torch
from tests.contracts.skeleton import LANGUAGE, VOCAB, WIDTH, Skeleton, document, initialise, noise
from torch import Tensor, nn

from chiasm.data.sequence import VIDEO, MediaBatch, Sequence
from chiasm.model.causal import CausalVLM
from chiasm.nn.attention import Segments, attend
from chiasm.parts.contracts import Embedded, ModelCache
from chiasm.parts.embed import WordTable, overwrite_rows
from chiasm.parts.heads.text import TextHead
from chiasm.parts.language.decoder import build_decoder

PATCH, SIDE, TOKENS, D = 4, 8, 1, 12


class PVCEmbedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = WordTable(VOCAB, WIDTH)
        self.patch = nn.Linear(3 * PATCH * PATCH, D)
        self.time = nn.Linear(1, 2 * D)
        self.qkv = nn.Linear(D, 3 * D)
        self.compress = nn.Linear(4 * D, WIDTH)

    def frames(self, batch: MediaBatch, groups: list[int]) -> Tensor:
        """(N, …) frames -> (N, TOKENS, WIDTH); frames of a group in order of time, causal."""
        assert batch.times_N is not None
        x = batch.data.to(self.patch.weight.dtype) / 255
        N = x.shape[0]
        x = x.view(N, 3, 2, PATCH, 2, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(N, 4, -1)
        x = self.patch(x)
        scale, shift = self.time(batch.times_N.to(x.dtype)[:, None])[:, None].chunk(2, -1)
        x = x * (1 + scale) + shift
        # Temporal attention: for each patch, a row of frames; groups are documents of the same seam.
        q, k, v = self.qkv(x).chunk(3, -1)
        segments = Segments.from_docs(torch.tensor(groups))
        for patch in range(4):
            o = attend(q[:, patch, None], k[:, patch, None], v[:, patch, None], segments)
            x = torch.cat((x[:, :patch], (x[:, patch] + o[:, 0])[:, None], x[:, patch + 1 :]), 1)
        return self.compress(x.flatten(1))[:, None]

    def forward(self, sequence: Sequence, cache: ModelCache | None = None) -> Embedded:
        x_TC = self.words(sequence.ids_T)
        spans = sequence.spans_of("video")
        if not spans:
            return Embedded(x_TC)
        groups = [s.group for s in spans for _ in range(s.items)]
        encoded = self.frames(sequence.media["video"], groups).flatten(0, 1)
        return Embedded(
            overwrite_rows(x_TC, list(zip(spans, encoded.split([s.length for s in spans]), strict=True)))
        )


def documents(train: bool) -> list[Sequence]:
    still = noise(1, 3, SIDE, SIDE, seed=1).repeat(3, 1, 1, 1)
    image = {"video": MediaBatch(still, torch.tensor([0.0, 1.0, 2.0]))}
    clip = {"video": MediaBatch(noise(4, 3, SIDE, SIDE, seed=2), torch.tensor([0.0, 0.5, 2.0, 4.0]))}
    frame = ("video", VIDEO, 1, 1)
    return [
        document([1, ("video", VIDEO, 3, 3), 2, 3], image, train=train, group=0),
        document([4, frame, 5, frame, 6, frame, 7, frame, 8, 9], clip, train=train, group=0),
        document([3, 2, 1], {}, train=train),
    ]


def build() -> CausalVLM:
    return initialise(CausalVLM(PVCEmbedder(), build_decoder(LANGUAGE), TextHead(VOCAB, WIDTH)))


SKELETON = Skeleton("pvc", build, documents)
