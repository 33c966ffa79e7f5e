"""PVC: frames of one group see earlier frames inside the encoder, conditioned on their time. The real system, tiny.

Asked of the contracts: which spans form one temporal sequence (Span.group), when each item was (times_N), and how
often it is encoded (Span.repeats). The frames of a video stand apart in the text.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from tests.contracts.skeleton import LANGUAGE, Skeleton, document, initialise, noise

from chiasm.data.sequence import IMAGE, VIDEO, MediaBatch, Sequence
from chiasm.media.tiles import TilePolicy
from chiasm.model.causal import CausalVLM
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.parts.vision.progressive import TemporalConfig
from chiasm.systems.pvc.config import PVCConfig
from chiasm.systems.pvc.model import build_pvc

SIDE = 16
CONFIG = PVCConfig(
    vision=InternViTConfig(
        hidden_size=12, intermediate_size=20, layers=3, heads=2, patch_size=4, image_size=SIDE
    ),
    language=LANGUAGE,
    temporal=TemporalConfig(layers=2, time_sines=8, time_width=10, time_scale=3.0),
    tiles=TilePolicy(image_size=SIDE),
    repeats=3,
)


def repeated(sequence: Sequence, repeats: int) -> Sequence:
    """The document with its pictures repeated (their rows are there already)."""
    spans = tuple(replace(s, repeats=repeats) if s.media == "image" else s for s in sequence.spans)
    return replace(sequence, spans=spans)


def documents(train: bool) -> list[Sequence]:
    image = {"image": MediaBatch(noise(3, 3, SIDE, SIDE, seed=1))}
    clip = {"video": MediaBatch(noise(4, 3, SIDE, SIDE, seed=2), torch.tensor([0.0, 0.5, 2.0, 4.0]))}
    frame = ("video", VIDEO, 1, 1)
    wide = {"video": MediaBatch(noise(4, 3, SIDE, SIDE, seed=3), torch.tensor([1.0, 1.0, 3.0, 3.0]))}
    two = ("video", VIDEO, 2, 2)
    return [
        repeated(document([1, ("image", IMAGE, 6, 2), 2, ("image", IMAGE, 3, 1), 3], image, train=train), 3),
        document([4, frame, 5, frame, 6, frame, 7, frame, 8, 9], clip, train=train, group=0),
        document([3, 2, 1], {}, train=train),
        document([7, two, 5, two, 9, 4], wide, train=train, group=0),
    ]


def build() -> CausalVLM:
    return initialise(build_pvc(CONFIG))


SKELETON = Skeleton("pvc", build, documents)
