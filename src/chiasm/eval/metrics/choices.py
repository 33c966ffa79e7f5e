"""Multiple choice: from a reply to the letter of an option, without ever guessing.

What: ``parse_choice`` (our rule and MMMU's released one), ``first_letter`` (the released rule of MMBench, ScienceQA and
the like). Source: fact sheet InternVL 2.5, section 5.

The released MMMU rule: letters in brackets, else letters between blanks, else (replies of more than five words) options
whose text occurs; of several the one that occurs last; of none *a random one*. Here nothing is guessed: None is counted
as unparsed and scored 0, and a result says beside it what guessing would have added on average (unparsed questions,
each worth 1 / options), which is what the released number is in expectation.

What ours does beyond that: a declared final answer ("Answer: B", a box) is read before the rest of the reply; "B.",
"B)" and "**B**" count; "A" and "I" before a small letter are words; a reply that *is* an option's text counts
whatever its length; of two options of which one contains the other, the longer wins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from chiasm.eval.metrics.exact import normalise
from chiasm.eval.metrics.extract import Mode, final_answer

__all__ = ["CHOICES_VERSION", "first_letter", "letters", "parse_choice"]

#: Raised whenever one of the rules would choose another letter.
CHOICES_VERSION = 1

_ENDS = ",.!?;:'"
# A whole reply that is one letter: "b", "(B)", "B.", "Option B", "B: the red one", "**B**".
_WHOLE = re.compile(
    r"[\s*_`(\[（]*+(?:(?:option|choice)\s*[(\[（]?)?([A-Za-z])(?:\s*[)\].:：、，,）*_`]++(?P<rest>.*))?\s*",
    re.DOTALL | re.I,
)
_BRACKET = re.compile(r"[(\[（]\s*([A-Z])\s*[)\]）]")
# A letter that stands alone, perhaps with a mark behind it.
_BARE = re.compile(r"(?<![\w'’\-(\[])([A-Z])(?![\w'’\-])")


def letters(options: Sequence[str]) -> dict[str, str]:
    """Letters A, B, C, … of options in order."""
    return {chr(ord("A") + n): text for n, text in enumerate(options)}


def parse_choice(reply: str, options: Mapping[str, str], *, mode: Mode = "chiasm") -> str | None:
    """Return the letter that a reply chooses, or None; see the module's first lines. Never raises.

    Args:
        reply: of the model.
        options: capital letter -> text of the option.
        mode: "chiasm", or "original" for MMMU's released rule without its guess.
    """
    if mode == "original":
        return _released(reply, options)
    said = final_answer(reply)
    found = _choose(said.text, options)
    return found if found or not said.marked else _choose(reply, options)


def _choose(text: str, options: Mapping[str, str]) -> str | None:
    whole = _WHOLE.fullmatch(text.strip())
    if whole and whole[1].upper() in options:
        # "A, B" and "(A) is near, but (B) is it" name two options rather than one with its text.
        rest = whole["rest"] or ""
        marks = [*_BRACKET.finditer(rest), *(m for m in _BARE.finditer(rest) if not _is_word(rest, m))]
        if all(m[1] not in options or m[1] == whole[1].upper() for m in marks):
            return whole[1].upper()
    for found in (_BRACKET.finditer(text), _BARE.finditer(text)):
        named = [m for m in found if m[1] in options and not _is_word(text, m)]
        if named:
            return named[-1][1]
    given = normalise(text)
    equal = [letter for letter, option in options.items() if given and normalise(option) == given]
    if len(equal) == 1:
        return equal[0]
    return _by_text(text, options) if len(text.split()) > 5 else None


def _is_word(text: str, match: re.Match[str]) -> bool:
    """Whether a lone letter is the article or the pronoun: "A dog", "I think"."""
    return match[0] in "AI" and re.match(r"\s+[a-z]", text[match.end() :]) is not None


def _by_text(text: str, options: Mapping[str, str]) -> str | None:
    """The option whose text occurs last as a whole word; of those that end in one place, the longest."""
    low = text.lower()
    ends = {}
    for letter, option in options.items():
        bare = option.strip().lower().rstrip(".")
        if not bare:
            continue
        at = [m.end() for m in re.finditer(rf"(?<!\w){re.escape(bare)}(?!\w)", low)]
        if at:
            ends[letter] = (at[-1], len(bare))
    if not ends:
        return None
    best = max(ends.values())
    first = [letter for letter, end in ends.items() if end == best]
    return first[0] if len(first) == 1 else None


def _released(reply: str, options: Mapping[str, str]) -> str | None:
    for mark in _ENDS:
        reply = reply.strip(mark)
    reply = f" {reply} "
    for shape in ("({})", " {} "):
        places = {letter: reply.rfind(shape.format(letter)) for letter in options}
        named = {letter: place for letter, place in places.items() if place >= 0}
        if named:
            return max(named, key=lambda letter: named[letter])
    if len(reply.split()) <= 5:
        return None
    low = reply.lower()
    places = {letter: low.rfind(option.lower()) for letter, option in options.items()}
    named = {letter: place for letter, place in places.items() if place >= 0}
    return max(named, key=lambda letter: named[letter]) if named else None


def first_letter(reply: str, options: Mapping[str, str]) -> str | None:
    """The released rule of MMBench and the like: the first character if it is a letter of an option, else the first
    option whose text stands in the reply, else None (there: an empty answer). Never raises.
    """
    reply = reply.strip()
    if reply[:1] in options:
        return reply[:1]
    return next((letter for letter, text in options.items() if text and text in reply), None)
