"""InternViT: parity with transformers, sizes of the releases, configurations, checkpointing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.parts.vision.internvit import (
    VISION_DEFAULTS,
    InternViT,
    InternViTConfig,
    internvit_6b,
    internvit_300m,
    internvit_mini,
)


def small(**changes: Any) -> InternViTConfig:
    shape: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "layers": 3,
        "heads": 3,
        "patch_size": 4,
        "image_size": 24,
    }
    return InternViTConfig(**{**shape, **changes})


def _from_transformers(state: dict[str, Tensor], config: InternViTConfig) -> dict[str, Tensor]:
    """Rename transformers' InternVL vision weights by hand, independently of the checkpoint adapters."""
    names = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "lambda_1": "ls1",
        "lambda_2": "ls2",
        "attention.projection_layer": "attn.proj",
        "attention.q_norm": "attn.q_norm",
        "attention.k_norm": "attn.k_norm",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    out = {
        "class_embedding": state["embeddings.cls_token"],
        "position_embedding": state["embeddings.position_embeddings"],
        "patch_embedding.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embedding.bias": state["embeddings.patch_embeddings.projection.bias"],
    }
    for i in range(config.layers):
        old = f"encoder.layer.{i}."
        for theirs, ours in names.items():
            for leaf in ("", ".weight", ".bias"):
                if f"{old}{theirs}{leaf}" in state:
                    out[f"layers.{i}.{ours}{leaf}"] = state[f"{old}{theirs}{leaf}"]
        for leaf in ("weight", "bias") if config.qkv_bias else ("weight",):
            rows = [state[f"{old}attention.{part}_proj.{leaf}"] for part in "qkv"]
            out[f"layers.{i}.attn.qkv.{leaf}"] = torch.cat(rows)
    return out


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_parity_with_transformers(norm: str, qk_norm: bool, qkv_bias: bool) -> None:
    from transformers import InternVLVisionConfig, InternVLVisionModel

    config = small(norm=norm, qk_norm=qk_norm, qkv_bias=qkv_bias)
    their_config = InternVLVisionConfig(**config.to_public("hf"))
    assert InternViTConfig.from_public(their_config.to_dict(), "hf") == config
    theirs = InternVLVisionModel(their_config).eval()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.3)
    ours = InternViT(config).eval()
    ours.load_state_dict(_from_transformers(theirs.state_dict(), config))
    for size in [
        (24, 24),
        (32, 20),
        (8, 40),
        (12, 48),
    ]:  # native; others; (12, 48) has the native patch count
        pixels = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = theirs(pixels, output_hidden_states=True)
            got = ours.hidden_states(pixels, (-1, 1))
        for features, reference in zip(
            got, (expected.last_hidden_state, expected.hidden_states[1]), strict=True
        ):
            assert features.shape == (2, 1 + size[0] * size[1] // 16, 48)
            assert (features - reference).abs().max().item() <= 1e-5


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(internvit_300m(), 304_012_288), (internvit_6b(), 5_536_496_000), (internvit_mini(), 2_721_216)],
)
def test_released_sizes(config: InternViTConfig, parameters: int) -> None:
    with torch.device("meta"):
        model = InternViT(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_tokens_of_the_releases() -> None:
    assert (internvit_300m().grid, internvit_300m().tokens) == (32, 1024)
    assert internvit_mini().tokens == 64


def test_native_parameter_names() -> None:
    names = {name for name, _ in InternViT(small(layers=1, qk_norm=True)).named_parameters()}
    leaves = ["norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    expected = {f"layers.0.{leaf}.{kind}" for leaf in leaves for kind in ("weight", "bias")}
    expected |= {"layers.0.attn.q_norm.weight", "layers.0.attn.k_norm.weight", "layers.0.ls1", "layers.0.ls2"}
    expected |= {"class_embedding", "position_embedding", "patch_embedding.weight", "patch_embedding.bias"}
    assert names == expected


RELEASED_300M = {
    "architectures": ["InternVisionModel"],
    "attention_dropout": 0.0,
    "drop_path_rate": 0.1,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "image_size": 448,
    "initializer_factor": 0.1,
    "initializer_range": 1e-10,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-06,
    "model_type": "intern_vit_6b",
    "norm_type": "layer_norm",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "qk_normalization": False,
    "qkv_bias": True,
    "use_flash_attn": True,
    # what a mixture-of-experts variant left in released files
    "capacity_factor": 1.2,
    "eval_capacity_factor": 1.4,
    "laux_allreduce": "all_nodes",
    "moe_coeff_ratio": 0.5,
    "moe_output_scale": 4.0,
    "noisy_gate_policy": "RSample_before",
    "num_experts": 8,
    "shared_expert_intermediate_size": 3072,
    "use_moe": False,
}


def test_reads_a_released_original_config() -> None:
    assert InternViTConfig.from_public(RELEASED_300M) == InternViTConfig(drop_path=0.1)


def test_absent_keys_take_the_public_defaults() -> None:
    original = InternViTConfig.from_public({})
    assert (original.hidden_size, original.layers, original.heads, original.image_size) == (3200, 48, 25, 224)
    assert original.norm == "rms_norm"
    assert original.qk_norm
    assert not original.qkv_bias
    from transformers import InternVLVisionConfig

    assert InternViTConfig.from_public({}, "hf") == InternViTConfig.from_public(
        InternVLVisionConfig().to_dict(), "hf"
    )


@pytest.mark.parametrize("config", [internvit_300m(), internvit_6b(), internvit_mini(), small(drop_path=0.2)])
def test_public_configs_round_trip(config: InternViTConfig) -> None:
    assert InternViTConfig.from_public(config.to_public("original"), "original") == config
    back = InternViTConfig.from_public(config.to_public("hf"), "hf")
    assert back == InternViTConfig.from_public({**config.to_public(), "drop_path_rate": 0.0})


def test_hf_sides_may_be_pairs_or_ints_but_square() -> None:
    hf = internvit_300m().to_public("hf")
    assert hf["image_size"] == [448, 448]
    assert (
        InternViTConfig.from_public({**hf, "image_size": 448, "patch_size": (14, 14)}, "hf")
        == internvit_300m()
    )
    with pytest.raises(ConfigError, match=r"image_size \[448, 224\] is not square"):
        InternViTConfig.from_public({**hf, "image_size": (448, 224)}, "hf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_mean_pooling": False}, "final norm"),
        ({"use_absolute_position_embeddings": False}, "absolute positions"),
        ({"hidden_act": "relu"}, "use 'gelu'"),
    ],
)
def test_refuses_hf_encoders_that_it_would_get_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InternViTConfig.from_public({**internvit_300m().to_public("hf"), **changes}, "hf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "no multiple of heads 5"),
        ({"image_size": 30}, "use 28"),
        ({"layers": 0}, "layers is 0"),
        ({"norm": "group"}, "'rms_norm'"),
        ({"act": "quick_gelu"}, "use 'gelu'"),
        ({"drop_path": 1.0}, r"outside \[0, 1\)"),
    ],
)
def test_config_errors_say_the_fix(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**changes)


