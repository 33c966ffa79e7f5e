"""Boxes of RefCOCO and their IoU."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import DataError
from chiasm.eval.metrics.grounding import grounding_iou, parse_box


@pytest.mark.parametrize(
    ("reply", "box"),
    [
        ("<ref>dog</ref><box>[[100,200,300,400]]</box>", (0.1, 0.2, 0.3, 0.4)),
        ("[[100, 200, 300, 400], [0, 0, 1, 1]]", (0.1, 0.2, 0.3, 0.4)),  # the first
        ("[100, 200, 300, 400]", (0.1, 0.2, 0.3, 0.4)),  # bare numbers in answer to such a question
        ("(100, 200, 300, 400)", (0.1, 0.2, 0.3, 0.4)),
        ("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),  # sum below 4: shares already
        ("it is on the left", None),
        ("[1, 2, 3]", None),
    ],
)
def test_first_box(reply, box):
    assert parse_box(reply) == (None if box is None else pytest.approx(box))


def test_released_rule():
    assert parse_box("[[100,200,300,400]]", mode="original") == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert parse_box("[1,1,1,1]", mode="original") == pytest.approx((0.001,) * 4)  # a sum of 4 is divided
    assert parse_box("[0.9,1,1,1]", mode="original") == pytest.approx((0.9, 1, 1, 1))
    assert parse_box("[a,b,c,d]", mode="original") is None


def test_areas_have_no_plus_one():
    # Halves of 10 x 10 pixels: 50 / 100. With + 1 on sides it would be 6 * 11 / (11 * 11).
    assert grounding_iou((0.0, 0.0, 0.5, 1.0), [0, 0, 10, 10], 10, 10) == 0.5
    assert grounding_iou(None, [0, 0, 10, 10], 10, 10) == 0.0
    with pytest.raises(DataError, match="0x10"):
        grounding_iou((0, 0, 1, 1), [0, 0, 1, 1], 0, 10)


@given(st.text(alphabet="[](),.0123456789- abox<>/", max_size=60))
def test_never_raises(reply):
    for mode in ("chiasm", "original"):
        box = parse_box(reply, mode=mode)
        assert 0.0 <= grounding_iou(box, [1, 1, 9, 9], 10, 10) <= 1.0
