"""``chiasm eval [MODEL]``: held-out scores beside their controls, text perplexity, and the model card.

What was answered is kept in a folder and used again, so an interrupted evaluation continues where it stopped.
stdout carries the table (or, with ``--json``, the whole results); progress goes to stderr.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiasm.cli.terminal import note
from chiasm.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from chiasm.model.chat import ChatModel

__all__ = ["eval_command", "evaluate", "table", "training_facts"]

BUNDLED = "chiasm-mini"


def evaluate(
    model: str = BUNDLED,
    *,
    families: Sequence[str] | None = None,
    n: int | None = None,
    split: str = "test",
    batch: int | None = None,
    out: Path | None = None,
    perplexity: bool = False,
    card: bool = False,
    runs: Sequence[Path] = (),
    device: str | None = None,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Evaluate a model and return the results; they are also written to ``out/results.json``.

    Args:
        model: a name or a folder, as for ``chiasm.load``.
        families: worlds to evaluate; default all whose assets are prepared (with ``card`` none may be missing
            silently: those left out are noted).
        n: items a family instead of the fixed number.
        split: "test" or "dev".
        batch: conversations answered at once.
        out: folder that keeps answers; default ``runs/eval/<model>-<split>``.
        perplexity: measure the text perplexity only; with ``card`` it is measured anyway.
        card: families and perplexity, then write README.md and results.json beside the model's weights.
        runs: run folders of the training stages in order, for the card.
        device: where the model runs.
        quantize: weights to round, as for ``chiasm.load``.

    Raises:
        UsageError: contradicting options, unknown families.
        ChiasmError: whatever the model or the assets lack.
    """
    from chiasm.eval.families import BATCH, describe, evaluate_families
    from chiasm.eval.store import write_atomic
    from chiasm.hub import load
    from chiasm.train.run import environment

    if card and quantize:
        raise UsageError("the card reports the model as it is: leave out --quantize")
    if card and (split != "test" or n is not None):
        raise UsageError("the card reports the fixed items of the test split: leave out --split and --n")
    if perplexity and not card and families:
        raise UsageError("--perplexity measures text alone: leave out --families, or use --card to have both")
    chosen = _families(families) if card or not perplexity else []
    bundle = _bundle(model) if card or perplexity else None
    how = f"-{quantize}" if quantize else ""
    folder = out if out is not None else Path("runs") / "eval" / f"{Path(model).name}-{split}{how}"
    facts = environment()
    reporter = _Reporter()
    results: dict[str, Any] = {"environment": facts, "training": _stages(runs, bundle)}
    chat = load(model, device=device, quantize=quantize) if chosen else None
    if chat is not None:
        results["model"] = describe(chat)
        with reporter:
            results["families"] = evaluate_families(
                chat,
                chosen,
                n=n,
                split=split,
                batch=batch or BATCH,
                about=results["model"],
                environment=facts,
                out=folder,
                report=reporter,
            )
    if bundle is not None:
        with reporter:
            results["perplexity"] = _perplexity(bundle, chat, facts, folder, device, quantize, reporter)
        results.setdefault("model", results["perplexity"]["manifest"]["adapted"]["model"])
    if not card:
        results = {**_earlier(folder / "results.json", results["model"]), **results}
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    results = json.loads(text)  # what is returned is what a reader of the file gets
    write_atomic(folder / "results.json", text)
    if card and bundle is not None:
        from chiasm.eval.card import write_card

        note(f"card written to {write_card(results, bundle)}")
    return results


def _families(wanted: Sequence[str] | None) -> list[str]:
    """Families to evaluate; those without assets are left out with a note."""
    from chiasm.eval.families import FAMILIES as ASKED
    from chiasm.worlds import FAMILIES, available

    if wanted:
        unknown = [name for name in wanted if name not in ASKED]
        if unknown:
            raise UsageError(f"unknown family {unknown[0]!r}: choose among {', '.join(ASKED)}")
        return list(dict.fromkeys(wanted))
    present = list(available())
    missing = [name for name in FAMILIES if name not in present]
    if missing:
        note(f"left out, not prepared: {', '.join(missing)} (see python -m chiasm.worlds.assets)")
    return present


