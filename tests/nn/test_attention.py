"""The attention seam: the split fast path and the cache against one dense mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import ConfigError
from chiasm.nn.attention import KVCache, Segments, attend, attend_reference


def rows(T: int, heads: int, seed: int, dim: int = 8) -> torch.Tensor:
    return torch.randn(T, heads, dim, generator=torch.Generator().manual_seed(seed))


def documents(lengths: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    groups=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    causal=st.booleans(),
)
def test_documents_are_isolated(lengths: list[int], groups: tuple[int, int], causal: bool) -> None:
    T, (H, G) = sum(lengths), groups
    q, k, v = rows(T, H, 0), rows(T, G, 1), rows(T, G, 2)
    doc = documents(lengths)
    got = attend(q, k, v, Segments.from_docs(doc), causal=causal)
    torch.testing.assert_close(got, attend_reference(q, k, v, doc, causal=causal), rtol=1e-5, atol=1e-6)


@given(
    plan=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=5),
    capacity=st.sampled_from([0, 3, 100]),
)
def test_cached_in_any_pieces_equals_at_once(plan: list[list[int]], capacity: int) -> None:
    """Three documents grow by any numbers of tokens in any rounds; a document may sit a round out."""
    H, G = 4, 2
    totals = [sum(round_[d] for round_ in plan) for d in range(3)]
    data = [(rows(n, H, 10 + d), rows(n, G, 20 + d), rows(n, G, 30 + d)) for d, n in enumerate(totals)]
    cache = KVCache(1, 3, capacity=capacity)
    got: list[list[torch.Tensor]] = [[], [], []]
    at = [0, 0, 0]
    for round_ in plan:
        live = [d for d in range(3) if round_[d]]
        if not live:
            continue
        pieces = [[x[d][at[d] : at[d] + round_[d]] for d in live] for x in zip(*data, strict=True)]
        q, k, v = (torch.cat(p) for p in pieces)
        segments = Segments.of([round_[d] for d in live], live)
        out = attend(q, k, v, segments, cache=cache)
        cache.advance(segments)
        for d, piece in zip(live, out.split(segments.lengths), strict=True):
            got[d].append(piece)
            at[d] += round_[d]
    assert cache.lengths == totals
    for d, n in enumerate(totals):
        if n:
            expected = attend_reference(*data[d], torch.zeros(n))
            torch.testing.assert_close(torch.cat(got[d]), expected, rtol=1e-5, atol=1e-6)


def test_rows_that_nobody_wrote_are_zero() -> None:
    """A NaN in fresh memory would reach a shorter neighbour in spite of its mask, at the first and any later growth."""
    cache = KVCache(1, 2)
    poison = torch.full((4096, 2, 8), float("nan"))
    del poison  # likely to be the memory that the cache gets
    for n in (5, 200):
        segments = Segments.of([n, 1])
        attend(rows(n + 1, 2, 0), rows(n + 1, 2, 1), rows(n + 1, 2, 2), segments, cache=cache)
        cache.advance(segments)
        for buffer in (cache._k[0], cache._v[0]):
            assert not buffer[0, :, cache.lengths[0] :].any()
            assert not buffer[1, :, cache.lengths[1] :].any()


def test_keep_drops_documents() -> None:
    cache = KVCache(1, 3)
    x = rows(6, 2, 0)
    segments = Segments.of([1, 2, 3])
    attend(x, x, x, segments, cache=cache)
    cache.advance(segments)
    third = cache._k[0][2, :, :3].clone()
    cache.keep([2, 0])
    assert cache.lengths == [3, 1]
    assert torch.equal(cache._k[0][0, :, :3], third)


def test_gradients_equal_the_dense_mask() -> None:
    doc = documents([3, 5, 2])
    grads = []
    for function in (
        lambda q, k, v: attend(q, k, v, Segments.from_docs(doc)),
        lambda *x: attend_reference(*x, doc),
    ):
        leaves = [rows(10, h, i).requires_grad_() for i, h in enumerate((4, 2, 2))]
        function(*leaves).square().sum().backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[6, 6, 6], [5, 7, 6, 4], [1, 9, 2]], ids=["equal", "filled up", "split"])
def test_bf16_training_path_equals_the_dense_mask(lengths: list[int]) -> None:
    doc = documents(lengths)
    T = len(doc)
    results = []
    for function in (
        lambda q, k, v: attend(q, k, v, Segments.from_docs(doc)),
        lambda *x: attend_reference(*x, doc),
    ):
        leaves = [rows(T, h, i).bfloat16().requires_grad_() for i, h in enumerate((4, 2, 2))]
        out = function(*leaves)
        out.float().square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_wrong_calls_say_what_is_wrong() -> None:
    x = rows(4, 2, 0)
    with pytest.raises(ConfigError, match="cover 3 tokens but the row has 4"):
        attend(x, x, x, Segments.of([3]))
    with pytest.raises(ConfigError, match="causal"):
        attend(x, x, x, Segments.of([4]), cache=KVCache(1), causal=False)
    with pytest.raises(ConfigError, match="contiguous"):
        Segments.from_docs(torch.tensor([0, 1, 0]))
    with pytest.raises(ConfigError, match="empty"):
        Segments.of([2, 0])
