"""Writing data sets in the public formats: each sample without loss, or one line that says why not.

A row is written only after it was read back in memory and says the same: roles, the text as a model reads it, its
pictures and videos at their places, and all fields beside. Where pictures are bytes and the format holds paths, they
are saved in a folder beside the file; where they are paths and the format holds pictures, the files are read in as
they are, never encoded again. A file appears whole or not at all.
Source: design of this package (no paper).

One thing is fixed by writing it out: several pictures of one turn without tags are introduced by ``Image-1: `` in rows
that hold tags, as the default template introduces them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from chiasm.data.datasets import FileDataset, Subset
from chiasm.data.formats.parquet import EXTRA
from chiasm.data.formats.rows import Kind, read_row
from chiasm.data.formats.shards import PICTURES
from chiasm.data.message import Part, Record, Turn, spell_turn, to_row
from chiasm.errors import ChiasmError, DataError, UsageError, missing_extra
from chiasm.media.fetch import is_url, load_bytes, short_name

__all__ = ["Layout", "Written", "encode", "write_dataset"]

Layout = Literal["internvl", "llava", "messages", "sharegpt", "parquet", "webdataset"]

GROUP_BYTES, GROUP_ROWS = 1 << 20, 500
"""A row group of parquet ends at either: small ones can be read in random order."""

_TOKEN = "\x00picture "
_SUFFIXES: dict[Layout, tuple[str, ...]] = {
    "internvl": (".jsonl",),
    "llava": (".json",),
    "messages": (".jsonl", ".json"),
    "sharegpt": (".jsonl", ".json"),
    "parquet": (".parquet",),
    "webdataset": (".tar", ""),
}
_MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"qoif": "qoi",
}


@dataclass(kw_only=True)
class Written:
    """What was written.

    Attributes:
        rows: samples that were written.
        dropped: place and reason of those that were left out.
        files: that hold the rows.
        pictures: that were saved or taken in.
        root: media root of the new files; None: they hold their pictures, or have none but by URL.
    """

    rows: int = 0
    dropped: list[tuple[str, str]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    pictures: int = 0
    root: str | None = None


def write_dataset(
    dataset: FileDataset | Subset,
    destination: str | Path,
    to: Layout,
    *,
    rows: Iterable[int] | None = None,
    drop: bool = False,
    force: bool = False,
    per_shard: int = 1000,
    on_progress: Callable[[int], None] | None = None,
) -> Written:
    """Write the samples of a data set.

    Args:
        dataset: what is read.
        destination: file to write; for webdataset a ``.tar`` file, or a folder of shards.
        to: format. ``.json`` is one array, ``.jsonl`` one row a line.
        rows: numbers of the samples; None: all.
        drop: leave out (and list) what is malformed or does not fit, instead of raising.
        force: replace what is at the destination.
        per_shard: samples of one shard of a folder.
        on_progress: told how many samples were read, after each.

    Raises:
        UsageError: the destination's ending does not fit the format, or it exists.
        DataError: a sample is malformed or does not fit, a picture cannot be read; nothing is written then.
        MissingExtraError: parquet without pyarrow.
    """
    destination = Path(destination)
    _check_target(destination, to, force)
    if per_shard < 1:
        raise UsageError(f"per_shard must be at least 1, got {per_shard}")
    done = Written()
    with _whole(destination, force) as partial:
        sink = _sink(to, destination, partial, dataset.root, per_shard, done)
        try:
            for number, index in enumerate(range(len(dataset)) if rows is None else rows, 1):
                where = dataset.where(index)
                try:
                    sink.add(dataset.unplaced(index), where)
                    done.rows += 1
                except DataError as error:
                    if not drop:
                        raise
                    done.dropped.append((where, str(error).removeprefix(where).lstrip(": .")))
                if on_progress is not None:
                    on_progress(number)
            if not done.rows:
                raise DataError(f"{destination}: no sample is left to write; see what was dropped")
        finally:
            sink.close()
    return done


# Rows ------------------------------------------------------------------------------------------------------------


def encode(record: Record, to: Layout, where: str) -> tuple[dict[str, Any], list[Any]]:
    """A record as a row of a format, checked by reading it back.

    Args:
        record: what to write.
        to: the format; parquet and webdataset hold InternVL rows, webdataset also messages.
        where: how errors name it.

    Returns:
        The row, with the token ``picture_token(n)`` in the place of picture n, and the pictures.

    Raises:
        DataError: the format cannot hold it.
    """
    plain, pictures = _tokenised(record)
    reason = ""
    for kind, attempt in _attempts(plain, to, where):
        try:
            row = attempt()
            back = read_row(row, kind, where)
            json.dumps(row)
        except DataError as error:
            reason = reason or str(error).removeprefix(where).lstrip(": .")
            continue
        except (TypeError, ValueError, RecursionError) as error:
            reason = reason or f"a field is no JSON ({error})"
            continue
        if _same(plain, back):
            return row, pictures
    reason = reason or "its fields or the places of its pictures would read otherwise"
    raise DataError(f"{where}: cannot be written as {to} without loss: {reason}")


def picture_token(number: int) -> str:
    """What stands for a picture in a row of `encode`."""
    return f"{_TOKEN}{number}"


def _attempts(record: Record, to: Layout, where: str) -> Iterator[tuple[Kind, Callable[[], dict[str, Any]]]]:
    """Ways to write a record, the best first."""
    if to == "messages":
        yield "messages", lambda: _messages(record, where, idiomatic=True)
        yield "messages", lambda: _messages(record, where, idiomatic=False)
        return
    for tagged in (True,) if record.tagged else (False, True):
        said = replace(record, tagged=tagged)
        if to == "sharegpt":
            yield "sharegpt", lambda said=said: _sharegpt(said, where)
        else:
            yield "internvl", lambda said=said: to_row(said, where=where)
    if to == "webdataset":
        yield "messages", lambda: _messages(record, where, idiomatic=False)


def _tokenised(record: Record) -> tuple[Record, list[Any]]:
    pictures: list[Any] = []

    def token(part: Part) -> Part:
        if part.kind != "image":
            return part
        pictures.append(part.value)
        return Part("image", picture_token(len(pictures) - 1))

    turns = tuple(replace(turn, parts=tuple(map(token, turn.parts))) for turn in record.turns)
    return replace(record, turns=turns), pictures


def _sharegpt(record: Record, where: str) -> dict[str, Any]:
    row = to_row(replace(record, listed=True), where=where)
    talk = row.pop("conversations")
    out: dict[str, Any] = {**row, "conversations": talk}
    if talk[0]["from"] == "system" and len(talk[0]) == 2 and talk[0]["value"]:
        out["system"] = talk[0]["value"]
        out["conversations"] = talk[1:]
    media = {part.kind for turn in record.turns for part in turn.parts}
    if "image" in media:
        out["images"] = out.pop("image")
    elif "video" in media:
        out["videos"] = [out.pop("video")]
    return out


def _messages(record: Record, where: str, *, idiomatic: bool) -> dict[str, Any]:
    talk: list[dict[str, Any]] = []
    for n, turn in enumerate(record.turns):
        pieces: list[str | Part] = [p.value if p.kind == "text" else p for p in turn.parts]
        media = [part for part in turn.parts if part.kind in ("image", "video")]
        if idiomatic and len(media) == 1 and turn.role == "user":
            # A picture's place instead of its tag: the newline behind it comes by itself.
            pieces = list(spell_turn(turn, where=f"{where}.turns[{n}]"))
            after = next((k + 1 for k, piece in enumerate(pieces) if isinstance(piece, Part)), len(pieces))
            if after < len(pieces) and isinstance(rest := pieces[after], str) and rest.startswith("\n"):
                pieces[after] = rest[1:]
        items = [_item(piece) for piece in pieces if piece != ""]
        texts = [piece for piece in pieces if isinstance(piece, str)]
        content: Any = items if len(texts) < len(pieces) else "".join(texts)
        talk.append({"role": turn.role, "content": content, **turn.extra})
    return {**record.extra, "messages": talk}


def _item(piece: str | Part) -> dict[str, Any]:
    if isinstance(piece, str):
        return {"type": "text", "text": piece}
    value = str(piece.value) if isinstance(piece.value, Path) else piece.value
    return {"type": piece.kind, piece.kind: value, **piece.sampling}


def _same(one: Record, other: Record) -> bool:
    """Whether two records say the same to a model and have the same fields."""
    if dict(one.extra) != dict(other.extra) or len(one.turns) != len(other.turns):
        return False
    for a, b in zip(one.turns, other.turns, strict=True):
        if a.role != b.role or dict(a.extra) != dict(b.extra):
            return False
    return _spelled(one.turns) == _spelled(other.turns)


def _spelled(turns: Sequence[Turn]) -> list[list[Any]]:
    """What a model reads of each turn: texts joined, other parts at their places."""
    out: list[list[Any]] = []
    before = 0
    for turn in turns:
        line: list[Any] = []
        for piece in spell_turn(turn, before=before):
            if isinstance(piece, Part):
                value = str(piece.value) if isinstance(piece.value, Path) else piece.value
                sampling = {k: list(v) if isinstance(v, tuple) else v for k, v in piece.sampling.items()}
                line.append((piece.kind, value, sampling))
            elif line and isinstance(line[-1], str):
                line[-1] += piece
            elif piece:
                line.append(piece)
        before += len(turn.of_kind("image"))
        out.append(line)
    return out


# Files -----------------------------------------------------------------------------------------------------------


class _Sink:
    """Where rows go: `add` writes one or raises a `DataError` without having written anything of it."""

    def add(self, record: Record, where: str) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class _Texts(_Sink):
    """JSON lines or one array; pictures that are bytes are saved beside."""

    def __init__(self, to: Layout, destination: Path, partial: Path, root: str, done: Written) -> None:
        self.to: Layout = to
        self.done, self.root = done, root
        self.array = destination.suffix.lower() == ".json"
        self.partial = partial / destination.name
        self.folder = f"{destination.stem}_images"
        self.images = partial / self.folder
        self.parent = destination.parent
        self.file = self.partial.open("w", encoding="utf-8", newline="\n")
        self.how = ""
        done.files = [destination]

    def add(self, record: Record, where: str) -> None:
        row, pictures = encode(record, self.to, where)
        names: list[str] = []
        saved: dict[str, bytes] = {}
        how = self.how
        for n, picture in enumerate(pictures):
            kind = "bytes" if isinstance(picture, bytes) else "url" if is_url(str(picture)) else "path"
            if kind != "url":
                if how not in ("", kind):
                    raise DataError(
                        f"{where}: has a picture as {kind}, others before were {how}: one media root "
                        "cannot hold both; write webdataset or parquet"
                    )
                how = kind
            name = str(picture)
            if isinstance(picture, bytes):
                name = f"{self.folder}/{self.done.rows:08d}-{n}.{_ending(picture, where)}"
                saved[name] = picture
            names.append(name)
        tokens = {picture_token(n): name for n, name in enumerate(names)}
        filled = _with_names(row, tokens)
        text = json.dumps(filled, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
            text = json.dumps(filled)
        for name, data in saved.items():
            self.images.mkdir(exist_ok=True)
            (self.images.parent / name).write_bytes(data)
        self.how = how
        self.done.pictures += len(saved)
        lead = ("[\n" if not self.done.rows else ",\n") if self.array else ""
        self.file.write(lead + text + ("" if self.array else "\n"))

    def close(self) -> None:
        if self.array:
            self.file.write("\n]\n")
        self.file.close()
        if self.how == "bytes":
            self.done.root = str(self.parent)
        elif self.how == "path":
            self.done.root = self.root


def _with_names(value: Any, names: dict[str, str]) -> Any:
    """The row with the pictures' names in the place of their tokens."""
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, list):
        return [_with_names(inner, names) for inner in value]
    if isinstance(value, dict):
        return {key: _with_names(inner, names) for key, inner in value.items()}
    return value


