"""Voting: ties, unparsed ballots, unbiasedness, seeds, cost, resuming; with a real queue and without."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import ConfigError, DataError
from chiasm.eval.store import Store
from chiasm.eval.vote import majority, sample_answers, vote_at, vote_curve
from chiasm.model.chat import Reply
from tiny_chat import ask, picture, tiny_chat

BALLOTS = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("ballots", "winner"),
    [
        (["a", "b", "b"], 1),
        (["a", "b"], 0),  # a tie: who was first
        (["b", "a", "a", "b"], 0),
        ([None, None, "c"], 2),  # unparsed answers do not vote
        ([None], None),
        ([], None),
    ],
)
def test_majority(ballots, winner):
    assert majority(ballots) == winner


def brute(ballots, grades, k):
    found = []
    for picked in itertools.combinations(range(len(ballots)), k):
        counts = {}
        for i in picked:
            if ballots[i] is not None:
                counts.setdefault(ballots[i], []).append(i)
        best = max(counts.values(), key=lambda at: (len(at), -at[0]), default=None)
        found.append(0.0 if best is None else grades[best[0]])
    return float(np.mean(found))


@given(BALLOTS, st.data())
def test_vote_at_is_the_mean_over_subsets(ballots, data):
    # Grades may differ within one ballot ("1.0" and "1" of a list): the winner's first sample counts.
    grades = data.draw(st.lists(st.floats(0, 1), min_size=len(ballots), max_size=len(ballots)))
    k = data.draw(st.integers(1, len(ballots)))
    value, exact = vote_at(ballots, grades, k)
    assert exact
    assert value == pytest.approx(brute(ballots, grades, k))


def test_random_subsets_are_near_the_truth_and_repeat():
    ballots = ["a", "b", "a", "c", "b", "a", None, "b", "a", "b", "a", "a"]
    grades = [float(ballot == "a") for ballot in ballots]
    truth, exact = vote_at(ballots, grades, 5, subsets=10_000)
    assert exact
    found = [vote_at(ballots, grades, 5, subsets=300, seed=seed) for seed in range(5)]
    assert not any(exact for _, exact in found)
    assert np.mean([value for value, _ in found]) == pytest.approx(truth, abs=0.03)
    assert vote_at(ballots, grades, 5, subsets=300, seed=1) == found[1]
    assert found[0] != found[1]


def test_vote_at_is_unbiased():
    """Over draws of N samples from a known distribution, vote@3 from 6 samples has the mean of true votes of 3."""
    rng = np.random.default_rng(0)
    names, odds = np.array(["a", "b", "c"]), [0.45, 0.35, 0.2]
    estimates, votes = [], []
    for _ in range(1500):
        six = rng.choice(names, 6, p=odds).tolist()
        estimates.append(vote_at(six, [float(x == "a") for x in six], 3)[0])
        three = rng.choice(names, 3, p=odds).tolist()
        votes.append(float(three[majority(three)] == "a"))
    assert np.mean(estimates) == pytest.approx(np.mean(votes), abs=0.04)
    assert np.mean(estimates) > 0.45  # more than one sample gets right


def test_curve():
    ballots = [["a", "a", "b", "a"], ["b", "a", None, "b"]]
    grades = [[float(b == "a") for b in row] for row in ballots]
    points = vote_curve(ballots, grades, [[10, 20, 30, 40], [5, 5, 5, 5]], ["p", "q"])
    assert [point.k for point in points] == [1, 2, 4]
    assert [point.tokens for point in points] == [15.0, 30.0, 60.0]
    assert points[0].value == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert points[-1].value == 0.5
    assert points[-1].error is not None
    assert all(0 <= p.interval[0] <= p.value <= p.interval[1] <= 1 and p.exact for p in points)
    with pytest.raises(DataError, match="equally many"):
        vote_curve([["a"], ["a", "b"]], [[1.0], [1.0, 0.0]], [[1], [1, 1]], ["p", "q"])
    with pytest.raises(ConfigError, match="vote@3 of 2"):
        vote_at(["a", "b"], [1.0, 0.0], 3)


class Seeded:
    """Answers with its seed, one by one; remembers how often it was asked."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.asked, self.stop_after = 0, stop_after

    def batch(self, conversations, **options):
        if self.asked >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += 1
        (talk,) = conversations
        return [Reply(text=f"{talk} {options['seed'] % 1000} {options['temperature']}", token_ids=[1, 2])]


def sampled(model, folder=None, n=3, batch=6):
    return sample_answers(
        model,
        lambda q: f"question {q}",
        ["x", "y", "z"],
        n,
        options={"temperature": 0.7},
        seed=5,
        store=Store(folder),
        name="part",
        identity={"model": 1},
        batch=batch,
    )[0]


def test_each_sample_has_its_own_seed_whatever_the_batch():
    found = sampled(Seeded())
    texts = [answer["text"] for row in found for answer in row]
    assert len(set(texts)) == 9
    assert found == sampled(Seeded(), batch=1) == sampled(Seeded(), batch=100)
    assert [row[:2] for row in found] == sampled(
        Seeded(), n=2
    )  # more samples leave the first ones as they are
    assert found[0][0]["completion"] == 2
    with pytest.raises(ConfigError, match="0 samples"):
        sampled(Seeded(), n=0)


def test_interrupted_sampling_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("chiasm.eval.store.SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        sampled(Seeded(stop_after=6), tmp_path, batch=3)
    model = Seeded()
    assert sampled(model, tmp_path, batch=3) == sampled(Seeded())
    assert model.asked == 3  # the last question only


def test_a_queue_answers_like_one_by_one():
    model = tiny_chat(seed=3)
    talks = [ask("What is it?", picture(seed=n)) for n in range(2)]

    def run(chosen, batch):
        return sample_answers(
            chosen,
            lambda q: talks[q],
            ["x", "y"],
            3,
            options={"temperature": 0.9, "max_new_tokens": 6},
            seed=1,
            store=Store(None),
            name="p",
            identity={},
            batch=batch,
        )[0]

    class Alone:
        batch = staticmethod(model.batch)

    together = run(model, 6)
    assert together == run(Alone(), 6)
    assert together == run(model, 1)
    assert len({answer["text"] for row in together for answer in row}) > 1
    assert together[0][0]["prompt"] > 20
