"""Tiny InternVL checkpoints that can be run: random weights, a real tokenizer of the family's kind, 56 px tiles."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.checkpoint.random_checkpoints import CLASSES

from chiasm.checkpoint.adapters import adapter_for
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig
from tiny_tokenizers import byte_fallback, byte_level

PIECES = ("internlm2", "internlm3", "phi3")  # families whose tokenizer is SentencePiece's
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SU = {"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 2.5, 3.0]}


def tokenizer_of(family: str):
    return byte_fallback() if family in PIECES else byte_level()


def language_config(family: str, **changes) -> dict:
    config = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": tokenizer_of(family).vocab_size + 3,  # with rows that no token has
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    if family in ("llama", "internlm2", "internlm3"):
        config["bias"] = False
    if family in ("qwen3", "internlm3"):
        config["head_dim"] = 8
    if family == "qwen3":
        config["attention_bias"] = False
    if family == "phi3":
        config |= {"rope_scaling": SU, "original_max_position_embeddings": 256, "sliding_window": 262_144}
    return config | changes


def vision_config(**changes) -> dict:
    return {
        "model_type": "intern_vit_6b",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": 56,
        "num_channels": 3,
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "qk_normalization": False,
    } | changes


def write_servable(
    folder: Path,
    family: str = "qwen2",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    language: dict | None = None,
    vision: dict | None = None,
    **top,
) -> Path:
    """An original-layout folder with config, weights and tokenizer."""
    llm = language_config(family, **(language or {}))
    eyes = vision_config(**(vision or {}))
    config = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 56,
        "llm_config": llm,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_thumbnail": True,
        "vision_config": eyes,
    } | top
    adapter = adapter_for(
        "original",
        language=LanguageConfig.from_public(llm),
        vision=InternViTConfig.from_public(eyes, "original"),
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for entry in adapter.plan:
        for name, shape in adapter.pieces(entry):
            drawn = torch.randn(shape, generator=generator)
            # Wide enough that answers depend on everything, narrow enough that they stay finite.
            scale = 1.0 if "embed" in name or "embedding" in name else 0.3
            value = 1 + 0.1 * drawn if "norm" in name and name.endswith("weight") else scale * drawn
            tensors[name] = value.to(dtype).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer_of(family).save(folder)
    return folder
