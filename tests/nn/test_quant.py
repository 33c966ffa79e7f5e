"""Rounded linear layers against their slow twins, on both routes, and what rounding costs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from chiasm.errors import ConfigError
from chiasm.nn import quant
from chiasm.nn.quant import (
    GELU_FLOOR,
    Int4Linear,
    Int8Linear,
    dequantize_groups,
    int8_linear_reference,
    quantize_groups,
    quantize_rows,
)

ROUTES = ("kernel", "widened")


def linear(inputs: int, outputs: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(made.weight, std=0.02)
    return made.to(dtype).requires_grad_(False)


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to multiply: oneDNN's integer product, and widened weights where it is absent."""
    if request.param == "widened":
        monkeypatch.setattr(quant, "_integer_product", lambda: False)
    elif not quant._integer_product():
        pytest.skip("this processor has no exact u8 x s8 product")
    return request.param


@given(rows=st.integers(1, 5), inputs=st.integers(1, 40), scale=st.floats(1e-6, 1e6))
@settings(max_examples=50)
def test_rows_are_rounded_by_half_a_step_at_most(rows: int, inputs: int, scale: float) -> None:
    weight = torch.randn(rows, inputs) * scale
    codes, steps = quantize_rows(weight)
    assert codes.dtype == torch.int8
    assert codes.abs().max() <= 127
    error = (codes.double() * steps.double()[:, None] - weight.double()).abs()
    assert (error <= steps.double()[:, None] * 0.5001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("bits", "floor"), [(16, None), (8, None), (8, GELU_FLOOR)])
def test_int8_equals_its_twin(route: str, dtype: torch.dtype, bias: bool, bits, floor) -> None:
    layer = linear(96, 70, bias=bias, dtype=dtype)
    rounded = Int8Linear(layer, bits=bits, floor=floor)
    assert rounded.packed == (route == "kernel")
    codes, scale = quantize_rows(layer.weight)
    for rows in (1, 3, 700):  # 700: more than are taken at once with 16 bits
        x = F.gelu(torch.randn(rows, 96) * 2).to(dtype)
        wanted = int8_linear_reference(x, codes, scale, layer.bias, bits=bits, floor=floor)
        got = rounded(x)
        assert got.dtype == dtype
        # In float32 the kernel's 16 bits are not the widened route's 24; bfloat16 rounds the result anyway.
        assert distance(got, wanted) < (1e-4 if dtype is torch.float32 else 6e-3)


def test_int8_takes_any_leading_shape_and_no_rows(route: str) -> None:
    layer = linear(32, 16)
    for bits in (8, 16):
        rounded = Int8Linear(layer, bits=bits)
        x = torch.randn(2, 3, 32)
        torch.testing.assert_close(rounded(x).view(6, 16), rounded(x.view(6, 32)))
        assert rounded(torch.empty(0, 32)).shape == (0, 16)
        assert rounded(torch.empty(2, 0, 32)).shape == (2, 0, 16)


def test_the_largest_values_do_not_saturate(route: str) -> None:
    """255 x 127 twice is more than 16 bits hold, where some processors add pairs up."""
    layer = nn.Linear(256, 4, bias=False).requires_grad_(False)
    layer.weight.fill_(1.0)
    x = torch.ones(3, 256)
    for bits, floor in ((16, None), (8, None), (8, GELU_FLOOR)):
        torch.testing.assert_close(Int8Linear(layer, bits=bits, floor=floor)(x), layer(x), rtol=1e-5, atol=0)
    torch.testing.assert_close(Int8Linear(layer, bits=8)(-x), layer(-x), rtol=1e-5, atol=0)
    assert torch.equal(x, torch.ones(3, 256))  # what is rounded is a copy


@pytest.mark.parametrize(("bits", "floor"), [(16, None), (8, None), (8, GELU_FLOOR)])
def test_float16_sums_stay_within_its_range(route: str, bits, floor) -> None:
    """900 in one channel, codes of 127: the sum of unscaled codes would be past 65,504."""
    layer = linear(896, 64, dtype=torch.float16)
    x = torch.randn(4, 896).half()
    x[:, 7] = 900
    true = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    got = Int8Linear(layer, bits=bits, floor=floor)(x)
    assert bool(got.isfinite().all())
    assert distance(got, true) < 0.05


