"""LoRA: identity at the start, merging, splits, what is trained, dtypes, saving; parity with peft (slow)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.nn.lora import (
    LoRALinear,
    apply_lora,
    fused_splits,
    merge_lora,
)


class Layer(nn.Module):
    """A fused projection whose parent tells its splits, and two plain ones."""

    splits = (8, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 16)
        self.out = nn.Linear(16, 12, bias=False)
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.out(torch.tanh(self.qkv(x))))


def _model() -> nn.Sequential:
    return nn.Sequential(Layer(), Layer())


def _randomise(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)


def test_starts_as_the_identity() -> None:
    model, x = _model(), torch.randn(3, 12)
    expected = model(x)
    assert apply_lora(model, ["*.qkv", "*.out"], 2, 4.0) == ["0.qkv", "0.out", "1.qkv", "1.out"]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    adapter = model[0].qkv
    assert isinstance(adapter, LoRALinear)
    assert not adapter.lora_B.any()
    assert adapter.lora_A.abs().max() <= 12**-0.5  # uniform within 1 / sqrt(I)


@given(
    rank=st.integers(1, 5),
    alpha=st.floats(0.5, 32),
    splits=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    bias=st.booleans(),
)
@settings(max_examples=30)
def test_equals_separate_layers_and_the_merged_layer(
    rank: int, alpha: float, splits: list[int], bias: bool
) -> None:
    fused = LoRALinear(nn.Linear(7, sum(splits), bias=bias), rank, alpha, splits=splits)
    _randomise(fused)
    x = torch.randn(2, 3, 7)
    separate = []
    for i, size in enumerate(splits):
        rows = slice(sum(splits[:i]), sum(splits[:i]) + size)
        a, b = fused.lora_A[i * rank : (i + 1) * rank], fused.lora_B[rows]
        weight = fused.base.weight[rows] + alpha / rank * b @ a
        separate.append(x @ weight.T + (fused.base.bias[rows] if bias else 0.0))
    got = fused(x)
    torch.testing.assert_close(got, torch.cat(separate, dim=-1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(fused.merged()(x), got, rtol=1e-5, atol=1e-4)


def test_merge_is_exact_and_puts_plain_layers_back() -> None:
    model, x = _model(), torch.randn(4, 12)
    apply_lora(model, ["*"], 3, 6.0, splits=fused_splits(model))
    assert model[0].qkv.splits == (8, 4, 4)
    assert model[0].out.splits == (12,)
    _randomise(model)
    expected = model(x)
    assert merge_lora(model) == ["0.qkv", "0.out", "1.qkv", "1.out"]
    assert not any(isinstance(child, LoRALinear) for child in model.modules())
    assert model.state_dict().keys() == _model().state_dict().keys()
    assert (model(x) - expected).abs().max().item() <= 1e-6


def test_gradients_reach_adapters_only() -> None:
    model = _model()
    model.requires_grad_(False)
    apply_lora(model, ["*.qkv"], 2, 4.0)
    _randomise(model)
    model(torch.randn(3, 12)).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {f"{i}.qkv.lora_{x}" for i in (0, 1) for x in "AB"}


def test_only_wrapped_layers_are_frozen() -> None:
    model = _model()
    apply_lora(model, ["0.qkv"], 2, 4.0)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"0.qkv.base.weight", "0.qkv.base.bias"}


def test_gradients_equal_those_of_the_written_out_weight() -> None:
    layer = LoRALinear(nn.Linear(6, 9), 2, 3.0, splits=(4, 5))
    _randomise(layer)
    x, upstream = torch.randn(5, 6, requires_grad=True), torch.randn(5, 9)
    wanted = (x, layer.lora_A, layer.lora_B)
    fast = torch.autograd.grad((layer(x) * upstream).sum(), wanted)
    delta = torch.cat([layer.lora_B[:4] @ layer.lora_A[:2], layer.lora_B[4:] @ layer.lora_A[2:]])
    slow_out = x @ (layer.base.weight + 1.5 * delta).T + layer.base.bias
    slow = torch.autograd.grad((slow_out * upstream).sum(), wanted)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_bf16_base_with_fp32_adapters() -> None:
    base = nn.Linear(16, 8).bfloat16()
    layer = LoRALinear(base, 4, 8.0)
    _randomise(layer)
    x = torch.randn(5, 16).bfloat16()
    out = layer(x)
    assert out.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    # rounded once, from an fp32 sum of the base's bf16 output and the fp32 correction
    correction = 2.0 * (x.float() @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(out, (base(x).float() + correction).bfloat16(), rtol=1e-2, atol=1e-3)
    out.float().sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.dtype == torch.float32
    before = base.weight.clone()
    merged = layer.merged()
    assert torch.equal(merged.weight, (before.float() + layer.delta()).bfloat16())


def test_autocast_keeps_working() -> None:
    layer = LoRALinear(nn.Linear(8, 8), 2, 2.0, splits=(4, 4))
    _randomise(layer)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.05)


def test_dropout_acts_on_the_adapter_only_while_training() -> None:
    layer, x = LoRALinear(nn.Linear(8, 8), 2, 2.0, dropout=0.5), torch.randn(64, 8)
    torch.testing.assert_close(layer(x), layer.base(x))  # B is zero
    _randomise(layer)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), x @ (layer.base.weight + layer.delta()).T + layer.base.bias)


def test_apply_refuses_patterns_without_a_layer_and_second_adapters() -> None:
    model = _model()
    with pytest.raises(ConfigError, match=r"'\*\.kv' matches no linear layer"):
        apply_lora(model, ["*.qkv", "*.kv"], 2, 4.0)
    assert not any(isinstance(layer, LoRALinear) for layer in model.modules())
    apply_lora(model, ["0.qkv"], 2, 4.0)
    with pytest.raises(ConfigError, match=r"0\.qkv has a LoRA adapter already"):
        apply_lora(model, ["*"], 2, 4.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank 0"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"splits": (4, 5)}, "do not add up to 8"),
        ({"splits": (8, 0)}, "do not add up to 8"),
        ({"splits": ()}, "do not add up to 8"),
    ],
)
def test_refuses_bad_settings(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRALinear(nn.Linear(8, 8), **{"rank": 2, "alpha": 2.0, **arguments})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_equals_peft_on_separate_projections() -> None:
    import peft

    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(10, 8), nn.Linear(10, 4), nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)

    separate = Separate()
    fused = nn.Linear(10, 16)
    with torch.no_grad():
        fused.weight.copy_(torch.cat([getattr(separate, n).weight for n in "qkv"]))
        fused.bias.copy_(torch.cat([getattr(separate, n).bias for n in "qkv"]))
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q", "k", "v"], lora_dropout=0.0)
    theirs = peft.get_peft_model(separate, config)
    ours = LoRALinear(fused, 3, 5, splits=(8, 4, 4))
    layers = [getattr(theirs.base_model.model, n) for n in "qkv"]
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"].weight)
    with torch.no_grad():
        ours.lora_A.copy_(torch.cat([layer.lora_A["default"].weight for layer in layers]))
        ours.lora_B.copy_(torch.cat([layer.lora_B["default"].weight for layer in layers]))
    x, upstream = torch.randn(6, 10), torch.randn(6, 16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    (ours(x) * upstream).sum().backward()
    (theirs(x) * upstream).sum().backward()
    for name, ours_grad in (("lora_A", ours.lora_A.grad), ("lora_B", ours.lora_B.grad)):
        their_grad = torch.cat([getattr(layer, name)["default"].weight.grad for layer in layers])
        torch.testing.assert_close(ours_grad, their_grad, rtol=1e-5, atol=1e-5)
    merged = theirs.merge_and_unload()
    expected = torch.cat([getattr(merged, n).weight for n in "qkv"])
    torch.testing.assert_close(ours.merged().weight, expected, rtol=1e-6, atol=1e-6)
