"""The distillation stream: resumable, labelled, and its fast resampling equal to PIL's."""

import numpy as np
import pytest
from PIL import Image

from chiasm.errors import DataError
from chiasm.worlds import prepare
from chiasm.worlds.cifar10 import CifarWorld
from chiasm.worlds.counting import CountingWorld
from chiasm.worlds.distill import FAMILIES, DistillStream, distill_worlds, warp
from chiasm.worlds.fashion import FashionWorld
from chiasm.worlds.words import WordsWorld, letters

SHARES = {"cifar10": 0.4, "fashion": 0.2, "words": 0.2, "counting": 0.2}


@pytest.fixture
def worlds(downloads):
    prepare(downloads)
    return {
        "cifar10": CifarWorld("train"),
        "fashion": FashionWorld("train"),
        "words": WordsWorld("train", seed=1, size=12, pseudo=0.5),
        "counting": CountingWorld("train", seed=1, size=15),
    }


def test_warp_equals_pil():
    rng = np.random.default_rng(0)
    # Values away from 0 and 255: PIL clips between its two passes, the matrix product does not.
    pictures = rng.integers(90, 160, (6, 32, 28, 3), dtype=np.uint8)
    boxes = np.array(
        [[0, 0, 28, 32]] * 2 + [[3.25, 1.5, 27.0, 30.125]] * 2 + [[0, 8, 20, 32], [8.5, 0, 28, 22.75]]
    )
    flip = np.arange(6) % 2 == 0
    out = warp(pictures.transpose(0, 3, 1, 2), boxes, flip)
    assert out.shape == (6, 3, 64, 64)
    for k in range(6):
        expected = np.asarray(
            Image.fromarray(pictures[k]).resize((64, 64), Image.Resampling.BICUBIC, box=tuple(boxes[k]))
        )
        expected = expected[:, ::-1] if flip[k] else expected
        assert (
            np.abs(out[k].transpose(1, 2, 0) - expected).max() <= 1.13
        )  # half a level a pass, the first amplified by the kernel's negative lobes


def test_batches_are_a_function_of_the_step(worlds, tmp_path):
    one = DistillStream(worlds, SHARES, batch=20, cache=tmp_path)
    two = DistillStream(worlds, SHARES, batch=20, cache=tmp_path)
    first = [one.batch(step) for step in range(9)]
    for step in (8, 3, 0):
        again = two.batch(step)
        for name in again.__slots__:
            np.testing.assert_array_equal(getattr(again, name), getattr(first[step], name))
    other = DistillStream(worlds, SHARES, batch=20, cache=tmp_path, seed=1).batch(0)
    assert (other.tiles_B3SS != first[0].tiles_B3SS).any()


def test_labels_belong_to_the_pictures(worlds, tmp_path):
    stream = DistillStream(worlds, SHARES, batch=20, cache=tmp_path, plain=1.0)
    assert stream.amounts == {"cifar10": 8, "fashion": 4, "words": 4, "counting": 4}
    for step in range(5):
        batch = stream.batch(step)
        assert batch.tiles_B3SS.shape == (20, 3, 64, 64)
        assert batch.tiles_B3SS.dtype == np.uint8
        for k in range(20):
            family = FAMILIES[batch.family_B[k]]
            sample = worlds[family].sample(int(batch.index_B[k]))
            tile = batch.tiles_B3SS[k].transpose(1, 2, 0)
            assert batch.class_B[k] == sample.meta.get("class", -1)
            assert batch.count_B[k] == (sample.meta["count"] if family == "counting" else -1)
            expected = letters(sample.answer) if family == "words" else np.full(6, -1)
            np.testing.assert_array_equal(batch.letters_BL[k], expected)
            if family in ("words", "counting"):
                np.testing.assert_array_equal(tile, sample.image)
            else:  # random noise as stand-in: PIL's clipping between passes shows, hence the mean
                nearest = min(
                    np.abs(tile - image.astype(float)).mean()
                    for image in (sample.image, sample.image[:, ::-1])
                )
                assert nearest < 1.5


def test_every_picture_once_an_epoch(worlds, tmp_path):
    stream = DistillStream({"counting": worlds["counting"]}, {"counting": 1.0}, batch=4, cache=tmp_path)
    seen = np.concatenate([stream.batch(step).index_B for step in range(15)])
    for epoch in range(4):
        assert sorted(seen[15 * epoch : 15 * (epoch + 1)]) == list(range(15))
    assert (seen[:15] != seen[15:30]).any()


def test_teacher_rows_only_for_unchanged_pictures(worlds, tmp_path):
    n = len(worlds["cifar10"])
    teacher = {
        "family": np.array(["cifar10"] * (2 * n) + ["cifar10", "words"]),
        "split": np.array(["train"] * (2 * n) + ["dev", "train"]),
        "index": np.concatenate([np.arange(n), np.arange(n), [0, 2]]),
        "flip": np.array([False] * n + [True] * n + [False, False]),
    }
    stream = DistillStream(worlds, SHARES, batch=40, cache=tmp_path, plain=0.5, teacher=teacher)
    crops = plain = 0
    for step in range(4):
        batch = stream.batch(step)
        for k in range(40):
            row, family = batch.teacher_B[k], FAMILIES[batch.family_B[k]]
            if family == "words":
                assert row == (2 * n + 1 if batch.index_B[k] == 2 else -1)
            elif family != "cifar10":
                assert row == -1
            elif row >= 0:
                plain += 1
                assert teacher["index"][row] == batch.index_B[k]
                image = worlds["cifar10"].sample(int(batch.index_B[k])).image
                image = image[:, ::-1] if teacher["flip"][row] else image
                assert np.abs(batch.tiles_B3SS[k].transpose(1, 2, 0) - image.astype(float)).mean() < 1.5
            else:
                crops += 1
    assert plain > 15
    assert crops > 15


def test_without_cifar_and_wrong_shares(worlds, tmp_path):
    chosen = distill_worlds(with_cifar=False)
    assert tuple(chosen) == ("fashion", "words", "counting")
    small = {name: world for name, world in worlds.items() if name != "cifar10"}
    batch = DistillStream(small, {"fashion": 1, "words": 1, "counting": 1}, batch=7, cache=tmp_path).batch(0)
    assert np.bincount(batch.family_B, minlength=4).tolist() == [0, 3, 2, 2]
    with pytest.raises(DataError, match="give positive shares"):
        DistillStream(small, {"cifar10": 1.0}, batch=7, cache=tmp_path)
