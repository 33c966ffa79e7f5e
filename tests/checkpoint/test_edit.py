"""Changes on the way: tile size, vocabulary, language model; parts alone. What is not changed keeps every bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tests.checkpoint.random_checkpoints import (
    IMAGE_TOKEN,
    V_WIDTH,
    VOCAB,
    WIDTH,
    language_config,
    language_shapes,
    random_tensors,
    write_folder,
    write_original,
    write_text,
    write_tokenizer,
)

from chiasm.checkpoint.adapters import open_checkpoint
from chiasm.checkpoint.config import read_config
from chiasm.checkpoint.convert import convert, convert_part
from chiasm.checkpoint.store import CheckpointReader, read_json
from chiasm.data.sequence import Sequence
from chiasm.errors import ConfigError, TemplateError, UsageError
from chiasm.nn.vit import resize_positions
from chiasm.parts.vision.internvit import InternViT, InternViTConfig
from chiasm.systems.internvl.load import load_folder
from chiasm.text.tokenizer import Tokenizer
from tiny_tokenizers import byte_level

POSITIONS = "vision_model.embeddings.position_embedding"
WORDS, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def source(folder: Path, family: str = "qwen2", **changes) -> Path:
    write_original(folder, family, **changes)
    write_tokenizer(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {key: reader.tensor(key) for key in reader}


def changed(a: Path, b: Path) -> set[str]:
    """Names of tensors that differ."""
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    return {name for name in a if a[name].shape != b[name].shape or not torch.equal(a[name], b[name])}


# --- tile size -----------------------------------------------------------------------------------------------------


def test_image_size(tmp_path: Path) -> None:
    a = source(tmp_path / "a")
    (a / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.6], "size": 28}')
    convert(a, tmp_path / "b", "original", image_size=56)
    assert changed(a, tmp_path / "b") == {POSITIONS}
    old, new = (tensors_of(folder)[POSITIONS] for folder in (a, tmp_path / "b"))
    assert torch.equal(new, resize_positions(old, (2, 2), (4, 4)))
    config = read_config(tmp_path / "b")
    assert (config.image_size, config.force_image_size, config.tokens_per_tile) == (56, 56, 4)
    assert config.vision_config().tokens == 16
    processor = read_json(tmp_path / "b" / "preprocessor_config.json")
    assert (processor["size"], processor["image_mean"]) == (56, [0.4, 0.5, 0.6])
    convert(tmp_path / "b", tmp_path / "c", "hf")
    convert(a, tmp_path / "d", "hf", image_size=56)
    assert not changed(tmp_path / "c", tmp_path / "d")
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        assert read_json(tmp_path / "c" / name) == read_json(tmp_path / "d" / name)
    convert(tmp_path / "d", tmp_path / "e", "hf-old", image_size=28)
    assert read_json(tmp_path / "e" / "preprocessor_config.json")["size"] == {"height": 28, "width": 28}
    model = transformers.InternVLForConditionalGeneration.from_pretrained(tmp_path / "d")
    assert list(model.config.vision_config.image_size) == [56, 56]
    assert model.config.image_seq_length == 4


def test_resized_positions_encode_as_resampled_ones(tmp_path: Path) -> None:
    a = source(tmp_path / "a")
    convert(a, tmp_path / "b", "original", image_size=56)
    pixels, encoders = torch.randn(1, 3, 56, 56), []
    for folder in (a, tmp_path / "b"):
        opened = open_checkpoint(folder)
        encoder = InternViT(opened.vision)
        state = dict(opened.adapter.from_public(opened.reader, dtype=torch.float32))
        prefix = "embedder.vision."
        encoder.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        encoders.append(encoder.eval()(pixels))
    torch.testing.assert_close(*encoders, rtol=0.02, atol=0.02)  # positions were rounded to bfloat16


@pytest.mark.parametrize("side", [42, 0, -28, 30])
def test_impossible_tiles(tmp_path: Path, side: int) -> None:
    with pytest.raises(ConfigError, match=f"image size {side} is not a multiple of 28"):
        convert(source(tmp_path / "a"), tmp_path / "b", "original", image_size=side)
    assert not (tmp_path / "b").exists()


# --- vocabulary ----------------------------------------------------------------------------------------------------


def test_a_vocabulary_grows(tmp_path: Path) -> None:
    a = source(tmp_path / "a", "llama")
    for name in "bc":
        convert(a, tmp_path / name, "original", vocab_size=48, seed=3)
    assert not changed(tmp_path / "b", tmp_path / "c")
    assert changed(a, tmp_path / "b") == {WORDS, HEAD}
    old, new = tensors_of(a), tensors_of(tmp_path / "b")
    for name in (WORDS, HEAD):
        assert torch.equal(new[name][:VOCAB], old[name])
        assert new[name].shape == (48, WIDTH)
    mean = old[HEAD].float().mean(0).bfloat16()
    assert torch.equal(new[HEAD][VOCAB:], mean.expand(8, -1))
    assert 0.01 < float(new[WORDS][VOCAB:].float().std()) < 0.03
    assert read_config(tmp_path / "b").language_config().vocab_size == 48
    convert(tmp_path / "b", tmp_path / "d", "original", vocab_size=VOCAB)
    assert not changed(a, tmp_path / "d")


def test_a_vocabulary_is_cut_down_to_its_tokens(tmp_path: Path) -> None:
    a = source(tmp_path / "a")
    last = IMAGE_TOKEN + 4  # </ref>
    convert(a, tmp_path / "b", "hf", vocab_size=last + 1)
    assert open_checkpoint(tmp_path / "b").language.vocab_size == last + 1
    with pytest.raises(ConfigError, match=f"{last} rows is too small: the tokenizer has ids up to {last}"):
        convert(a, tmp_path / "c", "hf", vocab_size=last)


# --- language model ------------------------------------------------------------------------------------------------


def language_model(folder: Path, family: str, rows: int, *, wide: bool = False) -> Path:
    """A language model alone with a byte tokenizer; `rows` beyond its tokens are padding."""
    tokenizer = Tokenizer.from_file(_plain_words(folder))
    shapes = language_shapes("model.", "", family)
    shapes = {
        name: (tokenizer.vocab_size + rows, *s[1:]) if s[0] == VOCAB else s for name, s in shapes.items()
    }
    config = language_config(family) | {"vocab_size": tokenizer.vocab_size + rows}
    if wide:
        shapes = {name: tuple(2 * n if n == WIDTH else n for n in s) for name, s in shapes.items()}
        config |= {"hidden_size": 2 * WIDTH, "head_dim": 8, "num_key_value_heads": 1}
    return write_folder(folder, config, random_tensors(shapes, seed=9))


def _plain_words(folder: Path) -> Path:
    """A tokenizer without InternVL's tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(backend, {"eos_token": None})
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(folder)
    return folder


