"""A model put together of parts, and a run's weights put back into what it began with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.checkpoint import random_checkpoints as made
from tests.systems.tiny_training import checkpoint, words

from chiasm.checkpoint.adapters import open_checkpoint
from chiasm.checkpoint.compose import VISION, compose, open_encoder, with_encoder, with_trained
from chiasm.checkpoint.edit import Draft, draft_of, extract
from chiasm.errors import CheckpointError, ConfigError
from chiasm.nn.lora import LoRALinear


def drafted(folder: Path) -> Draft:
    return draft_of(open_checkpoint(folder))


def test_an_encoder_alone_is_that_of_its_checkpoint(tmp_path, monkeypatch) -> None:
    for six_b in (False, True):
        whole = made.write_original(tmp_path / f"whole{six_b}", six_b=six_b)
        extract(whole, tmp_path / f"vit{six_b}", "vision")
        inside, alone = open_encoder(whole), open_encoder(tmp_path / f"vit{six_b}")
        assert inside.config == alone.config
        expected, found = dict(inside.tensors()), dict(alone.tensors())
        assert expected.keys() == found.keys()
        assert all(name.startswith(VISION) for name in found)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert dict(alone.tensors()).keys() == found.keys()  # may be read again


def test_what_holds_no_encoder_is_refused(tmp_path, monkeypatch) -> None:
    language = words(tmp_path / "words", monkeypatch)
    with pytest.raises(CheckpointError, match="neither an InternVL checkpoint nor an InternViT alone"):
        open_encoder(language)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_encoder(tmp_path / "nowhere")


@pytest.mark.parametrize("tied", [False, True])
def test_parts_keep_every_bit_and_the_rest_is_drawn_by_seed(tmp_path, monkeypatch, tied) -> None:
    whole = checkpoint(tmp_path / "whole", monkeypatch)
    language = words(tmp_path / "words", monkeypatch, "llama", tied=tied)
    encoder = open_encoder(whole)

    def made_with(seed: int) -> dict[str, torch.Tensor]:
        return dict(compose(encoder, language, seed=seed, max_tiles=3, untie=False).tensors)

    state, again, other = made_with(1), made_with(1), made_with(2)
    opened = open_checkpoint(language)
    with opened.reader:
        own = dict(opened.adapter.from_public(opened.reader))
    for name, tensor in own.items():
        assert torch.equal(state[name][: len(tensor)], tensor), name
    for name, tensor in encoder.tensors():
        assert torch.equal(state[name], tensor)
    assert ("head.weight" in state) is not tied
    assert all(torch.equal(state[name], again[name]) for name in state)
    drawn = {name for name in state if not torch.equal(state[name], other[name])}
    assert drawn == {
        f"embedder.connect.{part}" for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    }
    draft = compose(encoder, language, max_tiles=3)
    apart = dict(draft.tensors)
    assert draft.language.tie_words is False
    if tied:  # the output matrix begins as a copy; its new rows are the mean of the old ones
        old = len(own["embedder.words.weight"])
        assert torch.equal(apart["head.weight"][:old], own["embedder.words.weight"])
    assert apart["head.weight"].shape == apart["embedder.words.weight"].shape
    assert draft.public.max_dynamic_patch == 3
    assert draft.public.template == "internvl2_5"
    assert draft.public.image_token_id == draft.tokenizer.token_to_id("<IMG_CONTEXT>")


def test_adapters_are_merged_split_by_split(tmp_path, monkeypatch) -> None:
    """Against the layer that computed them."""
    draft = drafted(checkpoint(tmp_path / "m", monkeypatch))
    before = dict(drafted(tmp_path / "m").tensors)
    name = "trunk.layers.1.attn.qkv"
    linear = torch.nn.Linear(16, 32, bias=True)
    linear.weight.data.copy_(before[f"{name}.weight"])
    adapted = LoRALinear(linear, 3, 5.0, splits=(16, 8, 8))
    torch.nn.init.normal_(adapted.lora_B, generator=torch.Generator().manual_seed(0))
    weights = {f"{name}.lora_A": adapted.lora_A.detach(), f"{name}.lora_B": adapted.lora_B.detach()}
    after = dict(with_trained(draft, weights, scales={"trunk.": 5.0 / 3}).tensors)
    torch.testing.assert_close(after[f"{name}.weight"], adapted.merged().weight.detach())
    assert all(torch.equal(before[key], after[key]) for key in before if key != f"{name}.weight")


def test_weights_of_another_model_are_refused(tmp_path, monkeypatch) -> None:
    draft = drafted(checkpoint(tmp_path / "m", monkeypatch))
    with pytest.raises(CheckpointError, match=r"trained weight trunk\.layers\.9\.norm1\.weight has no place"):
        with_trained(draft, {"trunk.layers.9.norm1.weight": torch.ones(16)}, scales={})
    with pytest.raises(CheckpointError, match=r"is \(3,\), the model has \(16,\)"):
        with_trained(draft, {"trunk.norm.weight": torch.ones(3)}, scales={})
    with pytest.raises(CheckpointError, match="has no place"):
        with_trained(draft, {"trunk.layers.0.moe.lora_A": torch.ones(2, 2)}, scales={"trunk.": 2.0})
    encoder = open_encoder(tmp_path / "m")
    with pytest.raises(ConfigError, match="does not fit the model's"):
        with_encoder(draft, replace(encoder, config=replace(encoder.config, image_size=56)))
