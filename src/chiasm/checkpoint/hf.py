"""The layouts of transformers: InternVL `-hf` in its two prefixes, and language models alone.

Source: the checkpoints themselves and the InternVL classes of transformers (4.52 to 5.23). Two prefixes exist:
`hf` is what the classes call their parameters (`model.language_model.*`, `model.vision_tower.*`, `lm_head.weight`);
`hf-old` is what the hub files and `save_pretrained` carry (`language_model.model.*`, `vision_tower.*`,
`language_model.lm_head.weight`). Both load in transformers. Here are names and config keys only; `adapters.py`
moves the tensors and `config.py` holds what the keys mean.

The language families' own names are in `language.py`.
"""

from __future__ import annotations

from typing import Any

from chiasm.checkpoint.language import Names, spell_language
from chiasm.parts.vision.internvit import VISION_DEFAULTS

__all__ = [
    "HF_VISION_CONSTANTS",
    "rope_keys_of_4",
    "spell_hf",
    "spell_hf_old",
    "spell_text",
    "vision_from_hf",
    "vision_to_hf",
]

_VISION = {
    "class_embedding": "embeddings.cls_token",
    "position_embedding": "embeddings.position_embeddings",
    "patch_embedding.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embedding.bias": "embeddings.patch_embeddings.projection.bias",
}

_VISION_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.projection_layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
}

_CONNECT = {"norm": "layer_norm", "fc1": "linear_1", "fc2": "linear_2"}


def _spell_tower(native: str, tower: str, projector: str) -> tuple[str, ...]:
    """Public names of a parameter under ``embedder.vision.`` or ``embedder.connect.``."""
    _, part, rest = native.split(".", 2)
    if part == "connect":
        stem, _, leaf = rest.rpartition(".")
        return (f"{projector}{_CONNECT[stem]}.{leaf}",)
    if rest in _VISION:
        return (tower + _VISION[rest],)
    _, layer, name = rest.split(".", 2)  # layers.{layer}.{name}
    base = f"{tower}encoder.layer.{layer}."
    if name in ("ls1", "ls2"):
        return (base + _VISION_BLOCK[name],)
    stem, _, leaf = name.rpartition(".")
    if stem == "attn.qkv":
        return tuple(f"{base}attention.{which}_proj.{leaf}" for which in "qkv")
    return (f"{base}{_VISION_BLOCK[stem]}.{leaf}",)


def spell_hf(native: str, names: Names) -> tuple[str, ...]:
    """Names in the newer prefix, ``model.language_model.*``."""
    if native.startswith(("embedder.vision.", "embedder.connect.")):
        return _spell_tower(native, "model.vision_tower.", "model.multi_modal_projector.")
    return spell_language(native, names, "model.language_model.", "")


def spell_hf_old(native: str, names: Names) -> tuple[str, ...]:
    """Names in the older prefix, ``language_model.model.*``."""
    if native.startswith(("embedder.vision.", "embedder.connect.")):
        return _spell_tower(native, "vision_tower.", "multi_modal_projector.")
    return spell_language(native, names, "language_model.model.", "language_model.")


def spell_text(native: str, names: Names) -> tuple[str, ...]:
    """Names in a language model of its own, ``model.*``."""
    return spell_language(native, names, "model.", "")


_VISION_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_channels": "num_channels",
    "patch_size": "patch_size",
    "image_size": "image_size",
    "hidden_act": "hidden_act",
    "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_dropout",
    "initializer_range": "initializer_range",
    "initializer_factor": "layer_scale_init_value",
}
"""Original spelling of a vision key -> that of transformers."""

HF_VISION_CONSTANTS: dict[str, Any] = {
    "projection_dropout": 0.0,
    "use_mask_token": False,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
}
"""Keys that an InternViT always has so; the original layout has no word for them."""


def vision_from_hf(public: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(vision config in the original's spelling, complete; what else transformers says, verbatim)."""
    filled = VISION_DEFAULTS["hf"] | {key: value for key, value in public.items() if value is not None}
    vision = {original: filled[hf] for original, hf in _VISION_KEYS.items()}
    for name in ("patch_size", "image_size"):  # pairs of equal sides in this layout
        side = vision[name]
        if isinstance(side, list) and len(side) == 2 and side[0] == side[1]:
            vision[name] = side[0]
    known = {*_VISION_KEYS.values(), "model_type"}
    extras = {key: value for key, value in public.items() if key not in known}
    absent = object()
    return vision, {k: v for k, v in extras.items() if HF_VISION_CONSTANTS.get(k, absent) != v}


def vision_to_hf(vision: dict[str, Any], extras: dict[str, Any]) -> dict[str, Any]:
    """The ``vision_config`` of transformers from the original's spelling (complete) and kept extra keys."""
    public = {hf: vision[original] for original, hf in _VISION_KEYS.items()}
    for name in ("patch_size", "image_size"):
        public[name] = [public[name], public[name]]
    return {"model_type": "internvl_vision", **HF_VISION_CONSTANTS, **public, **extras}


def rope_keys_of_4(language: dict[str, Any]) -> dict[str, Any]:
    """The language config with transformers 5's ``rope_parameters`` spelt as ``rope_theta`` and ``rope_scaling``.

    Releases before 5 ignore the new key without a word and would run with the wrong positions.
    """
    rope = language.get("rope_parameters")
    if not isinstance(rope, dict):
        return dict(language)
    out = {key: value for key, value in language.items() if key != "rope_parameters"}
    rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type", "type")}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if "rope_theta" in rope:
        out.setdefault("rope_theta", rope["rope_theta"])
    # 4.37, which the remote code pins, knows only `type` and counts the keys; later releases still read it.
    out.setdefault("rope_scaling", None if kind == "default" else {"type": kind, **rest})
    return out
