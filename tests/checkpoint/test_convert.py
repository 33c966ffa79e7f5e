"""Conversion between layouts: bit-exact round trips, configs, companions, refusals; read by transformers."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from jinja2 import Environment
from tests.checkpoint.random_checkpoints import (
    IMAGE_TOKEN,
    VOCAB,
    original_config,
    original_shapes,
    random_tensors,
    write_folder,
    write_original,
    write_sharded,
    write_text,
    write_tokenizer,
)
from tests.checkpoint.test_adapters import hf_model
from tests.text.test_slow_files import internlm2, write_qwen2

from chiasm.checkpoint.adapters import open_checkpoint
from chiasm.checkpoint.config import read_config
from chiasm.checkpoint.convert import added_tokens, convert, convert_part
from chiasm.checkpoint.preprocess import preprocessor_files, read_tile_policy
from chiasm.checkpoint.store import CheckpointReader, read_json
from chiasm.errors import CheckpointError, ConfigError, UsageError
from chiasm.media.tiles import NORMALIZATIONS, TilePolicy
from chiasm.text.templates import TEMPLATES, join
from chiasm.text.tokenizer import Tokenizer

FAMILIES = ("qwen2", "llama")


def source(folder, family="qwen2", **changes):
    write_original(folder, family, **changes)
    write_tokenizer(folder)
    return folder


def tensors_of(folder):
    reader = CheckpointReader(folder)
    return {key: reader.tensor(key) for key in reader}


def same_tensors(a, b):
    a, b = tensors_of(a), tensors_of(b)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("six_b", [False, True])
@pytest.mark.parametrize("through", ["hf", "hf-old"])
def test_original_to_hf_and_back(tmp_path, family, six_b, through):
    source(tmp_path / "a", family, six_b=six_b)
    there = convert(tmp_path / "a", tmp_path / "b", through)
    back = convert(tmp_path / "b", tmp_path / "c", "original")
    assert (there.source, there.target, back.source) == ("original", through, through)
    assert there.tensors > back.tensors  # q, k, v of the encoder are apart
    assert there.bytes == back.bytes
    assert same_tensors(tmp_path / "a", tmp_path / "c")
    a, b, c = (read_config(tmp_path / name) for name in "abc")
    assert replace(c, image_token_id=None) == a
    assert replace(b, image_token_id=None) == a
    config = read_json(tmp_path / "c" / "config.json")
    for added in ("hf_config", "tie_word_embeddings"):
        config.pop(added)
    assert config == original_config(family, six_b=six_b)
    assert CheckpointReader(tmp_path / "b").config["image_token_id"] == IMAGE_TOKEN


@pytest.mark.parametrize("family", FAMILIES)
def test_hf_saved_by_transformers_to_original_and_back(tmp_path, family):
    model = hf_model(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "original")
    convert(tmp_path / "b", tmp_path / "c", "hf-old")
    assert same_tensors(tmp_path / "a", tmp_path / "c")
    convert(tmp_path / "b", tmp_path / "d", "hf")
    assert tensors_of(tmp_path / "d").keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensors_of(tmp_path / "d")[name], tensor)


def test_nan_and_negative_zero_keep_their_bits(tmp_path):
    tensors = random_tensors(original_shapes())
    odd = torch.tensor([0x7FC1, -0x8000, 0x7F81, 1], dtype=torch.int16).view(torch.bfloat16)
    for tensor in tensors.values():
        tensor.view(-1)[:4] = odd[: tensor.numel()]
    write_folder(tmp_path / "a", original_config(), tensors)
    write_tokenizer(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "hf")
    convert(tmp_path / "b", tmp_path / "c", "original")
    assert same_tensors(tmp_path / "a", tmp_path / "c")


def test_tied_words_are_written_out_for_the_original(tmp_path):
    hf_model("qwen2", tied=True).save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", "original")
    tensors = tensors_of(tmp_path / "b")
    words = tensors["language_model.model.embed_tokens.weight"]
    assert torch.equal(tensors["language_model.lm_head.weight"], words)
    assert any("tied words" in note for note in report.notes)
    config = read_json(tmp_path / "b" / "config.json")
    assert config["llm_config"]["tie_word_embeddings"] is False
    convert(tmp_path / "b", tmp_path / "c", "hf")
    config = read_json(tmp_path / "c" / "config.json")
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    convert(tmp_path / "a", tmp_path / "d", "hf")
    assert "lm_head.weight" not in CheckpointReader(tmp_path / "d")
    assert read_json(tmp_path / "d" / "config.json")["tie_word_embeddings"] is True


@pytest.mark.parametrize("to", ["hf", "hf-old"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("six_b", [False, True])
def test_transformers_loads_what_we_write(tmp_path, to, family, six_b):
    from transformers import InternVLForConditionalGeneration

    source(tmp_path / "a", family, six_b=six_b)
    convert(tmp_path / "a", tmp_path / "b", to, max_shard_bytes=4000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = InternVLForConditionalGeneration.from_pretrained(
            tmp_path / "b", output_loading_info=True, dtype=torch.bfloat16
        )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not model.config.tie_word_embeddings
    assert model.config.text_config.rope_parameters["rope_theta"] == 1e6
    assert model.config.text_config.rope_parameters["rope_type"] == "dynamic"
    stated = tensors_of(tmp_path / "a")
    state = model.state_dict()
    assert torch.equal(state["lm_head.weight"], stated["language_model.lm_head.weight"])
    qkv = [state[f"model.vision_tower.encoder.layer.1.attention.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(torch.cat(qkv), stated["vision_model.encoder.layers.1.attn.qkv.weight"])
    assert torch.equal(
        state["model.language_model.layers.1.mlp.gate_proj.weight"],
        stated["language_model.model.layers.1.mlp.gate_proj.weight"],
    )


def test_shards(tmp_path):
    source(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", "hf", max_shard_bytes=5000)
    assert len(report.shards) > 2
    assert all((tmp_path / "b" / shard).is_file() for shard in report.shards)
    again = write_sharded(tmp_path / "c", original_config(), random_tensors(original_shapes()))
    write_tokenizer(again)
    convert(again, tmp_path / "d", "hf")
    assert same_tensors(tmp_path / "b", tmp_path / "d")


def test_the_same_layout_only_rewrites(tmp_path):
    source(tmp_path / "a")
    (tmp_path / "a" / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "x": 1}')
    convert(tmp_path / "a", tmp_path / "b", "original")
    assert same_tensors(tmp_path / "a", tmp_path / "b")
    assert replace(read_config(tmp_path / "b"), image_token_id=None) == read_config(tmp_path / "a")
    assert read_json(tmp_path / "b" / "preprocessor_config.json")["x"] == 1


# --- companions --------------------------------------------------------------------------------------------------


def test_tokenizer_files_travel(tmp_path):
    source(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer.model"):
        (tmp_path / "a" / name).write_bytes(name.encode() + b"\0")
    (tmp_path / "a" / "modeling_internvl_chat.py").write_text("raise SystemExit")
    report = convert(tmp_path / "a", tmp_path / "b", "hf")
    for name in (
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.model",
        "added_tokens.json",
    ):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
        assert name in report.files
    assert not list((tmp_path / "b").glob("*.py"))
    config = read_json(tmp_path / "b" / "tokenizer_config.json")
    assert config["extra_special_tokens"]["context_image_token"] == "<IMG_CONTEXT>"
    assert (
        config["added_tokens_decoder"]
        == read_json(tmp_path / "a" / "tokenizer_config.json")["added_tokens_decoder"]
    )
    assert json.loads(json.dumps(report.to_dict()))["target"] == "hf"


def slow_release(folder, kind):
    """A release whose tokenizer is slow, with as many words as that has; the tokenizer as we read it."""
    if kind == "internlm2":
        internlm2(folder)
        (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    else:
        write_qwen2(folder)
    tokenizer = Tokenizer.from_file(folder)
    rows = tokenizer.vocab_size
    config = original_config(kind)
    config["llm_config"]["vocab_size"] = rows
    shapes = original_shapes(kind)
    shapes = {name: (rows, *s[1:]) if s[0] == VOCAB else s for name, s in shapes.items()}
    write_folder(folder, config, random_tensors(shapes))
    return tokenizer


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
@pytest.mark.parametrize("to", ["hf", "hf-old", "language"])
def test_transformers_opens_a_slow_tokenizer_that_was_converted(tmp_path, kind, to):
    """InternLM2's is a SentencePiece vocabulary whose class is remote code, which is never written."""
    from transformers import AutoTokenizer

    ours = slow_release(tmp_path / "a", kind)
    if to == "language":
        report = convert_part(tmp_path / "a", tmp_path / "b", to)
    else:
        report = convert(tmp_path / "a", tmp_path / "b", to)
    slow = {"tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"}
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(report.files)
    assert not slow & {path.name for path in (tmp_path / "b").iterdir()}
    assert "auto_map" not in read_json(tmp_path / "b" / "tokenizer_config.json")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "b")
    for text in (
        "hello  world, don't 1999\n\n",
        "你是书生·万象 👍",
        "<|im_start|>user\n<img><IMG_CONTEXT></img>\n?<|im_end|>",
    ):
        assert theirs(text).input_ids == ours.encode(text, add_special_tokens=True)
    if to != "language":
        assert theirs.context_image_token_id == ours.token_to_id("<IMG_CONTEXT>")


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_slow_tokenizer_files_travel_to_the_original_layout(tmp_path, kind):
    slow_release(tmp_path / "a", kind)
    report = convert(tmp_path / "a", tmp_path / "b", "original")
    names = {
        "qwen2": {"vocab.json", "merges.txt"},
        "internlm2": {"tokenizer.model", "special_tokens_map.json"},
    }
    made = {"chat_template.jinja", "generation_config.json"}  # servers want them
    assert set(report.files) == names[kind] | made | {"tokenizer_config.json"}
    for name in set(report.files) - made:
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_a_slow_tokenizer_that_cannot_be_read_stops_the_conversion(tmp_path):
    slow_release(tmp_path / "a", "internlm2")
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"tokenizer.model: not a SentencePiece model"):
        convert(tmp_path / "a", tmp_path / "b", "hf")
    assert not (tmp_path / "b").exists()


