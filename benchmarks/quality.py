"""What rounding weights costs: held-out scores and text perplexity of chiasm-mini under each, on the card's own items.

Runs `chiasm eval chiasm-mini --quantize HOW` for each HOW (resumable; about eight CPU-minutes each) and puts what comes
out beside the bundled results, which are those of unrounded weights. Nothing is chosen by these scores: how weights are
rounded was fixed before. SmolLM2's released weights lie on a grid with groups of 32 already (they come from a 4-bit
file), so groups of 32 would cost nothing and say nothing; hence 64 and 128.

Needs the assets of the evaluation (`python -m chiasm.worlds.assets`, `python -m chiasm.eval.perplexity`). Run
`python benchmarks/quality.py --out FOLDER` to see the table, with `--write` to publish it in docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from measure import HERE, RESULTS

from chiasm.cli.evaluate import evaluate

HOW = ("int8", "int8+vision-w8a8", "w8a8+vision-w8a8", "int4", "int4-128")
FAMILIES = ("cifar10", "fashion", "words", "counting")
PAGE = HERE.parent / "docs" / "speed.md"
BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"


def facts(results: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one evaluation."""
    text = results["perplexity"]
    return {
        "weights": results["model"]["weights"],
        "environment": results["environment"],
        "scores": {name: results["families"][name]["score"] for name in FAMILIES},
        "perplexity": {
            name: {key: text[name][key] for key in ("value", "interval")} for name in ("base", "adapted")
        },
        "tokens": text["tokens"],
    }


def measure(out: Path, how: tuple[str, ...] = HOW) -> dict[str, Any]:
    """Facts by the name of the rounding; "unrounded" are the bundled results."""
    bundled = files("chiasm").joinpath("assets/chiasm_mini/results.json").read_text(encoding="utf-8")
    kept = {"unrounded": facts(json.loads(bundled))}
    for name in how:
        folder = out / name
        evaluate("chiasm-mini", quantize=name, out=folder)
        kept[name] = facts(evaluate("chiasm-mini", quantize=name, out=folder, perplexity=True))
    return kept


def table(kept: dict[str, Any]) -> str:
    """Markdown: scores with 95 % intervals, perplexities of the adapted model and of SmolLM2 alone."""
    lines = [
        "| weights | CIFAR-10 | Fashion-MNIST | one word | counting | perplexity | SmolLM2 alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in kept.items():
        cells = []
        for family in FAMILIES:
            score = row["scores"][family]
            low, high = score["interval"]
            cells.append(f"{score['accuracy'] * 100:.1f} ({low * 100:.1f}–{high * 100:.1f})")
        for text in (row["perplexity"]["adapted"], row["perplexity"]["base"]):
            cells.append(f"{text['value']:.1f} ({text['interval'][0]:.1f}–{text['interval'][1]:.1f})")
        shown = name if name == "unrounded" else f"`{name}`"
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    items = next(iter(kept.values()))["scores"]
    numbers = ", ".join(f"{items[family]['n']:,}" for family in FAMILIES)
    tokens = next(iter(kept.values()))["tokens"]
    lines += [
        "",
        f"Exact match in % on {numbers} held-out items, 95 % intervals; perplexity on {tokens:,} tokens.",
    ]
    return "\n".join(lines)


def publish(kept: dict[str, Any]) -> None:
    """Put the table between the page's two marks."""
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{BEGIN}\n{table(kept)}\n{END}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="keeps what was answered")
    parser.add_argument(
        "--write", action="store_true", help="keep the result and rebuild the table in docs/speed.md"
    )
    args = parser.parse_args()
    kept = measure(args.out)
    print(table(kept))
    if args.write:
        (RESULTS / "quality.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        publish(kept)


if __name__ == "__main__":
    main()