@pytest.mark.parametrize("family", ["qwen3", "phi3", "internlm2", "llama"])
def test_another_language_model(tmp_path: Path, family: str) -> None:
    a = source(tmp_path / "a")
    words = language_model(tmp_path / "words", family, rows=3)
    report = convert(a, tmp_path / "b", "original", language=words, seed=1)
    assert "tokenizer.json" in report.files
    assert not any("projector" in note for note in report.notes)
    ours, theirs, alone = tensors_of(tmp_path / "b"), tensors_of(a), tensors_of(words)
    for name, tensor in theirs.items():
        if name.startswith(("vision_model.", "mlp1.")):
            assert torch.equal(ours[name], tensor)
    table = {"internlm2": ("model.tok_embeddings.weight", "output.weight")}
    (table_words, table_head) = table.get(family, ("model.embed_tokens.weight", "lm_head.weight"))
    for name, tensor in alone.items():
        if name not in (table_words, table_head):
            assert torch.equal(ours[f"language_model.{name}"], tensor)
    tokenizer = Tokenizer.from_file(tmp_path / "b")
    assert len(ours[f"language_model.{table_words}"]) == tokenizer.vocab_size == 256 + 2 + 9
    head = ours[f"language_model.{table_head}"]
    assert torch.equal(head[258:], alone[table_head][:258].float().mean(0).bfloat16().expand(9, -1))
    assert torch.equal(head[:258], alone[table_head][:258])
    model = load_folder(tmp_path / "b", dtype="float32")
    assert model.model.embedder.words.weight.shape[0] == tokenizer.vocab_size
    text = load_folder(words, dtype="float32", template="chatml")
    ids = Sequence.of_text([5, 6, 7, 200])
    with torch.inference_mode():
        assert torch.equal(model.model.hidden(ids), text.model.hidden(ids))
    config = read_config(tmp_path / "b")
    assert config.image_token_id == tokenizer.token_to_id("<IMG_CONTEXT>")
    assert config.template == "internvl2_5"
    if family != "phi3":
        convert(a, tmp_path / "c", "hf", language=words, seed=1)
        convert(tmp_path / "b", tmp_path / "d", "hf")
        assert not changed(tmp_path / "c", tmp_path / "d")
        special = read_json(tmp_path / "c" / "tokenizer_config.json")["extra_special_tokens"]
        assert special["context_image_token"] == "<IMG_CONTEXT>"