def test_extra_special_tokens_of_the_source_are_kept(tmp_path):
    source(tmp_path / "a")
    path = tmp_path / "a" / "tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | {"extra_special_tokens": ["<quad>"]}))
    convert(tmp_path / "a", tmp_path / "b", "hf")
    config = read_json(tmp_path / "b" / "tokenizer_config.json")
    assert config["additional_special_tokens"] == ["<quad>"]
    assert config["extra_special_tokens"]["start_image_token"] == "<img>"


def test_transformers_tokenizer_and_image_processor_read_the_folder(tmp_path):
    from transformers import AutoImageProcessor, AutoTokenizer

    from tiny_tokenizers import byte_level

    write_original(tmp_path / "a")
    byte_level().save(tmp_path / "a")
    ids = added_tokens(tmp_path / "a")
    config = read_json(tmp_path / "a" / "config.json")
    config["llm_config"]["vocab_size"] = byte_level().vocab_size
    tensors = {k: v.clone() for k, v in tensors_of(tmp_path / "a").items()}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = torch.randn(byte_level().vocab_size, 16).bfloat16()
    write_folder(tmp_path / "a", config, tensors)
    convert(tmp_path / "a", tmp_path / "b", "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert tokenizer.context_image_token == "<IMG_CONTEXT>"
    assert tokenizer.context_image_token_id == ids["<IMG_CONTEXT>"]
    assert tokenizer.start_image_token_id == ids["<img>"]
    turns = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == join(TEMPLATES["internvl2_5"].render([("user", "Hi")], generate=True))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "b", backend="pil")
    assert processor.size["height"] == processor.size["width"] == 28
    assert list(processor.image_mean) == pytest.approx(NORMALIZATIONS["imagenet"][0])
    assert (processor.min_patches, processor.max_patches) == (1, 12)


