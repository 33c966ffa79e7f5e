"""Pages and clips of `rig_worlds` as packed sequences, whole batches at once.

A document is the tokens of a page or of a clip and its questions, a word each; the answer, a word, is predicted at the
question's own row. So one encoded picture teaches all of its answers, and what its few tokens leave out is missing in
one of them. Digits are asked behind everything. The square is asked about again and again while a clip goes on, each
time of the clip so far: a small model would not learn it from one answer a clip.

Arms of an experiment that share a seed share their data and its order.

Shape legend: N documents, T frames of a document (rows where it is a whole batch's), Q questions, W words, S side of a
page, F frames of all documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from chiasm.data.mixture import Draw, derive_seed
from chiasm.data.sequence import IGNORE, IMAGE, TEXT, VIDEO, MediaBatch, Span
from chiasm.data.sequence import Sequence as Row
from chiasm.errors import ConfigError
from chiasm.systems.pvc.rig_worlds import (
    ANSWERS,
    CELLS,
    FRAMES,
    QUESTIONS,
    SIDE,
    SPRITE,
    SQUARE,
    STEPS,
    Items,
    answers_of,
    items,
    ways,
)

__all__ = ["ASKED", "DIGITS", "MEDIA", "MOTION", "SAID", "WORDS", "RigData", "RigSource"]

MOTION = ("direction", "cell", "turns")
"""Kinds of questions about the square, as they follow those about digits in `QUESTIONS`."""
DIGITS = len(QUESTIONS) - len(MOTION)
SHARES = (0.125, 0.25, 0.125)
"""Loss weight of all questions of a kind of `MOTION`, in that of all digits: where the square is must be learned first.
"""
MEDIA, ASKED, SAID = 0, 1, 1 + len(QUESTIONS)
"""Words: the placeholder of media, the first question, the first answer."""
WORDS = SAID + len(ANSWERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class RigData:
    """Pages and clips of `rig_worlds` with all of their questions.

    Attributes:
        tasks: "still", "clip" -> share of the draws.
        split, seed: of the items.
        size: items of each task.
        tokens: K of the model that will read them.
        repeats: of a page.
        varied: while training, half of the batches have fewer repeats than `repeats`, 1 or more, evenly.
        cut: while training, each batch has clips of its own length: all frames, the first half, the first quarter, …
            down to one window, evenly.
        frames: of a clip that are shown, the last of each of so many equal parts.
        window: shown frames behind which the square is asked about, of the clip so far.
        full: share of the pages that are full; the others have up to three quarters (of a still page at least one), the
            rest being blank and not asked about.
    """

    tasks: Mapping[str, float]
    split: str = "train"
    seed: int = 0
    size: int = 1000
    tokens: int = 4
    repeats: int = 4
    varied: bool = False
    cut: bool = False
    frames: int = FRAMES
    window: int = 1
    full: float = 1.0

    def __post_init__(self) -> None:
        for name, whole, part in (("frames", FRAMES, self.frames), ("window", self.frames, self.window)):
            if part < 1 or whole % part:
                raise ConfigError(f"{name} is {part}: {whole} frames must be a multiple of it")

    @property
    def shown(self) -> list[int]:
        """The frames of a clip that are shown."""
        return [(n + 1) * FRAMES // self.frames - 1 for n in range(self.frames)]

    def open(self) -> RigSource:
        """Return the source."""
        return RigSource(self)


class RigSource:
    """All items of a `RigData`, drawn once; a batch is built of them as a whole."""

    def __init__(self, data: RigData) -> None:
        self.data = data
        self.frames: dict[str, Tensor] = {}
        """Task -> (N, T, S, S) uint8."""
        self.answers: dict[str, Tensor] = {}
        """Task -> (N, Q) int64 words, `IGNORE` where nothing is asked."""
        self.asked: dict[str, Tensor] = {}
        """Task -> (N,) int64: the question whose answers are even, a place in `QUESTIONS`."""
        for task in data.tasks:
            made = items(task, data.split, data.seed, 0, data.size, questions=MOTION)
            words_NQ = _answers(made, task, data.shown[data.window - 1 :: data.window])
            frames_NTSS = made.frames_NTHW[:, data.shown if task == "clip" else [0]]
            if data.full < 1:
                seen_NSS, told_NQ = _quarters(data, task)
                frames_NTSS = np.where(seen_NSS[:, None] | (frames_NTSS == SQUARE), frames_NTSS, 0)
                words_NQ[:, :DIGITS] = np.where(told_NQ, words_NQ[:, :DIGITS], IGNORE)
            self.frames[task] = torch.from_numpy(np.ascontiguousarray(frames_NTSS))
            self.answers[task] = torch.from_numpy(words_NQ)
            self.asked[task] = torch.from_numpy(made.question_N)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Task -> items."""
        return dict.fromkeys(self.data.tasks, self.data.size)

    @property
    def weights(self) -> Mapping[str, float]:
        """Task -> share."""
        return self.data.tasks

    def fetch(self, draws: Sequence[Draw], random: torch.Generator) -> Row:
        """Return the draws as one packed sequence."""
        repeats = self.data.repeats
        if self.data.varied:
            fewer = int(torch.randint(1, max(2, repeats), (), generator=random))
            repeats = fewer if torch.rand((), generator=random) < 0.5 else repeats
        frames = self.data.frames
        if self.data.cut:
            halvings = (frames // self.data.window).bit_length()
            frames >>= int(torch.randint(halvings, (), generator=random))
        return self.batch(draws, repeats, frames)

    def plan(self, tasks: tuple[str, ...], repeats: int | None = None, frames: int | None = None) -> _Plan:
        """What batches of these tasks have in common, in this order."""
        d = self.data
        return _plan(tasks, repeats or d.repeats, frames or d.frames, d.window, d.tokens)

    def batch(self, draws: Sequence[Draw], repeats: int | None = None, frames: int | None = None) -> Row:
        """Return the draws as one packed sequence, with so many repeats of a page and frames of a clip (None: all)."""
        tasks, frames = tuple(task for task, _ in draws), frames or self.data.frames
        plan = self.plan(tasks, repeats, frames)
        index = {task: torch.tensor([i for t, i in draws if t == task]) for task in sorted(set(tasks))}
        labels_T = torch.full_like(plan.empty.ids_T, IGNORE)
        for task, own in index.items():
            rows_NQ = plan.rows_NQ[task]
            labels_T[rows_NQ] = self.answers[task][own, : rows_NQ.shape[1]]
        media = {}
        for task, name in (("still", "image"), ("clip", "video")):
            if task in index:
                grey_FSS = self.frames[task][index[task], :frames].flatten(0, 1)
                times_F = torch.arange(frames, dtype=torch.float32).repeat(len(index[task]))
                colour_F3SS = grey_FSS[:, None].expand(-1, 3, -1, -1)
                media[name] = MediaBatch(colour_F3SS, times_F if task == "clip" else None)
        return replace(
            plan.empty,
            labels_T=labels_T,
            weight_T=torch.where(labels_T == IGNORE, 0.0, plan.weight_T),
            media=media,
            spans=plan.spans,
        )


def _answers(made: Items, task: str, moments: Sequence[int]) -> np.ndarray:
    """(N, Q): the word that answers each question about each item: digits, then of clips the square at each moment.

    In its first frame the square has no direction, and it has not turned.
    """
    digits_NQ = made.digits_NRC.reshape(len(made), -1) + SAID + answers_of("digit").start
    if task == "still":
        return digits_NQ
    x_NT, y_NT = np.moveaxis(ways().place_WT2[made.way_N], -1, 0)
    step_NT2 = np.diff(np.stack([x_NT, y_NT], -1), axis=1)
    side = SIDE // CELLS // SPRITE
    going_NT = (step_NT2[:, :, None] == STEPS).all(-1).argmax(-1)  # from frame t to t + 1
    turned_NT = np.diff(going_NT, axis=1, prepend=going_NT[:, :1]) != 0
    facts = {
        "direction": np.pad(going_NT, ((0, 0), (1, 0))),
        "cell": CELLS * (y_NT // side) + x_NT // side,
        "turns": np.pad(turned_NT.cumsum(1), ((0, 0), (1, 0))),
    }
    told = [
        np.full(len(made), IGNORE)
        if t == 0 and kind != "cell"
        else SAID + answers_of(kind).start + facts[kind][:, t]
        for t in moments
        for kind in MOTION
    ]
    return np.concatenate([digits_NQ, np.stack(told, 1)], 1)


def _quarters(data: RigData, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels (N, S, S) and which cells (N, Q) of the pages are there."""
    random = np.random.Generator(np.random.PCG64(derive_seed(data.seed, "pvc", "quarters", task, data.split)))
    rank_N4 = random.random((data.size, 4)).argsort(1)
    some_N1 = random.integers(int(task == "still"), 4, (data.size, 1))
    count_N1 = np.where(random.random((data.size, 1)) < data.full, 4, some_N1)
    there_N22 = (rank_N4 < count_N1).reshape(-1, 2, 2)

    def spread(side: int) -> np.ndarray:
        return there_N22.repeat(side // 2, 1).repeat(side // 2, 2)

    return spread(SIDE), spread(round(DIGITS**0.5)).reshape(data.size, -1)


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What batches of one structure have in common: all but pixels and answers.

    Attributes:
        empty: the sequence without media and labels.
        weight_T: of the loss; a clip's digits together weigh as much as its questions about the square together.
        spans: as of the sequence.
        rows_NQ: task -> rows of the questions of its documents.
    """

    empty: Row
    weight_T: Tensor
    spans: tuple[Span, ...]
    rows_NQ: dict[str, Tensor]


@lru_cache(maxsize=64)
def _plan(tasks: tuple[str, ...], repeats: int, frames: int, window: int, tokens: int) -> _Plan:
    documents = {task: _document(task, repeats, frames, window, tokens) for task in set(tasks)}
    weight_W = np.ones(WORDS, np.float32)
    weight_W[ASKED + DIGITS : SAID] = np.array(SHARES) * DIGITS / (frames // window)
    ids_N = [documents[task][0] for task in tasks]
    length_N = np.array([len(ids) for ids in ids_N])
    start_N = length_N.cumsum() - length_N
    ids_T = np.concatenate(ids_N)
    doc_T = np.arange(len(tasks)).repeat(length_N)
    seen_T = np.array([IMAGE if task == "still" else VIDEO for task in tasks])[doc_T]
    rows_NQ: dict[str, list[np.ndarray]] = {task: [] for task in documents}
    spans: list[Span] = []
    items_of, groups = {"image": 0, "video": 0}, 0
    for task, start in zip(tasks, start_N.tolist(), strict=True):
        _, asked_Q, own = documents[task]
        rows_NQ[task].append(start + asked_Q)
        spans += [span.shifted(start, items_of[span.media], groups) for span in own]
        items_of[own[0].media] += len(own)
        groups += task == "clip"
    return _Plan(
        empty=Row(
            ids_T=torch.from_numpy(ids_T),
            kind_T=torch.from_numpy(np.where(ids_T == MEDIA, seen_T, TEXT).astype(np.int8)),
            doc_T=torch.from_numpy(doc_T.astype(np.int32)),
            pos_T=torch.from_numpy((np.arange(len(ids_T)) - start_N[doc_T]).astype(np.float32)),
        ),
        weight_T=torch.from_numpy(weight_W[ids_T]),
        spans=tuple(spans),
        rows_NQ={task: torch.from_numpy(np.stack(rows)) for task, rows in rows_NQ.items()},
    )


def _document(
    task: str, repeats: int, frames: int, window: int, tokens: int
) -> tuple[np.ndarray, np.ndarray, tuple[Span, ...]]:
    """One document of a task: its words, the rows of its questions in the order of the answers, its spans.

    Digits are asked behind everything, the square right behind the moment that is asked about.
    """
    digits, motion = range(ASKED, ASKED + DIGITS), range(ASKED + DIGITS, SAID)
    if task == "still":
        rows = repeats * tokens
        span = Span(media="image", start=0, length=rows, first=0, items=1, repeats=repeats)
        return np.array([MEDIA] * rows + [*digits]), rows + np.arange(DIGITS), (span,)
    words: list[int] = []
    asked: list[int] = []
    spans: list[Span] = []
    for t in range(frames):
        spans.append(Span(media="video", start=len(words), length=tokens, first=t, items=1, group=0))
        words += [MEDIA] * tokens
        if t % window == window - 1:
            asked += range(len(words), len(words) + len(motion))
            words += motion
    return (
        np.array([*words, *digits]),
        np.array([*range(len(words), len(words) + DIGITS), *asked]),
        tuple(spans),
    )
