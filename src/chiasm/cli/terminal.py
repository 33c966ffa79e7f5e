"""What the verbs have in common at the terminal: notes and errors on stderr, colours where a person reads them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["fail", "note", "notes_to_stderr", "one_line", "paint", "plain_text", "waiting"]

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def paint(text: str, *styles: str, stream: TextIO | None = None) -> str:
    """The text in colour where `stream` (default stdout) is a terminal and NO_COLOR is not set, else unchanged."""
    target = sys.stdout if stream is None else stream
    if not styles or not target.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{';'.join(_CODES[style] for style in styles)}m{text}\x1b[0m"


def one_line(text: str) -> str:
    """The text with line breaks and other white space as single blanks."""
    return " ".join(str(text).split())


def plain_text(text: str) -> str:
    """The text without control characters but newline and tab: an answer must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160))


def note(text: str) -> None:
    """Tell the user something beside the result, on stderr."""
    print(f"{paint('note:', 'cyan', stream=sys.stderr)} {one_line(text)}", file=sys.stderr, flush=True)


def fail(text: str) -> None:
    """Print the one line of an error on stderr."""
    # A file name may hold bytes that are no text; stderr escapes them by itself, a replaced stderr may not.
    safe = one_line(text).encode("utf-8", "backslashreplace").decode()
    print(f"{paint('error:', 'bold', 'red', stream=sys.stderr)} {safe}", file=sys.stderr, flush=True)


class _Notes(logging.Handler):
    """Log records as notes, on whatever stderr is when they come."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def notes_to_stderr() -> None:
    """Show the package's own warnings (first frame of an animation, rescaled values) as notes."""
    log = logging.getLogger("chiasm")
    if not any(isinstance(handler, _Notes) for handler in log.handlers):
        log.addHandler(_Notes(logging.WARNING))


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Say what is being waited for, on a terminal only; the line is wiped when it is over."""
    shown = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    if shown:
        print(paint(f"{text} …", "dim", stream=sys.stderr), end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
