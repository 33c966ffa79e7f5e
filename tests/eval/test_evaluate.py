"""``chiasm eval`` on a tiny bundle around a tiny random language model: no wheel, no download."""

import json
from pathlib import Path

import pytest
import torch
import typer
from tests.eval.test_perplexity import archive
from typer.testing import CliRunner

from chiasm.checkpoint.adapters import adapter_for
from chiasm.checkpoint.store import write_checkpoint
from chiasm.cli import evaluate as verb
from chiasm.cli.evaluate import eval_command, evaluate, training_facts
from chiasm.errors import CheckpointError, UsageError
from chiasm.eval import controls, families
from chiasm.eval.card import render
from chiasm.eval.perplexity import measure_perplexity, prepare_text
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.systems.internvl import mini
from chiasm.systems.internvl.model import build_language_model
from tiny_tokenizers import byte_level


@pytest.fixture
def language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = LanguageConfig(
        vocab_size=byte_level().vocab_size,
        hidden_size=16,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=4,
        intermediate_size=24,
        max_positions=512,
        tie_words=True,
        family="llama",
    )
    model = build_language_model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    state = {name: value.detach() for name, value in model.named_parameters()}
    folder = tmp_path / "language"
    write_checkpoint(folder, adapter_for("text", language=config).to_public(state), config.to_public())
    byte_level().save(folder)
    monkeypatch.setattr(mini, "smollm2_folder", lambda: folder)
    return folder


@pytest.fixture
def bundle(tmp_path: Path, language: Path) -> Path:
    vision = InternViTConfig(
        hidden_size=8, intermediate_size=12, layers=1, heads=2, patch_size=14, image_size=28
    )
    config = mini.MiniConfig(vision=vision, lora_rank=2)
    model, _ = mini.build_mini(config, seed=1)
    with torch.no_grad():
        for name, value in mini.trained_state(model).items():
            if name.endswith("lora_B"):
                value.normal_(0, 0.5)
    mini.save_bundle(mini.trained_state(model), config, tmp_path / "bundle", {"training": [STAGE]})
    return tmp_path / "bundle"


