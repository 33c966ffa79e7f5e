import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import DataError
from chiasm.eval.metrics import compare, exact_match, normalise, score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Cat", "cat"),
        (" a  cat.\n", "cat"),
        ("The Cat!", "cat"),
        ("an apple", "apple"),
        ("T-Shirt", "t shirt"),
        ("t shirt", "t shirt"),
        ("don’t", "dont"),
        ("«deer»", "deer"),
        ("ﬁsh", "fish"),
        ("the", "the"),
        ("A", "a"),
        ("", ""),
        ("?!", ""),
        ("3", "3"),
    ],
)
def test_normalise_golden(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3", "three"), ("3.", "three"), ("Three", "three"), ("12", "twelve"), ("99", "99")],
)
def test_numbers_golden(text, expected):
    assert normalise(text, numbers=True) == expected


@pytest.mark.parametrize(
    ("given_text", "answer", "numbers", "same"),
    [
        ("The cat.", "cat", False, True),
        ("cats", "cat", False, False),
        ("a cat on a mat", "cat", False, False),
        ("4", "four", True, True),
        ("4", "four", False, False),
        ("four", "4", True, True),
        ("", "", False, False),
        (".", "the", False, False),
        ("the", "the", False, True),
        ("the a", "a", False, False),
    ],
)
def test_exact_match_golden(given_text, answer, numbers, same):
    assert exact_match(given_text, answer, numbers=numbers) is same


@settings(max_examples=30)
@given(st.text(max_size=40))
def test_normalise_is_idempotent(text):
    once = normalise(text)
    assert normalise(once) == once
    assert once == " ".join(once.split())


def test_score():
    result = score([True, True, False, True])
    assert (result.correct, result.n, result.accuracy) == (3, 4, 0.75)
    assert result.to_dict()["interval"] == list(result.interval)
    with pytest.raises(DataError):
        score([])


def bits(right, n=200):
    return np.arange(n) < right


def test_beating_needs_both_conditions():
    # Clearly better on the same items.
    assert compare(bits(150), bits(100)).beats
    # The paired difference alone is certain, but the model's own interval still holds the control's accuracy.
    close = compare(bits(110), bits(104))
    assert close.interval[0] > 0
    assert close.control.accuracy > 0.5 > score(bits(110)).interval[0]
    assert not close.beats
    # Equal, worse, and a control that is never right.
    assert not compare(bits(100), bits(100)).beats
    assert not compare(bits(50), bits(100)).beats
    assert compare(bits(20), bits(0)).beats
    assert not compare(bits(0), bits(0)).beats


def test_a_lucky_control_on_other_items_is_not_beaten():
    # 100 against 84 of 200, but on different items: the paired interval reaches below 0.
    result = compare(bits(100), bits(84)[::-1])
    assert score(bits(100)).interval[0] > 0.42
    assert result.interval[0] < 0
    assert not result.beats


def test_comparison_as_plain_data():
    plain = compare(bits(150), bits(100)).to_dict()
    assert plain["accuracy"] == 0.5
    assert plain["difference"] == 0.25
    assert plain["beaten"] is True
    assert plain["mcnemar_p"] < 1e-10