def test_a_language_model_of_another_width(tmp_path: Path) -> None:
    a = source(tmp_path / "a")
    words = language_model(tmp_path / "words", "llama", rows=0, wide=True)
    reports = [
        convert(a, tmp_path / n, "original", language=words, seed=s)
        for n, s in (("b", 1), ("c", 1), ("d", 2))
    ]
    assert any("projector was drawn anew (16 -> 32 wide)" in note for note in reports[0].notes)
    ours, theirs = tensors_of(tmp_path / "b"), tensors_of(a)
    for leaf in ("weight", "bias"):
        assert torch.equal(ours[f"mlp1.0.{leaf}"], theirs[f"mlp1.0.{leaf}"])
    assert ours["mlp1.1.weight"].shape == (32, 4 * V_WIDTH)
    assert ours["mlp1.3.weight"].shape == (32, 32)
    assert float(ours["mlp1.1.weight"].abs().max()) <= (4 * V_WIDTH) ** -0.5 + 1e-3
    assert not changed(tmp_path / "b", tmp_path / "c")
    assert "mlp1.1.weight" in changed(tmp_path / "b", tmp_path / "d")
    assert load_folder(tmp_path / "b", system="").chat("Hi", max_new_tokens=2).token_ids


def test_a_language_model_of_another_dtype_is_noted(tmp_path: Path) -> None:
    words = language_model(tmp_path / "words", "llama", rows=0)
    for dtype, said in (("float32", 1), ("bfloat16", 0)):  # its tensors are bfloat16
        a = source(tmp_path / dtype)
        config = read_json(a / "config.json")
        (a / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}))
        notes = convert(a, tmp_path / f"of-{dtype}", "original", language=words).notes
        assert sum("load it with one dtype" in note for note in notes) == said


def test_language_models_that_do_not_go(tmp_path: Path) -> None:
    a = source(tmp_path / "a")
    with pytest.raises(UsageError, match="is a whole InternVL model"):
        convert(a, tmp_path / "b", "original", language=source(tmp_path / "other"))
    words = language_model(tmp_path / "words", "llama", rows=0)
    with pytest.raises(TemplateError, match="no token of this tokenizer"):
        convert(a, tmp_path / "b", "original", language=words, template="phi3-chat")
    with pytest.raises(TemplateError, match="unknown chat template"):
        convert(a, tmp_path / "b", "original", template="vicuna")
    assert not (tmp_path / "b").exists()


