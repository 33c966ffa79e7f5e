"""How a run reports itself: a bar on a terminal, plain lines in a pipe. Always on the stream given (stderr).

Rates are means over the steps since the call began: tokens a second (and of these learned ones), tiles a second, the
share of a pack that is filled, the share of time that the step waited for its samples, remaining time, peak memory.
What a batch cannot tell is left out; without tokens, samples a second stand for them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TextIO

__all__ = ["Progress"]


class Progress:
    """Loss, rates and remaining time of a run.

    Args:
        steps: of the whole run.
        stream: where to write; a rich bar if it is a terminal.
        every: seconds between plain lines.
    """

    def __init__(self, steps: int, stream: TextIO, *, every: float = 10.0) -> None:
        self.steps, self.stream, self.every = steps, stream, every
        self._bar: Any = None
        self._task: Any = None
        self._begin()

    def _begin(self) -> None:
        self._spoken = self._started = time.perf_counter()
        self._sums: dict[str, float] = {}
        self._samples = self._count = 0
        self._loss = float("nan")

    def __enter__(self) -> Progress:
        self._begin()
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn(),
                console=Console(file=self.stream), transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("", total=self.steps)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, step: int, row: Mapping[str, Any], samples: int) -> None:
        """Report one finished step of ``samples`` samples, from its row of metrics."""
        now = time.perf_counter()
        self._samples += samples
        self._count += 1
        self._loss = row.get("loss", self._loss)  # a skipped step has none
        for name in ("tokens", "learned", "tiles", "fill", "wait_seconds"):
            self._sums[name] = self._sums.get(name, 0.0) + (row.get(name) or 0.0)
        text = self.line(max(now - self._started, 1e-9), row.get("memory_mib"))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif now - self._spoken >= self.every or step == self.steps:
            self._spoken = now
            left = (self.steps - step) * (now - self._started) / self._count
            print(f"step {step}/{self.steps}  {text}  {_clock(left)} left", file=self.stream, flush=True)

    def line(self, seconds: float, memory: float | None = None) -> str:
        """Return what is known after so many seconds."""
        sums = self._sums
        said = [f"loss {self._loss:.4f}"]
        if sums.get("tokens"):
            said.append(
                f"{_short(sums['tokens'] / seconds)} tokens/s ({_short(sums['learned'] / seconds)} learned)"
            )
        else:
            said.append(f"{self._samples / seconds:.1f} samples/s")
        if sums.get("tiles"):
            said.append(f"{_short(sums['tiles'] / seconds)} tiles/s")
        if sums.get("fill"):
            said.append(f"fill {sums['fill'] / self._count:.1%}")
        said.append(f"wait {min(sums['wait_seconds'] / seconds, 1.0):.1%}")
        if memory is not None:
            said.append(f"{memory / 1024:.2f} GiB")
        return "  ".join(said)

    def say(self, line: str) -> None:
        """Write one line of prose."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)


def _short(rate: float) -> str:
    return f"{rate:.1f}" if rate < 100 else f"{rate:.0f}" if rate < 10_000 else f"{rate / 1000:.1f}k"


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
