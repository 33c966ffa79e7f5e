"""MMMU's open questions: key sub-responses and numbers of a reply against the accepted answers.

Source: MMMU (Yue et al. 2024) and its evaluation code; fact sheet InternVL 2.5, section 5. A reply is cut into
sentences; of each that holds an indicator ("so ", "is ", "answer ", …; in the last one also "=") the shortest rest
behind one is a key sub-response. These and the numbers in them are the predictions; numbers are compared at two
decimals, and a text is right when an accepted text stands in it.

The released code lower-cases the reply and then looks for a capital letter behind a full stop, so that it never cuts
sentences but at line breaks. Here they are cut; ``mode="original"`` keeps the rule as it runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from chiasm.eval.metrics.extract import Mode, final_answer

__all__ = ["MMMU_VERSION", "match_open", "parse_open"]

MMMU_VERSION = 1

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_SENTENCE = re.compile(r"\.\s(?=[A-Z])|\n")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def parse_open(reply: str, *, mode: Mode = "chiasm") -> list[str | float]:
    """Return the predictions of a reply, texts in lower case and numbers at two decimals, none twice. Never raises.

    In mode "chiasm" a declared final answer stands for the whole reply. Empty for a reply that says nothing.
    """
    if mode == "original":
        pieces = _SENTENCE.split(reply.strip().strip(".").lower())
        whole = reply.strip().strip(".").lower()
    else:
        said = final_answer(reply)
        if said.marked:
            return _values([said.text.strip().strip(".").lower()])
        pieces = [piece.lower() for piece in _SENTENCE.split(reply.strip().strip("."))]
        whole = reply.strip().strip(".").lower()
    keys = []
    for n, piece in enumerate(pieces):
        marks = (*_INDICATORS, "=") if n == len(pieces) - 1 else _INDICATORS
        rests = [piece.split(mark)[-1].strip() for mark in marks if mark in piece]
        # An empty rest was "no answer yet" there: the next indicator's replaces it, but not a longer one a shorter.
        shortest = None
        for rest in rests:
            if not shortest or len(rest) < len(shortest):
                shortest = rest
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            keys.append(shortest)
    return _values(keys or [whole])


def match_open(predictions: Sequence[str | float], answers: Sequence[str]) -> bool:
    """Say whether a prediction holds one of the accepted answers (texts), or equals it (numbers)."""
    wanted = [value for answer in answers for value in _normal(answer)]
    texts = [value for value in wanted if isinstance(value, str) and value]
    numbers = [value for value in wanted if not isinstance(value, str)]
    return any(
        any(text in said for text in texts) if isinstance(said, str) else said in numbers
        for said in predictions
    )


def _values(keys: Sequence[str]) -> list[str | float]:
    found = [key for key in keys if key]
    found += [number for key in keys for pattern in _NUMBERS for number in pattern.findall(key)]
    return list(dict.fromkeys(value for text in found for value in _normal(text)))


def _normal(text: str) -> list[str | float]:
    """A number at two decimals, or lower case; a single character with a blank, lest it stand in every word."""
    bare = text.strip()
    try:
        number = float(bare.replace(",", ""))
    except ValueError:
        low = bare.lower()
        return [f" {low}", f"{low} "] if len(low) == 1 else [low]
    return [round(number, 2)] if math.isfinite(number) else [bare.lower()]
