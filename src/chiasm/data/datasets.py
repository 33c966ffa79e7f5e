"""Data sets on disk, read by index: InternVL, LLaVA, messages, ShareGPT, parquet, webdataset.

What: ``DatasetSpec`` says which files and how; ``open`` gives a ``Dataset`` whose rows are read one at a time, from
several threads if need be. Nothing is read whole, nothing is tokenised, no picture is opened.
Source: InternVL 2.5, section 3.1 of its fact sheet (meta file and rows); the other formats as their writers have them.
"""

from __future__ import annotations

import difflib
import glob as globbing
import json
import logging
import math
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from chiasm.data.formats.array import JsonArray
from chiasm.data.formats.files import Source, head, stamp
from chiasm.data.formats.lines import JsonLines
from chiasm.data.formats.parquet import Groups, ParquetRows
from chiasm.data.formats.rows import Kind, guess, read_row
from chiasm.data.formats.shards import TarSamples
from chiasm.data.message import Record
from chiasm.data.mixture import derive_seed
from chiasm.errors import ChiasmError, ConfigError, DataError

__all__ = [
    "Dataset",
    "DatasetSpec",
    "FileDataset",
    "Format",
    "Subset",
    "blaming",
    "mixture_weights",
    "read_meta",
    "read_specs",
    "stream",
]

Format = Literal["auto", "internvl", "llava", "messages", "sharegpt", "parquet", "webdataset"]
QUESTION = "Describe this picture."

_log = logging.getLogger("chiasm.data")

# Fields of a meta file -> of a spec; the first six are the release's.
_META = {
    "annotation": "annotation",
    "root": "root",
    "data_augment": "augment",
    "repeat_time": "repeat_time",
    "max_dynamic_patch": "max_tiles",
    "length": "length",
    "format": "format",
    "sample": "sample",
    "seed": "seed",
    "weight": "weight",
    "question": "question",
}
TOLERATED = ("comment", "description", "license", "citation", "url", "source", "note", "notes")
"""Fields of a meta file that say nothing to a reader; so do all that begin with an underscore."""


