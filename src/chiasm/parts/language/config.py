"""LanguageConfig: one description of the decoder families, read from and written to their public configs.

Source: the `config.json` of Qwen2/2.5 and Llama checkpoints (and `llm_config` / `text_config` inside InternVL's).
A family is a preset of few facts (which bias, which name); everything else is plain numbers. Unknown keys of a
public config are ignored here and kept by the checkpoint layer for writing back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from chiasm.errors import ConfigError
from chiasm.nn.rope import Rope

FAMILIES = {
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "llama": ("LlamaForCausalLM", "llama"),
}
"""family -> (architectures[0], model_type) of the public config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConfig:
    """Widths and counts of a decoder: `layers` × (RMSNorm, grouped-query attention, RMSNorm, SwiGLU)."""

    family: Literal["qwen2", "llama"]
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

        Raises ConfigError naming the unsupported architecture or the missing key.
        """
        architecture = (config.get("architectures") or [None])[0]
        family = next(
            (
                f
                for f, (arch, kind) in FAMILIES.items()
                if architecture == arch or config.get("model_type") == kind
            ),
            None,
        )
        if family is None:
            found = architecture or config.get("model_type")
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
            return cls(
                family=family,  # type: ignore[arg-type]
                vocab_size=config["vocab_size"],
                hidden_size=hidden,
                intermediate_size=config["intermediate_size"],
                layers=config["num_hidden_layers"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden // heads,
                rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
                rope_scaling=scaling,
                norm_eps=config.get("rms_norm_eps", 1e-6),
                qkv_bias=family == "qwen2" or bool(config.get("attention_bias", False)),
                tie_words=bool(config.get("tie_word_embeddings", False)),
                max_positions=config.get("max_position_embeddings", 32_768),
            )
        except KeyError as missing:
            raise ConfigError(
                f"language config of {architecture} lacks the key {missing.args[0]!r}"
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
        if self.family == "llama":
            out["attention_bias"] = self.qkv_bias
        return out