def rendered(folder, messages, **variables):
    """What transformers makes of the folder's chat template."""
    source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return (
        Environment(trim_blocks=True, lstrip_blocks=True)
        .from_string(source)
        .render(messages=messages, **variables)
    )


@pytest.mark.parametrize(("to", "picture"), [("hf", "<IMG_CONTEXT>"), ("original", "<image>")])
def test_the_chat_template_spells_our_own(tmp_path, to, picture):
    source(tmp_path / "a", system_message="Be 'brief' and \"kind\".")
    convert(tmp_path / "a", tmp_path / "b", to)
    turns = [("user", " What?\n"), ("assistant", "This. "), ("user", "And?")]
    for system in ([], [("system", "Be kind.\n")]):
        said = [*system, *turns]
        ours = join(TEMPLATES["internvl2_5"].render(said, system="Be 'brief' and \"kind\".", generate=True))
        messages = [{"role": role, "content": text} for role, text in said]
        assert rendered(tmp_path / "b", messages, add_generation_prompt=True) == ours
    parts = [{"type": "image"}, {"type": "image"}, {"type": "video"}, {"type": "text", "text": "see"}]
    shown = rendered(tmp_path / "b", [{"role": "user", "content": parts}])
    assert shown.endswith(
        f"<|im_start|>user\nImage-1: {picture}\nImage-2: {picture}\n<video>\nsee<|im_end|>\n"
    )
    one = rendered(tmp_path / "b", [{"role": "user", "content": parts[1:]}])
    assert one.endswith(f"<|im_start|>user\n{picture}\n<video>\nsee<|im_end|>\n")


