"""Clips: sprites that move, appear, vanish and blink over a background, with questions about time and detail.

Sprites are drawn shapes (divided among the splits as in ``worlds.scenes``), named drawings (asset "emoji", as in
``worlds.clipart``) or photographs of CIFAR-10 (asset "cifar10"). Backgrounds are drawn or photographs (asset "photos"),
which stay, or successive frames of real videos (``footage``), which move. Every object has a band or a cell of its own,
so nothing is ever hidden by anything else.

Kinds about time: ``direction`` (left, right, up, down or not at all), ``speed`` (which of two is faster), ``first``
and ``last`` (which appears so), ``order`` (does one appear before the other), ``gone`` (which vanishes first) and
``count`` (how often one blinks). Kinds about what stays, which any frame answers while others blink: ``corner`` (which
quarter of the picture something is in) and ``sign`` (the two small digits on a plate); ask them by ``questions``.
The answer is drawn first, evenly, then a clip for it.

Frame: pixels, origin at the top left corner, y down; boxes (x0, y0, x1, y1) with exclusive ends. Frame f is shown at
f / fps seconds.

Shape legend: F frames, H x W pixels, h x w of a sprite.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from chiasm.errors import DataError
from chiasm.media.frames import middle_indices
from chiasm.media.video import open_video
from chiasm.worlds.cifar10 import ANSWERS, CifarWorld
from chiasm.worlds.clipart import drawings_of, photo_crop, resize_drawing
from chiasm.worlds.scenes import pairs_of, pixels_of
from chiasm.worlds.sprites import (
    ANGLES,
    COLOURS,
    TEXTURES,
    background,
    box_of,
    paste,
    shape_alpha,
    sprite_colours,
)
from chiasm.worlds.world import Sample, Thing, World, resize_square

__all__ = ["CORNERS", "DETAILS", "DIRECTIONS", "MOST_FOOTAGE", "QUESTIONS", "ClipsWorld"]

QUESTIONS = ("direction", "speed", "first", "last", "order", "gone", "count")
DETAILS = ("corner", "sign")
CORNERS = ("upper left", "upper right", "lower left", "lower right")
DIRECTIONS = ("left", "right", "up", "down", "not at all")
TIMES = ("zero", "one", "two", "three", "four")
#: Frames of one file of footage that are kept in memory.
MOST_FOOTAGE = 600
#: The faster of two moves at least this many times as far.
_FASTER = 1.8
#: 3 x 5 points a digit, row by row from the top.
_GLYPHS = {
    "0": "111101101101111",
    "1": "010110010010111",
    "2": "111001111100111",
    "3": "111001111001111",
    "4": "101101111001001",
    "5": "111100111001111",
    "6": "111100111101111",
    "7": "111001010010010",
    "8": "111101111101111",
    "9": "111101111001111",
}

_WORDINGS: dict[str, tuple[str, ...]] = {
    "direction": (
        "In which direction does the {a} move?",
        "Where does the {a} move to: left, right, up, down?",
    ),
    "speed": ("Which moves faster, the {a} or the {b}?", "Which is faster: the {a} or the {b}?"),
    "first": ("What appears first?", "Which object comes into view first?"),
    "last": ("What appears last?", "Which object comes into view last?"),
    "order": ("Does the {a} appear before the {b}?",),
    "gone": ("What disappears first?", "Which object vanishes first?"),
    "count": ("How many times does the {a} disappear?", "How often does the {a} vanish?"),
    "corner": ("In which corner is the {a}?", "Which corner of the picture is the {a} in?"),
    "sign": ("Which number is on the sign?", "What number does the sign show?"),
}


@dataclass(slots=True, kw_only=True, eq=False)
class _Mover:
    """One object: its sprite and, for every frame, where its cell begins and whether it is to be seen."""

    name: str
    alpha: np.ndarray  # (h, w) 0..1
    colours: np.ndarray  # (3,) or (h, w, 3)
    tone: np.ndarray  # (3,) what the background should be far from
    facts: dict[str, Any]
    path: list[tuple[int, int]]
    seen: list[bool]


class ClipsWorld(World):
    """Questions about short clips.

    Args:
        split: "train", "dev" or "test".
        seed: changes the clips.
        size: number of samples (default 5,000 for train, 1,000 else).
        pixels: side or (width, height), at least 48.
        frames: number of frames, or the least and the largest number: 8..128.
        fps: frames a second that a clip claims to have.
        questions: kinds, asked in turn, of `QUESTIONS` (the default) and `DETAILS`.
        sprites: "shapes", "drawings" or "cifar10".
        photos: share of clips on a photograph, 0..1.
        footage: video files (or one) whose frames are the backgrounds of all clips, instead. Of each the first 70 %
            are for train, the next 15 % for dev, the rest for test. At most `MOST_FOOTAGE` frames of a file are kept,
            evenly spread, at twice the size of the clip's shorter side.
        folder: where the prepared assets are.

    Raises:
        DataError: unknown kind, numbers out of range, or an asset has not been prepared.
        ImageError: a video of the footage cannot be read.
        MissingExtraError: footage without PyAV.
    """

    family = "clips"

    def __init__(
        self,
        split: str,
        *,
        seed: int = 0,
        size: int | None = None,
        pixels: int | Sequence[int] = 64,
        frames: int | Sequence[int] = 8,
        fps: float = 4.0,
        questions: Sequence[str] = QUESTIONS,
        sprites: Literal["shapes", "drawings", "cifar10"] = "shapes",
        photos: float = 0.0,
        footage: str | Path | Sequence[str | Path] = (),
        folder: str | Path | None = None,
    ) -> None:
        super().__init__(split, seed=seed)
        self.pixels = pixels_of(pixels, 48)
        span = (frames, frames) if isinstance(frames, int) else tuple(int(k) for k in frames)
        if len(span) != 2 or not 8 <= span[0] <= span[1] <= 128 or not 0 < fps <= 240:
            raise DataError(f"frames={frames!r} fps={fps:g}: give 8..128 frames and a rate of at most 240")
        self.frames, self.fps = span, float(fps)
        self.asked = (questions,) if isinstance(questions, str) else tuple(questions)
        kinds = QUESTIONS + DETAILS
        unknown = [name for name in self.asked if name not in kinds]
        if unknown or not self.asked:
            raise DataError(f"unknown questions {unknown} of clips: choose from {', '.join(kinds)}")
        if sprites not in ("shapes", "drawings", "cifar10"):
            raise DataError(f"sprites={sprites!r}: choose shapes, drawings or cifar10")
        if not 0.0 <= photos <= 1.0:
            raise DataError(f"photos={photos}: give the share of photographic backgrounds, 0..1")
        files = (footage,) if isinstance(footage, str | Path) else tuple(footage)
        if files and photos:
            raise DataError("clips are on photographs or on footage: leave out photos or footage")
        self.sprites, self.photos, self._folder = sprites, photos, folder
        self.pairs = pairs_of(split)
        self._drawings = drawings_of(split, "drawing", folder) if sprites == "drawings" else ()
        self._cifar = CifarWorld(split, folder=folder) if sprites == "cifar10" else None
        if photos:
            photo_crop(split, 8, 8, self.random(0), folder)
        self.footage = tuple(Path(file) for file in files)
        self._films = [_film(file, 2 * min(self.pixels), split) for file in self.footage]
        self._size = size if size is not None else (5_000 if split == "train" else 1_000)

    def __len__(self) -> int:
        return self._size

    def sample(self, index: int) -> Sample:
        """Return sample ``index``, with ``image`` (F, H, W, 3).

        ``meta``: ``kind``, ``about`` (numbers of the objects that the question names), ``background``, and ``objects``
        (name, facts, and ``boxes``: for every frame the box around what is seen of it, or null).
        """
        i = self.checked(index)
        rng = self.random(i)
        movers, kind, about, names, answer = self._plan(i, rng)
        count = len(movers[0].path)
        ground_FHW3, facts = self._ground(movers, count, rng)
        clip = np.empty((count, *ground_FHW3.shape[1:]), np.uint8)
        clip[:] = np.clip(ground_FHW3 + 0.5, 0, 255).astype(np.uint8)
        for f in range(count):
            seen = [mover for mover in movers if mover.seen[f]]
            if seen:
                image = ground_FHW3[f % len(ground_FHW3)].astype(np.float32)
                for mover in seen:
                    paste(image, mover.alpha, mover.colours, *mover.path[f])
                clip[f] = np.clip(image + 0.5, 0, 255).astype(np.uint8)
        wordings = _WORDINGS[kind]
        wording = wordings[int(rng.integers(len(wordings))) if self.split == "train" else 0]
        return Sample(
            image=clip,
            question=wording.format(**names),
            answer=answer,
            family=self.family,
            key=self.key(i),
            fps=self.fps,
            meta={
                "kind": kind,
                "about": about,
                "background": facts,
                "objects": [{"name": m.name, **m.facts, "boxes": _boxes(m)} for m in movers],
            },
        )

    def things(self, index: int) -> list[Thing]:
        """Return the objects of the first frame in which each is seen, with boxes of that frame."""
        i = self.checked(index)
        movers, *_ = self._plan(i, self.random(i))
        found = [(mover.name, next((box for box in _boxes(mover) if box), None)) for mover in movers]
        return [Thing(label=name, box=(b[0], b[1], b[2], b[3])) for name, b in found if b is not None]

    def manifest(self) -> dict[str, Any]:
        """Return the base facts and all options."""
        return (
            super().manifest()
            | {
                "pixels": list(self.pixels),
                "frames": list(self.frames),
                "fps": self.fps,
                "questions": list(self.asked),
                "sprites": self.sprites,
                "photos": self.photos,
            }
            | ({"footage": [_digest(file) for file in self.footage]} if self.footage else {})
        )

    # --- one clip -------------------------------------------------------------------------------------------

    def _plan(
        self, index: int, rng: np.random.Generator
    ) -> tuple[list[_Mover], str, list[int], dict[str, str], str]:
        """Return the objects with their paths, the kind, whom it is about, the names it says, and the answer."""
        block, place = divmod(index, len(self.asked))
        kind = self.asked[int(self.random(block, "kinds").permutation(len(self.asked))[place])]
        count = int(rng.integers(self.frames[0], self.frames[1] + 1))
        if kind == "direction":
            return self._direction(count, rng)
        if kind == "speed":
            return self._speed(count, rng)
        if kind == "count":
            return self._blinks(count, rng)
        if kind in DETAILS:
            return self._detail(kind, count, rng)
        return self._appearances(kind, count, rng)

    def _direction(
        self, count: int, rng: np.random.Generator
    ) -> tuple[list[_Mover], str, list[int], dict[str, str], str]:
        wanted = DIRECTIONS[int(rng.integers(len(DIRECTIONS)))]
        lying = wanted in ("left", "right") if wanted != "not at all" else bool(rng.integers(2))
        number = 1 + int(rng.integers(3))
        asked = int(rng.integers(number))
        movers = []
        for k in range(number):
            mover = self._sprite(self._side(number, rng), rng, movers)
            way = 0 if wanted == "not at all" else (1 if wanted in ("right", "down") else -1)
            if k != asked:
                way = int(rng.integers(-1, 2))
            self._along(mover, k, number, lying, way, float(rng.uniform(0.6, 1.0)), count, rng)
            movers.append(mover)
        return movers, "direction", [asked], {"a": movers[asked].name}, wanted

    def _speed(
        self, count: int, rng: np.random.Generator
    ) -> tuple[list[_Mover], str, list[int], dict[str, str], str]:
        lying, number = bool(rng.integers(2)), 2 + int(rng.integers(2))
        fast, slow = (int(k) for k in rng.permutation(number)[:2])
        side = self._side(number, rng)
        movers = []
        far = float(rng.uniform(0.7, 1.0))
        for k in range(number):
            mover = self._sprite(side, rng, movers)
            share = far if k == fast else far / float(rng.uniform(_FASTER, 3.0))
            self._along(mover, k, number, lying, 1 if rng.random() < 0.5 else -1, share, count, rng)
            movers.append(mover)
        first, second = (fast, slow) if rng.random() < 0.5 else (slow, fast)
        names = {"a": movers[first].name, "b": movers[second].name}
        return movers, "speed", [first, second], names, movers[fast].name

    def _blinks(
        self, count: int, rng: np.random.Generator
    ) -> tuple[list[_Mover], str, list[int], dict[str, str], str]:
        most = min(4, (count - 1) // 2)
        number = 1 + int(rng.integers(3))
        movers = self._cells(number, count, rng)
        asked = int(rng.integers(number))
        answer = 0
        for k, mover in enumerate(movers):
            times = int(rng.integers(0 if k != asked else 1, most + 1))
            mover.seen = _blinking(times, count, rng)
            answer = times if k == asked else answer
        return movers, "count", [asked], {"a": movers[asked].name}, TIMES[answer]

    def _appearances(
        self, kind: str, count: int, rng: np.random.Generator
    ) -> tuple[list[_Mover], str, list[int], dict[str, str], str]:
        number = 2 + int(rng.integers(3))
        movers = self._cells(number, count, rng)
        # The frame of each event: all different, none in the first or last frame.
        events = sorted(int(f) + 1 for f in rng.permutation(count - 2)[:number])
        order = [int(k) for k in rng.permutation(number)]
        for frame, k in zip(events, order, strict=True):
            movers[k].seen = [f < frame if kind == "gone" else f >= frame for f in range(count)]
        if kind == "order":
            yes = bool(rng.integers(2))
            a, b = sorted(int(k) for k in rng.permutation(number)[:2])
            first, second = (order[a], order[b]) if yes else (order[b], order[a])
            names = {"a": movers[first].name, "b": movers[second].name}
            return movers, kind, [first, second], names, "yes" if yes else "no"
        chosen = order[-1] if kind == "last" else order[0]
        return movers, kind, [chosen], {}, movers[chosen].name

    def _detail(
        self, kind: str, count: int, rng: np.random.Generator
    ) -> tuple[list[_Mover], str, list[int], dict[str, str], str]:
        """Something that stays, in a quarter of its own; whatever else there is blinks."""
        number = 1 + int(rng.integers(3))
        quarters = [int(k) for k in rng.permutation(4)]
        movers = self._cells(number, count, rng, quarters)
        asked = 0
        answer = CORNERS[quarters[0]]
        if kind == "sign":
            answer = str(int(rng.integers(10, 100)))
            asked = number
            movers.append(self._sign(answer, quarters[number], count, rng))
        for k, mover in enumerate(movers):
            if k != asked:
                mover.seen = _blinking(int(rng.integers(0, min(4, (count - 1) // 2) + 1)), count, rng)
        return movers, kind, [asked], {"a": movers[asked].name}, answer

    # --- objects --------------------------------------------------------------------------------------------

    def _side(self, number: int, rng: np.random.Generator) -> int:
        """The side of sprites that share the picture in ``number`` bands."""
        return max(9, round(min(self.pixels) * float(rng.uniform(0.20, 0.27 if number < 3 else 0.25))))

    def _sprite(self, side: int, rng: np.random.Generator, others: list[_Mover]) -> _Mover:
        """Choose an object whose name no other one has."""
        while True:
            facts: dict[str, Any] = {}
            if self.sprites == "drawings":
                drawing = self._drawings[int(rng.integers(len(self._drawings)))]
                name, rgba = drawing.name, resize_drawing(drawing, side)
                alpha, colours = rgba[..., 3] / np.float32(255.0), rgba[..., :3]
                facts = {"style": drawing.style, "source": drawing.source}
            elif self._cifar is not None:
                images, labels = self._cifar.arrays()
                row = int(rng.integers(len(labels)))
                name = ANSWERS[self._cifar.names[int(labels[row])]]
                colours = resize_square(images[row], side).astype(np.float32)
                alpha = np.ones((side, side), np.float32)
                facts = {"row": int(self._cifar.rows_N[row])}
            else:
                shape, colour = self.pairs[int(rng.integers(len(self.pairs)))]
                angle = ANGLES[shape][int(rng.integers(len(ANGLES[shape])))]
                texture = TEXTURES[max(0, int(rng.integers(-1, len(TEXTURES))))]
                name, alpha = f"{colour} {shape}", shape_alpha(shape, side, side, angle)
                base = np.array(COLOURS[colour], np.float32)
                fill = sprite_colours(base, texture, side, side, int(rng.integers(3)))
                colours = base if fill is None else fill
                facts = {"texture": texture}
            if all(other.name != name for other in others):
                tone = colours if colours.ndim == 1 else colours[alpha >= 0.5].mean(0)
                return _Mover(
                    name=name, alpha=alpha, colours=colours, tone=tone, facts=facts, path=[], seen=[]
                )

    def _along(
        self,
        mover: _Mover,
        band: int,
        bands: int,
        lying: bool,
        way: int,
        share: float,
        count: int,
        rng: np.random.Generator,
    ) -> None:
        """Move along a band (a row if ``lying``) by ``share`` of its length, evenly; ``way`` is +1, -1 or 0."""
        width, height = self.pixels
        h, w = mover.alpha.shape
        length, across = (width - w, height) if lying else (height - h, width)
        thick = w if not lying else h
        slack = across / bands - thick
        beside = round(band * across / bands + float(rng.random()) * max(0.0, slack))
        run = share * length
        start = float(rng.uniform(0, length - run)) + (run if way < 0 else 0.0)
        if way == 0:
            start = float(rng.uniform(0, length))
        for f in range(count):
            at = round(start + way * run * f / (count - 1))
            mover.path.append((at, beside) if lying else (beside, at))
        mover.seen = [True] * count

    def _sign(self, number: str, cell: int, count: int, rng: np.random.Generator) -> _Mover:
        """A white plate with black digits, somewhere in a quarter, where it stays."""
        width, height = self.pixels
        point = max(1, min(self.pixels) // 32)
        dark_hw = np.zeros((7, 9), bool)
        for n, digit in enumerate(number):
            rows = np.array(list(_GLYPHS[digit])).reshape(5, 3) == "1"
            dark_hw[1:6, 1 + 4 * n : 4 + 4 * n] = rows
        plate_hw3 = (
            np.repeat(np.where(dark_hw, 0.0, 255.0)[..., None], 3, 2).repeat(point, 0).repeat(point, 1)
        )
        h, w = plate_hw3.shape[:2]
        x = round((cell % 2) * width / 2 + float(rng.uniform(0, width / 2 - w)))
        y = round((cell // 2) * height / 2 + float(rng.uniform(0, height / 2 - h)))
        return _Mover(
            name="sign",
            alpha=np.ones((h, w), np.float32),
            colours=plate_hw3.astype(np.float32),
            tone=np.full(3, 255.0, np.float32),
            facts={"number": number},
            path=[(x, y)] * count,
            seen=[True] * count,
        )

    def _cells(
        self, number: int, count: int, rng: np.random.Generator, quarters: Sequence[int] | None = None
    ) -> list[_Mover]:
        """Put objects into cells of a 2 x 2 grid, where each drifts by at most a few pixels."""
        width, height = self.pixels
        movers: list[_Mover] = []
        for cell in (int(k) for k in (rng.permutation(4) if quarters is None else quarters)[:number]):
            mover = self._sprite(self._side(2, rng), rng, movers)
            h, w = mover.alpha.shape
            ends = []
            for _ in range(2):
                x = (cell % 2) * width / 2 + float(rng.uniform(0, width / 2 - w))
                y = (cell // 2) * height / 2 + float(rng.uniform(0, height / 2 - h))
                ends.append((x, y))
            if rng.random() < 0.5:
                ends[1] = ends[0]
            for f in range(count):
                t = f / (count - 1)
                mover.path.append(
                    (
                        round(ends[0][0] + t * (ends[1][0] - ends[0][0])),
                        round(ends[0][1] + t * (ends[1][1] - ends[0][1])),
                    )
                )
            mover.seen = [True] * count
            movers.append(mover)
        return movers

    def _ground(
        self, movers: list[_Mover], count: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The background: (F, H, W, 3), or (1, H, W, 3) where it stays."""
        if self._films:
            k = int(rng.integers(len(self._films)))
            return _footage(self._films[k], self.footage[k].name, self.pixels, count, rng)
        if rng.random() < self.photos:
            still, facts = photo_crop(self.split, *self.pixels, rng, self._folder)
        else:
            tones = [mover.tone for mover in movers] if self.sprites == "shapes" else []
            still, facts = background(rng, *self.pixels, tones)
        return still[None], facts


