"""The bundled model's vocabulary: nine tokens more than its language model, their rows the mean of all others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.checkpoint import random_checkpoints as made
from tests.systems.test_load import PADDING
from tokenizers import Tokenizer as Backend

from chiasm.checkpoint.adapters import open_checkpoint
from chiasm.checkpoint.vocab import SPECIAL_TOKENS
from chiasm.checkpoint.wheel import smollm2_folder
from chiasm.parts.vision.internvit import InternViT, InternViTConfig
from chiasm.systems.internvl.mini import MiniConfig, build_mini
from chiasm.text.tokenizer import Tokenizer
from tiny_tokenizers import byte_level

VISION = InternViTConfig(hidden_size=8, intermediate_size=12, layers=1, heads=2, patch_size=14, image_size=28)


def plain() -> Tokenizer:
    """The byte tokenizer before InternVL's tokens (they are its last ids)."""
    state = json.loads(byte_level().backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in SPECIAL_TOKENS]
    return Tokenizer(Backend.from_str(json.dumps(state)), {"eos_token": None})


def folder_of(path: Path, monkeypatch: pytest.MonkeyPatch, *, tied: bool, padding: int = 0) -> Path:
    monkeypatch.setattr(made, "VOCAB", plain().vocab_size + padding)
    made.write_text(path, "llama", tied=tied)
    plain().save(path)
    return path


@pytest.mark.usefixtures("smollm2_wheel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_new_rows_are_bit_for_bit_what_was_trained_with(dtype: torch.dtype) -> None:
    """The published bundle was trained on the rule spelled out here."""
    with (opened := open_checkpoint(smollm2_folder())).reader as reader:
        old = dict(opened.adapter.from_public(reader, dtype=dtype))["embedder.words.weight"]
    expected = torch.cat([old, old.float().mean(0, keepdim=True).to(dtype).expand(9, -1)])
    model, spec = build_mini(MiniConfig(vision=VISION), language_dtype=dtype)
    assert torch.equal(model.embedder.words.weight, expected)
    assert model.head.weight is model.embedder.words.weight
    assert model.head.used == spec.tokenizer.vocab_size == len(expected)
    assert [spec.tokenizer.token_to_id(t) for t in SPECIAL_TOKENS] == list(range(len(old), len(expected)))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("padding", [0, 4, PADDING + 5])
def test_rows_of_any_language_model(tmp_path, monkeypatch, tied: bool, padding: int) -> None:
    folder = folder_of(tmp_path / "m", monkeypatch, tied=tied, padding=padding)
    count = plain().vocab_size
    with (opened := open_checkpoint(folder)).reader as reader:
        old = dict(opened.adapter.from_public(reader, dtype=torch.float32))
    model, spec = build_mini(MiniConfig(vision=VISION), language_folder=folder)
    words, head = model.embedder.words.weight, model.head.weight
    assert words.shape == head.shape == (count + 9, made.WIDTH)
    assert spec.tokenizer.vocab_size == model.head.used == count + 9
    assert (head is words) == tied
    was = old["embedder.words.weight" if tied else "head.weight"][:count]
    assert torch.equal(words[:count], old["embedder.words.weight"][:count])
    assert torch.equal(head[:count], was)
    torch.testing.assert_close(head[count:], was.mean(0).expand(9, -1))
    assert not any(p.is_meta for p in model.parameters())


def test_fresh_weights_depend_on_the_seed_alone(tmp_path, monkeypatch) -> None:
    """Growing the vocabulary draws from a generator of its own."""
    folder = folder_of(tmp_path / "m", monkeypatch, tied=True)
    torch.manual_seed(7)
    expected = InternViT(VISION).state_dict()
    model, _ = build_mini(MiniConfig(vision=VISION), language_folder=folder, seed=7)
    drawn = model.get_submodule("embedder.vision").state_dict()
    assert all(torch.equal(drawn[name], value) for name, value in expected.items())
