"""chiasm reproduce: lists, runs, tunes, reports; on toy claims, whose runs cost nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Run

from chiasm.cli import reproduce as module
from lab_toys import TOY


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setitem(module.CLAIM_HOMES, "toys", "lab_toys")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_list_shows_every_claim_and_runs_nothing(run: Run, toys: Path) -> None:
    ran = run("reproduce", "toys", "--list")
    assert ran.code == 0
    assert [line.split()[:3] for line in ran.out.splitlines()] == [
        ["better", "superior", "ci/mini"],
        ["same", "equivalent", "ci/mini"],
        ["order", "monotone", "ci/mini"],
        ["tiny", "exact", "ci/mini"],
        ["blind", "superior", "ci/mini"],
        ["faster", "ratio", "mini"],
    ]
    rows = json.loads(run("reproduce", "toys", "--list", "--json").out)
    assert rows[0]["fingerprints"]["mini"] == TOY.fingerprint("mini")
    assert list(toys.iterdir()) == []


def test_a_claim_that_does_not_hold_is_a_result(run: Run, toys: Path) -> None:
    ran = run("reproduce", "toys")
    assert ran.code == 0
    lines = ran.out.splitlines()
    verdicts = ["holds", "does not hold", "holds", "holds", "invalid", "holds"]
    assert [line.split("  ")[0].strip() for line in lines[:-1]] == verdicts
    assert lines[-1] == "reports/toys/mini.md"
    assert "15 runs to make, 0 kept from before" in ran.err
    assert "0 runs to make, 15 kept from before" in run("reproduce", "toys", "--json").err


def test_one_claim_runs_its_experiment_and_the_report_says_what_is_missing(run: Run, toys: Path) -> None:
    ran = run("reproduce", "toys", "--claim", "same", "--out", "elsewhere", "--json")
    data = json.loads(ran.out)
    verdicts = {c["id"]: c["verdict"] for c in data["claims"]}
    assert verdicts["faster"] is None
    assert verdicts["better"] == "holds"
    assert "not run yet" in (toys / "elsewhere" / "toys" / "mini.md").read_text()
    # Some of the seeds are no verdict, and all seeds of another call make one.
    run("reproduce", "toys", "--claim", "faster", "--seeds", "0,1")
    page = toys / "reports" / "toys" / "mini.json"
    faster = json.loads(page.read_text())["claims"][-1]
    assert faster["verdict"] is None
    run("reproduce", "toys", "--claim", "faster", "--seeds", "2")
    assert json.loads(page.read_text())["claims"][-1]["verdict"] is not None


def test_tuning_seeds_see_the_dev_split_and_no_report(run: Run, toys: Path) -> None:
    ran = run("reproduce", "toys", "--claim", "toy", "--seeds", "7001,7002")
    assert ran.code == 0
    assert "toy a seed 7001 (dev): accuracy" in ran.out
    assert ran.out.splitlines()[-1] == "tuning runs: no verdicts, no report"
    assert not (toys / "reports").exists()
    data = json.loads(run("reproduce", "toys", "--claim", "toy", "--seeds", "7001", "--json").out)
    assert data["purpose"] == "tuning"
    assert "verdict" not in json.dumps(data)


def test_ci_checks_and_judges_nothing(run: Run, toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = toys / "calls.txt"
    monkeypatch.setenv("LAB_TOYS_LOG", str(log))
    for _ in range(2):  # nothing is kept: today's code is checked, not yesterday's
        ran = run("reproduce", "toys", "--scale", "ci")
        assert (ran.code, ran.out.splitlines()[-1]) == (0, "mechanics: ok, no verdicts")
    assert log.read_text().splitlines() == [f"{arm} 100 dev 1" for arm in "abc"] * 2
    assert sorted(p.name for p in toys.iterdir()) == ["calls.txt"]
    monkeypatch.setattr("lab_toys.ERROR", 1e-3)
    ran = run("reproduce", "toys", "--scale", "ci")
    assert ran.code == 1
    assert ran.err.splitlines()[-1] == "error: claim tiny: a:error is 0.001, allowed 1e-05"
    monkeypatch.setattr("lab_toys.ERROR", float("nan"))
    assert "claim tiny, seed 100: a:error was not measured" in run("reproduce", "toys", "--scale", "ci").err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "system 'nonsense' has no claims"),
        (["toys", "--claim", "nonsense"], "no such claim; there are better, same"),
        (["toys", "--scale", "huge"], "must be one of ci, mini, gpu"),
        (["toys", "--claim", "faster", "--scale", "ci"], "has no scale ci"),
        (["toys", "--seeds", "7"], "neither for confirmation"),
        (["toys", "--seeds", "a,b"], "whole numbers"),
        (["toys", "--seeds", "0", "--scale", "ci"], "judges nothing"),
        (["toys", "--jobs", "0"], "at least 1"),
        (["toys", "--scale", "gpu"], "no claim of toys has scale gpu"),
    ],
)
def test_wrong_usage_is_one_line(run: Run, words: list[str], said: str) -> None:
    ran = run("reproduce", *words)
    assert ran.code == 2
    assert said in ran.error_line


def test_mixed_seeds_and_failing_runs_exit_1(run: Run, toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run("reproduce", "toys", "--seeds", "0,100")
    assert (ran.code, "mix confirmation and tuning" in ran.error_line) == (1, True)
    monkeypatch.setenv("LAB_TOYS_FAIL", "b1")
    ran = run("reproduce", "toys")
    assert ran.code == 1
    assert ran.err.splitlines()[-1] == "error: toy, arm b, seed 1: the data is gone: bring it back"
    assert ran.out == ""
