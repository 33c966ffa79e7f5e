"""The training table of InternVL 2.5 as data: seven sizes, stages 1, 1.5 and 2, and the second fine-tuning.

Source: InternVL 2.5 (2412.05271, Table 3 and section 4.5) and the release's scripts (`shell/internvl2.5`); fact sheet,
section 4. What those do not say, or say only in tokens, is marked here and is a field of the recipe that one can set.

No PyTorch here: `chiasm list` reads the names of the recipes from this module. `released.py` makes recipes of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CONTEXT", "PACKS", "RECIPES", "SIZES", "STAGE_TOKENS", "TILES", "Row", "Stage", "row"]

Stage = Literal["stage1", "stage15", "stage2", "sft", "lora"]

SIZES = {
    "1b": "InternVL2_5-1B",
    "2b": "InternVL2_5-2B",
    "4b": "InternVL2_5-4B",
    "8b": "InternVL2_5-8B",
    "26b": "InternVL2_5-26B",
    "38b": "InternVL2_5-38B",
    "78b": "InternVL2_5-78B",
}
"""Suffix of a recipe -> the release whose sizes it plans with (`presets.PRESETS`)."""

CONTEXT, TILES, PACKS = 16_384, 48, 512
"""Rows and tiles of a pack, and packs of a step (1024 in stage 1.5): one pack on each of 512 GPUs."""

STAGE_TOKENS = {
    "stage1": {"1b": 191, "2b": 277, "4b": 164, "8b": 22, "26b": 31, "38b": 107, "78b": 76},
    "stage15": {"8b": 76, "26b": 146},
    "stage2": {"1b": 176, "2b": 176, "4b": 88, "8b": 44, "26b": 44, "38b": 44, "78b": 44},
}
"""Billions of tokens of the paper. They are nominal: slots of packs, filled or not, in units of 2^20 tokens (44 B of
stage 2 are 5,500 steps of 512 packs of 16,384). Steps of stages 1 and 1.5 are computed from them."""

_STAGE_2_STEPS = {
    "1b": 22_000,
    "2b": 22_000,
    "4b": 11_000,
}  # 4, 4, 2 epochs; all larger ones 5,500, one epoch
_LARGE = ("26b", "38b", "78b")  # InternViT-6B


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cell of the table: what one stage of one size sets.

    `warmup` is steps, `warmup_ratio` a share of all; one of the two is 0.
    """

    stage: Stage
    size: str
    lr: float
    packs: int
    steps: int
    context: int = CONTEXT
    tiles: int = TILES
    drop_path: float = 0.0
    warmup: int = 0
    warmup_ratio: float = 0.0
    weight_decay: float = 0.05


def row(stage: Stage, size: str) -> Row:
    """The table's cell; `size` is a key of SIZES. There are stages 1.5 of 8b and 26b only."""
    drop = 0.4 if size in _LARGE else 0.1
    decay = 0.01 if size in ("1b", "2b", "4b") else 0.05
    if stage == "stage1":
        # Warm-up of 100 steps as the sheet has it. DropPath 0.
        return Row(
            stage=stage,
            size=size,
            lr=2e-4,
            packs=PACKS,
            steps=_steps(stage, size),
            warmup=100,
            weight_decay=decay,
        )
    if stage == "stage15":
        # Warm-up is not in the sheet: that of stage 1.
        steps = _steps(stage, size, 2 * PACKS)
        return Row(
            stage=stage,
            size=size,
            lr=1e-5,
            packs=2 * PACKS,
            steps=steps,
            drop_path=drop,
            warmup=100,
            weight_decay=decay,
        )
    rate = 2e-5 if size in _LARGE else 4e-5
    if stage == "stage2":
        steps = _STAGE_2_STEPS.get(size, 5500)
        return Row(
            stage=stage,
            size=size,
            lr=rate,
            packs=PACKS,
            steps=steps,
            drop_path=drop,
            warmup_ratio=0.03,
            weight_decay=decay,
        )
    # The second fine-tuning of users: 128 samples of at most 8192 tokens, not packed; its learning rates are 4e-5 or
    # 2e-5 (by size, as in stage 2: assumed). Here samples are packed, so a step of 16 packs shows about as many. LoRA's
    # scripts have batch 16. One epoch: the steps depend on the data, 1000 stands until they are set. DropPath 0 where
    # the encoder is frozen. Tiles of a pack are not limited by the scripts: 24 leave room for text in 8192 rows.
    return Row(
        stage=stage,
        size=size,
        lr=rate,
        packs=16 if stage == "sft" else 4,
        steps=1000,
        context=8192,
        tiles=24,
        warmup_ratio=0.03,
        weight_decay=decay,
    )


def _steps(stage: str, size: str, packs: int = PACKS) -> int:
    """Steps that make the paper's tokens."""
    return round(STAGE_TOKENS[stage][size] * 1e9 / (packs * CONTEXT / 2**20 * 1e6))


def _names() -> dict[str, str]:
    what = {
        "stage1": "Stage 1 of {}: the projector alone",
        "stage15": "Stage 1.5 of {}: encoder and projector",
        "stage2": "Stage 2 of {}: everything",
        "sft": "Second fine-tuning of {}: projector and language model",
        "lora": "Second fine-tuning of {} by adapters of rank 16 on the language model",
    }
    out = {}
    for stage, said in what.items():
        for size, release in SIZES.items():
            if stage != "stage15" or size in STAGE_TOKENS["stage15"]:
                out[f"{stage}_{size}"] = said.format(release)
    out["sft"] = "Fine-tune any checkpoint: projector and language model (set model.path and data.meta)"
    out["lora"] = (
        "Fine-tune any checkpoint by adapters of rank 16 on its language model (set model.path and data.meta)"
    )
    return out


RECIPES = _names()
"""Name of a recipe that this table makes -> what it is, one line."""
