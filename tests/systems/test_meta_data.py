"""MetaData: a meta JSON becomes packed data, laid out as the recipe's model reads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tests.systems.tiny_training import checkpoint, small

from chiasm.systems.internvl.data import MetaData, ModelLayout
from chiasm.systems.internvl.released import released
from chiasm.train.run import RunFolder


def test_the_layout_is_the_models_with_the_weights_of_the_loss(tmp_path, monkeypatch) -> None:
    model = small(
        released("sft"), model={"path": str(checkpoint(tmp_path, monkeypatch)), "max_length": 96}
    ).model
    spec = ModelLayout(model=model, loss_power=1.0).layout()
    assert (spec.loss_power, spec.max_length, spec.frame_tags) == (1.0, 96, "training")
    assert spec.template.name == "internvl2_5"
    assert spec.tiles.max_tiles == 6  # of the scripts for users, not the checkpoint's 12
    assert spec.tokens_per_tile == model.outline().tokens_per_tile == 1


def test_a_run_on_a_meta_file(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("chiasm.train.packed", reason="needs the packed data of the train ring")
    from chiasm.train.trainer import Trainer

    rows = []
    for n in range(12):
        Image.new("RGB", (56, 28), (20 * n, 0, 0)).save(tmp_path / f"{n}.png")
        said = [{"from": "human", "value": "<image>\nHow red?"}, {"from": "gpt", "value": str(20 * n)}]
        rows.append({"id": n, "image": f"{n}.png", "conversations": said})
    (tmp_path / "red.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    meta = {"red": {"root": str(tmp_path), "annotation": str(tmp_path / "red.jsonl"), "data_augment": True}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    recipe = small(released("sft"), model={"path": str(checkpoint(tmp_path / "base", monkeypatch))})
    recipe = replace(recipe, data=MetaData(meta=str(tmp_path / "meta.json"), max_tokens=512, max_tiles=12))
    run = RunFolder.create(tmp_path / "runs", recipe, run_id="run")
    assert Trainer(recipe, run).fit().finished
    assert [row["step"] for row in run.metrics() if "loss" in row] == [1, 2, 3]
