"""The report: golden page and plots of toy claims; who may enter one, and when."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

import lab_toys
from chiasm.errors import UsageError
from chiasm.lab.plots import plot
from chiasm.lab.report import compose, judged, markdown, summary, write_report
from chiasm.lab.runner import Store, run_trials
from lab_toys import TIMED, TOY

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture
def kept(tmp_path: Path) -> Store:
    found = Store(tmp_path / "work", "toys", "mini", "confirmation")
    run_trials([TOY], found, {"toy": range(3)})
    return found


def fixed(data: dict) -> dict:
    """The same report as if it had been made at one time on one machine."""
    for experiment in data["experiments"].values():
        for run in experiment["runs"]:
            run |= {"cpu_seconds": 2.0, "wall_seconds": 3.0, "started": "then"}
            run["environment"] = {
                "python": "3", "machine": "m", "cpu": "c", "cpu_flags": "f", "versions": {"torch": "2"}, "git": "g"
            }  # fmt: skip
    data["surroundings"] = [
        {**run["environment"], "runs": 9} for run in [data["experiments"]["toy"]["runs"][0]]
    ]
    data["claims_file"] = {"name": "toys.py", "revision": "0" * 40, "changed": False}
    data["cpu_seconds"] = 18.0
    return data


def same_as_golden(name: str, text: str, update: bool = False) -> None:
    path = GOLDEN / name
    if update:  # pragma: no cover
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_the_page_and_the_plots_are_the_golden_ones(kept: Store) -> None:
    data = fixed(compose([TOY, TIMED], kept))
    plots = {c.id: f"mini/{c.id}.svg" for _, c, j in judged([TOY, TIMED], kept) if j is not None}
    same_as_golden("toys.md", markdown(data, plots))
    for _, claim, judgement in judged([TOY], kept):
        assert judgement is not None
        drawn = plot(claim, judgement)
        ElementTree.fromstring(drawn)
        same_as_golden(f"{claim.id}.svg", drawn)


def test_the_verdicts_are_those_of_the_rules(kept: Store, tmp_path: Path) -> None:
    page, data = write_report([TOY, TIMED], kept, tmp_path / "reports", lab_toys)
    verdicts = {c["id"]: c["verdict"] for c in data["claims"]}
    assert verdicts == {
        "better": "holds",
        "same": "does not hold",
        "order": "holds",
        "tiny": "holds",
        "blind": "invalid",
        "faster": None,
    }
    assert page == tmp_path / "reports" / "toys" / "mini.md"
    stored = json.loads((tmp_path / "reports" / "toys" / "mini.json").read_text())
    assert stored == data
    assert stored["claims_file"]["name"] == "lab_toys.py"
    better = stored["claims"][0]
    assert better["fingerprint"] == TOY.fingerprint("mini")
    assert (better["mean"], better["seeds"]) == (pytest.approx(0.3), [0, 1, 2])
    assert len(stored["experiments"]["toy"]["runs"]) == 9
    assert {p.name for p in (tmp_path / "reports" / "toys" / "mini").iterdir()} == {
        f"{c}.svg" for c, v in verdicts.items() if v
    }
    assert "## What did not come out as claimed" in page.read_text()
    assert summary(data)[0].split()[:2] == ["holds", "better"]
    assert summary(data)[-1].startswith("not run yet")


def test_a_claim_is_judged_when_all_its_seeds_are_there(tmp_path: Path) -> None:
    part = Store(tmp_path, "toys", "mini", "confirmation")
    run_trials([TOY], part, {"toy": [0, 1]})
    assert {c["verdict"] for c in compose([TOY], part)["claims"]} == {None}
    assert len(compose([TOY], part)["experiments"]["toy"]["runs"]) == 6


def test_tuning_and_ci_runs_enter_no_report(tmp_path: Path) -> None:
    for scale, purpose in (("mini", "tuning"), ("ci", "confirmation"), ("ci", "tuning")):
        with pytest.raises(UsageError, match="no evidence"):
            write_report([TOY], Store(tmp_path, "toys", scale, purpose), tmp_path / "reports")
    assert not (tmp_path / "reports").exists()


def test_a_moved_threshold_is_told(kept: Store) -> None:
    moved = replace(TOY, claims=(replace(TOY.claims[0], delta=0.35), *TOY.claims[1:]))
    data = compose([moved], kept)
    assert {c["verdict"] for c in data["claims"]} == {None}
    assert data["experiments"]["toy"]["other_definitions"] == [TOY.fingerprint("mini")]
    assert "Other definitions of this experiment were run on the test split before" in markdown(data, {})


def test_an_experiment_without_claims_is_shown_too(kept: Store) -> None:
    curve = replace(TOY, id="curve", claims=())
    run_trials([curve], kept, {"curve": range(3)})
    data = compose([curve, TOY], kept)
    assert list(data["experiments"]) == ["toy", "curve"]
    assert [run["metrics"] for run in data["experiments"]["curve"]["runs"]] == [
        run["metrics"] for run in data["experiments"]["toy"]["runs"]
    ]
    assert {claim["experiment"] for claim in data["claims"]} == {"toy"}
    assert "### curve" in markdown(data, {})
