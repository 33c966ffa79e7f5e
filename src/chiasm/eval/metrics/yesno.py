"""Yes or no: POPE (F1), MME (accuracy and accuracy+), HallusionBench (by question, figure and both).

Source: POPE (Li et al. 2023), MME (Fu et al. 2023), HallusionBench (Guan et al. 2024); fact sheet InternVL 2.5,
section 5.

POPE's released rule calls everything "yes" that lacks "No", "no" and "not" in its first sentence, an empty reply too.
Ours asks for a word that says yes or no; without one, or with both and neither in front, the reply is unparsed: it is
wrong for accuracy, and for F1 it counts as the answer that the label is not.

All summaries take a weight for each question (how often a resample drew it), so that one function gives the value and
its bootstrap. Shape legend: N questions.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from chiasm.eval.metrics.extract import Mode, final_answer

__all__ = [
    "COGNITION",
    "PERCEPTION",
    "YESNO_VERSION",
    "all_right",
    "binary_f1",
    "f1_of",
    "mme_scores",
    "mme_sums",
    "parse_yes_no",
    "parse_yes_no_mme",
]

YESNO_VERSION = 1

PERCEPTION = (
    *(
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "ocr",
    ),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_YES = frozenset(("yes", "yeah", "yep", "true", "correct", "是", "对"))
_NO = frozenset(("no", "not", "nope", "none", "false", "incorrect", "neither", "cannot", "否", "不", "不是"))


def parse_yes_no(reply: str, *, mode: Mode = "chiasm") -> str | None:
    """Return "yes", "no" or None; in mode "original" POPE's rule, which never says None. Never raises."""
    if mode == "original":
        words = reply.split(".")[0].replace(",", "").split(" ")
        return "no" if any(word in ("No", "not", "no") for word in words) else "yes"
    said = final_answer(reply)
    first = next((s for s in re.split(r"[.!?\n。！？]", said.text) if s.strip()), "")
    words = re.findall(r"\w+(?:['’]\w+)?", first.lower())
    if words and words[0] in _YES | _NO:
        return "yes" if words[0] in _YES else "no"
    agree = any(word in _YES for word in words)
    deny = any(word in _NO or word.endswith(("n't", "n’t")) for word in words)
    if agree != deny:
        return "yes" if agree else "no"
    return None


def parse_yes_no_mme(reply: str) -> str | None:
    """MME's released rule: "yes" or "no" among the first four characters, else None (there "other", always wrong)."""
    start = reply.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def binary_f1(
    predicted_N: Sequence[str | None], labels_N: Sequence[str], weights_N: np.ndarray | None = None
) -> dict[str, float]:
    """Return {"f1", "accuracy", "precision", "recall", "yes_ratio"}, "yes" positive; 0 where a ratio has no cases.

    An unparsed prediction (None) is a miss of its label: a false negative for "yes", a false positive for "no"; for
    `yes_ratio` it is none.
    """
    weights = np.ones(len(labels_N)) if weights_N is None else np.asarray(weights_N, np.float64)
    positive = np.array([label == "yes" for label in labels_N], bool)
    yes = np.array([value == "yes" for value in predicted_N], bool)
    parsed = np.array([value is not None for value in predicted_N], bool)
    return f1_of(np.where(parsed, yes, ~positive), positive, weights) | {
        "yes_ratio": _ratio(weights[yes].sum(), weights.sum())
    }


def f1_of(said_N: np.ndarray, positive_N: np.ndarray, weights_N: np.ndarray) -> dict[str, float]:
    """The ratios of `binary_f1` but the last, from arrays of bool: what was said, and what is right."""
    tp, fp = weights_N[said_N & positive_N].sum(), weights_N[said_N & ~positive_N].sum()
    fn = weights_N[~said_N & positive_N].sum()
    return {
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "accuracy": _ratio(weights_N[said_N == positive_N].sum(), weights_N.sum()),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
    }


def all_right(
    right_N: Sequence[float] | np.ndarray, groups_N: Sequence[Hashable], weights_N: np.ndarray | None = None
) -> float:
    """Share of groups whose questions are all right; a group counts with the mean weight of its questions."""
    whole: dict[Hashable, list[float]] = {}
    weights = np.ones(len(groups_N)) if weights_N is None else weights_N
    for right, group, weight in zip(right_N, groups_N, weights, strict=True):
        entry = whole.setdefault(group, [1.0, 0.0, 0.0])
        entry[0] = min(entry[0], float(right == 1))
        entry[1] += float(weight)
        entry[2] += 1
    shares = [(ok, weight / count) for ok, weight, count in whole.values()]
    return _ratio(sum(ok * weight for ok, weight in shares), sum(weight for _, weight in shares))


def mme_scores(
    right_N: Sequence[float] | np.ndarray,
    pictures_N: Sequence[Hashable],
    tasks_N: Sequence[str],
    weights_N: np.ndarray | None = None,
) -> dict[str, float]:
    """Return {"total", "perception", "cognition", task: …} in MME's points: 100 accuracy + 100 accuracy+ a task.

    accuracy is over questions, accuracy+ over pictures both of whose questions are right; full marks are 200 a task,
    2000 for the ten of perception, 800 for the four of cognition. Tasks of other names count in "total" alone.
    """
    weights = np.ones(len(tasks_N)) if weights_N is None else np.asarray(weights_N, np.float64)
    right = np.asarray(right_N, np.float64)
    scores: dict[str, float] = {}
    for task in dict.fromkeys(tasks_N):
        at = [n for n, name in enumerate(tasks_N) if name == task]
        accuracy = _ratio((weights[at] * (right[at] == 1)).sum(), weights[at].sum())
        scores[task] = 100 * accuracy + 100 * all_right(right[at], [pictures_N[n] for n in at], weights[at])
    return mme_sums(scores) | scores


def mme_sums(scores: Mapping[str, float]) -> dict[str, float]:
    """{"total", "perception", "cognition"} of the points of tasks."""
    return {
        "total": sum(scores.values()),
        "perception": sum(value for task, value in scores.items() if task.lower() in PERCEPTION),
        "cognition": sum(value for task, value in scores.items() if task.lower() in COGNITION),
    }


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
