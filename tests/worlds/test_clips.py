"""Clips: what moves, appears and blinks is read back from the pixels; balance; videos on disk."""

import collections
import hashlib
import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

from chiasm.data.message import parse_messages
from chiasm.errors import DataError, ImageError
from chiasm.worlds.clips import CORNERS, DETAILS, QUESTIONS, TIMES, ClipsWorld
from chiasm.worlds.scenes import pairs_of
from chiasm.worlds.sprites import COLOURS
from clips import number, write_clip
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


@pytest.mark.parametrize(("pixels", "point"), [(64, 2), ((120, 72), 2), (128, 4)])
def test_what_stays_can_be_seen_in_every_frame(pixels, point):
    world = ClipsWorld("test", size=60, questions=DETAILS, pixels=pixels)
    for sample in world:
        objects = sample.meta["objects"]
        thing = objects[sample.meta["about"][0]]
        height, width = sample.image.shape[1:3]
        assert all(box is not None for box in thing["boxes"])
        for frame, (x0, y0, x1, y1) in zip(sample.image, thing["boxes"], strict=True):
            if sample.meta["kind"] == "corner":
                assert sample.question == f"In which corner is the {thing['name']}?"
                down, right = (y0 + y1) > height, (x0 + x1) > width
                assert sample.answer == CORNERS[2 * down + right]
            else:
                assert (x1 - x0, y1 - y0) == (9 * point, 7 * point)
                assert frame[y0:y1, x0:x1][::point, ::point].tobytes() == plate(sample.answer).tobytes()
        others = [one for one in objects if one is not thing]
        assert all(one["boxes"][0] and one["boxes"][-1] for one in others)


def plate(number: str) -> np.ndarray:
    """The digits of a sign, each drawn here once more, in strokes of a seven-segment display."""
    strokes = {
        **{"0": "abcdef", "2": "abged", "3": "abgcd", "4": "fgbc", "5": "afgcd"},
        **{"6": "afgecd", "8": "abcdefg", "9": "abfgcd"},
    }
    places = {"a": (0, slice(0, 3)), "g": (2, slice(0, 3)), "d": (4, slice(0, 3))}
    places |= {"f": (slice(0, 3), 0), "b": (slice(0, 3), 2), "e": (slice(2, 5), 0), "c": (slice(2, 5), 2)}
    out = np.full((7, 9), 255, np.uint8)
    for n, digit in enumerate(number):
        cell = out[1:6, 1 + 4 * n : 4 + 4 * n]
        if digit == "1":
            cell[:, 1], cell[1, 0], cell[4] = 0, 0, 0
        elif digit == "7":
            cell[0], cell[1, 2], cell[2:, 1] = 0, 0, 0
        for stroke in strokes.get(digit, ""):
            cell[places[stroke]] = 0
    return np.repeat(out[..., None], 3, 2)


def test_who_guesses_blindly_is_near_chance():
    """The commonest answer of every kind, in every split: what a model gets that looks at nothing."""
    for split, size in (("train", 1800), ("test", 1800)):
        by_kind: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        world = ClipsWorld(split, size=size, questions=QUESTIONS + DETAILS)
        for index in range(size):
            _, kind, _, _, answer = world._plan(index, world.random(index))
            by_kind[kind][answer] += 1
        share = {kind: max(counts.values()) / counts.total() for kind, counts in by_kind.items()}
        chance = {"direction": 1 / 5, "order": 1 / 2, "count": 1 / 3, "corner": 1 / 4, "sign": 1 / 90}
        names = 1 / len(world.pairs)
        for kind, found in share.items():
            expected = chance.get(kind, names)
            margin = 4 * (expected * (1 - expected) / 200) ** 0.5
            # The names of a split are few in dev and test, and the largest of many counts is above the mean.
            assert found < expected + margin, (split, kind, found)


def test_details_are_not_part_of_the_default():
    assert ClipsWorld("train").asked == QUESTIONS
    assert not set(DETAILS) & set(QUESTIONS)


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


def test_long_clips():
    lengths = {len(sample.image) for sample in ClipsWorld("train", size=6, frames=(96, 128), pixels=48)}
    assert lengths <= set(range(96, 129))
    assert len(lengths) > 1


