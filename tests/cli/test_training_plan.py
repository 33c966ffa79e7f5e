"""`chiasm train --dry-run`, `chiasm plan RECIPE`, and recipes in `chiasm list` and `chiasm show`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chiasm.cli import listing
from chiasm.systems.internvl import recipes


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that need not be measured for a second."""
    from chiasm.model import cost

    monkeypatch.setattr(
        cost,
        "measure",
        lambda **given: cost.Machine(
            flops=1e11, bandwidth=1e10, flops_share=given["flops_share"], source="measured"
        ),
    )


def test_a_plan_of_the_papers_recipe(run) -> None:
    done = run("plan", "internvl/stage2_8b", "--gpus", "512", "--machine", "h100", "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert found["trained"] == found["parameters"]["total"]["value"] == 8_075_365_376
    assert found["tokens"]["nominal"] == 44e9
    assert found["memory"]["optimiser"]["value"] == 8 * 8_075_365_376 / 512
    total, peak = found["flops"]["total"]["value"], found["memory"]["peak"]["value"]
    assert found["time"]["step"]["value"] == pytest.approx(total / (512 * 989e12 * 0.4))
    assert found["time"]["run"]["value"] == pytest.approx(5500 * found["time"]["step"]["value"])
    assert found["machine"]["mfu"] == pytest.approx(0.4 * found["flops"]["model"]["value"] / total)
    assert found["machine"]["fits"] is (peak <= 80e9)
    assert "data.meta is not set" in found["data"]["missing"]
    # 6 N T of the usual estimate, less the word table, which multiplies nothing; attention and encoder come on top.
    language = 6 * (6_979_588_096 + 379_097_088 / 8) * 512 * 16_384
    assert found["flops"]["decoder: linear layers"]["value"] == pytest.approx(language, rel=0.02)


def test_formulas_are_shown_when_asked_for(run) -> None:
    short, long = (run("plan", "internvl/lora_1b", "--on", "rtx4090", *more) for more in ((), ("--explain",)))
    assert short.code == long.code == 0
    assert "rows 8,192 · layers 24" not in short.out
    assert "rows 8,192 · layers 24" in long.out
    assert "moments; the largest is the peak" in long.out
    assert "the share is an assumption" in short.out
    assert "adapters" in short.out


def test_options_that_do_not_go_together(run) -> None:
    for words, said in (
        (("internvl/stage2_8b", "--frames", "3"), "--frames is about a conversation"),
        (("InternVL2_5-8B", "--gpus", "8"), "--gpus is for recipes"),
        (("InternVL2_5-8B", "--explain"), "--explain is for recipes"),
        (("internvl/stage2_9b",), "did you mean 'stage2_"),
        (("internvl/stage2_8b", "--set", "optim.weight_decya=1"), "did you mean 'weight_decay'"),
        (("internvl/stage2_8b", "--on", "h1000"), "there are h200"),
        (("internvl/sft",), "model.path is not set"),
    ):
        done = run("plan", *words)
        assert done.code == 2, words
        assert said in done.err
        assert done.err.count("\n") == 1
    done = run("plan", "internvl/stage2_8b", "--gpus", "7")
    assert done.code == 1
    assert "do not divide among 7 devices" in done.err


def test_a_dry_run_writes_nothing(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("train", "internvl/debug", "--dry-run", "--json", "--set", "steps=7")
    assert done.code == 0
    found = json.loads(done.out)
    assert found["steps"] == 7
    assert found["data"]["sets"]["counting"]["rows"] == 200
    assert found["time"]["run"]["value"] == pytest.approx(7 * found["time"]["step"]["value"])
    # The count of the trainer itself.
    from chiasm.train.optim import trainable
    from chiasm.train.trainer import build_parts

    _, model, objective = build_parts(recipes.debug())
    assert found["trained"] == sum(
        p.numel() for p in trainable(model, objective, recipes.debug().optim).values()
    )
    assert list(tmp_path.iterdir()) == []
    for words, said in (
        (("--explain",), "belongs to --dry-run"),
        (("--dry-run", "--resume", "x"), "no --resume"),
    ):
        done = run("train", "internvl/debug", *words)
        assert done.code == 2
        assert said in done.err


def test_data_of_a_dry_run(run, tmp_path: Path) -> None:
    for name, rows in (("a", 30), ("b", 10)):
        talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"conversations": talk}) + "\n") * rows)
    meta = tmp_path / "meta.json"
    sets = {
        "a": {"root": "", "annotation": "a.jsonl", "data_augment": False, "repeat_time": 1},
        "b": {"root": "", "annotation": str(tmp_path / "b.jsonl"), "data_augment": True, "repeat_time": 3},
    }
    meta.write_text(json.dumps(sets))

    def data(*more: str) -> dict:
        done = run("train", "internvl/stage2_1b", "--dry-run", "--json", "--set", f"data.meta={meta}", *more)
        assert done.code == 0
        return json.loads(done.out)["data"]

    assert data()["sets"]["a"] == {"rows": 30, "repeat": 1.0, "share": 0.5}
    sets["a"]["repeat_time"] = 12
    meta.write_text(json.dumps(sets))
    assert data("--set", "data.resampling=sqrt")["sets"]["a"]["share"] == pytest.approx(
        360**0.5 / (360**0.5 + 30**0.5)
    )
    for broken, said in (
        ({"a": {"annotation": "none.jsonl"}}, "no such file"),
        ({"a": {}}, "found only"),
        ([], "meta.json"),
    ):
        meta.write_text(json.dumps(broken))
        assert said in data()["missing"]


def test_a_model_that_tells_no_sizes_is_counted(run, tmp_path: Path) -> None:
    recipe = Path(__file__).parents[1] / "train" / "tiny_run.py"
    done = run("train", f"{recipe}:tiny", "--dry-run")
    assert done.code == 0, done.err
    assert "activations, FLOPs and time are not planned" in done.out
    # 6x8 + 8, two of 8 of the norm, 8x4 + 4
    assert " 108 " in done.out.replace(",", "").replace("\n", " ")


def test_the_list_names_what_there_is(run) -> None:
    listed = {name.partition("/")[2] for name in listing.entries("recipes") if name.startswith("internvl/")}
    assert listed == set(recipes.__all__)
    assert "internvl/stage15_26b" in run("list", "recipes").out
    shown = json.loads(run("show", "internvl/lora", "--json").out)
    assert shown["lora"]["rank"] == 16


def test_listing_recipes_loads_no_pytorch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from chiasm.cli.listing import entries; "
        "assert len(entries('recipes')) > 30; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
