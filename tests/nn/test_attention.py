"""The attention seam: the split fast path and the cache against one dense mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import ConfigError
from chiasm.nn.attention import APART, KVCache, Segments, _longest_together, attend, attend_reference


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


@given(
    pasts=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    news=st.lists(st.sampled_from([0, 1, 1, 1, 4]), min_size=9, max_size=9),
    order=st.permutations(range(9)),
    far=st.booleans(),
    growing=st.booleans(),
)
def test_a_mixed_pass_equals_one_document_after_the_other(
    pasts: list[int], news: list[int], order: list[int], far: bool, growing: bool
) -> None:
    """Documents of one row and of several, in any slots, some of them idle: one pass against one pass for each."""
    slots = [d for d in order if d < len(pasts)]
    live = [d for d in slots if news[d]]
    if not live:
        return
    if far:  # one past so long that it is read apart
        pasts = [pasts[0] + 12 * APART, *pasts[1:]]
    H, G = 4, 2
    caches = [KVCache(2, 9, capacity=0 if growing else 13 * APART) for _ in range(2)]
    for cache in caches:
        for d, n in enumerate(pasts):
            if n:
                segments = Segments.of([n], [d])
                for layer in range(2):
                    cache.write(layer, rows(n, G, 10 + d + layer), rows(n, G, 20 + d + layer), segments)
                cache.advance(segments)
    together, apart = caches
    segments = Segments.of([news[d] for d in live], live)
    T = segments.total
    got, expected = [], [[], []]
    for layer in range(2):
        q, k, v = rows(T, H, 1 + layer), rows(T, G, 3 + layer), rows(T, G, 5 + layer)
        got.append(attend(q, k, v, segments, cache=together, layer=layer))
        for start, n, d in zip(segments.starts, segments.lengths, live, strict=True):
            piece = (x[start : start + n] for x in (q, k, v))
            expected[layer].append(attend(*piece, Segments.of([n], [d]), cache=apart, layer=layer))
    together.advance(segments)
    apart.advance(segments)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, torch.cat(b), rtol=1e-5, atol=1e-6)
    assert together.lengths == apart.lengths
    for a, b in zip([*together._k, *together._v], [*apart._k, *apart._v], strict=True):
        assert a is not None
        assert b is not None
        shared = min(a.shape[2], b.shape[2])
        assert torch.equal(a[:, :, :shared], b[:, :, :shared])


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=12))
def test_long_pasts_are_read_apart_where_that_reads_less(lengths: list[int]) -> None:
    def cost(limit: int) -> int:
        together = [n for n in lengths if n <= limit]
        apart = [n for n in lengths if n > limit]
        return len(together) * max(together, default=0) + sum(n + APART for n in apart)

    chosen = _longest_together(lengths, APART)
    assert chosen in lengths
    assert cost(chosen) == min(cost(limit) for limit in lengths)


def test_layers_may_lie_on_several_devices() -> None:
    """The meta device stands for a second one: it refuses indices and masks of another as any would."""
    cache = KVCache(2, 5)
    for lengths, slots in (
        ([2, 3, 1, 1], [0, 1, 2, 4]),
        ([1, 1, 1, 2], [4, 0, 2, 1]),
        ([1, 1, 1], [1, 0, 4]),
    ):
        segments = Segments.of(lengths, slots)
        for layer, device in enumerate(("cpu", "meta")):
            x = rows(segments.total, 2, 0).to(device)
            assert attend(x, x, x, segments, cache=cache, layer=layer).device.type == device
        cache.advance(segments)
    assert cache.lengths == [4, 6, 2, 0, 3]


def test_a_view_is_the_same_memory() -> None:
    cache, x = KVCache(1, 3), rows(5, 2, 0)
    segments = Segments.of([2, 3], [0, 2])
    attend(x, x, x, segments, cache=cache)
    cache.advance(segments)
    view = cache.view([2, 0])
    assert view.lengths == [3, 2]
    more = Segments.of([1, 1])
    y = rows(2, 2, 1)
    assert view.past(more) == (3, 2)
    got = attend(y, y, y, more, cache=view)
    view.advance(more)
    assert cache.lengths == [3, 0, 4]
    whole = torch.cat([x[2:], y[:1]])
    expected = attend_reference(whole, whole, whole, torch.zeros(4))[-1]
    torch.testing.assert_close(got[0], expected, rtol=1e-5, atol=1e-6)
    assert cache.view([0, 1, 2]) is cache


def test_a_past_is_taken_and_put() -> None:
    cache, x = KVCache(2, 2), rows(6, 2, 0)
    segments = Segments.of([6], [1])
    for layer in range(2):
        attend(x, x, x, segments, cache=cache, layer=layer)
    cache.advance(segments)
    saved = cache.take(1)
    other = KVCache(2, 3)
    other.put(2, saved, 4)
    assert other.lengths == [0, 0, 4]
    rest = Segments.of([2], [2])
    for layer in range(2):
        got = attend(x[4:], x[4:], x[4:], rest, cache=other, layer=layer)
        expected = attend_reference(x, x, x, torch.zeros(6))[4:]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    saved[0][0].zero_()  # a copy on both ways
    assert other._k[0][2, :, :4].any()
    cache.restart(1)
    assert cache.lengths == [0, 0]
    assert not any(b.any() for b in (*cache._k, *cache._v))


def test_a_bound_ends_the_doubling() -> None:
    cache, x = KVCache(1, 1, capacity=70), rows(70, 2, 0)
    cache.bound = 90
    for piece in (x, x[:1]):
        segments = Segments.of([len(piece)])
        attend(piece, piece, piece, segments, cache=cache)
        cache.advance(segments)
    assert cache._k[0].shape[2] == cache.capacity == 90


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
    cache.resize([2, 0], 2)
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
