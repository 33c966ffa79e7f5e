"""Choosing a token: against transformers' logits processors, and the promises of seeds and limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import ConfigError
from chiasm.nn.sampling import Sampling, choose, keep_top_k, keep_top_p, penalize_repetition

logits = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=20).map(
    lambda x: torch.tensor(x, dtype=torch.float32)
)


@given(row=logits, k=st.integers(0, 25))
def test_top_k_keeps_the_k_largest(row: torch.Tensor, k: int) -> None:
    kept = torch.isfinite(keep_top_k(row, k))
    if k == 0 or k >= len(row):
        assert kept.all()
    else:
        assert int(kept.sum()) >= k
        assert row[kept].min() >= row[~kept].max() if (~kept).any() else True


@given(row=logits, p=st.floats(0.05, 1.0))
def test_top_p_keeps_the_smallest_sufficient_set(row: torch.Tensor, p: float) -> None:
    kept = torch.isfinite(keep_top_p(row, p))
    probability = row.double().softmax(-1)
    assert float(probability[kept].sum()) >= p - 1e-6
    if kept.sum() > 1 and p < 1:  # without its least likely member the set would not suffice
        assert float(probability[kept].sum() - probability[kept].min()) < p + 1e-6


def test_equal_to_transformers_processors() -> None:
    from transformers.generation import logits_process as processors

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        row = 3 * torch.randn(40, generator=generator)
        seen = torch.randint(0, 40, (6,), generator=generator).unique()
        expected = processors.RepetitionPenaltyLogitsProcessor(1.3)(seen[None], row[None].clone())[0]
        torch.testing.assert_close(penalize_repetition(row, seen, 1.3), expected)
        expected = processors.TopKLogitsWarper(7)(seen[None], row[None].clone())[0]
        torch.testing.assert_close(keep_top_k(row, 7), expected)
        expected = processors.TopPLogitsWarper(0.8)(seen[None], row[None].clone())[0]
        assert torch.equal(torch.isfinite(keep_top_p(row, 0.8)), torch.isfinite(expected))


def test_draws_follow_the_distribution_and_the_seed() -> None:
    row = torch.tensor([1.0, 0.0, -1.0, 3.0])
    sampling = Sampling(temperature=1.5, top_k=3)
    generator, nothing = torch.Generator().manual_seed(1), torch.empty(0, dtype=torch.int64)
    drawn = torch.tensor([choose(row, sampling, nothing, generator) for _ in range(4000)])
    expected = keep_top_k(row / 1.5, 3).softmax(-1)
    assert torch.allclose(drawn.bincount(minlength=4) / 4000, expected, atol=0.03)
    again = torch.Generator().manual_seed(1)
    assert [choose(row, sampling, nothing, again) for _ in range(20)] == drawn[:20].tolist()
    assert choose(row, Sampling(), nothing, generator) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)
