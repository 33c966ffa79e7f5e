"""Run folders: atomic checkpoints, metrics that survive a crash, pruning."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from tests.train.tiny_run import tiny

from chiasm.errors import CheckpointError, UsageError
from chiasm.train import run as run_module
from chiasm.train import shards
from chiasm.train.run import Checkpoint, RunFolder


def checkpoint(step):
    return Checkpoint(
        step=step,
        weights={"w": torch.full((2, 3), float(step))},
        optimizer={"w/step": torch.tensor(1.0)},
        state={"scores": {"a": 1.0}},
    )


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path, tiny(), run_id="r", reference="./tiny.py:tiny", overrides=("steps=12",))


def test_run_json_says_what_ran(run):
    info = run.info
    assert info["recipe"]["optim"]["lr"] == 0.03
    assert info["overrides"] == ["steps=12"]
    assert info["reference"] == "./tiny.py:tiny"
    assert (
        info["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
        or "+" in torch.__version__
    )
    assert {"cpu", "threads", "git", "python"} <= info["environment"].keys()


def test_an_existing_run_is_not_overwritten(run):
    with pytest.raises(UsageError, match="--resume"):
        RunFolder.create(run.path.parent, tiny(), run_id="r")
    with pytest.raises(UsageError, match=r"run\.json"):
        RunFolder.open(run.path.parent)


def test_checkpoint_round_trip(run):
    run.save(checkpoint(3))
    loaded = RunFolder.open(run.path).load()
    assert loaded.step == 3
    assert torch.equal(loaded.weights["w"], torch.full((2, 3), 3.0))
    assert loaded.optimizer["w/step"].shape == ()
    assert loaded.state["scores"] == {"a": 1.0}
    assert run.folder(3).name == "step-000003"
    assert sorted(p.name for p in run.folder(3).iterdir()) == [
        "optimizer.safetensors",
        "state.json",
        "weights.safetensors",
    ]


@pytest.mark.parametrize("victim", ["save_file", "_sync", "os.rename"])
def test_a_crash_while_saving_leaves_the_last_checkpoint(run, monkeypatch, victim):
    run.save(checkpoint(3))

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        target, name = (os, "rename") if victim == "os.rename" else (run_module, victim)
        patch.setattr(target, name, crash)
        with pytest.raises(KeyboardInterrupt):
            run.save(checkpoint(6))
    assert run.checkpoints() == [3]
    assert run.load().step == 3
    run.save(checkpoint(6))  # sweeps what the crash left
    assert run.checkpoints() == [3, 6]
    assert not list(run.path.glob(".partial-*"))


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(run, monkeypatch):
    run.save(checkpoint(3))

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_file", full)
        with pytest.raises(
            CheckpointError, match=r"step 6 .*No space left.*step 3 is intact.*--resume"
        ) as caught:
            run.save(checkpoint(6))
    assert "\n" not in str(caught.value)
    assert run.checkpoints() == [3]
    assert run.load().step == 3
    assert not list(run.path.glob(".partial-*"))


def test_shards_read_whole_and_in_parts(run, tmp_path):
    """What several processes write, and how one reads it; see also test_parallel."""
    tensors = {
        "a/b": torch.arange(6.0).view(3, 2),
        "n": torch.tensor(2.0),
        "h": torch.ones(2, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    assert shards.sizes(tmp_path)["a/b"] == ((3, 2), torch.float32)
    read = shards.read_whole(tmp_path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    with pytest.raises(CheckpointError, match="lacks 'c'"):
        shards.read(tmp_path, {"c": torch.zeros(1)}, together=False)


def test_prune_keeps_the_last_and_the_milestones(run):
    for step in range(1, 10):
        run.save(checkpoint(step))
    run.prune(keep_last=2, keep_every=4)
    assert run.checkpoints() == [4, 8, 9]
    run.prune(keep_last=1, keep_every=0)
    assert run.checkpoints() == [9]


def test_a_crash_while_pruning_leaves_no_half_checkpoint(run, monkeypatch):
    for step in (3, 6, 9):
        run.save(checkpoint(step))

    def die(path, **options):
        if path.exists():
            next(path.glob("*.safetensors")).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module.shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            run.prune(keep_last=2, keep_every=0)
    assert run.checkpoints() == [6, 9]
    assert run.load().step == 9
    run.save(checkpoint(12))
    assert not list(run.path.glob(".partial-*"))


def test_missing_and_damaged_checkpoints(run):
    with pytest.raises(CheckpointError, match="none"):
        run.load()
    folder = run.save(checkpoint(3))
    with pytest.raises(CheckpointError, match="3"):
        run.load(5)
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="damaged"):
        run.load()


def test_metrics_survive_a_torn_line_and_rewind(run):
    for step in range(1, 6):
        run.measure({"step": step, "loss": 1 / step})
    with (run.path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 6, "lo')
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5]
    run.rewind(3)
    run.measure({"step": 4, "loss": 0.5})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
