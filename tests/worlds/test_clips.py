"""Clips: what moves, appears and blinks is read back from the pixels; balance; videos on disk."""

import collections
import hashlib
import itertools
import json
import re

import numpy as np
import pytest

from chiasm.data.message import parse_messages
from chiasm.errors import DataError
from chiasm.worlds.clips import QUESTIONS, TIMES, ClipsWorld
from chiasm.worlds.scenes import pairs_of
from chiasm.worlds.sprites import COLOURS
from worlds.drawings import write_drawings, write_photos

SPLITS = ("train", "dev", "test")


def presence(sample) -> dict[str, list[np.ndarray | None]]:
    """For every object the centre of its coloured pixels in each frame, or None; found by its colour and place."""
    found: dict[str, list[np.ndarray | None]] = {}
    for thing in sample.meta["objects"]:
        # An object keeps to its own part of the picture, so the colour is looked for there.
        boxes = np.array([box for box in thing["boxes"] if box])
        x0, y0, x1, y1 = (*boxes[:, :2].min(0), *boxes[:, 2:].max(0))
        colour = np.array(COLOURS[thing["name"].split()[0]])
        centres: list[np.ndarray | None] = []
        for frame in sample.image:
            hit = np.abs(frame[y0:y1, x0:x1].astype(int) - colour).max(-1) <= 2
            ys, xs = np.nonzero(hit)
            centres.append(np.array([xs.mean() + x0, ys.mean() + y0]) if len(xs) >= 4 else None)
        found[thing["name"]] = centres
    return found


def read(sample) -> str:
    """The answer to a canonical question, from the pixels."""
    question, seen = sample.question, presence(sample)
    moved = {
        name: np.subtract(
            next(c for c in reversed(centres) if c is not None), next(c for c in centres if c is not None)
        )
        for name, centres in seen.items()
    }
    starts = {name: next(f for f, c in enumerate(centres) if c is not None) for name, centres in seen.items()}
    ends = {
        name: next((f for f, c in enumerate(centres) if c is None and f > starts[name]), len(centres))
        for name, centres in seen.items()
    }
    if found := re.fullmatch(r"In which direction does the (.+) move\?", question):
        x, y = moved[found[1]]
        if max(abs(x), abs(y)) < 2:
            return "not at all"
        return ("left" if x < 0 else "right") if abs(x) > abs(y) else ("up" if y < 0 else "down")
    if found := re.fullmatch(r"Which moves faster, the (.+) or the (.+)\?", question):
        return max((found[1], found[2]), key=lambda name: np.abs(moved[name]).max())
    if question == "What appears first?":
        return min(starts, key=lambda name: starts[name])
    if question == "What appears last?":
        return max(starts, key=lambda name: starts[name])
    if question == "What disappears first?":
        return min(ends, key=lambda name: ends[name])
    if found := re.fullmatch(r"Does the (.+) appear before the (.+)\?", question):
        return "yes" if starts[found[1]] < starts[found[2]] else "no"
    if found := re.fullmatch(r"How many times does the (.+) disappear\?", question):
        on = [c is not None for c in seen[found[1]]]
        return TIMES[sum(a and not b for a, b in itertools.pairwise(on))]
    raise AssertionError(question)


@pytest.mark.parametrize("options", [{}, {"frames": (8, 32), "pixels": (120, 72)}])
def test_every_answer_can_be_seen(options):
    kinds = collections.Counter()
    for sample in ClipsWorld("test", size=140, **options):
        kinds[sample.meta["kind"]] += 1
        assert read(sample) == sample.answer, (sample.key, sample.question)
    assert kinds == dict.fromkeys(QUESTIONS, 20)


def test_boxes_and_length_are_right():
    world = ClipsWorld("train", size=40, frames=(8, 32))
    lengths = set()
    for index in range(40):
        sample = world.sample(index)
        lengths.add(len(sample.image))
        names = [thing["name"] for thing in sample.meta["objects"]]
        assert len(set(names)) == len(names)
        assert {tuple(reversed(name.split())) for name in names} <= set(pairs_of("train"))
        everything = np.zeros(sample.image.shape[:3], int)
        for thing in sample.meta["objects"]:
            assert len(thing["boxes"]) == len(sample.image)
            for f, box in enumerate(thing["boxes"]):
                if box:
                    x0, y0, x1, y1 = box
                    assert 0 <= x0 < x1 <= 64
                    assert 0 <= y0 < y1 <= 64
                    everything[f, y0:y1, x0:x1] += 1
        assert everything.max() == 1  # nothing hides anything
        # Outside of the objects nothing changes (their edges reach a pixel further than their boxes).
        free = everything.any(0)
        free = ~(
            free | np.roll(free, 1, 0) | np.roll(free, -1, 0) | np.roll(free, 1, 1) | np.roll(free, -1, 1)
        )
        still = sample.image[:, free]
        assert (np.abs(still.astype(int) - still[0]).max(-1) <= 12).mean() > 0.98
        assert [thing.label for thing in world.things(index)] == names
    assert min(lengths) < 14
    assert max(lengths) > 24


def test_no_answer_is_a_shortcut():
    by_kind: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    first = collections.Counter()
    world = ClipsWorld("train", size=2800)
    for index in range(2800):
        _, kind, _, names, answer = world._plan(index, world.random(index))
        by_kind[kind][answer] += 1
        if kind == "speed":
            first[names["a"] == answer] += 1
    assert set(by_kind["direction"]) == {"left", "right", "up", "down", "not at all"}
    assert max(by_kind["direction"].values()) < 0.28 * 400
    assert 0.4 < by_kind["order"]["yes"] / 400 < 0.6
    assert 0.4 < first[True] / 400 < 0.6
    assert max(by_kind["count"].values()) < 0.42 * 400
    for kind in ("first", "last", "gone", "speed"):
        assert max(by_kind[kind].values()) < 0.08 * 400


def test_a_clip_is_a_video_of_the_conversation():
    sample = ClipsWorld("dev", frames=9, fps=5).sample(2)
    assert sample.is_clip
    assert len(sample.frames()) == 9
    assert sample.picture().size == (64, 64)
    (part,) = parse_messages(sample.to_message())[0].of_kind("video")
    assert len(part.value) == 9
    assert part.sampling["folder_fps"] == 5.0


def test_real_sprites_and_backgrounds(assets):
    write_drawings(assets)
    write_photos(assets)
    world = ClipsWorld("test", size=14, sprites="drawings", photos=1.0)
    for sample in world:
        assert sample.meta["background"]["kind"] == "photo"
        assert all(thing["source"] for thing in sample.meta["objects"])


GOLDEN = {("train", 0): "e05ccecd4b0e2f91", ("dev", 5): "9ac37d8356c20fb3", ("test", 3): "ddac4eb7f33229dc"}


@pytest.mark.parametrize(("split", "index"), GOLDEN)
def test_golden_samples(split, index):
    sample = ClipsWorld(split).sample(index)
    told = json.dumps([sample.rounds, sample.meta], sort_keys=True).encode()
    assert hashlib.sha256(told + sample.image.tobytes()).hexdigest()[:16] == GOLDEN[split, index]


def test_bad_options_are_named():
    with pytest.raises(DataError, match=r"8\.\.32 frames"):
        ClipsWorld("train", frames=4)
    with pytest.raises(DataError, match="unknown questions"):
        ClipsWorld("train", questions="colour")
    with pytest.raises(DataError, match="choose shapes"):
        ClipsWorld("train", sprites="dogs")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="pip download bigbench"):
        ClipsWorld("train", sprites="cifar10")
