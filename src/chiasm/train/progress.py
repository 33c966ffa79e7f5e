"""How a run reports itself: a bar on a terminal, plain lines in a pipe. Always on the stream given (stderr)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TextIO

__all__ = ["Progress"]


class Progress:
    """Loss, samples per second and remaining time of a run.

    Args:
        steps: of the whole run.
        stream: where to write; a rich bar if it is a terminal.
        every: seconds between plain lines.
    """

    def __init__(self, steps: int, stream: TextIO, *, every: float = 10.0) -> None:
        self.steps, self.stream, self.every = steps, stream, every
        self._bar: Any = None
        self._task: Any = None
        self._spoken = self._started = time.perf_counter()
        self._samples = 0
        self._first: int | None = None

    def __enter__(self) -> Progress:
        self._spoken = self._started = time.perf_counter()
        self._samples, self._first = 0, None
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
        """Report one finished step of ``samples`` samples."""
        now = time.perf_counter()
        if self._first is None:
            self._first = step - 1
        self._samples += samples
        speed = self._samples / max(now - self._started, 1e-9)
        text = f"loss {row['loss']:.4f}  {speed:.1f} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif now - self._spoken >= self.every or step == self.steps:
            self._spoken = now
            left = (self.steps - step) * (now - self._started) / max(step - self._first, 1)
            print(f"step {step}/{self.steps}  {text}  {_clock(left)} left", file=self.stream, flush=True)

    def say(self, line: str) -> None:
        """Write one line of prose."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
