"""The linter: one lazy pass over data sets, and what is wrong with them by file and line.

It is right about training by construction: rows are read, rendered and counted by the code that training uses
(`chiasm.data.lint.sample`), what that code refuses is an error (rule C008 at the latest), and "no error" means that
`layout(..., train=True)` succeeds, but for damage behind a picture's header, which takes `decode`.

One pass, in order. Rows are read and judged by themselves in threads, a bounded number ahead; rules over sets see them
one by one. Memory: the findings shown (a few for each rule), digests for duplicates (`chiasm.data.lint.sets`, some 150
bytes a row), counters of fixed size. All findings go to `on_finding` as they come.
"""

from __future__ import annotations

import random
import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

from chiasm.data.layout import LayoutSpec
from chiasm.data.lint import boxes, media, text
from chiasm.data.lint.rules import ROW_CHECKS, RULES, Context, Rule
from chiasm.data.lint.sample import Reader, Sample
from chiasm.data.lint.sets import Answers, Languages, Seen
from chiasm.data.stats import SetStats
from chiasm.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from chiasm.data.datasets import Dataset

__all__ = [
    "Finding",
    "LintOptions",
    "Report",
    "Source",
    "all_rules",
    "collect",
    "lint",
    "open_sources",
    "scan",
]

_ = (media, text)  # their rules enter themselves
Done = TypeVar("Done")
SEVERITIES = ("error", "warning", "note")
_CHUNK = 8  # rows that a thread takes at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A data set to be examined.

    Attributes:
        name: of the set.
        dataset: its rows.
        max_tiles: its own tile limit, None for the layout's.
    """

    name: str
    dataset: Dataset
    max_tiles: int | None = None

    def spec(self, spec: LayoutSpec) -> LayoutSpec:
        """The layout with the set's own tile limit."""
        return spec.limited(self.max_tiles)


@dataclass(frozen=True, slots=True, kw_only=True)
class LintOptions:
    """What is examined, and how.

    Attributes:
        limit: examine only the first so many rows of each set.
        sample: examine so many random rows of each set instead.
        seed: of the random rows.
        decode: open every picture wholly, as training would.
        threads: that read rows ahead.
        first: findings of each rule that the report keeps.
        select: codes, or beginnings of codes ("C3"), of the rules to apply; empty for all.
        ignore: likewise of the rules to leave out.
        pack_tiles: most tiles of a pack; None: not judged.
    """

    limit: int | None = None
    sample: int | None = None
    seed: int = 0
    decode: bool = False
    threads: int = 4
    first: int = 5
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    pack_tiles: int | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "sample", "threads", "pack_tiles"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}")
        if self.limit is not None and self.sample is not None:
            raise ConfigError("limit and sample exclude each other: give one of them")
        for word in (*self.select, *self.ignore):
            if not any(rule.code.startswith(word) or rule.name == word for rule in all_rules()):
                codes = ", ".join(rule.code for rule in all_rules())
                raise ConfigError(f"no rule is called {word!r}: use a code or its beginning, of {codes}")

    def wants(self, code: str) -> bool:
        """Whether a rule is to be applied."""
        name = RULES[code].name
        chosen = not self.select or any(code.startswith(word) or name == word for word in self.select)
        return chosen and not any(code.startswith(word) or name == word for word in self.ignore)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that a rule found.

    Attributes:
        rule: that found it.
        set_name: of the set.
        where: file and line; the set's name for a finding about the whole set.
        index: of the row, None for the whole set.
        message: what, and where in the row.
    """

    rule: Rule
    set_name: str
    where: str
    index: int | None
    message: str

    @property
    def line(self) -> str:
        """As a compiler would say it."""
        return f"{self.where}: {self.rule.severity} {self.rule.code} {self.rule.name}: {self.message}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON lines."""
        return {
            "code": self.rule.code,
            "rule": self.rule.name,
            "severity": self.rule.severity,
            "set": self.set_name,
            "where": self.where,
            "index": self.index,
            "message": self.message,
            "remedy": self.rule.remedy,
        }


@dataclass(slots=True)
class Report:
    """What a run of the linter found.

    Attributes:
        found: findings by code, all counted.
        rows_hit: rows by code.
        examples: the first findings by code.
        stats: of each set, by name.
        seconds: that it took.
        interrupted: the user stopped it; what is here is of the rows so far.
    """

    found: Counter[str] = field(default_factory=Counter)
    rows_hit: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Finding]] = field(default_factory=dict)
    stats: dict[str, SetStats] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def rows(self) -> int:
        """Examined in all sets."""
        return sum(stats.rows for stats in self.stats.values())

    def count(self, severity: str) -> int:
        """Findings of one severity."""
        return sum(n for code, n in self.found.items() if RULES[code].severity == severity)

    @property
    def codes(self) -> list[str]:
        """Of the rules that found something: errors first, then by code."""
        return sorted(self.found, key=lambda code: (SEVERITIES.index(RULES[code].severity), code))

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "rows": self.rows,
            "seconds": round(self.seconds, 3),
            "interrupted": self.interrupted,
            **{f"{severity}s": self.count(severity) for severity in SEVERITIES},
            "rules": {
                code: {
                    "rule": RULES[code].name,
                    "severity": RULES[code].severity,
                    "findings": self.found[code],
                    "rows": self.rows_hit[code],
                    "remedy": RULES[code].remedy,
                    "first": [
                        {"where": one.where, "message": one.message} for one in self.examples.get(code, [])
                    ],
                }
                for code in self.codes
            },
            "sets": {name: stats.as_dict() for name, stats in self.stats.items()},
        }


