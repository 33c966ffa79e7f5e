"""What an evaluation has already answered: one JSON file per part, written atomically, reused when it is the same.

A part is one family under one condition ("cifar10 as it is", "cifar10 with a blank picture", "text, base model"). It
is *the same* when its identity is equal: model, data, prompt, tiles, options, versions. Date, CPU time and git
revision are recorded beside it and do not count.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Store", "write_atomic"]

#: Seconds of work between two saves of an unfinished part.
SAVE_EVERY = 20.0


class Store:
    """Parts in ``folder/parts``; with ``folder`` None nothing is kept.

    Args:
        folder: of the evaluation.
        record: what is written beside each part for the reader (git revision, machine); not compared.
    """

    def __init__(self, folder: str | Path | None, record: Mapping[str, Any] | None = None) -> None:
        self.folder = None if folder is None else Path(folder) / "parts"
        self.record = dict(record or {})

    def run(
        self,
        name: str,
        identity: Mapping[str, Any],
        todo: int,
        work: Callable[[int, int], Sequence[Any]],
        *,
        batch: int,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return the values of items 0 … todo - 1, computing only those that are not kept, batch by batch.

        An interrupted part continues at the batch where it stopped, so that batches are cut in the same places.

        Args:
            name: of the part.
            identity: plain data; a kept part with another one is discarded.
            todo: number of items.
            work: (first, behind the last) -> their values, plain data.
            batch: items of one call of ``work``.
            report: is told how many items are done.

        Returns:
            values and the record: {"cpu_seconds", "date", ...}.
        """
        identity = json.loads(json.dumps(identity))  # tuples become lists, as they will be read back
        kept = self._read(name)
        fresh = {"cpu_seconds": 0.0} | self.record
        if kept is not None and kept["identity"] == identity:
            values, record = list(kept["values"]), dict(kept["record"])
        else:
            values, record = [], fresh
        report(len(values), todo)
        saved = time.monotonic()
        while len(values) < todo:
            began = time.process_time()
            values += work(len(values), min(len(values) + batch, todo))
            record["cpu_seconds"] = round(record["cpu_seconds"] + time.process_time() - began, 3)
            record["date"] = time.strftime("%Y-%m-%d")
            if len(values) == todo or time.monotonic() - saved > SAVE_EVERY:
                self._write(name, {"identity": identity, "record": record, "values": values})
                saved = time.monotonic()
            report(len(values), todo)
        return values, record

    def _read(self, name: str) -> dict[str, Any] | None:
        if self.folder is None:
            return None
        try:
            kept = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # absent, or torn by something else than us: it is computed again
        whole = isinstance(kept, dict) and {"identity", "record", "values"} <= kept.keys()
        return kept if whole else None

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        if self.folder is not None:
            write_atomic(self.folder / f"{name}.json", json.dumps(content, ensure_ascii=False) + "\n")


def write_atomic(path: Path, text: str) -> None:
    """Write a neighbour file and rename it over ``path``, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
