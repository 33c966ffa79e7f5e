"""Several processes: the curve of one, checkpoints that change hands, kill -9."""

import io
import shutil
import signal
import time

import pytest
import torch
from tests.train.mixed_run import finish, mixed, run_jobs

from chiasm.errors import UsageError
from chiasm.train.parallel import World
from chiasm.train.progress import Progress
from chiasm.train.recipe import Group, Optim
from chiasm.train.run import CLOCKS, RunFolder
from chiasm.train.trainer import Trainer, check_workers


def alone(folder, *overrides, until=None):
    recipe = mixed(*overrides)
    known = (folder / "run.json").exists()
    run = RunFolder.open(folder) if known else RunFolder.create(folder.parent, recipe, run_id=folder.name)
    trainer = Trainer(recipe, run, progress=Progress(recipe.steps, io.StringIO()))
    trainer.fit(until=until)
    return trainer


def curve(folder):
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in RunFolder.open(folder).metrics()]


def close(a, b, rel=1e-5):
    x, y = curve(a), curve(b)
    assert [row.keys() for row in x] == [row.keys() for row in y]
    for mine, other in zip(x, y, strict=True):
        for name, value in mine.items():
            if isinstance(value, float):
                assert value == pytest.approx(other[name], rel=rel), (mine["step"], name)
            else:
                assert value == other[name], (mine["step"], name)


def same_tensors(a, b, **tolerance):
    x, y = RunFolder.open(a).load(), RunFolder.open(b).load()
    assert x.step == y.step
    for mine, other in ((x.weights, y.weights), (x.optimizer, y.optimizer)):
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, other[name], **tolerance)


def test_two_processes_give_the_curve_of_one_and_their_checkpoints_change_hands(tmp_path):
    one, two, back, forth = (tmp_path / name for name in ("one", "two", "back", "forth"))
    alone(one, until=3)
    shutil.copytree(one, forth)
    alone(one)
    finish(run_jobs([(two, (), 3), (two, (), None), (forth, (), None)]))  # 2 -> 2 and 1 -> 2
    shutil.copytree(two, back)
    shutil.rmtree(back / "step-000006")
    alone(back)  # 2 -> 1
    for other in (two, back, forth):
        close(other, one)
        same_tensors(other, one, rtol=1e-4, atol=1e-5)
    assert sorted(p.name for p in RunFolder.open(two).folder(6).iterdir()) == [
        "optimizer",
        "state.json",
        "weights",
    ]
    rows = curve(two)
    assert rows[2]["skipped"]  # no part of this step could be read
    assert "loss" not in rows[2]
    assert len(RunFolder.open(two).metrics()) == len(rows) == 8  # one process writes


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("lora.rank=2", "lora.dropout=0.2", "vision_lora.rank=2"),
        ('optim.train=["embedder.connect.*"]',),
        ('optim.freeze=["objective.*"]', "checkpointing=none", "optim.vision_decay=0.5", "guard.policy=skip"),
    ],
)
def test_adapters_and_freezing_in_two_processes(tmp_path, overrides):
    alone(tmp_path / "one", *overrides)
    finish(run_jobs([(tmp_path / "two", overrides, 3), (tmp_path / "two", overrides, None)]))
    close(tmp_path / "two", tmp_path / "one")
    same_tensors(tmp_path / "two", tmp_path / "one", rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_in_two_processes(tmp_path):
    alone(tmp_path / "one", "compute=bfloat16")
    finish(run_jobs([(tmp_path / "two", ("compute=bfloat16",), None)]))
    losses = [[row["loss"] for row in curve(tmp_path / name) if "loss" in row] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.slow
def test_the_guard_finds_the_same_culprits_in_two_processes(tmp_path):
    """After the first step every loss is NaN: processes search their parts together, with pictures or without."""
    overrides = (
        "optim.lr=1e30",
        "optim.clip=none",
        "guard.policy=skip",
        "guard.max_skips=100",
        "eval_every=0",
    )
    alone(tmp_path / "one", *overrides)
    finish(run_jobs([(tmp_path / "two", overrides, None)]))
    one, two = ([row for row in curve(tmp_path / run) if "samples" in row] for run in ("one", "two"))
    assert (
        [row["step"] for row in one] == [row["step"] for row in two] == [2, 4, 5, 6]
    )  # step 3 has no samples
    for mine, other in zip(one, two, strict=True):
        assert len(mine["samples"]) == 5
        assert mine["skipped"] == other["skipped"]


@pytest.mark.slow
def test_killed_processes_resume_to_the_bit(tmp_path):
    overrides = ("steps=30", "save_every=4", "eval_every=0", "data.size=400")
    finish(run_jobs([(tmp_path / "whole", overrides, None)]))
    started = run_jobs([(tmp_path / "killed", overrides, None)])
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < 11):
        time.sleep(0.02)
    for process in started:
        process.send_signal(signal.SIGKILL)
    for process in started:
        process.communicate()
    assert len(RunFolder.open(tmp_path / "killed").metrics()) < 30
    finish(run_jobs([(tmp_path / "killed", overrides, None)]))
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    same_tensors(tmp_path / "killed", tmp_path / "whole", rtol=0, atol=0)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    overrides = ("steps=400", "eval_every=0", "data.size=400")
    started = run_jobs([(tmp_path / "run", overrides, None)])
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < 3):
        time.sleep(0.02)
    started[1].send_signal(signal.SIGTERM)
    finish(started)
    run = RunFolder.open(tmp_path / "run")
    assert run.checkpoints()[-1] == run.metrics()[-1]["step"] < 400


def test_what_processes_cannot_share_is_refused():
    recipe = mixed()
    check_workers(recipe, 1, "cpu", 2)
    with pytest.raises(UsageError, match=r"3 processes.*accumulate=6"):
        check_workers(recipe, 1, "cpu", 3)
    with pytest.raises(UsageError, match="beside other processes"):
        check_workers(recipe, 2, "cpu", 2)
    muon = mixed()
    muon = type(muon)(**{f: getattr(muon, f) for f in muon.__dataclass_fields__} | {
        "optim": Optim(groups=(Group(pattern="trunk.*", optimizer="muon"),))})  # fmt: skip
    with pytest.raises(UsageError, match="Muon"):
        check_workers(muon, 1, "cpu", 2)


def test_alone_the_world_is_oneself():
    world = World()
    assert world.main
    assert world.share(3) == [3]
    assert world.tell("x") == "x"
    assert list(World(rank=1, size=3).parts(7)) == [1, 4]