class _Parquet(_Sink):
    """One parquet file with small row groups."""

    def __init__(self, destination: Path, partial: Path, root: str, done: Written) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise missing_extra("pyarrow", "data") from error
        self.pa, self.root, self.done = pa, root, done
        self.schema = pa.schema(
            [
                ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
                ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
                ("video", pa.string()),
                (EXTRA, pa.string()),
            ]
        )
        self.writer = pq.ParquetWriter(partial / destination.name, self.schema, use_dictionary=False)
        self.rows: list[dict[str, Any]] = []
        self.bytes = 0
        done.files = [destination]

    def add(self, record: Record, where: str) -> None:
        row, pictures = encode(record, "parquet", where)
        images = [_taken(picture, self.root, where) for picture in pictures]
        talk = row.pop("conversations")
        if pictures:
            row.pop("image")
        film = any(part.kind == "video" for turn in record.turns for part in turn.parts)
        video = row.pop("video") if film else None
        extra: dict[str, Any] = {}
        if row:
            extra["row"] = row
        turns = [{key: turn[key] for key in turn if key not in ("from", "value")} for turn in talk]
        if any(turns):
            extra["turns"] = turns
        line = {
            "conversations": [{"from": turn["from"], "value": turn["value"]} for turn in talk],
            "images": images or None,
            "video": video,
            EXTRA: json.dumps(extra) if extra else None,
        }
        try:
            for turn in line["conversations"]:
                turn["value"].encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: holds half of a surrogate pair, which parquet cannot; repair the text"
            ) from error
        self.rows.append(line)
        self.done.pictures += len(images)
        self.bytes += sum(len(image["bytes"]) for image in images) + sum(len(turn["value"]) for turn in talk)
        if self.bytes >= GROUP_BYTES or len(self.rows) >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            self.writer.write_table(self.pa.Table.from_pylist(self.rows, schema=self.schema))
        self.rows, self.bytes = [], 0

    def close(self) -> None:
        try:
            self._flush()
        finally:
            self.writer.close()


