"""``chiasm data filter SRC DST --rules …``: keep the good samples of a data set; list the others for people to decide.

A second run with ``--decisions`` follows what people wrote into the list.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from chiasm.cli.data_convert import DataFormat, SourceFormat, choose_set, counting
from chiasm.errors import UsageError

__all__ = ["RULES", "filter_command"]

RULES = ("repetition", "loops", "length", "zeros", "lines")
"""Names of the rules; `score` joins them where there are scores."""


def filter_command(
    src: Annotated[
        str, typer.Argument(metavar="SRC", help="File with rows, a glob, or a meta file.", show_default=False)
    ],
    dst: Annotated[
        Path, typer.Argument(metavar="DST", help="File to write with the samples kept.", show_default=False)
    ],
    rules: Annotated[
        str, typer.Option("--rules", metavar="LIST", help=f"Of {', '.join(RULES)}, with commas; empty: none.")
    ] = ",".join(RULES),
    threshold: Annotated[
        float,
        typer.Option("--repetition", metavar="SHARE", min=0, max=1, help="Threshold of the repetition rule."),
    ] = 0.4,
    scores: Annotated[
        Path | None,
        typer.Option(
            "--scores", metavar="FILE", help='JSON lines {"id", "score"} of a model.', show_default=False
        ),
    ] = None,
    least: Annotated[
        list[str] | None,
        typer.Option(
            "--least",
            metavar="[DOMAIN=]SCORE",
            help="Least score, for all domains or one (repeatable); default 7.",
            show_default=False,
        ),
    ] = None,
    review: Annotated[
        Path | None,
        typer.Option(
            "--review",
            metavar="FILE",
            help="Write each sample that is not kept here, with the reason; change `decision` by hand.",
            show_default=False,
        ),
    ] = None,
    decisions: Annotated[
        Path | None,
        typer.Option(
            "--decisions", metavar="FILE", help="A review list with decisions made.", show_default=False
        ),
    ] = None,
    to: Annotated[
        DataFormat | None,
        typer.Option(
            "--to", help="Format to write; default: internvl, llava, parquet or webdataset by DST's ending."
        ),
    ] = None,
    root: Annotated[
        str, typer.Option("--root", metavar="FOLDER", help="Folder that SRC's media are under.")
    ] = "",
    source_format: Annotated[SourceFormat, typer.Option("--format", help="Of SRC.")] = SourceFormat.AUTO,
    name: Annotated[
        str | None,
        typer.Option("--set", metavar="NAME", help="Which data set of a meta file.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DST.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Leave out samples that rules, scores or people reject.

    What a rule only doubts (loops, lengths, zeros, lines) is left out until a person keeps it: write --review, change
    the decisions, run again with --decisions.
    """
    from chiasm.data.filters import Review, judge_all, read_reviews, write_reviews
    from chiasm.data.write import write_dataset

    dataset = choose_set(src, root=root, source_format=source_format.value, name=name)
    rule = _rule(rules, threshold, scores, least or [])
    if review is not None and review.exists() and not force:
        raise UsageError(f"{review}: exists, and may hold decisions; choose another name, or --force")
    made = None if decisions is None else read_reviews(decisions)
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    others: list[Review] = []

    def kept() -> Iterator[int]:
        for done, (index, verdict) in enumerate(judge_all(dataset, rule, made), 1):
            tick(done)
            counts[verdict.decision] += 1
            if verdict.decision == "kept":
                yield index
            else:
                others.append(verdict)
                reasons[verdict.reason.partition(":")[0] if verdict.key else "malformed"] += 1

    with counting("samples", len(dataset)) as tick:
        chosen = list(kept())
    if review is not None:
        write_reviews(review, others)
    if not chosen:
        raise UsageError(f"{src}: no sample is kept; look at --review, or relax the rules")
    done = write_dataset(dataset, dst, to.value if to else _layout(dst), rows=chosen, force=force)
    report: dict[str, Any] = {
        "seen": sum(counts.values()),
        "kept": done.rows,
        "rejected": counts["rejected"],
        "review": counts["review"],
        "reasons": dict(reasons),
        "files": [str(path) for path in done.files],
        "root": done.root,
    }
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
        return
    print(f"{dst}: {done.rows} of {report['seen']} samples kept")
    print(f"rejected: {counts['rejected']}, to be reviewed: {counts['review']}")
    for reason, count in reasons.most_common():
        print(f"  {reason}: {count}")


def _rule(rules: str, threshold: float, scores: Path | None, least: list[str]) -> Any:
    from chiasm.data.filters import (
        All,
        DuplicateLines,
        Loops,
        ModelScore,
        Repetition,
        SentenceLength,
        ZeroRuns,
        read_scores,
    )

    names = [name.strip() for name in rules.split(",") if name.strip()]
    for name in names:
        if name not in RULES:
            raise UsageError(f"unknown rule {name!r}: use {', '.join(RULES)}")
    if least and scores is None:
        raise UsageError("--least needs --scores FILE")
    made: dict[str, Any] = {
        "repetition": Repetition(threshold=threshold),
        "loops": Loops(),
        "length": SentenceLength(),
        "zeros": ZeroRuns(),
        "lines": DuplicateLines(),
    }
    filters = [made[name] for name in names]
    if scores is not None:
        thresholds = {"": 7.0}
        for entry in least:
            domain, _, number = entry.rpartition("=")
            try:
                thresholds[domain] = float(number)
            except ValueError as error:
                raise UsageError(f"--least {entry}: give a number, or DOMAIN=number") from error
        filters.append(ModelScore(scores=read_scores(scores), thresholds=thresholds))
    if not filters:
        raise UsageError("nothing to filter by: give --rules or --scores")
    return All(tuple(filters))


def _layout(dst: Path) -> Any:
    by_ending = {
        ".jsonl": "internvl",
        ".json": "llava",
        ".parquet": "parquet",
        ".tar": "webdataset",
        "": "webdataset",
    }
    if dst.suffix.lower() not in by_ending:
        raise UsageError(f"{dst}: say the format with --to")
    return by_ending[dst.suffix.lower()]
