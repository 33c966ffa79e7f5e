"""``chiasm data build``: settings, formats, errors in one line, what is printed."""

import json

import pytest
import typer
from typer.testing import CliRunner

from chiasm.cli.data_build import build, build_command, parse_settings
from chiasm.errors import DataError, UsageError

app = typer.Typer()
app.command("build")(build_command)


def test_settings_are_json_or_lists_or_words():
    assert parse_settings(
        ["pixels=[128, 96]", "rounds=2", "families=counting,relation", "sprites=shapes", "frames=8,32"]
    ) == {
        "pixels": [128, 96],
        "rounds": 2,
        "families": ["counting", "relation"],
        "sprites": "shapes",
        "frames": [8, 32],
    }
    with pytest.raises(UsageError, match="has no '='"):
        parse_settings(["pixels"])
    with pytest.raises(UsageError, match="twice"):
        parse_settings(["seed=1", "seed=2"])


def test_builds_both_formats(tmp_path):
    result = build(
        "scenes",
        tmp_path,
        split="dev",
        n=4,
        settings=["pixels=80", "families=grounding,counting"],
        formats=["internvl", "coco"],
        images="jpeg",
    )
    assert result["samples"] == 4
    rows = (tmp_path / "scenes_dev.jsonl").read_text().splitlines()
    assert len(rows) == 4
    assert json.loads(rows[0])["width"] == 80
    assert json.loads((tmp_path / "scenes_dev.coco.json").read_text())["images"][3]["id"] == 3
    assert set(result["files"]) == {"internvl", "coco"}


def test_more_than_the_default_number_can_be_asked_for(tmp_path):
    assert build("clips", tmp_path, split="dev", n=2)["samples"] == 2
    from chiasm.cli.data_build import _with_size

    assert _with_size("scenes", 10**6, {}) == {"size": 10**6}
    assert _with_size("cifar10", 5, {}) == {}


def test_wrong_calls_are_one_line(tmp_path):
    with pytest.raises(DataError, match="did you mean 'scenes'"):
        build("scens", tmp_path)
    with pytest.raises(DataError, match="has no option 'pixel'"):
        build("scenes", tmp_path, settings=["pixel=3"])
    with pytest.raises(UsageError, match="does not fit"):
        build("scenes", tmp_path, n=2, settings=["objects=few"])
    with pytest.raises(UsageError, match="choose among internvl, coco"):
        build("scenes", tmp_path, formats=["voc"])
    with pytest.raises(UsageError, match="--images bmp"):
        build("scenes", tmp_path, n=1, images="bmp")
    with pytest.raises(UsageError, match="--clips avi"):
        build("clips", tmp_path, n=1, clips="avi")
    with pytest.raises(DataError, match="unknown split"):
        build("scenes", tmp_path, split="val")
    for wrong in ("size=-3", "size=0", "rounds=1.5", "seed=-1"):
        with pytest.raises(DataError, match="give a whole number of at least"):
            build("scenes", tmp_path, settings=[wrong])
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file cannot be read or written \("):
        build("scenes", tmp_path / "file", n=1)


def test_the_command_prints_paths_or_json(tmp_path):
    plain = CliRunner().invoke(app, ["counting", str(tmp_path / "a"), "--n", "2", "--split", "dev"])
    assert plain.exit_code == 0
    assert plain.stdout.strip() == str(tmp_path / "a" / "counting_dev.json")
    asked = CliRunner().invoke(
        app, ["scenes", str(tmp_path / "b"), "--n", "2", "--set", "rounds=2", "--format", "coco", "--json"]
    )
    found = json.loads(asked.stdout)
    assert found["files"] == {"coco": str(tmp_path / "b" / "scenes_train.coco.json")}
