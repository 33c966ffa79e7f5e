"""What `load_folder` settles besides the weights: the template, and how tokenizer and word table fit together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.checkpoint import random_checkpoints as made
from tests.contracts.skeleton import extend

from chiasm.data.sequence import Sequence
from chiasm.errors import CheckpointError, TemplateError
from chiasm.model.generate import generate
from chiasm.systems.internvl.load import load_folder
from chiasm.text.templates import get_template, join
from chiasm.text.tokenizer import Tokenizer
from tiny_tokenizers import byte_level

WORDS = byte_level().vocab_size
PADDING = 9


def original(folder: Path, monkeypatch: pytest.MonkeyPatch, rows: int, **changes) -> Path:
    """An original-layout checkpoint with `rows` words and the byte tokenizer."""
    monkeypatch.setattr(made, "VOCAB", rows)
    made.write_original(folder, **changes)
    byte_level().save(folder)
    return folder


def alone(folder: Path, monkeypatch: pytest.MonkeyPatch, rows: int, *, tied: bool) -> Path:
    """A language model alone, likewise."""
    monkeypatch.setattr(made, "VOCAB", rows)
    made.write_text(folder, "qwen2", tied=tied)
    byte_level().save(folder)
    return folder


@pytest.mark.parametrize("named", [None, ""])
def test_an_original_checkpoint_without_a_template_is_not_guessed(tmp_path, monkeypatch, named) -> None:
    folder = original(tmp_path / "m", monkeypatch, WORDS, template=named)
    with pytest.raises(
        TemplateError, match=r"config\.json names no template: pass template=/--template"
    ) as caught:
        load_folder(folder)
    assert "\n" not in str(caught.value)
    assert load_folder(folder, template="internvl2_5").spec.template.name == "internvl2_5"


def test_the_template_of_the_config_is_taken(tmp_path, monkeypatch) -> None:
    folder = original(tmp_path / "m", monkeypatch, WORDS, template="internvl2_5")
    assert load_folder(folder).spec.template.name == "internvl2_5"


@pytest.mark.parametrize(
    ("template", "family"), [("Hermes-2", "qwen2"), ("internlm2-chat", "internlm2"), ("phi3-chat", "phi3")]
)
def test_the_templates_of_2_0_are_taken_with_their_families(tmp_path, monkeypatch, template, family) -> None:
    monkeypatch.setattr(made, "VOCAB", WORDS + 4)
    made.write_original(tmp_path, family, template=template)
    byte_level().save(tmp_path)
    tokenizer = Tokenizer.from_file(tmp_path)  # a copy: the one of all tests stays as it is
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"])
    tokenizer.save(tmp_path)
    model = load_folder(tmp_path)
    assert model.spec.template == get_template(template)
    assert model.spec.tokenizer.decode(
        model.inputs("Hi").token_ids.tolist(), skip_special_tokens=False
    ) == join(get_template(template).render([("user", "Hi")], generate=True))
    assert model.stop_ids[0] == tokenizer.token_to_id("<|end|>" if family == "phi3" else "<|im_end|>")
    assert len(model.chat("Hi", max_new_tokens=3).token_ids) <= 3


def test_an_answer_about_a_picture_may_cross_the_switch(tmp_path, monkeypatch) -> None:
    """Phi-3's factors change at 64 tokens here: cached equals full on both sides, pictures included."""
    monkeypatch.setattr(made, "VOCAB", WORDS + 4)
    made.write_original(tmp_path, "phi3", template="phi3-chat")
    byte_level().save(tmp_path)
    tokenizer = Tokenizer.from_file(tmp_path)
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"])
    tokenizer.save(tmp_path)
    model = load_folder(tmp_path, dtype="float32", system="")
    pixels = np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8)
    prompts = [
        model.inputs(
            [{"role": "user", "content": [{"type": "image", "image": Image.fromarray(pixels)}, text]}]
        )
        for text in ({"type": "text", "text": t} for t in ("What is it?", "Is it a bird, or is it a plane?"))
    ]
    lengths = [len(prompt.token_ids) for prompt in prompts]
    assert max(lengths) < 64
    assert lengths[0] != lengths[1]
    written = generate(model.model, [prompt.sequence for prompt in prompts], limit=70 - min(lengths))
    for prompt, tokens in zip(prompts, written, strict=True):
        whole = extend(prompt.sequence, Sequence.of_text(tokens))
        for n, token in enumerate(tokens):
            part = _first(whole, len(prompt.token_ids) + n)
            logits = model.model.head.logits(model.model.hidden(part)[-1:])[0]
            best, second = logits.topk(2).values.tolist()
            assert int(logits.argmax()) == token or best - second < 1e-3


def _first(sequence: Sequence, rows: int) -> Sequence:
    """The document's first rows, which hold all its pictures."""
    cut = {name: getattr(sequence, name)[:rows] for name in ("ids_T", "kind_T", "doc_T", "pos_T")}
    return replace(sequence, **cut)


def loaded(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, rows: int):
    if kind == "internvl":
        return load_folder(original(folder, monkeypatch, rows), dtype="float32")
    return load_folder(alone(folder, monkeypatch, rows, tied=kind == "tied"), dtype="float32")


@pytest.mark.parametrize("kind", ["internvl", "alone", "tied"])
def test_padding_rows_are_no_logits_and_never_written(tmp_path, monkeypatch, kind) -> None:
    model = loaded(kind, tmp_path / "m", monkeypatch, WORDS + PADDING)
    with torch.no_grad():  # were padding looked at, it would win every draw
        model.model.head.weight[WORDS:] = 1e3 * model.model.head.weight[:PADDING]
    inputs = model.inputs("What is it?")
    assert model.logits(inputs).shape == (len(inputs.token_ids), WORDS)
    hidden = model.model.hidden(inputs.sequence)
    whole = hidden @ model.model.head.weight.T
    assert bool((whole.argmax(-1) >= WORDS).any())
    torch.testing.assert_close(model.logits(inputs), whole[:, :WORDS].detach(), rtol=1e-4, atol=1e-4)
    for options in (
        {},
        {"temperature": 5.0, "seed": 1},
        {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3},
    ):
        reply = model.chat("What is it?", max_new_tokens=20, **options)
        assert reply.token_ids
        assert max(reply.token_ids) < WORDS


def test_the_loss_sees_padding_rows(tmp_path, monkeypatch) -> None:
    model = loaded("alone", tmp_path / "m", monkeypatch, WORDS + PADDING).model
    sequence = Sequence.of_text([5, 6, 7, 8])
    sequence = replace(sequence, labels_T=torch.tensor([6, 7, 8, 9]), weight_T=torch.ones(4))
    part = model.loss(sequence).parts["text"]
    logits = model.hidden(sequence) @ model.head.weight.T
    expected = torch.nn.functional.cross_entropy(logits, sequence.labels_T, reduction="sum")
    torch.testing.assert_close(part.total.float(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["internvl", "alone"])
def test_a_tokenizer_beyond_the_table_is_named(tmp_path, monkeypatch, kind) -> None:
    with pytest.raises(
        CheckpointError, match=f"ids up to {WORDS - 1} but the word table only {WORDS - 1} rows"
    ) as e:
        loaded(kind, tmp_path / "m", monkeypatch, WORDS - 1)
    assert "\n" not in str(e.value)
