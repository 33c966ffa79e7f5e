"""``chiasm data``: examine data sets before training on them.

`lint` says what is wrong by file and line, `stats` what is there. Both count with the layout of the model that is to be
trained, in one lazy pass, and can be interrupted: what was found so far is printed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiasm.cli.data_build import build_command
from chiasm.cli.data_convert import convert_data_command
from chiasm.cli.data_filter import filter_command
from chiasm.cli.data_pack import pack_command
from chiasm.cli.terminal import note, one_line, paint, plain_text
from chiasm.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from chiasm.data.layout import LayoutSpec
    from chiasm.data.lint import Finding, Report
    from chiasm.data.stats import SetStats

__all__ = ["data_app", "lint_command", "stats_command"]

data_app = typer.Typer(
    help="Examine, count, convert, filter, pack and build data sets.",
    rich_markup_mode=None,
    invoke_without_command=True,
)

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE",
        help="Annotation files (JSONL, JSON, parquet, tar), quoted globs of shards, or meta files that name several.",
        show_default=False,
    ),
]
Root = Annotated[
    str, typer.Option("--root", metavar="FOLDER", help="Where relative paths of pictures and videos start.")
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="NAME",
        help="auto, internvl, llava, messages, sharegpt, parquet or webdataset.",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="MODEL", help="Whose tokenizer, template and tiles: as for chiasm plan."
    ),
]
TemplateName = Annotated[
    str | None, typer.Option("--template", metavar="NAME", help="Chat template, see chiasm list.")
]
MaxTiles = Annotated[
    int | None,
    typer.Option("--max-tiles", min=1, metavar="N", help="Most tiles that a row's pictures are cut into."),
]
Repeats = Annotated[
    int | None,
    typer.Option(
        "--repeats", min=1, metavar="N", help="How often a picture is encoded (default: the model's)."
    ),
]
Frames = Annotated[
    str | None,
    typer.Option(
        "--frames",
        metavar="N,M",
        help="Frames of a video, or the least and the largest number that training draws, as 16,96.",
    ),
]
FrameTiles = Annotated[
    int | None,
    typer.Option("--frame-tiles", min=1, metavar="N", help="Most tiles of a frame (default: the model's)."),
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N rows of each set.")
]
SampleRows = Annotated[
    int | None, typer.Option("--sample", min=1, metavar="N", help="Only N random rows of each set.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of the random rows.")]
Threads = Annotated[int, typer.Option("--threads", min=1, metavar="N", help="Threads that read rows ahead.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@data_app.callback()
def _top(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def lint_command(
    files: Paths,
    root: Root = "",
    format: Format = "auto",
    model: Model = "chiasm-mini",
    template: TemplateName = None,
    max_tiles: MaxTiles = None,
    repeats: Repeats = None,
    frames: Frames = None,
    frame_tiles: FrameTiles = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=1, metavar="N", help="Most tokens of a row (default: the model's)."),
    ] = None,
    pack_tiles: Annotated[
        int | None, typer.Option("--pack-tiles", min=1, metavar="N", help="Most tiles of a pack.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="FILE", help="A test set that must not occur (repeatable)."),
    ] = None,
    against_root: Annotated[
        str | None,
        typer.Option(
            "--against-root", metavar="FOLDER", help="Where its relative paths start (default: --root)."
        ),
    ] = None,
    decode: Annotated[
        bool,
        typer.Option("--decode", help="Open every picture wholly, not only its header; find look-alikes."),
    ] = False,
    limit: Limit = None,
    sample: SampleRows = None,
    seed: Seed = 0,
    select: Annotated[
        list[str] | None,
        typer.Option("--select", metavar="CODE", help="Only these rules, as C301 or C3 (repeatable)."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", metavar="CODE", help="Not these rules (repeatable).")
    ] = None,
    first: Annotated[
        int, typer.Option("--first", min=0, metavar="K", help="Findings of each rule that are printed.")
    ] = 5,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write all findings as lines of JSON.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit status 1 for warnings too.")] = False,
    threads: Threads = 4,
    as_json: AsJson = False,
) -> None:
    """Find what is wrong with data sets, by file and line.

    Reads rows, headers of pictures and tokens as training would. Exit status 1 if there are errors: rows that
    training would refuse, or that certainly teach something wrong. docs/lint.md lists the rules. Of drawn numbers of
    frames the largest counts.
    """
    from chiasm.data.lint import LintOptions, lint, open_sources

    spec = _spec(model, template, max_tiles, max_length, repeats, frame_tiles)
    spec = _with_frames(spec, frames, longest=True)
    try:
        options = LintOptions(
            limit=limit,
            sample=sample,
            seed=seed,
            decode=decode,
            threads=threads,
            first=first,
            select=tuple(select or ()),
            ignore=tuple(ignore or ()),
            pack_tiles=pack_tiles,
        )
    except ConfigError as error:
        raise UsageError(str(error)) from None
    sources = open_sources(files, root=root, format=format)
    tests = open_sources(against or [], root=root if against_root is None else against_root, format=format)
    with ExitStack() as opened, _Line() as line:
        write = _writer(out, opened)

        def progress(done: int, total: int, report: Report) -> None:
            line.show(done, total, f"{report.count('error'):,} errors, {report.count('warning'):,} warnings")

        report = lint(sources, spec, options, against=tests, on_finding=write, on_progress=progress)
    print(
        json.dumps(report.as_dict(), ensure_ascii=False) if as_json else "\n".join(_lint_lines(report, out))
    )
    if report.interrupted:
        note(f"interrupted after {report.rows:,} rows")
        raise typer.Exit(130)
    if report.count("error") or (strict and report.count("warning")):
        raise typer.Exit(1)


def stats_command(
    files: Paths,
    root: Root = "",
    format: Format = "auto",
    model: Model = "chiasm-mini",
    template: TemplateName = None,
    max_tiles: MaxTiles = None,
    repeats: Repeats = None,
    frames: Frames = None,
    frame_tiles: FrameTiles = None,
    limit: Limit = None,
    sample: SampleRows = None,
    seed: Seed = 0,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw tokens, tiles and shapes into a PNG file."),
    ] = None,
    threads: Threads = 4,
    as_json: AsJson = False,
) -> None:
    """Count rows, tokens, tiles and pictures of data sets.

    Tokens by part, learned tokens, tiles and pictures of a row, turns, picture sizes and answer lengths, as training
    would count them, from the headers of the pictures.
    """
    from chiasm.data.lint import collect, open_sources
    from chiasm.data.stats import merged

    if limit is not None and sample is not None:
        raise UsageError("--limit and --sample exclude each other: give one of them")
    spec = _with_frames(_spec(model, template, max_tiles, None, repeats, frame_tiles), frames)
    sources = open_sources(files, root=root, format=format)
    with _Line() as line:
        found, interrupted = collect(
            sources,
            spec,
            limit=limit,
            sample=sample,
            seed=seed,
            threads=threads,
            on_progress=lambda done, total: line.show(done, total, ""),
        )
    whole = merged(found, found[0].name if len(found) == 1 else f"{len(found)} sets")
    if plot is not None:
        from chiasm.data.stats_plot import save_plot

        save_plot(whole, plot)
    if as_json:
        sets = {one.name: one.as_dict() for one in found}
        print(
            json.dumps({"all": whole.as_dict(), "sets": sets, "interrupted": interrupted}, ensure_ascii=False)
        )
    else:
        print("\n".join(_stats_lines(found, whole, spec)))
    if interrupted:
        note(f"interrupted after {whole.rows:,} rows")
        raise typer.Exit(130)


data_app.command("lint")(lint_command)
data_app.command("stats")(stats_command)
data_app.command("pack")(pack_command)
data_app.command("build")(build_command)
data_app.command("convert")(convert_data_command)
data_app.command("filter")(filter_command)


def _spec(
    model: str,
    template: str | None,
    max_tiles: int | None,
    max_length: int | None,
    repeats: int | None,
    frame_tiles: int | None,
) -> LayoutSpec:
    """How the model that is to be trained lays out; a note where its tokenizer is only assumed."""
    from dataclasses import replace

    from chiasm.cli.plan import layout_of

    spec, notes = layout_of(model, template=template)
    for text in notes:
        note(text)
    changes = {"max_length": max_length, "repeats": repeats, "frame_tiles": frame_tiles}
    changes = {name: value for name, value in changes.items() if value is not None}
    spec = spec.limited(max_tiles)
    return replace(spec, **changes) if changes else spec  # type: ignore[arg-type]


def _with_frames(spec: LayoutSpec, frames: str | None, *, longest: bool = False) -> LayoutSpec:
    """The layout with this number of frames, or with numbers drawn as training does; `longest`: the largest of them."""
    from dataclasses import replace

    from chiasm.media.frames import FrameSampling

    if frames is None:
        return spec
    try:
        low, _, high = frames.partition(",")
        least, most = int(low), int(high or low)
        sampling = FrameSampling(mode="rand", frames=None, min_frames=least, max_frames=most)
    except ValueError:
        raise UsageError(f"--frames {frames}: write a number, or two as 16,96") from None
    except ConfigError as error:
        raise UsageError(f"--frames {frames}: {error}") from None
    return replace(spec, sampling=replace(sampling, frames=most) if longest or least == most else sampling)


def _writer(out: Path | None, opened: ExitStack) -> Callable[[Finding], None] | None:
    """What writes findings to a file, which is closed with `opened`."""
    if out is None:
        return None
    try:
        file = opened.enter_context(out.open("w", encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror}): check the folder") from error
    return lambda finding: print(json.dumps(finding.as_dict()), file=file)


class _Line:
    """How far a pass is, on one line of a terminal; nothing in a pipe."""

    def __init__(self) -> None:
        self.shown, self.begun, self.told = sys.stderr.isatty(), time.perf_counter(), 0.0

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *error: object) -> None:
        if self.told:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def show(self, done: int, total: int, said: str) -> None:
        """At most ten times a second."""
        now = time.perf_counter()
        if not self.shown or now - self.told < 0.1:
            return
        self.told = now
        speed = done / max(now - self.begun, 1e-9)
        left = (total - done) / max(speed, 1e-9)
        text = f"{done:,} of {total:,} rows, {speed:,.0f} a second, {left:,.0f} s left  {said}"
        print(
            f"\r\x1b[K{paint(text.rstrip(), 'dim', stream=sys.stderr)}", end="", file=sys.stderr, flush=True
        )


# Printing --------------------------------------------------------------------------------------------------------

_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


def _lint_lines(report: Report, out: Path | None) -> list[str]:
    """Each rule with its first findings, the histograms, and a table of all rules that found something."""
    from chiasm.data.lint.rules import RULES
    from chiasm.data.stats import bars, length_bins, merged, whole_bins

    lines: list[str] = []
    for code in report.codes:
        rule, shown = RULES[code], report.examples.get(code, [])
        head = paint(f"{rule.severity} {code} {rule.name}", _COLOURS[rule.severity], "bold")
        lines.append(f"{head}: {_plain(rule.says)}")
        lines += [f"  {plain_text(one_line(f'{one.where}: {one.message}'))}" for one in shown]
        if (more := report.found[code] - len(shown)) > 0:
            lines.append(f"  and {more:,} more" + (f", all in {out}" if out else ""))
        lines += [f"  remedy: {rule.remedy}", ""]
    whole = merged(list(report.stats.values()))
    if whole.tokens.n:
        lines += [*bars("tokens of a row", length_bins(whole.tokens)), ""]
        lines += [*bars("tiles of a row", whole_bins(whole.tiles)), ""]
    if report.codes:
        room = max(len(RULES[code].name) for code in report.codes)
        for code in report.codes:
            rule = RULES[code]
            severity = paint(f"{rule.severity:7}", _COLOURS[rule.severity])
            rows = f"{report.rows_hit[code]:,} rows" if report.rows_hit[code] else "whole set"
            lines.append(f"{severity}  {code}  {rule.name:{room}}  {report.found[code]:>9,}  in {rows}")
        lines.append("")
    counts = ", ".join(
        f"{n:,} {severity}{'' if n == 1 else 's'}"
        for severity in ("error", "warning", "note")
        for n in [report.count(severity)]
    )
    speed = report.rows / max(report.seconds, 1e-9)
    lines.append(f"{report.rows:,} rows of {len(report.stats)} set(s): {counts} ({speed:,.0f} rows a second)")
    return lines


def _plain(text: str) -> str:
    """Without the marks of Markdown, which the rules' texts have for their page."""
    return text.replace("`", "")