@functools.lru_cache(maxsize=16)
def _film(file: Path, side: int, split: str) -> np.ndarray:
    """The split's frames of a video, (F, h, w, 3) uint8, the shorter side as long as told."""
    with open_video(file) as video:
        wanted = middle_indices(len(video), min(len(video), MOST_FOOTAGE), "hf")
        shares = {"train": (0.0, 0.7), "dev": (0.7, 0.85), "test": (0.85, 1.0)}[split]
        low, high = (round(share * len(wanted)) for share in shares)
        if high - low < 2:
            raise DataError(
                f"{file.name}: its {len(video)} frames are too few to be divided among the splits: give a longer video"
            )
        frames = []
        for image, _ in video.each(wanted[low:high]):
            scale = side / min(image.size)
            size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
            frames.append(np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.uint8))
    if len({frame.shape for frame in frames}) > 1:
        raise DataError(f"{file.name}: its frames change their size: convert it to one size")
    return np.stack(frames)


def _footage(
    film_FHW3: np.ndarray, name: str, pixels: tuple[int, int], count: int, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, Any]]:
    """Successive frames, cropped alike; a film that is shorter runs to and fro."""
    width, height = pixels
    F, high, wide = film_FHW3.shape[:3]
    scale = float(rng.uniform(1.0, min(wide / width, high / height)))
    w, h = min(wide, round(width * scale)), min(high, round(height * scale))
    x, y, start = (int(rng.integers(room)) for room in (wide - w + 1, high - h + 1, F))
    there = np.arange(start, start + count) % (2 * F - 2)
    indices = np.where(there < F, there, 2 * F - 2 - there)
    frames = [
        Image.fromarray(film_FHW3[f, y : y + h, x : x + w]).resize((width, height), Image.Resampling.BILINEAR)
        for f in indices
    ]
    facts = {"kind": "footage", "tone": name, "start": start, "crop": [x, y, x + w, y + h]}
    return np.stack([np.asarray(frame, np.float32) for frame in frames]), facts


def _digest(file: Path) -> dict[str, str]:
    digest = hashlib.blake2b(digest_size=8)
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return {"file": file.name, "hash": digest.hexdigest()}


def _boxes(mover: _Mover) -> list[list[int] | None]:
    left, top, right, bottom = box_of(mover.alpha >= 0.5)
    return [
        [x + left, y + top, x + right, y + bottom] if seen else None
        for (x, y), seen in zip(mover.path, mover.seen, strict=True)
    ]


def _blinking(times: int, count: int, rng: np.random.Generator) -> list[bool]:
    """Be seen in the first and last frame and hidden in ``times`` separate runs of frames between."""
    # 2 * times changes at different frames 1 .. count - 1; the last one leaves it seen.
    changes = sorted(int(f) + 1 for f in rng.permutation(count - 1)[: 2 * times])
    seen, now = [], True
    for f in range(count):
        if f in changes:
            now = not now
        seen.append(now)
    return seen
