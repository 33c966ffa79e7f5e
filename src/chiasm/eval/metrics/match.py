"""Equality of short answers in the manner of single benchmarks (GQA, AI2D, OCR-VQA), and OCRBench's substring rule.

Source: fact sheet InternVL 2.5, section 5. `plain_match` compares without case, outer blanks and a final full stop; the
released evaluation keeps the full stop for AI2D and OCR-VQA (``mode="original"``) and drops it for GQA, whose official
script then asks for equality. All are stricter than `exact_match`: articles and punctuation count.
"""

from __future__ import annotations

from collections.abc import Sequence

from chiasm.eval.metrics.extract import Mode

__all__ = ["MATCH_VERSION", "contains_answer", "gqa_match", "plain_match"]

MATCH_VERSION = 1


def plain_match(prediction: str, answers: Sequence[str], *, mode: Mode = "chiasm") -> float:
    """1.0 if the prediction equals one of the answers, else 0.0; an empty prediction never does."""
    if mode == "original":
        return float(any(prediction.strip().lower() == answer.strip().lower() for answer in answers))
    given = _plain(prediction)
    return float(bool(given) and any(given == _plain(answer) for answer in answers))


def gqa_match(prediction: str, answers: Sequence[str], *, mode: Mode = "chiasm") -> float:
    """GQA's rule: `plain_match`; in mode "original" full stops at the end go and blanks stay."""
    if mode == "original":
        return float(any(prediction.rstrip(".").lower() == answer for answer in answers))
    return plain_match(prediction, answers)


def contains_answer(prediction: str, answers: Sequence[str], *, formula: bool = False) -> float:
    """OCRBench: 1.0 if one of the answers stands in the prediction.

    Args:
        prediction: the whole reply.
        answers: accepted texts; empty ones are passed over, as they stand everywhere.
        formula: handwritten mathematics (HME100k): blanks go and case counts; else line breaks are blanks and case
            does not count.
    """
    given, *wanted = (_squeezed(text, formula) for text in (prediction, *answers))
    return float(any(text and text in given for text in wanted))


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def _squeezed(text: str, formula: bool) -> str:
    joined = text.strip().replace("\n", " ")
    return joined.replace(" ", "") if formula else joined.lower()
