"""From one record of a file (JSON object, parquet row, TSV row) to an Item: the many spellings of the same fields.

What is read: InternVL's test JSONL ("image", "question", "question_id", "answer"), its training rows ("conversations"),
its RefCOCO rows ("sent", "bbox", "height", "width"), LLaVA's question files ("text"), MMMU and MathVista rows,
VLMEvalKit's columns ("A", "B", …), MVBench ("candidates", "start", "end"), HallusionBench, and of videos Video-MME
("videoID"), MLVU, LongVideoBench ("correct_choice"), NExT-QA ("a0" … "a4"), EgoSchema ("q_uid", "option 0" …),
PerceptionTest ("answer_id") and ActivityNet-QA ("video_name"). First spelling that holds something wins.
What is wrong is a DataError that begins with where the record stands.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chiasm.errors import DataError
from chiasm.eval.benchmarks.items import Item, Source, Stored
from chiasm.eval.benchmarks.videos import find_subtitles, find_video
from chiasm.eval.metrics.choices import letters

__all__ = ["KEYS", "from_record", "parse_list", "read_answers"]

KEYS = (
    *("question_id", "questionId", "q_uid", "index", "id", "pid", "qid", "data_id", "uid", "problem_id"),
    "question_idx",
)
_QUESTION = ("question", "text", "sent", "prompt", "query")
_ANSWER = (
    *("answers", "answer", "gt_answers", "gt_answer", "label", "gt", "ground_truth"),
    *("correct_choice", "answer_id"),
)
_IMAGE = ("image", "images", "image_path", "img", "decoded_image", "filename", "image_file", "picture")
_OPTIONS = ("options", "choices", "candidates", "option")
_VIDEO = ("video", "video_path", "videoID", "video_name", "video_idx", "q_uid")
#: One field an option: NExT-QA's and EgoSchema's.
_NUMBERED = ("a{n}", "option {n}", "option_{n}")
#: Fields of files whose answers are places of options, counted from 0, also where they are written as text.
_INDEXED = ("q_uid", "video_idx", "a0", "correct_choice", "answer_id")
_CATEGORY = (
    "category",
    "question_type_category",
    "task_type",
    "type",
    "dataset_name",
    "subject",
    "subfield",
    "split",
    "duration_group",
    "question_category",
    "area",
)
#: HallusionBench's ids: a question of a set, asked about a figure of the set. Alone, none of them is unique.
_HALLUSION = ("set_id", "figure_id", "question_id")
_FACTS = (
    *(
        "bbox",
        "width",
        "height",
        "answer_type",
        "precision",
        "question_type",
        "dataset_name",
        *_HALLUSION,
    ),
    *("l2-category", "subcategory", "g_index"),
)
_LETTERS = "ABCDEFGHIJ"
_REFERENCE = re.compile(r"<image ?(\d+)>")


def from_record(
    record: Any,
    *,
    where: str,
    key: str,
    root: Path | None = None,
    prefer: Sequence[str] = (),
    images: Sequence[Source] | None = None,
    category: str = "",
) -> Item:
    """Read one record.

    Args:
        record: a mapping.
        where: it stands ("test.jsonl:17").
        key: id if the record has none.
        root: folder that relative paths of media belong to.
        prefer: spellings of the question to be looked for first ("query" of MathVista).
        images: pictures that the reader found itself (encoded in the file).
        category: if the record names none.

    Raises:
        DataError: no question and no picture, or a field of another type than it must have.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where} must be an object, not {type(record).__name__}")
    question, answers = _talk(record, where)
    if question is None:
        found = _first(record, (*prefer, *_QUESTION))
        if found is not None and not isinstance(found, str):
            raise DataError(f"{where}.question must be a string, not {type(found).__name__}")
        question = found or ""
        answers = read_answers(_first(record, _ANSWER), where)
    sources = tuple(images) if images is not None else _images(record, where, root)
    kind = _kind(record)
    video = _video(record, where, root, (category, str(kind or "")))
    if not question.strip() and not sources and video is None:
        raise DataError(
            f"{where} asks nothing: it has no question, picture or video (found {_names(record)})"
        )
    options = _options(record, where)
    found_key = _first(record, KEYS)
    # NExT-QA and PerceptionTest number the questions of every video anew.
    if found_key is not None and any(_holds(record.get(name)) for name in ("a0", "answer_id")):
        found_key = f"{_first(record, _VIDEO)}_{found_key}"
    if all(_holds(record.get(name)) for name in _HALLUSION):
        found_key = "_".join(
            str(record[name]) for name in ("category", "subcategory", *_HALLUSION) if _holds(record.get(name))
        )
    facts = {name: _plain(record[name]) for name in _FACTS if _holds(record.get(name))}
    item = Item(
        key=str(key if found_key is None else found_key),
        where=where,
        question=_bare(question, len(sources)),
        answers=answers,
        images=sources,
        video=video,
        clip=_clip(record, where),
        subtitles=_subtitles(record, root),
        options=options,
        letter=_letter(
            answers,
            options,
            _first(record, _ANSWER),
            texts=not _holds(record.get("options")) and _listed(record),
            indexed=any(_holds(record.get(name)) for name in _INDEXED),
        ),
        hint=_text(record.get("hint")) or _text(record.get("context")),
        category=str(kind) if kind is not None and not isinstance(kind, list | dict) else category,
        group=_group(sources, video, str(key if found_key is None else found_key)),
        facts=facts,
    )
    return item


