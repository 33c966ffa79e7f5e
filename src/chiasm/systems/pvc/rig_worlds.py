"""Pages of real handwritten digits, still and with a moving sprite, for the miniature experiments of PVC.

What: ``items(task, split, seed, first, count)`` draws NumPy batches of two tasks with one vocabulary of questions and
one of answers, so that one small decoder serves both (claims M1, M2, and M3, which mixes them).
Source: fact sheet PVC, section 7. Digits: UCI's optical recognition set as scikit-learn carries it (`load_digits`,
1,797 of 8 x 8 points, 0..16), the extra ``reproduce``.

- ``still``: 4 x 4 digits on 32 x 32 pixels, one frame; "which digit is at (row, column)?".
- ``clip``: the same page for `FRAMES` frames, and a bright square that moves by its own side in every one. Asked: a
  digit of the page (detail: the same in all frames in which the square is elsewhere), and of the square its direction
  at the end, the cell it ends in, and how often it turned.

Balance. The answer is drawn first, evenly. A page's digits are drawn evenly by class, then by writer. The ways that the
square may go are listed once, all of them, and one of those with the wanted answer is taken.

Held out. Digits are divided among the splits by sample, ways by way, both once and for ever; nothing of the test split
was seen in training.

An item depends on (task, split, seed, index, questions) alone.

Legend: N items, T frames, 32 x 32 pixels (uint8, 0..255), W ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

from chiasm.data.mixture import derive_seed
from chiasm.errors import ConfigError, missing_extra

__all__ = [
    "ANSWERS",
    "CELLS",
    "CLIP_QUESTIONS",
    "FRAMES",
    "QUESTIONS",
    "SIDE",
    "SPLITS",
    "SPRITE",
    "SQUARE",
    "STEPS",
    "Items",
    "answers_of",
    "items",
    "load_digits",
    "ways",
]

CELLS, CELL, SPRITE, FRAMES = 4, 8, 4, 8
"""Cells a row, pixels of a cell, of the square, frames of a clip."""
SIDE = CELLS * CELL
LATTICE = SIDE // SPRITE
MAX_TURNS = 3
SPLITS = ("train", "dev", "test")
SHARES = (0.7, 0.15, 0.15)
"""Of the digits of each class and of the ways, in the order of the splits."""
INK, SQUARE = 12, 255
"""Grey levels a step of ink (16 of them), and of the square, which nothing else reaches."""

DIRECTIONS = ("right", "down", "left", "up")
STEPS = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])
"""(x, y) of each of `DIRECTIONS`, in places of the lattice."""

QUESTIONS = (
    *(f"digit {row},{column}" for row, column in product(range(CELLS), repeat=2)),
    *("direction", "cell", "turns"),
)
"""What question numbers mean: 16 cells of the page, then the three about the square."""
CLIP_QUESTIONS = ("digit", "direction", "cell", "turns")
"""Kinds of the task "clip"; "still" asks "digit" alone."""
ANSWERS = (
    *map(str, range(10)),
    *DIRECTIONS,
    *(f"cell {row},{column}" for row, column in product(range(CELLS), repeat=2)),
    *(f"{n} turns" for n in range(MAX_TURNS + 1)),
)
"""What answer numbers mean."""
_FIRST = {"digit": 0, "direction": 10, "cell": 14, "turns": 14 + CELLS**2}
_SIZE = {"digit": 10, "direction": 4, "cell": CELLS**2, "turns": MAX_TURNS + 1}


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """N items.

    Attributes:
        frames_NTHW: uint8 grey levels; T is 1 for still pages, `FRAMES` for clips.
        question_N, answer_N: int64, places in `QUESTIONS` and `ANSWERS`.
        kind_N: int64, places in `CLIP_QUESTIONS`.
        digits_NRC: int64, what stands on the page.
        way_N: int64, the square's way, a row of `ways`; -1 for still pages.
    """

    frames_NTHW: np.ndarray
    question_N: np.ndarray
    answer_N: np.ndarray
    kind_N: np.ndarray
    digits_NRC: np.ndarray
    way_N: np.ndarray

    def __len__(self) -> int:
        return len(self.answer_N)


@dataclass(frozen=True, slots=True, eq=False)
class Ways:
    """All ways of the square that stay on the page and turn at most `MAX_TURNS` times.

    Attributes:
        place_WT2: (x, y) on the lattice of `LATTICE` x `LATTICE` places, in every frame.
        direction_W, cell_W, turns_W: at the end, place in `DIRECTIONS`, 4 * row + column, and number.
        split_W: place in `SPLITS`.
    """

    place_WT2: np.ndarray
    direction_W: np.ndarray
    cell_W: np.ndarray
    turns_W: np.ndarray
    split_W: np.ndarray


def answers_of(kind: str) -> range:
    """Places in `ANSWERS` that a kind of question can have; chance is one over their number."""
    return range(_FIRST[kind], _FIRST[kind] + _SIZE[kind])


@lru_cache(maxsize=1)
def load_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (pixels (1797, 8, 8) uint8 in steps of `INK`, class, place in `SPLITS`), each class divided alike.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise missing_extra("scikit-learn", "reproduce") from error
    found: Any = datasets.load_digits()
    pixels_DHW = np.round(found.images * INK).astype(np.uint8)
    class_D = found.target.astype(np.int64)
    split_D = np.empty(len(class_D), np.int64)
    for digit in range(10):
        own = np.flatnonzero(class_D == digit)
        split_D[own] = _divided(len(own), "digits", digit)
    return pixels_DHW, class_D, split_D


@lru_cache(maxsize=1)
def ways() -> Ways:
    """Return every way, in a fixed order."""
    # -1, 0, 1: turn left, go on, turn right before each step but the first.
    bends_BS = np.array(
        [bends for bends in product((0, 1, -1), repeat=FRAMES - 2) if np.count_nonzero(bends) <= MAX_TURNS]
    )
    starts_P2 = np.array(list(product(range(LATTICE), repeat=2)))
    B, P = len(bends_BS), len(starts_P2)
    heading_B4S = (
        np.concatenate([np.zeros((B, 1), np.int64), bends_BS.cumsum(1)], 1)[:, None] + np.arange(4)[:, None]
    )
    heading_B4S %= 4
    moved_B4T2 = np.zeros((B, 4, FRAMES, 2), np.int64)
    moved_B4T2[:, :, 1:] = STEPS[heading_B4S].cumsum(2)
    place_WT2 = (starts_P2[:, None, None, None] + moved_B4T2).reshape(-1, FRAMES, 2)
    kept_W = ((place_WT2 >= 0) & (place_WT2 < LATTICE)).all((1, 2))
    place_WT2 = place_WT2[kept_W]
    direction_W = np.broadcast_to(heading_B4S[..., -1], (P, B, 4)).reshape(-1)[kept_W]
    turns_W = np.broadcast_to(np.count_nonzero(bends_BS, 1)[:, None], (P, B, 4)).reshape(-1)[kept_W]
    cell_W2 = place_WT2[:, -1] * SPRITE // CELL
    return Ways(
        place_WT2=place_WT2,
        direction_W=direction_W,
        cell_W=CELLS * cell_W2[:, 1] + cell_W2[:, 0],
        turns_W=turns_W,
        split_W=_divided(len(place_WT2), "ways", 0),
    )


def items(
    task: str, split: str, seed: int, first: int, count: int, *, questions: Sequence[str] = CLIP_QUESTIONS
) -> Items:
    """Return items first … first + count - 1 of a task's split.

    Args:
        task: "still" or "clip".
        split: "train", "dev" or "test".
        seed: changes what is drawn, never what a split may draw from.
        first: index of the first item. count: how many, at least 1.
        questions: kinds that clips are asked about, in turn; still pages are asked about digits.

    Raises:
        ConfigError: an unknown task, split or question, or no items.
        MissingExtraError: scikit-learn is not installed.
    """
    if task not in ("still", "clip"):
        raise ConfigError(f"the rig has no task {task!r}: it has still, clip")
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} must be train, dev or test")
    kinds = ("digit",) if task == "still" else tuple(questions)
    unknown = [kind for kind in kinds if kind not in CLIP_QUESTIONS]
    if unknown or not kinds:
        raise ConfigError(f"unknown questions {unknown} about clips: choose from {', '.join(CLIP_QUESTIONS)}")
    if first < 0 or count < 1:
        raise ConfigError(f"items {first} to {first + count - 1} are none: first from 0, count from 1")
    page_NRC, way_N, kind_N, asked_N, answer_N = _drawn(task, split, seed, first, count, kinds)
    pixels_DHW, class_D, _ = load_digits()
    digits_NRC = class_D[page_NRC]
    still_NHW = pixels_DHW[page_NRC].transpose(0, 1, 3, 2, 4).reshape(count, SIDE, SIDE)
    frames_NTHW = np.repeat(still_NHW[:, None], 1 if task == "still" else FRAMES, 1)
    if task == "clip":
        x_NT, y_NT = np.moveaxis(ways().place_WT2[way_N] * SPRITE, -1, 0)
        n_N11 = np.arange(count)[:, None, None, None]
        t_T11 = np.arange(FRAMES)[:, None, None]
        rows = y_NT[..., None, None] + np.arange(SPRITE)[:, None]
        columns = x_NT[..., None, None] + np.arange(SPRITE)
        frames_NTHW[n_N11, t_T11, rows, columns] = SQUARE
    digit_N = kind_N == 0
    cells_N = digits_NRC.reshape(count, -1)[np.arange(count), asked_N]
    return Items(
        frames_NTHW=frames_NTHW,
        question_N=np.where(digit_N, asked_N, CELLS**2 - 1 + kind_N),
        answer_N=np.where(digit_N, cells_N, answer_N),
        kind_N=kind_N,
        digits_NRC=digits_NRC,
        way_N=way_N,
    )


def _drawn(
    task: str, split: str, seed: int, first: int, count: int, kinds: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Digits of the page, way, kind, cell that is asked about and answer of each item; one generator an item."""
    classes_NC, places_NC = np.empty((count, CELLS**2), np.int64), np.empty((count, CELLS**2))
    way_N, kind_N, asked_N, answer_N = (np.full(count, -1, np.int64) for _ in range(4))
    for n in range(count):
        index = first + n
        rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "pvc", task, split, index)))
        kind = kinds[index % len(kinds)]
        classes_NC[n], places_NC[n] = rng.integers(0, 10, CELLS**2), rng.random(CELLS**2)
        kind_N[n] = CLIP_QUESTIONS.index(kind)
        asked_N[n] = rng.integers(CELLS**2) if kind == "digit" else 0
        if task == "clip":
            wanted = rng.integers(_SIZE[kind]) if kind != "digit" else 0
            fitting = _fitting(split, kind, int(wanted))
            way_N[n] = fitting[rng.integers(len(fitting))]
            answer_N[n] = _FIRST[kind] + wanted
    row_D, first_C, size_C = _pool(split)
    page_NC = row_D[first_C[classes_NC] + (places_NC * size_C[classes_NC]).astype(np.int64)]
    return page_NC.reshape(count, CELLS, CELLS), way_N, kind_N, asked_N, answer_N


