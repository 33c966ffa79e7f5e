"""Prompts: what they say is pinned to their version."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import ConfigError, UsageError
from chiasm.eval.prompts import PROMPTS, Prompt, get_prompt

#: name -> (version, hash of template and option). Who changes a template raises its version and writes both here.
PINNED: dict[str, tuple[int, str]] = {
    "plain": (1, "c04a87fe3e7d"),
    "short": (1, "a4c444c4254e"),
    "vizwiz": (1, "50055deb5d4f"),
    "choice": (1, "a026adfd1413"),
    "choice_zh": (1, "2eea325365ad"),
    "yes_no": (1, "e41cbfae4568"),
    "caption": (1, "73e2d401634e"),
    "grounding": (1, "7d191c71d717"),
    "mvbench": (1, "0eefe08d4024"),
    "choice_subtitles": (1, "515252f98589"),
    "cot_choice_subtitles": (1, "ea6445611180"),
    "choice_vision": (1, "f6bff7f5e9e7"),
    "cot_choice": (1, "fcaca6e590e1"),
    "cot_short": (1, "413dda099387"),
    "cot_yes_no": (1, "75d17490adcc"),
    "cot_letter_line": (1, "5454ad86d619"),
    "cot_letter_line_vision": (1, "e5c42e09cc03"),
    "cot_boxed": (1, "419e522ca0b5"),
}


def digest(prompt: Prompt) -> str:
    return hashlib.sha256(json.dumps([prompt.template, prompt.option]).encode()).hexdigest()[:12]


def test_a_changed_template_has_a_new_version():
    assert {name: (p.version, digest(p)) for name, p in PROMPTS.items()} == PINNED


def test_published_strings():
    assert get_prompt("short").render("What colour?") == (
        "What colour? Answer the question using a single word or phrase."
    )
    assert get_prompt("choice").render("Which?", options={"A": "one", "B": "two"}) == (
        "Which?\nA. one\nB. two\nAnswer with the option's letter from the given choices directly."
    )
    assert get_prompt("choice").render("Which?", hint="Look.").startswith("Look.\nWhich?\n")
    assert get_prompt("grounding").render("the dog").endswith("this sentence describes: <ref>the dog</ref>")
    assert (
        get_prompt("mvbench").render("Why?", options={"A": "x"}).endswith("(A) x\nOnly give the best option.")
    )
    assert get_prompt("caption").render() == "Provide a one-sentence caption for the provided image."


def test_an_instruction_is_not_said_twice():
    asked = get_prompt("short").render("What colour?")
    assert get_prompt("short").render(asked) == asked
    choice = get_prompt("choice").render(f"Which?\n{get_prompt('choice').instruction}", options={"A": "one"})
    assert choice.count("given choices directly") == 1
    assert choice.endswith("A. one")


def test_reasoning_prompts_ask_for_what_is_extracted():
    from chiasm.eval.metrics.extract import final_answer

    for prompt in PROMPTS.values():
        if prompt.reasons:
            assert final_answer(prompt.template.splitlines()[-1]).marked, prompt.name


@given(st.text(max_size=40), st.text(max_size=20))
def test_fields_are_filled_once(question, option):
    text = get_prompt("choice").render(question + "{options}{hint}", options={"A": option + "{question}"})
    assert (question + "{options}{hint}").strip() in text
    assert "A. " + option + "{question}" in text


def test_unknown_prompt_and_empty_template():
    with pytest.raises(UsageError, match="choose among plain, short"):
        get_prompt("shorter")
    with pytest.raises(ConfigError, match="asks nothing"):
        Prompt(name="x", template="Hello")