def _bundle(model: str) -> Path:
    """Folder of a chiasm-mini bundle."""
    from importlib.resources import as_file, files

    if model == BUNDLED:
        with as_file(files("chiasm") / "assets" / "chiasm_mini") as packaged:
            folder = Path(packaged)
    else:
        folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"there is no {BUNDLED} bundle in {folder}: give the folder that holds config.json"
        )
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != BUNDLED:
        raise UsageError(
            f"--perplexity and --card are for {BUNDLED} bundles, whose adapters can be taken off; {folder} is {kind!r}"
        )
    return folder


def _perplexity(
    bundle: Path,
    chat: ChatModel | None,
    facts: Mapping[str, Any],
    folder: Path,
    device: str | None,
    quantize: str | None,
    reporter: _Reporter,
) -> dict[str, Any]:
    from chiasm.eval.families import describe
    from chiasm.eval.perplexity import load_text, measure_perplexity
    from chiasm.hub import one_device
    from chiasm.systems.internvl.mini import load_mini

    text = load_text()

    def opened(adapt: bool) -> tuple[Any, Any, dict[str, Any]]:
        if chat is not None and adapt:
            mini = chat
        else:
            mini = load_mini(bundle, device=one_device(device), adapt=adapt, quantize=quantize)
        return mini.model, mini.spec.tokenizer, describe(mini)

    return measure_perplexity(
        {"base": lambda: opened(False), "adapted": lambda: opened(True)},
        text=text,
        environment=facts,
        out=folder,
        report=reporter,
    )


def _earlier(path: Path, model: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier call measured of the very same weights and this one does not (families or perplexity)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if found.get("model", {}).get("weights") != model["weights"]:
        return {}
    return {name: found[name] for name in ("families", "perplexity") if name in found}


# --- training -------------------------------------------------------------------------------------------------


def _stages(runs: Sequence[Path], bundle: Path | None) -> list[dict[str, Any]]:
    if runs:
        return [training_facts(run) for run in runs]
    if bundle is None:
        return []
    kept = json.loads((bundle / "config.json").read_text(encoding="utf-8")).get("training")
    return kept if isinstance(kept, list) else []


def training_facts(run_folder: str | Path) -> dict[str, Any]:
    """Return what the card says about one training stage, from its run folder: plain data.

    Time is the sum over the steps, of CPU time where the metrics have it ("cpu_seconds"), else by the clock.

    Raises:
        UsageError: not a run folder.
    """
    from chiasm.train.run import RunFolder

    run = RunFolder.open(run_folder)
    info, recipe = run.info, run.info["recipe"]
    rows = [row for row in run.metrics() if "loss" in row]
    steps = rows[-1]["step"] if rows else 0
    column = "cpu_seconds" if rows and all("cpu_seconds" in row for row in rows) else "seconds"
    spent = [row[column] for row in rows if column in row]
    around = info.get("environment", {})
    data = recipe.get("data") or {}
    return {
        "name": recipe.get("name", run.path.name),
        "reference": info.get("reference", ""),
        "overrides": [_without_folders(item) for item in info.get("overrides", [])],
        "steps": steps,
        "batch": recipe.get("batch"),
        "weights": {k: v for k, v in (data.get("weights") or {}).items() if v},
        # Not every step need be logged: the mean of those that are stands for all.
        "hours": round(sum(spent) / len(spent) * steps / 3600, 3) if spent else None,
        "clock": "CPU time" if column == "cpu_seconds" else "by the clock",
        "threads": around.get("threads"),
        "device": "cuda" if around.get("cuda") else "cpu",
        "git": around.get("git"),
        "scores": next((row["eval"] for row in reversed(run.metrics()) if "eval" in row), {}),
    }


def _without_folders(setting: str) -> str:
    """A setting whose absolute paths are cut to their last part: a card must not name one machine's folders."""
    return re.sub(r"(?<![\w.])/(?:[^/\s=,\"']+/)+", "", setting)


# --- what the user sees ---------------------------------------------------------------------------------------


class _Reporter:
    """Progress of the parts on stderr: a bar at a terminal, else a line now and then."""

    def __init__(self, every: float = 15.0) -> None:
        self._every, self._spoken = every, 0.0
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Reporter:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar, self._tasks = Progress(*columns, console=Console(file=sys.stderr)), {}
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, part: str, done: int, total: int) -> None:
        if self._bar is not None:
            if part not in self._tasks:
                self._tasks[part] = self._bar.add_task(part, total=total)
            self._bar.update(self._tasks[part], completed=done)
            return
        now = time.monotonic()
        if done == total or now - self._spoken >= self._every:
            self._spoken = now
            print(f"{part} {done}/{total}", file=sys.stderr, flush=True)


