"""LoRA-wrapped saves: names of peft, the formula, what conversion writes, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.checkpoint.random_checkpoints import (
    original_config,
    original_shapes,
    random_tensors,
    write_folder,
    write_sharded,
    write_tokenizer,
)

from chiasm.checkpoint.adapters import open_checkpoint
from chiasm.checkpoint.convert import convert, convert_part
from chiasm.checkpoint.lora import MergedReader, open_reader
from chiasm.checkpoint.store import CheckpointReader, read_json
from chiasm.errors import CheckpointError
from chiasm.nn.lora import LoRALinear

R = 3
TARGETS = {  # what the training script adapts, by part and family
    "vision": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "qwen2": (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ),
    "internlm2": (
        "attention.wqkv",
        "attention.wo",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    ),
    "phi3": ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"),
}


def wrapped(family: str, *, old: bool = False, vision: bool = True, language: bool = True):
    """(plain tensors, the same as peft saves them, adapters by plain weight name)."""
    plain = random_tensors(original_shapes(family), seed=3)
    stored, adapters = {}, {}
    generator = torch.Generator().manual_seed(5)
    for name, tensor in plain.items():
        part = name.split(".")[0] + "."
        wraps = {"vision_model.": vision, "language_model.": language}.get(part, False)
        inside = part + "base_model.model." + name.removeprefix(part) if wraps else name
        layer, _, leaf = inside.rpartition(".")
        targets = TARGETS["vision" if part == "vision_model." else family]
        if not (wraps and layer.endswith(targets)):
            stored[inside] = tensor
            continue
        stored[inside if old else f"{layer}.base_layer.{leaf}"] = tensor
        if leaf != "weight":
            continue
        a = torch.randn(R, tensor.shape[1], generator=generator).bfloat16()
        b = torch.randn(tensor.shape[0], R, generator=generator).bfloat16()
        end = "weight" if old else "default.weight"
        stored |= {f"{layer}.lora_A.{end}": a, f"{layer}.lora_B.{end}": b}
        adapters[name] = (a, b)
    config = original_config(family, use_llm_lora=R * language, use_backbone_lora=R * vision)
    return plain, stored, adapters, config


@pytest.mark.parametrize("family", ["qwen2", "internlm2", "phi3"])
@pytest.mark.parametrize("old", [False, True], ids=["base_layer", "older peft"])
def test_read_as_if_merged(tmp_path: Path, family: str, old: bool) -> None:
    plain, stored, adapters, config = wrapped(family, old=old)
    write_sharded(tmp_path, config, stored)
    reader = open_reader(tmp_path)
    assert isinstance(reader, MergedReader)
    assert reader.merged == len(adapters) == 2 * 4 + 2 * len(TARGETS[family])
    assert set(reader) == set(reader.keys()) == plain.keys()
    assert len(reader) == len(plain)
    for name, tensor in plain.items():
        assert name in reader
        assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        if name not in adapters:
            assert torch.equal(reader.tensor(name), tensor)
            continue
        a, b = adapters[name]
        layer = torch.nn.Linear(*reversed(tensor.shape), bias=False, dtype=torch.bfloat16)
        layer.weight.data.copy_(tensor)
        adapter = LoRALinear(layer, R, 2 * R)
        with torch.no_grad():
            adapter.lora_A.copy_(a)
            adapter.lora_B.copy_(b)
        torch.testing.assert_close(reader.tensor(name), adapter.merged().weight.data)
    assert not open_checkpoint(tmp_path).adapter.unmapped(reader)


@pytest.mark.parametrize(("vision", "language"), [(True, False), (False, True)])
def test_conversion_writes_plain_weights(tmp_path: Path, vision: bool, language: bool) -> None:
    plain, stored, adapters, config = wrapped("internlm2", vision=vision, language=language)
    write_folder(tmp_path / "a", config, stored)
    write_tokenizer(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", "original")
    assert f"LoRA adapters of {len(adapters)} weights were merged" in report.notes
    written, reader = CheckpointReader(tmp_path / "b"), open_reader(tmp_path / "a")
    assert set(written) == plain.keys()
    assert all(torch.equal(written.tensor(name), reader.tensor(name)) for name in plain)
    saved = read_json(tmp_path / "b" / "config.json")
    assert (saved["use_llm_lora"], saved["use_backbone_lora"]) == (0, 0)
    part = convert_part(tmp_path / "a", tmp_path / "e", "language")
    assert part.notes[0] in report.notes
    alone = CheckpointReader(tmp_path / "e")
    assert all(torch.equal(alone.tensor(n), written.tensor(f"language_model.{n}")) for n in alone)
    convert(tmp_path / "a", tmp_path / "c", "hf")
    convert(tmp_path / "c", tmp_path / "d", "original")
    again = CheckpointReader(tmp_path / "d")
    assert all(torch.equal(again.tensor(name), written.tensor(name)) for name in plain)


def test_plain_folders_are_read_plainly(tmp_path: Path) -> None:
    write_folder(tmp_path, original_config(), random_tensors(original_shapes()))
    assert type(open_reader(tmp_path)) is CheckpointReader


LAYER = "language_model.base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t, c: c.update(use_llm_lora=8), "has rank 3 but config.json says use_llm_lora 8"),
        (lambda t, c: c.pop("use_llm_lora"), "says use_llm_lora None"),
        (lambda t, c: t.pop(f"{LAYER}.lora_B.default.weight"), "but not its lora_B"),
        (lambda t, c: t.pop(f"{LAYER}.lora_A.default.weight"), "but not its lora_A"),
        (lambda t, c: t.pop(f"{LAYER}.base_layer.weight"), "but not language_model.model.layers.0"),
        (lambda t, c: t.update({f"{LAYER}.lora_A.two.weight": torch.zeros(3, 16)}), "several LoRA adapters"),
        (lambda t, c: t.update({f"{LAYER}.lora_A.default.weight": torch.zeros(3, 9)}), "do not fit"),
        (lambda t, c: t.update({f"{LAYER}.lora_A.default.weight": torch.zeros(3)}), "is a matrix"),
    ],
)
def test_refusals(tmp_path: Path, spoil, message: str) -> None:
    _, stored, _, config = wrapped("qwen2")
    spoil(stored, config)
    write_folder(tmp_path, config, stored)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_kinds_of_adapters_are_named(tmp_path: Path) -> None:
    _, stored, _, config = wrapped("qwen2")
    stored[f"{LAYER}.lora_magnitude_vector.default.weight"] = torch.zeros(16)
    write_folder(tmp_path, config, stored)
    opened = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"unexpected .*lora_magnitude_vector.*merge them"):
        opened.adapter.check(opened.reader)