@lru_cache(maxsize=len(SPLITS))
def _pool(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The split's digits by class, and where each class begins among them and how many it has."""
    _, class_D, split_D = load_digits()
    own_D = np.flatnonzero(split_D == SPLITS.index(split))
    row_D = own_D[np.argsort(class_D[own_D], kind="stable")]
    size_C = np.bincount(class_D[row_D], minlength=10)
    return row_D, np.cumsum(size_C) - size_C, size_C


@lru_cache(maxsize=128)
def _fitting(split: str, kind: str, wanted: int) -> np.ndarray:
    """The split's ways with this answer; of questions about digits all of them."""
    every = ways()
    own_W = every.split_W == SPLITS.index(split)
    if kind != "digit":
        value_W = {"direction": every.direction_W, "cell": every.cell_W, "turns": every.turns_W}[kind]
        own_W = own_W & (value_W == wanted)
    return np.flatnonzero(own_W)


def _divided(count: int, what: str, part: int) -> np.ndarray:
    """Places in `SPLITS` of so many things, in the shares that each split has."""
    edges = np.round(np.cumsum(SHARES) * count).astype(np.int64)
    order = np.random.Generator(np.random.PCG64(derive_seed(0, "pvc", what, part))).permutation(count)
    out = np.empty(count, np.int64)
    out[order] = np.searchsorted(edges, np.arange(count), side="right")
    return out
