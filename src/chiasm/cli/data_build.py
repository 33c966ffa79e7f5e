"""``chiasm data build WORLD DST``: write a world in a public format.

The paths of what was written are printed on stdout, progress goes to stderr. Stopped at any time, the same command
goes on where it stood.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from chiasm.cli.terminal import note
from chiasm.errors import DataError, UsageError

__all__ = ["build", "build_command", "parse_settings"]

FORMATS = ("internvl", "coco")


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` settings of a world: JSON values; else a list where there are commas; else a word.

    Raises:
        UsageError: no ``=``, no key, or a key twice.
    """
    out: dict[str, Any] = {}
    for item in settings:
        key, sign, text = (part.strip() for part in item.partition("="))
        if not sign or not key:
            raise UsageError(f"--set {item!r} has no '=': write it as key=value, for example pixels=128")
        if key in out:
            raise UsageError(f"--set {key} is given twice: leave one of them out")
        try:
            out[key] = json.loads(text)
        except json.JSONDecodeError:
            parts = [part.strip() for part in text.split(",")]
            out[key] = [_word(part) for part in parts] if len(parts) > 1 else parts[0]
    return out


def _word(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def build(
    world: str,
    target: str | Path,
    *,
    split: str = "train",
    n: int | None = None,
    settings: Sequence[str] = (),
    formats: Sequence[str] = ("internvl",),
    images: str = "png",
    clips: str = "frames",
    report: Any = None,
) -> dict[str, Any]:
    """Write a world; return {"world", "split", "samples", "files": format -> path}.

    Args:
        world: its family.
        target: folder that receives the files.
        split: "train", "dev" or "test".
        n: number of samples; default: all.
        settings: ``key=value`` options of the world.
        formats: "internvl" (meta and JSONL), "coco" (boxes and masks), or both.
        images: "png" or "jpeg".
        clips: "frames", "mp4" or "gif".
        report: called with (samples done, samples in all).

    Raises:
        UsageError: unknown format, malformed setting, or a value that is not of the option's type.
        DataError: as ``open_world`` and the writers; or a file cannot be written.
    """
    from chiasm.worlds import open_world, write_coco, write_jsonl

    options = parse_settings(settings)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UsageError(f"unknown format {', '.join(unknown) or 'none'}: choose among {', '.join(FORMATS)}")
    try:
        # A split longer than the default is asked for by n alone.
        if n is not None and "size" not in options:
            options = _with_size(world, n, options)
        opened = open_world(world, split, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"a --set value does not fit the world {world} ({error}): see its options"
        ) from error
    count = len(opened) if n is None else n
    files: dict[str, str] = {}
    for name in dict.fromkeys(formats):
        try:
            if name == "internvl":
                path = write_jsonl(
                    opened, target, count, images=_picture(images), clips=_clip(clips), progress=report
                )
            else:
                path = write_coco(opened, target, count, images=_picture(images), progress=report)
        except OSError as error:
            place = error.filename or target
            raise DataError(f"{place} cannot be read or written ({error.strerror or error})") from error
        files[name] = str(path)
    return {"world": world, "split": split, "samples": count, "files": files}


def _with_size(world: str, n: int, options: dict[str, Any]) -> dict[str, Any]:
    from chiasm.worlds import options_of

    return {**options, "size": n} if "size" in options_of(world) else options


def _picture(images: str) -> Any:
    if images not in ("png", "jpeg"):
        raise UsageError(f"--images {images}: choose png or jpeg")
    return images


def _clip(clips: str) -> Any:
    if clips not in ("frames", "mp4", "gif"):
        raise UsageError(f"--clips {clips}: choose frames, mp4 or gif")
    return clips


def build_command(
    world: Annotated[
        str,
        typer.Argument(
            metavar="WORLD", help="scenes, grounding, pages, charts, clips, …", show_default=False
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder for the files.", show_default=False)],
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "train",
    n: Annotated[int | None, typer.Option("--n", help="Number of samples; all by default.", min=1)] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Option of the world: pixels=128 (repeatable).")
    ] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="internvl (default) or coco (repeatable).")
    ] = None,
    images: Annotated[str, typer.Option(help="Pictures as png or jpeg.")] = "png",
    clips: Annotated[str, typer.Option(help="Clips as frames, mp4 or gif.")] = "frames",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Write a world with exact ground truth in a public format. Stopped, the same command goes on."""
    with _Shown(f"{world}/{split}") as shown:
        result = build(
            world,
            target,
            split=split,
            n=n,
            settings=settings or (),
            formats=formats or ("internvl",),
            images=images,
            clips=clips,
            report=shown,
        )
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    for path in result["files"].values():
        print(path)


class _Shown:
    """Progress on stderr: a bar at a terminal, else a line now and then."""

    def __init__(self, title: str, every: float = 15.0) -> None:
        self._title, self._every, self._spoken = title, every, time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> _Shown:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(file=sys.stderr))
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(self._title, total=total)
            self._bar.update(self._task, completed=done, total=total)
        elif time.monotonic() - self._spoken >= self._every:
            self._spoken = time.monotonic()
            note(f"{self._title}: {done} of {total}")
