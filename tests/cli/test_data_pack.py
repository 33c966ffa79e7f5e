"""``chiasm data pack``: measured from files, the figures of the simulation, what it recommends, its failures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from chiasm.cli import data_pack
from chiasm.cli.data_pack import pack_command
from chiasm.data.datasets import DatasetSpec
from chiasm.data.layout import LayoutSpec, measure
from chiasm.errors import DataError, UsageError
from chiasm.media.tiles import TilePolicy
from tiny_tokenizers import byte_level

app = typer.Typer()
app.command("pack")(pack_command)


@pytest.fixture(autouse=True)
def spec(monkeypatch: pytest.MonkeyPatch) -> LayoutSpec:
    made = LayoutSpec(
        tokenizer=byte_level(),
        template="internvl2_5",
        tiles=TilePolicy(image_size=8, max_tiles=6, mode="original"),
        tokens_per_tile=4,
        system="",
    )
    monkeypatch.setattr(data_pack, "_layout", lambda model: made)
    return made


def row(words: int, image: str | None = None) -> dict:
    talk = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "cat " * words}]
    return {"conversations": talk} | ({} if image is None else {"image": image})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for n in range(4):
        width, height = draw.integers(4, 40, 2)
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
    rows = [row(int(draw.integers(1, 40)), f"{n % 4}.png" if n % 3 == 0 else None) for n in range(60)]
    rows += [row(400), row(3, "missing.png")]
    lines = [json.dumps(one) for one in rows]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"conversations": [']) + "\n")
    (tmp_path / "b.jsonl").write_text("\n".join(lines[:9]) + "\n")
    meta = {
        "a": {
            "root": str(tmp_path),
            "annotation": str(tmp_path / "a.jsonl"),
            "data_augment": False,
            "repeat_time": 1,
        },
        "b": {"root": str(tmp_path), "annotation": str(tmp_path / "b.jsonl"), "max_dynamic_patch": 1},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_figures_are_those_of_the_files(data: Path, spec: LayoutSpec) -> None:
    words = (data / "meta.json", "--max-tokens", 256, "--max-tiles", 12, "--json")
    found = json.loads(run(*words))
    assert (found["rows"], found["usable"]) == (63 + 9, 61 + 9)
    reasons = {bad["where"]: bad["reason"] for bad in found["bad"]}
    assert set(reasons) == {"a.jsonl:62", "a.jsonl:63"}
    assert "missing.png" in reasons["a.jsonl:62"]
    assert [long["where"] for long in found["too_long"]] == ["a.jsonl:61"]
    sets = {
        name: DatasetSpec(annotation=str(data / f"{name}.jsonl"), root=str(data)).open(name) for name in "ab"
    }
    tokens = [
        measure(sets[name].record(n), spec, train=True, max_tiles=most).tokens
        for name, count, most in (("a", 61, None), ("b", 9, 1))
        for n in range(count)
    ]
    assert found["tokens"]["max"] == max(tokens)
    assert found["tokens"]["mean"] == round(sum(tokens) / len(tokens), 1)
    assert sum(count for _, count in found["tokens"]["bins"]) == len(tokens)
    assert found["draws"] == 20_000
    simulated = found["simulation"]
    assert 0.8 < simulated["token_fill"] <= 1
    assert simulated["tokens"] == pytest.approx(simulated["token_fill"] * simulated["packs"] * 256)
    assert found["recommended"]["token_fill"] >= 0.95
    assert json.loads(run(*words)) == found  # the same each time


def test_text_for_people(data: Path) -> None:
    said = run(data / "meta.json", "--max-tokens", 256, "--max-tiles", 4, "--method", "first_fit")
    assert "72 rows of 2 set(s), 70 usable" in said
    assert "left out: a.jsonl:62: " in said
    assert "tokens of a row" in said
    assert "█" in said
    assert "a.jsonl:61: " in said
    assert (
        "20,000 draws, --max-tokens 256 --max-tiles 4 --buffer 20 --method first_fit --overflow refuse"
        in said
    )
    assert "recommended: --max-tokens 256" in said
    split = run(data / "a.jsonl", "--root", data, "--max-tokens", 256, "--overflow", "split", "--limit", 30)
    assert "30 rows of 1 set(s)" in split
    assert " cuts, " in split


def test_videos_take_the_frames_that_training_draws(tmp_path: Path, spec: LayoutSpec) -> None:
    film = tmp_path / "film"
    film.mkdir()
    for n in range(40):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(film / f"{n:02}.png")
    talk = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    path = tmp_path / "v.jsonl"
    path.write_text((json.dumps({"video": "film", "conversations": talk}) + "\n") * 20)
    words = [str(path), "--root", str(tmp_path), "--max-tiles", "0", "--json"]

    def tiles(*more: str) -> dict:
        ran = CliRunner().invoke(app, [*words, *more], catch_exceptions=False)
        return json.loads(ran.stdout)["tiles"]

    found = tiles()
    assert 8 <= found["median"] < found["max"] <= 32
    assert tiles("--min-frames", "5", "--max-frames", "5") == {
        "mean": 5.0,
        "median": 5,
        "p95": 5,
        "max": 5,
    } | {"bins": [["4-7", 20]]}
    with pytest.raises(UsageError, match="--max-frames 4 is below --min-frames 8"):
        tiles("--max-frames", "4")


def test_failures_are_lines(data: Path, tmp_path: Path) -> None:
    for option, value in (("--method", "worst"), ("--overflow", "ignore"), ("--resampling", "cube")):
        with pytest.raises(UsageError, match=f"{option} '{value}' is unknown: use "):
            run(data / "a.jsonl", option, value)
    with pytest.raises(DataError, match="none of 20000 samples fits into 5 tokens"):
        run(data / "b.jsonl", "--root", data, "--max-tokens", 5)
    (tmp_path / "none.jsonl").write_text(json.dumps(row(2, "missing.png")) + "\n")
    with pytest.raises(
        DataError, match=r"none of the 1 rows of .*none.jsonl can be trained on: none.jsonl:1: "
    ):
        run(tmp_path / "none.jsonl")


def test_a_model_lends_its_layout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    spec = data_pack._layout("InternVL2_5-1B")
    assert spec.tokens_per_tile == 256
    assert "counted by rule" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no model is called 'nothing'"):
        data_pack._layout("nothing")
