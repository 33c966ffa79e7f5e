"""Average normalised Levenshtein similarity (DocVQA, InfographicVQA, ST-VQA).

What: ``anls(prediction, answers)`` = max over answers of s, where s = 1 - distance / length and s below the
threshold is 0. Source: Biten et al. 2019; fact sheet InternVL 2.5, section 5.

The released script compares texts with single blanks but divides by the length of the raw ones, so blanks at an end
raise the score; here the length is that of what was compared, ``mode="original"`` is the released rule and
``mode="stvqa"`` that of the ST-VQA script (stripped, not otherwise changed).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from chiasm.errors import DataError

__all__ = ["ANLS_VERSION", "anls", "levenshtein"]

ANLS_VERSION = 1


def levenshtein(a: str, b: str) -> int:
    """Least number of characters to insert, delete or replace."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def anls(
    prediction: str,
    answers: Sequence[str],
    *,
    threshold: float = 0.5,
    mode: Literal["chiasm", "original", "stvqa"] = "chiasm",
) -> float:
    """Return the similarity in 0 … 1; see the module's first lines.

    Raises:
        DataError: no answers.
    """
    if not answers:
        raise DataError("ANLS needs at least one answer: this question has none")
    best = max(_similarity(prediction, answer, mode) for answer in answers)
    return best if best >= threshold else 0.0


def _similarity(prediction: str, answer: str, mode: str) -> float:
    if mode == "stvqa":
        given, wanted = prediction.lower().strip(), answer.lower().strip()
    else:
        given, wanted = (" ".join(text.lower().split()) for text in (prediction, answer))
    longest = max(len(prediction), len(answer)) if mode == "original" else max(len(given), len(wanted))
    return 1.0 - levenshtein(given, wanted) / longest if longest else 1.0
