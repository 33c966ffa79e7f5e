"""InternVL: features of tiles are scattered into the word table. The real system at a tiny size."""

from __future__ import annotations

from tests.contracts.skeleton import LANGUAGE, Skeleton, document, initialise, noise

from chiasm.data.sequence import IMAGE, MediaBatch, Sequence
from chiasm.media.tiles import TilePolicy
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.model import build_internvl

CONFIG = InternVLConfig(
    vision=InternViTConfig(
        hidden_size=12, intermediate_size=20, layers=2, heads=2, patch_size=4, image_size=16
    ),
    language=LANGUAGE,
    tiles=TilePolicy(image_size=16),
    template="internvl2_5",
)


def documents(train: bool) -> list[Sequence]:
    one = {"image": MediaBatch(noise(1, 3, 16, 16, seed=1))}
    two = {"image": MediaBatch(noise(3, 3, 16, 16, seed=2))}
    return [
        document([1, 2, ("image", IMAGE, 4, 1), 3, 4, 5], one, train=train),
        document([7, 8, 9, 10, 11], {}, train=train),
        document([1, ("image", IMAGE, 8, 2), 3, ("image", IMAGE, 4, 1), 6, 7], two, train=train),
    ]


SKELETON = Skeleton("internvl", lambda: initialise(build_internvl(CONFIG)), documents)
