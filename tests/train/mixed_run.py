"""The debug recipe with all that several processes could get wrong, and a way to run jobs in several of them.

Some documents have no picture, so some micro-batches have none; an objective of its own has a parameter that only
micro-batches with pictures use; some micro-batches cannot be read at all.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from chiasm.data.layout import layout
from chiasm.systems.internvl import recipes
from chiasm.train.feed import MixtureFeed
from chiasm.train.recipe import Optim, Recipe, apply_overrides
from chiasm.train.run import RunFolder
from chiasm.train.sft import ChatSource, Finetune
from chiasm.train.trainer import Trainer
from chiasm.worlds import CountingWorld

ROOT = Path(__file__).parents[2]


class MixedSource(ChatSource):
    """Every other document is text alone; parts of some steps are unreadable."""

    bad: tuple[tuple[int, int], ...] = ()

    def document(self, sample, image_SS3=None):
        if len(sample.question) % 2:
            return super().document(sample, image_SS3)
        turns = [
            {"role": "user", "content": sample.question},
            {"role": "assistant", "content": sample.answer},
        ]
        return layout(turns, self.spec, train=True)

    def feed(self, recipe, run):
        bad = self.bad

        class Holes(MixtureFeed):
            def load(self, handle, *, step, part):
                return None if (step, part) in bad else super().load(handle, step=step, part=part)

        return Holes(self, recipe)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedData:
    size: int = 60
    bad: tuple[tuple[int, int], ...] = ((1, 1), (2, 0), (2, 1), (2, 2), (2, 3), (4, 3))

    def open(self):
        spec = recipes.DebugData().open().spec
        worlds, dev = ({"counting": CountingWorld(split, size=self.size)} for split in ("train", "dev"))
        source = MixedSource(worlds, dev, {"counting": 1.0}, spec, mirrored=("counting",), dev_size=4)
        source.bad = self.bad
        return source


class Headed(Finetune):
    def __init__(self):
        super().__init__(dev_batch=4)
        self.scale = nn.Parameter(torch.ones(3))

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        if not batch.spans:
            return loss
        return replace(loss, total=loss.total * (1 + self.scale.mean()))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadedObjective:
    def build(self, model, source):
        return Headed()


def mixed(*overrides: str) -> Recipe:
    recipe = replace(
        recipes.debug(),
        name="mixed",
        data=MixedData(),
        objective=HeadedObjective(),
        steps=6,
        batch=8,
        accumulate=4,
        optim=Optim(lr=3e-3),
        checkpointing="all",
        eval_every=3,
        save_every=3,
    )
    return apply_overrides(recipe, overrides)


def run_jobs(jobs, processes=2):
    """Start processes that run jobs (folder, overrides, until) one after the other, together; return them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # Imported, not run as a script: a recipe names the module of its parts.
    code = "from tests.train.mixed_run import main; main()"
    command = [sys.executable, "-c", code, json.dumps([[str(f), list(o), u] for f, o, u in jobs])]
    started = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    return started


def finish(started):
    errors = [process.communicate(timeout=110)[1] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(errors)


def main():
    from chiasm.train.parallel import join, leave

    torch.set_num_threads(1)
    world = join()
    for folder, overrides, until in json.loads(sys.argv[1]):
        path, recipe = Path(folder), mixed(*overrides)
        if world.main and not (path / "run.json").exists():
            RunFolder.create(path.parent, recipe, run_id=path.name)
        world.share(None)
        Trainer(recipe, RunFolder.open(path), world=world).fit(until=until)
    leave(world)
