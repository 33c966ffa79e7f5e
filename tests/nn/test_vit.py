"""ViT block: attention against its twin, LayerScale, DropPath, position resizing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from chiasm.errors import ConfigError
from chiasm.nn.vit import (
    DropPath,
    VitAttention,
    VitBlock,
    VitMLP,
    attend_by_head,
    drop_path_rates,
    init_vit,
    resize_positions,
    vit_norm,
)


@given(
    images=st.integers(1, 3),
    tokens=st.integers(1, 19),
    heads=st.integers(1, 4),
    qkv_bias=st.booleans(),
    qk_norm=st.booleans(),
)
@settings(max_examples=30)
def test_attention_equals_its_twin(
    images: int, tokens: int, heads: int, qkv_bias: bool, qk_norm: bool
) -> None:
    attn = VitAttention(8 * heads, heads, qkv_bias=qkv_bias, qk_norm=qk_norm)
    x = torch.randn(images, tokens, 8 * heads)
    torch.testing.assert_close(attn(x), attn.forward_reference(x), rtol=1e-5, atol=1e-5)


def test_attention_gradients_equal_its_twin() -> None:
    attn = VitAttention(24, 3, qk_norm=True)
    x, upstream = torch.randn(2, 7, 24, requires_grad=True), torch.randn(2, 7, 24)
    wanted = [x, *attn.parameters()]
    fast = torch.autograd.grad((attn(x) * upstream).sum(), wanted)
    slow = torch.autograd.grad((attn.forward_reference(x) * upstream).sum(), wanted)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 65, 700])
def test_attention_by_head_equals_its_twin(tokens: int) -> None:
    attn = VitAttention(32, 2).bfloat16()
    x = torch.randn(2, tokens, 32).bfloat16()
    q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in attn.qkv(x).detach().chunk(3, dim=-1))
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend_by_head(q, k, v).double(), wanted, rtol=0, atol=2e-2)
    exact = attend_by_head(q.float(), k.float(), v.float(), rows=64)
    torch.testing.assert_close(exact.double(), wanted, rtol=1e-5, atol=1e-5)
    plain = attn(x)
    attn.by_head = True
    with torch.no_grad():
        torch.testing.assert_close(attn(x), plain, rtol=0, atol=2e-2)
    graded = attn(x.requires_grad_())  # the fused form, whose gradient is known
    graded.sum().backward()
    assert x.grad is not None


def test_images_do_not_see_each_other() -> None:
    attn, x = VitAttention(16, 2), torch.randn(3, 5, 16)
    torch.testing.assert_close(attn(x)[1:2], attn(x[1:2]), rtol=1e-5, atol=1e-6)


def test_width_must_divide_into_heads() -> None:
    with pytest.raises(ConfigError, match="width 10 is not a multiple of heads 3"):
        VitAttention(10, 3)


def _block(drop_path: float = 0.0, layer_scale: float = 0.3) -> VitBlock:
    return VitBlock(
        vit_norm("layer_norm", 16, 1e-6),
        VitAttention(16, 2),
        vit_norm("rms_norm", 16, 1e-6),
        VitMLP(16, 32),
        width=16,
        layer_scale=layer_scale,
        drop_path=drop_path,
    )


def test_block_is_two_scaled_residuals() -> None:
    block, x = _block(), torch.randn(2, 5, 16)
    middle = x + block.ls1 * block.attn(block.norm1(x))
    hidden = F.linear(block.norm2(middle), block.mlp.fc1.weight, block.mlp.fc1.bias)
    erf_gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = middle + block.ls2 * F.linear(erf_gelu, block.mlp.fc2.weight, block.mlp.fc2.bias)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-6)


def test_block_with_zero_layer_scale_is_the_identity() -> None:
    x = torch.randn(2, 5, 16)
    assert torch.equal(_block(layer_scale=0.0)(x), x)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    drop, x = DropPath(0.25), torch.ones(4000, 3, 2)
    out = drop(x)
    kept = out[:, 0, 0] != 0
    assert torch.equal(out, (kept.float() / 0.75)[:, None, None].expand_as(x))
    assert abs(kept.float().mean().item() - 0.75) < 0.03
    assert drop.eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_drop_path_leaves_dropped_samples_of_a_block_unchanged() -> None:
    block, x = _block(drop_path=0.5), torch.randn(64, 3, 16)
    unchanged = (block(x) == x).all(dim=(1, 2)).float().mean().item()
    assert 0.05 < unchanged < 0.5  # both branches dropped: a quarter
    assert not (block.eval()(x) == x).all(dim=(1, 2)).any()


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_drop_path_refuses_rates_that_are_no_probability(rate: float) -> None:
    with pytest.raises(ConfigError, match="outside"):
        DropPath(rate)


def test_drop_path_rates_are_linear_in_depth() -> None:
    assert drop_path_rates(0.4, 5) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert drop_path_rates(0.4, 1) == [0.0]


def test_unknown_norm_is_refused() -> None:
    assert isinstance(vit_norm("layer_norm", 4, 1e-6), nn.LayerNorm)
    with pytest.raises(ConfigError, match="unknown norm 'batch'"):
        vit_norm("batch", 4, 1e-6)


def test_init_leaves_no_bias_and_small_weights() -> None:
    block = _block()
    init_vit([block])
    assert not block.attn.qkv.bias.any()
    assert block.mlp.fc1.weight.abs().max() <= 0.04 + 1e-6
    assert 0.012 < block.mlp.fc1.weight.std().item() < 0.02


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    new_rows=st.integers(1, 9),
    new_columns=st.integers(1, 9),
)
@settings(max_examples=30)
def test_resized_positions_have_the_new_grid_and_the_old_class_row(
    rows: int, columns: int, new_rows: int, new_columns: int
) -> None:
    position = torch.randn(1, 1 + rows * columns, 4)
    resized = resize_positions(position, (rows, columns), (new_rows, new_columns))
    assert resized.shape == (1, 1 + new_rows * new_columns, 4)
    assert torch.equal(resized[:, 0], position[:, 0])
    if (rows, columns) == (new_rows, new_columns):
        assert resized is position


def test_resizing_keeps_rows_and_columns_apart() -> None:
    ramp = torch.arange(6.0)[:, None].expand(6, 4)  # grows along the rows only
    position = torch.cat([torch.zeros(1), ramp.flatten()])[None, :, None]
    grid = resize_positions(position, (6, 4), (12, 2))[0, 1:, 0].reshape(12, 2)
    torch.testing.assert_close(grid[:, 0], grid[:, 1])
    assert (grid[1:, 0] > grid[:-1, 0]).all()


def test_resizing_computes_in_fp32_and_keeps_the_dtype() -> None:
    position = torch.randn(1, 17, 8).bfloat16()
    resized = resize_positions(position, (4, 4), (7, 5))
    assert resized.dtype == torch.bfloat16
    exact = resize_positions(position.float(), (4, 4), (7, 5))
    assert torch.equal(resized, exact.bfloat16())


def test_resizing_checks_the_old_grid() -> None:
    with pytest.raises(ConfigError, match="17 rows but the grid 5x5 needs 26"):
        resize_positions(torch.randn(1, 17, 4), (5, 5), (4, 4))
