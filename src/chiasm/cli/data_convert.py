"""``chiasm data convert SRC DST --to FORMAT``: a data set in another public format, sample by sample without loss."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from chiasm.cli.terminal import note, paint
from chiasm.errors import UsageError

__all__ = ["DataFormat", "SourceFormat", "choose_set", "convert_data_command", "counting"]


class DataFormat(StrEnum):
    """The formats that can be written."""

    INTERNVL = "internvl"
    LLAVA = "llava"
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    PARQUET = "parquet"
    WEBDATASET = "webdataset"


class SourceFormat(StrEnum):
    """The formats that can be read."""

    AUTO = "auto"
    INTERNVL = "internvl"
    LLAVA = "llava"
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    PARQUET = "parquet"
    WEBDATASET = "webdataset"


def convert_data_command(
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="File with rows, a glob of shards, or a meta file (choose with --set).",
            show_default=False,
        ),
    ],
    dst: Annotated[
        Path,
        typer.Argument(
            metavar="DST",
            help="File to write (.jsonl, .json, .parquet, .tar); with webdataset also a folder of shards.",
            show_default=False,
        ),
    ],
    to: Annotated[DataFormat, typer.Option("--to", help="Format to write.", show_default=False)],
    root: Annotated[
        str, typer.Option("--root", metavar="FOLDER", help="Folder that SRC's media paths are under.")
    ] = "",
    source_format: Annotated[
        SourceFormat, typer.Option("--format", help="Of SRC; auto goes by its content.")
    ] = SourceFormat.AUTO,
    name: Annotated[
        str | None,
        typer.Option("--set", metavar="NAME", help="Which data set of a meta file.", show_default=False),
    ] = None,
    drop: Annotated[
        bool,
        typer.Option(
            "--drop", help="Leave out samples that are malformed or do not fit, and list them on stderr."
        ),
    ] = False,
    per_shard: Annotated[
        int, typer.Option("--per-shard", metavar="N", min=1, help="Samples of one shard of a folder.")
    ] = 1000,
    force: Annotated[bool, typer.Option("--force", help="Replace DST.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Write a data set in another format.

    Every row is read back before it is written and must say the same: turns, places of media, all fields beside.
    Pictures are never encoded again; those that a format of paths cannot hold are saved in DST_images.
    """
    from chiasm.data.write import write_dataset

    dataset = choose_set(src, root=root, source_format=source_format.value, name=name)
    with counting("samples", len(dataset)) as tick:
        done = write_dataset(
            dataset, dst, to.value, drop=drop, force=force, per_shard=per_shard, on_progress=tick
        )
    for where, reason in done.dropped:
        note(f"left out: {where}: {reason}")
    report: dict[str, Any] = {
        "format": to.value,
        "rows": done.rows,
        "files": [str(path) for path in done.files],
        "pictures": done.pictures,
        "root": done.root,
        "dropped": [{"where": where, "reason": reason} for where, reason in done.dropped],
    }
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
        return
    print(
        f"{dst}: {done.rows} samples as {to.value}" + (f", {done.pictures} pictures" if done.pictures else "")
    )
    if done.root is not None:
        print(f"media root: {done.root or '.'}")
    if done.dropped:
        print(f"left out: {len(done.dropped)}")


def choose_set(src: str, *, root: str, source_format: Any, name: str | None) -> Any:
    """Open the one data set that a command works on.

    Raises:
        UsageError: a meta file with several sets and no name, or a name that is not there.
        DataError: as `read_specs` and `DatasetSpec.open`.
    """
    from chiasm.data.datasets import read_specs

    specs = read_specs(src, root=root, format=source_format)
    if name is None and len(specs) > 1:
        raise UsageError(
            f"{src} names {len(specs)} data sets: choose one with --set {' | '.join(list(specs)[:8])}"
        )
    if name is not None and name not in specs:
        raise UsageError(f"{src} has no data set {name!r}: choose one of {', '.join(list(specs)[:8])}")
    name = next(iter(specs)) if name is None else name
    return specs[name].open(name)


class counting:
    """A line on stderr that counts, on a terminal only; gives the function that is told the count."""

    def __init__(self, noun: str, total: int) -> None:
        self.noun, self.total = noun, total
        self.shown = sys.stderr.isatty()
        self.last = self.start = time.monotonic()

    def __enter__(self) -> Callable[[int], None]:
        return self._tick

    def __exit__(self, *error: object) -> None:
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _tick(self, count: int) -> None:
        now = time.monotonic()
        if self.shown and now - self.last > 0.1:
            self.last = now
            rate = count / max(now - self.start, 1e-9)
            left = (self.total - count) / max(rate, 1e-9)
            text = f"{count:,} of {self.total:,} {self.noun}, {rate:,.0f}/s, {left:,.0f} s left"
            print(f"\r\x1b[K{paint(text, 'dim', stream=sys.stderr)}", end="", file=sys.stderr, flush=True)
