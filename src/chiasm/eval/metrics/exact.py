"""Exact match of short answers, its score per family, and the comparison with controls.

What: ``normalise`` and ``exact_match`` (the parser whose version every manifest carries), ``Score``, ``compare``
and ``Comparison`` with the rule by which a family "beats" a control.
Source: answer normalisation in the manner of SQuAD and VQA (lower case, no punctuation, no articles); intervals of
``eval.intervals``.

Shape legend: N items.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from chiasm.eval.intervals import Interval, mcnemar, paired_difference, wilson

__all__ = [
    "PARSER_VERSION",
    "Comparison",
    "Score",
    "compare",
    "exact_match",
    "normalise",
    "score",
]

#: Raised whenever ``normalise`` would change a verdict; part of every manifest.
PARSER_VERSION = 1

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
_DIGITS = {str(value): word for value, word in enumerate(_NUMBERS.split())}


def normalise(text: str, *, numbers: bool = False) -> str:
    """Return what two equal answers have in common.

    Lower case; hyphens, dashes and slashes become spaces and other punctuation goes; articles go unless nothing
    else is left (the word to be read may be "the"); white space is single.

    Args:
        text: an answer as a model or a person wrote it.
        numbers: write 0 … 20 as words, for questions about counts ("3" is "three").
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"[-‐-―/]", " ", text)
    text = "".join(c for c in text if unicodedata.category(c)[0] not in "PSC" or c.isspace())
    words = text.split()
    words = [word for word in words if word not in _ARTICLES] or words
    if numbers:
        words = [_DIGITS.get(word, word) for word in words]
    return " ".join(words)


def exact_match(prediction: str, answer: str, *, numbers: bool = False) -> bool:
    """Say whether two answers are the same after ``normalise``; an empty prediction never is."""
    given = normalise(prediction, numbers=numbers)
    return bool(given) and given == normalise(answer, numbers=numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Accuracy over N items with its 95 % Wilson interval."""

    correct: int
    n: int
    accuracy: float
    interval: Interval

    def to_dict(self) -> dict[str, Any]:
        """Plain data for results.json."""
        return asdict(self) | {"interval": list(self.interval)}


def score(correct_N: Sequence[bool] | np.ndarray) -> Score:
    """Return the score of N verdicts.

    Raises:
        DataError: there are none.
    """
    right, n = int(np.sum(correct_N)), len(correct_N)
    interval = wilson(right, n)
    return Score(correct=right, n=n, accuracy=right / n, interval=interval)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A model against one control on the same items.

    Attributes:
        control: score of the control.
        difference: accuracy of the model minus that of the control.
        interval: 95 % bootstrap interval of the difference over items.
        p_value: exact McNemar test, two-sided.
        beats: the lower end of the *model's* Wilson interval is above the control's accuracy, and the interval of
            the paired difference is wholly above 0. Both are asked for: the first is what a reader checks in the
            table, the second uses that both answered the same items.
    """

    control: Score
    difference: float
    interval: Interval
    p_value: float
    beats: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data for results.json: the control's score and, under other names, the comparison."""
        return self.control.to_dict() | {
            "difference": self.difference,
            "difference_interval": list(self.interval),
            "mcnemar_p": self.p_value,
            "beaten": self.beats,
        }


def compare(model_N: Sequence[bool] | np.ndarray, control_N: Sequence[bool] | np.ndarray) -> Comparison:
    """Compare a model with a control, item by item.

    Raises:
        DataError: no items, or not the same number of them.
    """
    difference, low, high = paired_difference(model_N, control_N)
    ours, theirs = score(model_N), score(control_N)
    return Comparison(
        control=theirs,
        difference=difference,
        interval=(low, high),
        p_value=mcnemar(model_N, control_N),
        beats=ours.interval[0] > theirs.accuracy and low > 0,
    )
