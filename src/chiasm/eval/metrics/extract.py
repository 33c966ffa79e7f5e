r"""Finding the final answer in a long reply: ``\boxed{…}``, "Final answer:", "Answer:", a letter alone on the last
line.

Source: fact sheet InternVL 2.5, section 5 (chain-of-thought prompts and their extraction). The released expression
``(Final answer:|Answer:)\s*(.*)`` takes the *first* marker and the rest of its line; a chain of thought that mentions
"Answer:" on its way then gives the wrong text. Here the last marker counts, a box before a marker, and an answer that
begins on the line after its marker is found; ``mode="original"`` is the released rule.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from chiasm.errors import ConfigError

__all__ = ["EXTRACT_VERSION", "Extracted", "Mode", "checked_mode", "final_answer"]

#: Raised whenever ``final_answer`` would find another text.
EXTRACT_VERSION = 1

Mode = Literal["chiasm", "original"]

# "The answer is: 4", "**Final Answer:** 4", "### Answer\n4" are all in use; a colon is asked for unless "is" stands
# there.
_MARKER = re.compile(
    r"(?:final\s+answer|answer)\s*+(?:(?:\*\*|__)\s*+)?(?::|：|\bis\b\s*:?)\s*(?:\*\*|__)?[ \t]*"
    r"|(?:最终)?答案\s*[:：是]\s*",
    re.IGNORECASE,
)
_HEADING = re.compile(r"^[ \t]*+#{1,6}\s*(?:final\s+)?answer\s*$", re.IGNORECASE | re.MULTILINE)
_ORIGINAL = re.compile(r"(Final answer:|Answer:)\s*(.*)", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"(?<!\\)[{}]")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"[\s*_(\[]*([A-Za-z])[\s*_)\].:]*")


@dataclass(frozen=True, slots=True)
class Extracted:
    """A piece of a reply. `how` is "boxed", "marker", "letter" (a last line) or "whole" (nothing was found)."""

    text: str
    how: Literal["boxed", "marker", "letter", "whole"]

    @property
    def marked(self) -> bool:
        """Whether the reply itself says that this is its answer."""
        return self.how != "whole"


def checked_mode(mode: str) -> Mode:
    """The mode, or ConfigError."""
    if mode not in get_args(Mode):
        raise ConfigError(f"mode {mode!r} is unknown: use {' or '.join(get_args(Mode))}")
    return mode  # type: ignore[return-value]


def final_answer(text: str, *, mode: Mode = "chiasm") -> Extracted:
    """Find the answer that a reply declares; the whole reply, stripped, where it declares none. Never raises."""
    if mode == "original":
        found = _ORIGINAL.search(text)
        return Extracted(found[2].strip(), "marker") if found else Extracted(text, "whole")
    boxed = _last_boxed(text)
    if boxed is not None:
        return Extracted(boxed, "boxed")
    marks = [match.end() for match in _MARKER.finditer(text)]
    marks += [match.end() for match in _HEADING.finditer(text)]
    if marks:
        answer = _first_line(text[max(marks) :])
        if answer:
            return Extracted(answer, "marker")
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        alone = _LETTER.fullmatch(lines[-1])
        if alone:
            return Extracted(alone[1].upper(), "letter")
    return Extracted(text.strip(), "whole")


def _first_line(text: str) -> str:
    """The first line that says something, without emphasis marks around it."""
    for line in text.splitlines():
        bare = line.strip().strip("*_`$ ").strip()
        if bare:
            return bare
    return ""


def _last_boxed(text: str) -> str | None:
    r"""What the last closed \\boxed holds, braces balanced; one pass, however many are opened and never closed."""
    opened = {match.end() for match in _BOXED.finditer(text)}
    if not opened:
        return None
    begun: list[int] = []
    closed: list[tuple[int, int]] = []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            begun.append(brace.end())
        elif begun and (begin := begun.pop()) in opened:
            closed.append((begin, brace.start()))
    for begin, end in sorted(closed, reverse=True):
        inner = _TEXT.sub(r"\1", text[begin:end]).strip().strip("$").strip()
        if inner:
            return inner
    return None
