"""``chiasm convert SRC DST --to original|hf|hf-old``: an InternVL checkpoint in another public layout."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from chiasm.cli.terminal import note, waiting

__all__ = ["convert_command"]


class Layout(StrEnum):
    """The layouts that can be written."""

    ORIGINAL = "original"
    HF = "hf"
    HF_OLD = "hf-old"


def convert_command(
    src: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="Checkpoint folder, in any of the layouts.", show_default=False),
    ],
    dst: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to write; whole or not at all.", show_default=False)
    ],
    to: Annotated[
        Layout,
        typer.Option(
            "--to",
            help="original (remote code), hf (transformers) or hf-old (before its release 5).",
            show_default=False,
        ),
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it is a checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Write an InternVL checkpoint in another public layout.

    The weights stay the same, bit by bit; config, tokenizer and processor files are translated.
    """
    from chiasm.checkpoint.convert import convert

    with waiting(f"converting {src}"):
        report = convert(src, dst, to.value, force=force)
    if as_json:
        print(json.dumps(report.to_dict(), ensure_ascii=False))
        return
    files = f", {len(report.files)} other file(s)" if report.files else ""
    print(
        f"{report.folder}: {report.tensors} tensors, {report.bytes / 1e6:,.1f} MB in {len(report.shards)} file(s)"
        f"{files}; {report.source} -> {report.target}"
    )
    for line in report.notes:
        note(line)
