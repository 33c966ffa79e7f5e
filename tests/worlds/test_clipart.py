"""Named drawings: what is held out, balance, masks, backgrounds, and the error without the asset."""

import collections

import numpy as np
import pytest

from chiasm.errors import DataError
from chiasm.worlds import available
from chiasm.worlds.clipart import RELATED, ClipartWorld, drawings_of, photo_crop
from chiasm.worlds.grounding import GroundingWorld
from worlds.drawings import NAMES, write_drawings, write_photos

SPLITS = ("train", "dev", "test")


@pytest.fixture
def art(assets):
    write_drawings(assets)
    write_photos(assets)
    return assets


def test_drawings_of_test_are_in_no_other_split(art):
    parts = {split: drawings_of(split, "drawing", art) for split in SPLITS}
    sources = [{drawing.source for drawing in part} for part in parts.values()]
    assert not sources[0] & sources[1] | sources[0] & sources[2] | sources[1] & sources[2]
    names = [{drawing.name for drawing in part} for part in parts.values()]
    assert names[0] == names[1] == names[2] == set(NAMES) - {"only two"}
    for name in names[0]:
        sets = [{RELATED.get(d.style, d.style) for d in parts[split] if d.name == name} for split in SPLITS]
        # Sets that redraw each other stay together; clip art is for training.
        assert not sets[0] & sets[1] | sets[0] & sets[2] | sets[1] & sets[2]
        assert "openclipart" in sets[0]
    assert len({frozenset(d.style for d in parts["test"] if d.name == name) for name in names[0]}) > 1


def test_a_whole_style_can_be_held_out(art):
    assert {drawing.style for drawing in drawings_of("test", "style", art)} == {"openmoji"}
    assert {drawing.style for drawing in drawings_of("dev", "style", art)} == {"twemoji"}
    assert {drawing.style for drawing in drawings_of("train", "style", art)} == {
        "noto",
        "fluent-3d",
        "fluent-flat",
        "openclipart",
    }


def test_answers_are_balanced_and_the_pixels_are_those_of_the_drawing(art):
    world = ClipartWorld("train", size=50, folder=art)
    assert collections.Counter(sample.answer for sample in world) == dict.fromkeys(world.names, 10)
    for index in range(20):
        sample, (thing,) = world.sample(index), world.things(index)
        assert thing.label == sample.answer
        assert list(thing.box) == sample.meta["box"]
        k = NAMES.index(sample.answer)
        assert thing.mask is not None
        inside = sample.image[thing.mask]
        assert (np.abs(inside[:, :2].astype(int) - [40 * k, 255 - 40 * k]).max(1) <= 3).mean() > 0.85
        ys, xs = np.nonzero(thing.mask)
        assert thing.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert np.ptp(xs) > 18


def test_same_picture_in_any_order(art):
    first, second = ClipartWorld("dev", folder=art, photos=0.5), ClipartWorld("dev", folder=art, photos=0.5)
    samples = {index: first.sample(index) for index in (7, 2, 11)}
    for index in (2, 11, 7):
        assert second.sample(index).meta == samples[index].meta
        np.testing.assert_array_equal(second.sample(index).image, samples[index].image)
    assert first.manifest() == second.manifest() != ClipartWorld("dev", folder=art).manifest()


def test_names_can_be_chosen(art):
    few = ClipartWorld("test", names=3, folder=art)
    assert len(few) == 9
    assert all(" " not in name for name in few.names)
    assert ClipartWorld("dev", names=["bus", "dog"], folder=art).names == ("bus", "dog")
    with pytest.raises(DataError, match="no drawings of ship"):
        ClipartWorld("dev", names=["ship"], folder=art)
    with pytest.raises(DataError, match=r"there are 1\.\.5"):
        ClipartWorld("dev", names=9, folder=art)
    with pytest.raises(DataError, match="choose drawing or style"):
        ClipartWorld("dev", held_out="name", folder=art)  # type: ignore[arg-type]


def test_photographs_are_divided_too(art):
    seen = {}
    for split in SPLITS:
        rng = np.random.default_rng(0)
        crops = [photo_crop(split, 40, 30, rng, art) for _ in range(60)]
        seen[split] = {facts["tone"] for _, facts in crops}
        for image, facts in crops[:5]:
            assert image.shape == (30, 40, 3)
            assert image.mean() == 10 * int(facts["tone"].removeprefix("photo"))
    assert sorted(len(names) for names in seen.values()) == [2, 2, 8]
    assert len(set.union(*seen.values())) == 12
    world = ClipartWorld("test", photos=1.0, folder=art)
    assert all(world.sample(index).meta["background"]["kind"] == "photo" for index in range(5))


def test_drawings_can_be_grounded(art):
    world = GroundingWorld("test", size=20, sprites="drawings", photos=0.5, folder=art)
    for index in range(20):
        sample = world.sample(index)
        for thing, told in zip(world.things(index), sample.meta["objects"], strict=True):
            k = NAMES.index(thing.label)
            assert list(thing.box) == told["box"]
            middle = sample.image[
                (thing.box[1] + thing.box[3]) // 2, (thing.box[0] + thing.box[2]) // 2
            ].astype(int)
            assert np.abs(middle[:2] - [40 * k, 255 - 40 * k]).max() <= 4


def test_without_the_asset_the_message_names_the_packages(assets):
    assert "clipart" not in available(among=["clipart", "scenes"])
    with pytest.raises(DataError, match="npm pack emojibase-data") as caught:
        ClipartWorld("train")
    assert "\n" not in str(caught.value)
    write_drawings(assets)
    assert available(among=["clipart", "scenes"]) == ("clipart", "scenes")
    with pytest.raises(DataError, match="photographs are not prepared"):
        ClipartWorld("train", photos=0.5)
