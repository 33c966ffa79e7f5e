"""LanguageConfig: one description of the decoder families, read from and written to their public configs.

Source: the `config.json` of Qwen2/2.5, Qwen3, Llama, InternLM2/2.5/3 and Phi-3 checkpoints (and `llm_config` /
`text_config` inside InternVL's), as their public classes read them. A family is a preset of few facts (which bias,
which norm, which name); everything else is plain numbers. Unknown keys of a public config are ignored here and kept
by the checkpoint layer for writing back; keys that would change the function to one that the decoder does not
compute are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from chiasm.errors import ConfigError
from chiasm.nn.rope import Rope

FAMILIES = {
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "llama": ("LlamaForCausalLM", "llama"),
    "internlm2": ("InternLM2ForCausalLM", "internlm2"),
    "internlm3": ("InternLM3ForCausalLM", "internlm3"),
    "phi3": ("Phi3ForCausalLM", "phi3"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
"""family -> (architectures[0], model_type) of the public config."""

_CONVERTED = (
    ("InternLM2ForCausalLM", "llama"),
    ("InternLM3ForCausalLM", "llama"),
    ("LlamaForCausalLM", "internlm3"),
)
"""Architectures that files name although their model_type, which readers obey, is another: leftovers of conversions to
a Llama, and what transformers saves for InternLM3, which it computes with its Llama."""

_NO_BIASES = {
    "llama": ("attention_bias",),
    "qwen3": ("attention_bias",),
    "internlm2": ("bias",),
    "internlm3": ("bias", "qkv_bias", "attention_bias"),
}
"""Keys that would give a family's output projection a bias too, which the block has no place for. The public classes
of Qwen2 and Phi-3 read no such key."""


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming the key, for a setting of a public config that changes what a decoder computes.

    The blocks here are full attention with SwiGLU, rotary positions over the whole head and biases on q, k and v
    alone; ``architectures[0]`` must agree with ``model_type``. Absent and null keys are fine.
    """
    _agree(config)

    def refuse(key: str, needed: str) -> None:
        raise ConfigError(f"language config {key} is {config[key]!r}: only {needed} is supported")

    if config.get("hidden_act") not in (None, "silu"):
        refuse("hidden_act", "'silu'")
    if config.get(
        "use_sliding_window"
    ):  # the width alone (sliding_window) is in every Qwen2 file and switches nothing
        refuse("use_sliding_window", "false")
    layers = config.get("layer_types")
    if layers is not None and not (
        isinstance(layers, list) and all(kind == "full_attention" for kind in layers)
    ):
        refuse("layer_types", "'full_attention' in every layer")
    if config.get("mlp_bias"):
        refuse("mlp_bias", "false")
    kind = _kind(config)
    for key in _NO_BIASES.get(str(kind), ()):
        if config.get(key):
            refuse(key, f"false in {kind}")
    if kind == "phi3":
        _refuse_narrow_window(config)
    rope = config.get("rope_parameters")
    for where in (config, rope if isinstance(rope, Mapping) else {}):
        if where.get("partial_rotary_factor") not in (None, 1):
            found = where["partial_rotary_factor"]
            raise ConfigError(f"language config partial_rotary_factor is {found!r}: only 1 is supported")


def _refuse_narrow_window(config: Mapping[str, Any]) -> None:
    """Phi-3 masks by its window whenever it has one; a window that holds the whole context masks nothing."""
    window, context = config.get("sliding_window"), config.get("max_position_embeddings") or 4096
    if window is None or (isinstance(window, int) and isinstance(context, int) and window >= context):
        return
    raise ConfigError(
        f"language config sliding_window is {window!r}: only null or at least max_position_embeddings ({context!r}) "
        "is supported"
    )


def _architecture(config: Mapping[str, Any]) -> str | None:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named and named[0] is not None else None


def _kind(config: Mapping[str, Any]) -> str | None:
    """The ``model_type``; where the file has none, that of its architecture."""
    stated = config.get("model_type")
    if stated is not None:
        return str(stated)
    architecture = _architecture(config)
    return next((kind for name, kind in FAMILIES.values() if name == architecture), None)


