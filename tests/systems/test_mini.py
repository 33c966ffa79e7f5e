"""The bundled model's language side: real weights against transformers, and what survives saving."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from chiasm.checkpoint.wheel import smollm2_folder
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

needs_wheel = pytest.mark.usefixtures("smollm2_wheel")


@needs_wheel
def test_real_smollm2_equals_transformers() -> None:
    import transformers

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
    whole = tmp_path / "bundle"
    save_bundle({"embedder.connect.norm.weight": torch.ones(300)}, MiniConfig(), whole)
    config, weights = whole / "config.json", whole / "model.safetensors"
    text, data = config.read_text(), weights.read_bytes()
    assert read_bundle(whole)[0] == MiniConfig()

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match) as caught:
            load_mini(whole)
        assert "\n" not in str(caught.value)

    for change, match in (
        ({"lora": None}, r"config\.json is not"),
        ({"lora": {"rank": "4", "alpha": 8, "targets": []}}, "lora_rank is '4'"),
        ({"lora": {"rank": 4, "alpha": 8, "targets": [1]}}, "lora_targets"),
        ({"lora": {"rank": 4, "alpha": 8}}, "lacks 'targets'"),
        ({"vision_config": []}, r"config\.json is not"),
        ({"template": None}, "template is None"),
        ({"max_length": 0}, "max_length is 0"),
    ):
        config.write_text(json.dumps(json.loads(text) | change))
        refused(match)
    for broken in ("[]", "{", "{}", ""):
        config.write_text(broken)
        refused(r"config\.json")
    config.write_text(text)
    for damaged in (data[:4], data[:40], data[:-10], b"\xff" * len(data)):
        weights.write_bytes(damaged)
        refused(r"model\.safetensors")
    weights.unlink()
    refused(r"model\.safetensors")


def test_a_bundle_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    save_bundle({"a": torch.zeros(3)}, MiniConfig(), folder, {"run": "first"})
    (folder / "README.md").write_text("about the first")
    with pytest.raises(CheckpointError, match="force"):
        save_bundle({"a": torch.ones(3)}, MiniConfig(), folder)

    def torn() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(3)
        raise KeyboardInterrupt

    class Torn(dict):
        def items(self) -> Iterator[tuple[str, torch.Tensor]]:  # type: ignore[override]
            return torn()

    with pytest.raises(KeyboardInterrupt):
        save_bundle(Torn(), MiniConfig(), folder, force=True)
    assert torch.equal(read_bundle(folder)[1]["a"].float(), torch.zeros(3))
    assert (folder / "README.md").exists()
    size = save_bundle({"a": torch.ones(3)}, MiniConfig(lora_rank=2), folder, force=True)
    assert size == (folder / "model.safetensors").stat().st_size
    config, state = read_bundle(folder)
    assert (config.lora_rank, state["a"].dtype, sorted(p.name for p in tmp_path.iterdir())) == (
        2,
        torch.bfloat16,
        ["bundle"],
    )
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
