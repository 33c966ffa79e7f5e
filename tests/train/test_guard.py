"""The guard: what it notices, whom it names, what it skips, how it resumes."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from tests.train.mixed_run import Headed, MixedData, mixed
from tests.train.test_trainer import curve, quiet
from tests.train.tiny_run import BlobData, tiny

from chiasm.data.mixture import derive_seed
from chiasm.errors import ConfigError
from chiasm.model.causal import CausalVLM
from chiasm.train.guard import TrainingError, Watch
from chiasm.train.progress import Progress
from chiasm.train.recipe import Guard
from chiasm.train.run import RunFolder
from chiasm.train.trainer import Trainer, build_parts


def test_a_leap_is_measured_against_the_median():
    watch = Watch(Guard(spike=6.0, window=8))
    losses = [3.0, 3.1, 2.9, 3.05, 2.95, 3.0]
    assert all(watch.complaint(x, 1.0) is None for x in losses)
    complaint = watch.complaint(5.0, 1.0)
    assert complaint is not None
    assert "5" in complaint
    assert watch.complaint(5.0, 1.0) is not None  # it did not enter the window
    assert watch.complaint(3.2, 1.0) is None
    assert watch.complaint(0.1, 1.0) is None  # falling is no leap


def test_nothing_leaps_before_there_is_a_median_nor_when_losses_stand_still():
    watch = Watch(Guard(spike=3.0, window=10))
    assert [watch.complaint(x, 1.0) for x in (1.0, 9.0, 1.0)] == [None] * 3
    still = Watch(Guard(spike=3.0, window=4))
    assert [still.complaint(2.0, 1.0) for _ in range(6)] == [None] * 6
    assert still.complaint(2.01, 1.0) is None
    assert still.complaint(2.2, 1.0) is not None


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_what_is_no_number_is_noticed(loss, norm):
    assert Watch(Guard()).complaint(loss, norm) is not None
    assert Watch(Guard(policy="off")).complaint(loss, norm) is None


def test_skips_in_a_row_are_bounded_and_forgotten_after_a_good_step():
    watch = Watch(Guard(policy="skip", max_skips=3))
    watch.decide(1, "loss nan", ["a"])
    watch.decide(2, "loss nan", ["a"])
    assert watch.complaint(1.0, 1.0) is None
    watch.decide(4, "loss nan", ["a"])
    watch.decide(5, "loss nan", ["a"])
    with pytest.raises(TrainingError, match=r"step 6.*max_skips.*with b"):
        watch.decide(6, "loss nan", ["b"])


def test_its_memory_survives_as_json():
    a = Watch(Guard(spike=4.0, window=6, policy="skip"))
    for x in (1.0, 1.1, 0.9, 1.0, 0.3):
        a.complaint(x, 1.0)
    a.decide(6, "x", [])
    b = Watch(a.guard)
    b.restore(json.loads(json.dumps(a.state())))
    assert b.state() == a.state()
    assert b.complaint(2.0, 1.0) == a.complaint(2.0, 1.0) is not None


@pytest.mark.parametrize("wrong", [{"policy": "ask"}, {"spike": 0.0}, {"window": 1}, {"max_skips": 0}])
def test_wrong_guards_are_refused(wrong):
    with pytest.raises(ConfigError, match="guard"):
        Guard(**wrong)


def test_a_poisoned_step_is_skipped_logged_and_resumed(tmp_path):
    recipe = tiny(data=BlobData(poison=9), guard=Guard(policy="skip"))
    trainer = quiet(recipe, tmp_path / "run")
    trainer.model[1] = torch.nn.LayerNorm(8)  # batch statistics would keep the NaN
    assert trainer.fit().finished
    rows = [row for row in trainer.run.metrics() if "eval" not in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    (skipped,) = [row for row in rows if "skipped" in row]
    assert skipped["step"] == 5
    assert "loss" not in skipped
    assert "nan" in skipped["skipped"]
    assert "left" in " ".join(skipped["samples"]) or "right" in " ".join(skipped["samples"])
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_the_worst_document_of_a_pack_is_named(tmp_path):
    """One picture that no other step shows: its document's labels are made impossible by a huge weight."""
    recipe = mixed("steps=3", "accumulate=2", "eval_every=0", "guard.spike=3", "guard.window=4")
    recipe = replace(recipe, data=MixedData(bad=()))
    run = RunFolder.create(tmp_path, recipe, run_id="run")
    trainer = Trainer(recipe, run, progress=Progress(3, io.StringIO()))
    trainer.fit(until=2)
    draws = trainer.feed.plan(2)
    spoiled = draws[1][2]
    trainer.feed.restore(trainer._feed_state)
    load = trainer.feed.load

    def spoil(handle, *, step, part):
        batch = load(handle, step=step, part=part)
        if step == 2 and part == 1:
            # What the document must say is what the model, which has seen few letters, deems least likely.
            row = int(((batch.doc_T == 2) & (batch.labels_T >= 0)).nonzero()[0, 0])
            with torch.no_grad():
                logits = trainer.model.head.logits(trainer.model.hidden(batch)[row : row + 1])
            batch.labels_T[batch.doc_T == 2] = torch.where(
                batch.labels_T[batch.doc_T == 2] >= 0, logits.argmin(), batch.labels_T[batch.doc_T == 2]
            )
            batch.weight_T[batch.doc_T == 2] *= 1000
        return batch

    trainer.feed.load = spoil
    trainer.watch.restore({"losses": [0.5, 0.5, 0.5, 0.5], "skips": 0})
    with pytest.raises(TrainingError, match=rf"step 3.*worst first: {spoiled[0]} {spoiled[1]} \(loss"):
        trainer.fit()
    assert trainer.run.checkpoints() == [2]


