"""Scorers: how a reply becomes a value, a value a grade, and grades a score.

What: ``Scorer`` and the table ``SCORERS``. A scorer's version is put together of the versions of the modules that it
rests on, so that a manifest changes when any of them does. A scorer parses with the item beside it (options, type of
the answer) and knows whether the reply is a chain of thought, which must declare its answer to have one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from chiasm.errors import DataError
from chiasm.eval.benchmarks.items import Item
from chiasm.eval.metrics.anls import ANLS_VERSION, anls
from chiasm.eval.metrics.captions import CAPTION_VERSION, bleu, cider_d, rouge_l, tokenize_caption
from chiasm.eval.metrics.choices import CHOICES_VERSION, first_letter, parse_choice
from chiasm.eval.metrics.exact import PARSER_VERSION, normalise
from chiasm.eval.metrics.extract import EXTRACT_VERSION, Mode, final_answer
from chiasm.eval.metrics.grounding import GROUNDING_VERSION, THRESHOLD, grounding_iou, parse_box
from chiasm.eval.metrics.match import MATCH_VERSION, contains_answer, gqa_match, plain_match
from chiasm.eval.metrics.mathvista import MATHVISTA_VERSION, mathvista_match, parse_mathvista
from chiasm.eval.metrics.mmmu import MMMU_VERSION, match_open, parse_open
from chiasm.eval.metrics.relaxed import RELAXED_VERSION, relaxed_accuracy
from chiasm.eval.metrics.vqa import VQA_VERSION, normalise_vqa, vqa_accuracy
from chiasm.eval.metrics.yesno import YESNO_VERSION, parse_yes_no, parse_yes_no_mme

__all__ = ["SCORERS", "Asked", "Scorer", "ballot"]


@dataclass(frozen=True, slots=True)
class Asked:
    """How a reply came about: the mode of the metrics, and whether it reasons."""

    mode: Mode = "chiasm"
    reasons: bool = False


Value = Any
"""What is parsed: a text, a list of texts and numbers (MMMU), four numbers (a box); None for unparsed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """One way of scoring.

    Attributes:
        name: in manifests.
        parts: name -> version of the modules it rests on.
        parse: (reply, item, asked) -> value or None; never raises on any reply.
        grade: (value, item, asked) -> 0 … 1; DataError where the item lacks what it needs.
        statistic: of `chiasm.eval.summary`; "f1", "mme", "mean", …
        unit: "%" or "points".
        chance: item -> what a guess would get; 0 where nobody guesses.
        corpus: (texts, items) -> (grades, extra scores) where grades depend on all items (captions).
        key: value -> what two votes must share to agree.
    """

    name: str
    parts: Mapping[str, int]
    parse: Callable[[str, Item, Asked], Value | None]
    grade: Callable[[Value, Item, Asked], float]
    statistic: str = "mean"
    unit: Literal["%", "points"] = "%"
    chance: Callable[[Item], float] = lambda item: 0.0
    corpus: Callable[[Sequence[str], Sequence[Item]], tuple[list[float], dict[str, float]]] | None = None
    key: Callable[[Value], str] = lambda value: ballot(value)

    def check(self, item: Item) -> None:
        """Raise the DataError that grading would raise, before anything is asked."""
        if self.corpus is not None:
            if not item.answers:
                raise DataError(f"{item.where} has no answer: this bench cannot be scored on it")
            return
        self.grade(self._probe(item), item, Asked())

    def _probe(self, item: Item) -> Value:
        if self.name == "grounding":
            return (0.0, 0.0, 1.0, 1.0)
        return [""] if self.name == "mmmu" and not item.options else ""


def ballot(value: Value) -> str:
    """What two parsed answers must share to be the same vote: normalised text, or the value itself."""
    return normalise(value) or value if isinstance(value, str) else repr(value)


# --- parsing ------------------------------------------------------------------------------------------------------