def test_a_template_of_transformers_has_no_numbers_and_no_system_message(tmp_path):
    source(tmp_path / "a", template="internvl-hf")
    convert(tmp_path / "a", tmp_path / "b", "hf")
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "see"}]
    assert rendered(tmp_path / "b", [{"role": "user", "content": parts}]) == (
        "<|im_start|>user\n<IMG_CONTEXT>\n<IMG_CONTEXT>\nsee<|im_end|>\n"
    )


def test_a_begin_token_is_part_of_the_template(tmp_path):
    slow_release(tmp_path / "a", "internlm2")
    convert(tmp_path / "a", tmp_path / "b", "hf")
    text = rendered(tmp_path / "b", [{"role": "user", "content": "Hi"}], bos_token="<s>")
    assert text.startswith("<s><|im_start|>system\n")


def test_the_sources_own_chat_template_stays(tmp_path):
    source(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ own }}")
    convert(tmp_path / "a", tmp_path / "b", "original")
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ own }}"
    convert(tmp_path / "a", tmp_path / "c", "hf")  # its pictures are spelled otherwise there
    assert "IMG_CONTEXT" in (tmp_path / "c" / "chat_template.jinja").read_text()


def test_python_files_travel_within_the_original_layout_alone(tmp_path):
    source(tmp_path / "a")
    (tmp_path / "a" / "configuration_internvl_chat.py").write_text("raise SystemExit")
    convert(tmp_path / "a", tmp_path / "b", "original")
    assert (tmp_path / "b" / "configuration_internvl_chat.py").read_text() == "raise SystemExit"
    convert(tmp_path / "b", tmp_path / "c", "hf")
    assert not list((tmp_path / "c").glob("*.py"))


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (None, [30, 2]),  # the language model's own end token stays
        ({"eos_token_id": 2}, [30, 2]),
        ({"eos_token_id": [30, 5]}, [30, 5]),
        ({"eos_token_id": 30, "temperature": 0.5}, 30),
    ],
)
def test_generation_ends_at_the_stop_token_of_the_chat(tmp_path, stored, expected):
    source(tmp_path / "a")
    assert added_tokens(tmp_path / "a")["<|im_end|>"] == 30
    if stored is not None:
        (tmp_path / "a" / "generation_config.json").write_text(json.dumps(stored))
    convert(tmp_path / "a", tmp_path / "b", "hf")
    written = read_json(tmp_path / "b" / "generation_config.json")
    assert written == (stored or {}) | {"eos_token_id": expected}
    convert(tmp_path / "b", tmp_path / "c", "original")
    assert read_json(tmp_path / "c" / "generation_config.json") == written


