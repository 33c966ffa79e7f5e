"""RMSNorm: the definition, the order of rounding, gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chiasm.nn.norms import HeadNorm, RMSNorm, rms_norm, rms_norm_reference


@given(rows=st.integers(1, 5), dim=st.integers(1, 33), scale=st.sampled_from([1e-4, 1.0, 1e3]))
def test_equals_the_definition(rows: int, dim: int, scale: float) -> None:
    x, weight = torch.randn(2, rows, dim) * scale, torch.randn(dim)
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounds_before_the_gain_like_qwen2(dtype: torch.dtype) -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    theirs, ours = Qwen2RMSNorm(96, eps=1e-6).to(dtype), RMSNorm(96, eps=1e-6).to(dtype)
    weight = torch.randn(96).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(weight)
        ours.weight.copy_(weight)
        x = (torch.randn(7, 96) * 5).to(dtype)
        expected, got = theirs(x), ours(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected)
    if dtype != torch.float32:
        # The sums may differ in their last fp32 bit, which can move a rounding, but rarely.
        assert (got == expected).float().mean() > 0.98


def test_large_half_precision_inputs_do_not_overflow() -> None:
    x = torch.full((2, 8), 6e4, dtype=torch.float16)
    torch.testing.assert_close(rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-6), torch.ones_like(x))


def test_gradients_equal_those_of_the_definition() -> None:
    x, weight = torch.randn(3, 5, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    upstream = torch.randn(3, 5, 16)
    fast = torch.autograd.grad((rms_norm(x, weight, 1e-5) * upstream).sum(), (x, weight))
    slow = torch.autograd.grad((rms_norm_reference(x, weight, 1e-5) * upstream).sum(), (x, weight))
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_module_has_one_parameter_of_ones() -> None:
    norm = RMSNorm(6, 1e-5)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
    assert torch.equal(norm.weight, torch.ones(6))
    assert "6, eps=1e-05" in repr(norm)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_kernel_equals_the_definition(dtype: torch.dtype) -> None:
    x, weight = (torch.randn(64, 96, device="cuda") * 5).to(dtype), torch.randn(96, device="cuda").to(dtype)
    got, expected = rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6)
    torch.testing.assert_close(got, expected)
    if dtype != torch.float32:
        assert (got == expected).float().mean() > 0.98


def test_head_norm_is_one_norm_for_queries_and_one_for_keys() -> None:
    norm = HeadNorm(4, 2, 6, 1e-5)
    with torch.no_grad():
        norm.weight.normal_()
    q, k = RMSNorm(6, 1e-5), RMSNorm(6, 1e-5)
    with torch.no_grad():
        q.weight.copy_(norm.weight[:6])
        k.weight.copy_(norm.weight[6:])
    x = torch.randn(3, 8, 6)[:, :6]  # a view, as the rows of a fused projection are
    torch.testing.assert_close(norm(x), torch.cat((q(x[:, :4]), k(x[:, 4:])), dim=1))
    assert "4 + 2 heads of 6" in repr(norm)


def test_autocast_leaves_the_statistics_in_fp32() -> None:
    x_TD = torch.randn(7, 512, generator=torch.Generator().manual_seed(0)) * 3
    weight_D = torch.ones(512)
    plain = rms_norm(x_TD, weight_D, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        cast = rms_norm(x_TD, weight_D, 1e-6)
    assert torch.equal(cast, plain)
