"""MathVista: quick extraction of an answer, its form, equality; no language model reads along.

Source: MathVista (Lu et al. 2024) and its evaluation code in the variant of InternVL (`--quick_extract`); fact sheet
InternVL 2.5, section 5. A declared final answer is taken, brought to the form of the question (option text, whole
number, number at `precision` decimals, list) and compared.

The released code gives a multiple-choice question the option with the least edit distance whatever the reply says; a
long reply then gets a haphazard one. Ours parses a choice or none; numbers may carry a unit, a percent sign or commas.
``mode="original"`` keeps the released rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from chiasm.eval.metrics.anls import levenshtein
from chiasm.eval.metrics.choices import letters, parse_choice
from chiasm.eval.metrics.extract import Mode, final_answer

__all__ = ["MATHVISTA_VERSION", "mathvista_match", "parse_mathvista"]

MATHVISTA_VERSION = 1

_NUMBER = re.compile(r"[-−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|[-−]?\.\d+")
_BRACKET = re.compile(r"\(([a-zA-Z])\)")


def parse_mathvista(
    reply: str,
    *,
    choices: Sequence[str] = (),
    answer_type: str = "text",
    precision: int = 0,
    mode: Mode = "chiasm",
) -> str | None:
    """Return the answer in the form of the question, or None where the reply has none. Never raises.

    Args:
        reply: of the model.
        choices: options; not empty for a multiple-choice question.
        answer_type: "integer", "float", "list" or "text".
        precision: decimals of a float.
        mode: see the module's first lines.
    """
    said = reply if mode == "original" and reply in choices else final_answer(reply, mode=mode).text
    if choices:
        return _released_choice(said, choices) if mode == "original" else _choice(said, choices)
    if answer_type in ("integer", "float"):
        number = _plain(said) if mode == "original" else _find(said)
        if number is None:
            return None
        return str(int(number)) if answer_type == "integer" else str(round(number, precision))
    return said.strip() or None


def mathvista_match(prediction: str | None, answer: str, *, mode: Mode = "chiasm") -> bool:
    """Say whether a parsed answer is the right one: equal text; lists and numbers as such in mode "chiasm"."""
    if prediction is None:
        return False
    if prediction == answer or mode == "original":
        return prediction == answer
    left, right = _plain(prediction), _plain(answer)
    if left is not None and right is not None:
        return left == right
    return "".join(prediction.split()).lower() == "".join(answer.split()).lower()


def _choice(said: str, choices: Sequence[str]) -> str | None:
    options = letters(choices)
    exact = [text for text in choices if text.strip().lower() == said.strip().lower()]
    if exact:  # an option may itself be a letter
        return exact[0]
    letter = parse_choice(said, options)
    return None if letter is None else options[letter]


def _released_choice(said: str, choices: Sequence[str]) -> str:
    said = said.strip()
    found = _BRACKET.findall(said)
    letter = found[0].upper() if found else said
    options = letters(choices)
    return options[letter] if letter in options else min(choices, key=lambda text: levenshtein(letter, text))


def _plain(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _find(text: str) -> float | None:
    """The number that a text is, or else the last one in it."""
    whole = _plain(text)
    if whole is not None:
        return whole
    found = _NUMBER.findall(text)
    return _plain(found[-1].replace(",", "").replace("−", "-")) if found else None
