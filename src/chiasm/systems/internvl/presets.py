"""The released models as configs: InternVL 1.5 to 3.5 (dense), by the name under which they were published.

Source: InternVL 2.5 (2412.05271, Table 2 and its predecessors), Mini-InternVL (2410.16261), InternVL 3 (2504.10479)
and 3.5 (2508.18265); sizes of the language models from their own public configs. For planning, counting and training
from scratch: what loads a checkpoint reads its `config.json` and needs none of this.

Not every number could be held against a released `config.json` where this was written; a preset says which were not
(`Preset.unverified`). The mixture-of-experts sizes of 3.5 are not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from chiasm.checkpoint.adapters import count_by_part, entries
from chiasm.errors import ConfigError
from chiasm.media.tiles import TilePolicy
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig, internvit_6b, internvit_300m
from chiasm.systems.internvl.config import InternVLConfig

__all__ = ["PRESETS", "Preset", "parameters", "preset"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A released model.

    Attributes:
        config: what it is made of.
        language: name of the language model that it was made from.
        unverified: what is from memory and not confirmed by a source, a few words each.
    """

    config: InternVLConfig
    language: str
    unverified: tuple[str, ...] = ()


def preset(name: str) -> InternVLConfig:
    """The config of a released model.

    Raises:
        ConfigError: no such name (the nearest ones are named).
    """
    found = PRESETS.get(name)
    if found is None:
        import difflib

        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.5) or list(PRESETS)
        raise ConfigError(f"no preset is called {name!r}: there are {', '.join(near)}")
    return found.config


def parameters(config: InternVLConfig) -> dict[str, int]:
    """Parameters by part: vision, projector, language."""
    plan = entries(language=config.language, vision=config.vision, downsample_ratio=config.downsample)
    return count_by_part((entry.native, math.prod(entry.shape)) for entry in plan)


def _qwen(
    layers: int, width: int, heads: tuple[int, int], inner: int, vocab: int = 151_674, **more: Any
) -> LanguageConfig:
    """Qwen2 and 2.5."""
    return LanguageConfig(
        family="qwen2",
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        layers=layers,
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=width // heads[0],
        rope_theta=1e6,
        qkv_bias=True,
        **more,
    )


def _internlm(
    layers: int, width: int, heads: tuple[int, int], inner: int, *, factor: float = 2.0
) -> LanguageConfig:
    """InternLM2 and 2.5."""
    return LanguageConfig(
        family="internlm2",
        vocab_size=92_553,
        hidden_size=width,
        intermediate_size=inner,
        layers=layers,
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=width // heads[0],
        rope_theta=1e6,
        rope_scaling={"type": "dynamic", "factor": factor},
        norm_eps=1e-5,
    )


def _qwen3(layers: int, width: int, heads: tuple[int, int], inner: int) -> LanguageConfig:
    return LanguageConfig(
        family="qwen3",
        vocab_size=151_936,
        hidden_size=width,
        intermediate_size=inner,
        layers=layers,
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=128,
        rope_theta=1e6,
        qk_norm=True,
        max_positions=40_960,
    )


