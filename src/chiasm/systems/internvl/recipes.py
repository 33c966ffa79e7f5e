"""Training recipes of the InternVL system.

``mini_distill`` gives the bundled model its eyes.
"""

from __future__ import annotations

from chiasm.parts.vision.internvit import internvit_mini
from chiasm.train.distill import DistillData, DistillObjective, StudentSpec
from chiasm.train.recipe import Optim, Recipe, Schedule

__all__ = ["mini_distill"]


def mini_distill() -> Recipe:
    """Stage 1 of chiasm-mini: InternViT from scratch, taught by EfficientNet-Lite0 and by labels."""
    return Recipe(
        name="mini-distill",
        model=StudentSpec(vision=internvit_mini()),
        objective=DistillObjective(),
        data=DistillData(),
        steps=3000,
        batch=64,
        optim=Optim(lr=1e-3, weight_decay=0.05, beta2=0.99, clip=1.0),
        schedule=Schedule(kind="cosine", warmup=150, final=0.01),
        compute="bfloat16",
        eval_every=500,
        save_every=250,
        keep_last=2,
    )