STAGE = {
    "name": "sft",
    "reference": "internvl/mini_sft",
    "overrides": [],
    "steps": 5,
    "batch": 2,
    "weights": {},
    "hours": None,
    "clock": "by the clock",
    "threads": 1,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, prepared: Path, tmp_path: Path) -> Path:
    """Few items, short windows, a text; Fashion-MNIST in miniature."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(controls, "COUNTED", 10)
    monkeypatch.setattr(families, "ITEMS", {"fashion": 6, "counting": 5})
    monkeypatch.setitem(measure_perplexity.__kwdefaults__, "length", 8)
    monkeypatch.setitem(measure_perplexity.__kwdefaults__, "count", 5)
    prepare_text(archive(tmp_path / "d", {1: "What is in the picture? " * 30}), prepared)
    return prepared


def test_card_from_nothing_to_readme(small, bundle, tmp_path):
    wanted = ["fashion", "counting"]
    results = evaluate(str(bundle), families=wanted, card=True, out=tmp_path / "o", batch=4, device="cpu")
    whole = json.loads((bundle / "results.json").read_text(encoding="utf-8"))
    card = (bundle / "README.md").read_text(encoding="utf-8")
    assert card == render(whole)
    assert list(whole["families"]) == wanted
    assert whole["families"]["fashion"]["controls"]["pixels"]["n"] == 6
    assert "internvl/mini_sft" in card
    assert str(tmp_path) not in card + json.dumps(whole)
    manifest = whole["families"]["counting"]["manifest"]
    assert manifest["parser"]["numbers"] is True
    assert "How many objects are there?" in manifest["prompt"]
    assert manifest["model"]["weights"] == results["model"]["weights"]
    assert manifest["model"]["tiles"]["max_tiles"] == 1
    text = whole["perplexity"]
    assert text["manifest"]["adapted"]["model"]["weights"] == results["model"]["weights"]
    assert text["manifest"]["base"]["model"]["weights"] != results["model"]["weights"]
    assert text["nll"]["base"] != text["nll"]["adapted"]
    counts = whole["bundle"]["parameters"]
    assert counts["vision"] == results["model"]["parameters"]["vision"]
    assert counts["adapters"] > 0


def test_answers_are_kept_and_both_measurements_meet(small, bundle, tmp_path, monkeypatch):
    options = {"out": tmp_path / "o", "split": "dev", "device": "cpu"}
    first = evaluate(str(bundle), families=["counting"], n=5, **options)
    assert "perplexity" not in first
    then = evaluate(str(bundle), perplexity=True, **options)
    assert then["families"] == first["families"]
    monkeypatch.setattr(
        "chiasm.model.chat.ChatModel.batch", lambda *a, **k: pytest.fail("asked what is known")
    )
    again = evaluate(str(bundle), families=["counting"], n=5, **options)
    assert again["families"] == first["families"]
    assert again["perplexity"] == then["perplexity"]
    assert json.loads((tmp_path / "o" / "results.json").read_text()) == again


def test_results_of_other_weights_are_not_mixed_in(small, bundle, tmp_path):
    evaluate(str(bundle), perplexity=True, out=tmp_path / "o", device="cpu")
    config, _ = mini.read_bundle(bundle)
    model, _ = mini.build_mini(config, seed=2)
    mini.save_bundle(mini.trained_state(model), config, bundle, force=True)
    result = evaluate(str(bundle), families=["counting"], n=5, split="dev", out=tmp_path / "o", device="cpu")
    assert "perplexity" not in result


def test_the_command_prints_a_table_or_json(small, bundle, tmp_path):
    app = typer.Typer()
    app.command()(eval_command)
    call = [str(bundle), "--families", "counting", "--n", "5", "--split", "dev", "--device", "cpu"]
    call += ["--out", str(tmp_path / "o")]
    result = CliRunner().invoke(app, call, catch_exceptions=False)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["family", "items", "model"]
    assert lines[1].split()[:2] == ["counting", "5"]
    assert "counting-dev-real 5/5" in result.stderr
    result = CliRunner().invoke(app, [*call, "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["families"]["counting"]["score"]["n"] == 5


def test_table_shows_perplexity():
    row = {"value": 30.1234, "interval": [29.0, 31.5]}
    assert "perplexity ratio: 30.12 (29-31.5)" in verb.table(
        {"perplexity": {"base": row, "adapted": row, "ratio": row}}
    )


def test_families_without_assets_are_left_out_loudly(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CHIASM_DATA", str(tmp_path))
    assert verb._families(None) == ["words", "counting"]
    assert "left out, not prepared: cifar10, fashion" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"card": True, "split": "dev"}, "leave out --split"),
        ({"card": True, "n": 5}, "leave out --split and --n"),
        ({"perplexity": True, "families": ["words"]}, "leave out --families"),
        ({"families": ["cats"]}, "unknown family 'cats'"),
    ],
)
def test_contradicting_options_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        evaluate("nowhere", **options)


def test_only_bundles_have_a_card(tmp_path, language):
    with pytest.raises(CheckpointError, match="no chiasm-mini bundle"):
        evaluate(str(tmp_path / "nothing"), perplexity=True)
    with pytest.raises(UsageError, match="chiasm-mini bundles"):
        evaluate(str(language), perplexity=True)


def test_training_facts_come_from_the_run_folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    info = {
        "reference": "internvl/mini_distill",
        "overrides": [f"start={tmp_path}/runs/old/step-000100", "optim.lr=1e-3"],
        "recipe": {"name": "mini-distill", "batch": 64, "data": {"weights": {"words": 0.5, "cifar10": 0.0}}},
        "environment": {"threads": 1, "git": "f00", "cuda": None},
    }
    (run / "run.json").write_text(json.dumps(info))
    rows = [{"step": 10, "loss": 1.0, "seconds": 1.0}, {"step": 20, "loss": 0.5, "seconds": 2.0}]
    rows.append({"step": 20, "eval": {"words/exact": 0.25}})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = training_facts(run)
    assert facts["overrides"] == ["start=step-000100", "optim.lr=1e-3"]
    assert (facts["steps"], facts["batch"], facts["weights"]) == (20, 64, {"words": 0.5})
    assert (facts["hours"], facts["clock"]) == (round(1.5 * 20 / 3600, 3), "by the clock")
    assert facts["scores"] == {"words/exact": 0.25}
    with pytest.raises(UsageError, match="not a run folder"):
        training_facts(tmp_path)