class _Shards(_Sink):
    """One tar file, or a folder of them."""

    def __init__(self, destination: Path, partial: Path, root: str, per_shard: int, done: Written) -> None:
        self.single = destination.suffix.lower() == ".tar"
        self.folder = partial if self.single else partial / destination.name
        self.folder.mkdir(exist_ok=True)
        self.destination, self.root, self.done, self.per_shard = destination, root, done, per_shard
        self.tar: tarfile.TarFile | None = None

    def add(self, record: Record, where: str) -> None:
        row, pictures = encode(record, "webdataset", where)
        images = [_taken(picture, self.root, where)["bytes"] for picture in pictures]
        endings = [
            _ending(image, where, str(picture)) for image, picture in zip(images, pictures, strict=True)
        ]
        if "messages" in row:  # items without a source take the pictures in their order
            row = {**row, "messages": [_without_sources(message) for message in row["messages"]]}
        elif pictures:
            row = {key: value for key, value in row.items() if key != "image"}
        key = f"{self.done.rows:09d}"
        if self.tar is None or (not self.single and self.done.rows % self.per_shard == 0):
            self._next()
        for n, (ending, image) in enumerate(zip(endings, images, strict=True)):
            self._member(f"{key}.{ending}" if len(images) == 1 else f"{key}.{n}.{ending}", image)
        self._member(f"{key}.json", json.dumps(row).encode())
        self.done.pictures += len(images)

    def _next(self) -> None:
        if self.tar is not None:
            self.tar.close()
        name = self.destination.name if self.single else f"shard-{len(self.done.files):06d}.tar"
        self.done.files.append(self.destination if self.single else self.destination / name)
        self.tar = tarfile.open(self.folder / name, "w:", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def _member(self, name: str, data: bytes) -> None:
        assert self.tar is not None
        member = tarfile.TarInfo(name)  # without time and owner: the same samples give the same file
        member.size = len(data)
        self.tar.addfile(member, io.BytesIO(data))
        self.tar.members.clear()  # type: ignore[attr-defined]

    def close(self) -> None:
        if self.tar is not None:
            self.tar.close()


def _without_sources(message: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(message["content"], list):
        return message
    items = [{"type": "image"} if item["type"] == "image" else item for item in message["content"]]
    return {**message, "content": items}


def _taken(picture: Any, root: str, where: str) -> dict[str, Any]:
    """{"bytes", "path"} of a picture: its file as it is."""
    if isinstance(picture, bytes):
        return {"bytes": picture, "path": None}
    name = str(picture)
    try:
        if is_url(name):
            if name[:5].lower() != "data:":
                raise DataError(
                    f"{where}: {short_name(name)} is a URL: download it first, or write a format of paths"
                )
            return {"bytes": load_bytes(name), "path": None}
        return {"bytes": load_bytes(Path(root) / name), "path": name}
    except DataError:
        raise
    except ChiasmError as error:
        raise DataError(f"{where}: {error}") from error


def _ending(data: bytes, where: str, name: str = "") -> str:
    """The ending that a picture's first bytes ask for, else that of its name."""
    for magic, ending in _MAGIC.items():
        if data.startswith(magic):
            return ending
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    ending = Path(name).suffix[1:].lower() if len(name) < 4096 else ""
    if ending in PICTURES:
        return ending
    raise DataError(f"{where}: a picture is of no known format; save it as PNG or JPEG")


def _sink(to: Layout, destination: Path, partial: Path, root: str, per_shard: int, done: Written) -> _Sink:
    if to == "parquet":
        return _Parquet(destination, partial, root, done)
    if to == "webdataset":
        return _Shards(destination, partial, root, per_shard, done)
    return _Texts(to, destination, partial, root, done)


def _check_target(destination: Path, to: Layout, force: bool) -> None:
    if to not in get_args(Layout):
        raise UsageError(f"unknown format {to!r}: use one of {', '.join(get_args(Layout))}")
    if destination.suffix.lower() not in _SUFFIXES[to]:
        wanted = " or ".join(suffix or "no ending (a folder)" for suffix in _SUFFIXES[to])
        raise UsageError(f"{destination}: {to} is written to a name with {wanted}")
    if destination.exists() and not force:
        raise UsageError(f"{destination}: exists; choose another name, or --force")
    if destination.exists() and destination.is_dir() != (not destination.suffix):
        raise UsageError(
            f"{destination}: is {'a folder' if destination.is_dir() else 'a file'}; choose another name"
        )


@contextmanager
def _whole(destination: Path, force: bool) -> Iterator[Path]:
    """A folder beside the destination; what is in it moves into place if nothing was raised."""
    parent = destination.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=parent, prefix=f".{destination.name[:60]}-"))
    except OSError as error:
        raise DataError(f"{parent}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        yield partial
        # The rows last: once they are there, their pictures are.
        for path in sorted(partial.iterdir(), key=lambda path: path.name == destination.name):
            target = parent / path.name
            if target.is_dir():
                if not force:
                    raise UsageError(f"{target}: exists; move it away, or --force")
                old = partial / f"old-{path.name}"
                os.replace(target, old)
            os.replace(path, target)
    except OSError as error:
        raise DataError(
            f"{destination}: cannot be written ({error.strerror or error}); nothing was changed"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
