"""Letters of options from replies; MMMU's rule without its dice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.eval.metrics.choices import first_letter, letters, parse_choice

OPTIONS = letters(["a red bus", "a bus", "the number 7", "none of these"])


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("B. a bus", "B"),
        ("Option C", "C"),
        ("B：a bus", "B"),
        ("The answer is (C).", "C"),
        ("(A) looks right, but (C) is", "C"),  # the last one wins
        ("It is B, I think", "B"),  # bare letters
        ("A bus, so B", "B"),  # "A" is an article there
        ("I think it shows nothing", None),  # "I" is a pronoun, and there is no such option
        ("A red bus", "A"),  # an option's own text, however short
        ("The bus that one can see there is the number 7", "C"),  # text in a long reply
        ("What one can see in there is a red bus", "A"),  # the longer of two that fit
        ("Let me see (A).\nFinal answer: D", "D"),  # declared
        (r"(A) … \boxed{B}", "B"),
        ("(A) it is.\nAnswer: unclear", "A"),  # what is declared is no option: the rest may be
        ("E", None),  # no such option
        ("I cannot say", None),
        ("", None),
        ("A, B", "B"),  # a list: the last
    ],
)
def test_choice(reply, letter):
    assert parse_choice(reply, OPTIONS) == letter


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("(A) or (B)", "B"),
        ("A cat", "A"),  # the article counts as a letter there
        ("B.", "B"),
        ("a red bus", None),  # five words or fewer: there it is guessed
        ("it is quite surely none of these", "D"),
        ("it may be many other things here", None),
        ("", None),
    ],
)
def test_mmmu_rule(reply, letter):
    assert parse_choice(reply, OPTIONS, mode="original") == letter


def test_first_letter_rule():
    assert first_letter("A cat", OPTIONS) == "A"
    assert first_letter("it is a bus", OPTIONS) == "B"
    assert first_letter("(B)", OPTIONS) is None  # the first character is a bracket
    assert first_letter("", OPTIONS) is None


@given(st.text(max_size=60), st.lists(st.text(max_size=8), max_size=6))
def test_any_reply_gives_a_letter_or_none(reply, texts):
    options = letters(texts)
    for found in (
        parse_choice(reply, options),
        parse_choice(reply, options, mode="original"),
        first_letter(reply, options),
    ):
        assert found is None or found in options


@given(st.text(alphabet="AB().* \nis", max_size=30))
def test_the_same_reply_gives_the_same_letter(reply):
    assert parse_choice(reply, OPTIONS) == parse_choice(reply, OPTIONS)
