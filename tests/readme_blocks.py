"""Find the runnable code blocks of a Markdown page.

A block is a fence whose info string begins with ``python``, ``bash``, ``sh``, ``shell`` or ``console``. In a
``console`` block the lines that begin with ``$ `` are the commands, and the rest is what they print. The
comment ``<!-- no-test: reason -->`` above a fence, blank lines between, excludes it; the reason is required.
"""

import re
from dataclasses import dataclass

LANGUAGES = {"python": "python", "bash": "bash", "sh": "bash", "shell": "bash", "console": "bash"}
FENCE = re.compile(r"^(?P<indent> {0,3})(?P<fence>`{3,}|~{3,})\s*(?P<info>[^`]*)$")
EXCLUDED = re.compile(r"<!--\s*no-test:\s*(?P<reason>.*?)\s*-->\s*$")
# Blocks that install or build run for minutes.
INSTALLS = re.compile(r"(?:^|[\s;&(])(?:make\s+\w|make$|(?:\S*pip3?|uv)\s+install)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One runnable block: ``language`` is "python" or "bash", ``line`` the number of its fence from 1."""

    language: str
    code: str
    line: int

    @property
    def installs(self) -> bool:
        """Whether the block builds or installs, which takes minutes."""
        return self.language == "bash" and INSTALLS.search(self.code) is not None


def commands(transcript: str) -> str:
    """Return the commands of a console transcript: lines after ``$ ``, with ``> `` lines continuing them."""
    kept: list[str] = []
    for line in transcript.splitlines():
        continues = line.startswith("> ") and kept and kept[-1].endswith("\\")
        if line.startswith("$ ") or continues:
            kept.append(line[2:])
    return "\n".join(kept)


def blocks(markdown: str) -> list[Block]:
    """Return the runnable blocks of a page in order."""
    found: list[Block] = []
    lines = markdown.splitlines()
    above = ""  # the last line with text before the fence
    number = 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        if opening is None:
            above = lines[number].strip() or above
            number += 1
            continue
        start, fence = number + 1, opening["fence"]
        closing = re.compile(rf"^ {{0,3}}{re.escape(fence[0])}{{{len(fence)},}}\s*$")
        number = start
        while number < len(lines) and not closing.match(lines[number]):
            number += 1
        if number == len(lines):
            raise ValueError(f"line {start}: this code fence is never closed")
        body = "\n".join(line.removeprefix(opening["indent"]) for line in lines[start:number])
        word = opening["info"].replace("{", " ").split()[:1]
        language = LANGUAGES.get(word[0].lower()) if word else None
        excluded = EXCLUDED.search(above)
        if excluded and not excluded["reason"]:
            raise ValueError(f"line {start}: no-test needs a reason")
        if language and not excluded:
            code = commands(body) if word[0].lower() == "console" or body.startswith("$ ") else body
            found.append(Block(language=language, code=code, line=start))
        above = ""
        number += 1
    return found
