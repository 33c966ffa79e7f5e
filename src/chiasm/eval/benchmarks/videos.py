"""Videos of benchmarks and their subtitles: where they lie, what they say, and what is on screen at a frame.

Video-MME, LongVideoBench, MLVU, NExT-QA, EgoSchema, PerceptionTest and ActivityNet-QA name videos by id, with or
without an ending, and unpack them into folders of several names. Nothing is opened here but subtitle files.

Subtitles are SubRip (``.srt``), WebVTT (``.vtt``) or LongVideoBench's JSON. Of a video of which some frames are shown,
those lines are shown that are on screen at one of them, each once: more would tell what was not looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chiasm.errors import DataError
from chiasm.media.video import VIDEO_SUFFIXES

__all__ = ["Line", "find_subtitles", "find_video", "read_subtitles", "shown_at"]

_FOLDERS = ("", "video", "videos", "data")
_SUBTITLE_FOLDERS = ("", "subtitle", "subtitles")
_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
_SUBTITLE_SUFFIXES = (".srt", ".vtt", ".json")
_TIME = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2})(?:[.,](\d+))?")
_SPAN = re.compile(rf"({_TIME.pattern})\s*-->\s*({_TIME.pattern})")
_MARKUP = re.compile(r"<[^>]*>|\{\\[^}]*\}")


@dataclass(frozen=True, slots=True)
class Line:
    """What is shown from `start` to `end`, in seconds."""

    start: float
    end: float
    text: str


def find_video(name: str, root: Path | None, tasks: Sequence[str] = ()) -> Path:
    """The file or folder of frames that a benchmark means.

    A path that is there is taken as it stands. Otherwise it is looked for in the folders that public archives have
    (``video``, ``videos``, ``data``, and those of the `tasks` in them), with the usual endings where it has none, and
    with ActivityNet's ``v_`` before it. What is nowhere is named by its plain path: asking about it says so.
    """
    given = Path(name)
    if given.is_absolute() or root is None:
        return given
    endings = [""] if given.suffix.lower() in VIDEO_SUFFIXES else ["", *_SUFFIXES]
    folders = [root / folder for folder in _FOLDERS]
    folders += [root / folder / task for folder in _FOLDERS for task in dict.fromkeys(tasks) if task]
    for folder in folders:
        for ending in endings:
            for stem in (name, str(given.with_name(f"v_{given.name}"))):
                if (found := folder / f"{stem}{ending}").exists():
                    return found
    return root / (name if len(endings) == 1 or given.suffix else f"{name}{_SUFFIXES[0]}")


def find_subtitles(names: Iterable[str], root: Path | None) -> str | None:
    """The subtitle file of a video by any of its names (file or id), or None."""
    if root is None:
        return None
    for name in names:
        ends = [""] if Path(name).suffix.lower() in _SUBTITLE_SUFFIXES else _SUBTITLE_SUFFIXES
        for folder in _SUBTITLE_FOLDERS:
            for ending in ends:
                stem = (
                    name if ending == "" else str(Path(name).with_suffix("")) if _video_like(name) else name
                )
                if (found := root / folder / f"{stem}{ending}").is_file():
                    return str(found)
    return None


def _video_like(name: str) -> bool:
    return Path(name).suffix.lower() in VIDEO_SUFFIXES


def read_subtitles(path: str | Path) -> list[Line]:
    """All lines of a subtitle file, in order of time.

    Raises:
        DataError: no such file, not text, or nothing in it that is a subtitle.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise DataError(f"{path.name}: the subtitles cannot be read ({error.strerror})") from error
    lines = _of_json(text, path) if path.suffix.lower() == ".json" else _of_blocks(text)
    if not lines and text.strip():
        raise DataError(
            f"{path.name}: is no subtitle file (.srt, .vtt, or a JSON list with start, end and line)"
        )
    return sorted(lines, key=lambda line: (line.start, line.end))


def shown_at(lines: Sequence[Line], times: Iterable[float] | None = None) -> str:
    """The texts that are on screen at one of these seconds, each line once, in order; None: all of them."""
    if times is None:
        kept = list(lines)
    else:
        moments = sorted(times)
        kept = [line for line in lines if any(line.start <= when < line.end for when in moments)]
    out: list[str] = []
    for line in kept:
        if line.text and line.text not in out[-1:]:
            out.append(line.text)
    return " ".join(out)


def _of_blocks(text: str) -> list[Line]:
    """SubRip and WebVTT: a span of time, then lines of text up to a blank one."""
    out = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        rows = block.strip("\n").split("\n")
        at = next((n for n, row in enumerate(rows) if "-->" in row), None)
        if at is None:
            continue
        span = _SPAN.search(rows[at])
        if span is None:
            continue
        start, end = (_seconds(part) for part in (span[1], span[6]))
        out.append(Line(start, end, _plain(" ".join(rows[at + 1 :]))))
    return out


def _of_json(text: str, path: Path) -> list[Line]:
    """[{"start": "00:00:05.3", "end": …, "line": …}] or [{"timestamp": [5.3, 8.0], "text": …}]."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{path.name}: the subtitles are not JSON") from None
    out = []
    for n, row in enumerate(rows if isinstance(rows, list) else []):
        try:
            start, end = row["timestamp"] if "timestamp" in row else (row["start"], row["end"])
            said = row["line"] if "line" in row else row["text"]
            out.append(Line(_seconds(start), _seconds(end), _plain(str(said))))
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path.name}[{n}] needs start, end and line (or timestamp and text)") from None
    return out


def _seconds(given: Any) -> float:
    if isinstance(given, int | float) and not isinstance(given, bool):
        return float(given)
    if given is None:
        return float("inf")  # LongVideoBench's last line has no end
    found = _TIME.fullmatch(str(given).strip())
    if found is None:
        raise ValueError(given)
    hours, minutes, seconds, part = found.groups()
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + float(f"0.{part or 0}")


def _plain(text: str) -> str:
    return " ".join(_MARKUP.sub("", text).split())
