"""The layout of the releases: `InternVLChatModel` with its remote code.

Source: the released checkpoints and their configuration classes (InternVL 2.5, arXiv 2412.05271). Names and config
keys only; `adapters.py` moves the tensors and `config.py` holds what the keys mean. The vision side keeps its fused
`attn.qkv`; the language side carries its family's own names (`language.py`) under `language_model.`, and its output
matrix is always a tensor of its own (these classes force untied words).
"""

from __future__ import annotations

from typing import Any

from chiasm.checkpoint.language import Names, spell_language

__all__ = ["AUTO_MAP", "TOP_DEFAULTS", "VISION_DEFAULTS", "complete_vision", "spell_original"]

_CONNECT = {"norm": "0", "fc1": "1", "fc2": "3"}  # 2 is the GELU between them

TOP_DEFAULTS: dict[str, Any] = {
    "downsample_ratio": 0.5,
    "ps_version": "v1",
    "select_layer": -1,
    "force_image_size": None,
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
    "pad2square": False,
    "template": None,
    "system_message": None,
}
"""What `InternVLChatConfig` takes for absent keys."""

VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 3200,
    "intermediate_size": 12_800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 224,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": False,
    "qk_normalization": True,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 0.1,
}
"""What `InternVisionConfig` takes for absent keys: the shape of InternViT-6B-224px."""

AUTO_MAP = {
    "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
    "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
}
"""Where transformers looks for the release's Python files (which are not ours to write)."""


def spell_original(native: str, names: Names) -> tuple[str, ...]:
    """Names in the released layout."""
    if native.startswith("embedder.connect."):
        stem, _, leaf = native.removeprefix("embedder.connect.").rpartition(".")
        return (f"mlp1.{_CONNECT[stem]}.{leaf}",)
    if native.startswith("embedder.vision."):
        rest = native.removeprefix("embedder.vision.")
        room = "encoder" if rest.startswith("layers.") else "embeddings"
        return (f"vision_model.{room}.{rest}",)
    return spell_language(native, names, "language_model.model.", "language_model.")


def complete_vision(public: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(vision config with the class defaults filled in; the keys that shape nothing, verbatim).

    Released files carry dozens of the latter (mixture-of-experts and training switches).
    """
    given = {key: value for key, value in public.items() if value is not None}
    vision = {key: given.get(key, default) for key, default in VISION_DEFAULTS.items()}
    extras = {
        key: value for key, value in public.items() if key not in VISION_DEFAULTS and key != "model_type"
    }
    return vision, extras
