"""The trainer: exact resume, kill -9, signals, accumulation, groups, guards."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tests.train import tiny_run
from tests.train.tiny_run import BlobData, tiny
from torch import nn

from chiasm.errors import CheckpointError, ConfigError, UsageError
from chiasm.parts.contracts import LossPart
from chiasm.train.feed import MixtureFeed
from chiasm.train.objective import Loss, Objective
from chiasm.train.optim import make_optimizers, named_parameters, trainable
from chiasm.train.progress import Progress
from chiasm.train.recipe import Group, Optim, Schedule
from chiasm.train.run import CLOCKS, RunFolder
from chiasm.train.trainer import Trainer, TrainingError, build_parts


def quiet(recipe, folder, **options):
    known = (folder / "run.json").exists()
    run = RunFolder.open(folder) if known else RunFolder.create(folder.parent, recipe, run_id=folder.name)
    return Trainer(recipe, run, progress=Progress(recipe.steps, io.StringIO()), **options)


def curve(folder):
    """Metrics without the clocks."""
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in RunFolder.open(folder).metrics()]


def same_end(a: Path, b: Path):
    x, y = RunFolder.open(a).load(), RunFolder.open(b).load()
    assert x.step == y.step
    for mine, other in ((x.weights, y.weights), (x.optimizer, y.optimizer)):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_interrupted_equals_uninterrupted_to_the_bit(tmp_path):
    recipe = tiny()
    quiet(recipe, tmp_path / "whole").fit()
    for until in (1, 5, 6, None):
        torch.rand(3)  # somebody else draws from the global generator in between
        result = quiet(recipe, tmp_path / "parts").fit(until=until)
    assert result.finished
    assert result.scores == RunFolder.open(tmp_path / "whole").load().state["scores"]
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    same_end(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed process is forked")
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_and_resume_gives_the_same_curve(tmp_path, kills):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    code = (
        "import sys; from tests.train import tiny_run as t; t.kill_at_random(sys.argv[1], int(sys.argv[2]))"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "src")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", code, str(killed), str(kills)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    reached = json.loads(done.stdout)
    assert len(reached) == kills
    assert 0 < min(reached) < max(reached) < 40
    quiet(tiny_run.slow_tiny(), killed).fit()
    quiet(tiny_run.slow_tiny(), whole).fit()
    assert curve(killed) == curve(whole)
    same_end(killed, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave_in_peace(tmp_path, number):
    trainer = quiet(tiny(), tmp_path / "run", loaders=0)
    fetch = trainer.source.fetch

    def interrupted(draws, random):
        if trainer.step == 4:
            signal.raise_signal(number)
        return fetch(draws, random)

    trainer.source.fetch = interrupted
    result = trainer.fit()
    assert (result.step, result.finished) == (5, False)  # the step that was under way is finished
    assert trainer.run.checkpoints()[-1] == 5
    quiet(tiny(), tmp_path / "run").fit()
    quiet(tiny(), tmp_path / "whole").fit()
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_a_second_signal_does_not_stop_the_save(tmp_path, monkeypatch):
    """torchrun passes Ctrl-C on to processes that the terminal has interrupted already."""
    trainer = quiet(tiny(), tmp_path / "run", loaders=0)
    fetch, save = trainer.source.fetch, trainer.run.save

    def interrupted(draws, random):
        if trainer.step == 4:
            signal.raise_signal(signal.SIGINT)
        return fetch(draws, random)

    def again(*arguments):
        if trainer.step == 5:
            signal.raise_signal(signal.SIGINT)
        return save(*arguments)

    trainer.source.fetch = interrupted
    monkeypatch.setattr(trainer.run, "save", again)
    assert not trainer.fit().finished
    assert trainer.run.checkpoints()[-1] == 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_a_full_disk_under_metrics_or_log_is_one_line(tmp_path, name):
    trainer = quiet(tiny(), tmp_path / "run")
    trainer.fit(until=4)
    kept = (tmp_path / "run" / name).rename(tmp_path / name)
    (tmp_path / "run" / name).symlink_to("/dev/full")
    with pytest.raises(
        CheckpointError, match=rf"{name} cannot be written \(No space left.*step 4 is intact"
    ) as caught:
        trainer.fit()
    assert "\n" not in str(caught.value)
    (tmp_path / "run" / name).unlink()
    kept.rename(tmp_path / "run" / name)
    quiet(tiny(), tmp_path / "run").fit()
    quiet(tiny(), tmp_path / "whole").fit()
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_signal_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    quiet(tiny(steps=1), tmp_path / "run").fit()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_global_generator_is_left_as_it_was(tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    quiet(tiny(steps=2), tmp_path / "run").fit()
    assert torch.equal(torch.rand(2), expected)


def test_accumulation_equals_one_batch(tmp_path):
    # No dropout, augmentation noise or batch statistics: they differ between micro-batches by design.
    class Plain(tiny_run.Blobs):
        def fetch(self, draws, random):
            x = torch.stack([torch.linspace(0, 1, 6) * (i + 1) / 29 for _, i in draws])
            return tiny_run.Batch(x, torch.tensor([0 if f == "left" else 1 for f, _ in draws]))

    losses = []
    for accumulate in (1, 2, 3):
        recipe = tiny(accumulate=accumulate, steps=4)
        trainer = quiet(recipe, tmp_path / f"a{accumulate}")
        trainer.feed = MixtureFeed(Plain(), recipe)
        trainer.model[1], trainer.model[3] = nn.Identity(), nn.Identity()
        trainer.fit()
        losses.append([row["loss"] for row in curve(tmp_path / f"a{accumulate}") if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


class TwoParts(Objective):
    """Two losses with denominators of their own: rows of class 0, and rows of class 1, which weigh two each."""

    def __init__(self, known):
        super().__init__()
        self.known = known

    def denominators(self, model, batch):
        return (
            {"a": float((batch.y == 0).sum()), "b": 2.0 * float((batch.y == 1).sum())} if self.known else None
        )

    def loss(self, model, batch):
        each = model(batch.x).square().sum(1)
        parts = {
            "a": LossPart(each[batch.y == 0].sum(), (batch.y == 0).sum().float()),
            "b": LossPart(2 * each[batch.y == 1].sum(), 2 * (batch.y == 1).sum().float(), scale=0.5),
        }
        mean = torch.stack([part.scale * part.mean for part in parts.values()]).sum()
        return Loss(total=mean, weight=1.0, parts=parts)


@pytest.mark.parametrize("known", [True, False])
def test_losses_of_several_parts_are_exact_where_denominators_are_known(tmp_path, known):
    class Plain(tiny_run.Blobs):
        def fetch(self, draws, random):
            x = torch.stack([torch.linspace(0, 1, 6) * (i + 1) / 29 for _, i in draws])
            return tiny_run.Batch(x, torch.tensor([0 if f == "left" else 1 for f, _ in draws]))

    losses = []
    for accumulate in (1, 3):
        for workers in (1,) if accumulate == 1 else (1, 3):
            recipe = tiny(accumulate=accumulate, steps=4, eval_every=0, optim=Optim(lr=0.03))
            trainer = quiet(recipe, tmp_path / f"{accumulate}-{workers}-{known}", workers=workers)
            trainer.objective, trainer.feed = TwoParts(known), MixtureFeed(Plain(), recipe)
            still(trainer)
            torch.manual_seed(1)
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.normal_()
            trainer.parameters = dict(trainer.model.named_parameters())
            trainer.optimizers = make_optimizers(trainer.parameters, recipe.optim)
            trainer.fit()
            losses.append([row["loss"] for row in trainer.run.metrics()])
    assert losses[2] == losses[1]
    exact = losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert exact == known


def test_a_part_without_gradient_counts_and_ten_barren_steps_end_the_run(tmp_path):
    class Text(Objective):
        def __init__(self, when):
            super().__init__()
            self.when, self.calls = when, 0

        def loss(self, model, batch):
            self.calls += 1
            total = model(batch.x).square().sum()
            return Loss(total=total if self.when(self.calls) else total.detach(), weight=6.0)

    recipe = tiny(eval_every=0, optim=Optim(lr=0.03))
    for workers in (1, 2):
        trainer = still(quiet(recipe, tmp_path / f"some{workers}", workers=workers))
        trainer.objective = Text(lambda call: call % 5 == 0)
        assert trainer.fit().finished
    trainer = still(quiet(recipe, tmp_path / "none"))
    trainer.objective = Text(lambda call: False)
    with pytest.raises(TrainingError, match=r"step 10.*ten steps.*optim\.train"):
        trainer.fit()


def still(trainer):
    """Without dropout and batch statistics."""
    trainer.model[1], trainer.model[3] = nn.LayerNorm(8), nn.Identity()
    return trainer


def test_workers_give_the_result_of_one_to_the_bit(tmp_path):
    recipe = tiny(accumulate=3)
    still(quiet(recipe, tmp_path / "one")).fit()
    still(quiet(recipe, tmp_path / "three", workers=3)).fit()
    assert curve(tmp_path / "one") == curve(tmp_path / "three")
    same_end(tmp_path / "one", tmp_path / "three")


class Twice(nn.Module):
    """Uses each weight several times in one pass, as an encoder does that takes its pictures in groups."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 64), nn.Linear(64, 4)

    def forward(self, x):
        return torch.cat([self.b(torch.nn.functional.gelu(self.a(part))) for part in x.split(2)])


