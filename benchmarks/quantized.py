"""Rounded weights beside transformers in bf16: decoding, prefill, one picture tile; and the error of a layer.

Shapes, prompts, clock and peer are those of `inference.py`: InternVL2.5-1B with random weights, one thread, batch 1,
greedy. Each contender has its own copy of the same weights, rounded as `chiasm chat --quantize` would. Speed does not
depend on what the weights say; what rounding does to answers is measured by `quality.py`.

Run `python benchmarks/quantized.py` to see the table, with `--write` to publish it; `--toy` tries the script out.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import inference as plain  # sets the number of threads before torch is imported
import torch
from measure import alternate, compare, finish
from torch import nn

from chiasm.data.sequence import Sequence
from chiasm.media.pixels import normalize
from chiasm.model.causal import CausalVLM
from chiasm.model.quantize import quantize_model
from chiasm.nn.quant import Int4Linear, Int8Linear

LANGUAGE = ("int8", "int4", "w8a8")
REQUIRED = {"int8": 1.9, "int4": 3.3}
TILE = 1.6
LAYERS = {
    "int8": lambda layer: Int8Linear(layer),
    "w8a8": lambda layer: Int8Linear(layer, bits=8),
    "int4-32": lambda layer: Int4Linear(layer, group=32),
    "int4-64": lambda layer: Int4Linear(layer, group=64),
    "int4-128": lambda layer: Int4Linear(layer, group=128),
}


def measure(case: plain.Case) -> dict[str, Any]:
    """All rows of a case."""
    torch.set_num_threads(1)
    bf16 = plain.build_ours(case)
    theirs = plain.build_theirs(case, bf16)
    rounded = {how: quantize_model(plain.build_ours(case), how) for how in LANGUAGE[:-1]}
    rounded["w8a8"] = quantize_model(plain.build_ours(case), "w8a8+vision-w8a8")
    rows = [
        *measure_text(case, theirs, rounded),
        *measure_tile(case, bf16, theirs, rounded["w8a8"]),
        *errors(case),
    ]
    for row in rows:
        if row["required"]:
            row["ok"] = row["ratio"] >= float(row["required"].strip(">= x"))
    return {
        "rows": rows,
        "remark": "Peer: transformers in bf16, as for `inference.py`. Errors are of one layer on normal weights and "
        "activations: root mean square of the difference from the float64 product over that of the product.",
    }


def measure_text(case: plain.Case, theirs: nn.Module, rounded: dict[str, CausalVLM]) -> list[dict[str, Any]]:
    """Prefill and decoding of text; the same fresh prompts for everybody."""
    turn: dict[str, int] = {}
    tokens = case.steps + 1

    def prompt(who: str) -> torch.Tensor:
        turn[who] = turn.get(who, 0) + 1
        return plain.text_prompt(case, turn[who])

    def ours(how: str) -> plain.Clock:
        return plain.run_ours(rounded[how], Sequence.of_text(prompt(how)), tokens)

    seen = alternate(
        {
            "theirs": lambda: plain.run_theirs(theirs, prompt("theirs"), tokens),
            **{how: lambda how=how: ours(how) for how in rounded},
        },
        case.repeats,
    )
    rows = []
    for how in rounded:
        required = f">= {REQUIRED[how]}x" if how in REQUIRED else ""
        peers, mine = ([clock.step for clock in seen[name]] for name in ("theirs", how))
        rows.append(compare(f"decoding, a token, {how}", peers, mine, required=required))
    for how in rounded:
        peers, mine = ([clock.first for clock in seen[name]] for name in ("theirs", how))
        rows.append(compare(f"prefill, {case.prompt} rows, {how}", peers, mine))
    return rows


@torch.inference_mode()
def measure_tile(case: plain.Case, bf16: CausalVLM, theirs: Any, w8a8: CausalVLM) -> list[dict[str, Any]]:
    """One picture tile to the language model's width."""
    tile = plain.picture_prompt(case, 0).media["image"].data
    pixels = normalize(tile, case.config.tiles, dtype=case.dtype)

    def ours(model: CausalVLM) -> torch.Tensor:
        return model.embedder.encode(tile)  # type: ignore[operator]

    def clocked(call: Any) -> float:
        begin = time.process_time()
        call()
        return (time.process_time() - begin) * 1e3

    seen = alternate(
        {
            "theirs": lambda: clocked(lambda: theirs.model.get_image_features(pixels)),
            "bf16": lambda: clocked(lambda: ours(bf16)),
            "w8a8": lambda: clocked(lambda: ours(w8a8)),
        },
        case.repeats,
    )
    exact, near = ours(bf16).float(), ours(w8a8).float()
    apart = float((near - exact).norm() / exact.norm())
    return [
        compare("picture tile to tokens, bf16", seen["theirs"], seen["bf16"]),
        compare(
            "picture tile to tokens, vision-w8a8",
            seen["theirs"],
            seen["w8a8"],
            required=f">= {TILE}x",
            note=f"tokens {apart:.1%} from bf16's, random weights",
        ),
    ]


def errors(case: plain.Case) -> list[dict[str, Any]]:
    """Relative error of one layer, for five draws of normal weights and activations."""
    c = case.config.language
    seen: dict[str, list[float]] = {name: [] for name in LAYERS}
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        layer = nn.Linear(c.hidden_size, c.intermediate_size, bias=False, dtype=case.dtype)
        layer.requires_grad_(False).weight.normal_(0, 0.02, generator=generator)
        x = torch.randn(32, c.hidden_size, generator=generator).to(case.dtype)
        true = x.double() @ layer.weight.double().t()
        for name, make in LAYERS.items():
            seen[name].append(float((make(layer)(x).double() - true).norm() / true.norm()) * 100)
    return [
        compare(f"error of a layer, normal weights, {name}", None, seen[name], unit="%") for name in LAYERS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the result and rebuild the README's table")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--toy", action="store_true", help="a tiny model: tries the script out")
    args = parser.parse_args()
    if args.write and (args.toy or args.repeats < 7):
        parser.error("only the full protocol is published: leave out --toy and --repeats")
    finish(
        "quantized", measure(plain.toy() if args.toy else plain.full(repeats=args.repeats)), write=args.write
    )


if __name__ == "__main__":
    main()
