"""Relaxed accuracy (ChartQA): numbers within 5 % of the answer, other answers equal without case.

Source: Masry et al. 2022, section 5.1; fact sheet InternVL 2.5, section 5.

Two defects of the released script are corrected, and kept by ``mode="original"``: an answer of 0 was compared as text
("0.0" was wrong for "0"), and the arguments are exchanged where the function is called, so that the tolerance is 5 % of
the *model's* number and a model that says "0" is compared as text. "nan" and "inf" are no numbers here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from chiasm.errors import DataError
from chiasm.eval.metrics.extract import Mode

__all__ = ["RELAXED_VERSION", "relaxed_accuracy", "relaxed_match"]

RELAXED_VERSION = 1
TOLERANCE = 0.05


def relaxed_match(
    prediction: str, answer: str, *, tolerance: float = TOLERANCE, mode: Mode = "chiasm"
) -> bool:
    """Say whether |prediction - answer| <= tolerance * |answer| (equality for 0), or the texts are equal.

    "12%" is 0.12 on both sides. Numbers are what `float` reads.
    """
    if mode == "original":
        # As it is called there: (model's answer, annotation) for (target, prediction).
        target, other = _number(prediction.strip()), _number(answer)
        if other is not None and target:
            return abs(other - target) / abs(target) <= tolerance
        return prediction.strip().lower() == answer.lower()
    given, wanted = _number(prediction.strip()), _number(answer.strip())
    if given is not None and wanted is not None and math.isfinite(given) and math.isfinite(wanted):
        # The margin lets 105 pass for 100 whatever 0.05 * 100 rounds to.
        return abs(given - wanted) <= tolerance * abs(wanted) * (1 + 1e-12)
    return prediction.strip().lower() == answer.strip().lower()


def relaxed_accuracy(prediction: str, answers: Sequence[str], *, mode: Mode = "chiasm") -> float:
    """1.0 if one of the answers is matched, else 0.0; DataError where there is none."""
    if not answers:
        raise DataError("relaxed accuracy needs at least one answer: this question has none")
    return float(any(relaxed_match(prediction, answer, mode=mode) for answer in answers))


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
