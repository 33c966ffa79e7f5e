"""One function for all layouts: ``read_items`` looks at a path and reads what lies there, with answers from elsewhere.

Folders: MME's ``*.txt`` (picture, question and answer between tabs, two lines a picture, a file a task; pictures beside
them in folders of the task's name) and folders of ``*.json``, ``*.jsonl``, ``*.tsv`` or ``*.parquet``, each file one
category (MVBench).

Answers apart: LLaVA's answer files and VQA's annotations are joined by the question's id, EgoSchema's {id: place of the
option} likewise; POPE's label files, which repeat ids, by their order within the category that their name ends with
(coco_pope_random.json).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from chiasm.errors import DataError, UsageError
from chiasm.eval.benchmarks.items import Item, checked_items
from chiasm.eval.benchmarks.records import KEYS, read_answers
from chiasm.eval.benchmarks.tables import json_lines, load_json, read_json, read_jsonl, read_parquet, read_tsv

__all__ = ["read_items"]

_READERS: dict[str, Callable[..., Iterator[Item]]] = {
    ".tsv": read_tsv,
    ".csv": read_tsv,
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
}


def read_items(
    data: str | Path,
    *,
    images: str | Path | None = None,
    answers: str | Path | None = None,
    prefer: Sequence[str] = (),
    limit: int | None = None,
    exclude: Iterable[str] = (),
) -> list[Item]:
    """Read the questions of a benchmark.

    Args:
        data: file or folder.
        images: folder that relative paths of pictures and videos belong to; default the data's own folder.
        answers: file or folder with the answers, where the questions come without.
        prefer: spellings of the question's field to be looked for first.
        limit: take only the first so many.
        exclude: ids of questions to be left out (published lists of broken ones).

    Raises:
        UsageError: no such path, or a file of an unknown kind.
        DataError: malformed content, with file and line.
    """
    path = Path(data).expanduser()
    root = Path(images).expanduser() if images is not None else None
    if root is not None and not root.is_dir():
        raise UsageError(f"--images {images}: there is no such folder")
    if not path.exists():
        raise UsageError(f"--data {data}: there is no such file or folder")
    left_out = {str(key) for key in exclude}
    found = _folder(path, root, prefer) if path.is_dir() else _file(path, root or path.parent, prefer)
    if answers is None:
        return checked_items((item for item in found if item.key not in left_out), limit)
    given = Path(answers).expanduser()
    if not given.exists():
        raise UsageError(f"--answers {answers}: there is no such file or folder")
    if given.is_dir():  # labels go by order, so that a question that is left out has one too
        labels = _Labels(given)
        joined = (item for item in map(labels, found) if item.key not in left_out)
    else:
        joined = map(_Joined(given), (item for item in found if item.key not in left_out))
    return checked_items(joined, limit)


def _file(path: Path, root: Path, prefer: Sequence[str], **more: Any) -> Iterator[Item]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            f"{path.name}: benchmarks are read from {', '.join(_READERS)} files and folders of them"
        )
    return reader(path, root=root, prefer=prefer, **more)


def _folder(path: Path, root: Path | None, prefer: Sequence[str]) -> Iterator[Item]:
    texts = sorted(path.glob("*.txt"))
    if texts:
        for file in texts:
            yield from _mme(file, root or path)
        return
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in _READERS)
    if not files:
        raise UsageError(f"--data {path}: the folder holds no {', '.join(_READERS)} or .txt files")
    for file in files:
        more = {} if file.suffix.lower() in (".tsv", ".csv") else {"category": file.stem}
        for item in _file(file, root or path, prefer, **more):
            # Ids start anew in every file.
            yield replace(item, key=f"{file.stem}/{item.key}", category=item.category or file.stem)


def _mme(file: Path, root: Path) -> Iterator[Item]:
    """Lines of picture, question and answer, between tabs."""
    task = file.stem
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name} is not UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, cells = f"{file.name}:{number}", line.split("\t")
        if len(cells) < 3 or not all(cell.strip() for cell in cells[:3]):
            raise DataError(
                f"{where} must hold picture, question and answer between tabs, found {len(cells)} column(s)"
            )
        name, question, answer = (cell.strip() for cell in cells[:3])
        places = [root / task / name, root / task / "images" / name, root / name]
        source = next((place for place in places if place.is_file()), places[0])
        yield Item(
            key=f"{task}/{number}",
            where=where,
            question=question,
            answers=(answer,),
            images=(str(source),),
            category=task,
            group=f"{task}/{name}",
        )


class _Joined:
    """Answers of one file, by the id of the question."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.answers: dict[str, tuple[str, ...]] = {}
        self.places: dict[str, int] = {}
        for where, record in _records(path):
            if isinstance(record, Mapping) and record and all(map(_is_place, record.values())):
                # {id: place of the right option}, all questions in one object
                self.places |= {str(key): int(place) for key, place in record.items()}
                self.answers |= {key: (str(place),) for key, place in self.places.items()}
                continue
            if not isinstance(record, Mapping):
                raise DataError(f"{where} must be an object, not {type(record).__name__}")
            key = next((record[name] for name in KEYS if record.get(name) is not None), None)
            if key is None:
                raise DataError(f"{where} has no id of a question: it needs one of {', '.join(KEYS[:4])}")
            value = next(
                (record[n] for n in ("answers", "answer", "label", "text") if record.get(n) is not None), None
            )
            self.answers[str(key)] = read_answers(value, where)

    def __call__(self, item: Item) -> Item:
        if item.key not in self.answers:
            raise DataError(f"{item.where}: {self.name} has no answer to question {item.key!r}")
        found = self.answers[item.key]
        place = self.places.get(item.key)
        letters = list(item.options)
        if place is not None and letters:
            if not 0 <= place < len(letters):
                raise DataError(
                    f"{item.where}: {self.name} names option {place} of question {item.key!r}, which has {len(letters)}"
                )
            return replace(item, answers=found, letter=letters[place])
        return replace(item, answers=found, letter=_letter(found, item))


