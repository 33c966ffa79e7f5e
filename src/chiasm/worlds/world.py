"""What a world is: a deterministic, randomly accessible source of picture questions with exact answers.

``World.sample(index)`` depends on (family, split, seed, index) only: not on what was sampled before, not on the
process. A picture may have any size, a clip is a picture with an axis of frames in front, and one sample may hold
several questions. ``things`` gives the boxes and masks behind a picture. ``build_cache`` renders pictures of one size
into arrays, so that drawing stays off the training path; ``worlds.writers`` writes the public formats.

Shape legend: N samples, F frames, H x W pixels (64 x 64 unless said otherwise); uint8 RGB, row 0 on top.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from chiasm.errors import DataError

__all__ = [
    "SIZE",
    "SPLITS",
    "Sample",
    "Thing",
    "World",
    "build_cache",
    "cached",
    "load_cache",
    "resize_square",
]

#: Side of every native picture in pixels: one tile of chiasm-mini.
SIZE = 64
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Thing:
    """One object of a picture.

    Attributes:
        label: its category, e.g. "red circle" or "bar".
        box: (x0, y0, x1, y1) in pixels around what can be seen of it; x1 and y1 are exclusive.
        mask: (H, W) bool, what can be seen of it; None where the world knows boxes only.
    """

    label: str
    box: tuple[int, int, int, int]
    mask: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """One picture or clip, and one or more questions about it.

    Attributes:
        image: (H, W, 3) uint8 RGB; of a clip (F, H, W, 3).
        question: what the user asks, without image placeholder.
        answer: the exact answer, without full stop (lower case where it is a word of ours, not of the picture).
        family: name of the world ("cifar10", "words", "scenes", "charts", ...).
        key: identifies the picture for ever, e.g. "words/train/0/17".
        meta: ground truth beyond the answer (class id, count, objects, font, ...), JSON-serialisable.
        more: further (question, answer) pairs about the same picture, in order.
        fps: frames a second of a clip; 0 for a picture.
    """

    image: np.ndarray
    question: str
    answer: str
    family: str
    key: str
    meta: dict[str, Any] = field(default_factory=dict)
    more: tuple[tuple[str, str], ...] = ()
    fps: float = 0.0

    @property
    def is_clip(self) -> bool:
        """Whether ``image`` has an axis of frames."""
        return self.image.ndim == 4

    @property
    def rounds(self) -> tuple[tuple[str, str], ...]:
        """All (question, answer) pairs, the first one included."""
        return ((self.question, self.answer), *self.more)

    def picture(self) -> Image.Image:
        """Return the image (of a clip: its first frame) as a PIL picture in mode RGB."""
        return Image.fromarray(self.image[0] if self.is_clip else self.image)

    def frames(self) -> list[Image.Image]:
        """Return the frames of a clip as PIL pictures; a picture is its only frame."""
        return [Image.fromarray(frame) for frame in (self.image if self.is_clip else self.image[None])]

    def to_message(self, *, answered: bool = True) -> list[dict[str, Any]]:
        """Return the conversation in the public message format (picture or video first, then the question).

        With ``answered=False`` everything after the first question is left out, as for inference.
        """
        medium: dict[str, Any] = {"type": "image", "image": self.picture()} if not self.is_clip else {}
        if self.is_clip:
            medium = {"type": "video", "video": self.frames(), "folder_fps": self.fps}
        user = [medium, {"type": "text", "text": self.question}]
        turns: list[dict[str, Any]] = [{"role": "user", "content": user}]
        if answered:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": self.answer}]})
            for question, answer in self.more:
                turns.append({"role": "user", "content": [{"type": "text", "text": question}]})
                turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return turns


class World:
    """Base of the families: subclasses set ``family`` and ``questions`` and implement ``__len__`` and ``sample``.

    Args:
        split: "train", "dev" (for tuning) or "test" (looked at once).
        seed: changes what is drawn; splits stay disjoint for every pair of seeds.
    """

    family: str = ""
    #: Phrasings of the family's question; the first is canonical and the only one in dev and test.
    questions: tuple[str, ...] = ()
    #: Raised whenever the same index would give another picture or question; part of every manifest.
    version: int = 1

    def __init__(self, split: str, *, seed: int = 0) -> None:
        if split not in SPLITS:
            raise DataError(
                f"unknown split {split!r} of world {self.family}: choose one of {', '.join(SPLITS)}"
            )
        self.split = split
        self.seed = seed

    def __len__(self) -> int:
        raise NotImplementedError

    def sample(self, index: int) -> Sample:
        """Return sample ``index`` (0 ≤ index < len)."""
        raise NotImplementedError

    def things(self, index: int) -> list[Thing]:
        """Return the objects behind sample ``index``; a world that knows no boxes has none."""
        self.checked(index)
        return []

    def __iter__(self) -> Iterator[Sample]:
        return (self.sample(index) for index in range(len(self)))

    def manifest(self) -> dict[str, Any]:
        """Return what identifies this world's data: family, version, split, seed, length and the family's facts."""
        return {
            "family": self.family,
            "version": self.version,
            "split": self.split,
            "seed": self.seed,
            "length": len(self),
        }

    def random(self, index: int, purpose: str = "") -> np.random.Generator:
        """Return a fresh generator that depends on (family, split, seed, index, purpose) only."""
        name = f"{self.family}/{self.split}/{purpose}".encode()
        word = int.from_bytes(hashlib.blake2s(name, digest_size=4).digest(), "little")
        return np.random.Generator(np.random.PCG64([word, self.seed, index]))

    def checked(self, index: int) -> int:
        """Return ``index`` if it is in range.

        Raises:
            DataError: it is not.
        """
        if not 0 <= index < len(self):
            raise DataError(f"world {self.family}/{self.split} has {len(self)} samples, no index {index}")
        return int(index)

    def question_id(self, index: int) -> int:
        """Return the phrasing of sample ``index``: the canonical one outside the training split."""
        if self.split != "train":
            return 0
        return int(self.random(index, "question").integers(len(self.questions)))

    def key(self, index: int) -> str:
        """Return the permanent name of the picture of sample ``index``."""
        return f"{self.family}/{self.split}/{self.seed}/{index}"


def build_cache(world: World, n: int | None, out: str | Path, *, start: int = 0) -> Path:
    """Render samples ``start .. start + n`` of a world into one ``.npz``; return its path.

    Arrays: ``images`` (N, H, W, 3) uint8, clips (N, F, H, W, 3) · ``question_ids`` (N,) int64 into ``questions``
    (Q,) str · ``answers`` (N,) str · ``keys`` (N,) str · ``meta`` (N,) str, one JSON object each · ``manifest`` ()
    str, JSON · where a sample has further questions also ``more`` (N,) str, each a JSON list of pairs.

    Raises:
        DataError: the range is not inside the world, or its pictures differ in size.
    """
    count = len(world) - start if n is None else n
    if count < 1 or start < 0 or start + count > len(world):
        raise DataError(
            f"{world.family}/{world.split} has {len(world)} samples, no range {start}..{start + count}"
        )
    images = np.empty((0,), np.uint8)
    table: dict[str, int] = {}
    question_ids, answers, keys, meta, more = np.empty(count, np.int64), [], [], [], []
    for row in range(count):
        sample = world.sample(start + row)
        if row == 0:
            images = np.empty((count, *sample.image.shape), np.uint8)
        if sample.image.shape != images.shape[1:]:
            raise DataError(
                f"{sample.key} has the shape {sample.image.shape}, those before it {images.shape[1:]}: a cache "
                "holds one size; fix the world's size or write it with worlds.write_jsonl"
            )
        images[row] = sample.image
        more.append(json.dumps(sample.more))
        question_ids[row] = table.setdefault(sample.question, len(table))
        answers.append(sample.answer)
        keys.append(sample.key)
        meta.append(json.dumps(sample.meta))
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    extra = {"more": np.array(more)} if any(text != "[]" for text in more) else {}
    with partial.open("wb") as stream:
        np.savez(
            stream,
            images=images,
            question_ids=question_ids,
            questions=np.array(list(table)),
            answers=np.array(answers),
            keys=np.array(keys),
            meta=np.array(meta),
            manifest=np.array(json.dumps(world.manifest() | {"start": start, "count": count})),
            **extra,  # pyright: ignore[reportArgumentType] (numpy's stub of **kwds)
        )
    partial.replace(path)
    return path


def load_cache(path: str | Path) -> dict[str, np.ndarray]:
    """Read what ``build_cache`` wrote.

    Raises:
        DataError: no such file, or not a cache.
    """
    try:
        with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"cannot read the cache {path} ({error}): build it again with worlds.build_cache"
        ) from error
    missing = {"images", "question_ids", "questions", "answers", "keys", "meta", "manifest"} - set(arrays)
    if missing:
        raise DataError(f"{path} lacks {', '.join(sorted(missing))}: build it again with worlds.build_cache")
    return arrays


def cached(world: World, folder: str | Path, n: int | None = None) -> dict[str, np.ndarray]:
    """Return the arrays of ``build_cache`` for the first ``n`` samples, rendering them only the first time.

    The file's name holds a digest of the world's manifest (for words also of the fonts), so a changed world never
    reads an old cache.
    """
    count = len(world) if n is None else n
    digest = hashlib.blake2s(json.dumps(world.manifest() | {"n": count}).encode(), digest_size=6).hexdigest()
    path = Path(folder) / f"{world.family}-{world.split}-{world.seed}-{count}-{digest}.npz"
    return load_cache(path if path.is_file() else build_cache(world, count, path))


def resize_square(image: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Resize one (H, W[, 3]) uint8 picture to (size, size, 3) by PIL's bicubic; grey becomes RGB."""
    picture = Image.fromarray(image).convert("RGB")
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
