"""Losses: chunked cross-entropy against the plain one, what it computes and what not; weights; distillation."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chiasm.errors import ConfigError
from chiasm.nn import losses
from chiasm.nn.losses import (
    IGNORE,
    cross_entropy,
    cross_entropy_reference,
    token_weights,
)


def _case(
    tokens: int, width: int, vocabulary: int, supervised: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = torch.randint(vocabulary, (tokens,))
    labels[torch.rand(tokens) >= supervised] = IGNORE
    hidden, head = torch.randn(tokens, width) * 2, torch.randn(vocabulary, width)
    return hidden.requires_grad_(), head.requires_grad_(), labels, torch.rand(tokens) + 0.1


@given(
    tokens=st.integers(0, 23),
    vocabulary=st.integers(1, 17),
    chunk=st.integers(1, 9),
    supervised=st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=60)
def test_equals_the_plain_loss_in_value_and_gradients(
    tokens: int, vocabulary: int, chunk: int, supervised: float
) -> None:
    hidden, head, labels, weight = _case(tokens, 6, vocabulary, supervised)
    results = []
    for loss_sum, weight_sum in (
        cross_entropy(hidden, head, labels, weight, chunk=chunk),
        cross_entropy_reference(hidden, head, labels, weight),
    ):
        mean = loss_sum * 0.7 / weight_sum.clamp_min(1e-3)
        results.append((loss_sum, weight_sum, *torch.autograd.grad(mean, (hidden, head))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_extreme_logits_stay_exact() -> None:
    hidden = torch.tensor([[100.0], [-100.0], [100.0]], requires_grad=True)
    head, labels, weight = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0, 1]), torch.ones(3)
    loss, _ = cross_entropy(hidden, head, labels, weight)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == pytest.approx(400.0)
    assert grad.flatten().tolist() == pytest.approx([0.0, -2.0, 2.0])


@pytest.mark.parametrize("supervised", [0.0, 0.2, 1.0])
def test_never_holds_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch, supervised: float) -> None:
    shapes: list[tuple[int, ...]] = []
    plain = losses._logits

    def recorded(hidden: Tensor, head: Tensor) -> Tensor:
        out = plain(hidden, head)
        shapes.append(tuple(out.shape))
        return out

    monkeypatch.setattr(losses, "_logits", recorded)
    hidden, head, labels, weight = _case(100, 4, 31, supervised)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = cross_entropy(hidden, head, labels, weight, chunk=8)
    loss.backward()
    rows = int((labels != IGNORE).sum())
    assert [shape[0] for shape in shapes] == [8] * (rows // 8) + ([rows % 8] if rows % 8 else [])
    assert all(shape[1] == 31 for shape in shapes)  # and none again in the backward pass
    assert max(kept) <= 100 * 4 or max(kept) == 31 * 4  # hidden-wide or the head's gradient, no logits


def test_no_head_gradient_for_a_frozen_head(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, labels, weight = _case(20, 4, 11, 0.5)
    loss, _ = cross_entropy(hidden, head.detach(), labels, weight, chunk=7)
    (frozen,) = torch.autograd.grad(loss, hidden)
    loss, _ = cross_entropy(hidden, head, labels, weight, chunk=7)
    expected = torch.autograd.grad(loss, (hidden, head))
    torch.testing.assert_close(frozen, expected[0])
    made: list[tuple[int, ...]] = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(
        losses.torch, "zeros_like", lambda t, **kw: made.append(tuple(t.shape)) or zeros_like(t, **kw)
    )
    cross_entropy(hidden, head.detach(), labels, weight)
    assert made == []
    cross_entropy(hidden, head, labels, weight)
    assert made == [(11, 4)]


def test_without_grad_nothing_is_kept() -> None:
    hidden, head, labels, weight = _case(20, 4, 11, 0.5)
    with torch.no_grad():
        loss, total = cross_entropy(hidden, head, labels, weight)
    assert not loss.requires_grad
    torch.testing.assert_close((loss, total), cross_entropy_reference(hidden, head, labels, weight))


def test_no_supervised_row_gives_zero_with_a_gradient() -> None:
    hidden, head, labels, weight = _case(5, 4, 11, 0.0)
    loss, total = cross_entropy(hidden, head, labels, weight)
    assert (loss.item(), total.item()) == (0.0, 0.0)
    loss.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    assert not hidden.grad.any()
    assert not head.grad.any()


def test_rows_of_weight_zero_do_not_count() -> None:
    hidden, head, labels, weight = _case(12, 4, 11, 1.0)
    weight[::2] = 0.0
    labels_half = labels.clone()
    labels_half[::2] = IGNORE
    torch.testing.assert_close(
        cross_entropy(hidden, head, labels, weight), cross_entropy(hidden, head, labels_half, weight)
    )


def test_half_precision_accumulates_in_fp32() -> None:
    hidden, head, labels, weight = _case(64, 32, 50, 1.0)
    exact = cross_entropy_reference(hidden, head, labels, weight)[0]
    exact_grads = torch.autograd.grad(exact, (hidden, head))
    low_hidden, low_head = (x.detach().bfloat16().requires_grad_() for x in (hidden, head))
    loss, total = cross_entropy(low_hidden, low_head, labels, weight, chunk=5)
    assert loss.dtype == total.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    for got, expected in zip(torch.autograd.grad(loss, (low_hidden, low_head)), exact_grads, strict=True):
        assert got.dtype == torch.bfloat16
        assert F.cosine_similarity(got.float().flatten(), expected.flatten(), dim=0) > 0.999


def test_autocast_equals_the_plain_loss_under_autocast() -> None:
    hidden, head, labels, weight = _case(40, 16, 20, 0.8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = cross_entropy(hidden, head, labels, weight, chunk=16)
        plain, _ = cross_entropy_reference(hidden, head, labels, weight)
    torch.testing.assert_close(loss, plain, rtol=1e-3, atol=0)
    for got, expected in zip(
        torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(plain, (hidden, head)), strict=True
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.1)


def test_chunk_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="chunk 0"):
        cross_entropy(*_case(3, 2, 5, 1.0), chunk=0)


@given(
    documents=st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=5),
    power=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_token_weights_by_hand(documents: list[list[bool]], power: float) -> None:
    labels = torch.tensor([5 if on else IGNORE for document in documents for on in document])
    docs = torch.tensor([10 * i for i, document in enumerate(documents) for _ in document])
    expected = [sum(document) ** -power if on else 0.0 for document in documents for on in document]
    weights = token_weights(labels, docs, power)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(expected)


@given(
    documents=st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=4),
    power=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_weights_by_response_by_hand(documents: list[list[bool]], power: float) -> None:
    labels = torch.tensor([5 if on else IGNORE for document in documents for on in document])
    docs = torch.tensor([10 * i for i, document in enumerate(documents) for _ in document])
    expected: list[float] = []
    for document in documents:  # a response is what lies between two rows without a label
        for on, run in itertools.groupby(document):
            rows = len(list(run))
            expected += [rows**-power if on else 0.0] * rows
    assert token_weights(labels, docs, power, "response").tolist() == pytest.approx(expected)


def test_sample_weights_of_each_document_add_up_to_one() -> None:
    labels, docs = torch.tensor([1, 1, IGNORE, 1, IGNORE]), torch.tensor([4, 4, 4, 2, 7])
    assert token_weights(labels, docs, 1.0).tolist() == [0.5, 0.5, 0.0, 1.0, 0.0]


def test_token_weights_of_an_empty_row() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert token_weights(empty, empty, 0.5).shape == (0,)


def test_token_weights_refuse_other_powers() -> None:
    labels = torch.tensor([1])
    with pytest.raises(ConfigError, match="power 2"):
        token_weights(labels, labels, 2.0)
