"""Public configs of both layouts: class defaults, unknown keys, round trips, refusals."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.checkpoint.random_checkpoints import (
    IMAGE_TOKEN,
    language_config,
    original_config,
    write_original,
)
from tests.checkpoint.test_adapters import fails, hf_model

from chiasm.checkpoint.config import InternVLPublicConfig, language_from_public, read_config
from chiasm.errors import ChiasmError, ConfigError

FAMILIES = ("qwen2", "llama")


def test_class_defaults_of_the_original(tmp_path):
    config = {
        "model_type": "internvl_chat",
        "vision_config": {},
        "llm_config": {"architectures": ["LlamaForCausalLM"]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    public = read_config(tmp_path)
    assert (public.ps_version, public.select_layer, public.downsample_ratio) == ("v1", -1, 0.5)
    assert (public.dynamic_image_size, public.use_thumbnail) == (False, False)
    assert (public.min_dynamic_patch, public.max_dynamic_patch) == (1, 6)
    assert (public.force_image_size, public.image_size, public.tokens_per_tile) == (None, 224, 64)
    vision = public.vision_config()
    assert (vision.hidden_size, vision.layers, vision.heads, vision.norm) == (3200, 48, 25, "rms_norm")
    assert (vision.qk_norm, vision.qkv_bias) == (True, False)
    language = public.language_config()
    assert (language.family, language.hidden_size, language.kv_heads) == ("llama", 4096, 32)


def test_class_defaults_of_transformers(tmp_path):
    from transformers import InternVLConfig

    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "internvl", "vision_config": {}, "text_config": {"model_type": "qwen2"}})
    )
    public = read_config(tmp_path)
    theirs = InternVLConfig()
    vision, language = public.vision_config(), public.language_config()
    assert vision.hidden_size == theirs.vision_config.hidden_size
    assert [vision.image_size] * 2 == list(theirs.vision_config.image_size)
    assert vision.qkv_bias == theirs.vision_config.attention_bias
    assert language.vocab_size == theirs.text_config.vocab_size
    assert language.intermediate_size == theirs.text_config.intermediate_size
    assert language.kv_heads == theirs.text_config.num_key_value_heads
    assert public.tie_words == theirs.tie_word_embeddings
    assert public.select_layer == theirs.vision_feature_layer
    assert public.template == "internvl-hf"


def test_unknown_keys_are_kept_verbatim(tmp_path):
    write_original(tmp_path, some_future_key={"a": [1, 2]})
    public = read_config(tmp_path)
    assert public.vision_config().drop_path == 0.1
    again = public.to_original()
    assert again["some_future_key"] == {"a": [1, 2]}
    assert again["vision_config"]["noisy_gate_policy"] == "RSample_before"
    assert again["llm_config"]["_name_or_path"] == "somewhere"
    assert again["auto_map"] == original_config()["auto_map"]
    assert again == original_config(some_future_key={"a": [1, 2]}) | {"tie_word_embeddings": False}


@pytest.mark.parametrize("old", [False, True])
def test_original_config_survives_the_hf_layout(old):
    config = original_config("llama", pad2square=True, system_message="be brief", some_key=1)
    public = InternVLPublicConfig.from_original(config)
    hf = replace(public, image_token_id=IMAGE_TOKEN).to_hf(old=old)
    assert "auto_map" not in hf
    assert json.loads(json.dumps(hf)) == hf
    back = InternVLPublicConfig.from_hf(hf)
    assert replace(back, image_token_id=None) == public
    assert back.to_original() == public.to_original() | {"hf_config": back.to_original()["hf_config"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_hf_config_survives_the_original_layout(tmp_path, family):
    hf_model(family, tied=True).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"future": 3}
    config["text_config"]["future_text"] = 4
    public = InternVLPublicConfig.from_hf(config)
    back = InternVLPublicConfig.from_original(public.to_original())
    assert back.vision == public.vision
    assert back.hf_extras == public.hf_extras
    assert back.image_token_id == IMAGE_TOKEN
    ours, theirs = back.language_config(tie_words=True), public.language_config()
    assert replace(ours, rope_scaling=None) == replace(theirs, rope_scaling=None)
    assert ours.rope_scaling == {"type": "dynamic", "factor": 2.0}
    assert theirs.rope_scaling["rope_type"] == "dynamic"
    again = replace(back, tie_words=True).to_hf()
    assert again["future"] == 3
    assert again["text_config"]["future_text"] == 4
    assert again["vision_config"] == config["vision_config"]
    rope = ("rope_parameters", "rope_theta", "rope_scaling", "architectures")  # the last is named for servers
    assert {k: v for k, v in again["text_config"].items() if k not in rope} == {
        k: v for k, v in config["text_config"].items() if k not in rope
    }


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_our_config(tmp_path, family, old):
    from transformers import AutoConfig

    public = InternVLPublicConfig.from_original(original_config(family))
    hf = replace(public, image_token_id=IMAGE_TOKEN).to_hf(old=old)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "InternVLConfig"
    assert theirs.text_config.rope_parameters == {
        "rope_theta": 1e6,
        "rope_type": "dynamic",
        "factor": 2.0,
    } | ({"type": "dynamic"} if "type" in theirs.text_config.rope_parameters else {})
    assert theirs.dtype is torch.bfloat16
    assert theirs.image_seq_length == 1
    assert list(theirs.vision_config.image_size) == [28, 28]
    assert theirs.vision_config.attention_bias is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downsample_ratio": 0}, "downsample_ratio is 0"),
        ({"downsample_ratio": "x"}, "downsample_ratio is 'x'"),
        ({"ps_version": "v3"}, "ps_version is 'v3'"),
        (
            {"min_dynamic_patch": 9, "max_dynamic_patch": 3},
            "min_dynamic_patch 9 is above max_dynamic_patch 3",
        ),
        ({"max_dynamic_patch": "many"}, "'many': a positive integer is needed"),
        ({"select_layer": [1, 2]}, "one integer is supported"),
        ({"vision_config": None}, "no vision_config section"),
        ({"llm_config": 3}, "no llm_config section"),
        ({"vision_config": {"hidden_size": "wide"}}, "vision_config hidden_size is 'wide'"),
        ({"llm_config": language_config() | {"num_attention_heads": 0}}, "num_attention_heads is 0"),
        ({"llm_config": {"architectures": ["XForCausalLM"]}}, "'XForCausalLM' is not supported"),
        ({"llm_config": language_config() | {"rope_scaling": {"type": "linear"}}}, "lacks 'factor'"),
        ({"template": 3}, "template is 3: a string is needed"),
        ({"hf_config": [1]}, "hf_config is not what a conversion writes"),
    ],
)
def test_config_refusals(change, message):
    with pytest.raises(ConfigError, match=message):
        InternVLPublicConfig.from_original(original_config() | change).language_config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "only 'default'"),
        ({"vision_feature_layer": [-1, -4]}, "one integer"),
        ({"projector_hidden_act": "relu"}, "uses 'gelu'"),
        ({"vision_config": {"use_mean_pooling": False}}, "use_mean_pooling is False"),
        ({"vision_config": {"image_size": [28, 56]}}, "image_size is"),
        ({"text_config": None}, "no text_config section"),
    ],
)
def test_hf_config_refusals(change, message):
    public = InternVLPublicConfig.from_original(original_config())
    hf = replace(public, image_token_id=IMAGE_TOKEN).to_hf()
    with pytest.raises(ConfigError, match=message):
        InternVLPublicConfig.from_hf(hf | change)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200)
@given(
    data=st.data(),
    layout=st.sampled_from(["original", "hf", "text"]),
    family=st.sampled_from(["qwen2", "phi3", "internlm2", "qwen3"]),
    value=JSON,
)
def test_any_value_anywhere_is_read_or_refused(data, layout, family, value):
    """A malformed config is answered with an error of ours, never with a crash."""
    family = "qwen2" if layout == "hf" else family
    public = InternVLPublicConfig.from_original(original_config())
    hf = replace(public, image_token_id=IMAGE_TOKEN).to_hf()
    config = {"original": original_config(family), "hf": hf, "text": language_config(family)}[layout]
    section = config
    while True:
        key = data.draw(st.sampled_from(sorted(section)))
        if not isinstance(section[key], dict) or data.draw(st.booleans()):
            break
        section = section[key]
    section[key] = value
    said = ""
    try:
        if layout == "text":
            _ = language_from_public(config).rope.inverse_frequencies(4.0)
            return
        read = (InternVLPublicConfig.from_original if layout == "original" else InternVLPublicConfig.from_hf)(
            config
        )
        read.language_config()
        read.vision_config()
        _ = read.tokens_per_tile
        replace(read, image_token_id=1).to_original()
        replace(read, image_token_id=1, ps_version="v2").to_hf()
    except ChiasmError as error:
        said = str(error)
    assert "\n" not in said


def test_what_the_hf_layout_cannot_say():
    public = InternVLPublicConfig.from_original(original_config(ps_version="v1"))
    with pytest.raises(ConfigError, match="knows only v2"):
        replace(public, image_token_id=IMAGE_TOKEN).to_hf()
    public = InternVLPublicConfig.from_original(original_config())
    with pytest.raises(ConfigError, match="give image_token_id"):
        public.to_hf()


def test_read_config_of_another_model(tmp_path):
    with fails("has no config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with fails("describes 'bert', not an InternVL model"):
        read_config(tmp_path)