def read_answers(value: Any, where: str) -> tuple[str, ...]:
    """Accepted answers: a text, a number, a list of these, or VQA's [{"answer": …}].

    Raises:
        DataError: something else.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        listed = parse_list(value)
        # A list of texts is several answers; a list of numbers is one answer that is a list.
        several = bool(listed) and all(isinstance(v, str) for v in listed or ())
        return tuple(listed or ()) if several else (value,)
    if isinstance(value, bool):
        return ("yes" if value else "no",)
    if isinstance(value, int | float):
        return (_number(value),)
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        out = []
        for n, entry in enumerate(value):
            inner = entry.get("answer") if isinstance(entry, Mapping) else entry
            if isinstance(inner, bool) or not isinstance(inner, str | int | float):
                raise DataError(f"{where}.answers[{n}] must be a text or number, found {entry!r:.60}")
            out.append(inner if isinstance(inner, str) else _number(inner))
        return tuple(out)
    raise DataError(f"{where}.answer must be a text, a number or a list, found {value!r:.60}")


def parse_list(text: str) -> list[Any] | None:
    """A list written as text, JSON's or Python's way; None for any other text."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")) or len(text) > 1_000_000:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
    return found if isinstance(found, list) else None


# --- single fields -----------------------------------------------------------------------------------------------


