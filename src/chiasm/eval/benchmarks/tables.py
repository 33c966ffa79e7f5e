"""Benchmarks in one file: VLMEvalKit's TSV, NExT-QA's CSV, JSONL, JSON, parquet.

- TSV: first row names the columns; "image" holds base64, a list of base64 texts, or (64 characters at most) the
index of
  the row that holds the picture; "image_path" a path or list. Pictures are not kept in memory: an item knows the
  bytes of the file where its row stands, and reads them again when it is asked.
- CSV: the same with commas.
- JSONL: one object a line. JSON: an array of objects, {"questions": […]}, {id: object}, PerceptionTest's {video:
  {"mc_question": […]}}, or COCO's {"images": […], "annotations": […]}, where the captions of a picture are its answers.
- Parquet (extra ``data``): MMMU's and MathVista's columns.

Everything wrong is a DataError with file and line (or row).
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chiasm.errors import DataError, missing_extra
from chiasm.eval.benchmarks.items import Item, Source, Stored
from chiasm.eval.benchmarks.records import from_record, parse_list

__all__ = ["json_lines", "load_json", "read_json", "read_jsonl", "read_parquet", "read_tsv"]

#: Longest cell of a TSV in characters: a picture of about 190 MB.
_LONGEST = 1 << 28
_REFERENCE = 64  # cells of "image" that are shorter name a row


# --- TSV ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    where: str
    first: int  # bytes of the file
    last: int
    cells: dict[str, str]


def read_tsv(path: Path, *, root: Path | None = None, prefer: Sequence[str] = ()) -> Iterator[Item]:
    """Items of a VLMEvalKit table, in order; nothing is read behind the last item that is taken.

    Raises:
        DataError: not UTF-8, a row with another number of columns, a row without question and picture.
    """
    spans: dict[str, _Row] = {}
    rows = _tsv_rows(path)
    late = _Late(rows, spans)
    for row in late:
        cells = row.cells
        images = _tsv_images(row, path, late)
        bare = {name: value for name, value in cells.items() if name != "image"}
        yield from_record(
            bare, where=row.where, key=row.where.rpartition(":")[2], root=root, prefer=prefer, images=images
        )


class _Late:
    """Rows one by one; when a row refers to a later one, those between are read ahead and kept without their cells."""

    def __init__(self, rows: Iterator[_Row], spans: dict[str, _Row]) -> None:
        self._rows, self._spans, self._ahead = rows, spans, [0]
        self._queue: list[_Row] = []

    def __iter__(self) -> Iterator[_Row]:
        while True:
            row = self._queue.pop(0) if self._queue else next(self._rows, None)
            if row is None:
                return
            self._note(row)
            yield row

    def _note(self, row: _Row) -> None:
        index = row.cells.get("index")
        if index:
            self._spans[index] = _Row(row.where, row.first, row.last, {})

    def find(self, index: str) -> _Row | None:
        """The row of an index, wherever it stands."""
        while index not in self._spans:
            row = next(self._rows, None)
            if row is None:
                return None
            self._queue.append(row)
            self._note(row)
        return self._spans[index]


def _tsv_images(row: _Row, path: Path, rows: _Late) -> list[Source] | None:
    """Pictures that a row holds or refers to; None where it names paths instead."""
    cell = row.cells.get("image", "")
    if not cell:
        return None
    target = row
    for _ in range(2):  # a reference to a reference is a mistake
        if len(cell) > _REFERENCE or (not cell.isdigit() and parse_list(cell) is not None):
            break
        found = rows.find(cell)
        if found is None or found is target:
            raise DataError(f"{row.where}.image is {cell!r}, which is no picture and no index of a row")
        target, cell = found, _cell(path, found, "image")
    if len(cell) <= _REFERENCE and parse_list(cell) is None:
        raise DataError(f"{row.where}.image refers to {target.where}, which holds no picture: {cell!r}")
    listed = parse_list(cell) if cell.startswith("[") else None
    count = 1 if listed is None else len(listed)
    digest = hashlib.blake2b(cell.encode(), digest_size=12).hexdigest()

    def stored(n: int) -> Stored:
        place = target

        def load() -> bytes:
            text = _cell(path, place, "image")
            parts = parse_list(text) if text.startswith("[") else [text]
            return _decode((parts or [""])[n], place.where)

        return Stored(load, f"{digest}-{n}" if count > 1 else digest)

    return [stored(n) for n in range(count)]


def _decode(text: Any, where: str) -> bytes:
    try:
        raw = base64.b64decode("".join(str(text).split()), validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"{where}.image is not base64: the table is damaged") from None
    if not raw:
        raise DataError(f"{where}.image is empty: the table is damaged")
    return raw


def _mark(path: Path) -> str:
    """What stands between the cells of a table."""
    return "," if path.suffix.lower() == ".csv" else "\t"


def _cell(path: Path, row: _Row, column: str) -> str:
    """One cell of a row, read again from the file."""
    header = next(_tsv_records(path))[2]
    with path.open("rb") as file:
        file.seek(row.first)
        raw = file.read(row.last - row.first)
    cells = next(_records([raw.decode("utf-8")], row.where, _mark(path)))
    return cells[header.index(column)]


def _tsv_rows(path: Path) -> Iterator[_Row]:
    header: list[str] | None = None
    for line, span, cells in _tsv_records(path):
        if header is None:
            header = cells
            if len(set(header)) != len(header) or not any(
                name in header for name in ("question", "image", "text")
            ):
                raise DataError(
                    f"{path.name}:1 is no header of a benchmark: it names neither question nor image"
                )
            continue
        if len(cells) != len(header):
            raise DataError(f"{path.name}:{line} has {len(cells)} columns where the header has {len(header)}")
        yield _Row(f"{path.name}:{line}", span[0], span[1], dict(zip(header, cells, strict=True)))
    if header is None:
        raise DataError(f"{path.name} is empty: it has no header")


def _tsv_records(path: Path) -> Iterator[tuple[int, tuple[int, int], list[str]]]:
    """(line of its beginning, bytes of the file, cells) of each record; quoted cells may hold line breaks."""
    place = [0, 0]  # bytes and lines read so far

    def lines() -> Iterator[str]:
        with path.open("rb") as file:
            for raw in file:
                place[0] += len(raw)
                place[1] += 1
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path.name}:{place[1]} is not UTF-8 text (byte {error.start} of the line)"
                    ) from None
                yield text.removeprefix("\ufeff") if place[1] == 1 else text

    first, line = 0, 1
    for cells in _records(lines(), path.name, _mark(path)):
        if cells:
            yield line, (first, place[0]), cells
        first, line = place[0], place[1] + 1


def _records(lines: Any, where: str, mark: str = "\t") -> Iterator[list[str]]:
    """Cells of each record. The csv module's limit on cells belongs to the process: it is lifted for each step only."""
    reader = csv.reader(iter(lines), delimiter=mark, strict=True)
    while True:
        before = csv.field_size_limit(_LONGEST)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{where}:{reader.line_num} is no row of a table ({error})") from None
        finally:
            csv.field_size_limit(before)
        if cells is None:
            return
        yield cells