def _agree(config: Mapping[str, Any]) -> None:
    """Raise ConfigError where the architecture is not one of the model_type's (any head of it is)."""
    architecture, kind = _architecture(config), _kind(config)
    known = {name: of for name, of in FAMILIES.values()}
    if architecture is None or (architecture, kind) in _CONVERTED:
        return
    message = (
        f"language config architectures[0] is {architecture!r} but model_type {kind!r}: correct one of them"
    )
    for name, of in known.items():
        if kind == of and not re.match(
            name.removesuffix("ForCausalLM") + r"(Model|For\w+)$", architecture, re.I
        ):
            raise ConfigError(message)
    if kind != known.get(architecture, kind):
        raise ConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConfig:
    """Widths and counts of a decoder: `layers` × (RMSNorm, grouped-query attention, RMSNorm, SwiGLU)."""

    family: Literal["qwen2", "llama", "internlm2", "internlm3", "phi3", "qwen3"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_words: bool = False
    max_positions: int = 32_768

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ConfigError(
                f"language family {self.family!r} is not known; supported: {', '.join(FAMILIES)}"
            )
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"language config field {name} must be positive, found {getattr(self, name)}"
                )
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        _ = self.rope  # an impossible rotary setting fails here, not at the first token

    @property
    def rope(self) -> Rope:
        """Frequencies of the rotary positions."""
        return Rope(
            head_dim=self.head_dim,
            theta=self.rope_theta,
            scaling=self.rope_scaling,
            max_positions=self.max_positions,
        )

    @classmethod
    def from_public(cls, config: dict[str, Any]) -> LanguageConfig:
        """From a transformers-style config dict (either generation of its rotary keys).

        Raises ConfigError naming the unsupported architecture or setting, or the missing key.
        """
        refuse_unsupported(config)
        architecture, stated = _architecture(config), _kind(config)
        family = next((f for f, (_, kind) in FAMILIES.items() if kind == stated), None)
        if family is None:
            found = architecture or stated
            supported = ", ".join(arch for arch, _ in FAMILIES.values())
            raise ConfigError(f"language model {found!r} is not supported; supported: {supported}")
        try:
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            # transformers 5 moved theta and scaling into one dict.
            rope = dict(config.get("rope_parameters") or {})
            scaling = (
                config.get("rope_scaling") or {k: v for k, v in rope.items() if k != "rope_theta"} or None
            )
            if scaling and (scaling.get("rope_type") or scaling.get("type") or "default") == "default":
                scaling = None
            if scaling and config.get("original_max_position_embeddings") is not None:
                # A key of the whole config in Phi-3's files; where both are, the public class takes this one.
                old = config["original_max_position_embeddings"]
                scaling = {**scaling, "original_max_position_embeddings": old}
            return cls(
                family=family,  # type: ignore[arg-type]
                vocab_size=config["vocab_size"],
                hidden_size=hidden,
                intermediate_size=config["intermediate_size"],
                layers=config["num_hidden_layers"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                # The public class of Qwen3 does not derive it from the width.
                head_dim=config["head_dim"]
                if family == "qwen3"
                else config.get("head_dim") or hidden // heads,
                rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
                rope_scaling=scaling,
                norm_eps=config.get("rms_norm_eps", 1e-6),
                qkv_bias=family == "qwen2",
                qk_norm=family == "qwen3",
                tie_words=bool(config.get("tie_word_embeddings", False)),
                max_positions=config.get("max_position_embeddings", 32_768),
            )
        except KeyError as missing:
            raise ConfigError(
                f"language config of {architecture or stated} lacks the key {missing.args[0]!r}"
            ) from None

    def to_public(self) -> dict[str, Any]:
        """The transformers-style dict that `from_public` reads back to an equal config."""
        architecture, model_type = FAMILIES[self.family]
        out: dict[str, Any] = {
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_words,
            "max_position_embeddings": self.max_positions,
            "hidden_act": "silu",
        }
        if self.family in ("llama", "qwen3"):
            out["attention_bias"] = False
        elif self.family in ("internlm2", "internlm3"):
            out["bias"] = False
        if self.family == "phi3" and self.rope.switch is not None:
            out["original_max_position_embeddings"] = self.rope.switch
        return out
