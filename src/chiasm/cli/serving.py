"""What ``doctor --serve`` and ``convert --for`` say about a folder and the servers that shall read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chiasm.cli.terminal import note, paint
from chiasm.errors import CheckpointError

if TYPE_CHECKING:
    from chiasm.checkpoint.serving import Server

__all__ = ["note_serving", "report_serving"]

_MARKS = {
    "ok": ("ok", "green"),
    "missing": ("no", "red"),
    "refused": ("no", "red"),
    "differs": ("!=", "yellow"),
}


def note_serving(folder: Path, server: Server) -> None:
    """Tell in what a server that can read the folder computes something else than the model."""
    from chiasm.checkpoint.serving import check_serving

    for finding in check_serving(folder, server).of("differs"):
        note(f"{server}: {finding}")


def report_serving(folder: Path, servers: Sequence[Server], *, as_json: bool) -> None:
    """Print what each server finds in the folder.

    Raises:
        CheckpointError: none of the servers can read it (or the folder is no InternVL checkpoint).
    """
    from chiasm.checkpoint.serving import RELEASES, check_serving

    found = [check_serving(folder, server) for server in servers]
    if as_json:
        print(json.dumps([one.to_dict() for one in found], ensure_ascii=False))
    else:
        for one in found:
            verdict = paint("can read it", "green") if one.ready else paint("cannot read it", "red")
            print(f"{one.server} {RELEASES[one.server]}: {verdict} ({one.layout} layout)")
            for finding in one.findings:
                mark, colour = _MARKS[finding.status]
                print(f"  {paint(mark, colour)}  {finding}")
    if not any(one.ready for one in found):
        first = found[0].of("refused", "missing")[0]
        raise CheckpointError(f"{folder} cannot be served by {', '.join(servers)}: {first}")
