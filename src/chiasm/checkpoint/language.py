"""How the language families call their tensors, and the one of them that stores its rows in another order.

Source: the public checkpoints and their classes: Qwen2/3, Llama and InternLM3 share the names of transformers; Phi-3
keeps q|k|v and gate|up fused as our decoder does; InternLM2 has names of its own, and its `wqkv` holds, for each key
head, the query heads that read it, then that key head, then its value head. The `-hf` layouts of InternVL spell
InternLM2 as a Llama and have no Phi-3.

A speller maps one native name to the public names whose rows, stacked, make the native tensor (q, k, v or gate, up).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from chiasm.parts.language.config import LanguageConfig

__all__ = ["LANGUAGE_DEFAULTS", "Names", "Speller", "interleaved_rows", "names_of", "spell_language"]

Speller = Callable[[str], tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Public names of a family's parameters.

    Attributes:
        words: the word table, below the decoder's prefix.
        head: the output matrix, beside that prefix.
        block: native name within a layer -> public names within a layer.
        interleaved: `wqkv` stands in the order of `interleaved_rows`.
    """

    words: str = "embed_tokens.weight"
    head: str = "lm_head.weight"
    block: Mapping[str, tuple[str, ...]]
    interleaved: bool = False


_LLAMA = Names(
    block={
        "norm1.weight": ("input_layernorm.weight",),
        "norm2.weight": ("post_attention_layernorm.weight",),
        "attn.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "attn.qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        "attn.qk_norm.weight": ("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
        "attn.out.weight": ("self_attn.o_proj.weight",),
        "ffn.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "ffn.down.weight": ("mlp.down_proj.weight",),
    }
)
_PHI3 = Names(
    block={
        **_LLAMA.block,
        "attn.qkv.weight": ("self_attn.qkv_proj.weight",),
        "ffn.gate_up.weight": ("mlp.gate_up_proj.weight",),
    }
)
_INTERNLM2 = Names(
    words="tok_embeddings.weight",
    head="output.weight",
    block={
        "norm1.weight": ("attention_norm.weight",),
        "norm2.weight": ("ffn_norm.weight",),
        "attn.qkv.weight": ("attention.wqkv.weight",),
        "attn.out.weight": ("attention.wo.weight",),
        "ffn.gate_up.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
        "ffn.down.weight": ("feed_forward.w2.weight",),
    },
    interleaved=True,
)


def names_of(family: str, *, of_transformers: bool = False) -> Names:
    """The names of a family in its own releases, or those that InternVL's `-hf` layouts give it."""
    if family == "internlm2" and not of_transformers:
        return _INTERNLM2
    return _PHI3 if family == "phi3" else _LLAMA


def spell_language(native: str, names: Names, base: str, beside: str) -> tuple[str, ...]:
    """Public names of a language parameter.

    Args:
        native: a name under ``trunk.``, ``embedder.words.`` or ``head.``.
        names: the family's.
        base: prefix of the decoder, with its dot (``"model."``).
        beside: prefix of the output matrix (``""``).
    """
    if native == "embedder.words.weight":
        return (base + names.words,)
    if native == "head.weight":
        return (beside + names.head,)
    if native == "trunk.norm.weight":
        return (f"{base}norm.weight",)
    _, _, layer, rest = native.split(".", 3)  # trunk.layers.{layer}.{rest}
    return tuple(f"{base}layers.{layer}.{name}" for name in names.block[rest])


def interleaved_rows(config: LanguageConfig) -> Tensor:
    """Rows of the native q|k|v in the order in which InternLM2's ``wqkv`` stores them.

    ``wqkv == qkv[rows]``; by head the order is q₀ … q₍g₋₁₎ k₀ v₀ q₍g₎ …, g queries to a key head.
    """
    H, G = config.heads, config.kv_heads
    heads = torch.arange(H + 2 * G)
    q, k, v = heads[:H].view(G, H // G), heads[H : H + G, None], heads[H + G :, None]
    order = torch.cat((q, k, v), dim=1).reshape(-1, 1)
    return (order * config.head_dim + torch.arange(config.head_dim)).reshape(-1)


LANGUAGE_DEFAULTS: dict[str, dict[str, object]] = {
    "qwen2": {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
    },
    "llama": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    "internlm2": {
        "vocab_size": 103_168,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    "internlm3": {
        "vocab_size": 128_512,
        "hidden_size": 4096,
        "intermediate_size": 10_240,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
    },
    "phi3": {
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "qwen3": {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
    },
}
"""Class defaults by ``model_type``, for sub-configs that were saved as differences from them."""
