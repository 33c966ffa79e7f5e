"""The layout of the releases: `InternVLChatModel` with its remote code.

Source: the released checkpoints and their configuration classes (InternVL 2.5, arXiv 2412.05271). Names and config
keys only; `adapters.py` moves the tensors and `config.py` holds what the keys mean. The vision side keeps its fused
`attn.qkv`; the language side carries its family's own names (`language.py`) under `language_model.`, and its output
matrix is always a tensor of its own (these classes force untied words).
"""

from __future__ import annotations

from typing import Any

from chiasm.checkpoint.language import Names, spell_language
from chiasm.parts.vision.internvit import VISION_DEFAULTS

__all__ = ["AUTO_MAP", "TOP_DEFAULTS", "complete_vision", "spell_original"]

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
    vision = {key: given.get(key, default) for key, default in VISION_DEFAULTS["original"].items()}
    extras = {
        key: value
        for key, value in public.items()
        if key not in VISION_DEFAULTS["original"] and key != "model_type"
    }
    return vision, extras