def all_rules() -> list[Rule]:
    """Every rule, by code."""
    return [RULES[code] for code in sorted(RULES)]


# Opening and reading ---------------------------------------------------------------------------------------------


def open_sources(paths: Sequence[str], *, root: str = "", format: str = "auto") -> list[Source]:
    """Open data sets: annotation files (or globs of shards), and InternVL meta files, which name several.

    Args:
        paths: files.
        root: of the media of annotation files; meta files name their own.
        format: of annotation files.

    Raises:
        DataError: a file cannot be read.
        UsageError: two sets of one name.
    """
    from chiasm.data.datasets import read_specs

    sources = [
        Source(name=name, dataset=spec.open(name), max_tiles=spec.max_tiles)
        for path in paths
        for name, spec in read_specs(path, root=root, format=format).items()  # type: ignore[arg-type]
    ]
    twice = [name for name, times in Counter(source.name for source in sources).items() if times > 1]
    if twice:
        raise UsageError(f"two sets are called {twice[0]!r}: name each once")
    return sources


def chosen(rows: int, limit: int | None, sample: int | None, seed: int) -> Sequence[int]:
    """Indices to examine, rising: all, the first `limit`, or `sample` at random."""
    if sample is not None and sample < rows:
        return sorted(random.Random(seed).sample(range(rows), sample))
    return range(rows if limit is None else min(limit, rows))


def scan(
    sources: Sequence[Source],
    work: Callable[[Source, int], Done],
    *,
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    threads: int = 4,
) -> Generator[tuple[int, int, Done], None, None]:
    """Work through the rows of sets in threads, results in order: (number of the source, index, result).

    At most some 16 rows a thread are under way, so memory does not grow with the rows.
    """
    tasks = (
        (n, indices[at : at + _CHUNK])
        for n, source in enumerate(sources)
        for indices in [chosen(len(source.dataset), limit, sample, seed)]
        for at in range(0, len(indices), _CHUNK)
    )

    def do(n: int, indices: Sequence[int]) -> list[tuple[int, int, Done]]:
        return [(n, index, work(sources[n], index)) for index in indices]

    if threads == 1:
        for task in tasks:
            yield from do(*task)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="chiasm-rows")
    try:
        waiting: deque[Future[list[tuple[int, int, Done]]]] = deque()
        for task in tasks:
            waiting.append(pool.submit(do, *task))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _places(sources: Sequence[Source]) -> tuple[list[int], Callable[[int], str]]:
    """Where each source's running numbers begin, and what says the place of a number."""
    starts = list(accumulate((len(source.dataset) for source in sources), initial=0))

    def where(number: int) -> str:
        n = bisect_right(starts, number) - 1
        return sources[n].dataset.where(number - starts[n])

    return starts, where


# The pass --------------------------------------------------------------------------------------------------------


class _Judge:
    """Reads a row and applies the rules of single rows; used by several threads at once."""

    def __init__(self, sources: Sequence[Source], spec: LayoutSpec, options: LintOptions) -> None:
        self.options = options
        whole = options.wants("C104") or options.wants("C105")
        self.reader = Reader(spec, decode=options.decode, whole=whole)
        self.contexts = {
            source.name: Context(spec=source.spec(spec), pack_tiles=options.pack_tiles) for source in sources
        }
        self.checks = [(code, check) for code, check in sorted(ROW_CHECKS.items()) if options.wants(code)]

    def __call__(self, source: Source, index: int) -> tuple[Sample, list[tuple[str, str]]]:
        context = self.contexts[source.name]
        sample = self.reader.read(source.dataset, index, context.spec)
        found = [(code, message) for code, check in self.checks for message in check(sample, context)]
        # What another error says of the row need not be said again.
        if any(code != "C008" and RULES[code].severity == "error" for code, _ in found):
            found = [one for one in found if one[0] != "C008"]
        return sample, found