def test_rounded_layers_are_told_apart_by_all_their_numbers() -> None:
    layer = linear(64, 64)
    for make in (Int8Linear, Int4Linear):
        sums = {make(layer).checksum}
        layer.bias.add_(3.0)
        sums.add(make(layer).checksum)
        layer.weight.mul_(2.0)
        sums.add(make(layer).checksum)
        assert len(sums) == 3


def test_rows_of_zeros_give_the_bias(route: str) -> None:
    layer = linear(64, 8)
    x = torch.zeros(2, 64)
    for bits, floor in ((16, None), (8, None)):
        torch.testing.assert_close(Int8Linear(layer, bits=bits, floor=floor)(x), layer(x))
    assert distance(Int8Linear(layer, bits=8, floor=GELU_FLOOR)(x), layer(x)) < 0.02


def test_a_row_is_rounded_by_its_own_size(route: str) -> None:
    """An outlier in one row must not cost the others their bits."""
    layer = linear(64, 32, dtype=torch.bfloat16)
    quiet = torch.randn(1, 64).bfloat16()
    loud = quiet.clone()
    loud[0, 5] = 1000.0
    rounded = Int8Linear(layer, bits=8)
    torch.testing.assert_close(rounded(torch.cat((quiet, loud)))[:1], rounded(quiet))


def test_sixteen_bits_are_as_good_as_unrounded(route: str) -> None:
    layer, x = linear(256, 64, bias=False), torch.randn(8, 256)
    codes, scale = quantize_rows(layer.weight)
    weights_only = x.double() @ (codes.double() * scale.double()[:, None]).t()
    fine = distance(Int8Linear(layer, bits=16)(x), weights_only)
    coarse = distance(Int8Linear(layer, bits=8)(x), weights_only)
    assert fine < 1e-4 < 5e-3 < coarse < 2e-2


def test_the_floor_halves_the_error_after_a_gelu(route: str) -> None:
    layer, x = linear(256, 64), F.gelu(torch.randn(64, 256) * 2)
    true = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    codes, scale = quantize_rows(layer.weight)
    weights_only = int8_linear_reference(x, codes, scale, layer.bias, bits=16)
    symmetric, floored = (Int8Linear(layer, bits=8, floor=floor)(x) for floor in (None, GELU_FLOOR))
    assert distance(floored, weights_only) < 0.65 * distance(symmetric, weights_only)
    assert distance(floored, true) < distance(symmetric, true)
    assert float(F.gelu(torch.linspace(-5, 0, 10_001)).min()) > -GELU_FLOOR
    assert float(F.gelu(torch.linspace(-5, 0, 10_001).bfloat16()).min()) >= -GELU_FLOOR