def _short(reply: str, item: Item, asked: Asked) -> str | None:
    """The reply itself; of a chain of thought what it declares."""
    if not asked.reasons:
        return reply.strip() or None
    said = final_answer(reply, mode=asked.mode)
    return said.text if (said.marked or asked.mode == "original") and said.text.strip() else None


def _choice(reply: str, item: Item, asked: Asked) -> str | None:
    if not item.options:
        return _short(reply, item, asked)
    if asked.mode == "original":
        said = final_answer(reply, mode="original").text if asked.reasons else reply
        return first_letter(said, item.options)
    return parse_choice(reply, item.options)


def _mmmu(reply: str, item: Item, asked: Asked) -> Value | None:
    if item.options:
        said = (
            final_answer(reply, mode="original").text if asked.reasons and asked.mode == "original" else reply
        )
        return parse_choice(said, item.options, mode=asked.mode)
    return parse_open(reply, mode=asked.mode) or None


def _yes_no(reply: str, item: Item, asked: Asked) -> str | None:
    return parse_yes_no(reply, mode=asked.mode)


def _mme(reply: str, item: Item, asked: Asked) -> str | None:
    return parse_yes_no_mme(reply) if asked.mode == "original" else parse_yes_no(reply)


def _mathvista(reply: str, item: Item, asked: Asked) -> str | None:
    precision = item.facts.get("precision")
    return parse_mathvista(
        reply,
        choices=list(item.options.values()),
        answer_type=str(item.facts.get("answer_type", "text")),
        precision=int(precision) if _finite(precision) else 0,
        mode=asked.mode,
    )


# --- grading ------------------------------------------------------------------------------------------------------


def _answers(item: Item) -> tuple[str, ...]:
    if not item.answers:
        raise DataError(f"{item.where} has no answer: give the file of answers with --answers")
    return item.answers


def _vqa(value: str, item: Item, asked: Asked) -> float:
    try:
        return vqa_accuracy(value, _answers(item))
    except DataError as error:
        raise DataError(f"{item.where}: {error}" if item.where not in str(error) else str(error)) from None


def _choice_grade(value: str, item: Item, asked: Asked) -> float:
    if not item.options:
        return plain_match(value, _answers(item), mode=asked.mode)
    if not item.letter:
        raise DataError(
            f"{item.where}: its answer {', '.join(item.answers) or '(none)'!r} is none of its options"
        )
    return float(value == item.letter)


def _mmmu_grade(value: Value, item: Item, asked: Asked) -> float:
    return _choice_grade(value, item, asked) if item.options else float(match_open(value, _answers(item)))


def _box_grade(value: Sequence[float], item: Item, asked: Asked) -> float:
    box, width, height = (item.facts.get(name) for name in ("bbox", "width", "height"))
    whole = isinstance(box, list) and len(box) == 4 and all(map(_finite, box))
    if box is None or not whole or not _finite(width) or not _finite(height) or min(width, height) <= 0:
        raise DataError(f"{item.where} needs bbox [x1, y1, x2, y2] in pixels, width and height")
    return float(grounding_iou(value, box, width, height) >= THRESHOLD)


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _label(item: Item) -> str:
    said = _answers(item)[0].strip().lower().rstrip(".")
    label = {"1": "yes", "0": "no", "true": "yes", "false": "no"}.get(said, said)
    if label not in ("yes", "no"):
        raise DataError(f"{item.where}: the answer must be yes or no, found {said!r}")
    return label


def _yes_no_grade(value: str, item: Item, asked: Asked) -> float:
    return float(value == _label(item))


def _ocr_grade(value: str, item: Item, asked: Asked) -> float:
    kind = f"{item.category} {item.facts.get('dataset_name', '')}".lower()
    return contains_answer(
        value, _answers(item), formula="hme100k" in kind or "mathematical expression" in kind
    )


