"""One JSON array as a whole file (LLaVA's layout): where each element lies, without parsing it.

The file is read once, in blocks, and looked at as bytes: an element ends at a comma or a closing bracket that is
outside strings and one level deep. NumPy looks at a block at once; ``index_array_slowly`` is the obvious twin that
goes byte by byte. A file that is cut off keeps all elements but the last one readable.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from chiasm.data.formats.files import Arrays, File, Indexed
from chiasm.data.formats.lines import parse_json
from chiasm.errors import DataError

__all__ = ["JsonArray", "index_array", "index_array_slowly"]

BLOCK = 1 << 18
FIRST = 1 << 20
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_QUOTE, _BACKSLASH, _COMMA = ord('"'), ord("\\"), ord(",")

_LOOK = np.zeros(256, bool)
_LOOK[list(b'"\\,[]{}')] = True
_DEEPER = np.zeros(256, np.int64)
_DEEPER[list(b"[{")] = 1
_DEEPER[list(b"]}")] = -1


class JsonArray(Indexed):
    """The elements of one JSON array."""

    kind, empty = "array", "is an empty array"

    def _build(self) -> Arrays:
        return index_array(self.file)

    def where(self, index: int) -> str:
        """``llava.json[16]``: the element, counted from 0 as in a JSON path."""
        return f"{self.label}[{index}]"

    def row(self, index: int) -> Any:
        """The parsed element.

        Raises:
            DataError: it is no JSON.
        """
        start, end = int(self.index["starts"][index]), int(self.index["ends"][index])
        return parse_json(self.file.read(start, end), lambda: self.where(index))

    def first(self) -> Any | None:
        """The first element, without an index; None where it cannot be parsed or is longer than `FIRST` bytes."""
        begin = _begin(self.file)
        text = self.file.read(begin, begin + FIRST).lstrip(_SPACE).decode("utf-8", "replace")
        try:
            return json.JSONDecoder().raw_decode(text)[0]
        except (ValueError, RecursionError):
            return None


def _begin(file: File) -> int:
    """The byte behind the opening bracket."""
    at = len(_BOM) if file.read(0, 3) == _BOM else 0
    while at < file.size:
        data = file.read(at, at + 4096)
        left = data.lstrip(_SPACE)
        if left:
            if left[:1] != b"[":
                raise DataError(
                    f"{file.path}: does not begin with [; a JSON array is one [...] with all rows in it"
                )
            return at + len(data) - len(left) + 1
        at += len(data)
    raise DataError(f"{file.path}: holds only white space; write it again")


def _spans(file: File, begin: int, cuts: np.ndarray, end: int | None) -> Arrays:
    """Elements between the cuts (positions of commas at depth one); `end`: of the closing bracket, None if cut off."""
    last = file.size if end is None else end
    starts = np.concatenate([[begin], cuts + 1]).astype(np.int64)
    ends = np.concatenate([cuts, [last]]).astype(np.int64)
    # Nothing between the last comma (or the opening bracket) and the end is no element, unless it is a stray comma.
    if not file.read(int(starts[-1]), last).strip(_SPACE) and (len(cuts) == 0 or end is None):
        starts, ends = starts[:-1], ends[:-1]
    if end is not None:
        at = end + 1
        while at < file.size:
            data = file.read(at, at + BLOCK)
            if data.strip(_SPACE):
                raise DataError(
                    f"{file.path}: has text behind the end of its array (byte {end + 1}): keep one array, or one "
                    'object a line; a conversation a line is written {"messages": [...]}'
                )
            at += len(data)
    return {"starts": starts, "ends": ends}


def index_array(file: File) -> Arrays:
    """Find the elements of the one array that a file holds.

    Returns:
        ``starts``, ``ends``: (elements,) int64, the bytes of each, possibly with white space around it.

    Raises:
        DataError: it does not begin with an array, or something follows the array.
    """
    begin = at = _begin(file)
    depth, inside, escaped = 1, 0, 0  # inside: 1 within a string; escaped: 1 if the next byte is
    found: list[np.ndarray] = []
    while at < file.size:
        block = np.frombuffer(file.read(at, min(at + BLOCK, file.size)), np.uint8)
        if not len(block):
            raise DataError(f"{file.path}: became shorter while it was read; open the data set again")
        where = np.flatnonzero(_LOOK[block])
        what = block[where]
        slash = what == _BACKSLASH
        quote = what == _QUOTE
        if slash.any() or escaped:
            run, escaped_after = _escapes(where, slash, len(block), escaped)
            quote &= ~run
        else:
            escaped_after = 0
        strings = np.cumsum(quote) + inside
        outside = (
            strings & 1
        ) == 0  # a closing quote counts as outside, and is nothing that is looked for below
        steps = np.where(outside, _DEEPER[what], 0)
        depths = np.cumsum(steps) + depth
        ended = np.flatnonzero(depths == 0)
        commas = (what == _COMMA) & outside & (depths == 1)
        if len(ended):
            commas[ended[0] :] = False
        found.append(where[commas].astype(np.int64) + at)
        if len(ended):
            return _spans(file, begin, np.concatenate(found), int(where[ended[0]]) + at)
        if len(what):
            depth, inside = int(depths[-1]), int(strings[-1]) & 1
        escaped = escaped_after
        at += len(block)
    return _spans(file, begin, np.concatenate(found) if found else np.zeros(0, np.int64), None)


def _escapes(where: np.ndarray, slash: np.ndarray, size: int, escaped: int) -> tuple[np.ndarray, int]:
    """Which of the looked-at bytes follow an odd number of backslashes, and whether the next block's first one does.

    Args:
        where: (K,) positions in the block, ascending.
        slash: (K,) which of them are backslashes.
        size: of the block.
        escaped: 1 if the bytes before the block end with an odd number of backslashes.
    """
    if not len(where):
        return np.zeros(0, bool), 0
    previous = np.concatenate([[-2], where[:-1]])
    behind_slash = np.concatenate([[False], slash[:-1]]) & (previous == where - 1)
    opens = slash & ~behind_slash
    # A run that begins the block continues the one before it: as if it had begun one byte earlier.
    begins = np.where(where == 0, -escaped, where)
    run_start = np.maximum.accumulate(np.where(opens, begins, -(1 << 62)))
    before = np.concatenate([[0], run_start[:-1]])
    odd = behind_slash & (((where - before) & 1) == 1)
    if escaped and len(where) and where[0] == 0 and not slash[0]:
        odd[0] = True
    after = int(len(where) > 0 and slash[-1] and where[-1] == size - 1 and (size - int(run_start[-1])) & 1)
    return odd, after


def index_array_slowly(file: File) -> Arrays:
    """`index_array`, one byte after the other: what the tests compare it with."""
    begin = _begin(file)
    data = file.read(begin, file.size)
    depth, inside, skip = 1, False, False
    cuts: list[int] = []
    for n, byte in enumerate(data):
        if skip:
            skip = False
        elif byte == _BACKSLASH:
            skip = True
        elif byte == _QUOTE:
            inside = not inside
        elif inside:
            continue
        elif byte in b"[{":
            depth += 1
        elif byte in b"]}":
            depth -= 1
            if depth == 0:
                return _spans(file, begin, np.array(cuts, np.int64), begin + n)
        elif byte == _COMMA and depth == 1:
            cuts.append(begin + n)
    return _spans(file, begin, np.array(cuts, np.int64), None)
