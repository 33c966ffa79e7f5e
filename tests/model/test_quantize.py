"""Rounding a model: by name, in place or while it is loaded; what answers afterwards, and what is refused."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.checkpoint import random_checkpoints as made
from tests.tiny_chat import ask, picture, tiny_chat

import chiasm
from chiasm.errors import ConfigError, DataError, UsageError
from chiasm.eval.families import describe
from chiasm.model.prefix import PrefixCache
from chiasm.model.quantize import QUANTIZE, Quantization, quantize_model
from chiasm.nn.quant import Int4Linear, Int8Linear, quantize_rows
from chiasm.systems.internvl.load import load_folder
from tiny_tokenizers import byte_level


def folder_of(path: Path, monkeypatch: pytest.MonkeyPatch, *, seed: int = 0) -> Path:
    """An original-layout checkpoint with the byte tokenizer."""
    monkeypatch.setattr(made, "VOCAB", byte_level().vocab_size + 7)
    made.write_original(path, "qwen2", template="internvl2_5", seed=seed)
    byte_level().save(path)
    return path


def words_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A language model alone, whose head is its word table."""
    monkeypatch.setattr(made, "VOCAB", byte_level().vocab_size + 7)
    made.write_text(path, "qwen2", tied=True)
    byte_level().save(path)
    return path


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def asked() -> list[dict]:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8)
    content = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": "What?"}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("text", [*QUANTIZE, "int8+vision-w8a8", "int4-128+vision-w8a8"])
def test_names_are_read_and_written(text: str) -> None:
    how = Quantization.parse(text)
    assert Quantization.parse(str(how)) == how
    assert str(how) == {"int4": "int4-64"}.get(text, text)
    assert Quantization.parse(text.upper()) == how


@pytest.mark.parametrize(
    "text", ["", "int5", "int4-7", "int8+", "int8 + vision-w8a8", "int8+w8a8", "vision-int8"]
)
def test_other_names_are_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"quantize .* (is not known: join|names the language part twice)"
    ) as caught:
        chiasm.load("chiasm-mini", quantize=text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "make"),
    [
        *((how, folder_of) for how in ("int8", "w8a8", "int4-32", "vision-w8a8", "int8+vision-w8a8")),
        *((how, words_of) for how in ("int8", "int4")),
    ],
)
def test_answers_come_from_rounded_weights(tmp_path, monkeypatch, how: str, make) -> None:
    folder = make(tmp_path / "m", monkeypatch)
    question = "Hi" if make is words_of else asked()
    plain, rounded = load_folder(folder, dtype="float32"), load_folder(folder, dtype="float32", quantize=how)
    inputs = plain.inputs(question)
    wanted, got = plain.logits(inputs), rounded.logits(inputs)
    assert 1e-5 < distance(got, wanted) < 0.6  # 16 channels are few for errors to average out in
    assert rounded.model.quantized == str(Quantization.parse(how))
    assert len(rounded.chat(question, max_new_tokens=4).token_ids) <= 4
    # Loaded piece by piece or rounded afterwards: the same numbers.
    quantize_model(plain.model, how)
    torch.testing.assert_close(plain.logits(inputs), got, rtol=0, atol=0)


@pytest.mark.parametrize(("how", "most"), [("int8", 1e-3), ("int4-32", 0.05)])
def test_weights_only_means_weights_only(tmp_path, monkeypatch, how: str, most: float) -> None:
    """A plain model whose weights are the rounded ones, written out, answers the same."""
    folder = folder_of(tmp_path / "m", monkeypatch)
    plain, rounded = load_folder(folder, dtype="float32"), load_folder(folder, dtype="float32", quantize=how)
    for path, layer in rounded.model.trunk.named_modules():
        if isinstance(layer, Int8Linear | Int4Linear):
            linear = plain.model.trunk.get_submodule(path)
            if isinstance(layer, Int4Linear):
                weight = layer.dequantized().float()
            else:
                codes, scale = quantize_rows(linear.weight.detach())
                weight = codes * scale[:, None]
            assert distance(weight, linear.weight.detach()) > 1e-3
            linear.weight.data.copy_(weight)
    codes, scale = quantize_rows(plain.model.head.weight.detach())
    plain.model.head.weight.data.copy_(codes * scale[:, None])
    inputs = plain.inputs(asked())
    assert distance(rounded.logits(inputs), plain.logits(inputs)) < most