def test_document_losses_are_those_of_the_documents_alone():
    source, model, objective = build_parts(mixed())
    assert isinstance(model, CausalVLM)
    assert isinstance(objective, Headed)
    world = source.worlds["counting"]
    rows = [source.document(world.sample(i)) for i in range(5)]
    batch = type(rows[0]).pack(rows)
    with torch.no_grad():
        model.eval()
        each = objective.document_losses(model, batch)
        alone = torch.stack([model.loss(row).mean for row in rows])
    torch.testing.assert_close(each, alone)


def test_a_step_without_any_sample_is_skipped_and_logged(tmp_path):
    recipe = replace(mixed("steps=3", "eval_every=0"), data=MixedData(bad=tuple((1, p) for p in range(4))))
    trainer = quiet(recipe, tmp_path / "run")
    trainer.fit()
    rows = curve(tmp_path / "run")
    assert [("loss" in row, "skipped" in row) for row in rows] == [
        (True, False),
        (False, True),
        (True, False),
    ]
    assert "step 2 skipped" in (tmp_path / "run" / "log.txt").read_text()


def test_parts_that_hold_nothing_leave_the_loss_exact(tmp_path):
    """A step of which one part is bad is the step of the other parts."""
    recipe = mixed("steps=1", "eval_every=0", "checkpointing=none")
    some = quiet(replace(recipe, data=MixedData(bad=((0, 1),))), tmp_path / "some")
    some.fit()
    whole = quiet(replace(recipe, data=MixedData(bad=())), tmp_path / "whole")
    parts = whole.feed.plan(0)
    losses = []
    whole.model.train()
    for part in (0, 2, 3):
        torch.manual_seed(derive_seed(recipe.seed, "step", 0, part))
        losses.append(whole.objective.loss(whole.model, whole.feed.load(parts[part], step=0, part=part)))
    mean = sum(float(loss.total.detach()) for loss in losses) / sum(float(loss.weight) for loss in losses)
    assert curve(tmp_path / "some")[0]["loss"] == pytest.approx(mean, rel=1e-6)
