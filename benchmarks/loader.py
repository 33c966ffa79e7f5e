"""The loader: what data on disk cost, and how long a training run waits for them.

240 JPEGs of 800 x 600 on disk, each a question and an answer of log-normal length (median 60 words), read through
`PackedData`: JSONL by index, decoded, cut into tiles of 448 pixels, compressed anew tile by tile (JPEG 75 to 100, as
the release trains), packed into 4,096 tokens.

- "Loading alone": CPU milliseconds a tile, everything included, in one thread and without any model.
- "Waiting": the share of a run's wall time in which the trainer had no data, an encoder of four layers (width 192, 448
  pixels) and a decoder of four (width 192), with one loading thread beside it. On a GPU steps are far shorter, so the
  first figure says how many loading threads a GPU needs: tiles a second of the step over tiles a second of a thread.

No peer: the peer's loop has no loader of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import HERE, compare, finish
from PIL import Image

sys.path.insert(0, str(HERE.parent / "tests"))

from chiasm.media.tiles import TilePolicy
from chiasm.model.causal import CausalVLM
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.model import build_internvl
from chiasm.train.feed import open_feed
from chiasm.train.packed import PackedData, TokenizerLayout
from chiasm.train.progress import Progress
from chiasm.train.recipe import Optim, Recipe
from chiasm.train.run import RunFolder
from chiasm.train.sft import FinetuneObjective
from chiasm.train.trainer import Trainer
from tiny_tokenizers import byte_level

SIDE = 448
LIMIT = 0.05


def write_data(folder: Path, *, pictures: int, words: int = 60) -> Path:
    """JPEGs and a meta file that names them."""
    random = np.random.default_rng(0)
    rows = []
    for n in range(pictures):
        coarse = random.integers(0, 256, (15, 20, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((800, 600), Image.Resampling.BICUBIC)
        grain = np.asarray(image, np.int16) + random.integers(-12, 13, (600, 800, 1))
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(folder / f"{n}.jpg", quality=90)
        answer = "a cat and a dog " * max(1, round(float(random.lognormal(np.log(words), 0.9)) / 5))
        talk = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": answer.strip()},
        ]
        rows.append({"id": n, "image": f"{n}.jpg", "conversations": talk})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = {"pictures": {"root": str(folder), "annotation": str(folder / "rows.jsonl"), "data_augment": True}}
    (folder / "meta.json").write_text(json.dumps(sets))
    byte_level().save(folder / "tokenizer")
    return folder / "meta.json"


def config(side: int) -> InternVLConfig:
    return InternVLConfig(
        vision=InternViTConfig(
            hidden_size=192, intermediate_size=768, layers=4, heads=3, patch_size=side // 32, image_size=side
        ),
        language=LanguageConfig(
            family="qwen2",
            vocab_size=byte_level().vocab_size,
            hidden_size=192,
            intermediate_size=768,
            layers=4,
            heads=3,
            kv_heads=1,
            head_dim=64,
            tie_words=True,
        ),
        tiles=TilePolicy(image_size=side, max_tiles=6),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Random weights."""

    side: int

    def build(self) -> CausalVLM:
        return build_internvl(config(self.side), generator=torch.Generator().manual_seed(0))


def recipe_of(meta: Path, *, side: int, steps: int) -> Recipe:
    own = TokenizerLayout(
        folder=str(meta.parent / "tokenizer"), tiles=config(side).tiles, tokens_per_tile=256, system=""
    )
    return Recipe(
        name="loader",
        model=Model(side=side),
        objective=FinetuneObjective(),
        data=PackedData(layout=own, meta=str(meta), max_tokens=4096, max_tiles=12),
        steps=steps,
        batch=1,
        optim=Optim(lr=1e-4),
        save_every=steps,
        log_every=1,
    )


def loading(meta: Path, *, side: int, packs: int) -> list[float]:
    """CPU milliseconds a tile of each pack."""
    recipe = recipe_of(meta, side=side, steps=packs)
    with tempfile.TemporaryDirectory() as folder:
        feed = open_feed(recipe.data.open(), recipe, RunFolder.create(folder, recipe, run_id="run"))
        found = []
        for step in range(packs):
            (handle,) = feed.plan(step)
            begin = time.process_time()
            batch = feed.load(handle, step=step, part=0)
            assert batch is not None
            found.append(1e3 * (time.process_time() - begin) / len(batch.media["image"]))
    return found[1:]


def waiting(meta: Path, *, side: int, steps: int) -> list[float]:
    """The share of each step's wall time that was waited for data, but for the first two."""
    recipe = recipe_of(meta, side=side, steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(folder, recipe, run_id="run")
        Trainer(recipe, run, progress=Progress(steps, io.StringIO())).fit()
        rows = [row for row in run.metrics() if "seconds" in row][2:]
    return [100 * row["wait_seconds"] / row["seconds"] for row in rows]


def measure(*, toy: bool = False) -> dict[str, Any]:
    """Both rows."""
    side = 64 if toy else SIDE
    with tempfile.TemporaryDirectory() as name:
        meta = write_data(Path(name), pictures=40 if toy else 240)
        alone = loading(meta, side=side, packs=3 if toy else 12)
        waited = waiting(meta, side=side, steps=4 if toy else 10)
    mean = sum(waited) / len(waited)
    rows = [
        compare("loading alone, one thread, per tile of 448 pixels", None, alone),
        compare(
            "share of a run that waits for data",
            None,
            [mean],
            unit="%",
            required="< 5 %",
            ok=mean < 100 * LIMIT,
            note=f"mean of {len(waited)} steps",
        ),
    ]
    return {"rows": rows, "remark": "JPEG pictures of 800 x 600, cut, compressed anew and packed."}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the result and rebuild the README's table")
    parser.add_argument("--toy", action="store_true", help="try the script out; nothing is kept")
    options = parser.parse_args()
    if options.write and options.toy:
        parser.error("--toy measures nothing worth keeping: leave out --write")
    torch.set_num_threads(1)
    finish("loader", measure(toy=options.toy), write=options.write)


if __name__ == "__main__":
    main()
