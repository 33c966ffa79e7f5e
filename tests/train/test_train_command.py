"""`chiasm train`: recipes by name and by file, resume, JSON, errors in one line."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from chiasm.cli.train import find_recipe, train, train_command
from chiasm.errors import UsageError
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


def test_a_refusal_leaves_no_run_behind(tmp_path):
    with pytest.raises(UsageError, match="9 workers on cpu"):
        train("internvl/debug", runs=tmp_path, run_id="x", workers=9)
    assert not (tmp_path / "x").exists()