def test_image_token_from_wherever_it_is_known(tmp_path):
    write_original(tmp_path / "a")
    with pytest.raises(ConfigError, match="give image_token_id"):
        convert(tmp_path / "a", tmp_path / "b", "hf")
    assert not (tmp_path / "b").exists()
    report = convert(tmp_path / "a", tmp_path / "b", "hf", image_token_id=7)
    assert read_config(tmp_path / "b").image_token_id == 7
    assert any("no tokenizer" in note for note in report.notes)
    with pytest.raises(ConfigError, match=f"the id {VOCAB} of <IMG_CONTEXT> is outside the {VOCAB} rows"):
        convert(tmp_path / "a", tmp_path / "c", "hf", image_token_id=VOCAB)
    write_tokenizer(tmp_path / "a")
    with pytest.raises(CheckpointError, match=f"has the id {IMAGE_TOKEN} in the tokenizer but 7 is stated"):
        convert(tmp_path / "a", tmp_path / "c", "hf", image_token_id=7)
    listed = {"added_tokens": [{"id": 11, "content": "<IMG_CONTEXT>", "special": True}, 3, {"id": "x"}]}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        (tmp_path / "a" / name).unlink()
    (tmp_path / "a" / "tokenizer.json").write_text(json.dumps(listed))
    assert added_tokens(tmp_path / "a") == {"<IMG_CONTEXT>": 11}
    odd = {"added_tokens_decoder": {"9" * 5000: {"content": "<odd>"}}}
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(odd))
    assert added_tokens(tmp_path / "a") == {"<IMG_CONTEXT>": 11}


def test_facts_that_the_hf_layout_cannot_keep_are_noted(tmp_path):
    source(tmp_path / "a", use_thumbnail=False, pad2square=True)
    notes = " ".join(convert(tmp_path / "a", tmp_path / "b", "hf").notes)
    assert "thumbnail" in notes
    assert "pad to a square" in notes
    assert "Python files" in " ".join(convert(tmp_path / "b", tmp_path / "c", "original").notes)
    source(tmp_path / "d", dynamic_image_size=False)
    assert "crop_to_patches=False" in " ".join(convert(tmp_path / "d", tmp_path / "e", "hf").notes)


# --- preprocessing -----------------------------------------------------------------------------------------------


def test_tile_policy_of_an_original_folder(tmp_path):
    write_original(tmp_path, max_dynamic_patch=24, use_thumbnail=False)
    config = read_config(tmp_path)
    expected = TilePolicy(image_size=28, min_tiles=1, max_tiles=24, thumbnail=False)
    assert read_tile_policy(tmp_path, config, "original") == expected
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": 448, "crop_size": 448})
    )
    policy = read_tile_policy(tmp_path, config, "original", mode="original")
    assert policy == replace(expected, mean=(0.5,) * 3, std=(0.25,) * 3, mode="original")


def test_tile_policy_survives_both_layouts(tmp_path):
    source(tmp_path / "a", max_dynamic_patch=9, min_dynamic_patch=2)
    (tmp_path / "a" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4, 0.5, 0.6]}))
    convert(tmp_path / "a", tmp_path / "b", "hf")
    convert(tmp_path / "b", tmp_path / "c", "original")
    policies = [
        read_tile_policy(tmp_path / name, read_config(tmp_path / name), layout)
        for name, layout in (("a", "original"), ("b", "hf"), ("c", "original"))
    ]
    assert policies[0] == policies[1] == policies[2]
    assert policies[0].max_tiles == 9
    assert policies[0].mean == (0.4, 0.5, 0.6)


