r"""Final answers in long replies."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import ConfigError
from chiasm.eval.metrics.choices import parse_choice
from chiasm.eval.metrics.extract import checked_mode, final_answer


@pytest.mark.parametrize(
    ("reply", "text", "how"),
    [
        ("First 2.\nFinal answer: 4", "4", "marker"),
        ("so.\n**Final Answer:** 4\n", "4", "marker"),
        ("I first wrote Answer: 3, wrongly.\nAnswer: 4", "4", "marker"),  # the last marker
        ("Answer:\n\n42", "42", "marker"),  # on the next line
        ("The answer is 7.", "7.", "marker"),
        ("### Answer\nblue", "blue", "marker"),
        (r"thus \boxed{\frac{1}{2}} as said", r"\frac{1}{2}", "boxed"),  # braces balance
        (r"Answer: \boxed{B}", "B", "boxed"),
        (r"\boxed{\text{blue}}", "blue", "boxed"),
        (r"\boxed{1} then \boxed{2}", "2", "boxed"),
        (r"\boxed{1} then \boxed{2", "1", "boxed"),  # cut off: the last whole one
        ("It must be the left.\nC", "C", "letter"),
        ("It must be the left.\n(c).", "C", "letter"),
        ("C", "C", "whole"),  # one line is the reply itself
        ("答案：是红色", "是红色", "marker"),
        ("no idea", "no idea", "whole"),
        ("", "", "whole"),
    ],
)
def test_found(reply, text, how):
    found = final_answer(reply)
    assert (found.text, found.how) == (text, how)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "reply", ["answer" + " " * 60_000 + "x", "\\boxed{" * 8_000, "A" + "\n" * 60_000 + "so"]
)
def test_a_reply_that_loops_is_read_at_once(reply):
    """What a model writes that never stops: quadratic time would be minutes."""
    began = time.process_time()
    assert not final_answer(reply).marked
    assert parse_choice(reply, {"B": "blue", "C": "red"}) is None
    assert time.process_time() - began < 2


def test_released_rule_takes_the_first_marker():
    reply = "I first wrote Answer: 3\nFinal answer: 4"
    assert final_answer(reply, mode="original").text == "3"
    assert final_answer("none", mode="original").how == "whole"


def test_unknown_mode():
    with pytest.raises(ConfigError, match="'own'"):
        checked_mode("own")


@given(st.text(alphabet=st.sampled_from(list("\\boxed{}answerFinal: \n*A#(")), max_size=80))
def test_nothing_raises(reply):
    for mode in ("chiasm", "original"):
        assert final_answer(reply, mode=mode).how in ("boxed", "marker", "letter", "whole")
