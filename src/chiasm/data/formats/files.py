"""What all readers of sample files share: reading at an offset from several threads, and indexes that are kept.

``File`` reads with ``pread``, which has no position that threads could move under each other. A pool keeps few files
open, however many shards there are. ``keep_index`` builds an index once and, where the user names a folder, reads it
from there the next time, as long as size and time of the file are those it was built for. ``Indexed`` is a file that
has one.
Source: design of this package (no paper).
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from chiasm.errors import DataError

__all__ = ["Arrays", "File", "Indexed", "Source", "head", "keep_index", "stamp"]

Arrays = dict[str, np.ndarray]
"""An index: arrays of numbers by name."""

OPEN_FILES = 64
"""Most files that stay open at once."""

_VERSION = 1
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


class Source(Protocol):
    """One file of rows, read by index."""

    def __len__(self) -> int:
        """Number of rows; builds the index where there is none yet."""
        ...

    def where(self, index: int) -> str:
        """The place of a row, as errors name it."""
        ...

    def row(self, index: int) -> Any:
        """The parsed row; what the file keeps beside it (pictures of a shard) is in its field ``images``."""
        ...


class _Handle:
    """A file descriptor that closes itself when the last thread that reads from it lets go."""

    __slots__ = ("number",)

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        number = getattr(self, "number", None)
        if number is not None:
            os.close(number)


_pool: OrderedDict[Path, _Handle] = OrderedDict()
_pool_lock = threading.Lock()


def _handle(path: Path, expected: tuple[int, int]) -> _Handle:
    with _pool_lock:
        handle = _pool.get(path)
        if handle is not None:
            _pool.move_to_end(path)
    if handle is not None and _stamp_of(handle) == expected:
        return handle
    handle = _Handle(path)  # also where another file has taken the place of the open one
    if _stamp_of(handle) != expected:
        raise DataError(f"{path}: has changed since it was opened; open the data set again")
    with _pool_lock:
        _pool[path] = handle
        _pool.move_to_end(path)
        while len(_pool) > OPEN_FILES:
            _pool.popitem(last=False)
    return handle


def _stamp_of(handle: _Handle) -> tuple[int, int]:
    found = os.fstat(handle.number)
    return found.st_size, found.st_mtime_ns


def stamp(path: Path) -> tuple[int, int]:
    """(bytes, time of the last change in ns) of a regular file.

    Raises:
        DataError: no such file, a folder or a pipe, no permission, empty.
    """
    try:
        found = path.stat()
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or "cannot be read"
        raise DataError(f"{path}: {what}; check the path") from error
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path}: is no regular file; name a file or a glob of files")
    if not found.st_size:
        raise DataError(f"{path}: is empty (0 bytes); copy or write it again")
    return found.st_size, found.st_mtime_ns


def head(path: Path, count: int = 4096) -> bytes:
    """The first bytes of a file that can be read in place.

    Raises:
        DataError: as `stamp`; the file is compressed or UTF-16.
    """
    stamp(path)
    try:
        with path.open("rb") as file:
            data = file.read(count)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or 'cannot be read'}; check the path") from error
    for magic, (name, tool) in _COMPRESSED.items():
        if data.startswith(magic):
            raise DataError(
                f"{path}: is compressed with {name}, and rows of it cannot be found in place; run {tool} on it"
            )
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: is UTF-16; save it as UTF-8")
    return data


class File:
    """A file of known size that may be read from several threads and may be pickled.

    Args:
        path: of a regular file that is not empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamp = stamp(path)

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.stamp[0]

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`; fewer where the file ends before.

        Raises:
            DataError: the file is gone, or is not the one that was indexed.
        """
        try:
            number = _handle(self.path, self.stamp)
            pieces, at = [], start
            while at < end:
                piece = os.pread(number.number, end - at, at)
                if not piece:
                    break
                pieces.append(piece)
                at += len(piece)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or 'cannot be read'}; check the file") from error
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def keep_index(kind: str, file: File, cache: Path | None, build: Callable[[], Arrays]) -> Arrays:
    """The index of a file: read from the folder `cache` if it is there and fits, else built (and written there).

    Args:
        kind: what is indexed ("lines"); part of the key.
        file: with the size and time that the index must have been built for.
        cache: folder, made if it is missing; None: the index lives in memory alone.
        build: makes it.

    Raises:
        DataError: what `build` raises; the folder cannot be written.
    """
    if cache is None:
        return build()
    key = hashlib.blake2b(f"{kind} {file.path.absolute()}".encode(), digest_size=12).hexdigest()
    target = cache / f"{file.path.name[:80]}.{key}.npz"
    mark = np.array([_VERSION, *file.stamp], np.int64)
    try:
        with target.open("rb") as stored, np.load(stored, allow_pickle=False) as kept:
            if np.array_equal(kept["stamp"], mark):
                return {name: kept[name] for name in kept.files if name != "stamp"}
    # A cache that is absent, cut off or of another version is built again.
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    arrays = build()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache, prefix=".index-", delete=False) as partial:
            np.savez(partial, allow_pickle=False, **{**arrays, "stamp": mark})
        os.replace(partial.name, target)
    except OSError as error:
        raise DataError(
            f"{cache}: the index cannot be kept here ({error.strerror}); name another folder"
        ) from error
    return arrays


class Indexed:
    """A file whose rows are found through an index that is built when it is first asked for.

    Args:
        path: the file.
        label: how errors name it.
        cache: folder in which the index is kept, or None.

    Raises:
        DataError: as `File`; from `index`, a file without rows.
    """

    kind: ClassVar[str]
    """Names the index in the cache."""
    empty: ClassVar[str]
    """What is said of a file without rows."""

    def __init__(self, path: Path, label: str, cache: Path | None = None) -> None:
        self.file, self.label, self.cache = File(path), label, cache
        self._index: Arrays | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def index(self) -> Arrays:
        """Where the rows are."""
        if self._index is None:
            with self._lock:
                if self._index is None:
                    index = keep_index(self.kind, self.file, self.cache, self._build)
                    if not self._rows(index):
                        raise DataError(f"{self.label}: {self.empty}; write it again")
                    self._index = index
        return self._index

    def __len__(self) -> int:
        return self._rows(self.index)

    def _build(self) -> Arrays:
        """The index, from the file."""
        raise NotImplementedError

    def _rows(self, index: Arrays) -> int:
        """How many rows an index names."""
        return len(index["starts"])
