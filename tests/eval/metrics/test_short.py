"""ANLS, relaxed accuracy, plain matches: golden cases with their reasons, defects corrected and kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import DataError
from chiasm.eval.metrics.anls import anls, levenshtein
from chiasm.eval.metrics.match import contains_answer, gqa_match, plain_match
from chiasm.eval.metrics.relaxed import relaxed_accuracy, relaxed_match

# --- ANLS ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("", "", 0), ("", "ab", 2), ("kitten", "sitting", 3), ("abc", "abc", 0)]
)
def test_distance(a, b, distance):
    assert levenshtein(a, b) == levenshtein(b, a) == distance


def recursive(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(recursive(a[1:], b) + 1, recursive(a, b[1:]) + 1, recursive(a[1:], b[1:]) + (a[0] != b[0]))


@given(st.text("ab", max_size=5), st.text("ab", max_size=5))
def test_distance_is_the_recursive_one(a, b):
    assert levenshtein(a, b) == recursive(a, b)


def test_distance_of_nltk():
    nltk = pytest.importorskip("nltk")
    for a, b in [("intention", "execution"), ("flaw", "lawn"), ("a b", "ab")]:
        assert levenshtein(a, b) == nltk.edit_distance(a, b)


@pytest.mark.parametrize(
    ("given", "answers", "score"),
    [
        ("12 March", ["12 march"], 1.0),  # case does not count
        ("12   march", ["12 march"], 1.0),  # nor blanks
        ("12 marhc", ["12 march"], 0.75),  # two letters of eight
        ("abcd", ["abxy"], 0.5),  # just at the threshold: kept
        ("abcd", ["axyz"], 0.0),  # 0.25 is below it
        ("yes", ["no", "yes"], 1.0),  # the best answer counts
        ("", ["x"], 0.0),
    ],
)
def test_anls(given, answers, score):
    assert anls(given, answers) == pytest.approx(score)


def test_anls_divides_by_what_was_compared():
    # "ab" against "cd" differ wholly; four blanks around lengthen the raw text alone.
    assert anls("  ab  ", ["cd"]) == 0.0
    assert anls("  ab  ", ["cd"], mode="original") == pytest.approx(1 - 2 / 6)
    assert anls("a  b", ["a b"], mode="stvqa") == pytest.approx(0.75)
    with pytest.raises(DataError, match="no"):
        anls("a", [])


# --- relaxed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "answer", "right"),
    [
        ("105", "100", True),  # exactly 5 %
        ("95", "100", True),
        ("105.1", "100", False),
        ("94.9", "100", False),
        ("-105", "-100", True),
        ("12%", "0.12", True),  # a percentage is its share
        ("12", "12%", False),
        ("Blue", "blue", True),
        ("blue", "dark blue", False),
        ("0.0", "0", True),  # nothing is within 5 % of 0 but 0
        ("0.01", "0", False),
        ("0%", "0", True),
        ("nan", "nan", True),  # a text like others
        ("inf", "1e999", False),
    ],
)
def test_relaxed(given, answer, right):
    assert relaxed_match(given, answer) is right


def test_relaxed_as_released():
    # Its tolerance is 5 % of what the model says, and 0 is compared as text.
    assert relaxed_match("105.2", "100", mode="original")  # 5.2 / 105.2 < 5 %
    assert not relaxed_match("105.2", "100")
    assert not relaxed_match("95.1", "100", mode="original")  # 4.9 / 95.1 > 5 %
    assert relaxed_match("95.1", "100")
    assert not relaxed_match("0.0", "0", mode="original")
    assert relaxed_accuracy("7", ["1", "7"]) == 1.0


# --- equality -----------------------------------------------------------------------------------------------------


def test_plain_match():
    assert plain_match(" Left. ", ["left"]) == 1.0
    assert plain_match("Left.", ["left"], mode="original") == 0.0  # the full stop counts there
    assert plain_match("the left", ["left"]) == 0.0  # articles count
    assert plain_match("", [""]) == 0.0  # silence is no answer
    assert gqa_match("Left.", ["left"], mode="original") == 1.0
    assert gqa_match(" left", ["left"], mode="original") == 0.0


def test_substring():
    assert contains_answer("The sign says STOP\nhere", ["stop here"]) == 1.0
    assert contains_answer("stop", [""]) == 0.0  # an empty answer would stand everywhere
    assert contains_answer(r"\frac { a } { b }", [r"\frac{a}{b}"], formula=True) == 1.0
    assert contains_answer(r"\frac{A}{b}", [r"\frac{a}{b}"], formula=True) == 0.0  # case counts in formulas


@given(st.text(max_size=40), st.lists(st.text(max_size=10), min_size=1, max_size=4))
def test_nothing_raises(reply, answers):
    for mode in ("chiasm", "original"):
        assert relaxed_accuracy(reply, answers, mode=mode) in (0.0, 1.0)
        assert plain_match(reply, answers, mode=mode) in (0.0, 1.0)
        assert 0.0 <= anls(reply, answers, mode=mode) <= 1.0
    assert contains_answer(reply, answers) in (0.0, 1.0)
