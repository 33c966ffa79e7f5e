"""Feed: which micro-batches a step has, and Loader: having them ready before the step asks.

What: the protocol ``Feed``, ``MixtureFeed`` (today's ``Source`` behind it), ``Loader``.
Source: design of this package (no paper).

A step is ``recipe.accumulate`` micro-batches, its *parts*. Deciding what they hold (``plan``) is cheap and goes step
by step in one thread, because a packer looks ahead and remembers; reading and decoding (``load``) is dear and has no
order, so a pool of threads does it. What a plan depends on is plain data (``state``), and every step carries the
state *after* its own plan, however far ahead planning has run: a checkpoint of step s therefore continues with the
samples of the next.

Part p belongs to process p % world, and every process plans all parts. What a part holds depends neither on the number
of processes nor on the number of threads.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from chiasm.data.mixture import Draw, Mixture, generator
from chiasm.errors import ConfigError
from chiasm.train.data import Source
from chiasm.train.recipe import Recipe
from chiasm.train.run import RunFolder

__all__ = ["Feed", "Loader", "MixtureFeed", "Part", "Step", "open_feed"]


@runtime_checkable
class Feed(Protocol):
    """Micro-batches of consecutive optimiser steps.

    It may also have ``capacity``, a mapping from "tokens" and "tiles" to what a part holds at most, from which the
    trainer reckons its fill, and ``about(steps) -> str``, a line for the log.
    """

    def plan(self, step: int) -> list[Any]:
        """Return the handles of all micro-batches of this step; called for consecutive steps, never twice at once."""
        ...

    def load(self, handle: Any, *, step: int, part: int) -> Any | None:
        """Return one micro-batch, with a method ``to(device)``, on the CPU; None where all its samples are bad.

        Called from several threads at once, also while a later step is planned.
        """
        ...

    def names(self, handle: Any) -> list[str]:
        """Return "set where" of each sample, in the order of the documents of its batch."""
        ...

    def state(self) -> dict[str, Any]:
        """Return, as JSON data of its own, all that the next ``plan`` depends on beside the recipe."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Take such a state back."""
        ...


class MixtureFeed:
    """The stateless feed of a ``Source``: draws of a ``Mixture``, fetched with a generator of (seed, step, part).

    Args:
        source: the training set; its ``fetch`` may be called by several threads at once.
        recipe: its batch, accumulate and seed are read.
    """

    def __init__(self, source: Source, recipe: Recipe) -> None:
        self.source, self.parts, self.seed = source, recipe.accumulate, recipe.seed
        self.mixture = Mixture(source.sizes, source.weights, batch=recipe.batch, seed=recipe.seed)

    def plan(self, step: int) -> list[list[Draw]]:
        """Return the step's draws, cut into equal parts."""
        draws = self.mixture.batch_indices(step)
        size = len(draws) // self.parts
        return [draws[part * size : (part + 1) * size] for part in range(self.parts)]

    def load(self, handle: list[Draw], *, step: int, part: int) -> Any:
        """Fetch the draws."""
        return self.source.fetch(handle, generator(self.seed, "augment", step, part))

    def names(self, handle: list[Draw]) -> list[str]:
        """Return "family index" of each draw."""
        return [f"{family} {index}" for family, index in handle]

    def state(self) -> dict[str, Any]:
        """Return nothing: the draws of a step are a function of its number."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Refuse the state of another kind of feed."""
        if state:
            raise ConfigError("the checkpoint's data was packed, this recipe's is not: resume its own recipe")

    def about(self, steps: int) -> str:
        """Say how often each family is read."""
        passes = self.mixture.epochs(steps)
        return "passes over the data: " + ", ".join(f"{name} {n:.3g}" for name, n in passes.items())


def open_feed(source: Any, recipe: Recipe, run: RunFolder) -> Feed:
    """Return the source's own feed (a method ``feed(recipe, run)``), else the mixture of its families."""
    own = getattr(source, "feed", None)
    return own(recipe, run) if own is not None else MixtureFeed(source, recipe)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One loaded micro-batch: its place in the step, the feed's handle, and the batch (None: nothing in it is good)."""

    number: int
    handle: Any
    batch: Any | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one process trains on in one step.

    Attributes:
        step: its number, from 0.
        handles: of all parts of the step, also those of other processes.
        parts: this process's, in order.
        state: the feed's state after this step was planned.
        waited: seconds that the caller waited for all this.
    """

    step: int
    handles: list[Any]
    parts: list[Part]
    state: dict[str, Any]
    waited: float


class Loader:
    """Steps ``first`` … ``stop - 1`` of a feed, in order, planned and loaded ahead.

    An exception in ``plan`` or ``load`` surfaces at the step that it belongs to, after all earlier ones were handed
    out. Use it as a context: leaving it, for whatever reason, ends its threads.

    Args:
        feed: where it is now must be before step ``first``.
        first: the first step.
        stop: one past the last step.
        parts: numbers of the parts that this process loads.
        threads: that load; 0 plans and loads when asked, in the caller's thread.
        depth: parts that are loaded or under way before they are asked for, at most; None: twice the threads.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        first: int,
        stop: int,
        parts: Sequence[int],
        threads: int = 1,
        depth: int | None = None,
    ) -> None:
        depth = 2 * threads if depth is None else depth
        if threads < 0 or (threads and depth < 1):
            raise ConfigError(f"a loader needs threads >= 0 and depth >= 1, got {threads} and {depth}")
        self.feed, self.first, self.stop, self.parts = feed, first, stop, tuple(parts)
        self.threads = threads
        self._ended = threading.Event()
        self._slots = threading.Semaphore(depth)
        # Bounded by the slots, and by one entry a step of which this process has no part to load.
        self._ready: queue.Queue[Future[Any] | tuple[int, list[Any], dict[str, Any]] | BaseException] = (
            queue.Queue(maxsize=depth + 2)
        )
        self._planner: threading.Thread | None = None
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Loader:
        if self.threads:
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="chiasm-load")
            self._planner = threading.Thread(target=self._plan_ahead, name="chiasm-plan", daemon=True)
            self._planner.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._slots.release()  # the planner may be waiting for a place
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._planner is not None:
            self._planner.join()
        self._planner = self._pool = None

    def __iter__(self) -> Iterator[Step]:
        for step in range(self.first, self.stop):
            started = time.perf_counter()
            handles, batches, state = self._take() if self.threads else self._now(step)
            loaded = [
                Part(number=p, handle=handles[p], batch=b) for p, b in zip(self.parts, batches, strict=True)
            ]
            waited = time.perf_counter() - started
            yield Step(step=step, handles=handles, parts=loaded, state=state, waited=waited)

    def _now(self, step: int) -> tuple[list[Any], list[Any], dict[str, Any]]:
        """The slow obvious twin: plan, then load one part after the other."""
        handles = self.feed.plan(step)
        state = self.feed.state()
        return handles, [self.feed.load(handles[p], step=step, part=p) for p in self.parts], state

    def _take(self) -> tuple[list[Any], list[Any], dict[str, Any]]:
        batches = []
        while True:
            item = self._ready.get()
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, tuple):
                _, handles, state = item
                return handles, batches, state
            batches.append(item.result())
            self._slots.release()

    def _plan_ahead(self) -> None:
        try:
            for step in range(self.first, self.stop):
                handles = self.feed.plan(step)
                state = self.feed.state()
                for part in self.parts:
                    self._slots.acquire()
                    if self._ended.is_set() or self._pool is None:
                        return
                    self._put(self._pool.submit(self.feed.load, handles[part], step=step, part=part))
                self._put((step, handles, state))
                if self._ended.is_set():
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._ended.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