@dataclass(frozen=True, slots=True, kw_only=True)
class TwiceSpec:
    def build(self):
        return Twice()


def test_workers_give_the_result_of_one_in_bfloat16_too(tmp_path):
    recipe = tiny(
        model=TwiceSpec(), batch=64, accumulate=4, compute="bfloat16", steps=25, optim=Optim(lr=0.03)
    )
    quiet(recipe, tmp_path / "one").fit()
    quiet(recipe, tmp_path / "four", workers=4).fit()
    assert curve(tmp_path / "one") == curve(tmp_path / "four")
    same_end(tmp_path / "one", tmp_path / "four")


def test_workers_pass_an_error_on(tmp_path):
    trainer = still(quiet(tiny(), tmp_path / "run", workers=2))

    def broken(draws, random):
        raise RuntimeError("cannot read the sample")

    trainer.source.fetch = broken
    with pytest.raises(RuntimeError, match="cannot read the sample"):
        trainer.fit()


@pytest.mark.parametrize("kept", [1, 3])
def test_workers_refuse_what_depends_on_the_order_of_threads(tmp_path, kept):
    trainer = quiet(tiny(), tmp_path / "run", workers=2)
    there = trainer.model[kept]  # batch statistics, dropout
    still(trainer).model[kept] = there
    with pytest.raises(TrainingError, match="use one worker"):
        trainer.fit()
    assert trainer.step == 0


