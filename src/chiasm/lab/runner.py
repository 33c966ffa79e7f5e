"""The runner: every (experiment, arm, seed) is run once, kept, and never run again under the same definition.

What: ``Store`` (results as small JSON files, one a run, written atomically), ``run_trials`` (what is missing is run, in
this process or in several), ``Result``. A run that is interrupted leaves nothing, so at most one run (a job) is lost.

Where results lie: ``<work>/<system>/<scale>/<purpose>/<experiment>/<fingerprint>/<arm>-<seed>.json``; purpose is
"confirmation" (seeds 0 to 4, test split) or "tuning" (seeds from 100, dev split). The fingerprint of the definition is
part of the path, so results of another definition are never read; they stay, and the report counts them.
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from chiasm.errors import ChiasmError, DataError
from chiasm.eval.store import write_atomic
from chiasm.lab.claim import FIRST_TUNING, Experiment, split_of
from chiasm.lab.verdict import Results

__all__ = ["Job", "Purpose", "Result", "Store", "purpose_of", "run_trials"]

Purpose = Literal["confirmation", "tuning"]
Say = Callable[[str], None]


def purpose_of(seeds: Sequence[int]) -> Purpose:
    """Return what seeds are for; all must be for the same.

    Raises:
        UsageError: a seed is for neither (`split_of`).
        DataError: some are for one and some for the other.
    """
    splits = {split_of(seed) for seed in seeds}
    if len(splits) != 1:
        raise DataError(
            f"seeds {', '.join(map(str, seeds))} mix confirmation and tuning: run them one after the other"
        )
    return "tuning" if seeds[0] >= FIRST_TUNING else "confirmation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run to be made, by names (so that another process can make it)."""

    experiment: str
    arm: str
    seed: int
    scale: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run: its metrics and what it cost and ran on."""

    experiment: str
    arm: str
    seed: int
    fingerprint: str
    split: str
    metrics: dict[str, float | None]
    """None where the value was not a finite number (JSON has none)."""
    cpu_seconds: float
    wall_seconds: float
    started: str
    environment: dict[str, Any]


class Store:
    """Results of one system at one scale for one purpose.

    Args:
        work: folder of all results (``runs/lab``).
        system, scale, purpose: which.
    """

    def __init__(self, work: str | Path, system: str, scale: str, purpose: Purpose) -> None:
        self.folder = Path(work) / system / scale / purpose
        self.system, self.scale, self.purpose = system, scale, purpose

    def path(self, experiment: Experiment, arm: str, seed: int) -> Path:
        """Where the result of a run lies."""
        return self._home(experiment) / f"{arm}-{seed}.json"

    def load(self, experiment: Experiment, arm: str, seed: int) -> Result | None:
        """Return the kept result of a run, None where there is none.

        Raises:
            DataError: the file is there but damaged.
        """
        path = self.path(experiment, arm, seed)
        try:
            result = Result(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}): delete it, its run is then made again") from error
        wanted = (experiment.id, arm, seed, experiment.fingerprint(self.scale), split_of(seed))
        found = (result.experiment, result.arm, result.seed, result.fingerprint, result.split)
        if found != wanted:
            raise DataError(f"{path} holds the result of {found}, not of {wanted}: delete it")
        return result

    def save(self, experiment: Experiment, result: Result) -> None:
        """Keep a result."""
        text = json.dumps(asdict(result), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomic(self.path(experiment, result.arm, result.seed), text + "\n")

    def results(self, experiment: Experiment, seeds: Sequence[int]) -> list[Result]:
        """Return all kept results of these seeds, in the order of seeds and arms."""
        found = (self.load(experiment, arm.name, seed) for seed in seeds for arm in experiment.arms)
        return [result for result in found if result is not None]

    def others(self, experiment: Experiment) -> list[str]:
        """Return the fingerprints of other definitions of this experiment that were run here."""
        home = self._home(experiment)
        return sorted(p.name for p in home.parent.glob("*/") if p.name != home.name and any(p.glob("*.json")))

    def _home(self, experiment: Experiment) -> Path:
        return self.folder / experiment.id / experiment.fingerprint(self.scale)


def as_results(results: Sequence[Result]) -> Results:
    """Return seed -> arm -> metric -> value, as verdicts are made from; NaN for values that are no numbers."""
    table: dict[int, dict[str, dict[str, float]]] = {}
    for r in results:
        metrics = {name: math.nan if value is None else value for name, value in r.metrics.items()}
        table.setdefault(r.seed, {})[r.arm] = metrics
    return table


def run_trials(
    experiments: Sequence[Experiment],
    store: Store,
    seeds: Mapping[str, Sequence[int]],
    *,
    jobs: int = 1,
    home: str | None = None,
    say: Say = lambda line: None,
) -> None:
    """Make every run that is not kept yet, seed by seed, so that early seeds are whole when it is stopped.

    Args:
        experiments: what to run.
        store: where results are kept.
        seeds: experiment -> seeds.
        jobs: runs made at once, each in a process and one thread of its own; timings (``alone``) run one by one.
        home: module whose ``EXPERIMENTS`` other processes find the experiments in; needed for more than one job.
        say: is told one line for each run, made or kept.

    Raises:
        ChiasmError: of a run; what was finished before it is kept. Errors that are no ChiasmError pass as they are.
    """
    by_name = {experiment.id: experiment for experiment in experiments}
    todo: list[Job] = []
    kept = 0
    for experiment in experiments:
        for seed in seeds[experiment.id]:
            for arm in experiment.arms:
                if store.load(experiment, arm.name, seed) is not None:
                    kept += 1
                    continue
                todo.append(Job(experiment=experiment.id, arm=arm.name, seed=seed, scale=store.scale))
    say(f"{len(todo)} runs to make, {kept} kept from before, in {store.folder}")
    shared = [job for job in todo if not by_name[job.experiment].alone]
    alone = [job for job in todo if by_name[job.experiment].alone]
    count = 0
    if jobs > 1 and home is not None and len(shared) > 1:
        finished = _in_processes(shared, home, jobs)
    else:
        finished = ((job, _make(by_name[job.experiment], job)) for job in shared)
    for source in (finished, ((job, _make(by_name[job.experiment], job)) for job in alone)):
        for job, result in source:
            store.save(by_name[job.experiment], result)
            count += 1
            shown = ", ".join(f"{k} {v:.4g}" for k, v in result.metrics.items() if v is not None)
            say(
                f"{count}/{len(todo)} {job.experiment} {job.arm} seed {job.seed}: {shown} "
                f"({result.cpu_seconds:.0f} s CPU)"
            )


def _make(experiment: Experiment, job: Job) -> Result:
    """Make one run in this process, in one thread."""
    import torch

    from chiasm.train.run import environment

    trial = experiment.trial(job.arm, job.seed, job.scale)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the CPU time of small models grows with threads, and their sums change
    try:
        started, wall, worked = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.perf_counter(), time.process_time()
        metrics = experiment.run(trial)
        worked, wall = time.process_time() - worked, time.perf_counter() - wall
        surroundings = environment()
    except ChiasmError as error:
        error.args = (f"{job.experiment}, arm {job.arm}, seed {job.seed}: {error}",)
        raise
    finally:
        torch.set_num_threads(threads)
    return Result(
        experiment=job.experiment,
        arm=job.arm,
        seed=job.seed,
        fingerprint=experiment.fingerprint(job.scale),
        split=trial.split,
        metrics={name: float(v) if math.isfinite(v) else None for name, v in metrics.items()},
        cpu_seconds=round(worked, 2),
        wall_seconds=round(wall, 2),
        started=started,
        environment=surroundings,
    )


def _in_processes(todo: Sequence[Job], home: str, jobs: int) -> Iterator[tuple[Job, Result]]:
    """Yield results as they come; what has not begun when an error or an interruption comes is dropped."""
    pool = ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    waiting: dict[Future[Result], Job] = {}
    left = list(todo)
    try:
        while left or waiting:
            while left and len(waiting) < jobs:
                job = left.pop(0)
                waiting[pool.submit(_elsewhere, home, job)] = job
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Let a killed parent take this process along; it would otherwise go on for as long as its runs take."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _elsewhere(home: str, job: Job) -> Result:
    """Make one run in a process that has only names."""
    experiments: Sequence[Experiment] = importlib.import_module(home).EXPERIMENTS
    return _make(next(e for e in experiments if e.id == job.experiment), job)
