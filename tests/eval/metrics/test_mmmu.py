"""MMMU's open questions and MathVista's quick extraction."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.eval.metrics.mathvista import mathvista_match, parse_mathvista
from chiasm.eval.metrics.mmmu import match_open, parse_open


@pytest.mark.parametrize(
    ("reply", "answers", "right"),
    [
        ("24/7", ["24/7"], True),
        ("The result is 3.14159", ["3.14"], True),  # two decimals
        ("So it is 1,200 kg", ["1200"], True),  # commas
        ("x = 5", ["5"], True),  # "=" in the last sentence
        ("It is an apple tree", ["apple"], True),  # an accepted text stands in it
        ("It is a pear", ["apple"], False),
        ("I need 3. So the answer is 4", ["3"], False),  # a sentence without an indicator says nothing
        ("b", ["b"], True),
        ("blob", ["b"], False),  # a single letter needs a blank beside it
        ("about 2e3", ["2000"], True),
        ("", ["x"], False),
        ("", [""], False),
    ],
)
def test_open(reply, answers, right):
    assert match_open(parse_open(reply), answers) is right


def test_sentences_are_cut_here_and_not_there():
    reply = "The first is red. The second one is blue"
    assert parse_open(reply) == ["red", "blue"]
    assert parse_open(reply, mode="original") == ["blue"]  # one piece, of which the shortest rest counts


def test_declared_answer_stands_for_the_reply():
    reply = "It is 3 or is it 5.\nFinal answer: 7"
    assert match_open(parse_open(reply), ["7"])
    assert not match_open(parse_open(reply), ["3"])
    assert match_open(parse_open(reply, mode="original"), ["3 or is it 5"]) is False


@given(st.text(max_size=80))
def test_open_never_raises(reply):
    for mode in ("chiasm", "original"):
        match_open(parse_open(reply, mode=mode), [reply, "1"])


# --- MathVista ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "facts", "value"),
    [
        ("The answer is (B)", {"choices": ["3", "4"]}, "4"),
        ("4", {"choices": ["3", "4"]}, "4"),  # an option's text
        ("no idea", {"choices": ["3", "4"]}, None),
        ("It holds 1,250 litres", {"answer_type": "integer"}, "1250"),
        ("12.7", {"answer_type": "integer"}, "12"),
        ("Answer: 1.256 m", {"answer_type": "float", "precision": 2}, "1.26"),
        ("many", {"answer_type": "float", "precision": 1}, None),
        ("[1, 2]", {"answer_type": "list"}, "[1, 2]"),
    ],
)
def test_quick_extraction(reply, facts, value):
    assert parse_mathvista(reply, **facts) == value


def test_released_choice_is_the_nearest_text():
    assert parse_mathvista("no idea at all", choices=["3", "4 apples"], mode="original") == "4 apples"
    assert parse_mathvista("12 m", answer_type="integer", mode="original") is None
    assert parse_mathvista("(b)", choices=["3", "4"], mode="original") == "4"


def test_equality():
    assert mathvista_match("1.20", "1.2")
    assert not mathvista_match("1.20", "1.2", mode="original")
    assert mathvista_match("[1,2]", "[1, 2]")
    assert not mathvista_match(None, "None")


@given(
    st.text(max_size=60),
    st.sampled_from(["integer", "float", "list", "text"]),
    st.lists(st.text(max_size=6), max_size=4),
)
def test_mathvista_never_raises(reply, kind, choices):
    for mode in ("chiasm", "original"):
        parse_mathvista(reply, choices=choices, answer_type=kind, precision=2, mode=mode)
