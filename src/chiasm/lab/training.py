"""Short trainings for claims: a recipe through the real trainer, in a folder that nobody keeps."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from typing import Any

from chiasm.model.causal import CausalVLM
from chiasm.train.progress import Progress
from chiasm.train.recipe import Recipe
from chiasm.train.run import RunFolder
from chiasm.train.trainer import Trainer

__all__ = ["train_rig"]


def train_rig(
    recipe: Recipe, *, every: int = 0, look: Callable[[CausalVLM], None] | None = None
) -> tuple[CausalVLM, list[dict[str, Any]]]:
    """Run a recipe in a folder that is thrown away; return the model in eval mode and the measured rows.

    ``look`` is called with the model after every ``every`` steps and after the last; it changes nothing of the run.

    Raises:
        KeyboardInterrupt: the run was asked to stop (the trainer turns signals into a clean stop).
    """
    stops = [*range(every, recipe.steps, every), recipe.steps] if every and look else [recipe.steps]
    with tempfile.TemporaryDirectory(prefix="chiasm-rig-") as folder:
        run = RunFolder.create(folder, recipe, run_id="run")
        trainer = Trainer(recipe, run, progress=Progress(recipe.steps, io.StringIO()))
        model = trainer.model
        assert isinstance(model, CausalVLM)
        for stop in stops:
            trainer.fit(until=stop)
            if trainer.step < stop:
                raise KeyboardInterrupt
            if look is not None:
                look(model.eval())
        rows = run.metrics()
    return model.eval(), rows