_QWEN2_05B = _qwen(24, 896, (14, 2), 4864, vocab=151_655)
_QWEN25 = {
    "0.5B": _qwen(24, 896, (14, 2), 4864),
    "1.5B": _qwen(28, 1536, (12, 2), 8960),
    "3B": _qwen(36, 2048, (16, 2), 11_008),
    "7B": _qwen(28, 3584, (28, 4), 18_944),
    "14B": _qwen(48, 5120, (40, 8), 13_824),
    "32B": _qwen(64, 5120, (40, 8), 27_648),
    "72B": _qwen(80, 8192, (64, 8), 29_568),
}
_INTERNLM2 = {
    "1.8B": _internlm(24, 2048, (16, 8), 8192),
    "7B": _internlm(32, 4096, (32, 8), 14_336),
    "20B": _internlm(48, 6144, (48, 8), 16_384, factor=3.0),
}
_INTERNLM3_8B = LanguageConfig(
    family="internlm3",
    vocab_size=128_521,
    hidden_size=4096,
    intermediate_size=10_240,
    layers=48,
    heads=32,
    kv_heads=2,
    head_dim=128,
    rope_theta=5e7,
    rope_scaling={"rope_type": "dynamic", "factor": 6.0},
    norm_eps=1e-5,
)
_PHI3_MINI = LanguageConfig(
    family="phi3",
    vocab_size=32_020,
    hidden_size=3072,
    intermediate_size=8192,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=96,
    norm_eps=1e-5,
    max_positions=131_072,
)
_YI_34B = LanguageConfig(
    family="llama",
    vocab_size=64_009,
    hidden_size=7168,
    intermediate_size=20_480,
    layers=60,
    heads=56,
    kv_heads=8,
    head_dim=128,
    rope_theta=5e6,
    norm_eps=1e-5,
    max_positions=4096,
)
_LLAMA3_70B = LanguageConfig(
    family="llama",
    vocab_size=128_265,
    hidden_size=8192,
    intermediate_size=28_672,
    layers=80,
    heads=64,
    kv_heads=8,
    head_dim=128,
    rope_theta=5e5,
    norm_eps=1e-5,
    max_positions=8192,
)
_QWEN3 = {
    "0.6B": _qwen3(28, 1024, (16, 8), 3072),
    "1.7B": _qwen3(28, 2048, (16, 8), 6144),
    "4B": _qwen3(36, 2560, (32, 8), 9728),
    "8B": _qwen3(36, 4096, (32, 8), 12_288),
    "14B": _qwen3(40, 5120, (40, 8), 17_408),
    "32B": _qwen3(64, 5120, (64, 8), 25_600),
}

_SMALL, _LARGE = internvit_300m(), internvit_6b()
_ROWS, _TEMPLATE, _ROPE = "vocab_size", "template", "rotary scaling"
_FACTORS = "rotary factors (left out: short and long ones are in the checkpoint)"


def _preset(
    vision: InternViTConfig, language: LanguageConfig, template: str, source: str, *unverified: str
) -> Preset:
    config = InternVLConfig(
        vision=vision, language=language, template=template, tiles=TilePolicy(max_tiles=12)
    )
    return Preset(config=config, language=source, unverified=unverified)


