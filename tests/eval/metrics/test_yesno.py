"""POPE, MME, HallusionBench."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.eval.metrics.yesno import all_right, binary_f1, mme_scores, parse_yes_no, parse_yes_no_mme


@pytest.mark.parametrize(
    ("reply", "ours", "pope"),
    [
        ("Yes", "yes", "yes"),
        ("no.", "no", "no"),
        ("No, there is not. Yes.", "no", "no"),  # the first sentence
        ("Yes, there is no doubt", "yes", "no"),  # what stands in front decides; there any "no" does
        ("There isn't one", "no", "yes"),  # a clitic denies; there it is not seen
        ("There is not", "no", "no"),
        ("NO", "no", "yes"),  # there only three spellings are
        ("", None, "yes"),  # silence is "yes" there
        ("A dog", None, "yes"),
        ("Let me see.\nFinal answer: no", "no", "yes"),
    ],
)
def test_yes_or_no(reply, ours, pope):
    assert parse_yes_no(reply) == ours
    assert parse_yes_no(reply, mode="original") == pope


def test_mme_looks_at_four_characters():
    assert [parse_yes_no_mme(t) for t in ("Yes!", " no", "It is yes", "none")] == ["yes", "no", None, "no"]


def test_f1_by_hand():
    # Two of three "yes" found, one false alarm: precision 2/3, recall 2/3.
    predicted, labels = ["yes", "yes", "no", "yes", "no"], ["yes", "yes", "yes", "no", "no"]
    found = binary_f1(predicted, labels)
    assert found["precision"] == found["recall"] == found["f1"] == pytest.approx(2 / 3)
    assert (found["accuracy"], found["yes_ratio"]) == (0.6, 0.6)


def test_f1_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    predicted, labels = (rng.choice(["yes", "no"], 200).tolist() for _ in range(2))
    weights = rng.integers(0, 4, 200)
    ours = binary_f1(predicted, labels, weights)["f1"]
    assert ours == pytest.approx(sklearn.f1_score(labels, predicted, pos_label="yes", sample_weight=weights))


def test_unparsed_is_a_miss_either_way():
    found = binary_f1([None, None], ["yes", "no"])
    assert (found["accuracy"], found["f1"], found["yes_ratio"]) == (0.0, 0.0, 0.0)
    assert binary_f1(["yes", None], ["yes", "no"])["precision"] == 0.5  # a false alarm


def test_mme_points():
    # Two pictures of a task: both questions of the first right, one of the second: 75 + 50.
    scores = mme_scores([1, 1, 1, 0], ["p", "p", "q", "q"], ["existence"] * 4)
    assert scores["existence"] == scores["perception"] == scores["total"] == pytest.approx(125.0)
    both = mme_scores(
        [1, 1, 1, 1], ["p", "p", "q", "q"], ["count", "count", "code_reasoning", "code_reasoning"]
    )
    assert (both["perception"], both["cognition"], both["total"]) == (200.0, 200.0, 400.0)


def test_groups_count_with_their_weight():
    assert all_right([1, 1, 1, 0], ["a", "a", "b", "b"]) == 0.5
    assert all_right([1, 1, 1, 0], ["a", "a", "b", "b"], np.array([2.0, 2.0, 1.0, 1.0])) == pytest.approx(
        2 / 3
    )
    assert all_right([1], ["a"], np.array([0.0])) == 0.0


@given(st.text(max_size=60))
def test_never_raises(reply):
    assert parse_yes_no(reply) in ("yes", "no", None)
    assert parse_yes_no(reply, mode="original") in ("yes", "no")
    assert parse_yes_no_mme(reply) in ("yes", "no", None)
