"""Items: a question of a benchmark with its pictures, answers and options, whatever file it was read from.

Pictures are sources that are opened when they are asked about: paths, encoded bytes, or ``Stored`` ones that lie in a
larger file. ``data_hash`` covers what was asked: questions, answers, options and the bytes of pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chiasm.errors import DataError, UsageError

__all__ = ["Item", "Source", "Stored", "checked_items", "data_hash", "read_source"]


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A picture inside a larger file. `load` gives its encoded bytes; `key` tells it from others."""

    load: Callable[[], bytes]
    key: str


Source = str | Path | bytes | Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question.

    Attributes:
        key: its id, unique in a file.
        where: "test.jsonl:17", for errors.
        question: text; may be empty where the picture holds it.
        answers: accepted ones; empty where the file keeps them secret.
        images: pictures in order.
        video: a path; `clip` (start, end) in seconds of it.
        subtitles: path of the video's subtitle file; benches that show none leave it alone.
        options: letter -> text; empty for open questions.
        letter: of the right option, "" where unknown.
        hint: context that is shown before the question.
        category: task or subject.
        group: which picture it is about, for clustered errors.
        facts: what single metrics need (bbox, width, height, answer_type, precision, set and figure ids).
    """

    key: str
    where: str
    question: str
    answers: tuple[str, ...] = ()
    images: tuple[Source, ...] = ()
    video: str | None = None
    clip: tuple[float, float] | None = None
    subtitles: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    letter: str = ""
    hint: str = ""
    category: str = ""
    group: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def read_source(source: Source, where: str) -> str | Path | bytes:
    """A picture as `open_image` takes it.

    Raises:
        DataError: a stored picture cannot be read; the message begins with `where`.
    """
    if isinstance(source, Stored):
        return source.load()
    if isinstance(source, str | Path) and not Path(source).is_file():
        raise DataError(f"{where}: there is no picture {source}: give the folder of pictures with --images")
    return source


def checked_items(items: Iterable[Item], limit: int | None = None) -> list[Item]:
    """The first `limit` items as a list.

    Raises:
        UsageError: a limit below 1.
        DataError: none, or a key that occurs twice.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: ask at least one question")
    out: list[Item] = []
    seen: dict[str, str] = {}
    for item in items:
        if item.key in seen:
            raise DataError(f"{item.where}: question {item.key!r} stood already at {seen[item.key]}")
        seen[item.key] = item.where
        out.append(item)
        if len(out) == limit:
            break
    if not out:
        raise DataError("no questions: the file holds none")
    return out


def data_hash(items: Sequence[Item]) -> str:
    """Hash of what is asked, in order: questions, answers, options, clips, what metrics need (right boxes, …), and
    the bytes of every picture.

    Each distinct picture is read once; of a video, whose bytes may be many gigabytes, name and size count.
    """
    digest = hashlib.blake2b(digest_size=16)
    known: dict[str, str] = {}
    for item in items:
        pictures = []
        for source in item.images:
            name = (
                source.key
                if isinstance(source, Stored)
                else str(source)
                if not isinstance(source, bytes)
                else ""
            )
            if not name or name not in known:
                found = _hash_picture(source, item.where)
                if name:
                    known[name] = found
            else:
                found = known[name]
            pictures.append(found)
        video = None
        if item.video is not None:
            path = Path(item.video)
            video = [path.name, path.stat().st_size if path.is_file() else None]
        asked = [
            item.key,
            item.question,
            item.hint,
            item.answers,
            dict(item.options),
            item.letter,
            pictures,
            video,
        ]
        digest.update(
            json.dumps(
                [*asked, item.clip, item.category, dict(item.facts)], ensure_ascii=False, default=str
            ).encode("utf-8", "replace")
        )
    return digest.hexdigest()


def _hash_picture(source: Source, where: str) -> str:
    raw = read_source(source, where)
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(raw, bytes):
        digest.update(raw)
    else:
        try:
            with Path(raw).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise DataError(f"{where}: picture {raw} cannot be read ({error.strerror})") from error
    return digest.hexdigest()
