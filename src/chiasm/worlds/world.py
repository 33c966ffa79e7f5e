"""What a world is: a deterministic, randomly accessible source of picture questions with exact answers.

``World.sample(index)`` depends on (family, split, seed, index) only: not on what was sampled before, not on the
process. ``write_jsonl`` writes the InternVL layout (``papers/internvl2_5.md`` section 3.1: a meta JSON over JSONL
files whose lines hold ``image`` and ``conversations``); ``build_cache`` renders once into arrays, so that drawing
stays off the training path.

Shape legend: N samples, S pixels a side (64 unless said otherwise); images are uint8 RGB, row 0 on top.
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
    "World",
    "build_cache",
    "cached",
    "load_cache",
    "resize_square",
    "write_jsonl",
]

#: Side of every native picture in pixels: one tile of chiasm-mini.
SIZE = 64
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """One question about one picture.

    Attributes:
        image: (S, S, 3) uint8 RGB.
        question: what the user asks, without image placeholder.
        answer: the exact answer, lower case, without full stop.
        family: name of the world ("cifar10", "fashion", "words", "counting").
        key: identifies the picture for ever, e.g. "words/train/0/17".
        meta: ground truth beyond the answer (class id, count, objects, font, ...), JSON-serialisable.
    """

    image: np.ndarray
    question: str
    answer: str
    family: str
    key: str
    meta: dict[str, Any] = field(default_factory=dict)

    def picture(self) -> Image.Image:
        """Return the image as a PIL picture in mode RGB."""
        return Image.fromarray(self.image)

    def to_message(self, *, answered: bool = True) -> list[dict[str, Any]]:
        """Return the conversation in the public message format (picture first, then the question).

        With ``answered=False`` the assistant's turn is left out, as for inference.
        """
        user = [{"type": "image", "image": self.picture()}, {"type": "text", "text": self.question}]
        turns: list[dict[str, Any]] = [{"role": "user", "content": user}]
        if answered:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": self.answer}]})
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


def write_jsonl(world: World, folder: str | Path, n: int | None = None) -> Path:
    """Write the first ``n`` samples as PNG files, one JSONL and the meta JSON of InternVL; return the meta's path.

    Layout: ``<family>_<split>.json`` (meta), ``<family>_<split>.jsonl``, ``images/<family>_<split>/00000.png``.
    Paths in the meta are relative to the meta file's folder.

    Raises:
        DataError: ``n`` is not between 1 and the world's length.
    """
    count = len(world) if n is None else n
    if not 1 <= count <= len(world):
        raise DataError(f"cannot write {count} samples of {world.family}/{world.split}: it has {len(world)}")
    root, name = Path(folder), f"{world.family}_{world.split}"
    (root / "images" / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        sample = world.sample(index)
        relative = f"images/{name}/{index:05d}.png"
        sample.picture().save(root / relative)
        row = {
            "id": sample.key,
            "image": relative,
            "width": sample.image.shape[1],
            "height": sample.image.shape[0],
            "conversations": [
                {"from": "human", "value": f"<image>\n{sample.question}"},
                {"from": "gpt", "value": sample.answer},
            ],
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    meta = {
        name: {
            "root": ".",
            "annotation": f"{name}.jsonl",
            "data_augment": False,
            "repeat_time": 1,
            "length": count,
        }
    }
    path = root / f"{name}.json"
    path.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return path


def build_cache(world: World, n: int | None, out: str | Path, *, start: int = 0) -> Path:
    """Render samples ``start .. start + n`` of a world into one ``.npz``; return its path.

    Arrays: ``images`` (N, S, S, 3) uint8 · ``question_ids`` (N,) int64 into ``questions`` (Q,) str · ``answers``
    (N,) str · ``keys`` (N,) str · ``meta`` (N,) str, one JSON object each · ``manifest`` () str, JSON.

    Raises:
        DataError: the range is not inside the world.
    """
    count = len(world) - start if n is None else n
    if count < 1 or start < 0 or start + count > len(world):
        raise DataError(
            f"{world.family}/{world.split} has {len(world)} samples, no range {start}..{start + count}"
        )
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    table: dict[str, int] = {}
    question_ids, answers, keys, meta = np.empty(count, np.int64), [], [], []
    for row in range(count):
        sample = world.sample(start + row)
        images[row] = sample.image
        question_ids[row] = table.setdefault(sample.question, len(table))
        answers.append(sample.answer)
        keys.append(sample.key)
        meta.append(json.dumps(sample.meta))
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
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
