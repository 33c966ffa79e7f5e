"""What ``doctor --serve`` and ``convert --for`` say about a folder and the servers that shall read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from chiasm.cli.terminal import note, paint
from chiasm.errors import CheckpointError

if TYPE_CHECKING:
    from chiasm.checkpoint.serving import Server

__all__ = ["ServerName", "note_serving", "report_serving"]


class ServerName(StrEnum):
    """The servers of `chiasm.checkpoint.serving`, whose import would be paid for by every command's help."""

    VLLM = "vllm"
    SGLANG = "sglang"
    LMDEPLOY = "lmdeploy"


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


def report_serving(
    folder: Path, servers: Sequence[Server], *, as_json: bool, all_of_them: bool = False
) -> None:
    """Print what each server finds in the folder.

    Args:
        folder: the checkpoint.
        servers: to be told about.
        as_json: as one JSON list.
        all_of_them: fail if one of them cannot read it, not only if none can.

    Raises:
        CheckpointError: the servers cannot read it (or the folder is no InternVL checkpoint).
    """
    from chiasm.checkpoint.serving import RELEASES, check_serving
    from chiasm.hub import model_type

    together = tuple(servers) if all_of_them else ()

    if model_type(folder) == "chiasm-mini":
        raise CheckpointError(
            f"{folder} is a bundle of chiasm-mini (encoder, projector, adapters; no language model): only Chiasm "
            "reads it, try chiasm chat"
        )
    found = [check_serving(folder, server, together) for server in servers]
    if as_json:
        print(json.dumps([one.to_dict() for one in found], ensure_ascii=False))
    else:
        for one in found:
            verdict = paint("can read it", "green") if one.ready else paint("cannot read it", "red")
            print(f"{one.server} {RELEASES[one.server]}: {verdict} ({one.layout} layout)")
            for finding in one.findings:
                mark, colour = _MARKS[finding.status]
                print(f"  {paint(mark, colour)}  {finding}")
    failed = [one for one in found if not one.ready]
    if failed and (all_of_them or len(failed) == len(found)):
        first = failed[0].of("refused", "missing")[0]
        names = ", ".join(one.server for one in failed)
        raise CheckpointError(f"{folder} cannot be served by {names}: {first}")
