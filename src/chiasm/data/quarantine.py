"""Bad samples: left out, counted and listed, and the run is stopped where they are too many.

Nothing is put in the place of a bad sample in silence. Each is written once, as a line of JSON with its place and the
reason, so that people can repair the data set; a policy says how many are too many.
Source: design of this package (InternVL's loader draws another sample instead and goes on).
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chiasm.errors import ConfigError, DataError

__all__ = ["Quarantine", "QuarantinePolicy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantinePolicy:
    """How many bad samples a run bears.

    Attributes:
        max_share: of the samples seen; above it the run stops. 0 stops at the first one, 1 never.
        min_seen: samples that must have been seen before the share counts (not for 0, which needs no sample).
        max_count: bad samples above which the run stops, whatever their share; None: any number.

    Raises:
        ConfigError: out of range.
    """

    max_share: float = 0.01
    min_seen: int = 1000
    max_count: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.max_share <= 1 or math.isnan(self.max_share):
            raise ConfigError(f"max_share must lie in 0..1, got {self.max_share!r}")
        if self.min_seen < 0:
            raise ConfigError(f"min_seen must be at least 0, got {self.min_seen!r}")
        if self.max_count is not None and self.max_count < 0:
            raise ConfigError(f"max_count must be at least 0, or null, got {self.max_count!r}")


class Quarantine:
    """The list of bad samples of one run. Safe to use from several threads.

    A sample that is bad for one reason is written and counted once, however often it is drawn. After a restart it is
    counted again from the restored state, and not written a second time: the file is read when it is opened.

    Args:
        path: JSON lines, appended to: {"set", "where", "reason"}. None: counted only.
        policy: when to stop.

    Raises:
        DataError: the file cannot be read or written.
    """

    def __init__(self, path: str | Path | None = None, policy: QuarantinePolicy | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.policy = policy or QuarantinePolicy()
        self.counts: dict[str, int] = {}
        self._seen = 0
        self._last = ""
        self._known: set[str] = set()
        self._written: set[str] = set()
        self._lock = threading.Lock()
        if self.path is not None and self.path.exists():
            self._read()

    @property
    def total(self) -> int:
        """Bad samples so far."""
        return sum(self.counts.values())

    def seen(self, count: int = 1) -> None:
        """Tell that samples were drawn, good or bad.

        Raises:
            DataError: the policy is passed.
        """
        with self._lock:
            self._seen += count
            self._judge()

    def add(self, where: str, dataset: str, reason: str) -> None:
        """List a bad sample.

        Args:
            where: its place, as `Dataset.where` gives it.
            dataset: name of its set.
            reason: one line; the place at its beginning is left out.

        Raises:
            DataError: the policy is passed; the list cannot be written.
        """
        reason = " ".join(reason.split()).removeprefix(where).lstrip(": ")
        mark = _mark(dataset, where, reason)
        with self._lock:
            if mark in self._known:
                return
            if self.path is not None and mark not in self._written:
                self._append({"set": dataset, "where": where, "reason": reason})
                self._written.add(mark)
            self._known.add(mark)
            self.counts[dataset] = self.counts.get(dataset, 0) + 1
            self._last = f"{where}: {reason}"
            self._judge()

    def summary(self) -> str:
        """One line: how many of how many, and of which sets."""
        sets = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
        return f"{self.total} of {self._seen} samples left out" + (f" ({sets})" if sets else "")

    def state(self) -> dict[str, Any]:
        """JSON data from which `restore` continues."""
        with self._lock:
            return {
                "seen": self._seen,
                "counts": dict(self.counts),
                "known": sorted(self._known),
                "last": self._last,
            }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`; what the file lists beyond it is counted when it is met again."""
        with self._lock:
            self._seen = int(state["seen"])
            self.counts = {str(name): int(count) for name, count in state["counts"].items()}
            self._known = set(state["known"])
            self._last = str(state.get("last", ""))

    def _judge(self) -> None:
        count, policy = self.total, self.policy
        if not count:
            return
        limit = ""
        if policy.max_count is not None and count > policy.max_count:
            limit = f"more than {policy.max_count}"
        elif policy.max_share == 0:
            limit = "and none is allowed"
        elif self._seen >= max(policy.min_seen, 1) and count > policy.max_share * self._seen:
            limit = f"more than {100 * policy.max_share:g} %"
        if limit:
            listed = f"; all are listed in {self.path}" if self.path is not None else ""
            raise DataError(
                f"{count} of {max(self._seen, count)} samples cannot be used, {limit}: repair the data or raise the "
                f"limit{listed}; the last one is {self._last}"
            )

    def _append(self, entry: dict[str, str]) -> None:
        assert self.path is not None
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(line)
        except OSError as error:
            raise DataError(
                f"{self.path}: the list of bad samples cannot be written ({error.strerror})"
            ) from error

    def _read(self) -> None:
        """Learn what is written already; a last line that was cut off by a kill is taken away."""
        assert self.path is not None
        try:
            data = self.path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                with self.path.open("r+b") as file:
                    file.truncate(len(whole))
        except OSError as error:
            raise DataError(
                f"{self.path}: the list of bad samples cannot be read ({error.strerror})"
            ) from error
        for number, line in enumerate(whole.decode("utf-8", "surrogateescape").split("\n")[:-1], 1):
            try:
                entry = json.loads(line)
                self._written.add(_mark(entry["set"], entry["where"], entry["reason"]))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{self.path}:{number}: is no entry of a list of bad samples; move the file away"
                ) from error


def _mark(dataset: str, where: str, reason: str) -> str:
    """What a sample and a reason are remembered by: checkpoints stay small with many of them."""
    text = "\0".join((dataset, where, reason)).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=8).hexdigest()