def table(results: Mapping[str, Any]) -> str:
    """Return the results as aligned plain text."""
    from chiasm.eval.families import CONTROLS

    lines = []
    families = results.get("families") or {}
    if families:
        rows = [["family", "items", "model", *CONTROLS, "beats all"]]
        for name, family in families.items():
            scores = [family["controls"].get(c) for c in CONTROLS]
            rows.append(
                [
                    name,
                    str(family["score"]["n"]),
                    _percent(family["score"]),
                    *("-" if s is None else _percent(s) for s in scores),
                    "yes" if family["beats_all_controls"] else "no",
                ]
            )
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    text = results.get("perplexity")
    if text:
        for name in ("base", "adapted", "ratio"):
            low, high = text[name]["interval"]
            lines.append(f"perplexity {name}: {text[name]['value']:.4g} ({low:.4g}-{high:.4g})")
    return "\n".join(lines)


def _percent(score: Mapping[str, Any]) -> str:
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def eval_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name of chiasm list, or a folder.")
    ] = BUNDLED,
    families: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="cifar10, fashion, words, counting; default: all that are prepared."
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="Items a family; default: the fixed number.")] = None,
    split: Annotated[str, typer.Option(help="test or dev.")] = "test",
    batch: Annotated[int | None, typer.Option(help="Questions answered at once.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Keeps what was answered; default: runs/eval/MODEL-SPLIT."),
    ] = None,
    perplexity: Annotated[
        bool,
        typer.Option("--perplexity", help="Text perplexity with and without adapters, and nothing else."),
    ] = False,
    card: Annotated[
        bool,
        typer.Option("--card", help="Families and perplexity; writes the model card beside the weights."),
    ] = False,
    runs: Annotated[
        list[Path] | None,
        typer.Option(
            "--run", metavar="FOLDER", help="Run folder of a training stage, for the card (repeatable)."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, …; default: an NVIDIA GPU if there is one.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="HOW", help="Round weights, as for chiasm chat.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of PyTorch.")] = None,
    bench: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A public benchmark in place of the families; 'list' shows them."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Its questions: .tsv, .jsonl, .json, .parquet, or a folder (see docs/evaluation.md).",
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Its pictures; default: beside the questions.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Its answers, where the questions come without.")
    ] = None,
    exclude: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Ids of questions to leave out, one a line.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask only the first so many questions.")] = None,
    mode: Annotated[
        str | None, typer.Option(metavar="MODE", help="Metrics: chiasm (default), or original as released.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another prompt than the benchmark's.")
    ] = None,
    cot: Annotated[bool, typer.Option("--cot", help="Ask for reasoning step by step.")] = False,
    votes: Annotated[
        int | None, typer.Option(metavar="K", help="Sample K answers to each question and let them vote.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of sampling; default 0.8 with --votes, else 0 (greedy).")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens of this share.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer of a benchmark in tokens.")
    ] = None,
    max_tiles: Annotated[int | None, typer.Option(help="Most tiles of a benchmark's pictures.")] = None,
    frames: Annotated[
        str | None,
        typer.Option(
            metavar="N,M", help="Frames of a benchmark's videos; several are a sweep, all reported."
        ),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Twice: compare two result.json of benchmarks question by question, and nothing else.",
        ),
    ] = None,
    vary: Annotated[
        str,
        typer.Option(metavar="A,B", help="What --compare compares on purpose; all else must be equal."),
    ] = "model",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole results as one JSON object.")
    ] = False,
) -> None:
    """Score a model on held-out pictures, or on a public benchmark.

    Interrupt it at any time; it continues.
    """
    special = {
        "--data": data,
        "--images": images,
        "--answers": answers,
        "--exclude": exclude,
        "--limit": limit,
        "--mode": mode,
        "--prompt": prompt,
        "--cot": cot or None,
        "--votes": votes,
        "--temperature": temperature,
        "--top-p": top_p,
        "--seed": seed,
        "--max-new-tokens": max_new_tokens,
        "--max-tiles": max_tiles,
        "--frames": frames,
    }
    if compare:
        _compare(compare, vary, as_json)
        return
    if bench is None and any(value is not None for value in special.values()):
        name = next(name for name, value in special.items() if value is not None)
        raise UsageError(f"{name} is for benchmarks: add --bench NAME (--bench list shows them)")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if bench is not None:
        owned = {
            "--families": families,
            "--n": n,
            "--perplexity": perplexity or None,
            "--card": card or None,
            "--run": runs or None,
        }
        clash = next((name for name, value in owned.items() if value is not None), None)
        if clash or split != "test":
            raise UsageError(f"{clash or '--split'} is for the families: leave it out with --bench")
        from chiasm.cli.bench import bench_table, evaluate_bench, list_benches

        if bench == "list":
            print(list_benches())
            return
        reporter = _Reporter()
        with reporter:
            found = evaluate_bench(
                model,
                bench,
                data,
                images=images,
                answers=answers,
                exclude=exclude,
                limit=limit,
                out=out,
                frames=_numbers(frames),
                device=device,
                quantize=quantize,
                max_tiles=max_tiles,
                report=reporter,
                mode=mode,
                prompt=prompt,
                cot=cot,
                votes=votes,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                max_new_tokens=max_new_tokens,
                batch=batch,
            )
        print(json.dumps(found, ensure_ascii=False) if as_json else bench_table(found))
        return
    results = evaluate(
        model,
        families=[name.strip() for name in families.split(",") if name.strip()] if families else None,
        n=n,
        split=split,
        batch=batch,
        out=out,
        perplexity=perplexity,
        card=card,
        runs=tuple(runs or ()),
        device=device,
        quantize=quantize,
    )
    print(json.dumps(results, ensure_ascii=False) if as_json else table(results))


def _numbers(text: str | None) -> list[int]:
    """``16,32`` as numbers; UsageError for anything else."""
    try:
        return [int(word) for word in text.split(",")] if text else []
    except ValueError:
        raise UsageError(
            f"--frames {text}: write whole numbers between commas, for instance 16,32,64"
        ) from None


def _compare(files: Sequence[Path], vary: str, as_json: bool) -> None:
    if len(files) != 2:
        raise UsageError("--compare FILE --compare FILE: name two results")
    from chiasm.cli.bench import compare_command

    free = [name.strip() for name in vary.split(",") if name.strip()]
    found = compare_command(files[0], files[1], free)
    if as_json:
        print(json.dumps(found))
        return
    ends = (
        "" if found["interval"] is None else f" ({found['interval'][0]:+.4f} to {found['interval'][1]:+.4f})"
    )
    p_value = "" if found["p_value"] is None else f", p = {found['p_value']:.4g}"
    print(
        f"difference {found['value']:+.4f}{ends}{p_value}, {found['n']} questions, {found['pictures']} pictures"
    )
