"""The decoder against transformers' Qwen2 and Llama: random small configs, fp32."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from chiasm.errors import ConfigError
from chiasm.nn.attention import Segments
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.language.decoder import Decoder, build_decoder, init_decoder

SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def reference(family: str, scaling: dict | None = None, **changes: int) -> nn.Module:
    """A random transformers model whose every parameter matters."""
    sizes = {
        "vocab_size": 53,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        **changes,
    }
    rope = {"rope_theta": 10000.0, **(scaling or {"rope_type": "default"})}
    config_class, model_class = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[family]
    config = config_class(
        **sizes, rope_parameters=rope, tie_word_embeddings=False, attn_implementation="eager"
    )
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.2 * noise)
    return model


def copy_weights(model: nn.Module) -> tuple[Decoder, LanguageConfig]:
    """Our decoder with the reference's weights (fused by hand, independently of the checkpoint adapters)."""
    public = model.config.to_dict() | {"architectures": [type(model).__name__]}
    config = LanguageConfig.from_public(public)
    decoder = build_decoder(config)
    with torch.no_grad():
        for ours, theirs in zip(decoder.layers, model.model.layers, strict=True):
            attention, mlp = theirs.self_attn, theirs.mlp
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            ours.attn.qkv.weight.copy_(torch.cat([p.weight for p in parts]))
            if config.qkv_bias:
                ours.attn.qkv.bias.copy_(torch.cat([p.bias for p in parts]))
            ours.attn.out.weight.copy_(attention.o_proj.weight)
            ours.ffn.gate_up.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
            ours.ffn.down.weight.copy_(mlp.down_proj.weight)
            ours.norm1.weight.copy_(theirs.input_layernorm.weight)
            ours.norm2.weight.copy_(theirs.post_attention_layernorm.weight)
        decoder.norm.weight.copy_(model.model.norm.weight)
    return decoder.eval(), config


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("length", [7, 45], ids=["short", "beyond the trained length"])
def test_logits_equal_transformers(family: str, scaling: str, length: int) -> None:
    model = reference(family, SCALINGS[scaling])
    decoder, _ = copy_weights(model)
    ids = torch.randint(0, 53, (length,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
        hidden = decoder(
            model.model.embed_tokens.weight[ids],
            kind_T=torch.zeros(length, dtype=torch.int8),
            segments=Segments.of([length]),
            pos_T=torch.arange(length, dtype=torch.float32),
        )
        logits = hidden @ model.lm_head.weight.T
    assert float((logits - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_public_config_round_trip(family: str) -> None:
    _, config = copy_weights(reference(family))
    assert LanguageConfig.from_public(config.to_public()) == config
    assert LanguageConfig.from_public(config.to_public() | {"moe_ghost": 1}) == config


def test_old_and_new_rotary_keys_read_alike() -> None:
    old = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 9,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    new = {k: v for k, v in old.items() if not k.startswith("rope")}
    new["rope_parameters"] = {"rope_theta": 1e6, "rope_type": "dynamic", "factor": 2.0}
    a, b = LanguageConfig.from_public(old), LanguageConfig.from_public(new)
    assert (a.rope_theta, a.rope.kind, a.rope_scaling["factor"]) == (1e6, "dynamic", 2.0)
    assert (b.rope_theta, b.rope.kind, b.rope_scaling["factor"]) == (1e6, "dynamic", 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "MambaForCausalLM"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_key_value_heads": 4}, "multiple"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
    ],
)
def test_impossible_configs_say_what_is_wrong(change: dict, message: str) -> None:
    config = copy_weights(reference("llama"))[1].to_public()
    config = {k: v for k, v in (config | change).items() if v is not None}
    with pytest.raises(ConfigError, match=message):
        LanguageConfig.from_public(config)


def test_activation_checkpointing_changes_no_gradient() -> None:
    config = copy_weights(reference("qwen2"))[1]
    decoder = build_decoder(config)
    init_decoder(decoder, generator=torch.Generator().manual_seed(0))
    x = torch.randn(9, 48, generator=torch.Generator().manual_seed(1))

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        decoder.zero_grad()
        decoder.checkpointing = checkpointing
        rows = {"kind_T": torch.zeros(9, dtype=torch.int8), "pos_T": torch.arange(9.0)}
        decoder(x, segments=Segments.of([4, 5]), **rows).square().sum().backward()
        return [p.grad.clone() for p in decoder.parameters()]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)