def test_only_the_template(tmp_path: Path) -> None:
    a = source(tmp_path / "a")
    convert(a, tmp_path / "b", "original", template="Hermes-2")
    assert not changed(a, tmp_path / "b")
    assert read_config(tmp_path / "b").template == "Hermes-2"


# --- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("six_b", [False, True])
def test_the_encoder_alone(tmp_path: Path, six_b: bool) -> None:
    a = source(tmp_path / "a", six_b=six_b)
    report = convert_part(a, tmp_path / "b", "vision")
    assert (report.source, report.target) == ("original", "vision")
    prefix = "vision_model."
    expected = {k.removeprefix(prefix): v for k, v in tensors_of(a).items() if k.startswith(prefix)}
    written = tensors_of(tmp_path / "b")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    config = read_json(tmp_path / "b" / "config.json")
    assert config["architectures"] == ["InternVisionModel"]
    assert InternViTConfig.from_public(config) == open_checkpoint(a).vision
    convert(a, tmp_path / "hf", "hf")
    convert_part(tmp_path / "hf", tmp_path / "c", "vision")
    assert not changed(tmp_path / "b", tmp_path / "c")


def test_the_projector_alone(tmp_path: Path) -> None:
    a = source(tmp_path / "a")
    convert_part(a, tmp_path / "b", "projector")
    written = tensors_of(tmp_path / "b")
    assert set(written) == {f"{n}.{leaf}" for n in (0, 1, 3) for leaf in ("weight", "bias")}
    assert all(torch.equal(tensor, tensors_of(a)[f"mlp1.{name}"]) for name, tensor in written.items())


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3", "internlm2", "internlm3"])
def test_the_language_model_alone_and_back(tmp_path: Path, family: str) -> None:
    a = source(tmp_path / "a", family)
    convert_part(a, tmp_path / "b", "language")
    written = tensors_of(tmp_path / "b")
    prefix = "language_model."
    expected = {k.removeprefix(prefix): v for k, v in tensors_of(a).items() if k.startswith(prefix)}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    opened = open_checkpoint(tmp_path / "b")
    language = open_checkpoint(a).language
    if family == "phi3":  # "su" has a later name, the only one that every release of transformers reads
        language = replace(language, rope_scaling={**language.rope_scaling, "type": "longrope"})
    assert (opened.layout, opened.language) == ("text", language)
    assert (tmp_path / "b" / "added_tokens.json").is_file()
    if family in ("qwen2", "qwen3", "phi3", "internlm3"):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "b", output_loading_info=True, pad_token_id=0
        )
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(model.lm_head.weight, written["lm_head.weight"])


def test_a_model_given_its_own_language_model_stays_the_same(tmp_path: Path, monkeypatch) -> None:
    from tests.checkpoint import random_checkpoints as made

    monkeypatch.setattr(made, "VOCAB", byte_level().vocab_size)
    made.write_original(tmp_path / "a", "internlm2")
    byte_level().save(tmp_path / "a")
    convert_part(tmp_path / "a", tmp_path / "b", "language")
    convert(tmp_path / "a", tmp_path / "c", "original", language=tmp_path / "b")
    assert not changed(tmp_path / "a", tmp_path / "c")
    a, c = read_config(tmp_path / "a"), read_config(tmp_path / "c")
    assert a.language_config(tie_words=False) == c.language_config(tie_words=False)


def test_parts_refuse(tmp_path: Path) -> None:
    a = source(tmp_path / "a")
    with pytest.raises(UsageError, match="unknown part 'eyes'"):
        convert_part(a, tmp_path / "b", "eyes")
    with pytest.raises(UsageError, match="language model alone"):
        convert_part(write_text(tmp_path / "t"), tmp_path / "b", "vision")
    with pytest.raises(UsageError, match="is, holds or lies in"):
        convert_part(a, a / "inner", "vision")
    assert not (tmp_path / "b").exists()
