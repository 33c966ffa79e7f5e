"""Settings that change what a decoder computes are refused by name; what public files normally carry is not."""

from __future__ import annotations

import pytest
from tests.checkpoint.random_checkpoints import language_config, original_config

from chiasm.checkpoint.config import InternVLPublicConfig, language_from_public
from chiasm.errors import ConfigError
from chiasm.parts.language.config import LanguageConfig

REFUSED = [
    ("qwen2", {"hidden_act": "gelu"}, "hidden_act"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen2", {"layer_types": "full_attention"}, "layer_types"),
    ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (
        "llama",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"attention_bias": True}, "attention_bias"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("internlm2", {"bias": True}, "bias"),
    ("phi3", {"sliding_window": 64}, "sliding_window"),
    ("llama", {"model_type": "qwen2"}, "architectures"),
    ("qwen2", {"architectures": ["Qwen2MoeForCausalLM"]}, "architectures"),
    ("qwen2", {"architectures": ["LlamaForCausalLM"], "model_type": "mistral"}, "architectures"),
]


@pytest.mark.parametrize(("family", "change", "key"), REFUSED)
def test_settings_that_change_the_function_are_refused(family: str, change: dict, key: str) -> None:
    config = language_config(family) | change
    whole = original_config(family) | {"llm_config": config}
    for read in (
        lambda: LanguageConfig.from_public(config),
        lambda: language_from_public(config),
        lambda: InternVLPublicConfig.from_original(whole).language_config(),
    ):
        with pytest.raises(ConfigError, match=key) as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["mlp_bias", "partial_rotary_factor", "architectures"])
def test_hf_sections_are_checked_too(key: str) -> None:
    value = {"mlp_bias": True, "partial_rotary_factor": 0.25, "architectures": ["LlamaForCausalLM"]}[key]
    config = {
        "model_type": "internvl",
        "text_config": language_config() | {key: value},
        "vision_config": {"image_size": [28, 28], "patch_size": [14, 14]},
    }
    with pytest.raises(ConfigError, match=key):
        InternVLPublicConfig.from_hf(config).language_config()


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen2", {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 28}),
        ("qwen2", {"layer_types": ["full_attention", "full_attention"], "sliding_window": None}),
        ("qwen2", {"attention_bias": True}),  # not a key of that class: its biases are fixed
        ("qwen2", {"architectures": None}),
        ("qwen2", {"architectures": ["Qwen2Model"]}),
        ("qwen2", {"model_type": None}),
        ("llama", {"mlp_bias": False, "attention_bias": False, "partial_rotary_factor": 1.0}),
        ("llama", {"hidden_act": None}),
        ("llama", {"architectures": ["InternLM2ForCausalLM"]}),  # left over in converted files
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}),
        ("internlm3", {"architectures": ["LlamaForCausalLM"]}),  # as transformers saves it
        ("internlm2", {"attn_implementation": "flash_attention_2", "bias": None}),
        ("phi3", {"attention_bias": True, "sliding_window": None, "embd_pdrop": 0.0}),  # no key of that class
        ("qwen3", {"max_window_layers": 36, "sliding_window": None}),
    ],
)
def test_what_public_files_carry_is_read(family: str, change: dict) -> None:
    assert language_from_public(language_config(family) | change).family == family


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3", "phi3", "internlm3"])
def test_what_transformers_saves_is_read(family: str) -> None:
    import transformers

    saved = transformers.AutoConfig.for_model(family).to_dict()
    assert language_from_public(saved).family == family
    whole = transformers.InternVLConfig(text_config=saved).to_dict()
    assert InternVLPublicConfig.from_hf(whole).language_config().family == family
