"""Writers: what they are given, by name; what is not installed; the file stays the truth."""

import sys
import types

import pytest
from tests.train.test_trainer import quiet
from tests.train.tiny_run import tiny

from chiasm.errors import MissingExtraError
from chiasm.train.writers import numbers, open_writers


class Log:
    """A stand-in for a package's run object and its ``init``."""

    def __init__(self):
        self.inits, self.rows, self.finished = [], [], 0

    def init(self, **options):
        self.inits.append(options)
        return self

    def log(self, row, step):
        self.rows.append((step, row))

    def finish(self):
        self.finished += 1


def test_numbers_of_a_row():
    row = {
        "step": 3,
        "loss": 1.5,
        "tokens": 7,
        "skipped": "no",
        "ok": True,
        "memory_mib": None,
        "samples": ["a"],
    }
    assert numbers(row) == {"loss": 1.5, "tokens": 7.0}
    assert numbers({"step": 4, "eval": {"words": 0.5}}) == {"eval/words": 0.5}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_runs_of_other_programs(tmp_path, monkeypatch, name):
    log = Log()
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=log.init))
    recipe = tiny(writers=(name,))
    quiet(recipe, tmp_path / "run").fit(until=5)
    trainer = quiet(recipe, tmp_path / "run")
    trainer.fit()
    first = log.inits[0]
    assert (first["project"], first["name"], first["resume"]) == ("chiasm", "run", "allow")
    assert first["config"]["optim"]["lr"] == 0.03
    assert log.inits[1] == first
    assert log.finished == 2
    losses = {step: row["loss"] for step, row in log.rows if "loss" in row}
    assert losses == {row["step"]: row["loss"] for row in trainer.run.metrics() if "loss" in row}
    assert [step for step, row in log.rows if "eval/gap" in row] == [4, 8, 12]


def test_tensorboard(tmp_path, monkeypatch):
    made = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
            made.append(self)

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

        def close(self):
            self.closed = True

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter)
    )
    recipe = tiny(writers=("tensorboard",))
    quiet(recipe, tmp_path / "run").fit(until=3)
    quiet(recipe, tmp_path / "run").fit(until=4)
    assert [w.purge_step for w in made] == [None, 4]
    assert all(w.closed and w.folder == str(tmp_path / "run" / "tensorboard") for w in made)
    assert [s for name, _, s in made[1].scalars if name == "loss"] == [4]


def test_tensorboard_itself(tmp_path):
    pytest.importorskip("tensorboard")
    (writer,) = open_writers(("tensorboard",), tmp_path, {}, first=1)
    writer.row(1, {"loss": 2.0})
    writer.close()
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_an_absent_package_names_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(MissingExtraError, match=rf"chiasm\[{name}\]"):
        open_writers((name,), tmp_path, {}, first=1)
    trainer = quiet(tiny(writers=(name,)), tmp_path / "run")
    with pytest.raises(MissingExtraError):
        trainer.fit()
    assert trainer.step == 0
