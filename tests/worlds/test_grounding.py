"""Grounding: sizes, names, boxes that are those of the masks, and the control without looking."""

import hashlib
import json

import numpy as np
import pytest

from chiasm.errors import DataError
from chiasm.media.boxes import iou, parse_boxes, thousand_to_pixels
from chiasm.worlds.grounding import SIDES, GroundingWorld, box_scores, mean_box
from chiasm.worlds.scenes import pairs_of


@pytest.mark.parametrize(("split", "pixels"), [("train", 64), ("test", (160, 90))])
def test_objects_are_as_promised(split, pixels):
    world = GroundingWorld(split, size=120, pixels=pixels)
    width, height = world.pixels
    counts = np.zeros(6, int)
    for index in range(120):
        sample, things = world.sample(index), world.things(index)
        assert sample.image.shape == (height, width, 3)
        counts[len(things)] += 1
        names = [thing.label for thing in things]
        assert len(set(names)) == len(names)
        assert {tuple(reversed(name.split())) for name in names} <= set(pairs_of(split))
        masks = np.stack([thing.mask for thing in things])
        assert masks.sum(0).max() == 1
        for thing in things:
            ys, xs = np.nonzero(thing.mask)
            assert thing.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            # A tip may be thinner than half a pixel, hence a pixel of leeway at the lower end.
            assert SIDES[0] * width - 1 <= thing.box[2] - thing.box[0] <= SIDES[1] * width
            assert SIDES[0] * height - 1 <= thing.box[3] - thing.box[1] <= SIDES[1] * height
        asked = things[sample.meta["asked"]]
        (box,) = parse_boxes(sample.answer)
        assert box.label == asked.label
        assert asked.label in sample.question
        assert iou(thousand_to_pixels(box.xyxy, width, height), asked.box) > 0.93
    assert counts[:3].sum() == 0
    assert counts[3:].min() > 20


def test_the_object_asked_for_is_any_of_them():
    world = GroundingWorld("train", size=300)
    areas = []
    for index in range(300):
        meta = world.sample(index).meta
        sizes = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (thing["box"] for thing in meta["objects"])]
        areas.append(np.mean([size < sizes[meta["asked"]] for size in sizes]))
    assert 0.25 < np.mean(areas) < 0.5  # neither the largest nor the smallest


def test_a_constant_box_scores_next_to_nothing_and_the_truth_scores_one():
    train, test = GroundingWorld("train", size=400), GroundingWorld("test", size=200)
    constant = mean_box(train)
    np.testing.assert_allclose(constant, [360, 360, 640, 630], atol=40)
    control = box_scores(test, constant)
    assert control["accuracy"] < 0.05
    assert control["iou"] < 0.12
    truth = [parse_boxes(test.sample(index).answer)[0].xyxy for index in range(200)]
    assert box_scores(test, truth) == {"iou": 1.0, "accuracy": 1.0}
    # By hand for the first three.
    by_hand = [iou(constant, box) for box in truth[:3]]
    assert box_scores(test, constant, 3)["iou"] == pytest.approx(np.mean(by_hand))
    with pytest.raises(DataError, match="one box, or one for each"):
        box_scores(test, truth[:4])


def test_questions_are_canonical_outside_training():
    assert {s.question.split("<ref>")[0] for s in GroundingWorld("dev", size=20)} == {
        "Please provide the bounding box coordinate of the region this sentence describes: "
    }
    assert len({s.question.split()[0] for s in GroundingWorld("train", size=40)}) == 3


GOLDEN = {("train", 0): "1bd8b48d8a9f33b9", ("test", 11): "207401d6f54eeb43"}


@pytest.mark.parametrize(("split", "index"), GOLDEN)
def test_golden_samples(split, index):
    sample = GroundingWorld(split).sample(index)
    told = json.dumps([sample.rounds, sample.meta], sort_keys=True).encode()
    assert hashlib.sha256(told + sample.image.tobytes()).hexdigest()[:16] == GOLDEN[split, index]


def test_same_picture_in_any_order():
    first, second = GroundingWorld("dev", size=9), GroundingWorld("dev", size=30)
    for index in (8, 1, 8):
        assert first.sample(index).meta == second.sample(index).meta
        np.testing.assert_array_equal(first.sample(index).image, second.sample(index).image)


def test_bad_options_are_named():
    with pytest.raises(DataError, match="choose shapes or drawings"):
        GroundingWorld("train", sprites="cats")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="needs drawings"):
        GroundingWorld("train", photos=0.5)
    with pytest.raises(DataError, match="npm pack emojibase-data"):
        GroundingWorld("train", sprites="drawings")


def test_drawings_are_remembered_by_their_place(tmp_path, monkeypatch):
    """What another folder held is not there any more when the environment names an empty one."""
    monkeypatch.setenv("CHIASM_DATA", str(tmp_path / "empty"))
    with pytest.raises(DataError, match="npm pack emojibase-data"):
        GroundingWorld("train", sprites="drawings")
