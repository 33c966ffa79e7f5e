"""The pictures from which chiasm-mini's vision side learns before it meets the language model.

A deterministic, randomly accessible stream of batches: CIFAR-10 and Fashion-MNIST training pictures, augmented on
the fly, and rendered words and counting scenes from caches. Everything that is known about a picture comes with
it (class id, count, letters, row of the teacher's features), -1 where it does not apply. ``batch(step)`` depends
on (seed, step) only, so a resumed run continues to the sample.

Augmentation: random mirror, a random crop of the native picture (both as one pair of interpolation matrices per
picture, applied as ``A @ picture @ B``: one batched matrix product for the whole batch), colour jitter. The
teacher has seen whole and mirrored pictures only, so ``plain`` pictures carry a teacher row, cropped ones do not.

Shape legend: B pictures in a batch, S = 64 pixels, H native pixels (32 or 28), L = 6 letters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chiasm.errors import DataError
from chiasm.worlds.assets import assets_dir
from chiasm.worlds.cifar10 import CifarWorld
from chiasm.worlds.counting import CountingWorld
from chiasm.worlds.fashion import FashionWorld
from chiasm.worlds.words import MAX_LETTERS, WordsWorld, letters
from chiasm.worlds.world import SIZE, World, cached

__all__ = ["FAMILIES", "DistillBatch", "DistillStream", "distill_worlds", "warp"]

#: Family ids of ``DistillBatch.family_B``.
FAMILIES = ("cifar10", "fashion", "words", "counting")
#: Seed of the rendered training pictures for distillation (0 is the instruction data).
_RENDER_SEED = 1


def distill_worlds(*, with_cifar: bool = True, folder: str | Path | None = None) -> dict[str, World]:
    """Return the training worlds of the stream by family: half of the words are random strings.

    Raises:
        DataError: an asset has not been prepared.
    """
    worlds: dict[str, World] = {"cifar10": CifarWorld("train", folder=folder)} if with_cifar else {}
    return worlds | {
        "fashion": FashionWorld("train", folder=folder),
        "words": WordsWorld("train", seed=_RENDER_SEED, size=24_000, pseudo=0.5, folder=folder),
        "counting": CountingWorld("train", seed=_RENDER_SEED, size=16_000),
    }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DistillBatch:
    """One batch with everything that is known about each picture.

    Attributes:
        tiles_B3SS: uint8 RGB pictures, channels first.
        family_B: index into ``FAMILIES``.
        class_B: class id for CIFAR-10 and Fashion-MNIST, else -1.
        count_B: number of objects 1..5 for counting, else -1.
        letters_BL: for words 0..25 at each position and 26 behind the end, else -1.
        teacher_B: row of ``teacher.npz`` computed from this very picture, else -1.
        index_B: index in the family's training world.
    """

    tiles_B3SS: np.ndarray
    family_B: np.ndarray
    class_B: np.ndarray
    count_B: np.ndarray
    letters_BL: np.ndarray
    teacher_B: np.ndarray
    index_B: np.ndarray


class DistillStream:
    """Batches of the training pictures; ``batch(step)`` is a pure function of (worlds, seed, step).

    Args:
        worlds: family -> training world, as from ``distill_worlds``.
        shares: family -> share of each batch (normalised here); the numbers of pictures are fixed a batch.
        batch: pictures a batch.
        cache: folder for the rendered words and scenes (default ``assets_dir()/cache``).
        seed: order, crops, mirrors and jitter.
        plain: share of CIFAR-10 and Fashion-MNIST pictures that are at most mirrored, hence have a teacher row.
        teacher: arrays of ``teacher.npz``, of which only the row columns are read; None gives rows of -1.

    Raises:
        DataError: a share without world, no picture at all, or ``plain`` outside 0..1.
    """

    def __init__(
        self,
        worlds: Mapping[str, World],
        shares: Mapping[str, float],
        *,
        batch: int,
        cache: str | Path | None = None,
        seed: int = 0,
        plain: float = 0.5,
        teacher: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        if set(shares) - set(worlds) or sum(shares.values()) <= 0 or batch < 1 or not 0.0 <= plain <= 1.0:
            raise DataError(
                f"shares {dict(shares)}, batch {batch}, plain {plain}: give positive shares of the families "
                f"{', '.join(worlds)}, a positive batch and plain in 0..1"
            )
        self.seed, self.plain = seed, plain
        self.amounts = _divide(batch, shares)
        folder = Path(cache) if cache is not None else assets_dir() / "cache"
        self._sources = {name: _source(worlds[name], folder) for name in self.amounts}
        self._teacher = {name: _teacher_rows(teacher, name, len(worlds[name])) for name in self.amounts}
        self._orders: dict[tuple[str, int], np.ndarray] = {}

    def batch(self, step: int) -> DistillBatch:
        """Return batch ``step`` (from 0 on): families in the order of ``FAMILIES``, pictures in epoch order."""
        parts = [self._part(name, amount, step) for name, amount in self.amounts.items()]
        return DistillBatch(**{key: np.concatenate([part[key] for part in parts]) for key in parts[0]})

    def _part(self, name: str, amount: int, step: int) -> dict[str, np.ndarray]:
        source = self._sources[name]
        index_B = self._indices(name, amount, step)
        rng = np.random.Generator(np.random.PCG64([self.seed, _word(name), step]))
        flip_B = np.zeros(amount, bool)
        teacher_B = self._teacher[name][index_B, 0]
        if name in ("cifar10", "fashion"):
            flip_B = rng.random(amount) < 0.5
            plain_B = rng.random(amount) < self.plain
            tiles_B3SS = _augment(source["images"][index_B], plain_B, flip_B, rng)
            teacher_B = np.where(plain_B, self._teacher[name][index_B, flip_B.astype(np.int64)], -1)
        else:
            tiles_B3SS = source["images"][index_B]
        return {
            "tiles_B3SS": tiles_B3SS,
            "family_B": np.full(amount, FAMILIES.index(name)),
            "class_B": source["class"][index_B],
            "count_B": source["count"][index_B],
            "letters_BL": source["letters"][index_B],
            "teacher_B": teacher_B,
            "index_B": index_B,
        }

    def _indices(self, name: str, amount: int, step: int) -> np.ndarray:
        """Return the indices at places step * amount ... of the family's endless row of shuffled epochs."""
        length = len(self._sources[name]["class"])
        place_B = step * amount + np.arange(amount)
        out = np.empty(amount, np.int64)
        for epoch in range(int(place_B[0]) // length, int(place_B[-1]) // length + 1):
            here = place_B // length == epoch
            out[here] = self._order(name, epoch, length)[place_B[here] % length]
        return out

    def _order(self, name: str, epoch: int, length: int) -> np.ndarray:
        if (name, epoch) not in self._orders:
            if len(self._orders) > 4 * len(self.amounts):
                self._orders.clear()
            rng = np.random.Generator(np.random.PCG64([self.seed, _word(name + "/order"), epoch]))
            self._orders[name, epoch] = rng.permutation(length)
        return self._orders[name, epoch]


def warp(pictures_BCHW: np.ndarray, boxes_B4: np.ndarray, flip_B: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Cut boxes out of pictures, mirror some, and enlarge them to (B, C, size, size) float32 by bicubic.

    Args:
        pictures_BCHW: any float or uint8 values.
        boxes_B4: (x0, y0, x1, y1) in native pixels, edges not centres; (0, 0, W, H) is the whole picture.
        flip_B: mirror left-right.
        size: output side; the boxes must not be larger than it (no antialiasing).

    Equals PIL's ``resize((size, size), BICUBIC, box=...)`` up to PIL's rounding and clipping to 0..255 after the
    first axis.
    """
    x_BCHW = pictures_BCHW.astype(np.float32)
    down_BSH = _bicubic(boxes_B4[:, 1], boxes_B4[:, 3], x_BCHW.shape[2], size)
    across_BSW = _bicubic(boxes_B4[:, 0], boxes_B4[:, 2], x_BCHW.shape[3], size)
    across_BSW[flip_B] = across_BSW[flip_B, ::-1]
    return down_BSH[:, None] @ x_BCHW @ across_BSW.transpose(0, 2, 1)[:, None]


def _bicubic(low_B: np.ndarray, high_B: np.ndarray, length: int, size: int) -> np.ndarray:
    """Return (B, size, length) float32: the weight of each input pixel in each output pixel (Keys, a = -0.5)."""
    centre_BS = low_B[:, None] + (np.arange(size) + 0.5) * ((high_B - low_B) / size)[:, None]
    distance = np.abs((np.arange(length) + 0.5) - centre_BS[..., None]).astype(np.float32)
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    weights = np.where(distance < 1.0, near, np.where(distance < 2.0, far, 0.0))
    return weights / weights.sum(-1, keepdims=True)


def _augment(
    pictures: np.ndarray, plain_B: np.ndarray, flip_B: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return (B, 3, S, S) uint8: plain pictures at most mirrored, the others cropped and jittered as well.

    The crop's sides are 70–100 % of the picture's, drawn apart; colours get a gain and a shift for each channel.
    """
    grey = pictures.ndim == 3
    x_BCHW = (pictures[:, None] if grey else pictures.transpose(0, 3, 1, 2)).astype(np.float32)
    batch, channels, height, width = x_BCHW.shape
    side_B2 = rng.uniform(0.7, 1.0, (batch, 2))
    corner_B2 = rng.uniform(0.0, 1.0, (batch, 2)) * (1.0 - side_B2)
    gain_BC, shift_BC = (
        rng.uniform(0.75, 1.25, (batch, 1)) * rng.uniform(0.9, 1.1, (batch, channels)),
        rng.uniform(-20.0, 20.0, (batch, 1)) + rng.uniform(-8.0, 8.0, (batch, channels)),
    )
    side_B2[plain_B], corner_B2[plain_B], gain_BC[plain_B], shift_BC[plain_B] = 1.0, 0.0, 1.0, 0.0
    mean_BC11 = x_BCHW.mean((2, 3), keepdims=True)
    x_BCHW = (x_BCHW - mean_BC11) * gain_BC[..., None, None].astype(np.float32) + mean_BC11
    if not grey:  # a black background stays black on the grey family
        x_BCHW += shift_BC[..., None, None].astype(np.float32)
    extent = np.array([width, height])
    boxes_B4 = np.concatenate([corner_B2 * extent, (corner_B2 + side_B2) * extent], axis=1)
    y_BCSS = warp(x_BCHW, boxes_B4, flip_B)
    tiles = np.clip(np.rint(y_BCSS), 0, 255).astype(np.uint8)
    return tiles.repeat(3, axis=1) if grey else tiles


def _source(world: World, cache: Path) -> dict[str, np.ndarray]:
    """Return the family's pictures and labels as arrays: native and channels last, or rendered and first."""
    n = len(world)
    columns = {
        "class": np.full(n, -1, np.int64),
        "count": np.full(n, -1, np.int64),
        "letters": np.full((n, MAX_LETTERS), -1, np.int64),
    }
    if isinstance(world, CifarWorld | FashionWorld):
        images, columns["class"] = world.arrays()
        return columns | {"images": images}
    arrays = cached(world, cache)
    if isinstance(world, CountingWorld):
        columns["count"] = np.array([world.count(index) for index in range(n)])
    else:
        columns["letters"] = np.stack([letters(str(word)) for word in arrays["answers"]])
    return columns | {"images": np.ascontiguousarray(arrays["images"].transpose(0, 3, 1, 2))}


def _teacher_rows(teacher: Mapping[str, np.ndarray] | None, family: str, length: int) -> np.ndarray:
    """Return (length, 2) int64: the teacher's row of each training picture as it is and mirrored, -1 if none."""
    rows = np.full((length, 2), -1, np.int64)
    if teacher is not None:
        here = np.flatnonzero((teacher["family"] == family) & (teacher["split"] == "train"))
        here = here[teacher["index"][here] < length]
        rows[teacher["index"][here], teacher["flip"][here].astype(np.int64)] = here
    return rows


def _divide(batch: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Return family -> pictures a batch, in the order of ``FAMILIES``, by largest remainder."""
    total = sum(shares.values())
    names = [name for name in FAMILIES if shares.get(name, 0.0) > 0.0]
    exact = {name: batch * shares[name] / total for name in names}
    amounts = {name: int(exact[name]) for name in names}
    for name in sorted(names, key=lambda name: amounts[name] - exact[name])[: batch - sum(amounts.values())]:
        amounts[name] += 1
    return {name: amount for name, amount in amounts.items() if amount > 0}


def _word(name: str) -> int:
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little")