# --- JSON ---------------------------------------------------------------------------------------------------------


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """("file.jsonl:17", value) of every line that is not blank.

    Raises:
        DataError: not UTF-8 or not JSON, with file and line.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                yield where, json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{where} is not UTF-8 text (byte {error.start} of the line)") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON: {_why(error)}") from None


def read_jsonl(
    path: Path, *, root: Path | None = None, prefer: Sequence[str] = (), category: str = ""
) -> Iterator[Item]:
    """Items of a file with one object a line."""
    for where, record in json_lines(path):
        key = where.rpartition(":")[2]
        yield from_record(record, where=where, key=key, root=root, prefer=prefer, category=category)


def load_json(path: Path) -> Any:
    """A whole JSON file; DataError with file and line."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path.name}:{error.lineno} is not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name} is not JSON: {_why(error)}") from None


def read_json(
    path: Path, *, root: Path | None = None, prefer: Sequence[str] = (), category: str = ""
) -> Iterator[Item]:
    """Items of a JSON file; see the module's first lines for its forms."""
    whole = load_json(path)
    if isinstance(whole, Mapping) and isinstance(whole.get("images"), list):
        yield from _coco(whole, path, root)
        return
    if isinstance(whole, Mapping):
        listed = next(
            (
                whole[name]
                for name in ("questions", "data", "annotations")
                if isinstance(whole.get(name), list)
            ),
            None,
        )
        pairs = (
            [(f"{path.name}[{n}]", str(n), record) for n, record in enumerate(listed)]
            if listed is not None
            else list(_by_key(whole, path.name))
        )
    elif isinstance(whole, list):
        pairs = [(f"{path.name}[{n}]", str(n), record) for n, record in enumerate(whole)]
    else:
        raise DataError(f"{path.name} must hold a list or an object, not {type(whole).__name__}")
    for where, key, record in pairs:
        yield from_record(record, where=where, key=key, root=root, prefer=prefer, category=category)


