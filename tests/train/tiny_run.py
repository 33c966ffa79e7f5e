"""A tiny recipe with everything that could spoil a resume: dropout, augmentation, accumulation, heads, buffers.

``main`` starts or resumes a run, for tests that do it in another process and kill that.
"""

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from chiasm.train.objective import Loss, Objective
from chiasm.train.recipe import Group, Optim, Recipe, Schedule
from chiasm.train.run import RunFolder
from chiasm.train.trainer import Trainer


@dataclass(frozen=True)
class Batch:
    x: torch.Tensor
    y: torch.Tensor

    def to(self, device):
        return self


class Blobs:
    sizes: ClassVar[Mapping[str, int]] = {"left": 13, "right": 29}
    weights: ClassVar[Mapping[str, float]] = {"left": 1.0, "right": 2.0}

    def __init__(self, slow=0.0, poison=-1):
        self.slow, self.poison, self.fetched = slow, poison, 0

    def fetch(self, draws, random):
        time.sleep(self.slow)
        self.fetched += 1
        x = torch.stack(
            [torch.linspace(0, 1, 6) * (i + 1) * (1 if f == "left" else -1) / 29 for f, i in draws]
        )
        if self.fetched == self.poison:
            x = x * float("nan")
        y = torch.tensor([0 if f == "left" else 1 for f, _ in draws])
        return Batch(x + 0.5 * torch.randn(x.shape, generator=random), y)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobData:
    slow: float = 0.0
    poison: int = -1

    def open(self):
        return Blobs(self.slow, self.poison)


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySpec:
    width: int = 8
    dropout: float = 0.2

    def build(self):
        return nn.Sequential(
            nn.Linear(6, self.width),
            nn.BatchNorm1d(self.width),
            nn.GELU(),
            nn.Dropout(self.dropout),
            nn.Linear(8, 4),
        )


class Classify(Objective):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def loss(self, model, batch):
        logits = self.head(model(batch.x))
        hits = (logits.argmax(-1) == batch.y).sum()
        total = F.cross_entropy(logits, batch.y, reduction="sum")
        return Loss(total=total, weight=float(len(batch.y)), metrics={"accuracy": (hits, len(batch.y))})

    def evaluate(self, model, source):
        x = torch.linspace(-1, 1, 12).view(2, 6)
        return {"gap": float((self.head(model(x))[0] - self.head(model(x))[1]).norm())}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifySpec:
    def build(self, model, source):
        return Classify()


def tiny(**changes) -> Recipe:
    settings = {
        "name": "tiny",
        "model": TinySpec(),
        "objective": ClassifySpec(),
        "data": BlobData(),
        "steps": 12,
        "batch": 6,
        "accumulate": 2,
        "optim": Optim(
            lr=0.03,
            groups=(Group(pattern="objective.*", lr_scale=0.5), Group(pattern="0.*", optimizer="muon")),
        ),
        "schedule": Schedule(warmup=3, final=0.1),
        "eval_every": 4,
        "save_every": 3,
        "seed": 7,
    }
    return Recipe(**{**settings, **changes})


def slow_tiny() -> Recipe:
    return tiny(data=BlobData(slow=0.01), steps=40, save_every=5)


def main(path: str, recipe: Recipe) -> None:
    torch.set_num_threads(1)
    folder = Path(path)
    known = (folder / "run.json").exists()
    run = RunFolder.open(folder) if known else RunFolder.create(folder.parent, recipe, run_id=folder.name)
    Trainer(recipe, run).fit()


def kill_at_random(path: str, kills: int) -> None:
    """Run ``slow_tiny`` in a child and kill it after some random time, again and again; print how far it came.

    The children are forked from a process that has imported everything already and computed nothing.
    """
    random, metrics, reached = torch.Generator().manual_seed(kills), Path(path) / "metrics.jsonl", []

    def rows() -> int:
        return metrics.read_text().count("loss") if metrics.exists() else 0

    for _ in range(kills):
        child = os.fork()
        if not child:
            main(path, slow_tiny())
            os._exit(0)
        # It repeats the steps since its last checkpoint, then goes a little further than the one before.
        goal = min(38, rows() + 1 + int(torch.randint(0, max(2, 30 // kills), (), generator=random)))
        deadline = time.monotonic() + 60
        while rows() < goal and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(
            0.02 * float(torch.rand((), generator=random))
        )  # also in the middle of a step or of a save
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reached.append(rows())
    print(json.dumps(reached))
