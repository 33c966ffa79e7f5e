"""Tar shards in the layout of webdataset: neighbouring members with one key are a sample.

``000123.jpg``, ``000123.json`` are a picture and its row; ``000123.0.jpg``, ``000123.1.png`` several pictures;
``000123.txt`` alone a caption. The key ends at the first dot of a member's last name. Members are read in place by
their offsets, so shards need not be unpacked and can be read in any order; compressed ones cannot, and are refused.
"""

from __future__ import annotations

import re
import tarfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from chiasm.data.formats.files import Arrays, File, Indexed, head
from chiasm.data.formats.lines import parse_json
from chiasm.errors import DataError

__all__ = ["PICTURES", "TarSamples", "index_tar"]

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif", "qoi")
"""Endings of members that are pictures."""

_UNREAD = (
    *("mp4", "m4v", "mov", "mkv", "webm", "avi", "wav", "mp3", "flac", "ogg", "m4a"),
    *("heic", "heif", "tga", "pcx", "svg", "eps", "pdf", "npy", "npz"),
)
"""Endings of members that are seen or heard and not read from shards: without them a sample says another thing."""

_TEXTS = ("txt", "text", "caption")
_TALKS = ("conversations", "messages", "texts")


class TarSamples(Indexed):
    """The samples of one tar file; DataError also where it is compressed."""

    kind, empty = "tar", "holds no samples"

    def __init__(self, path: Path, label: str, cache: Path | None = None) -> None:
        head(path, 512)
        super().__init__(path, label, cache)

    def _build(self) -> Arrays:
        return index_tar(self.file, self.label)

    def _rows(self, index: Arrays) -> int:
        return len(index["first"]) - 1

    @cached_property
    def _endings(self) -> list[str]:
        """Endings of members' names, by number."""
        return self.index["endings"].tobytes().decode("utf-8", "surrogateescape").split("\0")

    def key(self, index: int) -> str:
        """The name that a sample's members share."""
        ends, keys = self.index["key_ends"], self.index["keys"]
        start = int(ends[index - 1]) if index else 0
        return keys[start : int(ends[index])].tobytes().decode("utf-8", "surrogateescape")

    def where(self, index: int) -> str:
        """``shard-01.tar:000123``: the key of the sample."""
        return f"{self.label}:{self.key(index)}"

    def row(self, index: int) -> dict[str, Any]:
        """The sample's row with its pictures as bytes in ``images``; ``caption`` where it has a text only.

        Raises:
            DataError: a member is cut off or cannot be read (a video, say), the row is no JSON, the sample has none, or
                two members have one name.
        """
        first, last = self.index["first"][index : index + 2]
        row: Any = None
        text: str | None = None
        pictures: list[tuple[list[tuple[int, str]], bytes]] = []
        seen: set[str] = set()
        for n in range(int(first), int(last)):
            ending = self._endings[int(self.index["ending"][n])]
            if ending in seen:
                raise DataError(
                    f"{self.where(index)}: has two members .{ending}; give each sample a key of its own"
                )
            seen.add(ending)
            last_ending = ending.rpartition(".")[2]
            if last_ending in PICTURES:
                pictures.append((_natural(ending.rpartition(".")[0]), self._member(index, n)))
            elif ending == "json":
                row = parse_json(self._member(index, n), lambda: f"{self.where(index)}.json")
                if not isinstance(row, dict):
                    raise DataError(
                        f"{self.where(index)}.json: must be a JSON object, not a {type(row).__name__}"
                    )
            elif ending in _TEXTS:
                try:
                    text = self._member(index, n).decode("utf-8-sig").strip()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{self.where(index)}.{ending}: is not UTF-8; save it as UTF-8"
                    ) from error
            elif last_ending in _UNREAD:
                raise DataError(
                    f"{self.where(index)}.{ending}: cannot be read from a shard; save pictures as JPEG or PNG, and "
                    "videos as files that rows of a .jsonl name"
                )
        if row is None and text is None:
            raise DataError(
                f"{self.where(index)}: has neither .json nor .txt; found .{', .'.join(sorted(seen))}"
            )
        row = {} if row is None else dict(row)
        if not any(row.get(name) is not None for name in _TALKS) and text is not None:
            row["caption"] = text
        if pictures:
            # What the row says of its pictures is how they were called before they were put in here.
            row.pop("image", None)
            row["images"] = [data for _, data in sorted(pictures, key=lambda entry: entry[0])]
        return row

    def _member(self, index: int, n: int) -> bytes:
        start, size = int(self.index["start"][n]), int(self.index["size"][n])
        data = self.file.read(start, start + size)
        if len(data) < size:
            raise DataError(f"{self.where(index)}: is cut off; copy the shard again")
        return data


def index_tar(file: File, label: str) -> Arrays:
    """Find the members of a tar file.

    Returns:
        ``start``, ``size``, ``ending``: (members,), bytes of the contents and the number of the ending;
        ``first``: (samples + 1,) member at which each sample begins; ``keys``, ``key_ends``: their names as one
        row of bytes; ``endings``: the endings, NUL between them.

    Raises:
        DataError: not a tar file.
    """
    starts: list[int] = []
    sizes: list[int] = []
    numbers: list[int] = []
    firsts: list[int] = []
    keys: list[bytes] = []
    endings: dict[str, int] = {}
    try:
        with tarfile.open(file.path, "r:") as tar:
            key = None
            while True:
                try:
                    member = tar.next()
                except tarfile.ReadError:  # cut off: what came before can be read
                    break
                if member is None:
                    break
                setattr(tar, "members", [])  # noqa: B010 - else it keeps every header; the type stubs do not know it
                if not member.isreg():
                    continue
                if member.issparse():
                    raise DataError(
                        f"{label}: {member.name} is stored with holes; write the shard without --sparse"
                    )
                folder, slash, name = member.name.rpartition("/")
                stem, dot, ending = name.partition(".")
                if not dot or not stem:
                    continue
                if (new := folder + slash + stem) != key:
                    key = new
                    firsts.append(len(starts))
                    keys.append(key.encode("utf-8", "surrogateescape"))
                starts.append(member.offset_data)
                sizes.append(member.size)
                numbers.append(endings.setdefault(ending.lower(), len(endings)))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{label}: is not a tar file that can be read ({error}); check the file") from error
    return {
        "start": np.array(starts, np.int64),
        "size": np.array(sizes, np.int64),
        "ending": np.array(numbers, np.int32),
        "first": np.array([*firsts, len(starts)], np.int64),
        "keys": np.frombuffer(b"".join(keys), np.uint8),
        "key_ends": np.cumsum(np.array([len(key) for key in keys], np.int64)),
        "endings": np.frombuffer("\0".join(endings).encode("utf-8", "surrogateescape"), np.uint8),
    }


def _natural(name: str) -> list[tuple[int, str]]:
    """For sorting: ``""`` before ``"0"``, ``"2"`` before ``"10"``."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.findall(r"\d+|\D+", name)]
