import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.eval.fakes import Squares

from chiasm.errors import ConfigError, DataError
from chiasm.eval import controls
from chiasm.eval.controls import blank_like, derangement, fashion_linear, fit_linear, grey_level, majority
from chiasm.worlds.fashion import ANSWERS, FashionWorld


def test_majority_counts_the_training_split():
    found = majority(Squares("train", size=40))
    assert (found.answer, found.share, found.counted) == ("red", 0.5, 40)


def test_majority_of_equal_answers_is_the_first_by_alphabet(monkeypatch):
    world = Squares("train", size=4)
    monkeypatch.setattr(controls, "_answers", lambda world: ["b", "a", "b", "a"])
    assert majority(world).answer == "a"


def test_majority_of_nothing_is_refused():
    with pytest.raises(DataError, match="empty"):
        majority(Squares("train", size=0))


def test_majority_reads_label_arrays_where_there_are_some(prepared):
    found = majority(FashionWorld("train", folder=prepared))
    assert found.counted == len(FashionWorld("train", folder=prepared))
    assert found.answer == ANSWERS[0]


def test_blank_is_one_grey_of_the_training_pictures():
    world = Squares("train", size=8)
    level = grey_level(world)
    assert level == round(np.mean([world.sample(i).image.mean() for i in range(8)]))
    blank = blank_like(world.sample(0).image, level)
    assert blank.dtype == np.uint8
    assert blank.shape == (8, 8, 3)
    assert set(blank.ravel().tolist()) == {level}


@settings(max_examples=25)
@given(n=st.integers(2, 60), seed=st.integers(0, 50))
def test_derangement_moves_everything(n, seed):
    order = derangement(n, seed)
    assert sorted(order.tolist()) == list(range(n))
    assert (order != np.arange(n)).all()
    assert (order == derangement(n, seed)).all()


def test_derangement_of_one_is_refused():
    with pytest.raises(DataError, match="at least two"):
        derangement(1, 0)


def test_fit_linear_equals_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 300)
    features = rng.normal(size=(300, 12)) + rng.normal(size=(4, 12))[labels]
    penalty = 1e-2
    ours = fit_linear(
        torch.from_numpy(features), torch.from_numpy(labels), 4, penalty=penalty, tolerance=1e-9
    )
    # Theirs minimises a sum with weight C on it: the same problem at C = 1 / (penalty * N).
    theirs = LogisticRegression(C=1 / (penalty * 300), tol=1e-8, max_iter=2000).fit(features, labels)
    mine = ours.logits(torch.from_numpy(features)).softmax(1).numpy()
    assert np.abs(mine - theirs.predict_proba(features)).max() < 1e-5
    assert ours.gradient < 1e-6
    other = fit_linear(torch.from_numpy(features), torch.from_numpy(labels), 4, penalty=penalty, start=ours)
    assert other.loss == pytest.approx(ours.loss, abs=1e-9)


def test_fit_linear_refuses_nonsense():
    with pytest.raises(ConfigError, match="> 0"):
        fit_linear(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 2, penalty=0.0)
    with pytest.raises(ConfigError, match="do not fit"):
        fit_linear(torch.zeros(2, 3), torch.tensor([0, 5]), 2, penalty=1.0)


def test_fashion_linear_answers_and_is_kept(prepared, tmp_path):
    said = []
    answers, facts = fashion_linear(
        "test", prepared, penalties=(1e-1, 1e-2), cache=tmp_path / "c", report=said.append
    )
    truth = [ANSWERS[label] for label in FashionWorld("test", folder=prepared).arrays()[1]]
    assert np.mean([a == b for a, b in zip(answers, truth, strict=True)]) > 0.8
    assert facts["trained_on"] == len(FashionWorld("train", folder=prepared))
    assert facts["penalty"] in (1e-1, 1e-2)
    assert len(said) == 2
    again, _ = fashion_linear(
        "test", prepared, penalties=(1e-1, 1e-2), cache=tmp_path / "c", report=said.append
    )
    assert again == answers
    assert len(said) == 2
    # A damaged file is fitted anew, other settings have a file of their own.
    (kept,) = (tmp_path / "c").glob("*.npz")
    kept.write_bytes(b"PK")
    assert fashion_linear("test", prepared, penalties=(1e-1, 1e-2), cache=tmp_path / "c")[0] == answers
    fashion_linear("dev", prepared, penalties=(1e-1,), cache=tmp_path / "c")
    assert len(list((tmp_path / "c").glob("*.npz"))) == 2
    with pytest.raises(DataError, match="dev or test"):
        fashion_linear("train", prepared)