def lint(
    sources: Sequence[Source],
    spec: LayoutSpec,
    options: LintOptions | None = None,
    *,
    against: Sequence[Source] = (),
    on_finding: Callable[[Finding], None] | None = None,
    on_progress: Callable[[int, int, Report], None] | None = None,
) -> Report:
    """Examine data sets.

    Args:
        sources: the sets.
        spec: how training will lay them out.
        options: what is examined.
        against: test sets, whose rows and pictures must not occur; always read whole.
        on_finding: told of every finding.
        on_progress: told after every row: rows done, rows in all, the report so far.

    Returns:
        The report; of the rows so far, if the user interrupts (KeyboardInterrupt is not passed on).
    """
    options = options or LintOptions()
    report, begun = Report(), time.perf_counter()
    report.stats = {source.name: SetStats(source.name) for source in sources}
    todo = [len(chosen(len(s.dataset), options.limit, options.sample, options.seed)) for s in sources]
    total = sum(todo) + sum(len(source.dataset) for source in against)
    done = 0

    def tell(code: str, source: Source, index: int | None, message: str) -> None:
        where = source.name if index is None else source.dataset.where(index)
        finding = Finding(rule=RULES[code], set_name=source.name, where=where, index=index, message=message)
        report.found[code] += 1
        kept = report.examples.setdefault(code, [])
        if len(kept) < options.first:
            kept.append(finding)
        if on_finding is not None:
            on_finding(finding)

    def advance() -> None:
        nonlocal done
        done += 1
        report.seconds = time.perf_counter() - begun
        if on_progress is not None:
            on_progress(done, total, report)

    sets = [_OneSet() for _ in sources]
    try:
        tested = _read_tests(against, spec, options, advance)
        _pass(sources, spec, options, tested, sets, report, tell, advance)
    except KeyboardInterrupt:
        report.interrupted = True
    for source, one, rows in zip(sources, sets, todo, strict=True):
        if not rows and options.wants("C007"):
            tell("C007", source, None, "it has no rows")
        for code, message in one.finish():
            if options.wants(code):
                tell(code, source, None, message)
    report.seconds = time.perf_counter() - begun
    return report


class _OneSet:
    """The rules that look at one set as a whole."""

    def __init__(self) -> None:
        self.boxes, self.answers, self.languages = boxes.BoxConvention(), Answers(), Languages()

    def see(self, sample: Sample) -> None:
        self.boxes.see(sample)
        self.answers.see(sample)
        self.languages.see(sample)

    def finish(self) -> Iterator[tuple[str, str]]:
        for code, part in (("C307", self.boxes), ("C604", self.answers), ("C605", self.languages)):
            yield from ((code, message) for message in part.finish())


def _read_tests(
    against: Sequence[Source], spec: LayoutSpec, options: LintOptions, advance: Callable[[], None]
) -> Seen | None:
    """What the test sets hold."""
    if not against:
        return None
    starts, where = _places(against)
    seen, reader = Seen(where), Reader(spec, decode=options.decode, whole=False)
    with closing(scan(against, lambda s, i: reader.read(s.dataset, i), threads=options.threads)) as rows:
        for n, index, sample in rows:
            if sample.record is not None:
                seen.take(sample, starts[n] + index)
            advance()
    return seen


def _pass(
    sources: Sequence[Source],
    spec: LayoutSpec,
    options: LintOptions,
    tested: Seen | None,
    sets: Sequence[_OneSet],
    report: Report,
    tell: Callable[[str, Source, int | None, str], None],
    advance: Callable[[], None],
) -> None:
    """The rows, one by one."""
    starts, where = _places(sources)
    seen, judge = Seen(where), _Judge(sources, spec, options)
    rows = scan(
        sources,
        judge,
        limit=options.limit,
        sample=options.sample,
        seed=options.seed,
        threads=options.threads,
    )
    with closing(rows):
        for n, index, (sample, found) in rows:
            source = sources[n]
            if sample.record is not None:
                sets[n].see(sample)
                found += [one for one in seen.duplicates(sample, starts[n] + index) if options.wants(one[0])]
                if tested is not None:
                    found += [one for one in tested.leaks(sample) if options.wants(one[0])]
            report.stats[source.name].see(sample)
            report.rows_hit.update({code for code, _ in found})
            for code, message in found:
                tell(code, source, index, message)
            advance()


def collect(
    sources: Sequence[Source],
    spec: LayoutSpec,
    *,
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    threads: int = 4,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[SetStats], bool]:
    """Only count, for `chiasm data stats`: the statistics of each set, and whether the user interrupted."""
    reader = Reader(spec, whole=False)
    specs = {source.name: source.spec(spec) for source in sources}
    found = [SetStats(source.name) for source in sources]
    total = sum(len(chosen(len(source.dataset), limit, sample, seed)) for source in sources)

    def read(source: Source, index: int) -> Sample:
        return reader.read(source.dataset, index, specs[source.name])

    try:
        with closing(scan(sources, read, limit=limit, sample=sample, seed=seed, threads=threads)) as rows:
            for done, (n, _, one) in enumerate(rows, 1):
                found[n].see(one)
                if on_progress is not None:
                    on_progress(done, total)
    except KeyboardInterrupt:
        return found, True
    return found, False