def _is_place(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _letter(answers: Sequence[str], item: Item) -> str:
    bare = answers[0].strip("() .").upper() if answers else ""
    return bare if bare in item.options else item.letter


class _Labels:
    """A folder of POPE's label files: the n-th question of a category has the n-th label of its file."""

    def __init__(self, folder: Path) -> None:
        self.labels: dict[str, list[tuple[str, ...]]] = {}
        self.used: dict[str, int] = {}
        for file in sorted(p for p in folder.iterdir() if p.suffix.lower() in (".json", ".jsonl")):
            category = file.stem.rpartition("_")[2]
            self.labels[category] = []
            for where, record in _records(file):
                if not isinstance(record, Mapping) or not isinstance(record.get("label"), str):
                    raise DataError(f"{where} must be an object with a label")
                self.labels[category].append((record["label"],))
        if not self.labels:
            raise UsageError(f"--answers {folder}: the folder holds no .json files of labels")

    def __call__(self, item: Item) -> Item:
        labels, n = self.labels.get(item.category), self.used.get(item.category, 0)
        if labels is None or n >= len(labels):
            raise DataError(
                f"{item.where}: no label is left for category {item.category!r} of {', '.join(self.labels)}"
            )
        self.used[item.category] = n + 1
        return replace(item, answers=labels[n])


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of a JSON or JSONL file; label files are lines of objects whatever they are called."""
    if path.suffix.lower() == ".json":
        try:
            whole = load_json(path)
        except DataError:
            yield from json_lines(path)
            return
        if isinstance(whole, Mapping):
            whole = next(
                (whole[n] for n in ("annotations", "data", "questions") if isinstance(whole.get(n), list)),
                [whole],
            )
        for n, record in enumerate(whole if isinstance(whole, list) else [whole]):
            yield f"{path.name}[{n}]", record
        return
    yield from json_lines(path)
