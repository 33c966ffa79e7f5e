"""Standard errors where questions share a picture."""

import numpy as np
import pytest

from chiasm.errors import DataError
from chiasm.eval.intervals import cluster_bootstrap, cluster_draws, clustered_mean, share_interval, wilson
from chiasm.eval.metrics.yesno import all_right, binary_f1, mme_scores
from chiasm.eval.summary import STATISTICS, Row, summarise

VALUES = np.random.default_rng(0).integers(0, 2, 200).astype(float)


def test_clusters_of_one_give_the_textbook_error():
    mean, error, clusters = clustered_mean(VALUES, range(200))
    assert (mean, clusters) == (VALUES.mean(), 200)
    assert error == pytest.approx(VALUES.std(ddof=1) / np.sqrt(200))


def test_asking_everything_twice_proves_nothing_new():
    twice = np.repeat(VALUES, 2)
    _, once, _ = clustered_mean(VALUES, range(200))
    _, error, _ = clustered_mean(twice, np.repeat(np.arange(200), 2).tolist())
    assert error == pytest.approx(once)
    _, naive, _ = clustered_mean(twice, range(400))
    assert naive is not None
    assert naive < 0.75 * once


def test_bootstrap_agrees_with_the_formula():
    groups = (np.arange(200) // 4).tolist()
    _, error, _ = clustered_mean(VALUES, groups)
    found = cluster_bootstrap(lambda w: {"mean": float((w * VALUES).sum() / w.sum())}, groups, resamples=2000)
    assert found["mean"][0] == pytest.approx(error, rel=0.1)
    assert found == cluster_bootstrap(
        lambda w: {"mean": float((w * VALUES).sum() / w.sum())}, groups, resamples=2000
    )
    draw = cluster_draws(groups, resamples=1)[0]
    assert draw.sum() == 200
    assert all(len(set(draw[n : n + 4])) == 1 for n in range(0, 200, 4))  # whole clusters


def test_share_interval_is_wilsons_for_single_questions():
    right = int(VALUES.sum())
    _, error, _ = clustered_mean(VALUES, range(200))
    # The textbook error divides by n - 1: the interval is a hair wider.
    assert share_interval(right / 200, error, 200) == pytest.approx(wilson(right, 200), abs=1e-3)
    assert share_interval(1.0, 0.0, 12) == pytest.approx(wilson(12, 12))
    low, high = share_interval(0.5, None, 1)
    assert 0 < low < 0.5 < high < 1


def test_one_picture_says_nothing():
    assert clustered_mean([1.0, 0.0], ["a", "a"])[1] is None
    with pytest.raises(DataError, match="one picture"):
        cluster_bootstrap(lambda w: {"x": 0.0}, ["a", "a"])
    with pytest.raises(DataError, match="3 groups"):
        clustered_mean([1.0], [1, 2, 3])


def rows(grades, categories=None, groups=None):
    return [
        Row(
            key=str(n),
            group=(groups or range(len(grades)))[n].__str__(),
            grade=g,
            category=(categories or [""] * 99)[n],
        )
        for n, g in enumerate(grades)
    ]


def test_means_of_categories():
    found = summarise(rows([1, 1, 0, 1], ["human", "human", "human", "augmented"]), "by_category")
    assert found["mean of categories"].value == pytest.approx((2 / 3 + 1) / 2)
    assert list(found) == ["mean of categories", "human", "augmented"]
    plain = summarise(rows([1, 1, 0, 1], ["human", "human", "human", "augmented"]))
    assert plain["accuracy"].value == 0.75
    assert plain["human"].n == 3
    with pytest.raises(DataError, match="unknown"):
        summarise(rows([1]), "median")
    with pytest.raises(DataError, match="nothing"):
        summarise([])


def test_a_question_may_be_of_several_categories():
    both = [
        Row(key=str(n), group=str(n), grade=1, category=kind, value="yes", label=label)
        for n, (kind, label) in enumerate([("random,popular", "yes"), ("popular", "no")])
    ]
    found = summarise(both, "f1")
    assert (found["f1 random"].value, found["f1 popular"].value) == (1.0, pytest.approx(2 / 3))
    assert found["f1"].value == pytest.approx(5 / 6)


def test_circles_and_hallusion():
    four = [
        Row(key=str(n), group="p", grade=g, units={"circle": c, "figure": "f", "question": str(n)})
        for n, (g, c) in enumerate([(1, "a"), (1, "a"), (1, "b"), (0, "b")])
    ]
    circular = summarise(four, "circular")
    assert (circular["circular"].value, circular["vanilla"].value) == (0.5, 0.75)
    assert circular["circular"].error is None  # one picture
    three = summarise(four, "hallusion")
    assert [three[name].value for name in ("aAcc", "fAcc", "qAcc")] == [0.75, 0.0, 0.75]


def test_statistics_equal_their_slow_twins_under_any_weights():
    rng = np.random.default_rng(1)
    n = 60
    labels, values = (rng.choice(["yes", "no"], n).tolist() for _ in range(2))
    values[::7] = [None] * len(values[::7])
    many = [
        Row(
            key=str(i),
            group=f"p{i // 2}",
            grade=float(values[i] == labels[i]),
            category=["count", "code_reasoning"][i // 30],
            value=values[i],
            label=labels[i],
            units={"figure": f"f{i // 3}", "question": f"q{i % 9}", "circle": f"c{i // 4}"},
        )
        for i in range(n)
    ]
    grades, groups = [row.grade for row in many], [row.group for row in many]
    tasks = [row.category for row in many]
    for weights in [np.ones(n), *cluster_draws(groups, resamples=5)]:
        f1 = STATISTICS["f1"](many)(weights)
        parts = [binary_f1(values[a:b], labels[a:b], weights[a:b])["f1"] for a, b in ((0, 30), (30, 60))]
        assert f1["f1"] == pytest.approx(np.mean(parts))
        whole = binary_f1(values, labels, weights)
        assert {k: f1[k] for k in whole if k != "f1"} == pytest.approx(
            {k: v for k, v in whole.items() if k != "f1"}
        )
        assert STATISTICS["mme"](many)(weights) == pytest.approx(mme_scores(grades, groups, tasks, weights))
        hallusion = STATISTICS["hallusion"](many)(weights)
        for name, unit in (("fAcc", "figure"), ("qAcc", "question")):
            assert hallusion[name] == pytest.approx(all_right(grades, [r.units[unit] for r in many], weights))
        circular = STATISTICS["circular"](many)(weights)["circular"]
        assert circular == pytest.approx(all_right(grades, [r.units["circle"] for r in many], weights))
