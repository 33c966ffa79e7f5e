"""Golden cases of the EvalAI processor, each with its reason, and the leave-one-out formula against the slow one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import DataError
from chiasm.eval.metrics.vqa import normalise_vqa, vqa_accuracy


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("Yes", "yes"),  # lower case
        ("a red  car", "red car"),  # articles go, blanks are single
        ("two dogs", "2 dogs"),  # number words to ten
        ("none", "0"),  # "none" is 0
        ("eleven", "eleven"),  # and not beyond
        ("dont know", "don't know"),  # apostrophe back
        ("couldnt've", "couldn't've"),  # one of two is missing
        ("john's", "john 's"),  # the possessive is a word of its own
        ("1,000", "1000"),  # commas go wherever they stand
        ("red,blue", "redblue"),  # even where that joins words
        ("t-shirt", "t shirt"),  # a mark between letters is a blank
        ("yes - no", "yes no"),  # beside a blank it is nothing
        ("3.5 cm.", "3.5 cm"),  # a full stop stays before a digit
        ("what?", "what"),
        ("line\none", "line 1"),
        ("the", ""),  # nothing but an article is empty
        ("somebody'd", "somebodyd"),  # the table's own slip
    ],
)
def test_processor(raw, normal):
    assert normalise_vqa(raw) == normal


def slow(prediction: str, answers: list[str]) -> float:
    """The definition: leave each person out in turn."""
    said = normalise_vqa(prediction)
    total = 0.0
    for left in range(len(answers)):
        others = [normalise_vqa(a) for n, a in enumerate(answers) if n != left]
        total += min(1.0, sum(a == said for a in others) / 3)
    return total / len(answers)


@pytest.mark.parametrize(("agree", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_people(agree, score):
    answers = ["red"] * agree + [f"other {n}" for n in range(10 - agree)]
    assert vqa_accuracy("Red.", answers) == pytest.approx(score)


@given(
    st.text(alphabet="abAthe ,.'0-", max_size=6),
    st.lists(st.sampled_from(["a", "b", "the b", "0"]), min_size=4),
)
def test_equals_the_definition(prediction, answers):
    # An answer that nobody gave scores 0 in the definition too; so does one that is empty like nobody's.
    assert vqa_accuracy(prediction, answers) == pytest.approx(slow(prediction, answers))


def test_too_few_people():
    with pytest.raises(DataError, match="found 3"):
        vqa_accuracy("a", ["a"] * 3)
