"""CIFAR-10 and Fashion-MNIST worlds over synthetic arrays: splits, answers, random access."""

import numpy as np
import pytest
from PIL import Image

from chiasm.errors import DataError
from chiasm.worlds import open_world, prepare
from chiasm.worlds.cifar10 import ANSWERS, CifarWorld
from chiasm.worlds.cifar10 import _rows as divide
from chiasm.worlds.fashion import ANSWERS as CLOTHES
from chiasm.worlds.fashion import FashionWorld


@pytest.fixture(autouse=True)
def _prepared(downloads):
    prepare(downloads)


def test_cifar_split_is_a_stratified_partition():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 1000))
    rows = divide(labels)
    assert [len(rows[split]) for split in ("train", "dev", "test")] == [7500, 500, 2000]
    assert sorted(np.concatenate(list(rows.values()))) == list(range(10_000))
    assert np.bincount(labels[rows["test"]]).tolist() == [200] * 10
    assert np.bincount(labels[rows["dev"]]).tolist() == [50] * 10
    # Fixed for ever: scores of the bundled model refer to this very division.
    assert rows["test"][:4].tolist() == divide(labels)["test"][:4].tolist()


def test_cifar_samples_are_the_pictures_with_their_class(pictures):
    for split in ("train", "dev", "test"):
        world = CifarWorld(split)
        native, labels = world.arrays()
        assert len(native) == len(labels) == len(world)
        for index in range(len(world)):
            sample = world.sample(index)
            row = sample.meta["row"]
            expected = Image.fromarray(pictures["cifar"][row]).resize((64, 64), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(sample.image, np.asarray(expected))
            assert sample.answer == list(ANSWERS.values())[pictures["cifar_labels"][row]]
            assert sample.key == f"cifar10/{row}"
    assert CifarWorld("test").sample(0).question == CifarWorld.questions[0]


def test_fashion_splits(pictures):
    train, dev, test = (FashionWorld(split) for split in ("train", "dev", "test"))
    assert (len(train), len(dev), len(test)) == (20, 20, 20)
    keys = [sample.key for world in (train, dev, test) for sample in world]
    assert len(set(keys)) == 60
    sample = dev.sample(3)
    assert sample.answer == CLOTHES[pictures["train_labels"][23]]
    assert sample.image.shape == (64, 64, 3)
    assert (sample.image[..., 0] == sample.image[..., 2]).all()
    native, labels = test.arrays()
    np.testing.assert_array_equal(native, pictures["test"])
    np.testing.assert_array_equal(labels, pictures["test_labels"])


@pytest.mark.parametrize("family", ["cifar10", "fashion"])
def test_random_access_and_phrasing(family):
    world = open_world(family, "train")
    forward = [world.sample(index) for index in range(len(world))]
    again = open_world(family, "train")
    for index in reversed(range(len(world))):
        sample = again.sample(index)
        assert sample.question == forward[index].question
        np.testing.assert_array_equal(sample.image, forward[index].image)
    assert {sample.question for sample in forward} == set(world.questions)
    with pytest.raises(DataError, match="no index"):
        world.sample(len(world))
    with pytest.raises(DataError, match="no index"):
        world.sample(-1)
    assert world.manifest()["length"] == len(world)