def _stats_lines(found: list[SetStats], whole: SetStats, spec: LayoutSpec) -> list[str]:
    """A row for each set, one for all, then the histograms of all."""
    from chiasm.data.stats import PARTS, aspect_bins, bars, length_bins, whole_bins

    shown = found if len(found) == 1 else [*found, whole]
    head = [
        "set",
        "rows",
        "unusable",
        "tokens",
        "learned",
        "tiles",
        "pictures",
        "tokens a row",
        "p99",
        "longest",
    ]
    table = [head]
    for one in shown:
        cells: list[Any] = [one.rows, one.unusable, one.tokens.total, one.learned.total, one.tiles.total]
        cells += [one.images.total, round(one.tokens.mean), one.tokens.quantile(0.99), one.tokens.high]
        table.append([one.name, *(f"{cell:,}" for cell in cells)])
    widths = [max(len(row[n]) for row in table) for n in range(len(head))]
    lines = [
        f"{row[0]:{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in table
    ]
    if not whole.tokens.n:
        return [*lines, "", "no row can be trained on: chiasm data lint says why"]
    total = sum(whole.parts.values())
    parts = ", ".join(f"{part} {whole.parts[part] / total:.1%}" for part in PARTS if whole.parts[part])
    lines += ["", f"tokens by part: {parts} (answers are what is learned)"]
    if whole.shown.n:
        lines.append(_shown_as(whole, spec))
    for name, what, unit in (
        ("turns", "turns of a row", ""),
        ("images", "pictures of a row", ""),
        ("frames", "frames of a row with videos", ""),
        ("shown", "tokens of a row's pictures and frames", ""),
        ("answers", "length of an answer", " characters"),
        ("widths", "width of a picture", " pixels"),
        ("heights", "height of a picture", " pixels"),
    ):
        one = whole.distributions[name]
        if one.n:
            middle, high = one.quantile(0.5), one.quantile(0.99)
            lines.append(f"{what}: median {middle:,}, 99 % up to {high:,}, largest {one.high:,}{unit}")
    lines += ["", *bars("tokens of a row", length_bins(whole.tokens))]
    lines += ["", *bars("tiles of a row", whole_bins(whole.tiles))]
    if whole.aspects.n:
        lines += ["", *bars("width to height of pictures", aspect_bins(whole))]
    return lines


def _shown_as(whole: SetStats, spec: LayoutSpec) -> str:
    """How many tokens a tile and a frame take."""
    said = f"a tile of a picture takes {spec.image_rows} tokens"
    if spec.repeats > 1:
        said += f" ({spec.tokens_per_tile}, encoded {spec.repeats} times)"
    if whole.frames.n:
        said += f", a frame {spec.frame_rows}"
        if spec.frame_tiles > 1:
            said += f" for each of up to {spec.frame_tiles} tiles"
    return said
