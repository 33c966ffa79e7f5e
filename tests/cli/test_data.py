"""``chiasm data lint`` and ``chiasm data stats`` on real files, with a tiny model's tokenizer and tiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from tests.cli.conftest import Run
from tests.data.lint_zoo import GOOD, row, write_pictures

BAD = [
    row("<image> or <image>?", "Both.", image="a.png"),
    row("What?", "A.", image="nowhere.png"),
    row("What?", "A cat.<|im_end|>"),
]
WARNED = [row("What?", "")]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_pictures(tmp_path_factory.mktemp("data"))
    write(root / "good.jsonl", GOOD)
    write(root / "bad.jsonl", GOOD + BAD)
    write(root / "warned.jsonl", GOOD + WARNED)
    return root


def test_a_healthy_set(run: Run, root: Path, tiny: Path) -> None:
    ran = run("data", "lint", root / "good.jsonl", "--root", root, "--model", tiny)
    assert ran.code == 0, ran
    assert f"{len(GOOD)} rows of 1 set(s): 0 errors, 0 warnings, 0 notes" in ran.out
    assert "tokens of a row\n" in ran.out
    assert "tiles of a row\n" in ran.out


def test_findings_name_file_and_line(run: Run, root: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.jsonl"
    ran = run("data", "lint", root / "bad.jsonl", "--root", root, "--model", tiny, "--out", out)
    assert ran.code == 1
    first = len(GOOD) + 1
    assert f"  bad.jsonl:{first}: has 2 <image> tag(s)" in ran.out
    assert f"  bad.jsonl:{first + 2}: turn 1: <|im_end|>" in ran.out
    assert "error C201 picture-missing: a picture is not there" in ran.out
    assert "3 errors, 0 warnings" in ran.out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["code"] for one in rows] == ["C002", "C201", "C102"]
    assert rows[1]["where"] == f"bad.jsonl:{first + 1}"
    assert rows[1]["index"] == first


def test_json(run: Run, root: Path, tiny: Path) -> None:
    ran = run("data", "lint", root / "bad.jsonl", "--root", root, "-m", tiny, "--json", "--select", "C2")
    assert ran.code == 1
    data = json.loads(ran.out)
    assert data["rows"] == len(GOOD) + 3
    assert list(data["rules"]) == ["C201"]
    assert data["sets"]["bad"]["unusable"] == 2  # what training refuses; the third trains, wrongly


def test_strict(run: Run, root: Path, tiny: Path) -> None:
    words = ("data", "lint", root / "warned.jsonl", "--root", root, "--model", tiny)
    assert run(*words).code == 0
    assert run(*words, "--strict").code == 1
    assert run(*words, "--strict", "--ignore", "C602").code == 0


def test_a_broken_line_is_a_finding(run: Run, root: Path, tiny: Path, tmp_path: Path) -> None:
    lines = "".join(json.dumps(one) + "\n" for one in GOOD[3:5])
    (tmp_path / "cut.jsonl").write_text(lines + lines[:40])
    ran = run("data", "lint", tmp_path / "cut.jsonl", "--root", root, "--model", tiny)
    assert ran.code == 1
    assert "error C001 unreadable-row" in ran.out
    assert "  cut.jsonl:3: " in ran.out


def test_against(run: Run, root: Path, tiny: Path, tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", [row("Is it a dog?", "No.", image="d.png")])
    words = ("data", "lint", root / "good.jsonl", "--root", root, "--model", tiny, "--against", test)
    ran = run(*words)
    assert ran.code == 1
    assert "C512" in ran.out
    assert "d.png is a picture of the test set: test.jsonl:1" in ran.out
    assert run(*words, "--ignore", "C51").code == 0


def test_meta_files_and_several_sets(run: Run, root: Path, tiny: Path, tmp_path: Path) -> None:
    meta = {
        "one": {"annotation": str(root / "good.jsonl"), "root": str(root), "max_dynamic_patch": 1},
        "two": {"annotation": str(root / "warned.jsonl"), "root": str(root)},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    ran = run("data", "stats", tmp_path / "meta.json", "--model", tiny, "--json")
    assert ran.code == 0, ran
    data = json.loads(ran.out)
    assert list(data["sets"]) == ["one", "two"]
    assert data["all"]["rows"] == 2 * len(GOOD) + 1
    assert data["sets"]["one"]["tiles"]["max"] == 2  # two pictures, a tile each
    assert data["sets"]["two"]["tiles"]["max"] > 2
    ran = run("data", "lint", tmp_path / "meta.json", "--model", tiny)
    assert "same as good.jsonl:1" in ran.out


def test_stats(run: Run, root: Path, tiny: Path, tmp_path: Path) -> None:
    plot = tmp_path / "stats.png"
    ran = run("data", "stats", root / "bad.jsonl", "--root", root, "--model", tiny, "--plot", plot)
    assert ran.code == 0, ran
    assert ran.out.startswith("set  ")
    assert "tokens by part: " in ran.out
    assert "width of a picture: median 90," in ran.out
    assert "width to height of pictures\n" in ran.out
    assert plot.stat().st_size > 5000
    none = run("data", "stats", write(tmp_path / "none.jsonl", BAD[:1]), "--model", tiny)
    assert "chiasm data lint says why" in none.out


def test_videos_and_repeats(run: Run, root: Path, tiny: Path, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (60, 30), (10 * n, 0, 0)) for n in range(12)]
    frames[0].save(root / "film.gif", save_all=True, append_images=frames[1:], duration=100)
    said = row("<video>\nWhat happens?", "It changes.")["conversations"]
    path = write(tmp_path / "video.jsonl", [{"video": "film.gif", "conversations": said}, *GOOD[:1]])
    words = ("--root", root, "--model", tiny)

    def stats(*more: object) -> dict:
        return json.loads(run("data", "stats", path, *words, "--json", *more).out)["all"]

    plain, often = stats(), stats("--repeats", 4)
    assert often["parts"]["image"] == 4 * plain["parts"]["image"] > 0
    assert often["parts"]["video"] == plain["parts"]["video"]
    assert (plain["frames"]["max"], plain["videos"]["n"]) == (8, 1)
    assert stats("--frames", "12")["frames"]["max"] == 12
    assert 2 <= stats("--frames", "2,5")["frames"]["max"] <= 5
    assert stats("--frame-tiles", 2)["parts"]["video"] > plain["parts"]["video"]
    shown = run("data", "stats", path, *words, "--repeats", 4).out
    assert "encoded 4 times), a frame " in shown
    assert "frames of a row with videos: median 8" in shown
    # The longest that training may draw must fit.
    low = run("data", "lint", path, *words, "--frames", "1,2", "--max-length", 150)
    high = run("data", "lint", path, *words, "--frames", "1,12", "--max-length", 150)
    assert (low.code, high.code) == (0, 1), (low.out, high.out)
    assert "C401" in high.out
    for wrong, said_so in (("x", "write a number, or two as 16,96"), ("9,3", "is above max_frames 3")):
        ran = run("data", "stats", path, *words, "--frames", wrong)
        assert ran.code == 2
        assert said_so in ran.err


def test_limits(run: Run, root: Path, tiny: Path) -> None:
    words = ("data", "stats", root / "good.jsonl", "--root", root, "--model", tiny, "--json")
    assert json.loads(run(*words, "--limit", 2).out)["all"]["rows"] == 2
    assert json.loads(run(*words, "--sample", 3, "--seed", 1).out)["all"]["rows"] == 3
    assert json.loads(run(*words, "--max-tiles", 1).out)["all"]["tiles"]["max"] == 2


def test_length_and_packs(run: Run, root: Path, tiny: Path) -> None:
    words = ("data", "lint", root / "good.jsonl", "--root", root, "--model", tiny)
    ran = run(*words, "--max-length", 60, "--pack-tiles", 3)
    assert ran.code == 1
    assert "more than 60" in ran.out
    assert "limit 3" in ran.out


def test_a_release_is_counted_by_rule(run: Run, root: Path) -> None:
    ran = run("data", "stats", root / "good.jsonl", "--root", root, "--model", "InternVL2_5-1B", "--json")
    assert ran.code == 0, ran
    assert "counted by rule" in ran.err
    assert json.loads(ran.out)["all"]["parts"]["image"] == 6 * 7 * 256  # 3 x 2 tiles and a thumbnail each


def test_interruption(run: Run, root: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chiasm.data.stats import SetStats

    seen = SetStats.see
    calls: list[int] = []

    def stop(self: SetStats, sample: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        seen(self, sample)  # type: ignore[arg-type]

    monkeypatch.setattr(SetStats, "see", stop)
    for verb in ("lint", "stats"):
        calls.clear()
        ran = run("data", verb, root / "good.jsonl", "--root", root, "--model", tiny)
        assert ran.code == 130
        assert "interrupted after 2 rows" in ran.err
        assert "rows" in ran.out


def test_wrong_usage(run: Run, root: Path, tiny: Path) -> None:
    good = root / "good.jsonl"
    for words, said, code in (
        (["lint"], "see chiasm data lint --help", 2),
        (["lint", good, "--model", "nobody"], "no model is called 'nobody'", 2),
        (["lint", good, "--model", tiny, "--select", "C9"], "no rule is called 'C9'", 2),
        (["lint", good, "--model", tiny, "--limit", 1, "--sample", 1], "exclude each other", 2),
        (["stats", good, "--model", tiny, "--limit", 1, "--sample", 1], "exclude each other", 2),
        (["lint", root / "gone.jsonl", "--model", tiny], "no such file", 1),
        (["lint", good, good, "--model", tiny], "two sets are called 'good'", 2),
        (["lint", good, "--model", tiny, "--out", root / "no" / "out.jsonl"], "--out", 2),
    ):
        ran = run("data", *words)
        assert ran.code == code, ran
        assert said in ran.error_line


def test_help_of_the_group(run: Run) -> None:
    for words in (("data",), ("data", "--help")):
        ran = run(*words)
        assert ran.code == 0
        assert ran.out.startswith("Usage: chiasm data ")
        assert "\n  lint " in ran.out
        assert "\n  stats " in ran.out


def test_progress_is_one_line_of_a_terminal(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from chiasm.cli import data

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with data._Line() as line:
        line.show(10, 1000, "2 errors")
        line.show(11, 1000, "2 errors")  # too soon
    err = capsys.readouterr().err
    assert err.count("10 of 1,000 rows") == 1
    assert "11 of" not in err
    assert err.endswith("\r\x1b[K")
    assert "\n" not in err
