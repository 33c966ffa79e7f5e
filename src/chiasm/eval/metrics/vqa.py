"""VQA soft accuracy over ten human answers (VQAv2, OK-VQA, TextVQA, VizWiz).

What: ``normalise_vqa`` and ``vqa_accuracy``. Sources: VQA (Antol et al. 2015) and the answer processor of its EvalAI
server, which is the contract that published numbers rest on; it is kept with its oddities (golden tests name them).

Steps of the processor: lower case; commas and question marks go; "'s" becomes a word of its own; each other mark
becomes nothing where a blank stands beside it anywhere in the answer, else a blank; full stops go unless a digit
follows; number words none, zero … ten become digits; articles go; contractions get their apostrophe back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from chiasm.errors import DataError

__all__ = ["VQA_VERSION", "normalise_vqa", "vqa_accuracy"]

VQA_VERSION = 1

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_STOP = re.compile(r"\.(?!\d)")
_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(n) for n, word in enumerate(_WORDS.split())} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))

# Written as they become; they are recognised with any one of their apostrophes missing. Forms with a capital I stand
# in the processor's table too, where nothing can reach them: the answer is lower case by then.
_FORMS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll "
    "you're you've"
)
_CONTRACTIONS = {
    form[:at] + form[at + 1 :]: form
    for form in _FORMS.split()
    for at, letter in enumerate(form)
    if letter == "'"
}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the processor's own direction


def normalise_vqa(answer: str) -> str:
    """Return an answer as the EvalAI processor compares it; "" is possible ("the")."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in _MARKS:
        out = out.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    words = [_NUMBERS.get(word, word) for word in _STOP.sub("", out).split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the soft accuracy in 0 … 1: the mean over leaving one person out of min(1, agreeing others / 3).

    With m of n answers equal to the prediction that is (m min(1, (m - 1) / 3) + (n - m) min(1, m / 3)) / n: 0.3, 0.6,
    0.9, 1 for m = 1, 2, 3, 4 of ten.

    Raises:
        DataError: fewer than four answers, with which no prediction could reach 1.
    """
    n = len(answers)
    if n < 4:
        raise DataError(
            f"VQA accuracy leaves one of ten answers out and needs at least four, found {n}: use exact match instead"
        )
    given = normalise_vqa(prediction)
    m = sum(normalise_vqa(answer) == given for answer in answers)
    return (m * min(1.0, (m - 1) / 3) + (n - m) * min(1.0, m / 3)) / n if m else 0.0