def _by_key(whole: Mapping[str, Any], name: str) -> Iterator[tuple[str, str, Any]]:
    """{id: object}; of PerceptionTest each question of a video."""
    for key, record in whole.items():
        listed = record.get("mc_question") if isinstance(record, Mapping) else None
        if not isinstance(listed, list):
            yield f"{name}[{key!r}]", str(key), record
            continue
        for n, question in enumerate(listed):
            where = f"{name}[{key!r}].mc_question[{n}]"
            if not isinstance(question, Mapping):
                raise DataError(f"{where} must be an object, not {type(question).__name__}")
            yield where, f"{key}_{n}", {"video_name": str(key), **question}


def _coco(whole: Mapping[str, Any], path: Path, root: Path | None) -> Iterator[Item]:
    """Captions: a picture is an item, its captions are its answers."""
    captions: dict[Any, list[str]] = {}
    for n, entry in enumerate(whole.get("annotations") or []):
        if (
            not isinstance(entry, Mapping)
            or not isinstance(entry.get("caption"), str)
            or "image_id" not in entry
        ):
            raise DataError(f"{path.name}.annotations[{n}] must be an object with image_id and caption")
        captions.setdefault(str(entry["image_id"]), []).append(entry["caption"])
    for n, entry in enumerate(whole["images"]):
        where = f"{path.name}.images[{n}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("file_name"), str) or "id" not in entry:
            raise DataError(f"{where} must be an object with id and file_name")
        file = Path(entry["file_name"])
        source = str(file if root is None or file.is_absolute() else root / file)
        key = str(entry["id"])
        yield Item(
            key=key,
            where=where,
            question="",
            images=(source,),
            answers=tuple(captions.get(key, ())),
            group=source,
        )


def _why(error: Exception) -> str:
    return (
        error.msg
        if isinstance(error, json.JSONDecodeError)
        else "nested too deeply"
        if isinstance(error, RecursionError)
        else str(error)
    )


# --- parquet ------------------------------------------------------------------------------------------------------


def read_parquet(
    path: Path, *, root: Path | None = None, prefer: Sequence[str] = (), category: str = ""
) -> Iterator[Item]:
    """Items of a parquet file, row group by row group; pictures are kept encoded.

    Raises:
        MissingExtraError: pyarrow is not installed.
        DataError: the file cannot be read, or a row is malformed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise missing_extra("pyarrow", "data") from error
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=64):
                for record in batch.to_pylist():
                    where = f"{path.name} row {number}"
                    yield from_record(
                        record, where=where, key=str(number), root=root, prefer=prefer, category=category
                    )
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path.name} cannot be read as parquet ({str(error).splitlines()[0][:120]})"
        ) from error
