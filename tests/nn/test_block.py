"""Routed feed-forward against its masked twin; rotary tables; fused projections."""

from __future__ import annotations

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
