"""``chiasm convert --to bundle`` writes the model that was trained, or says that it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from chiasm.errors import UsageError


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    from chiasm.systems.internvl.recipes import mini_sft
    from chiasm.train.run import Checkpoint, RunFolder

    run = RunFolder.create(tmp_path, mini_sft(), run_id="sft", reference="internvl/mini_sft")
    weights = {"embedder.connect.norm.weight": torch.ones(3)}
    run.save(Checkpoint(step=7, weights=weights, optimizer={}, state={}))
    return run.path


def edit(run: Path, *path: str, value: object) -> None:
    """Change one value of the saved recipe."""
    content = json.loads((run / "run.json").read_text())
    tree = content["recipe"]
    for name in path[:-1]:
        tree = tree[name]
    assert path[-1] in tree
    tree[path[-1]] = value
    (run / "run.json").write_text(json.dumps(content))


def test_a_run_of_another_model_is_refused(trained: Path, tmp_path: Path) -> None:
    from chiasm.cli.convert import _bundle

    edit(trained, "model", "config", "lora_rank", value=16)
    with pytest.raises(UsageError, match=r"another model .*\(model\.config\.lora_rank: 16 -> 4\)") as caught:
        _bundle(trained, tmp_path / "out", force=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_rest_of_a_recipe_may_have_changed_since(trained: Path, tmp_path: Path) -> None:
    from chiasm.cli.convert import _bundle

    edit(trained, "steps", value=3)
    assert _bundle(trained, tmp_path / "out", force=False)["step"] == 7


def test_settings_of_the_run_are_part_of_its_model(tmp_path: Path) -> None:
    from chiasm.cli.convert import _bundle
    from chiasm.systems.internvl.mini import read_bundle
    from chiasm.systems.internvl.recipes import mini_sft
    from chiasm.train.recipe import apply_overrides
    from chiasm.train.run import Checkpoint, RunFolder

    overrides = ("model.config.lora_rank=2", "data.config.lora_rank=2")
    recipe = apply_overrides(mini_sft(), overrides)
    run = RunFolder.create(tmp_path, recipe, run_id="sft", reference="internvl/mini_sft", overrides=overrides)
    run.save(Checkpoint(step=1, weights={"a": torch.ones(3)}, optimizer={}, state={}))
    _bundle(run.path, tmp_path / "out", force=False)
    assert read_bundle(tmp_path / "out")[0].lora_rank == 2
