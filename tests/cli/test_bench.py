"""``chiasm eval --bench``: from a file to a table, JSON and result files; sweeps; comparing; what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chiasm.cli import bench as verb
from chiasm.cli.app import main
from chiasm.eval.result import Result
from clips import folder as frames_in
from tiny_chat import tiny_chat


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch):
    """`chiasm.load` gives a tiny model of random weights, by its name's last character."""
    loaded = []

    def load(name, *, device=None, quantize=None, **options):
        loaded.append(options)
        return tiny_chat(seed=len(loaded))

    monkeypatch.setattr("chiasm.hub.load", load)
    return loaded


@pytest.fixture
def data(tmp_path: Path) -> Path:
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "question": f"Which {n}?", "options": ["red", "blue"], "answer": "A", "id": n}
        for n in range(4)
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_table_json_and_file(model, data, tmp_path, capsys):
    call = [
        "eval",
        "tiny",
        "--bench",
        "mcq",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "o"),
        "--max-new-tokens",
        "3",
    ]
    assert main([*call, "--limit", "3", "--max-tiles", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split()[:3] == ["bench", "frames", "score"]
    assert out.splitlines()[1].split()[0] == "mcq"
    assert "mcq 3/3" in err
    assert model == [{"max_tiles": 2}]
    kept = Result.load(tmp_path / "o" / "result.json")
    assert (len(kept.rows), kept.manifest.bench, kept.manifest.decoding["max_new_tokens"]) == (3, "mcq", 3)
    assert main([*call, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["n"] == 4
    assert "rows" not in printed


def test_sweep_reports_every_number(model, tmp_path, capsys):
    frames_in(tmp_path / "film", [f"{n}.png" for n in range(6)])
    rows = [
        {"video": "film", "question": f"Why {n}?", "candidates": ["x", "y"], "answer": "x"} for n in range(2)
    ]
    (tmp_path / "task.json").write_text(json.dumps(rows))
    call = [
        "eval",
        "tiny",
        "--bench",
        "mvbench",
        "--data",
        str(tmp_path / "task.json"),
        "--out",
        str(tmp_path / "o"),
    ]
    call += ["--max-new-tokens", "2", "--frames", "2,3"]
    assert main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["sweep"]) == ["2", "3"]
    assert found["best"]["note"] == "chosen on the scored questions"
    assert found["sweep"]["3"]["manifest"]["frames"] == 3
    assert found["sweep"]["3"]["tokens"]["prompt"] > found["sweep"]["2"]["tokens"]["prompt"]
    assert sorted(p.name for p in (tmp_path / "o").glob("result*")) == ["result-2.json", "result-3.json"]
    assert main(call) == 0
    assert "chosen on the scored questions" in capsys.readouterr().out


def test_votes_print_their_curve(model, data, tmp_path, capsys):
    call = [
        "eval",
        "tiny",
        "--bench",
        "mcq",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "o"),
        "--votes",
        "2",
    ]
    assert main([*call, "--max-new-tokens", "2", "--seed", "4", "--limit", "2", "--cot"]) == 0
    out = capsys.readouterr().out
    assert "vote@1: " in out
    assert "vote@2: " in out
    assert "tokens a question" in out
    kept = Result.load(tmp_path / "o" / "result.json")
    assert (kept.manifest.seed, kept.manifest.decoding["votes"]) == (4, 2)


def test_two_results_are_compared(model, data, tmp_path, capsys):
    call = ["eval", "tiny", "--bench", "mcq", "--data", str(data), "--max-new-tokens", "2"]
    for name in "ab":
        assert main([*call, "--out", str(tmp_path / name)]) == 0
    assert main([*call, "--limit", "2", "--out", str(tmp_path / "c")]) == 0
    capsys.readouterr()
    files = [str(tmp_path / name / "result.json") for name in "abc"]
    assert main(["eval", "--compare", files[0], "--compare", files[1]]) == 0
    assert "4 questions, 1 pictures" in capsys.readouterr().out
    assert main(["eval", "--compare", files[0], "--compare", files[1], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 4
    assert main(["eval", "--compare", files[0], "--compare", files[2]]) == 1
    assert "data.hash" in capsys.readouterr().err


def test_benches_are_listed(capsys):
    assert main(["eval", "--bench", "list"]) == 0
    out = capsys.readouterr().out
    assert "docvqa" in out
    assert "MVBench" in out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--bench", "docvq", "--data", "q.jsonl"], 2, "did you mean docvqa"),
        (["--bench", "mcq"], 2, "give a file or folder with --data"),
        (["--bench", "mcq", "--data", "gone.tsv"], 2, "no such file"),
        (["--bench", "mcq", "--data", "q.jsonl", "--card"], 2, "--card is for the families"),
        (["--bench", "mcq", "--data", "q.jsonl", "--frames", "a"], 2, "--frames a"),
        (["--bench", "mcq", "--data", "q.jsonl", "--exclude", "gone"], 2, "--exclude gone"),
        (["--bench", "mcq", "--data", "q.jsonl", "--mode", "ours"], 1, "mode 'ours'"),
        (["--bench", "vqav2", "--data", "q.jsonl"], 1, "q.jsonl:1: VQA accuracy"),
        (["--bench", "mcq", "--data", "q.jsonl", "--prompt", "polite"], 2, "prompt 'polite'"),
        (["--bench", "mcq", "--data", "q.jsonl", "--frames", "4"], 2, "shows pictures"),
        (["--bench", "coco_caption", "--data", "q.jsonl", "--votes", "4"], 2, "cannot vote"),
        (["--cot"], 2, "--cot is for benchmarks"),
        (["--data", "q.jsonl"], 2, "--data is for benchmarks"),
        (["--compare", "a.json"], 2, "name two results"),
    ],
)
def test_refused_before_a_model_is_loaded(words, status, message, data, monkeypatch, capsys):
    monkeypatch.chdir(data.parent)
    monkeypatch.setattr("chiasm.hub.load", lambda *a, **k: pytest.fail("loaded"))
    assert main(["eval", *words]) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_points_and_shares_are_printed_alike():
    estimate = {"value": 0.5, "error": 0.25, "interval": [0.1, 0.9], "n": 4}
    shared = {"bench": "b", "n": 4, "pictures": 2, "unparsed": 1, "cut": 0, "with_chance": 0.625, "extra": {}}
    shared |= {"scores": {"accuracy": estimate}, "manifest": {"frames": None}}
    text = verb.bench_table(shared | {"unit": "%"})
    assert "50.00  25.00  10.00-90.00" in text
    assert "guessed: 62.50 on average" in text
    assert "0.50   0.25   0.10-0.90" in verb.bench_table(shared | {"unit": "points"})
