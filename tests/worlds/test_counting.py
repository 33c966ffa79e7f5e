"""Counting scenes: the stated truth is the truth of the pixels; held-out combinations stay out."""

import numpy as np
import pytest

from chiasm.errors import DataError
from chiasm.worlds.counting import COLOURS, COUNTS, SHAPES, CountingWorld, pairs_of, shape_mask

SPLITS = ("train", "dev", "test")


def regions(mask: np.ndarray) -> int:
    """Count 8-connected regions by flood fill (the tip of a star may hang on by a corner)."""
    left = mask.copy()
    found = 0
    while left.any():
        found += 1
        front = [tuple(np.argwhere(left)[0])]
        left[front[0]] = False
        while front:
            y, x = front.pop()
            for j, i in ((y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
                if 0 <= j < 64 and 0 <= i < 64 and left[j, i]:
                    left[j, i] = False
                    front.append((j, i))
    return found


def test_pairs_are_a_partition_and_nothing_is_missing():
    parts = [set(pairs_of(split)) for split in SPLITS]
    assert [len(part) for part in parts] == [32, 8, 8]
    assert len(set.union(*parts)) == len(SHAPES) * len(COLOURS)
    for part in parts:
        assert {shape for shape, _ in part} == set(SHAPES)
    for part in (parts[0],):
        assert {colour for _, colour in part} == set(COLOURS)


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_use_only_their_pairs(split):
    world = CountingWorld(split, size=100)
    allowed = set(world.pairs)
    for sample in world:
        assert {(thing["shape"], thing["colour"]) for thing in sample.meta["objects"]} <= allowed


def test_counts_are_balanced_and_shuffled():
    world = CountingWorld("train", size=200)
    counts = [world.count(index) for index in range(200)]
    assert np.bincount(counts)[1:].tolist() == [40] * 5
    assert all(sorted(counts[k : k + 5]) == [1, 2, 3, 4, 5] for k in range(0, 200, 5))
    assert len({tuple(counts[k : k + 5]) for k in range(0, 200, 5)}) > 10


def test_answer_equals_recount_of_masks_and_of_pixels():
    world = CountingWorld("train", size=60)
    for sample in world:
        objects = sample.meta["objects"]
        masks = [shape_mask(thing) for thing in objects]
        total = np.sum(masks, axis=0)
        assert total.max() <= 1.0 + 1e-6  # no overlap
        assert regions(total > 0) == len(objects) == sample.meta["count"]
        assert sample.answer == COUNTS[len(objects) - 1]
        for thing, mask in zip(objects, masks, strict=True):
            inside = mask == 1.0
            assert inside.sum() >= 8
            assert (sample.image[inside] == np.array(COLOURS[thing["colour"]])).all()
            covered = np.argwhere(mask > 0) + 0.5
            reach = np.hypot(covered[:, 1] - thing["x"], covered[:, 0] - thing["y"]).max()
            assert reach <= thing["radius"] + 1.0


def test_pixels_outside_objects_are_far_from_object_colours():
    for sample in CountingWorld("test", size=40):
        free = np.sum([shape_mask(thing) for thing in sample.meta["objects"]], axis=0) == 0
        for thing in sample.meta["objects"]:
            distance = np.linalg.norm(sample.image[free].astype(float) - COLOURS[thing["colour"]], axis=1)
            assert distance.min() > 50


def test_attribute_questions_are_exact():
    world = CountingWorld("train", size=80, attributes=1.0)
    for sample in world:
        words = sample.question.split()  # How many red squares are there?
        colour, shape = words[2], words[3].removesuffix("s").replace("crosse", "cross")
        shape = "cross" if words[3] == "crosses" else shape
        same = sum(thing["colour"] == colour and thing["shape"] == shape for thing in sample.meta["objects"])
        assert same >= 1
        assert sample.answer == COUNTS[same - 1]
    with pytest.raises(DataError, match="share"):
        CountingWorld("train", attributes=2.0)


def test_same_seed_same_pictures_in_any_order():
    first, second = CountingWorld("dev", size=10), CountingWorld("dev", size=50)
    for index in (9, 2, 9, 0):
        one, two = first.sample(index), second.sample(index)
        assert one.meta == two.meta
        np.testing.assert_array_equal(one.image, two.image)
