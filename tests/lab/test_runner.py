"""The runner: once each, resumable, never mixing definitions or purposes; killed runs lose what they were at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from chiasm.errors import DataError, UsageError
from chiasm.lab.runner import Store, as_results, purpose_of, run_trials
from lab_toys import TIMED, TOY

HERE = Path(__file__).parents[1]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "calls.txt"
    monkeypatch.setenv("LAB_TOYS_LOG", str(path))
    return path


def store(tmp_path: Path, purpose="confirmation", scale="mini") -> Store:
    return Store(tmp_path / "work", "toys", scale, purpose)


def calls(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def test_every_run_is_made_once_on_the_split_of_its_seed(tmp_path: Path, log: Path) -> None:
    said: list[str] = []
    run_trials([TOY], store(tmp_path), {"toy": [0, 1]}, say=said.append)
    assert calls(log) == [f"{arm} {seed} test 3" for seed in (0, 1) for arm in "abc"]
    assert said[0].startswith("6 runs to make, 0 kept")
    assert "toy a seed 0: accuracy 0.5" in said[1]
    run_trials([TOY], store(tmp_path), {"toy": [0, 1, 2]})
    assert calls(log)[6:] == [f"{arm} 2 test 3" for arm in "abc"]
    tuning = store(tmp_path, "tuning")
    run_trials([TOY], tuning, {"toy": [100]})
    assert calls(log)[9:] == [f"{arm} 100 dev 3" for arm in "abc"]
    results = store(tmp_path).results(TOY, range(3))
    assert len(results) == 9
    first = results[0]
    assert (first.arm, first.seed, first.split, first.fingerprint) == (
        "a",
        0,
        "test",
        TOY.fingerprint("mini"),
    )
    assert first.metrics["odd"] is None  # infinity is no JSON
    assert first.environment["versions"]["torch"]
    assert as_results(results)[2]["b"]["accuracy"] == pytest.approx(0.82)


def test_another_definition_never_reads_old_results(tmp_path: Path, log: Path) -> None:
    kept = store(tmp_path)
    run_trials([TOY], kept, {"toy": [0]})
    moved = replace(TOY, claims=(replace(TOY.claims[0], delta=0.25), *TOY.claims[1:]))
    assert kept.results(moved, [0]) == []
    assert kept.others(TOY) == []
    assert kept.others(moved) == [TOY.fingerprint("mini")]
    run_trials([moved], kept, {"toy": [0]})
    assert len(calls(log)) == 6
    assert kept.others(TOY) == [moved.fingerprint("mini")]
    # A file that was copied from another definition or seed is noticed.
    text = kept.path(TOY, "a", 0).read_text()
    kept.path(moved, "a", 0).write_text(text)
    with pytest.raises(DataError, match="not of"):
        kept.load(moved, "a", 0)
    kept.path(TOY, "a", 1).write_text(text)
    with pytest.raises(DataError, match="delete it"):
        kept.load(TOY, "a", 1)


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    kept = store(tmp_path)
    run_trials([TOY], kept, {"toy": [0]})
    path = kept.path(TOY, "b", 0)
    for text in ("", "{", "[]", '{"arm": "b"}'):
        path.write_text(text)
        with pytest.raises(DataError, match=r"b-0\.json is damaged"):
            run_trials([TOY], kept, {"toy": [0]})


def test_a_failing_run_keeps_what_was_finished(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_TOYS_FAIL", "b1")
    with pytest.raises(DataError, match="toy, arm b, seed 1: the data is gone: bring it back"):
        run_trials([TOY], store(tmp_path), {"toy": [0, 1]})
    assert len(store(tmp_path).results(TOY, [0, 1])) == 4
    monkeypatch.delenv("LAB_TOYS_FAIL")
    run_trials([TOY], store(tmp_path), {"toy": [0, 1]})
    assert calls(log)[-2:] == ["b 1 test 3", "c 1 test 3"]


def test_purposes_do_not_mix() -> None:
    assert purpose_of([0, 4]) == "confirmation"
    assert purpose_of([100, 7001]) == "tuning"
    with pytest.raises(DataError, match="mix"):
        purpose_of([0, 100])
    with pytest.raises(UsageError, match="neither"):
        purpose_of([50])


def test_several_processes_give_the_same(tmp_path: Path) -> None:
    run_trials([TOY, TIMED], store(tmp_path), {"toy": [0, 1], "timed": [0]}, jobs=2, home="lab_toys")
    plain = Store(tmp_path / "plain", "toys", "mini", "confirmation")
    run_trials([TOY, TIMED], plain, {"toy": [0, 1], "timed": [0]})
    for experiment in (TOY, TIMED):
        ours, theirs = (s.results(experiment, [0, 1]) for s in (store(tmp_path), plain))
        assert [r.metrics for r in ours] == [r.metrics for r in theirs]
        assert len(ours) == (6 if experiment is TOY else 2)


def test_a_failure_in_another_process_is_the_same_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_TOYS_FAIL", "c0")
    with pytest.raises(DataError, match="toy, arm c, seed 0: the data is gone"):
        run_trials([TOY], store(tmp_path), {"toy": [0]}, jobs=2, home="lab_toys")


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_runner_goes_on_where_it_was(tmp_path: Path, log: Path, number: int) -> None:
    """Of nine runs of 0.15 s each some are done when it is killed; those are not made again."""
    script = (
        "from dataclasses import replace\n"
        "from chiasm.lab.runner import Store, run_trials\n"
        "import signal, sys; sys.path.insert(0, sys.argv[2])\n"
        # What a shell starts in the background ignores SIGINT, and so do its children.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from lab_toys import TOY\n"
        "slow = replace(TOY, budgets={'mini': {'steps': 3, 'sleep': 0.15}})\n"
        "run_trials([slow], Store(sys.argv[1], 'toys', 'mini', 'confirmation'), {'toy': [0, 1, 2]})\n"
    )
    slow = replace(TOY, budgets={"mini": {"steps": 3, "sleep": 0.15}})
    kept = store(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "work"), str(HERE)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(calls(log)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    process.wait(30)
    before, done = len(calls(log)), len(kept.results(slow, range(3)))
    assert before - 1 <= done <= before < 9
    assert not [p for p in tmp_path.rglob("*.json") if json.loads(p.read_text())["experiment"] != "toy"]
    run_trials([slow], kept, {"toy": [0, 1, 2]})
    assert len(kept.results(slow, range(3))) == 9
    assert len(calls(log)) == before + 9 - done


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_killed_runner_takes_its_processes_along(tmp_path: Path) -> None:
    """They would otherwise compute for as long as their runs take, and nobody would keep what they find."""
    pids = tmp_path / "pids"
    pids.mkdir()
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from chiasm.lab.runner import Store, run_trials\n"
        "from lab_toys import TOY\n"
        "if __name__ == '__main__':\n"
        "    store = Store(sys.argv[1], 'toys', 'mini', 'confirmation')\n"
        "    run_trials([TOY], store, {'toy': [0]}, jobs=2, home='lab_toys')\n"
    )
    file = tmp_path / "runner.py"
    file.write_text(script)
    process = subprocess.Popen(
        [sys.executable, str(file), str(tmp_path / "work"), str(HERE)],
        env=os.environ | {"LAB_TOYS_PIDS": str(pids), "PYTHONPATH": str(HERE)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(list(pids.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait(30)
    workers = [int(path.name) for path in pids.iterdir()]
    assert len(workers) == 2
    while any(map(_lives, workers)) and time.monotonic() < deadline + 30:
        time.sleep(0.05)
    assert not any(map(_lives, workers))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")