def test_splits_share_no_object():
    names = {
        split: {thing["name"] for sample in ClipsWorld(split, size=60) for thing in sample.meta["objects"]}
        for split in SPLITS
    }
    assert not names["train"] & names["test"]
    assert not names["train"] & names["dev"]
    assert not names["dev"] & names["test"]


def test_real_sprites_and_backgrounds(assets):
    write_drawings(assets)
    write_photos(assets)
    world = ClipsWorld("test", size=18, sprites="drawings", photos=1.0, questions=QUESTIONS + DETAILS)
    for sample in world:
        assert sample.meta["background"]["kind"] == "photo"
        assert all(thing["source"] for thing in sample.meta["objects"] if thing["name"] != "sign")


def test_real_footage_moves_behind_the_sprites(tmp_path):
    pytest.importorskip("av")
    path = write_clip(tmp_path / "real.mp4", 120, size=(160, 120), gop=30)
    worlds = {
        split: ClipsWorld(split, size=20, frames=16, footage=path, sprites="shapes") for split in SPLITS
    }
    shown: dict[str, set[int]] = {}
    for split, world in worlds.items():
        sample, again = world.sample(3), ClipsWorld(split, size=20, frames=16, footage=[path]).sample(3)
        assert sample.image.tobytes() == again.image.tobytes()
        # The clip is the film where no sprite is: the answers are those of the same world on drawn backgrounds.
        still = ClipsWorld(split, size=20, frames=16).sample(3)
        assert (sample.question, sample.answer) == (still.question, still.answer)
        assert [thing["boxes"] for thing in sample.meta["objects"]] == [
            thing["boxes"] for thing in still.meta["objects"]
        ]
        ground = sample.meta["background"]
        assert (ground["kind"], ground["tone"]) == ("footage", "real.mp4")
        shown[split] = set()
        for index in range(20):
            film = world._films[0]
            assert film.shape == ({"train": 84, "dev": 18, "test": 18}[split], 128, 171, 3)
            start = world.sample(index).meta["background"]["start"]
            shown[split] |= {number(Image.fromarray(film[start]))}
    assert max(shown["train"]) < 84 <= min(shown["dev"])
    assert max(shown["dev"]) < 102 <= min(shown["test"])
    (digest,) = worlds["train"].manifest()["footage"]
    assert digest["file"] == "real.mp4"
    assert "footage" not in ClipsWorld("train").manifest()
    # Sixteen frames of eighteen, to and fro.
    long = ClipsWorld("test", size=1, frames=64, footage=path).sample(0)
    assert len(long.image) == 64
    with pytest.raises(DataError, match="leave out photos or footage"):
        ClipsWorld("train", footage=path, photos=0.5)
    short = write_clip(tmp_path / "short.mp4", 8)
    with pytest.raises(DataError, match=r"short\.mp4: its 8 frames are too few"):
        ClipsWorld("test", footage=short)
    with pytest.raises(ImageError, match="no such file"):
        ClipsWorld("test", footage=tmp_path / "gone.mp4")


GOLDEN = {("train", 0): "e05ccecd4b0e2f91", ("dev", 5): "9ac37d8356c20fb3", ("test", 3): "ddac4eb7f33229dc"}


@pytest.mark.parametrize(("split", "index"), GOLDEN)
def test_golden_samples(split, index):
    sample = ClipsWorld(split).sample(index)
    told = json.dumps([sample.rounds, sample.meta], sort_keys=True).encode()
    assert hashlib.sha256(told + sample.image.tobytes()).hexdigest()[:16] == GOLDEN[split, index]


def test_bad_options_are_named():
    with pytest.raises(DataError, match=r"8\.\.128 frames"):
        ClipsWorld("train", frames=4)
    with pytest.raises(DataError, match="unknown questions"):
        ClipsWorld("train", questions="colour")
    with pytest.raises(DataError, match="choose shapes"):
        ClipsWorld("train", sprites="dogs")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="pip download bigbench"):
        ClipsWorld("train", sprites="cifar10")
