"""COCO's run lengths: against the slow twin, against pycocotools where it is installed, and back."""

import importlib.util

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from chiasm.errors import DataError
from chiasm.worlds.rle import (
    decode_rle,
    encode_rle,
    pack_counts,
    run_lengths,
    run_lengths_reference,
    unpack_counts,
)

masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24))


@given(masks)
def test_runs_equal_the_slow_twin_and_come_back(mask):
    assert run_lengths(mask) == run_lengths_reference(mask)
    rle = encode_rle(mask)
    assert rle["size"] == list(mask.shape)
    np.testing.assert_array_equal(decode_rle(rle), mask)
    np.testing.assert_array_equal(decode_rle({"size": rle["size"], "counts": run_lengths(mask)}), mask)


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=40))
def test_counts_survive_packing(counts):
    text = pack_counts(counts)
    assert unpack_counts(text) == counts
    assert all(48 <= ord(character) < 112 for character in text)


def test_known_strings():
    # By hand: 6 -> "6"; 31 does not fit into 5 signed bits, so 31 = 0b11111 | more, then 0.
    assert pack_counts([6, 1]) == "61"
    assert pack_counts([31]) == chr((0x1F | 0x20) + 48) + "0"
    # The fourth count is written less the second one: 5 - 9 = -4 -> 0b11100.
    assert pack_counts([1, 9, 2, 5]) == "19"[0] + pack_counts([9]) + "2" + chr(0x1C + 48)


def test_a_mask_that_begins_with_its_object_begins_with_an_empty_run():
    assert run_lengths(np.array([[True, False], [True, False]])) == [0, 2, 2]


@pytest.mark.skipif(importlib.util.find_spec("pycocotools") is None, reason="pycocotools is not installed")
def test_equal_to_pycocotools():
    from pycocotools import mask as coco  # pyright: ignore[reportMissingImports]

    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 90, 2)
        mask = rng.random((height, width)) < rng.random()
        mask = np.kron(mask, np.ones((1 + int(rng.integers(4)),) * 2)) > 0
        theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert encode_rle(mask) == {"size": list(theirs["size"]), "counts": theirs["counts"].decode()}


def test_what_is_no_mask_is_refused():
    with pytest.raises(DataError, match="cannot be in a compressed mask"):
        unpack_counts("~~")
    with pytest.raises(DataError, match="cut off"):
        unpack_counts(chr(0x20 + 48))
    with pytest.raises(DataError, match="do not fill"):
        decode_rle({"size": [2, 2], "counts": [3]})
