"""``data convert`` and ``data filter``, as commands of an application of their own."""

import json

import pytest
import typer
from typer.testing import CliRunner

from chiasm.cli.data_convert import convert_data_command, counting
from chiasm.cli.data_filter import filter_command
from chiasm.data.datasets import DatasetSpec
from chiasm.errors import ChiasmError, DataError, UsageError

app = typer.Typer(rich_markup_mode=None)
app.command("convert")(convert_data_command)
app.command("filter")(filter_command)


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, ChiasmError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def lines(tmp_path):
    def row(n, text):
        return {"id": n, "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": text}]}

    rows = [
        row(0, "fine"),
        row(1, "0" * 30),
        row(2, " ".join(f"w{n}" for n in range(100)) * 2),
        row(3, "good"),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_convert(lines, tmp_path):
    out = run("convert", lines, tmp_path / "a.json", "--to", "llava", "--root", "r")
    assert out == f"{tmp_path / 'a.json'}: 4 samples as llava\n"
    report = json.loads(
        run("convert", tmp_path / "a.json", tmp_path / "s", "--to", "webdataset", "--per-shard", 3, "--json")
    )
    assert (report["rows"], len(report["files"]), report["dropped"], report["root"]) == (4, 2, [], None)
    back = DatasetSpec(annotation=str(tmp_path / "s" / "*.tar")).open("s")
    assert [back.record(n).extra["id"] for n in range(4)] == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="exists"):
        run("convert", lines, tmp_path / "a.json", "--to", "llava")


def test_convert_leaves_out_and_lists(lines, tmp_path):
    lines.write_text(lines.read_text() + "{\n")
    with pytest.raises(DataError, match=r"^a\.jsonl:5: "):
        run("convert", lines, tmp_path / "b.jsonl", "--to", "messages")
    out = CliRunner().invoke(
        app, ["convert", str(lines), str(tmp_path / "b.jsonl"), "--to", "messages", "--drop"]
    )
    assert "left out: 1" in out.stdout
    assert "note: left out: a.jsonl:5: is cut off" in out.stderr


def test_one_set_of_a_meta_file(lines, tmp_path):
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({name: {"annotation": str(lines), "root": ""} for name in ("x", "y")}))
    with pytest.raises(UsageError, match=r"names 2 data sets: choose one with --set x \| y"):
        run("convert", meta, tmp_path / "b.jsonl", "--to", "internvl")
    with pytest.raises(UsageError, match="has no data set 'z'"):
        run("convert", meta, tmp_path / "b.jsonl", "--to", "internvl", "--set", "z")
    run("convert", meta, tmp_path / "b.jsonl", "--to", "internvl", "--set", "y")
    assert (tmp_path / "b.jsonl").read_text() == lines.read_text()


def test_filter_and_then_decide(lines, tmp_path):
    review = tmp_path / "review.jsonl"
    words = ("filter", lines, tmp_path / "good.jsonl", "--review", review, "--repetition", 0.3)
    report = json.loads(run(*words, "--json"))
    assert {key: report[key] for key in ("seen", "kept", "rejected", "review", "reasons")} == {
        "seen": 4,
        "kept": 2,
        "rejected": 1,
        "review": 1,
        "reasons": {"zeros": 1, "repetition": 1},
    }
    assert [json.loads(line)["id"] for line in (tmp_path / "good.jsonl").read_text().splitlines()] == [0, 3]
    with pytest.raises(UsageError, match="may hold decisions"):
        run(*words)
    review.write_text(review.read_text().replace('"review"', '"kept"'))
    out = run("filter", lines, tmp_path / "good.jsonl", "--decisions", review, "--repetition", 0.3, "--force")
    assert out.splitlines()[:2] == [
        f"{tmp_path / 'good.jsonl'}: 3 of 4 samples kept",
        "rejected: 1, to be reviewed: 0",
    ]


def test_filter_by_scores(lines, tmp_path):
    scores = tmp_path / "scores.jsonl"
    scores.write_text("".join(json.dumps({"id": n, "score": n * 3}) + "\n" for n in range(4)))
    words = ("filter", lines, tmp_path / "good.jsonl", "--rules", "", "--json", "--force")
    assert json.loads(run(*words, "--scores", scores))["kept"] == 1
    assert json.loads(run(*words, "--scores", scores, "--least", "3", "--least", "math=9"))["kept"] == 3
    for more, said in [
        ((), "nothing to filter by"),
        (("--least", "3"), "--least needs --scores"),
        (("--scores", scores, "--least", "math=x"), "give a number"),
        (("--rules", "length,luck"), "unknown rule 'luck'"),
        (("--scores", scores, "--least", "99"), "no sample is kept"),
    ]:
        with pytest.raises(UsageError, match=said):
            run(*words, *more)


def test_the_count_is_shown_on_a_terminal_only(monkeypatch, capsys):
    with counting("samples", 4) as tick:
        tick(1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with counting("samples", 4) as tick:
        monkeypatch.setattr("time.monotonic", lambda: 1e12)
        tick(1)
    assert "1 of 4 samples" in capsys.readouterr().err