PRESETS: dict[str, Preset] = {
    # 1.5
    "InternVL-Chat-V1-5": _preset(
        _LARGE, _INTERNLM2["20B"], "internlm2-chat", "internlm2-chat-20b", "widths", _ROPE
    ),
    "Mini-InternVL-Chat-2B-V1-5": _preset(
        _SMALL, _INTERNLM2["1.8B"], "internlm2-chat", "internlm2-chat-1_8b", _TEMPLATE, _ROPE
    ),
    "Mini-InternVL-Chat-4B-V1-5": _preset(
        _SMALL, _PHI3_MINI, "phi3-chat", "Phi-3-mini-128k-instruct", _ROWS, _TEMPLATE, _FACTORS
    ),
    # 2.0, of which 1B, 2B and 4B are Mini-InternVL
    "InternVL2-1B": _preset(_SMALL, _QWEN2_05B, "Hermes-2", "Qwen2-0.5B-Instruct", _ROWS),
    "InternVL2-2B": _preset(_SMALL, _INTERNLM2["1.8B"], "internlm2-chat", "internlm2-chat-1_8b", _ROPE),
    "InternVL2-4B": _preset(_SMALL, _PHI3_MINI, "phi3-chat", "Phi-3-mini-128k-instruct", _ROWS, _FACTORS),
    "InternVL2-8B": _preset(_SMALL, _INTERNLM2["7B"], "internlm2-chat", "internlm2_5-7b-chat", "widths"),
    "InternVL2-26B": _preset(
        _LARGE, _INTERNLM2["20B"], "internlm2-chat", "internlm2-chat-20b", "widths", _ROPE
    ),
    "InternVL2-40B": _preset(
        _LARGE, _YI_34B, "Hermes-2", "Nous-Hermes-2-Yi-34B", "widths", _ROWS, "context length"
    ),
    "InternVL2-Llama3-76B": _preset(
        _LARGE,
        _LLAMA3_70B,
        "internlm2-chat",
        "Hermes-2-Theta-Llama-3-70B",
        "widths",
        _ROWS,
        _TEMPLATE,
        "context length",
    ),
    # 2.5; the -MPO releases have the same sizes
    "InternVL2_5-1B": _preset(_SMALL, _QWEN25["0.5B"], "internvl2_5", "Qwen2.5-0.5B-Instruct"),
    "InternVL2_5-2B": _preset(_SMALL, _INTERNLM2["1.8B"], "internvl2_5", "internlm2_5-1_8b-chat"),
    "InternVL2_5-4B": _preset(_SMALL, _QWEN25["3B"], "internvl2_5", "Qwen2.5-3B-Instruct"),
    "InternVL2_5-8B": _preset(
        _SMALL, _INTERNLM2["7B"], "internvl2_5", "internlm2_5-7b-chat", "widths", _ROPE
    ),
    "InternVL2_5-26B": _preset(
        _LARGE, _INTERNLM2["20B"], "internvl2_5", "internlm2_5-20b-chat", "widths", _ROPE
    ),
    "InternVL2_5-38B": _preset(_LARGE, _QWEN25["32B"], "internvl2_5", "Qwen2.5-32B-Instruct", "widths"),
    "InternVL2_5-78B": _preset(_LARGE, _QWEN25["72B"], "internvl2_5", "Qwen2.5-72B-Instruct"),
    # 3
    "InternVL3-1B": _preset(_SMALL, _QWEN25["0.5B"], "internvl2_5", "Qwen2.5-0.5B", _ROPE),
    "InternVL3-2B": _preset(_SMALL, _QWEN25["1.5B"], "internvl2_5", "Qwen2.5-1.5B", "widths", _ROPE),
    "InternVL3-8B": _preset(_SMALL, _QWEN25["7B"], "internvl2_5", "Qwen2.5-7B", "widths", _ROPE),
    "InternVL3-9B": _preset(_SMALL, _INTERNLM3_8B, "internvl2_5", "internlm3-8b-instruct", _ROWS, _ROPE),
    "InternVL3-14B": _preset(_SMALL, _QWEN25["14B"], "internvl2_5", "Qwen2.5-14B", "widths", _ROPE),
    "InternVL3-38B": _preset(_LARGE, _QWEN25["32B"], "internvl2_5", "Qwen2.5-32B", "widths", _ROPE),
    "InternVL3-78B": _preset(_LARGE, _QWEN25["72B"], "internvl2_5", "Qwen2.5-72B", _ROPE),
    # 3.5, dense
    "InternVL3_5-1B": _preset(_SMALL, _QWEN3["0.6B"], "internvl2_5", "Qwen3-0.6B", "widths", _ROWS),
    "InternVL3_5-2B": _preset(_SMALL, _QWEN3["1.7B"], "internvl2_5", "Qwen3-1.7B", "widths", _ROWS),
    "InternVL3_5-4B": _preset(_SMALL, _QWEN3["4B"], "internvl2_5", "Qwen3-4B", "widths", _ROWS),
    "InternVL3_5-8B": _preset(_SMALL, _QWEN3["8B"], "internvl2_5", "Qwen3-8B", "widths", _ROWS),
    "InternVL3_5-14B": _preset(_SMALL, _QWEN3["14B"], "internvl2_5", "Qwen3-14B", "widths", _ROWS),
    "InternVL3_5-38B": _preset(_LARGE, _QWEN3["32B"], "internvl2_5", "Qwen3-32B", "widths", _ROWS),
}
"""Name on the model hub (without its owner) -> preset."""