@given(group=st.sampled_from([32, 64]), spread=st.floats(0.01, 100), offset=st.floats(-5, 5))
@settings(max_examples=30)
def test_the_search_never_loses_to_the_plain_range(group: int, spread: float, offset: float) -> None:
    weight = torch.randn(4, 128) * spread + offset
    codes, scale, zero = quantize_groups(weight, group)
    assert int(codes.min()) >= 0
    assert int(codes.max()) <= 15
    low, high = torch.aminmax(weight.view(4, -1, group), dim=2)
    step = ((high - low) / 15).bfloat16().float()
    shift = ((low + high) / 2 + step / 2).bfloat16().float()
    w = weight.view(4, -1, group)
    plain = ((w - shift[..., None]) / step[..., None] + 8).round().clamp(0, 15) - 8
    plain = (plain * step[..., None] + shift[..., None] - w).square().sum()
    found = (dequantize_groups(codes, scale, zero) - weight).square().sum()
    assert found <= plain * 1.0001
    assert torch.equal(scale, scale.bfloat16().float())
    assert torch.equal(zero, zero.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inputs", "outputs", "group"), [(128, 128, 64), (96, 70, 64), (200, 130, 128)])
def test_int4_equals_its_twin(dtype: torch.dtype, inputs: int, outputs: int, group: int) -> None:
    """Also where widths are no multiples of a group or of a block of outputs."""
    layer = linear(inputs, outputs, dtype=dtype)
    rounded = Int4Linear(layer, group=group)
    padded = F.pad(layer.weight.float(), (0, -inputs % group))
    weight = dequantize_groups(*quantize_groups(padded, group))[:, :inputs]
    assert distance(rounded.dequantized(), weight) < 4e-3  # the widened weights are of bfloat16
    for rows in (1, 5, quant._FEW_ROWS, quant._FEW_ROWS + 1):
        x = torch.randn(rows, inputs).to(dtype)
        got = rounded(x)
        assert got.dtype == dtype
        assert got.shape == (rows, outputs)
        wanted = F.linear(x.double(), weight.double(), layer.bias.double())
        assert distance(got, wanted) < 6e-3
        many = rounded._many(F.pad(x, (0, rounded.fill)).bfloat16()).to(dtype) + layer.bias
        assert distance(many, wanted) < 6e-3
        assert distance(many, got) < 4e-3  # who else is answered may change last bits, and nothing else
    assert rounded(torch.empty(0, 2, inputs, dtype=dtype)).shape == (0, 2, outputs)


def test_int4_keeps_one_copy_where_the_kernel_packs_alike() -> None:
    layer = linear(128, 128, bias=False)
    rounded = Int4Linear(layer)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        quantize_groups(layer.weight, 64)[0], 1
    ).flatten()
    alike = torch.equal(theirs, rounded.packed.flatten())
    assert rounded.nbytes == 128 * 128 // 2 * (1 if alike else 2) + 128 * 2 * 4
    rounded.theirs = rounded.packed.clone().view_as(rounded.theirs)
    assert rounded.nbytes == 128 * 128 + 128 * 2 * 4


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda layer: Int8Linear(layer), 0.009),
        (lambda layer: Int8Linear(layer, bits=8), 0.013),
        (lambda layer: Int4Linear(layer, group=32), 0.081),
        (lambda layer: Int4Linear(layer, group=64), 0.091),
        (lambda layer: Int4Linear(layer, group=128), 0.099),
    ],
    ids=["int8", "w8a8", "int4-32", "int4-64", "int4-128"],
)
def test_error_on_gaussian_weights(make, most: float) -> None:
    layer, x = linear(896, 512, bias=False, dtype=torch.bfloat16), torch.randn(16, 896).bfloat16()
    true = x.double() @ layer.weight.double().t()
    assert 0.5 * most < distance(make(layer)(x), true) < most


def test_what_cannot_be_is_said() -> None:
    layer = linear(64, 64)
    with pytest.raises(ConfigError, match="groups of 32, 64, 128 or 256, not 48"):
        Int4Linear(layer, group=48)
    with pytest.raises(ConfigError, match="cannot be divided into groups of 32"):
        quantize_groups(torch.ones(2, 40), 32)
    with pytest.raises(ConfigError, match="leave it out with 16"):
        Int8Linear(layer, floor=0.1)
    for rounded in (Int8Linear(layer), Int4Linear(layer)):
        with pytest.raises(ConfigError, match="passes no gradient on"):
            rounded(torch.ones(1, 64, requires_grad=True))
        with torch.no_grad():
            rounded(torch.ones(1, 64, requires_grad=True))
        with pytest.raises(ConfigError, match="is not moved, copied, saved or trained"):
            nn.Sequential(rounded).to(torch.bfloat16)
        for spread in (
            copy.deepcopy,
            lambda module: module.__reduce_ex__(2),
            lambda module: module.state_dict(),
        ):
            with pytest.raises(ConfigError, match="load it with the dtype and device"):
                spread(rounded)
        assert "64 -> 64" in repr(rounded)