def test_nothing_of_the_unrounded_layers_is_left(tmp_path, monkeypatch) -> None:
    folder = folder_of(tmp_path / "m", monkeypatch)
    model = load_folder(folder, quantize="int8+vision-w8a8").model
    assert not [m for m in model.trunk.modules() if isinstance(m, torch.nn.Linear)]
    layers = model.embedder.vision.layers
    assert all(isinstance(m, Int8Linear) for layer in layers for m in (layer.attn.qkv, layer.mlp.fc2))
    assert all(layer.attn.by_head and layer.mlp.fc2.floor for layer in layers)
    assert model.head.weight is None  # its own; where it is the word table's, that is still looked up
    assert load_folder(words_of(tmp_path / "t", monkeypatch), quantize="int4").model.head.weight is not None


def test_only_the_words_in_use_are_rounded(tmp_path, monkeypatch) -> None:
    model = load_folder(folder_of(tmp_path / "m", monkeypatch), quantize="int4").model
    assert isinstance(model.trunk.layers[0].ffn.down, Int4Linear)
    assert isinstance(model.head.rounded, Int8Linear)
    assert model.head.rounded.out_features == model.head.used == byte_level().vocab_size


def test_what_a_rounded_model_cannot_do_is_said(tmp_path, monkeypatch) -> None:
    chat = load_folder(folder_of(tmp_path / "m", monkeypatch), quantize="int8")
    from chiasm.data.layout import layout

    labelled = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    sequence = layout(labelled, chat.spec, train=True)
    with pytest.raises(DataError, match="load the model without quantize"), torch.no_grad():
        chat.model.loss(sequence)
    words = words_of(tmp_path / "t", monkeypatch)
    with pytest.raises(UsageError, match="vision-w8a8: this model has no vision encoder"):
        load_folder(words, quantize="vision-w8a8")


def test_a_rounded_model_is_not_rounded_moved_or_saved(tmp_path, monkeypatch) -> None:
    chat = load_folder(folder_of(tmp_path / "m", monkeypatch), quantize="vision-w8a8")
    assert chat.quantized == "vision-w8a8"
    before, dtypes = chat.logits(chat.inputs(asked())), {p.dtype for p in chat.model.parameters()}
    with pytest.raises(UsageError, match=r"int8: the weights are rounded already \(vision-w8a8\)"):
        quantize_model(chat.model, "int8")
    for spread in (
        lambda m: m.double(),
        lambda m: m.half(),
        copy.deepcopy,
        lambda m: m.state_dict(),
    ):
        with pytest.raises(ConfigError, match="is not moved, copied, saved or trained"):
            spread(chat.model)
    assert {p.dtype for p in chat.model.parameters()} == dtypes  # nothing was moved half-way
    torch.testing.assert_close(chat.logits(chat.inputs(asked())), before, rtol=0, atol=0)


def test_nothing_is_no_rounding() -> None:
    model = tiny_chat().model
    with pytest.raises(UsageError, match="names nothing to round"):
        quantize_model(model, Quantization())
    with pytest.raises(UsageError, match="not 7"):
        Quantization(language="int4", group=7)
    with pytest.raises(UsageError, match="quantize 3 is not known"):
        chiasm.load("chiasm-mini", quantize=3)  # type: ignore[arg-type]


def test_what_was_remembered_before_rounding_is_forgotten() -> None:
    chat, fresh = tiny_chat(prefixes=PrefixCache(min_rows=8)), tiny_chat(prefixes=PrefixCache(min_rows=8))
    question = ask("Is it the same question, asked again?", picture())
    chat.chat(question, max_new_tokens=8)
    for model in (chat, fresh):
        quantize_model(model.model, "w8a8+vision-w8a8")
    assert chat.chat(question, max_new_tokens=8) == fresh.chat(question, max_new_tokens=8)
    assert chat.chat(question, max_new_tokens=8).usage["reused_tokens"] > 8


def test_manifests_tell_rounded_models_apart(tmp_path, monkeypatch) -> None:
    folder = folder_of(tmp_path / "m", monkeypatch)
    facts = [describe(load_folder(folder, quantize=how)) for how in (None, "int8", "w8a8", "int8")]
    assert [f.get("quantize") for f in facts] == [None, "int8", "w8a8", "int8"]
    assert facts[1] == facts[3]
    assert facts[0]["weights"] != facts[1]["weights"]
    other = folder_of(tmp_path / "other", monkeypatch, seed=1)
    assert describe(load_folder(other, quantize="int8"))["weights"] != facts[1]["weights"]
