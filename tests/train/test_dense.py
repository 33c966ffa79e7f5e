"""Dense facts: what every patch of a drawn picture shows."""

import numpy as np
import pytest

from chiasm.train import dense
from chiasm.train.dense import FACTS, MARKS, dense_facts, dense_marks
from chiasm.worlds import sprites
from chiasm.worlds.charts import ChartsWorld
from chiasm.worlds.counting import COLOURS, SHAPES, CountingWorld, shape_mask
from chiasm.worlds.grounding import GroundingWorld
from chiasm.worlds.world import Sample


def word(answer, box, angle=0.0):
    image = np.zeros((64, 64, 3), np.uint8)
    meta = {"box": box, "angle": angle}
    return Sample(image=image, question="?", answer=answer, family="words", key="k", meta=meta)


def spell(codes):
    return "".join(" " if code == 26 else chr(ord("a") + code) for code in codes)


def test_letters_lie_along_the_word():
    glyphs, shape, colour = dense_facts(word("abcd", [0, 16, 64, 32])).reshape(3, 8, 8)
    assert [spell(row) for row in glyphs] == [" " * 8] * 2 + ["aabbccdd"] * 2 + [" " * 8] * 4
    assert (shape == -100).all()
    assert (colour == -100).all()


def test_the_font_says_how_wide_letters_are(monkeypatch):
    class Face:
        def getlength(self, text):
            return sum({"w": 28, "i": 8}[c] for c in text)

    monkeypatch.setattr(dense, "load_font", lambda path, size: Face())
    even, font = (
        dense_facts(word("wiw", [0, 24, 64, 40]), font=f)[0].reshape(8, 8)[3] for f in (None, "x.ttf")
    )
    assert spell(even) == "wwwiiwww"
    assert spell(font) == "wwwwiwww" or spell(font) == "wwwiwwww"


def test_a_rising_word_rises():
    glyphs = dense_facts(word("ab", [0, 10, 64, 54], angle=25.0))[0].reshape(8, 8)
    rows_of = [np.flatnonzero(glyphs[:, column] != 26).mean() for column in (0, 7)]
    assert rows_of[0] > rows_of[1]  # the end is higher up: a smaller row number


@pytest.mark.parametrize("index", range(6))
def test_objects_are_where_their_masks_are(index):
    sample = CountingWorld("train").sample(index)
    _, shape, colour = dense_facts(sample).reshape(3, 8, 8)
    nothing = len(SHAPES)
    for thing in sample.meta["objects"]:
        row, column = int(thing["y"] // 8), int(thing["x"] // 8)
        near = slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2)
        assert SHAPES.index(thing["shape"]) in shape[near]
        assert list(COLOURS).index(thing["colour"]) in colour[near]
    covered = sum(shape_mask(thing) for thing in sample.meta["objects"]).reshape(8, 8, 8, 8).max((1, 3))
    assert not ((shape != nothing) & (covered == 0)).any()


def test_mirrored_scenes_mirror_their_facts():
    sample = CountingWorld("train").sample(3)
    plain, turned = (dense_facts(sample, mirrored=flag).reshape(3, 8, 8) for flag in (False, True))
    assert np.array_equal(turned, plain[:, :, ::-1])


def test_other_families_have_no_facts():
    photo = word("x", [0, 0, 1, 1])
    photo = Sample(
        image=photo.image, question="?", answer="cat", family="cifar10", key="k", meta={"class": 3}
    )
    assert (dense_facts(photo) == -100).all()
    assert list(FACTS.values()) == [27, len(SHAPES) + 1, len(COLOURS) + 1]


def test_marks_of_grounding_scenes_are_under_the_patches() -> None:
    world = GroundingWorld("train", size=12)
    for index in range(12):
        sample = world.sample(index)
        (marks, paints), boxes = dense_marks(sample)
        masks = {thing.label: thing.mask for thing in world.things(index)}
        seen = set()
        for q in range(64):
            x, y = 8 * (q % 8) + 4, 8 * (q // 8) + 4
            inside = [
                thing
                for thing in sample.meta["objects"]
                if thing["box"][0] <= x < thing["box"][2] and thing["box"][1] <= y < thing["box"][3]
            ]
            if not inside:
                assert (marks[q], paints[q]) == (MARKS["mark"] - 1, MARKS["paint"] - 1)
                assert np.isnan(boxes[q]).all()
                continue
            (thing,) = inside
            assert (sprites.SHAPES[marks[q]], dense.PAINTS[paints[q]]) == (thing["shape"], thing["colour"])
            assert (boxes[q] * 64).tolist() == pytest.approx(thing["box"])
            seen.add(thing["name"])
        assert seen <= masks.keys()


def test_marks_of_charts_have_the_colour_of_the_pixel() -> None:
    world = ChartsWorld("train", size=40, pixels=64)
    colours = 0
    for index in range(40):
        sample = world.sample(index)
        (marks, paints), boxes = dense_marks(sample)
        assert (marks == -100).all()
        there = {mark["colour"] for mark in sample.meta["marks"]}
        shown = {dense.PAINTS[p] for p in paints if p < len(dense.PAINTS)}
        assert shown <= there
        colours += len(shown)
        if sample.meta["kind"] == "pie":
            assert np.isnan(boxes).all()
        for box in boxes[~np.isnan(boxes[:, 0])]:
            assert [round(x) for x in (box * 64).tolist()] in [mark["box"] for mark in sample.meta["marks"]]
    assert colours > 60


def test_other_families_have_no_marks() -> None:
    facts, boxes = dense_marks(word("abcd", [0, 16, 64, 32]))
    assert (facts == -100).all()
    assert np.isnan(boxes).all()