@pytest.mark.parametrize("nested", [False, True])
def test_tile_policy_of_an_hf_folder(tmp_path, nested):
    hf_model("qwen2").config.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert read_tile_policy(tmp_path, config, "hf") == TilePolicy(image_size=28)
    fields = {
        "size": {"height": 56, "width": 56},
        "max_patches": 4,
        "crop_to_patches": False,
        "image_std": None,
    }
    content = {"image_processor": fields} if nested else fields
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps(content))
    policy = read_tile_policy(tmp_path, config, "hf")
    # The processor of transformers always cuts; absent fields take its class defaults (CLIP's mean and std).
    mean, std = NORMALIZATIONS["clip"]
    assert policy == TilePolicy(image_size=56, max_tiles=4, dynamic=True, thumbnail=True, mean=mean, std=std)


def test_hf_processor_settings_reach_the_original_config(tmp_path):
    hf_model("qwen2").save_pretrained(tmp_path / "a")
    policy = TilePolicy(image_size=56, max_tiles=5, min_tiles=2)
    for name, content in preprocessor_files(policy, "hf", tokens_per_tile=4).items():
        (tmp_path / "a" / name).write_text(json.dumps(content))
    convert(tmp_path / "a", tmp_path / "b", "original")
    config = read_json(tmp_path / "b" / "config.json")
    assert (config["force_image_size"], config["min_dynamic_patch"], config["max_dynamic_patch"]) == (
        56,
        2,
        5,
    )
    assert (config["template"], config["system_message"]) == ("internvl2_5", "")
    assert config["dynamic_image_size"] is config["use_thumbnail"] is True
    assert config["ps_version"] == "v2"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": {"shortest_edge": 448}}, "one side for height and width"),
        ({"size": {"height": 448, "width": 224}}, "one side for height and width"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"resample": 2}, "resample is 2"),
        ({"image_mean": "imagenet"}, "image_mean is 'imagenet'"),
        ({"image_std": ["a", "b", "c"]}, "three numbers are needed"),
    ],
)
def test_preprocessing_that_is_not_internvls(tmp_path, fields, message):
    hf_model("qwen2").config.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=message):
        read_tile_policy(tmp_path, read_config(tmp_path), "hf")


# --- refusals ------------------------------------------------------------------------------------------------------


def test_refusals_leave_no_trace(tmp_path):
    a = source(tmp_path / "a")
    with pytest.raises(UsageError, match="unknown layout 'gguf'"):
        convert(a, tmp_path / "b", "gguf")
    for dst in (a, a / "inner", tmp_path):
        with pytest.raises(UsageError, match="is, holds or lies in the source"):
            convert(a, dst, "hf", force=True)
    text = write_text(tmp_path / "text")
    with pytest.raises(UsageError, match="nothing to convert"):
        convert(text, tmp_path / "b", "hf")
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(tmp_path / "none", tmp_path / "b", "hf")
    v1 = source(tmp_path / "v1", ps_version="v1")
    with pytest.raises(ConfigError, match="knows only v2"):
        convert(v1, tmp_path / "b", "hf")
    lacking = write_folder(tmp_path / "lacking", original_config(), random_tensors({"mlp1.0.weight": (32,)}))
    with pytest.raises(CheckpointError, match="missing"):
        convert(lacking, tmp_path / "b", "original")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "lacking", "text", "v1"]


def test_force(tmp_path):
    a = source(tmp_path / "a")
    convert(a, tmp_path / "b", "hf")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert(a, tmp_path / "b", "original")
    assert open_checkpoint(tmp_path / "b").layout == "hf"
    convert(a, tmp_path / "b", "original", force=True)
    assert open_checkpoint(tmp_path / "b").layout == "original"
    shutil.rmtree(a)  # nothing of the result points into the source
    open_checkpoint(tmp_path / "b").adapter.check(CheckpointReader(tmp_path / "b"))