def test_select_layer_counts_hidden_states() -> None:
    model, pixels = InternViT(small()).eval(), torch.randn(1, 3, 24, 24)
    states = model.hidden_states(pixels, (0, 1, 2, 3))
    assert torch.equal(states[0], model.embed(pixels))
    for select in (-1, -2, -3, -4):
        assert torch.equal(model(pixels, select), states[select])
    assert torch.equal(model(pixels), states[3])
    with pytest.raises(ConfigError, match="there are 4 hidden states"):
        model(pixels, 4)


def test_other_sizes_must_be_whole_patches() -> None:
    with pytest.raises(ConfigError, match="26x24 pixels is not made of whole patches of 4"):
        InternViT(small())(torch.randn(1, 3, 26, 24))


def test_pixels_are_cast_to_the_weights() -> None:
    model = InternViT(small(qk_norm=True, norm="rms_norm")).bfloat16()
    pixels = torch.randn(1, 3, 28, 24)
    assert model(pixels).dtype == torch.bfloat16
    exact = InternViT(small(qk_norm=True, norm="rms_norm"))
    exact.load_state_dict(model.float().state_dict())
    torch.testing.assert_close(model.bfloat16()(pixels).float(), exact(pixels), rtol=0.05, atol=0.05)


def test_autocast_keeps_the_residual_stream_wide() -> None:
    model, pixels = InternViT(small()), torch.randn(2, 3, 24, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = model.hidden_states(pixels, (0, -1))
    assert [state.dtype for state in states] == [torch.float32, torch.float32]
    torch.testing.assert_close(states[-1], model(pixels), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_checkpointing_changes_nothing_but_memory(drop_path: float) -> None:
    model, pixels = (
        InternViT(small(drop_path=drop_path, layer_scale_init=1.0)).train(),
        torch.randn(4, 3, 24, 24),
    )
    results = []
    for checkpoint in (False, True):
        torch.manual_seed(3)  # the same paths are dropped
        model.zero_grad()
        out = model(pixels, checkpoint=checkpoint)
        out.square().sum().backward()
        results.append((out, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    assert len(results[0][1]) == len(list(model.parameters()))


def test_checkpointing_keeps_fewer_activations() -> None:
    model, pixels = InternViT(small(layers=6)), torch.randn(2, 3, 24, 24)

    def saved(checkpoint: bool) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.checkpoint = checkpoint
            model(pixels)
        return sum(sizes)

    assert saved(True) * 4 < saved(False)


def test_drop_path_grows_with_depth() -> None:
    assert [layer.drop_path.rate for layer in InternViT(small(drop_path=0.4)).layers] == pytest.approx(
        [0, 0.2, 0.4]
    )


def test_mini_shape() -> None:
    model = InternViT(internvit_mini()).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 65, 192)


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_null_and_absent_keys_take_the_class_defaults(layout: str) -> None:
    empty = InternViTConfig.from_public({}, layout)
    assert InternViTConfig.from_public(dict.fromkeys(VISION_DEFAULTS[layout]), layout) == empty
