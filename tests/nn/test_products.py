"""One-row products: the same numbers as oneDNN's up to rounding, and a switch that always comes back."""

import threading

import pytest
import torch
import torch.nn.functional as F

from chiasm.nn.products import single_row_products


def enabled() -> bool:
    return torch.backends.mkldnn.enabled


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(96, 32), (200, 333), (1152, 896)])
def test_equals_the_ordinary_product(rows: int, columns: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x_1C = torch.randn(1, columns, generator=generator).bfloat16()
    weight_DC = torch.randn(rows, columns, generator=generator).bfloat16()
    bias_D = torch.randn(rows, generator=generator).bfloat16() if bias else None
    exact = F.linear(x_1C.double(), weight_DC.double(), None if bias_D is None else bias_D.double())
    with single_row_products():
        fast = F.linear(x_1C, weight_DC, bias_D)
    slow = F.linear(x_1C, weight_DC, bias_D)
    assert fast.dtype == torch.bfloat16
    for found in (
        fast,
        slow,
    ):  # one rounding to 8 bits of the result, and of what the sum was before the bias
        assert float((found.double() - exact).abs().max()) <= 2**-7 * float(exact.abs().max())
    error = (fast.double() - exact).square().mean().sqrt()
    assert error <= 1.1 * (slow.double() - exact).square().mean().sqrt()


def test_the_switch_comes_back() -> None:
    assert enabled()
    with single_row_products(), single_row_products():
        assert not enabled()
    assert enabled()
    with pytest.raises(ZeroDivisionError), single_row_products():
        _ = 1 / 0
    assert enabled()
    with single_row_products(False):
        assert enabled()


def test_whoever_had_it_off_keeps_it_off() -> None:
    torch.backends.mkldnn.enabled = False
    try:
        with single_row_products():
            assert not enabled()
        assert not enabled()
    finally:
        torch.backends.mkldnn.enabled = True


def test_overlapping_threads_restore_it() -> None:
    """The first to enter is the first to leave: only the last one may switch back."""
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        entered.wait(10)
        with single_row_products():
            left.wait(10)
            assert not enabled()

    thread = threading.Thread(target=other)
    thread.start()
    with single_row_products():
        entered.set()
        while not _holders(2):
            pass
    assert not enabled()
    left.set()
    thread.join(10)
    assert not thread.is_alive()
    assert enabled()


def _holders(count: int) -> bool:
    from chiasm.nn import products

    return products._Switch.holders == count
