"""``chiasm eval MODEL --bench NAME --data PATH``: a public benchmark from a local file, with manifest and error.

Answers are kept in the folder of the run, so an interrupted evaluation continues; ``result.json`` (or one a number of
frames) lies beside them. Several ``--frames`` are a sweep: every number is reported, and the best of them is named as
what it is, a choice made on the scored questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chiasm.cli.terminal import note
from chiasm.errors import UsageError

__all__ = ["bench_table", "compare_command", "evaluate_bench", "list_benches"]


def evaluate_bench(
    model: str,
    bench: str,
    data: Path | None,
    *,
    images: Path | None = None,
    answers: Path | None = None,
    exclude: Path | None = None,
    limit: int | None = None,
    out: Path | None = None,
    frames: Sequence[int] = (),
    device: str | None = None,
    quantize: str | None = None,
    max_tiles: int | None = None,
    report: Callable[[str, int, int], None] = lambda part, done, total: None,
    **settings: Any,
) -> dict[str, Any]:
    """Run a bench and return plain data without its rows, which are in the files it wrote.

    Args:
        model: a name or a folder, as for ``chiasm.load``.
        bench: a name of the table.
        data: file or folder of the questions.
        images: folder of the pictures.
        answers: file or folder of the answers, where they are apart.
        exclude: text file with ids of questions to be left out, one a line.
        limit: ask only the first so many questions.
        out: folder that keeps answers and results; default ``runs/eval/<model>-<bench>``.
        frames: of a video; several are a sweep.
        device: where the model runs.
        quantize: weights to round.
        max_tiles: most tiles of a picture.
        report: is told about progress.
        settings: of `chiasm.eval.benchmarks.run.Settings`.

    Raises:
        UsageError: unknown bench, no data, settings that do not fit.
        ChiasmError: whatever the data or the model lack.
    """
    from chiasm.eval.benchmarks.read import read_items
    from chiasm.eval.benchmarks.run import Settings, check_request, run_bench
    from chiasm.eval.benchmarks.table import get_bench
    from chiasm.eval.families import describe
    from chiasm.hub import load
    from chiasm.train.run import environment

    row = get_bench(bench)
    if data is None:
        raise UsageError(f"--bench {bench} needs the questions: give a file or folder with --data")
    # All that can be wrong with the request is said before the model is loaded.
    given = {name: value for name, value in settings.items() if value is not None}
    runs = [Settings(**given, frames=count) for count in (frames or [None])]
    if len(set(frames)) != len(frames):
        raise UsageError("--frames: give every number of frames once")
    left_out = _ids(exclude) if exclude is not None else []
    items = read_items(data, images=images, answers=answers, prefer=row.prefer, limit=limit, exclude=left_out)
    for run in runs:
        check_request(row, items, run)
    options: dict[str, Any] = {} if max_tiles is None else {"max_tiles": max_tiles}
    chat = load(model, device=device, quantize=quantize, **options)
    about, facts = describe(chat), environment()
    folder = out if out is not None else Path("runs") / "eval" / f"{Path(model).name}-{bench}"
    results = []
    for run in runs:
        result = run_bench(chat, row, items, run, about=about, environment=facts, out=folder, report=report)
        name = f"result-{run.frames}.json" if len(runs) > 1 else "result.json"
        result.save(folder / name)
        results.append((run.frames, result))
    if len(results) == 1:
        return results[0][1].to_dict(rows=False)
    swept = {str(count): result.to_dict(rows=False) for count, result in results}
    best = max(results, key=lambda pair: pair[1].headline.value)[0]
    return {
        "bench": bench,
        "sweep": swept,
        "best": {"frames": best, "note": "chosen on the scored questions"},
    }


def _ids(path: Path) -> list[str]:
    """Ids of a text file, one a line; UsageError when it cannot be read."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--exclude {path}: cannot be read ({error})") from error


def bench_table(results: Mapping[str, Any]) -> str:
    """Return a result or a sweep as aligned plain text."""
    runs = results.get("sweep") or {"": results}
    rows = [
        ["bench", "frames", "score", "value", "error", "95 %", "questions", "pictures", "unparsed", "cut"]
    ]
    lines = []
    for count, result in runs.items():
        scale = 100.0 if result["unit"] == "%" else 1.0
        for n, (name, estimate) in enumerate(result["scores"].items()):
            ends = estimate["interval"]
            rows.append(
                [
                    result["bench"] if n == 0 else "",
                    count or str(result["manifest"]["frames"] or "-"),
                    name,
                    f"{scale * estimate['value']:.2f}",
                    "-" if estimate["error"] is None else f"{scale * estimate['error']:.2f}",
                    "-" if ends is None else f"{scale * ends[0]:.2f}-{scale * ends[1]:.2f}",
                    str(estimate["n"]),
                    str(result["pictures"]) if n == 0 else "",
                    str(result["unparsed"]) if n == 0 else "",
                    str(result["cut"]) if n == 0 else "",
                ]
            )
        if shown_as := _how_videos(result["manifest"]):
            lines.append(shown_as)
        if result["with_chance"] is not None and result["unparsed"]:
            lines.append(f"if unparsed replies were guessed: {100 * result['with_chance']:.2f} on average")
        for name, value in result["extra"].get("captions", {}).items():
            lines.append(f"{name}: {100 * value:.2f}")
        for point in result["extra"].get("votes", []):
            low, high = point["interval"]
            lines.append(
                f"vote@{point['k']}: {100 * point['value']:.2f} ({100 * low:.2f}-{100 * high:.2f}), "
                f"{point['tokens']:.0f} tokens a question"
            )
    if "best" in results:
        lines.append(f"best: {results['best']['frames']} frames, {results['best']['note']}")
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    shown = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(shown + lines)


def _how_videos(manifest: Mapping[str, Any]) -> str:
    """One line on how videos were looked at; "" for pictures and for results that do not say it."""
    facts = manifest.get("video") or {}
    if not facts:
        return ""
    frames = manifest.get("frames")
    said = "videos: " + (
        "frames as the model takes them"
        if frames is None
        else f"{frames} frames each (fewer of a shorter one)"
    )
    said += f", sampling {facts['sampling']}" + (f" ({facts['formula']})" if "formula" in facts else "")
    if "tiles_per_frame" in facts:
        tiles = facts["tiles_per_frame"]
        said += f", {tiles} tile{'' if tiles == 'one' else 's'} of {facts['tokens_per_tile']} tokens a frame"
    if subtitles := facts.get("subtitles"):
        missing = f" ({subtitles['without']} videos have none)" if subtitles["without"] else ""
        said += f", with the subtitles of these frames{missing}"
    return said


def compare_command(ours: Path, theirs: Path, vary: Sequence[str]) -> dict[str, Any]:
    """Compare two files of results; plain data.

    Raises:
        DataError: they cannot be compared; the message says why.
    """
    from chiasm.eval.result import Result, compare_results

    found = compare_results(Result.load(ours), Result.load(theirs), vary=vary)
    for line in found.notes:
        note(f"versions differ: {line}")
    return found.to_dict()


def list_benches() -> str:
    """The table of benches as text."""
    from chiasm.eval.benchmarks.table import BENCHES

    rows = [["bench", "what", "metric", "prompt"]]
    rows += [[b.name, b.title, b.scorer, b.prompt] for b in BENCHES.values()]
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
