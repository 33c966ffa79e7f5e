"""Pages of digits and the moving square: answers can be read from the pixels, evenly, and splits share nothing."""

from __future__ import annotations

import builtins
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from chiasm.errors import ConfigError, MissingExtraError
from chiasm.systems.pvc import rig_worlds
from chiasm.systems.pvc.rig_worlds import (
    ANSWERS,
    CLIP_QUESTIONS,
    FRAMES,
    QUESTIONS,
    SIDE,
    SPLITS,
    answers_of,
    items,
    load_digits,
    ways,
)


def squares(frames_THW: np.ndarray) -> list[tuple[int, int]]:
    """Where the square's upper left corner is in every frame, read from the pixels."""
    found = []
    for frame in frames_THW:
        y, x = np.nonzero(frame == 255)
        assert len(y) == 16
        assert (np.ptp(y), np.ptp(x)) == (3, 3)
        found.append((int(x.min()), int(y.min())))
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_can_be_read_from_the_pixels(split: str) -> None:
    pixels, classes, own = load_digits()
    known = {pixels[n].tobytes(): int(classes[n]) for n in np.flatnonzero(own == SPLITS.index(split))}
    made = items("clip", split, 0, 0, 200)
    assert made.frames_NTHW.shape == (200, FRAMES, SIDE, SIDE)
    assert made.frames_NTHW.dtype == np.uint8
    for n in range(200):
        asked, said = QUESTIONS[made.question_N[n]], ANSWERS[made.answer_N[n]]
        places = squares(made.frames_NTHW[n])
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(places)]
        assert all(sorted(map(abs, step)) == [0, 4] for step in steps)
        if asked == "direction":
            assert said == {(4, 0): "right", (0, 4): "down", (-4, 0): "left", (0, -4): "up"}[steps[-1]]
        elif asked == "cell":
            assert said == f"cell {places[-1][1] // 8},{places[-1][0] // 8}"
        elif asked == "turns":
            assert said == f"{sum(a != b for a, b in pairwise(steps))} turns"
        else:
            row, column = map(int, asked.removeprefix("digit ").split(","))
            cells = made.frames_NTHW[n][:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            seen = {known[cell.tobytes()] for cell in cells if not (cell == 255).any()}
            assert seen == {int(said)}  # the square leaves every cell again
            assert made.digits_NRC[n, row, column] == int(said)


def test_still_pages_are_read_likewise() -> None:
    pixels, classes, own = load_digits()
    known = {pixels[n].tobytes(): int(classes[n]) for n in np.flatnonzero(own == 2)}
    made = items("still", "test", 0, 0, 100)
    assert made.frames_NTHW.shape == (100, 1, SIDE, SIDE)
    assert set(made.way_N) == {-1}
    for n in range(100):
        row, column = map(int, QUESTIONS[made.question_N[n]].removeprefix("digit ").split(","))
        cell = made.frames_NTHW[n, 0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert known[np.ascontiguousarray(cell).tobytes()] == int(ANSWERS[made.answer_N[n]])


def test_an_item_depends_on_its_index_alone() -> None:
    whole = items("clip", "train", 3, 10, 12)
    for n in (0, 5, 11):
        one = items("clip", "train", 3, 10 + n, 1)
        for name in ("frames_NTHW", "question_N", "answer_N", "kind_N", "digits_NRC", "way_N"):
            assert np.array_equal(getattr(whole, name)[n : n + 1], getattr(one, name))
    other = items("clip", "train", 4, 10, 12)
    assert not np.array_equal(whole.frames_NTHW, other.frames_NTHW)
    assert whole.frames_NTHW.sum() == 6_070_164


def test_splits_share_neither_digits_nor_ways() -> None:
    pixels, classes, own = load_digits()
    assert pixels.shape == (1797, 8, 8)
    assert pixels.max() == 192
    assert [int((own == n).sum()) for n in range(3)] == [1258, 270, 269]
    for split in range(3):
        counts = Counter(classes[own == split].tolist())
        assert max(counts.values()) - min(counts.values()) <= 7
    every = ways()
    rows = {way.tobytes() for way in every.place_WT2}
    assert len(rows) == len(every.place_WT2)  # no way is listed twice
    for n, split in enumerate(SPLITS):
        drawn = items("clip", split, 1, 0, 60).way_N
        assert set(every.split_W[drawn]) == {n}


def test_the_ways_are_all_there_are() -> None:
    """Counted by walking, one step after the other."""

    def walk(x: int, y: int, heading: int, turns: int, left: int) -> int:
        dx, dy = ((1, 0), (0, 1), (-1, 0), (0, -1))[heading]
        x, y = x + dx, y + dy
        if not (0 <= x < 8 and 0 <= y < 8):
            return 0
        if not left:
            return 1
        total = walk(x, y, heading, turns, left - 1)
        if turns < 3:
            total += sum(walk(x, y, (heading + bend) % 4, turns + 1, left - 1) for bend in (1, -1))
        return total

    starts = [(x, y, heading) for x in range(8) for y in range(8) for heading in range(4)]
    assert len(ways().place_WT2) == sum(walk(*start, 0, FRAMES - 2) for start in starts)


@pytest.mark.parametrize("split", SPLITS)
def test_who_guesses_blindly_is_near_chance(split: str) -> None:
    made = items("clip", split, 0, 0, 4000)
    for n, kind in enumerate(CLIP_QUESTIONS):
        answers = Counter(made.answer_N[made.kind_N == n].tolist())
        assert set(answers) == set(answers_of(kind))
        chance = 1 / len(answers_of(kind))
        assert max(answers.values()) / 1000 < chance + 4 * (chance * (1 - chance) / 1000) ** 0.5
        cells = Counter(made.question_N[made.kind_N == n].tolist())
        assert len(cells) == (16 if kind == "digit" else 1)


def test_who_sees_the_last_frame_alone_knows_the_cell_but_hardly_the_turns() -> None:
    """The best guess from where the square ends, learned on train, tested on test: motion is not in one frame."""
    train, test = items("clip", "train", 0, 0, 12_000), items("clip", "test", 0, 0, 4000)
    ends = [way[-1][0] + 8 * way[-1][1] for way in ways().place_WT2]
    for kind, least, most in (("cell", 1.0, 1.0), ("direction", 0.0, 0.45), ("turns", 0.0, 0.42)):
        number = CLIP_QUESTIONS.index(kind)
        table: dict[int, Counter] = {}
        for way, answer in zip(
            train.way_N[train.kind_N == number], train.answer_N[train.kind_N == number], strict=True
        ):
            table.setdefault(ends[way], Counter())[answer] += 1
        hits = [
            table[ends[way]].most_common(1)[0][0] == answer
            for way, answer in zip(
                test.way_N[test.kind_N == number], test.answer_N[test.kind_N == number], strict=True
            )
        ]
        assert least <= np.mean(hits) <= most, (kind, np.mean(hits))


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for args, match in (
        (("film", "train", 0, 0, 1), "no task 'film': it has still, clip"),
        (("clip", "eval", 0, 0, 1), "split 'eval' must be train, dev or test"),
        (("clip", "train", 0, 0, 0), "are none"),
        (("clip", "train", 0, -1, 3), "are none"),
    ):
        with pytest.raises(ConfigError, match=match):
            items(*args)
    with pytest.raises(ConfigError, match=r"unknown questions \['speed'\] about clips"):
        items("clip", "train", 0, 0, 1, questions=("speed",))
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    load_digits.cache_clear()
    rig_worlds._pool.cache_clear()
    with pytest.raises(MissingExtraError, match=r"pip install 'chiasm\[reproduce\]'"):
        items("still", "train", 0, 0, 1)