def _captions(texts: Sequence[str], items: Sequence[Item]) -> tuple[list[float], dict[str, float]]:
    said = [tokenize_caption(text) for text in texts]
    references = [[tokenize_caption(answer) for answer in _answers(item)] for item in items]
    scores = {f"BLEU-{n}": value for n, value in enumerate(bleu(said, references), 1)}
    scores["ROUGE-L"] = float(rouge_l(said, references).mean())
    return cider_d(said, references).tolist(), scores


def _by_options(item: Item) -> float:
    return 1 / len(item.options) if item.options else 0.0


_TEXT = {"extract": EXTRACT_VERSION}

_ALL = (
    Scorer(
        name="vqa",
        parts=_TEXT | {"vqa": VQA_VERSION},
        parse=_short,
        grade=_vqa,
        key=normalise_vqa,
    ),
    Scorer(
        name="anls",
        parts=_TEXT | {"anls": ANLS_VERSION},
        parse=_short,
        grade=lambda value, item, asked: anls(value, _answers(item), mode=asked.mode),
    ),
    Scorer(
        name="relaxed",
        parts=_TEXT | {"relaxed": RELAXED_VERSION},
        parse=_short,
        grade=lambda value, item, asked: relaxed_accuracy(value, _answers(item), mode=asked.mode),
        statistic="by_category",
    ),
    Scorer(
        name="gqa",
        parts=_TEXT | {"match": MATCH_VERSION},
        parse=_short,
        grade=lambda value, item, asked: gqa_match(value, _answers(item), mode=asked.mode),
    ),
    Scorer(
        name="match",
        parts=_TEXT | {"match": MATCH_VERSION},
        parse=_short,
        grade=lambda value, item, asked: plain_match(value, _answers(item), mode=asked.mode),
    ),
    Scorer(
        name="choice",
        parts=_TEXT | {"choices": CHOICES_VERSION, "normalise": PARSER_VERSION},
        parse=_choice,
        grade=_choice_grade,
        chance=_by_options,
    ),
    Scorer(
        name="circular",
        parts=_TEXT | {"choices": CHOICES_VERSION, "normalise": PARSER_VERSION},
        parse=_choice,
        grade=_choice_grade,
        statistic="circular",
        chance=_by_options,
    ),
    Scorer(
        name="mmmu",
        parts=_TEXT | {"choices": CHOICES_VERSION, "mmmu": MMMU_VERSION, "normalise": PARSER_VERSION},
        parse=_mmmu,
        grade=_mmmu_grade,
        chance=_by_options,
    ),
    Scorer(
        name="grounding",
        parts={"grounding": GROUNDING_VERSION},
        parse=lambda reply, item, asked: parse_box(reply, mode=asked.mode),
        grade=_box_grade,
    ),
    Scorer(
        name="pope",
        parts=_TEXT | {"yesno": YESNO_VERSION},
        parse=_yes_no,
        grade=_yes_no_grade,
        statistic="f1",
        chance=lambda item: 0.5,
    ),
    Scorer(
        name="mme",
        parts=_TEXT | {"yesno": YESNO_VERSION},
        parse=_mme,
        grade=_yes_no_grade,
        statistic="mme",
        unit="points",
        chance=lambda item: 0.5,
    ),
    Scorer(
        name="hallusion",
        parts=_TEXT | {"yesno": YESNO_VERSION},
        parse=_yes_no,
        grade=_yes_no_grade,
        statistic="hallusion",
        chance=lambda item: 0.5,
    ),
    Scorer(name="ocr", parts={"match": MATCH_VERSION}, parse=_short, grade=_ocr_grade),
    Scorer(
        name="mathvista",
        parts=_TEXT | {"choices": CHOICES_VERSION, "mathvista": MATHVISTA_VERSION},
        parse=_mathvista,
        grade=lambda value, item, asked: float(mathvista_match(value, _answers(item)[0], mode=asked.mode)),
        chance=_by_options,
    ),
    Scorer(
        name="caption",
        parts={"captions": CAPTION_VERSION},
        parse=lambda reply, item, asked: reply.strip() or None,
        grade=lambda value, item, asked: 0.0,
        corpus=_captions,
    ),
)

SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in _ALL}
