"""Recipes of the released models: the paper's table, the chain of stages, and what a run becomes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.checkpoint import random_checkpoints as made
from tests.systems.tiny_training import checkpoint, small, words
from torch import nn

from chiasm.checkpoint.convert import convert_part
from chiasm.cli.train import find_recipe
from chiasm.errors import CheckpointError, ConfigError, DataError, UsageError
from chiasm.model.train_cost import nominal_tokens, parameter_lines
from chiasm.systems.internvl import recipes
from chiasm.systems.internvl.data import MetaData
from chiasm.systems.internvl.load import load_folder
from chiasm.systems.internvl.model import build_internvl
from chiasm.systems.internvl.nodes import FromCheckpoint, FromParts, drafted, encoder_of, export_run
from chiasm.systems.internvl.presets import PRESETS, parameters
from chiasm.systems.internvl.released import released
from chiasm.systems.internvl.table import CONTEXT, RECIPES, SIZES, STAGE_TOKENS, row
from chiasm.systems.internvl.training_plan import job_of
from chiasm.train.data import open_data
from chiasm.train.optim import trainable
from chiasm.train.prepare import prepare
from chiasm.train.recipe import Recipe, apply_overrides, resolved
from chiasm.train.run import RunFolder
from chiasm.train.trainer import Trainer

# --- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes.__all__)
def test_every_recipe_is_a_tree_of_plain_data(name: str) -> None:
    recipe = find_recipe(f"internvl/{name}")()
    assert isinstance(recipe, Recipe)
    assert json.loads(json.dumps(resolved(recipe)))["name"] == name.replace("_", "-")


@pytest.mark.parametrize(("stage", "size"), [(s, z) for s, sizes in STAGE_TOKENS.items() for z in sizes])
def test_the_papers_tokens_are_reproduced(stage: str, size: str) -> None:
    cell = row(stage, size)
    billions = nominal_tokens(cell.steps, cell.packs, cell.context) / 1e9
    assert round(billions) == STAGE_TOKENS[stage][size]
    recipe = released(f"{stage}_{size}")
    job, _ = job_of(recipe, gpus=512)
    assert nominal_tokens(recipe.steps, recipe.batch, job.rows) / 1e9 == billions
    # 512 GPUs hold one pack each; stage 1.5 has two of them a step.
    assert job.turns == (2 if stage == "stage15" else 1)
    assert (job.rows, job.tiles) == (CONTEXT, 48)


def test_the_papers_settings() -> None:
    """Typed from the fact sheet, apart from the table."""
    expected = {
        "stage1_1b": (2e-4, 512, 0.0, 100, 0.0, 0.01),
        "stage1_78b": (2e-4, 512, 0.0, 100, 0.0, 0.05),
        "stage15_8b": (1e-5, 1024, 0.1, 100, 0.0, 0.05),
        "stage15_26b": (1e-5, 1024, 0.4, 100, 0.0, 0.05),
        "stage2_4b": (4e-5, 512, 0.1, 0, 0.03, 0.01),
        "stage2_8b": (4e-5, 512, 0.1, 0, 0.03, 0.05),
        "stage2_26b": (2e-5, 512, 0.4, 0, 0.03, 0.05),
    }
    for name, (lr, batch, drop, warmup, ratio, decay) in expected.items():
        recipe = released(name)
        found = (
            recipe.optim.lr,
            recipe.batch,
            recipe.drop_path,
            recipe.schedule.warmup,
            recipe.schedule.warmup_ratio,
        )
        assert found == (lr, batch, drop, warmup, ratio), name
        assert recipe.optim.weight_decay == decay
        assert (recipe.optim.beta1, recipe.optim.beta2, recipe.optim.eps) == (0.9, 0.999, 1e-8)
        assert recipe.data.loss_power == 0.5
        assert recipe.schedule.kind == "cosine"
        assert recipe.compute == "bfloat16"
    steps = {size: released(f"stage2_{size}").steps for size in SIZES}
    assert steps == {"1b": 22000, "2b": 22000, "4b": 11000} | dict.fromkeys(("8b", "26b", "38b", "78b"), 5500)
    assert {name for name in RECIPES if name.startswith("stage15")} == {"stage15_8b", "stage15_26b"}
    assert released("lora_8b").lora.rank == 16
    assert released("lora_8b").lora.strength == 32
    assert released("sft_8b").model.max_tiles == 6


ALL_SIZES = [f"stage2_{size}" for size in SIZES]


@pytest.mark.parametrize("name", [*ALL_SIZES, "stage1_1b", "stage15_26b", "sft_4b", "lora_8b", "lora_38b"])
def test_parameters_are_those_of_the_release(name: str) -> None:
    recipe = released(name)
    config = PRESETS[SIZES[name.partition("_")[2]]].config
    assert recipe.model.outline().language == config.language
    job, notes = job_of(recipe, gpus=1)
    own = sum(line.value for part, line in parameter_lines(job).items() if part not in ("adapters", "total"))
    assert own == sum(parameters(config).values())
    assert not any("planned as if" in note for note in notes)
    with torch.device("meta"):
        model = prepare(build_internvl(recipe.model.outline()), replace(recipe, drop_path=None))
    trained = trainable(model, nn.Module(), recipe.optim)
    assert job.trained == sum(math.prod(p.shape) for p in trained.values())


# --- what is not set ----------------------------------------------------------------------------------------------


def test_what_is_not_set_is_said_in_one_line(tmp_path: Path) -> None:
    for name, words_ in (("sft", "model.path is not set"), ("stage1_8b", "model.vision is not set")):
        with pytest.raises(UsageError, match=words_):
            find_recipe(f"internvl/{name}")().model.build()
    with pytest.raises(DataError, match=r"data.meta is not set: .*--set data.meta=FILE"):
        open_data(released("stage2_8b"))
    with pytest.raises(DataError, match="there is no file"):
        open_data(apply_overrides(released("stage2_8b"), [f"data.meta={tmp_path / 'none.json'}"]))
    with pytest.raises(UsageError, match=r"model\.preset"):
        released("sft").model.outline()
    with pytest.raises(ConfigError, match="min_frames"):
        MetaData(min_frames=9, max_frames=8)
    with pytest.raises(UsageError, match=r"no recipe 'stage2_7b', did you mean 'stage2_"):
        find_recipe("internvl/stage2_7b")
    with pytest.raises(ConfigError, match="do not divide among 7"):
        job_of(released("stage2_8b"), gpus=7)


# --- runs ---------------------------------------------------------------------------------------------------------


def run_of(recipe: Recipe, folder: Path) -> Trainer:
    run = RunFolder.create(folder.parent, recipe, run_id=folder.name, reference="internvl/sft")
    trainer = Trainer(recipe, run)
    assert trainer.fit().finished
    return trainer


def same_logits(trainer: Trainer, folder: Path) -> None:
    """The folder answers as the trained model does, and not as one that did not train."""
    chat = load_folder(folder, dtype="float32")
    noise = np.random.default_rng(3).integers(0, 256, (28, 56, 3), dtype=np.uint8)
    asked = chat.inputs(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.fromarray(noise)},
                    {"type": "text", "text": "?"},
                ],
            }
        ]
    )
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model.head.logits(trainer.model.hidden(asked.sequence))
    torch.testing.assert_close(chat.logits(asked), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "to", "family"),
    [
        ("stage2_1b", "hf", "qwen2"),
        ("sft", "original", "internlm2"),
        ("lora", "hf", "internlm2"),
        ("lora", "original", "qwen2"),
    ],
)
def test_a_checkpoint_is_tuned_and_written_back(tmp_path, monkeypatch, name, to, family) -> None:
    base = checkpoint(tmp_path / "base", monkeypatch, family)
    recipe = small(released(name), model={"path": str(base), "preset": ""})
    trainer = run_of(recipe, tmp_path / "run")
    report = export_run(tmp_path / "run", tmp_path / "out", to)
    assert report.notes[0] == "the model of the run run after 3 steps"
    same_logits(trainer, tmp_path / "out")
    before, after = (
        load_folder(folder, dtype="float32").model.state_dict() for folder in (base, tmp_path / "out")
    )
    changed = {
        key.split(".")[1] if key.startswith("embedder") else key.split(".")[0]
        for key in before
        if not torch.equal(before[key], after[key])
    }
    expected = {
        "stage2_1b": {"vision", "connect", "words", "trunk", "head"},
        "sft": {"connect", "words", "trunk", "head"},
        "lora": {"trunk"},
    }
    assert changed == expected[name]


@pytest.mark.parametrize("untie", [True, False])
@pytest.mark.parametrize("name", ["sft", "sft_1b", "lora", "stage2_1b"])
def test_a_model_with_tied_words_is_tuned(tmp_path, monkeypatch, name, untie) -> None:
    """As Qwen2.5-0.5B and 3B have them: the chain from their parts ends where that of others ends."""
    vision = checkpoint(tmp_path / "vision", monkeypatch)
    language = words(tmp_path / "words", monkeypatch, tied=True)
    run_of(
        small(
            released("stage1_1b"), model={"vision": str(vision), "language": str(language), "untie": untie}
        ),
        tmp_path / "one",
    )
    recipe = small(released(name), model={"path": str(tmp_path / "one"), "preset": ""})
    trainer = run_of(recipe, tmp_path / "two")
    assert ("embedder.words.weight" in trainer.parameters) == (name != "lora")
    assert ("head.weight" in trainer.parameters) == (name != "lora" and untie)
    job, _ = job_of(replace(recipe, data=released(name).data))
    assert job.trained == sum(p.numel() for p in trainer.parameters.values())
    export_run(tmp_path / "two", tmp_path / "out", "original")
    same_logits(trainer, tmp_path / "out")


def test_the_chain_of_stages(tmp_path, monkeypatch) -> None:
    """Parts, stage 1, stage 1.5 from its run, stage 2 from that; the encoder then goes to another language model."""
    whole = checkpoint(tmp_path / "whole", monkeypatch)
    convert_part(whole, tmp_path / "vit", "vision")
    language = words(tmp_path / "words", monkeypatch, "internlm2")
    parts = {"vision": str(tmp_path / "vit"), "language": str(language), "preset": "", "max_tiles": 2}
    first = run_of(small(released("stage1_8b"), model=parts), tmp_path / "stage1")
    assert all(name.startswith("embedder.connect.") for name in first.parameters)
    export_run(tmp_path / "stage1", tmp_path / "out1", "original")
    same_logits(first, tmp_path / "out1")

    second = run_of(
        small(released("stage15_8b"), model={"path": str(tmp_path / "stage1"), "preset": ""}),
        tmp_path / "stage15",
    )
    assert {name.split(".")[1] for name in second.parameters} == {"vision", "connect"}
    third = run_of(
        small(released("stage2_8b"), model={"path": str(tmp_path / "stage15"), "preset": ""}),
        tmp_path / "stage2",
    )
    export_run(tmp_path / "stage2", tmp_path / "out2", "hf")
    same_logits(third, tmp_path / "out2")

    # Progressive scaling: from the run itself.
    trained = {
        name: p.detach() for name, p in third.model.named_parameters() if name.startswith("embedder.vision.")
    }
    large = FromParts(
        vision=str(tmp_path / "stage2"), language=str(words(tmp_path / "other", monkeypatch, "llama", tied=True)),
        vision_dtype="float32", language_dtype="float32",
    )  # fmt: skip
    state = dict(large.build().named_parameters())
    for name, value in trained.items():
        torch.testing.assert_close(state[name], value)
    moved = FromCheckpoint(path=str(whole), vision_from=str(tmp_path / "stage2")).build()
    torch.testing.assert_close(
        moved.get_parameter("embedder.vision.layers.0.ls1"), trained["embedder.vision.layers.0.ls1"]
    )


def test_an_encoder_of_another_size_is_refused(tmp_path, monkeypatch) -> None:
    whole = checkpoint(tmp_path / "whole", monkeypatch)
    config = json.loads((whole / "config.json").read_text())
    config["vision_config"]["image_size"] = 56
    (whole / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="position_embedding"):
        encoder_of(whole)
    other = checkpoint(tmp_path / "other", monkeypatch, seed=1)
    monkeypatch.setattr(made, "V_LAYERS", 3)
    deep = checkpoint(tmp_path / "deep", monkeypatch)
    with pytest.raises(ConfigError, match=r"3 layers of 8.* does not fit the model's .2 layers"):
        FromCheckpoint(path=str(other), vision_from=str(deep)).build()


def test_a_run_that_began_with_no_checkpoint_is_no_checkpoint(tmp_path, monkeypatch) -> None:
    other = checkpoint(tmp_path / "other", monkeypatch)
    debug = replace(find_recipe("internvl/debug")(), steps=1, save_every=1, eval_every=0)
    folder = RunFolder.create(tmp_path, debug, run_id="debug")
    Trainer(debug, folder).fit()
    with pytest.raises(ConfigError, match="does not say how large its encoder is"):
        FromCheckpoint(path=str(other), vision_from=str(folder.path)).build()
    with pytest.raises(UsageError, match="began with no checkpoint"):
        drafted(folder.path)


def test_frozen_parts_may_be_kept_in_bfloat16(tmp_path, monkeypatch) -> None:
    base = checkpoint(tmp_path / "base", monkeypatch)
    recipe = small(released("lora"), model={"path": str(base)})
    kept = {"vision_dtype": "bfloat16", "language_dtype": "bfloat16"}
    recipe = replace(recipe, model=replace(recipe.model, **kept), compute="bfloat16")
    trainer = run_of(recipe, tmp_path / "run")
    kinds = {p.dtype for name, p in trainer.model.named_parameters() if name not in trainer.parameters}
    assert kinds == {torch.bfloat16, torch.float32}  # the projector stays in float32
    assert {p.dtype for p in trainer.parameters.values()} == {torch.float32}
    export_run(tmp_path / "run", tmp_path / "out", "original")
    before, after = (load_folder(f, dtype="float32").model.state_dict() for f in (base, tmp_path / "out"))
    # What stays is taken from the checkpoint, not from the rounded copy that was trained beside.
    assert torch.equal(before["embedder.words.weight"], after["embedder.words.weight"])
    assert not torch.equal(before["trunk.layers.0.attn.qkv.weight"], after["trunk.layers.0.attn.qkv.weight"])


def test_convert_writes_runs_and_says_what_it_cannot(tmp_path, monkeypatch, capsys) -> None:
    from chiasm.cli.app import main

    base = checkpoint(tmp_path / "base", monkeypatch)
    run_of(small(released("lora"), model={"path": str(base)}), tmp_path / "run")
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "hf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["source"], report["target"]) == ("run", "hf")
    assert main(["show", str(tmp_path / "out")]) == 0
    for more, said in (
        (["--to", "gguf"], "write it with --to original, hf or hf-old first"),
        (["--to", "hf", "--vocab-size", "900"], "--vocab-size changes a checkpoint"),
    ):
        assert main(["convert", str(tmp_path / "run"), str(tmp_path / "no"), *more]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "no").exists()
