"""Distillation: teacher rows, local facts, losses that reach every head, augmentation from its generator only."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from chiasm.data.mixture import generator
from chiasm.errors import CheckpointError, ConfigError, DataError
from chiasm.media.boxes import iou
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.train import distill
from chiasm.train.augment import augment, mirror
from chiasm.train.distill import (
    Distill,
    DistillData,
    DistillObjective,
    DistillSource,
    StudentSpec,
    Teacher,
)
from chiasm.train.progress import Progress
from chiasm.train.recipe import Recipe
from chiasm.train.run import RunFolder
from chiasm.train.trainer import Trainer
from chiasm.worlds.charts import ChartsWorld
from chiasm.worlds.grounding import GroundingWorld
from chiasm.worlds.world import Sample, World

VISION = InternViTConfig(
    hidden_size=24, intermediate_size=48, layers=1, heads=2, patch_size=8, image_size=64, layer_scale_init=1.0
)


class FakeWorld(World):
    """Random pictures of any family, with the ground truth that it would have."""

    def __init__(self, family, split, size=12):
        super().__init__(split)
        self.family, self._size = family, size

    def __len__(self):
        return self._size

    def sample(self, index):
        rng = self.random(index)
        image = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
        meta, answer = {"class": index % 10}, "x"
        if self.family == "words":
            meta, answer = {"box": [4, 20, 60, 40]}, "word"
        elif self.family == "counting":
            meta = {
                "count": 1 + index % 5,
                "objects": [{"x": 10.0, "y": 52.0, "radius": 8.0, "shape": "star", "colour": "red"}],
            }
        return Sample(image=image, question="?", answer=answer, family=self.family, key=str(index), meta=meta)


def write_teacher(path, n=12, width=8, pooled=20):
    rng = np.random.default_rng(0)
    family = np.array(["cifar10"] * n + ["cifar10"] * n + ["fashion"] * n + ["cifar10"])
    split = np.array(["train"] * 3 * n + ["dev"])
    total = len(family)
    np.savez(
        path,
        map=rng.normal(size=(total, 16, width)).astype(np.float16),
        pooled=rng.normal(size=(total, pooled)).astype(np.float16),
        mean=rng.normal(size=pooled).astype(np.float32),
        split=split,
        family=family,
        index=np.concatenate([np.arange(n)] * 3 + [[0]]),
        flip=np.array([False] * n + [True] * n + [False] * n + [False]),
    )
    return path


@pytest.fixture
def teacher(tmp_path):
    return Teacher(write_teacher(tmp_path / "teacher.npz"))


@pytest.fixture
def source(teacher):
    families = ("cifar10", "fashion", "words", "counting")
    train, dev = ({f: FakeWorld(f, split) for f in families} for split in ("train", "dev"))
    return DistillSource(train, dev, dict.fromkeys(families, 1.0), teacher, dev_size=5)


def test_the_teacher_finds_rows_and_mirrors_maps(teacher):
    seen, pooled = teacher.find("cifar10", 3, False)
    assert np.array_equal(seen, teacher.map_NPD[3])
    assert np.array_equal(teacher.find("cifar10", 3, True)[0], teacher.map_NPD[15])
    assert pooled.shape == (20,)
    turned, _ = teacher.find("fashion", 2, True)  # seen unmirrored only
    plain, _ = teacher.find("fashion", 2, False)
    assert np.array_equal(turned.reshape(4, 4, -1), plain.reshape(4, 4, -1)[:, ::-1])
    assert teacher.find("words", 0, False) is None
    assert teacher.find("cifar10", 99, False) is None


def test_missing_teacher_says_how_to_make_it(tmp_path):
    with pytest.raises(DataError, match=r"python -m chiasm\.worlds\.teacher"):
        Teacher(tmp_path / "none.npz")


def test_a_batch_knows_what_is_known(source):
    batch = source.fetch([("cifar10", 1), ("words", 2), ("counting", 3), ("fashion", 4)], generator(0))
    assert batch.taught_N.tolist() == [True, False, False, True]
    assert batch.labels_N.tolist() == [1, -100, 3, 4]
    assert batch.letters_NL[1].tolist() == [22, 14, 17, 3, 26, 26]
    assert (batch.letters_NL[0] == -100).all()
    assert batch.images_NSS3.dtype == torch.uint8
    assert not batch.map_NPD[1].any()
    again = source.fetch([("cifar10", 1), ("words", 2), ("counting", 3), ("fashion", 4)], generator(0))
    assert torch.equal(batch.images_NSS3, again.images_NSS3)


def test_every_term_reaches_encoder_and_heads(source):
    torch.manual_seed(0)
    model = StudentSpec(vision=VISION).build()
    objective = DistillObjective().build(model, source)
    draws = [(f, i) for f in source.sizes for i in range(3)]
    loss = objective.loss(model, source.fetch(draws, generator(0)))
    assert loss.weight == 12.0
    loss.total.backward()
    for name, parameter in [*model.named_parameters(), *objective.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert {
        "map/loss",
        "pooled/loss",
        "words/dense",
        "counting/accuracy",
        "cifar10/loss",
    } <= loss.metrics.keys()
    assert loss.metrics["words/accuracy"][1] == 18


def test_losses_add_up_over_parts_of_a_batch(source):
    torch.manual_seed(0)
    model = StudentSpec(vision=VISION).build()
    objective = DistillObjective().build(model, source)
    batch = source.fetch([(f, i) for f in source.sizes for i in range(2)], generator(0))
    whole = objective.loss(model, batch).total
    pieces = 0.0
    for rows in ([0, 1, 2], [3, 4, 5, 6, 7]):
        names = ("images_NSS3", "labels_N", "letters_NL", "map_NPD", "pooled_NC", "taught_N", "dense_NFQ")
        part = replace(
            batch,
            families=tuple(batch.families[i] for i in rows),
            **{n: getattr(batch, n)[rows] for n in names},
        )
        pieces += objective.loss(model, part).total
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


def test_scores_are_shares(source):
    torch.manual_seed(0)
    model = StudentSpec(vision=VISION).build()
    scores = DistillObjective().build(model, source).evaluate(model, source)
    assert scores.keys() == {"cifar10", "fashion", "counting", "words", "letters"}
    assert all(0 <= value <= 1 for value in scores.values())


def test_without_a_teacher_there_are_no_regression_heads(source):
    alone = DistillSource(source.worlds, {}, source.weights, None, dev_size=0)
    model = StudentSpec(vision=VISION).build()
    objective = DistillObjective().build(model, alone)
    assert objective.to_map is None
    loss = objective.loss(model, alone.fetch([("cifar10", 0)], generator(0)))
    assert "map/loss" not in loss.metrics


def test_the_objective_wants_its_own_model_and_source(source):
    with pytest.raises(ConfigError):
        DistillObjective().build(torch.nn.Linear(2, 2), source)
    with pytest.raises(ConfigError):
        DistillData(weights={"dogs": 1.0}, teacher=None).open()


def test_mirror_and_augment():
    images = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8, generator=generator(0))
    turned = mirror(images, torch.tensor([True, False, True]))
    assert torch.equal(turned[0], images[0].flip(1))
    assert torch.equal(turned[1], images[1])
    warped = torch.tensor([True, False, True])
    a, b, c = (augment(images, warped, generator(seed)) for seed in (1, 1, 2))
    assert a.dtype == torch.uint8
    assert a.shape == images.shape
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.is_contiguous() or a.permute(0, 3, 1, 2).is_contiguous()


def test_counting_alone_trains_end_to_end(tmp_path):
    recipe = Recipe(
        name="eyes",
        model=StudentSpec(vision=VISION),
        objective=DistillObjective(),
        data=DistillData(weights={"counting": 1.0}, teacher=None, counting=50, dev_size=10),
        steps=3,
        batch=4,
        eval_every=3,
    )
    run = RunFolder.create(tmp_path, recipe, run_id="r")
    trainer = Trainer(recipe, run, progress=Progress(3, io.StringIO()))
    assert isinstance(trainer.objective, Distill)
    assert trainer.fit().scores.keys() == {"counting"}
    assert any(name.startswith("vision.") for name in run.load().weights)


class NamedWorld(FakeWorld):
    names = ("cat", "dog", "hat")

    def sample(self, index):
        return replace(super().sample(index), answer=self.names[index % 3])


def wide_source():
    train = {
        "clipart": NamedWorld("clipart", "train"),
        "grounding": GroundingWorld("train", size=12),
        "charts": ChartsWorld("train", size=12, pixels=64),
    }
    dev = {
        "clipart": NamedWorld("clipart", "dev"),
        "grounding": GroundingWorld("dev", size=6),
        "charts": ChartsWorld("dev", size=6, pixels=64),
    }
    return DistillSource(train, dev, dict.fromkeys(train, 1.0), None, 6)


def test_stage_1b_teaches_drawings_boxes_and_charts(tmp_path):
    """Every new head gets a gradient, the boxes of marked patches come nearer, and an encoder can be handed on."""
    source = wide_source()
    torch.manual_seed(0)
    model = StudentSpec(vision=VISION).build()
    objective = DistillObjective().build(model, source)
    draws = [(family, index) for family in source.sizes for index in range(8)]
    batch = source.fetch(draws, generator(1))
    losses = []
    optimizer = torch.optim.AdamW([*model.parameters(), *objective.parameters()], lr=3e-3)
    for _ in range(30):
        loss = objective.loss(model, batch)
        (loss.total / loss.weight).backward()
        losses.append(
            {
                name: float(torch.as_tensor(total).detach()) / float(count)
                for name, (total, count) in loss.metrics.items()
            }
        )
        for head in (objective.marks, objective.classes["clipart"]):
            assert head.weight.grad.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
    for name in ("grounding/edges", "charts/edges", "grounding/dense", "charts/dense", "clipart/loss"):
        assert losses[-1][name] < 0.8 * losses[0][name], name
    with torch.no_grad():
        scores = objective.evaluate(model.eval(), source)
    assert scores.keys() == {"clipart", "grounding", "charts"}
    path = tmp_path / "eyes.safetensors"
    save_file({name: p.detach().clone() for name, p in model.vision.state_dict().items()}, path)
    again = StudentSpec(vision=VISION, start=str(path)).build()
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.vision.state_dict().values(), again.vision.state_dict().values(), strict=True)
    )
    with pytest.raises(CheckpointError, match="does not fit the encoder"):
        StudentSpec(vision=replace(VISION, layers=2), start=str(path)).build()


def test_boxes_and_their_overlap():
    """The overlap that is scored is that of `media.boxes`."""
    boxes = torch.rand(50, 4, generator=generator(3))
    others = torch.rand(50, 4, generator=generator(4))
    expected = [iou(a, b) for a, b in zip(boxes.tolist(), others.tolist(), strict=True)]
    assert distill._iou(boxes, others).tolist() == pytest.approx(expected, abs=1e-6)
    assert set(expected) != {0.0}