@pytest.mark.parametrize("workers", [0, 3])
def test_as_many_workers_as_micro_batches_at_most(tmp_path, workers):
    with pytest.raises(UsageError, match="1 to 2"):
        quiet(tiny(), tmp_path / "run", workers=workers)


def test_nan_stops_and_names_the_step(tmp_path):
    recipe = tiny(data=BlobData(poison=9))  # two micro-batches a step: the fifth step
    trainer = quiet(recipe, tmp_path / "run")
    with pytest.raises(TrainingError, match="step 5"):
        trainer.fit()
    assert trainer.run.checkpoints() == [3]
    assert [row["step"] for row in trainer.run.metrics() if "loss" in row] == [1, 2, 3, 4]


def test_a_changed_recipe_does_not_resume(tmp_path):
    quiet(tiny(steps=2), tmp_path / "run").fit()
    with pytest.raises(UsageError, match="optim"):
        quiet(tiny(steps=2, optim=Optim(lr=0.5)), tmp_path / "run")


def test_a_finished_run_stays_finished(tmp_path):
    quiet(tiny(steps=2), tmp_path / "run").fit()
    before = curve(tmp_path / "run")
    assert quiet(tiny(steps=2), tmp_path / "run").fit().finished
    assert curve(tmp_path / "run") == before


