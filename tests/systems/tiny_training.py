"""Tiny checkpoints on disk and a data set in memory, for recipes that begin with weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from tests.checkpoint import random_checkpoints as made

from chiasm.data.layout import LayoutSpec, layout
from chiasm.data.sequence import Sequence as Row
from chiasm.train.recipe import Recipe
from tiny_tokenizers import byte_level

WORDS = byte_level().vocab_size


def _tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    return {name: 0.2 * x for name, x in made.random_tensors(shapes, torch.float32, seed).items()}


def checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, family: str = "qwen2", *, seed: int = 0, **changes
) -> Path:
    """An InternVL in the original layout, float32, with the byte tokenizer."""
    monkeypatch.setattr(made, "VOCAB", WORDS)
    config = made.original_config(family, torch_dtype="float32", **changes)
    made.write_folder(folder, config, _tensors(made.original_shapes(family), seed))
    byte_level().save(folder)
    return folder


def words(
    folder: Path, monkeypatch: pytest.MonkeyPatch, family: str = "qwen2", *, tied: bool = False
) -> Path:
    """A language model alone, likewise."""
    monkeypatch.setattr(made, "VOCAB", WORDS)
    shapes = made.language_shapes("model.", None if tied else "", family)
    made.write_folder(folder, made.language_config(family, tied=tied), _tensors(shapes, 5))
    byte_level().save(folder)
    return folder


class Questions:
    """Pictures of noise and what is said about them."""

    sizes: ClassVar[Mapping[str, int]] = {"seen": 6, "said": 4}
    weights: ClassVar[Mapping[str, float]] = {"seen": 1.0, "said": 1.0}

    def __init__(self, spec: LayoutSpec) -> None:
        self.spec = spec

    def fetch(self, draws: Sequence[tuple[str, int]], random: torch.Generator) -> Row:
        return Row.pack([self.document(*draw) for draw in draws])

    def document(self, name: str, index: int) -> Row:
        noise = np.random.default_rng(index).integers(0, 256, (28, 28 * (1 + index % 2), 3), dtype=np.uint8)
        shown = [{"type": "image", "image": Image.fromarray(noise)}] if name == "seen" else []
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": [*shown, {"type": "text", "text": f"What is {index}?"}]},
            {"role": "assistant", "content": f"It is {index * index}."},
        ]
        return layout(turns, self.spec, train=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionData:
    """The node: laid out as the recipe's model says."""

    system: str = ""

    def open(self) -> Questions:
        raise AssertionError("open_for is to be called")

    def open_for(self, model: Any) -> Questions:
        return Questions(replace(model.layout(), system=self.system))


def small(recipe: Recipe, **changes) -> Recipe:
    """The recipe for three steps on a CPU in float32."""
    model = replace(
        recipe.model, vision_dtype="float32", language_dtype="float32", **changes.pop("model", {})
    )
    return replace(
        recipe,
        model=model,
        data=QuestionData(),
        steps=3,
        batch=4,
        accumulate=2,
        compute="float32",
        optim=replace(recipe.optim, lr=5e-3),
        schedule=replace(recipe.schedule, warmup=0, warmup_ratio=0.0),
        save_every=3,
        **changes,
    )