class Dataset(Protocol):
    """Samples by number. Safe to read from several threads."""

    name: str

    def __len__(self) -> int:
        """Number of samples; the first call may read through the files once."""
        ...

    def where(self, index: int) -> str:
        """The place of a sample: ``train.jsonl:17``, ``llava.json[16]``, ``part-3.parquet row 5``, ``a.tar:000123``."""
        ...

    def record(self, index: int) -> Record:
        """The sample, its media placed under the root or taken from the shard.

        Raises:
            DataError: malformed; the line begins with ``where(index)``.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """One data set of a mixture.

    Attributes:
        annotation: the file with the rows, or a glob of files (shards), which are read in the order of their names.
        root: folder that relative paths of pictures and videos are under; empty: the working directory.
        format: of file and rows. `auto` goes by the content: ``PAR1``, tar, ``[`` or a line of JSON, then the
            fields of the first row. `internvl` (lines) and `llava` (an array) differ in the file alone.
        repeat_time: below 1: this share of the rows; above: the set counts that many times when a mixture is weighted
            by length. Any positive number (the release's fine-tuning wants integers above 1).
        sample: which rows a `repeat_time` below 1 takes: the first ones, as the release does, or a random subset.
        seed: of that subset.
        max_tiles: most tiles of one picture; None: what the model's tile policy says.
        augment: random JPEG quality of each tile while training (`chiasm.media.jpeg`).
        weight: share in the mixture; None: by length.
        length: rows that a meta file says there are; a different number is noted, and the file is right.
        question: asked of samples that are a caption only.

    Raises:
        ConfigError: a value out of range.
    """

    annotation: str
    root: str = ""
    format: Format = "auto"
    repeat_time: float = 1.0
    sample: Literal["first", "random"] = "first"
    seed: int = 0
    max_tiles: int | None = None
    augment: bool = False
    weight: float | None = None
    length: int | None = None
    question: str = QUESTION

    def __post_init__(self) -> None:
        if not isinstance(self.annotation, str) or not self.annotation:
            raise ConfigError(f"annotation must name a file or a glob, got {self.annotation!r}")
        if not isinstance(self.root, str) or "://" in self.root:
            raise ConfigError(f"root must be a local folder, got {self.root!r}")
        if self.format not in get_args(Format):
            raise ConfigError(f"format must be one of {', '.join(get_args(Format))}, got {self.format!r}")
        if self.sample not in ("first", "random"):
            raise ConfigError(f"sample must be first or random, got {self.sample!r}")
        if not _is_number(self.repeat_time) or not 0 < self.repeat_time < math.inf:
            raise ConfigError(f"repeat_time must be a number above 0, got {self.repeat_time!r}")
        if self.weight is not None and (not _is_number(self.weight) or not 0 <= self.weight < math.inf):
            raise ConfigError(f"weight must be a number of at least 0, or null, got {self.weight!r}")
        for name, least in (("max_tiles", 1), ("length", 0)):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < least):
                raise ConfigError(f"{name} must be an integer of at least {least}, or null, got {value!r}")
        if not isinstance(self.augment, bool):
            raise ConfigError(f"augment must be true or false, got {self.augment!r}")
        if not _is_int(self.seed) or self.seed < 0:
            raise ConfigError(f"seed must be an integer of at least 0, got {self.seed!r}")

    def open(self, name: str, *, cache: str | Path | None = None) -> FileDataset | Subset:
        """Open the data set: files are found and the first row is looked at; the index is built when it is needed.

        Args:
            name: of the set in its mixture.
            cache: folder in which indexes are kept for the next time; None: nowhere.

        Raises:
            DataError: no file, a file that is empty or not of the format, a first row of no known kind.
            MissingExtraError: parquet without pyarrow.
        """
        dataset = FileDataset(name, self, cache=None if cache is None else Path(cache))
        return dataset if self.repeat_time >= 1 else Subset(dataset, self.repeat_time, self.sample, self.seed)


class FileDataset:
    """All rows of the files of a spec; `DatasetSpec.open` makes it."""

    def __init__(self, name: str, spec: DatasetSpec, *, cache: Path | None = None) -> None:
        self.name, self.spec = name, spec
        self.paths = _find(spec.annotation)
        labels = _labels(self.paths)
        groups = Groups()
        self.sources: list[Source] = [
            _open_source(path, label, spec.format, cache, groups)
            for path, label in zip(self.paths, labels, strict=True)
        ]
        self.kind: Kind | None = _kind_of(spec.format, self.sources[0])
        self._ends: list[int] | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def ends(self) -> list[int]:
        """Number of rows up to and with each file."""
        ends = self._ends
        if ends is None:
            with self._lock:
                if (ends := self._ends) is None:
                    ends = np.cumsum([len(source) for source in self.sources]).tolist()
                    if self.spec.length is not None and self.spec.length != ends[-1]:
                        _log.warning(
                            "%s: holds %d rows, its meta says %d; the file is right",
                            self.name,
                            ends[-1],
                            self.spec.length,
                        )
                    self._ends = ends
        return ends

    def __len__(self) -> int:
        return self.ends[-1]

    def _at(self, index: int) -> tuple[Source, int]:
        ends = self.ends
        if not 0 <= index < ends[-1]:
            raise IndexError(f"{self.name} has no row {index}: it has {ends[-1]}")
        number = bisect_right(ends, index)
        return self.sources[number], index - (ends[number - 1] if number else 0)

    def where(self, index: int) -> str:
        """See `Dataset`."""
        source, row = self._at(index)
        return source.where(row)

    @property
    def root(self) -> str:
        """Folder that relative paths are under."""
        return self.spec.root

    def unplaced(self, index: int) -> Record:
        """The sample with the paths of its media as the row has them: what is written back.

        Raises:
            DataError: as `record`.
        """
        source, row = self._at(index)
        found = source.row(row)
        return read_row(found, self.kind, source.where(row), question=self.spec.question)

    def record(self, index: int) -> Record:
        """See `Dataset`."""
        record = self.unplaced(index)
        if not self.spec.root:
            return record
        return replace(record, turns=tuple(record.resolved(self.spec.root)))


class Subset:
    """Some rows of a data set: what a `repeat_time` below 1 leaves.

    Args:
        dataset: all rows.
        share: of the rows, rounded down.
        sample: the first ones, or a random subset (in the order of the file).
        seed: of the subset.
    """

    def __init__(
        self, dataset: FileDataset, share: float, sample: Literal["first", "random"], seed: int
    ) -> None:
        self.name, self.dataset = dataset.name, dataset
        self.share, self.sample, self.seed = share, sample, seed
        self._rows: np.ndarray | range | None = None

    @property
    def rows(self) -> np.ndarray | range:
        """The numbers of the rows."""
        if self._rows is None:  # two threads would compute the same
            size = len(self.dataset)
            count = int(size * self.share)
            if not count:
                raise DataError(
                    f"{self.name}: repeat_time {self.share:g} leaves none of its {size} rows; raise it"
                )
            rows: np.ndarray | range = range(count)
            if self.sample == "random":
                random = np.random.default_rng(derive_seed(self.seed, "subset", self.name))
                rows = np.sort(random.permutation(size)[:count])
            self._rows = rows
        return self._rows

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """See `Dataset`."""
        return self.dataset.where(self._row(index))

    @property
    def root(self) -> str:
        """See `FileDataset.root`."""
        return self.dataset.root

    def unplaced(self, index: int) -> Record:
        """See `FileDataset.unplaced`."""
        return self.dataset.unplaced(self._row(index))

    def record(self, index: int) -> Record:
        """See `Dataset`."""
        return self.dataset.record(self._row(index))

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self.rows):
            raise IndexError(f"{self.name} has no row {index}: it has {len(self.rows)}")
        return int(self.rows[index])


@contextmanager
def blaming(dataset: Dataset, index: int) -> Iterator[None]:
    """Let what goes wrong with a sample inside (a picture that is missing, say) begin with the sample's place.

    Raises:
        DataError: in the place of any other `ChiasmError`.
    """
    try:
        yield
    except ChiasmError as error:
        where = dataset.where(index)
        if isinstance(error, DataError) and str(error).startswith(where):
            raise
        raise DataError(f"{where}: {error}") from error


def stream(
    dataset: Dataset, *, rank: int = 0, world: int = 1, start: int = 0
) -> Iterator[tuple[int, Record]]:
    """Numbers and records ``start + rank``, ``start + rank + world``, …: ranks together read each row once.

    Raises:
        ConfigError: `rank` is not below `world`.
        DataError: at the first row that is malformed; catch it around `Dataset.record` to read on instead.
    """
    if not 0 <= rank < world or start < 0:
        raise ConfigError(f"stream needs 0 <= rank < world and start >= 0, got {rank}, {world}, {start}")
    for index in range(start + rank, len(dataset), world):
        yield index, dataset.record(index)


# Meta files ------------------------------------------------------------------------------------------------------


def read_meta(path: str | Path) -> dict[str, DatasetSpec]:
    """Read an InternVL meta file: {name: {"root", "annotation", "data_augment", "repeat_time", "length", …}}.

    Beside the release's fields it may hold `format`, `sample`, `seed`, `weight` and `question` of `DatasetSpec`, and
    fields that say nothing to a reader (`TOLERATED`, and all that begin with an underscore). Relative paths are taken
    from the working directory, as the release does; one that is not there, from the meta file's own folder.

    Raises:
        DataError: no JSON, a set that is named twice, a field that is missing, unknown (the nearest is named) or of a
            wrong type.
    """
    path = Path(path)
    content = _load_meta(path)
    if not content:
        raise DataError(f"{path}: names no data set; a meta file is {{name: {{annotation, root, …}}}}")
    return {name: _meta_entry(path, name, entry) for name, entry in content.items()}


def _load_meta(path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise DataError(f"{path}: names {key!r} twice; rename one")
            found[key] = value
        return found

    stamp(path)
    try:
        content = json.loads(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not a JSON file ({error}); repair it") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or 'cannot be read'}; check the path") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: must be one JSON object of data sets by name, not a {type(content).__name__}"
        )
    return content


def _meta_entry(path: Path, name: str, entry: Any) -> DatasetSpec:
    at = f"{path}: {name}"
    if not isinstance(entry, dict):
        raise DataError(f"{at}: must be an object with annotation and root, not a {type(entry).__name__}")
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if key in _META:
            values[_META[key]] = value
        elif key not in TOLERATED and not key.startswith("_"):
            near = difflib.get_close_matches(key, [*_META, *TOLERATED], n=1, cutoff=0.5)
            meant = f"did you mean {near[0]}?" if near else f"use {', '.join(_META)}"
            raise DataError(f"{at}.{key}: unknown field; {meant}")
    if "annotation" not in values:
        raise DataError(f"{at}.annotation: is missing; name the file with the rows")
    if values.get("max_tiles") is None:
        values.pop("max_tiles", None)
    try:
        spec = DatasetSpec(**{"root": "", **values})
    except ConfigError as error:
        # The line speaks of the field by the spec's name; people look for the meta file's.
        said = str(error)
        back = {inner: outer for outer, inner in _META.items()}
        word = re.match(r"\w+", said)
        said = back.get(word[0], word[0]) + said[word.end() :] if word else said
        raise DataError(f"{at}: {said}") from error
    folder = path.parent
    # os.path, not pathlib: names that cannot be (too long, a NUL in them) are just not there.
    root = spec.root if not spec.root or os.path.exists(spec.root) else _beside(folder, spec.root)
    annotation = spec.annotation
    if not os.path.exists(annotation) and not globbing.glob(annotation, recursive=True):
        annotation = _beside(folder, annotation)
    return replace(spec, annotation=annotation, root=root)


def _beside(folder: Path, name: str) -> str:
    """The path in the folder if there is such a file, else unchanged, so that errors name what was written."""
    path = folder / name
    return str(path) if os.path.exists(path) or globbing.glob(str(path), recursive=True) else name


def read_specs(path: str | Path, *, root: str = "", format: Format = "auto") -> dict[str, DatasetSpec]:
    """The data sets that a path names: those of a meta file, or one, called by the file's name.

    A ``.json`` file is a meta file if it is one object of objects that have an `annotation`; any other file, and a
    glob, is a data set.

    Raises:
        DataError: as `read_meta`; `root` or `format` beside a meta file, which has its own.
    """
    text = str(path)
    file = Path(path)
    if file.suffix.lower() == ".json" and os.path.isfile(file) and _is_meta(file):
        if root or format != "auto":
            raise DataError(
                f"{file}: is a meta file, which has root and format of its own; change them there"
            )
        return read_meta(file)
    name = re.sub(r"[*?\[\]{}]+", "", file.name.split(".")[0]).strip("-_ ") or "data"
    return {name: DatasetSpec(annotation=text, root=root, format=format)}


def _is_meta(file: Path) -> bool:
    """Whether the file is one JSON object whose first value is an object: rows begin with other things."""
    start = head(file, 65536).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not re.match(rb'\{\s*("(?:[^"\\]|\\.)*"\s*:\s*\{|\})', start):
        return False
    # A line that is complete by itself is the first of many rows.
    first, newline, _ = start.partition(b"\n")
    if newline and file.stat().st_size > 65536:
        try:
            json.loads(first)
        except ValueError:
            return True
        return False
    return b'"annot' in start or b'"root"' in start or start.rstrip() == b"{}"


def mixture_weights(
    sets: Mapping[str, Dataset],
    specs: Mapping[str, DatasetSpec],
    *,
    resampling: Literal["length", "sqrt"] = "length",
) -> dict[str, float]:
    """Relative shares for `chiasm.data.mixture.Mixture`.

    Sets with a `weight` get that. Where none has one, a set's share is its number of rows (those that a `repeat_time`
    below 1 leaves; multiplied by one above 1), or the square root of that (the release's `use_data_resampling`).

    Raises:
        ConfigError: some sets have a weight and some have none, or a set has no spec.
    """
    if resampling not in ("length", "sqrt"):
        raise ConfigError(f"resampling must be length or sqrt, got {resampling!r}")
    for name in sets:
        if name not in specs:
            raise ConfigError(f"data set {name!r} has no spec: give both under one name")
    given = [name for name in sets if specs[name].weight is not None]
    if given and len(given) < len(sets):
        other = next(name for name in sets if specs[name].weight is None)
        raise ConfigError(
            f"data set {given[0]!r} has a weight and {other!r} has none: give all of them one, or none"
        )
    if given:
        return {name: float(specs[name].weight or 0.0) for name in sets}
    counts = {name: len(dataset) * max(1.0, specs[name].repeat_time) for name, dataset in sets.items()}
    return {
        name: math.sqrt(count) if resampling == "sqrt" else float(count) for name, count in counts.items()
    }


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Files -----------------------------------------------------------------------------------------------------------


def _find(annotation: str) -> list[Path]:
    """The files of an annotation, sorted by name."""
    if os.path.exists(annotation):
        return [Path(annotation)]
    if not globbing.has_magic(annotation):
        raise DataError(f"{annotation}: no such file; check the path")
    found = sorted(path for path in globbing.glob(annotation, recursive=True) if os.path.isfile(path))
    if not found:
        raise DataError(f"{annotation}: no file fits this glob; check the path")
    return [Path(path) for path in found]


def _labels(paths: Sequence[Path]) -> list[str]:
    """How errors name the files: as shortly as tells them apart."""
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(common).as_posix() for path in paths]


def _open_source(path: Path, label: str, format: Format, cache: Path | None, groups: Groups) -> Source:
    """The reader that the file's content asks for, if the format agrees."""
    start = head(path)
    stripped = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    tar = start[257:262] == b"ustar" or path.suffix.lower() == ".tar"
    parquet = start[:4] == b"PAR1" or path.suffix.lower() in (".parquet", ".pq")
    if format == "parquet" or (format == "auto" and parquet):
        return ParquetRows(path, label, groups)
    if format == "webdataset" or (format == "auto" and tar):
        return TarSamples(path, label, cache)
    if parquet or tar or b"\0" in start:
        what = "a parquet file" if parquet else "a tar file" if tar else "a binary file"
        raise DataError(
            f"{path}: is {what}, not {format if format != 'auto' else 'one of rows'}; change its format"
        )
    if stripped.startswith(b"["):
        return JsonArray(path, label, cache)
    return JsonLines(path, label, cache)


def _kind_of(format: Format, source: Source) -> Kind | None:
    """The kind of all rows, or None where each is told by its own fields.

    Raises:
        DataError: nothing is said, and the first row is an object of no known kind.
    """
    if format in ("internvl", "llava"):
        return "internvl"
    if format in ("messages", "sharegpt"):
        return format
    if format == "auto" and isinstance(source, JsonLines | JsonArray):
        first = source.first()
        # A first row that is damaged is one bad row; one that is whole and means nothing is a wrong file.
        if isinstance(first, Mapping):
            guess(first, f"{source.label} (first row)")
    return None