class Shapes(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.table = nn.Parameter(torch.zeros(1, 5, 4))


def test_decay_spares_vectors_and_groups_scale():
    model, objective = Shapes(), Objective()
    optim = Optim(
        weight_decay=0.1,
        groups=(Group(pattern="table", lr_scale=0.2, weight_decay=0.0), Group(pattern="l*", lr_scale=3)),
    )
    (optimizer,) = make_optimizers(trainable(model, objective, optim), optim)
    rule = {name: (g["scale"], g["weight_decay"]) for g in optimizer.param_groups for name in g["names"]}
    assert rule == {
        "linear.weight": (3, 0.1),
        "linear.bias": (3, 0.0),
        "norm.weight": (1.0, 0.0),
        "norm.bias": (1.0, 0.0),
        "token": (1.0, 0.0),
        "table": (0.2, 0.0),
    }


def test_learning_rate_of_groups_follows_the_schedule(tmp_path):
    recipe = tiny(steps=4, schedule=Schedule(kind="linear", warmup=2))
    trainer = quiet(recipe, tmp_path / "run")
    trainer.fit(until=1)
    assert {g["lr"] for o in trainer.optimizers for g in o.param_groups} == {0.015, 0.0075}


def test_muon_takes_the_matrices_of_its_group():
    optim = Optim(
        groups=(
            Group(pattern="linear.*", optimizer="muon", lr_scale=2),
            Group(pattern="table", optimizer="muon"),
        )
    )
    adamw, muon = make_optimizers(trainable(Shapes(), Objective(), optim), optim)
    assert [g["names"] for g in muon.param_groups] == [["linear.weight"]]
    assert muon.param_groups[0]["scale"] == 2
    assert "table" in [n for g in adamw.param_groups for n in g["names"]]  # three axes


def test_freezing(tmp_path):
    recipe = tiny(steps=2, optim=Optim(lr=0.1, freeze=("0.*",)))
    trainer = quiet(recipe, tmp_path / "run")
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.fit()
    after = trainer.model.state_dict()
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["4.weight"], after["4.weight"])
    assert "0.weight" not in trainer.run.load().weights
    with pytest.raises(ConfigError, match="matches no parameter"):
        trainable(Shapes(), Objective(), Optim(freeze=("vision.*",)))
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        trainable(Shapes(), Objective(), Optim(freeze=("*",)))


def test_new_weights_depend_on_the_seed_only():
    torch.manual_seed(1)
    _, a, _ = build_parts(tiny())
    torch.manual_seed(2)
    _, b, _ = build_parts(tiny())
    _, c, _ = build_parts(replace(tiny(), seed=8))
    assert torch.equal(a[0].weight, b[0].weight)
    assert not torch.equal(a[0].weight, c[0].weight)
    assert "objective.head.weight" in named_parameters(a, tiny().objective.build(a, None))


def test_plain_progress_lines():
    out = io.StringIO()
    with Progress(3, out, every=0.0) as progress:
        for step in (1, 2, 3):
            progress.update(step, {"loss": 1.0}, 4)
        progress.say("done")
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("step 1/3  loss 1.0000")
    assert "left" in lines[0]


def test_progress_says_rates():
    progress = Progress(9, io.StringIO())
    row = {"loss": 2.0, "tokens": 3000, "learned": 600, "tiles": 24, "fill": 0.96, "wait_seconds": 0.05}
    progress.update(1, row, 4)
    progress.update(2, {**row, "fill": 0.98}, 4)
    progress.update(3, {"skipped": "loss nan"}, 4)
    line = progress.line(2.0, 2048.0)
    assert line == "loss 2.0000  3000 tokens/s (600 learned)  24.0 tiles/s  fill 64.7%  wait 5.0%  2.00 GiB"


def test_progress_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with Progress(2, out) as progress:
        progress.update(1, {"loss": 0.5}, 4)
        progress.say("[not markup]")
    assert "[not markup]" in out.getvalue()


def test_metrics_are_written_as_they_come(tmp_path):
    trainer = quiet(tiny(), tmp_path / "run")
    trainer.fit(until=4)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4]
    assert {"loss", "lr", "grad_norm", "accuracy", "seconds", "cpu_seconds"} <= rows[0].keys()
    assert rows[-1]["eval"].keys() == {"gap"}
