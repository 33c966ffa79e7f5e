"""The stateless mixture: pure, covering, in the right shares."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.data.mixture import Mixture, derive_seed, generator
from chiasm.errors import ConfigError

MIXTURES = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(st.integers(1, 40), st.floats(0.01, 10)), min_size=1
)


def make(families, batch, seed):
    sizes = {name: size for name, (size, _) in families.items()}
    return Mixture(sizes, {name: weight for name, (_, weight) in families.items()}, batch=batch, seed=seed)


@settings(max_examples=40)
@given(MIXTURES, st.integers(1, 17), st.integers(0, 5), st.lists(st.integers(0, 300), min_size=1, max_size=8))
def test_a_step_does_not_depend_on_what_was_asked_before(families, batch, seed, steps):
    asked = make(families, batch, seed)
    for step in steps:
        assert asked.batch_indices(step) == make(families, batch, seed).batch_indices(step)


@settings(max_examples=40)
@given(MIXTURES, st.integers(1, 17), st.integers(0, 5))
def test_each_epoch_of_a_family_reads_every_sample_once(families, batch, seed):
    mixture = make(families, batch, seed)
    seen = {name: [] for name in families}
    for step in range(600 // batch):
        for name, index in mixture.batch_indices(step):
            seen[name].append(index)
    for name, (size, _) in families.items():
        for start in range(0, len(seen[name]) - size + 1, size):
            assert sorted(seen[name][start : start + size]) == list(range(size))


@settings(max_examples=30)
@given(MIXTURES, st.integers(1, 30))
def test_shares_follow_the_weights_at_every_prefix(families, batch):
    mixture = make(families, batch, 0)
    total = sum(weight for _, weight in families.values())
    counts = Counter()
    for step in range(40):
        counts.update(name for name, _ in mixture.batch_indices(step))
        for name, (_, weight) in families.items():
            share = max(weight / total, 1e-3)
            drawn = (step + 1) * batch
            # Rounding of the pattern (1/1000 per family) plus the spread of a smooth round robin.
            assert abs(counts[name] - drawn * share) <= len(families) + drawn * 2e-3 * len(families)


def test_batches_do_not_depend_on_their_size():
    by_one, by_four = (make({"a": (10, 1.0), "b": (7, 2.0)}, batch, 3) for batch in (1, 4))
    assert [d for s in range(8) for d in by_one.batch_indices(s)] == [
        d for s in range(2) for d in by_four.batch_indices(s)
    ]


def test_epochs_are_shuffled_differently_and_by_seed():
    orders = [
        [i for _, i in make({"a": (50, 1.0)}, 50, seed).batch_indices(epoch)]
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_a_family_without_weight_may_be_empty():
    mixture = Mixture({"a": 3}, {"a": 1.0, "cifar10": 0.0}, batch=3, seed=0)
    assert {name for name, _ in mixture.batch_indices(0)} == {"a"}
    assert mixture.epochs(2) == {"a": 2.0}


@pytest.mark.parametrize(
    ("sizes", "weights", "batch"),
    [({"a": 0}, {"a": 1.0}, 1), ({}, {"a": 1.0}, 1), ({"a": 3}, {}, 1), ({"a": 3}, {"a": 1}, 0)],
)
def test_impossible_mixtures_are_refused(sizes, weights, batch):
    with pytest.raises(ConfigError):
        Mixture(sizes, weights, batch=batch, seed=0)


def test_seeds_are_separate_by_purpose():
    seeds = {
        derive_seed(0, "augment", 1),
        derive_seed(0, "step", 1),
        derive_seed(1, "augment", 1),
        derive_seed(0, "augment", 2),
    }
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert np.array_equal(generator(1, "x").get_state().numpy(), generator(1, "x").get_state().numpy())