def _talk(record: Mapping[str, Any], where: str) -> tuple[str | None, tuple[str, ...]]:
    """First question and answer of a training row; (None, ()) where there is no conversation."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or "question" in record:
        return None, ()
    asked = answer = None
    for n, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise DataError(f"{where}.conversations[{n}] must be an object with from and value")
        if turn.get("from") == "human" and asked is None:
            asked = turn["value"]
        elif turn.get("from") == "gpt" and asked is not None and answer is None:
            answer = turn["value"]
    if asked is None:
        raise DataError(f"{where}.conversations has no human turn: nothing is asked")
    return asked, () if answer is None else (answer,)


def _images(record: Mapping[str, Any], where: str, root: Path | None) -> tuple[Source, ...]:
    numbered = [record[f"image_{n}"] for n in range(1, 21) if _holds(record.get(f"image_{n}"))]
    given = numbered or _first(record, _IMAGE)
    if given is None:
        return ()
    if isinstance(given, str):
        listed = parse_list(given)
        given = [given] if listed is None else listed
    out: list[Source] = []
    for n, source in enumerate(given if isinstance(given, list | tuple) else [given]):
        if isinstance(source, Mapping):  # how parquet files of the datasets library hold pictures
            source = source.get("bytes") or source.get("path")
        if isinstance(source, bytes) and source:
            out.append(source)
        elif isinstance(source, str) and source:
            out.append(str(_path(source, root)))
        else:
            raise DataError(f"{where}.image[{n}] must be a path or encoded bytes, found {source!r:.60}")
    return tuple(out)


def _video(record: Mapping[str, Any], where: str, root: Path | None, tasks: Sequence[str]) -> str | None:
    value = _first(record, _VIDEO)
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and _holds(record.get("a0")):
        value = str(value)  # NExT-QA's ids are numbers
    if not isinstance(value, str):
        raise DataError(f"{where}.video must be a path, found {value!r:.60}")
    return str(find_video(value, root, tasks))


def _subtitles(record: Mapping[str, Any], root: Path | None) -> str | None:
    names = [record[name] for name in ("subtitle_path", "subtitles", *_VIDEO) if _holds(record.get(name))]
    return find_subtitles([name for name in names if isinstance(name, str)], root)


def _kind(record: Mapping[str, Any]) -> Any:
    """The category: by what a benchmark is scored in parts."""
    if _holds(record.get("videoID")) and isinstance(record.get("duration"), str):
        return record["duration"]  # Video-MME: short, medium, long
    if _holds(record.get("candidates")) and _holds(record.get("question_type")):
        return record["question_type"]  # MLVU's tasks
    return _first(record, _CATEGORY)


def _clip(record: Mapping[str, Any], where: str) -> tuple[float, float] | None:
    given = record.get("clip")
    if given is None and _holds(record.get("start")) and _holds(record.get("end")):
        given = [record["start"], record["end"]]
    if given is None:
        return None
    try:
        start, end = (float(value) for value in given)
    except (TypeError, ValueError):
        raise DataError(f"{where}.clip must be [start, end] in seconds, found {given!r:.60}") from None
    if not 0 <= start < end < math.inf:
        raise DataError(
            f"{where}.clip [{start}, {end}] is no span of time: start at 0 or later, end after it"
        )
    return start, end


def _options(record: Mapping[str, Any], where: str) -> dict[str, str]:
    given = _first(record, _OPTIONS)
    if isinstance(given, str):
        listed = parse_list(given)
        if listed is None:
            raise DataError(f"{where}.options must be a list, found {given!r:.60}")
        given = listed
    if isinstance(given, Mapping):
        return {str(letter).strip().upper(): str(text) for letter, text in given.items()}
    if given is not None and isinstance(given, Iterable):
        texts = [str(text) for text in given]
        if len(texts) > 26:
            raise DataError(f"{where} has {len(texts)} options: letters end at Z")
        return letters(_unlettered(texts))
    for spelling in _NUMBERED:
        texts = []
        while _holds(record.get(spelling.format(n=len(texts)))):
            texts.append(_cell(record[spelling.format(n=len(texts))]))
        if texts:
            return letters(texts)
    return {letter: _cell(record[letter]) for letter in _LETTERS if _holds(record.get(letter))}


def _unlettered(texts: list[str]) -> list[str]:
    """Options without the letters that all of them begin with ("A. a dog"): prompts write their own."""
    marks = [re.match(rf"\(?{chr(ord('A') + n)}[.):]\s+(?=\S)", text) for n, text in enumerate(texts)]
    if len(texts) < 2 or not all(marks):
        return texts
    return [text[mark.end() :] for text, mark in zip(texts, marks, strict=True) if mark]


def _listed(record: Mapping[str, Any]) -> bool:
    """Whether the options stand in a list of texts to which answers are texts too (MVBench, MathVista)."""
    return any(_holds(record.get(name)) for name in ("choices", "candidates"))


def _letter(
    answers: Sequence[str], options: Mapping[str, str], raw: Any, *, texts: bool, indexed: bool = False
) -> str:
    """Letter of the right option: named, counted from 0, or by its text, which comes first if `texts`: options may be
    letters themselves ("a", "c", "b"). `indexed`: a number that is written as text is counted too.
    """
    if not answers or not options:
        return ""
    if indexed and isinstance(raw, str) and raw.strip().isdecimal():
        raw = int(raw)
    if isinstance(raw, int) and not isinstance(raw, bool):
        return list(options)[raw] if 0 <= raw < len(options) else ""
    said = answers[0].strip()
    bare = said.strip("()[]. ").upper()
    equal = [letter for letter, text in options.items() if text.strip() == said]
    if bare in options and len(said) <= 3 and not (texts and len(equal) == 1):
        return bare
    return equal[0] if len(equal) == 1 else ""


def _bare(question: str, pictures: int) -> str:
    """The question without tags of pictures, which are shown before it; of several they keep their numbers."""
    if pictures and question.count("<image>") != pictures:
        question = question.replace("<image>\n", "").replace("<image>", "")
    return _REFERENCE.sub(lambda m: f"Image-{m[1]}" if pictures > 1 else "", question)


def _group(sources: Sequence[Source], video: str | None, key: str) -> str:
    names = [_name(source) for source in sources]
    return "+".join([*names, *([video] if video else [])]) or key


def _name(source: Source) -> str:
    if isinstance(source, Stored):
        return source.key
    return hashlib.blake2b(source, digest_size=12).hexdigest() if isinstance(source, bytes) else str(source)


def _path(text: str, root: Path | None) -> Path:
    return Path(text) if root is None or Path(text).is_absolute() else root / text


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if _holds(record.get(name))), None)


def _holds(value: Any) -> bool:
    """Whether a field says something: empty cells of tables come as "" or NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    return not (isinstance(value, str | list | tuple | bytes | dict) and len(value) == 0)


def _cell(value: Any) -> str:
    return _number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _number(value: float) -> str:
    return (
        str(int(value))
        if isinstance(value, float) and value.is_integer() and abs(value) < 1e15
        else str(value)
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        listed = parse_list(value)
        return value if listed is None else listed
    return list(value) if isinstance(value, tuple) else value


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(str(name) for name in list(record)[:8]) or "no fields"
