"""PVC's recipes: the toy trains, stages train what they should, a run becomes a folder that answers."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.checkpoint import random_checkpoints as made

from chiasm.cli.app import main
from chiasm.data.mixture import generator
from chiasm.errors import ConfigError, UsageError
from chiasm.parts.vision.progressive import TemporalConfig
from chiasm.systems.pvc import recipes
from chiasm.systems.pvc.convert import PVCOptions
from chiasm.systems.pvc.load import load_pvc
from chiasm.systems.pvc.nodes import OLD_VISION, PVCModel, opened_source
from chiasm.systems.pvc.presets import PRESETS, preset
from chiasm.train.optim import depth_factors, trainable
from chiasm.train.prepare import prepare
from chiasm.train.recipe import Recipe, apply_overrides, resolved
from chiasm.train.run import RunFolder
from chiasm.train.sft import FinetuneObjective
from chiasm.train.trainer import Trainer
from tiny_tokenizers import byte_level

OPTIONS = PVCOptions(temporal=TemporalConfig(layers=1, time_sines=8, time_width=6), tokens=1, repeats=2)


@pytest.fixture
def internvl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(made, "VOCAB", byte_level().vocab_size)
    folder = made.write_original(tmp_path / "internvl", force_image_size=56, max_dynamic_patch=1)
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["max_position_embeddings"] = 1024
    (folder / "config.json").write_text(json.dumps(config))
    byte_level().save(folder)
    return folder


def fit(recipe: Recipe, folder: Path, reference: str = "") -> RunFolder:
    run = RunFolder.create(folder, recipe, run_id="run", reference=reference)
    torch.set_num_threads(1)
    Trainer(recipe, run, loaders=0).fit()
    return run


def test_the_debug_recipe_trains_on_pictures_and_clips_in_one_sequence(tmp_path) -> None:
    recipe = recipes.debug()
    batch = recipes.DebugData().open().fetch([("counting", 0), ("clips", 0)], generator(0, "x"))
    assert set(batch.media) == {"image", "video"}
    assert batch.spans_of("image")[0].repeats == 2
    assert len(batch.spans_of("video")) == 8
    run = fit(recipe, tmp_path)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 20
    assert all(math.isfinite(loss) for loss in losses)
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.5
    weights = run.load().weights
    assert any(weights[name].any() for name in weights if name.endswith(".gate"))


@pytest.mark.parametrize("name", sorted(set(recipes.__all__) - {"debug", "mini"}))
def test_recipes_are_whole_trees(name) -> None:
    recipe = getattr(recipes, name)()
    assert isinstance(recipe, Recipe)
    json.dumps(resolved(recipe))
    changed = apply_overrides(recipe, ["model.options.temporal.layers=4", "model.path=x", "data.meta=m.json"])
    assert changed.model.options.temporal.layers == 4  # type: ignore[union-attr]
    assert recipe.data.min_frames == 16  # type: ignore[union-attr]
    assert recipe.data.max_frames == 96  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"model\.path is not set"):
        recipe.model.build()


def learned(recipe: Recipe, model: PVCModel) -> set[str]:
    built = prepare(model.build(), recipe)
    return set(trainable(built, torch.nn.Module(), recipe.optim))


def test_stages_train_what_they_say(internvl) -> None:
    model = PVCModel(path=str(internvl), options=OPTIONS)
    everything = {name for name, _ in model.build().named_parameters()}
    a = learned(recipes.stage_a(), model)
    new = (
        ".temporal.",
        ".norm_t.",
        ".gate",
        ".own",
        "vision.time.",
        "vision.modulation.",
        "embedder.connect.",
    )
    assert a == {n for n in everything if n.startswith("embedder.") and any(word in n for word in new)}
    assert learned(replace(recipes.stage_b(), drop_path=None), model) == everything
    adapters = learned(recipes.lora(), model)
    assert {name for name in adapters if name.startswith("embedder.")} == a
    rest = {name for name in adapters if not name.startswith("embedder.")}
    assert rest
    assert all(name.startswith("trunk.") and name.endswith((".lora_A", ".lora_B")) for name in rest)


def test_what_is_new_is_no_deep_layer_for_the_learning_rate(internvl) -> None:
    names = [name for name, _ in PVCModel(path=str(internvl), options=OPTIONS).build().named_parameters()]
    factors = depth_factors(names, recipes.stage_b().optim)
    assert factors["embedder.vision.time.fc1.weight"] == 1.0
    assert factors["embedder.vision.modulation.weight"] == 1.0
    assert factors["embedder.vision.layers.1.temporal.qkv.weight"] == pytest.approx(0.9)
    assert factors["embedder.vision.patch_embedding.weight"] == pytest.approx(0.9**3)


def annotated(folder: Path) -> Path:
    """A JSONL of a picture and a video, as users have them."""
    rng = np.random.default_rng(0)
    names = []
    for n in range(4):
        names.append(f"f{n}.png")
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / names[-1])
    (folder / "clip").mkdir()
    for n in range(4):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / "clip" / f"{n}.png")
    rows = [
        {
            "id": n,
            "image": names[n],
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "noise"},
            ],
        }
        for n in range(3)
    ] + [
        {
            "id": 9,
            "video": "clip",
            "conversations": [
                {"from": "human", "value": "<video>\nWhat happens?"},
                {"from": "gpt", "value": "nothing"},
            ],
        }
    ]
    file = folder / "data.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def test_stages_follow_each_other_and_end_in_a_folder_that_answers(internvl, tmp_path, capsys) -> None:
    data = tmp_path / "data"
    data.mkdir()
    file = annotated(data)
    sets = [
        f"data.meta={file}",
        f"data.root={data}",
        "data.max_tokens=512",
        "data.max_tiles=16",
        "data.min_frames=2",
        "data.max_frames=4",
        "steps=2",
        "batch=1",
        "accumulate=1",
        "data.buffer=2",
    ]
    first = apply_overrides(recipes.stage_a(), [*sets, f"model.path={internvl}", "model.max_length=512"])
    first = replace(first, model=replace(first.model, options=OPTIONS))
    a = fit(first, tmp_path / "a", "pvc/stage_a")
    tuned = apply_overrides(recipes.lora(), [*sets, f"model.path={a.path}", "model.max_length=512"])
    b = fit(tuned, tmp_path / "b", "pvc/lora")
    for to in ("hf", "gguf"):
        assert main(["convert", str(b.path), str(tmp_path / "hf"), "--to", to]) == 2
        assert "write it with --to pvc" in capsys.readouterr().err
    assert main(["convert", str(b.path), str(tmp_path / "pvc"), "--to", "pvc"]) == 0
    assert "pvc" in capsys.readouterr().out
    model = load_pvc(tmp_path / "pvc", dtype="float32")
    assert model.spec.repeats == 2
    for folder in (b.path, tmp_path / "pvc"):
        with pytest.raises(UsageError, match=r"is a PVC already.*leave out model\.options"):
            PVCModel(path=str(folder), options=OPTIONS).sizes()
    weights = a.load().weights
    name = "embedder.vision.layers.1.gate"
    trained = b.load().weights[name]
    assert trained.any()
    assert not torch.equal(trained, weights[name])
    torch.testing.assert_close(model.model.state_dict()[name], trained, rtol=1e-2, atol=1e-5)
    pair = (
        b.load().weights["trunk.layers.0.attn.out.lora_B"]
        @ b.load().weights["trunk.layers.0.attn.out.lora_A"]
    )
    source = dict(opened_source(internvl, OPTIONS).read())["trunk.layers.0.attn.out.weight"].float()
    got = model.model.state_dict()["trunk.layers.0.attn.out.weight"]
    torch.testing.assert_close(got, (source + 2 * pair).bfloat16().float())
    assert len(model.chat("Hi", max_new_tokens=2).token_ids) <= 2


def test_frozen_parts_may_be_bfloat16(internvl) -> None:
    model = PVCModel(
        path=str(internvl), options=OPTIONS, vision_dtype="bfloat16", language_dtype="bfloat16"
    ).build()
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds["embedder.vision.layers.1.attn.qkv.weight"] == torch.bfloat16
    assert kinds["embedder.vision.layers.1.temporal.qkv.weight"] == torch.float32
    assert kinds["embedder.connect.fc1.weight"] == torch.float32


def test_sizes_of_the_paper_are_counted_without_weights(capsys) -> None:
    assert set(PRESETS) == {"InternVL2-1B", "InternVL2-2B", "InternVL2-8B"}
    counts = {}
    for name in PRESETS:
        with torch.device("meta"):
            model = PVCModel(preset=name).blank()
        counts[name] = sum(p.numel() for p in model.parameters())
    assert counts["InternVL2-8B"] == pytest.approx(8.16e9, rel=0.01)
    assert counts["InternVL2-2B"] == pytest.approx(2.26e9, rel=0.02)
    assert counts["InternVL2-1B"] == pytest.approx(1.0e9, rel=0.05)
    assert main(["train", "pvc/stage_a_1b", "--dry-run", "--json", "--set", "data.meta="]) == 0
    said = json.loads(capsys.readouterr().out)
    assert 50e6 < said["trained"] < 100e6
    with pytest.raises(ConfigError, match="no preset is called 'InternVL2-3B'"):
        preset("InternVL2-3B")


def test_names_of_the_old_encoder_are_all_that_an_internvit_has(internvl) -> None:
    from fnmatch import fnmatchcase

    from chiasm.parts.vision.internvit import InternViT

    model = PVCModel(path=str(internvl), options=OPTIONS)
    old = {f"embedder.vision.{name}" for name in InternViT(model.sizes().vision).state_dict()}
    named = {n for n, _ in model.build().named_parameters() if any(fnmatchcase(n, p) for p in OLD_VISION)}
    assert named == old


@pytest.mark.slow
def test_chiasm_mini_becomes_a_pvc(tmp_path) -> None:
    recipe = replace(recipes.mini(), steps=1, batch=2, accumulate=1, eval_every=0)
    recipe = apply_overrides(recipe, ["data.size=20"])
    run = fit(recipe, tmp_path)
    assert (run.path / "metrics.jsonl").read_text().count('"loss"') == 1
    assert isinstance(recipe.objective, FinetuneObjective)


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tmp_path) -> None:
    """Processes share the temporal layers, too; one of them may have clips only, the other pictures only."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ["-m", "chiasm", "train", "pvc/debug", "--runs", str(tmp_path), "--until", "3", "--threads", "1"]
    many = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(port),
        *words,
        "--id",
        "two",
    ]
    for command in ([*words, "--id", "one"], many):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == 3
    assert two == pytest.approx(one, rel=1e-5)
    a, b = (RunFolder.open(tmp_path / name).load().weights for name in ("one", "two"))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-4, atol=1e-6)
