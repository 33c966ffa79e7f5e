"""Routed feed-forward against its masked twin; rotary tables; fused projections."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chiasm.nn.block import Routed, SwiGLU
from chiasm.nn.rope import Rope, rotate


@given(kinds=st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_gathered_experts_equal_the_masked_blend(kinds: list[int]) -> None:
    torch.manual_seed(0)
    layer = Routed(SwiGLU(6, 8), {1: SwiGLU(6, 8), 4: SwiGLU(6, 8)})
    kind = torch.tensor(kinds, dtype=torch.int8)
    grads = []
    for function in (layer, layer.blended):
        x = torch.randn(len(kinds), 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        layer.zero_grad()
        out = function(x, kind)
        out.square().sum().backward()
        grads.append(
            [out, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None and p.grad.any())]
        )
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@given(shift=st.integers(0, 500), gap=st.integers(-20, 20))
def test_rotation_depends_on_distance_only(shift: int, gap: int) -> None:
    rope = Rope(head_dim=8)
    q, k = torch.randn(1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 8, dtype=torch.float64)

    def score(a: int, b: int) -> torch.Tensor:
        tables = [rope.table(torch.tensor([float(p)]), torch.float64) for p in (a, b)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum()

    torch.testing.assert_close(score(30, 30 + gap), score(30 + shift, 30 + shift + gap), rtol=1e-4, atol=1e-4)


SCALINGS = [
    None,
    {"type": "linear", "factor": 2.0},
    {"type": "dynamic", "factor": 2.0},
    {
        "type": "su",
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 6.0],
        "original_max_position_embeddings": 8,
    },
]


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), scaling=st.sampled_from(SCALINGS))
def test_every_packed_document_has_the_table_of_its_own_length(lengths: list[int], scaling: dict) -> None:
    rope = Rope(head_dim=4, scaling=scaling, max_positions=16)
    positions = [torch.arange(n, dtype=torch.float32) for n in lengths]
    packed = rope.table(torch.cat(positions), torch.float32, lengths)
    alone = [rope.table(p, torch.float32) for p in positions]
    for together, parts in zip(packed, zip(*alone, strict=True), strict=True):
        assert torch.equal(together, torch.cat(parts))


def test_longrope_changes_sides_after_the_original_length() -> None:
    rope = Rope(head_dim=4, scaling=SCALINGS[3], max_positions=64)
    assert (rope.kind, rope.switch) == ("longrope", 8)
    near, far = rope.inverse_frequencies(8), rope.inverse_frequencies(9)
    torch.testing.assert_close(near / far, torch.tensor([2.0, 4.0]))
    assert rope.attention_factor == pytest.approx((1 + math.log(8) / math.log(8)) ** 0.5)
    cos, _ = rope.table(torch.zeros(1), torch.float32)
    assert float(cos[0, 0, 0]) == pytest.approx(rope.attention_factor)
