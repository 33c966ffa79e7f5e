"""Parquet files: rows by number, one row group in memory at a time.

A row group is the smallest piece that can be read, so reading rows in random order costs a whole group each time. A
few groups are kept, and a note says so where groups are large; `chiasm data convert` writes small ones.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from chiasm.data.formats.files import head, stamp
from chiasm.errors import ChiasmError, DataError, missing_extra

__all__ = ["EXTRA", "GROUP_BYTES", "Groups", "ParquetRows"]

GROUP_BYTES = 64 << 20
"""Row groups above this are noted; the groups that stay in memory hold at most this together (one at least)."""

EXTRA = "extra_json"
"""Column in which `chiasm.data.write` keeps the fields of a row and of its turns that have no column."""

_log = logging.getLogger("chiasm.data")


class Groups:
    """The row groups that were read last, of all files of a data set."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()

    def get(self, path: Path, number: int) -> Any | None:
        """The table, if it is still here."""
        with self._lock:
            table = self._tables.get((path, number))
            if table is not None:
                self._tables.move_to_end((path, number))
            return table

    def put(self, path: Path, number: int, table: Any) -> None:
        """Keep a table and let the oldest go while all together are too large."""
        with self._lock:
            self._tables[path, number] = table
            while len(self._tables) > 1 and sum(t.nbytes for t in self._tables.values()) > GROUP_BYTES:
                self._tables.popitem(last=False)


class ParquetRows:
    """The rows of one parquet file; needs the extra ``data``.

    Args:
        path: the file.
        label: how errors name it.
        groups: where the groups that were read are kept; shared by the files of a data set.

    Raises:
        DataError: no file, empty, not parquet, damaged.
        MissingExtraError: pyarrow is not installed.
    """

    def __init__(self, path: Path, label: str, groups: Groups | None = None) -> None:
        self.path, self.label, self.groups = path, label, groups or Groups()
        if head(path, 4) != b"PAR1":
            raise DataError(
                f"{path}: is not parquet (its first bytes are others); check the file or its format"
            )
        self.stamp = stamp(path)
        self._lock = threading.Lock()
        try:
            with _parquet().ParquetFile(path) as file:
                groups_of = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
                self.ends = np.cumsum(np.array([group.num_rows for group in groups_of], np.int64))
                largest = max((group.total_byte_size for group in groups_of), default=0)
        except ChiasmError:
            raise
        except Exception as error:  # pyarrow's errors are its own and the operating system's
            raise DataError(f"{path}: is damaged or cut off ({_reason(error)}); copy it again") from error
        if not len(self.ends) or not self.ends[-1]:
            raise DataError(f"{label}: holds no rows; write it again")
        if largest > GROUP_BYTES:
            _log.warning(
                "%s: row groups of up to %d MiB; reading it in random order is slow, convert it to webdataset or jsonl",
                label,
                largest >> 20,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return int(self.ends[-1])

    def where(self, index: int) -> str:
        """``part-3.parquet row 5``: counted from 0, as tables count."""
        return f"{self.label} row {index}"

    def row(self, index: int) -> dict[str, Any]:
        """The row as Python data, without its nulls; pictures stay bytes or structs.

        Raises:
            DataError: the file is damaged there, or has changed.
        """
        number = int(np.searchsorted(self.ends, index, side="right"))
        first = int(self.ends[number - 1]) if number else 0
        found = self._group(number, index).slice(index - first, 1).to_pylist()[0]
        row = {key: _without_nulls(value) for key, value in found.items() if value is not None}
        return _unfold(row, self.where(index)) if EXTRA in row else row

    def _group(self, number: int, index: int) -> Any:
        with self._lock:  # threads that want the same group wait for one of them
            table = self.groups.get(self.path, number)
            if table is not None:
                return table
            if stamp(self.path) != self.stamp:
                raise DataError(f"{self.path}: has changed since it was opened; open the data set again")
            try:
                with _parquet().ParquetFile(self.path) as file:
                    table = file.read_row_group(number, use_threads=False)
            except Exception as error:
                raise DataError(
                    f"{self.where(index)}: its row group is damaged ({_reason(error)}); copy the file again"
                ) from error
            self.groups.put(self.path, number, table)
            return table


def _parquet() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "data") from error
    return parquet


def _without_nulls(value: Any) -> Any:
    """Structs without their null fields: a table cannot leave a field out."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _unfold(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Put the fields that `chiasm.data.write` folded into one column back where they were."""
    kept = dict(row)
    try:
        extra = json.loads(kept.pop(EXTRA))
        kept.update(extra.get("row", {}))
        for turn, fields in zip(kept.get("conversations", []), extra.get("turns", []), strict=False):
            turn.update(fields)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(
            f"{where}.{EXTRA} is not what `chiasm data convert` writes: {_reason(error)}"
        ) from error
    return kept


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
