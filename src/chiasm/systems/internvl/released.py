"""Recipes of the released models: what `table.py` says, as complete trees.

Source: InternVL 2.5 (2412.05271, Table 3) and its scripts; fact sheet, section 4. The chain of a size:

    stage 1  projector     an InternViT and a chat language model are put together (`FromParts`)
    stage 1.5 + encoder    goes on with the run of stage 1 (8B and 26B only)
    stage 2  everything    goes on with the run before
    sft, lora              go on with any checkpoint

Progressive scaling: the ViT of the 8B chain (InternViT-300M) serves 1B, 2B and 4B, that of the 26B chain (6B) serves
38B and 78B: name its run, `--set model.vision=runs/stage2-8b`, in the larger model's stage 1.
"""

from __future__ import annotations

from chiasm.systems.internvl import table
from chiasm.systems.internvl.data import MetaData
from chiasm.systems.internvl.nodes import FromCheckpoint, FromParts
from chiasm.train import freeze
from chiasm.train.recipe import Lora, Optim, Recipe, Schedule
from chiasm.train.sft import FinetuneObjective

__all__ = ["released"]

_LORA = 16
_ONE_TILE_BUDGET = 6
"""`max_dynamic_patch` of the scripts for users."""


def released(name: str) -> Recipe:
    """The recipe of a name in `table.RECIPES`, without ``internvl/``."""
    stage, _, size = name.partition("_")
    row = table.row(stage, size or "1b")  # type: ignore[arg-type]
    release = table.SIZES[size] if size else ""
    tuned = stage in ("sft", "lora")
    frozen = {
        "stage1": ("vision", "language"),
        "stage15": ("language",),
        "sft": ("vision",),
        "lora": ("vision", "language"),
    }
    kept = {f"{part}_dtype": "bfloat16" for part in frozen.get(stage, ())}
    if stage == "stage1":
        model = FromParts(preset=release, max_length=row.context)
    else:
        model = FromCheckpoint(
            preset=release,
            max_length=row.context,
            max_tiles=_ONE_TILE_BUDGET if tuned else None,
            **kept,  # type: ignore[arg-type]
        )
    train = {
        "stage1": freeze.stage_1(),
        "stage15": freeze.stage_1_5(),
        "stage2": freeze.stage_2(),
        # The scripts for users freeze the encoder and train projector and language model.
        "sft": freeze.trained(language=True)
        if size
        else ("embedder.connect.*", "embedder.words.*", "trunk.*", "head.*"),
        # Adapters alone; whether the scripts also train the projector beside them is not in the sheet.
        "lora": ("*.lora_A", "*.lora_B"),
    }[stage]
    return Recipe(
        name=name.replace("_", "-"),
        model=model,
        objective=FinetuneObjective(),
        data=MetaData(max_tokens=row.context, max_tiles=row.tiles),
        steps=row.steps,
        batch=row.packs,
        # A micro-batch is one pack, on one device after the other: 512 GPUs hold one each.
        accumulate=row.packs,
        optim=Optim(lr=row.lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=row.weight_decay, train=train),
        schedule=Schedule(kind="cosine", warmup=row.warmup, warmup_ratio=row.warmup_ratio),
        compute="bfloat16",
        checkpointing="all",
        drop_path=row.drop_path,
        lora=Lora(rank=_LORA if stage == "lora" else 0),
        save_every=200,
    )
