"""`chiasm train`: recipes by name and by file, resume, JSON, errors in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from chiasm.cli.train import find_recipe, train, train_command
from chiasm.errors import DataError, UsageError
from chiasm.train.recipe import apply_overrides
from chiasm.train.run import RunFolder

APP = typer.Typer()
APP.command()(train_command)
TINY = f"{Path(__file__).with_name('tiny_run.py')}:tiny"


def test_names_and_files_find_recipes(tmp_path):
    assert find_recipe("internvl/debug")().name == "debug"
    assert find_recipe(TINY)().name == "tiny"
    for reference, words in (
        ("internvl/nothing", "debug, mini_distill, mini_sft"),
        ("nothing/debug", "internvl"),
        (f"{tmp_path}/mine.py:run", "no Python file"),
        (TINY.replace(":tiny", ":huge"), "'huge'"),
    ):
        with pytest.raises(UsageError, match=words):
            find_recipe(reference)


def test_the_nearest_name_is_suggested():
    for reference, word in (("internvl/mini_stf", "'mini_sft'"), ("intervl/debug", "'internvl'")):
        with pytest.raises(UsageError, match=f"did you mean {word}"):
            find_recipe(reference)
    with pytest.raises(UsageError, match="did you mean 'warmup'"):
        apply_overrides(find_recipe(TINY)(), ["schedule.warmpu=3"])


@pytest.mark.slow
def test_under_torchrun_the_processes_share_one_run(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "chiasm",
        "train",
        "internvl/debug",
        "--runs",
        str(tmp_path),
        "--set",
        "steps=4",
        "--json",
    ]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["step"] == 4
    assert RunFolder.open(result["run"]).checkpoints() == [4]
    assert "2 processes" in done.stderr


def test_a_device_that_is_not_there(tmp_path):
    for device, words in (("cuda", "no GPU"), ("tpu", "no device 'tpu'")):
        if device == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(UsageError, match=words):
            train(TINY, runs=tmp_path, run_id="x", device=device)
    assert not (tmp_path / "x").exists()


def test_start_stop_resume(tmp_path):
    path = train(TINY, overrides=("steps=6",), runs=tmp_path, run_id="a", until=4)
    assert RunFolder.open(path).checkpoints()[-1] == 4
    assert RunFolder.open(path).info["overrides"] == ["steps=6"]
    train(resume=path)
    assert RunFolder.open(path).checkpoints()[-1] == 6


def test_contradictions_are_usage_errors(tmp_path):
    for arguments in (
        {},
        {"recipe": TINY, "resume": tmp_path},
        {"resume": tmp_path, "overrides": ("steps=1",)},
    ):
        with pytest.raises(UsageError, match="--resume"):
            train(**arguments)
    with pytest.raises(UsageError, match=r"run\.json"):
        train(resume=tmp_path)


def test_stdout_is_the_result(tmp_path):
    result = CliRunner().invoke(
        APP, [TINY, "--runs", str(tmp_path), "--id", "b", "--set", "steps=3", "--seed", "5", "--json"]
    )
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["step"] == 3
    assert printed["run"] == str(tmp_path / "b")
    assert printed["scores"].keys() == {"gap"}
    assert RunFolder.open(tmp_path / "b").info["recipe"]["seed"] == 5
    again = CliRunner().invoke(APP, ["--resume", str(tmp_path / "b")])
    assert again.stdout.strip() == str(tmp_path / "b")


def test_a_recipe_is_a_recipe_and_runs_are_where_one_can_write(tmp_path):
    (tmp_path / "mine.py").write_text("def run():\n    return 3\n")
    with pytest.raises(UsageError, match=r"mine.py:run returns a int"):
        train(f"{tmp_path / 'mine.py'}:run", runs=tmp_path)
    with pytest.raises(UsageError, match=r"cannot be made \(.*--runs"):
        train("internvl/debug", runs=tmp_path / "mine.py" / "runs")
    with pytest.raises(UsageError, match="--until 0"):
        train("internvl/debug", runs=tmp_path, until=0)


def test_a_run_that_cannot_begin_gives_its_name_back(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for name in ("mine", "other"):
        with pytest.raises(DataError, match=r"data\.meta"):
            train("internvl/sft", runs=tmp_path, run_id=name)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "other").exists()


def test_a_refusal_leaves_no_run_behind(tmp_path):
    with pytest.raises(UsageError, match="9 workers on cpu"):
        train("internvl/debug", runs=tmp_path, run_id="x", workers=9)
    assert not (tmp_path / "x").exists()
