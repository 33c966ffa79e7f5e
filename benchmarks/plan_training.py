"""`chiasm plan` of a training step against real steps: peak bytes of tensors, planned and measured.

Small runs of the trainer on the CPU in float32, the second step of each: text-heavy, tile-heavy, adapters on a frozen
model, and one in the widths of chiasm-mini. `chiasm.model.alive.LiveBytes` follows every storage that PyTorch's
operations make; the peak is read when a step has been measured, before its checkpoint is written.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from measure import HERE, compare, finish

sys.path.insert(0, str(HERE.parent))  # `tests` is found beside this folder

from tests.model.test_train_cost import ADAPTERS, CONFIG, TEXT, TILES, packed

from chiasm.data.sequence import Sequence as Row
from chiasm.media.tiles import TilePolicy
from chiasm.model.alive import LiveBytes
from chiasm.model.causal import CausalVLM
from chiasm.model.train_memory import memory_lines
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import internvit_mini
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.model import build_internvl
from chiasm.systems.internvl.training_plan import job_of
from chiasm.train.progress import Progress
from chiasm.train.recipe import Lora, Optim, Recipe
from chiasm.train.run import RunFolder
from chiasm.train.sft import FinetuneObjective
from chiasm.train.trainer import Trainer

LIMIT = 0.10
RUNS = {
    "text-heavy": (tuple(2 * n for n in TEXT[0]), TEXT[1], False),
    "tile-heavy": (*TILES, False),
    "adapters on a frozen model": (*TEXT, True),
    "short documents, widths of chiasm-mini": ((120, 90, 60, 80), (1, 1, 1, 1), False),
}
MINI = InternVLConfig(
    vision=internvit_mini(),
    language=LanguageConfig(
        family="llama",
        vocab_size=49_161,
        hidden_size=576,
        intermediate_size=1536,
        layers=4,
        heads=9,
        kv_heads=3,
        head_dim=64,
        tie_words=True,
    ),
    tiles=TilePolicy(image_size=64, max_tiles=1, thumbnail=False, dynamic=False),
)
CONFIGS = {name: MINI if "mini" in name else CONFIG for name in RUNS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Random weights."""

    run: str

    def build(self) -> CausalVLM:
        return build_internvl(self.outline(), generator=torch.Generator().manual_seed(0))

    def outline(self) -> InternVLConfig:
        return CONFIGS[self.run]


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The same documents in every step."""

    run: str

    def open(self) -> Documents:
        lengths, tiles, _ = RUNS[self.run]
        return Documents(packed(CONFIGS[self.run], lengths, tiles))


class Documents:
    sizes: ClassVar[Mapping[str, int]] = {"all": 1}
    weights: ClassVar[Mapping[str, float]] = {"all": 1.0}

    def __init__(self, batch: Row) -> None:
        self.batch = batch

    def fetch(self, draws: Sequence[tuple[str, int]], random: torch.Generator) -> Row:
        return self.batch


class Watched(RunFolder):
    """Notes the peak of each step when its metrics come in."""

    alive: LiveBytes

    def measure(self, row: Mapping[str, Any]) -> None:
        super().measure(row)
        if "loss" in row:
            self.peaks = [*getattr(self, "peaks", []), self.alive.peak]
            self.alive.restart()


def recipe_of(name: str) -> Recipe:
    adapters = RUNS[name][2]
    return Recipe(
        name=name.replace(" ", "-").replace(",", ""),
        model=Model(run=name),
        objective=FinetuneObjective(),
        data=Data(run=name),
        steps=3,
        batch=1,
        optim=Optim(lr=1e-4, train=("*.lora_A", "*.lora_B") if adapters else ()),
        lora=Lora(rank=ADAPTERS.rank if adapters else 0, dropout=0.0),
    )


def peaks(name: str) -> tuple[float, float]:
    """Planned and measured bytes of one step."""
    recipe = recipe_of(name)
    with tempfile.TemporaryDirectory() as folder:
        RunFolder.create(folder, recipe, run_id="run")
        run = Watched(Path(folder) / "run")
        trainer = Trainer(recipe, run, loaders=0, progress=Progress(recipe.steps, open("/dev/null", "w")))  # noqa: SIM115
        batch = trainer.source.batch
        rows = (batch.ids_T, batch.kind_T, batch.doc_T, batch.pos_T, batch.labels_T, batch.weight_T)
        with LiveBytes(
            [*trainer.model.parameters(), *rows, *(m.data for m in batch.media.values())]
        ) as run.alive:
            trainer.fit()
    job, _ = job_of(recipe, cuda=False)
    return memory_lines(job)["peak"].value, run.peaks[1]


def measure() -> dict[str, Any]:
    rows = []
    for name in RUNS:
        planned, measured = peaks(name)
        share = planned / measured
        rows.append(
            compare(
                f"planned peak of a training step / measured, {name}",
                None,
                [share],
                unit="x",
                required="within 10%",
                ok=abs(share - 1) <= LIMIT,
                note=f"{measured / 1e6:.1f} MB measured",
            )
        )
    sizes = "; ".join(
        f"encoder {c.vision.layers} x {c.vision.hidden_size}, decoder {c.language.layers} x {c.language.hidden_size}, "
        f"vocabulary {c.language.vocab_size:,}"
        for c in (CONFIG, MINI)
    )
    remark = (
        f"{sizes} (the last row). float32, CPU; bytes of live storages in the second step of the trainer."
    )
    return {"rows": rows, "remark": remark}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the result and rebuild the README's table")
    torch.set_num_threads(1)
    finish("plan_training", measure(), write=parser.parse_args().write)


if __name__ == "__main__":
    main()
