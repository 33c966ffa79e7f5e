"""Attention over time: batched = one by one, frame by frame = at once, and what a window may see."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.errors import ConfigError
from chiasm.nn import temporal
from chiasm.nn.temporal import TemporalAttention, TemporalPast, TimeEmbedding, modulated, sees, sinusoid


def attention(seed: int = 0, **facts) -> TemporalAttention:
    torch.manual_seed(seed)
    return TemporalAttention(12, 3, **facts).double()


def frames(count: int, tokens: int = 4, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, tokens, 12, dtype=torch.float64, generator=generator)


def close(got: torch.Tensor, expected: torch.Tensor, limit: float = 1e-10) -> None:
    got, expected = got.detach(), expected.detach()
    assert got.shape == expected.shape
    assert float((got - expected).abs().max() / expected.abs().max()) <= limit


@pytest.mark.parametrize("facts", [{}, {"inner": 6}, {"qk_norm": True, "qkv_bias": False}])
@pytest.mark.parametrize("lengths", [(5,), (1, 1, 1), (2, 2, 2), (3, 1, 3, 2, 1)])
def test_sequences_together_are_sequences_apart(lengths, facts) -> None:
    module, x = attention(**facts), frames(sum(lengths))
    close(module(x, lengths), module.forward_reference(x, lengths))


def test_no_call_of_attention_has_more_sequences_than_a_kernel_takes(monkeypatch) -> None:
    monkeypatch.setattr(temporal, "_BATCH", 4)
    sizes, real = [], torch.nn.functional.scaled_dot_product_attention

    def counted(q, k, v, **options):
        sizes.append(len(q))
        return real(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    module, x, past = attention(), frames(6, 3), TemporalPast(3)
    close(module(x, (3, 3)), module.forward_reference(x, (3, 3)))
    streamed = torch.cat([module.step(x[n : n + 2], past) for n in (0, 2, 4)])
    both = [module.forward_reference(x[n::2], (3,)) for n in (0, 1)]
    close(streamed, torch.stack(both, dim=1).flatten(0, 1))
    assert max(sizes) == 4
    assert len(sizes) > 4


def test_the_fast_way_has_the_gradients_of_the_slow_one() -> None:
    lengths, gradients = (2, 1, 2, 3), []
    for name in ("forward", "forward_reference"):
        module, x = attention(), frames(8).requires_grad_()
        getattr(module, name)(x, lengths).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in module.parameters())])
    for got, expected in zip(*gradients, strict=True):
        close(got, expected)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 12), window=st.integers(1, 6), sink=st.integers(0, 3))
def test_frame_by_frame_is_a_band_with_a_sink(count, window, sink) -> None:
    module, x, past = attention(), frames(count), TemporalPast(window, sink)
    streamed = torch.cat([module.step(x[n : n + 1], past) for n in range(count)])
    close(streamed, module.forward_reference(x, (count,), window=window, sink=sink))
    assert past.frames == count


def test_what_a_window_sees() -> None:
    band = sees(6, window=2, sink=1)
    assert band[5].tolist() == [True, False, False, False, True, True]
    assert band[0].tolist() == [True] + [False] * 5
    assert torch.equal(sees(4), torch.ones(4, 4, dtype=torch.bool).tril())
    assert torch.equal(sees(4, window=4), sees(4))


def test_the_memory_of_a_past_does_not_grow() -> None:
    module, past = attention(), TemporalPast(3, 1)
    module.step(frames(1), past)
    assert past._k is not None
    where = past._k.data_ptr()
    for n in range(20):
        module.step(frames(1, seed=n), past)
    assert past._k.data_ptr() == where
    assert past._k.shape == (4, 3, 4, 4)


def test_sinusoids_are_those_of_their_definition() -> None:
    got = sinusoid(torch.tensor([0.0, 2.5]), 6, period=100.0)
    for row, t in zip(got, (0.0, 2.5), strict=True):
        waves = [t * 100.0 ** (-k / 3) for k in range(3)]
        expected = [*map(math.cos, waves), *map(math.sin, waves)]
        assert row.tolist() == pytest.approx(expected, abs=1e-12)


def test_a_modulation_of_nothing_is_the_norm() -> None:
    norm, x = torch.nn.LayerNorm(12).double(), frames(3)
    nothing = torch.zeros(3, 2, 12, dtype=torch.float64)
    assert torch.equal(modulated(norm, x, nothing, torch.float64), norm(x))
    change = torch.randn(3, 2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = norm(x) * (1 + change[:, :1]) + change[:, 1:]
    close(modulated(norm, x, change, torch.float64), expected)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: TemporalAttention(12, 5), "no multiple of its 5 heads"),
        (lambda: TemporalPast(0), "a window of 0 frames"),
        (lambda: TimeEmbedding(5, 4), "5 sinusoids"),
        (lambda: TimeEmbedding(4, 4, act="tanh"), "'tanh' is unknown"),
        (lambda: sinusoid(torch.zeros(1), 3), "even width"),
        (lambda: attention()(frames(3), (2, 2)), "4 frames in all, but there are 3"),
    ],
)
def test_what_cannot_be_is_said(call, said) -> None:
    with pytest.raises(ConfigError, match=said):
        call()


def test_a_past_of_other_tiles_is_refused() -> None:
    module, past = attention(), TemporalPast(3)
    module.step(frames(1), past)
    with pytest.raises(ConfigError, match="one number of tiles"):
        module.step(frames(2), past)
