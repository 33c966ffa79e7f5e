"""JSON lines: one row a line, found by the byte where its line begins.

Blank lines are no rows but are counted, so that ``train.jsonl:17`` is line 17 of an editor. CRLF, a byte order mark and
a last line without newline are read. A line that is cut off is a row that raises when it is read; the others stay
readable.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from chiasm.data.formats.files import Arrays, File, Indexed
from chiasm.errors import DataError

__all__ = ["JsonLines", "index_lines", "parse_json"]

BLOCK = 4 << 20
FIRST = 1 << 20
_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n\x0b\x0c"


class JsonLines(Indexed):
    """The rows of one JSON-lines file."""

    kind, empty = "lines", "holds no rows"

    def _build(self) -> Arrays:
        return index_lines(self.file)

    def where(self, index: int) -> str:
        """``train.jsonl:17``: the number of the line, counted from 1 and with blank lines."""
        blanks = int(np.searchsorted(self.index["blanks"], index, side="right"))
        return f"{self.label}:{index + 1 + blanks}"

    def row(self, index: int) -> Any:
        """The parsed line.

        Raises:
            DataError: it is no JSON.
        """
        starts = self.index["starts"]
        end = int(starts[index + 1]) if index + 1 < len(starts) else self.file.size
        return parse_json(self.file.read(int(starts[index]), end), lambda: self.where(index))

    def first(self) -> Any | None:
        """The first row, without an index; None where it cannot be parsed or is longer than `FIRST` bytes."""
        data = self.file.read(0, FIRST).removeprefix(_BOM).lstrip(_BLANK)
        try:
            return json.loads(data.partition(b"\n")[0])
        except (ValueError, RecursionError):
            return None


def parse_json(data: bytes, where: Any) -> Any:
    """Parse one row; `where` is called for the place where it is none."""
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where()}: is not UTF-8 (byte {error.start} of the row): save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        text = data.decode("utf-8", "replace").strip()
        if not text:
            raise DataError(f"{where()}: is empty: write a row there, or remove the comma") from error
        cut = error.pos >= len(text) or error.msg.startswith("Unterminated")
        what = "is cut off" if cut else "is not JSON"
        place = f"character {min(error.pos + 1, len(text))} of {len(text)}"
        raise DataError(f"{where()}: {what} ({error.msg} at {place}): repair or remove the row") from error
    except RecursionError as error:
        raise DataError(f"{where()}: is nested too deeply to be a row; repair or remove it") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise DataError(f"{where()}: is not usable JSON ({error}): repair or remove the row") from error


def index_lines(file: File) -> Arrays:
    """Find the rows of a JSON-lines file.

    Returns:
        ``starts``: (rows,) int64, the byte where each row's line begins (after a byte order mark).
        ``blanks``: (blank lines,) int64, the number of rows before each blank line, ascending.
    """
    begin = len(_BOM) if file.read(0, 3) == _BOM else 0
    starts: list[np.ndarray] = []
    firsts: list[np.ndarray] = []
    pending, at = True, begin  # pending: the next byte begins a line
    while at < file.size:
        block = np.frombuffer(file.read(at, min(at + BLOCK, file.size)), np.uint8)
        if not len(block):
            raise DataError(f"{file.path}: became shorter while it was read; open the data set again")
        here = np.flatnonzero(block == 10) + 1
        if pending:
            here = np.concatenate([[0], here])
        pending = bool(block[-1] == 10)
        if pending:
            here = here[:-1]
        starts.append(here.astype(np.int64) + at)
        firsts.append(block[here])
        at += len(block)
    if not starts:
        return {"starts": np.zeros(0, np.int64), "blanks": np.zeros(0, np.int64)}
    lines, first = np.concatenate(starts), np.concatenate(firsts)
    blank = first == 10
    # Few lines begin with white space and are not just a newline: look at each.
    for n in np.flatnonzero(np.isin(first, list(_BLANK)) & ~blank):
        blank[n] = _is_blank(file, int(lines[n]), int(lines[n + 1]) if n + 1 < len(lines) else file.size)
    before = np.cumsum(~blank)
    return {"starts": lines[~blank], "blanks": before[blank].astype(np.int64)}


def _is_blank(file: File, start: int, end: int) -> bool:
    pieces = range(start, end, 256)
    return all(not file.read(at, min(at + 256, end)).strip(_BLANK) for at in pieces)
