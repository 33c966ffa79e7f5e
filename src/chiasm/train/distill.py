"""Distil a vision teacher into a small InternViT, with supervised heads where labels are known.

What: ``DistillData`` (pictures of the worlds, with cached teacher features), ``Distill`` (the objective and its
heads) and ``StudentModel`` (InternViT + pixel unshuffle: the 16 tokens a tile that the language model will read).
Source: the idea of Mini-InternVL (a small encoder learns a large one's features before any language training); the
teacher here is EfficientNet-Lite0, whose last map at 128 px is the very 4 x 4 grid of the student's tokens.

Everything that the heads learn must be in the 16 tokens: each token regresses the teacher's feature at its place
(smooth L1 and cosine), their mean regresses the pooled feature and classifies photographs and garments, and small
heads over all tokens count objects and read letters. Each of a token's four patches also says which letter, or which
shape and colour, it shows (``train.dense``): local targets, learnt long before the global ones. Patches of grounding
scenes and charts also say where the edges of their mark are. The heads are thrown away; the encoder is kept.

Shape legend: N pictures, S = 64 pixels, P = 16 tokens, C = 4 x encoder width, D projected teacher width, L = 6 letters,
F = 3 facts about each of Q = 64 patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from chiasm.data.mixture import Draw, generator
from chiasm.errors import CheckpointError, ConfigError, DataError
from chiasm.parts.compress.unshuffle import pixel_unshuffle
from chiasm.parts.vision.internvit import InternViT, InternViTConfig
from chiasm.train.augment import augment, mirror
from chiasm.train.data import Source
from chiasm.train.dense import FACTS, MARKED, MARKS, PATCHES, dense_facts, dense_marks
from chiasm.train.objective import Loss, Objective
from chiasm.train.run import RunFolder
from chiasm.train.vision_init import sincos_positions_, whiten_patches_
from chiasm.worlds.assets import assets_dir
from chiasm.worlds.charts import ChartsWorld
from chiasm.worlds.cifar10 import CifarWorld
from chiasm.worlds.clipart import ClipartWorld
from chiasm.worlds.counting import CountingWorld
from chiasm.worlds.fashion import FashionWorld
from chiasm.worlds.grounding import GroundingWorld
from chiasm.worlds.teacher import open_features
from chiasm.worlds.words import MAX_LETTERS, WordsWorld, letters
from chiasm.worlds.world import SIZE, World

__all__ = [
    "Distill",
    "DistillBatch",
    "DistillData",
    "DistillObjective",
    "DistillSource",
    "StudentModel",
    "StudentSpec",
    "load_vision",
    "vision_weights",
]

CLASSES = {"cifar10": 10, "fashion": 10, "counting": 5}
ALPHABET = 27
"""Letters a-z and the blank behind a word's end."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# --- data -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillBatch:
    """N pictures and what is known about them.

    Attributes:
        images_NSS3: uint8.
        families: family of each picture.
        labels_N: class id, count - 1, or -100 where a picture has no one answer.
        letters_NL: letter codes, -100 for all but words.
        map_NPD: teacher's projected map, zero where unknown.
        pooled_NC: teacher's pooled feature minus its mean, zero where unknown.
        taught_N: bool, whether the teacher's features are known.
        dense_NFQ: what every patch shows, -100 where unknown.
        marks_NFQ: shape and colour of the mark in every patch, -100 where unknown.
        boxes_NQL: box of that mark in shares of the picture, NaN where there is none.
    """

    images_NSS3: Tensor
    families: tuple[str, ...]
    labels_N: Tensor
    letters_NL: Tensor
    map_NPD: Tensor
    pooled_NC: Tensor
    taught_N: Tensor
    dense_NFQ: Tensor
    marks_NFQ: Tensor
    boxes_NQL: Tensor

    def to(self, device: torch.device | str) -> DistillBatch:
        """Return the batch on a device."""
        names = [field.name for field in fields(self) if field.name != "families"]
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def rows(self, family: str) -> Tensor:
        """Return the row numbers of one family."""
        return torch.tensor(
            [i for i, f in enumerate(self.families) if f == family], device=self.labels_N.device
        )


class Teacher:
    """Cached teacher features of training pictures, as ``worlds.teacher`` wrote them."""

    def __init__(self, path: Path) -> None:
        arrays = open_features(path)
        try:
            self.map_NPD, self.pooled_NC, self.mean_C = (arrays[k] for k in ("map", "pooled", "mean"))
            keys = zip(*(arrays[k].tolist() for k in ("split", "family", "index", "flip")), strict=True)
            self._row = {key[1:]: row for row, key in enumerate(keys) if key[0] == "train"}
        except KeyError as error:
            raise DataError(f"{path} lacks {error}: run `python -m chiasm.worlds.teacher` again") from error
        # One number for all axes: cosine and smooth L1 then see pooled features of mean square 1.
        centred = self.pooled_NC.astype(np.float32) - self.mean_C
        self.pooled_scale = float(np.sqrt(np.square(centred).mean())) or 1.0

    def find(self, family: str, index: int, mirrored: bool) -> tuple[np.ndarray, np.ndarray] | None:
        """Return (map (P, D), centred pooled feature (C,) of mean square 1 over all rows), None if unknown.

        If the teacher has seen only the other orientation, its map is mirrored: nearly what it would have said.
        """
        row, turned = self._row.get((family, index, mirrored)), False
        if row is None:
            row, turned = self._row.get((family, index, not mirrored)), True
        if row is None:
            return None
        map_PD = self.map_NPD[row]
        if turned:
            side = math.isqrt(len(map_PD))
            map_PD = map_PD.reshape(side, side, -1)[:, ::-1].reshape(map_PD.shape)
        return map_PD, (self.pooled_NC[row].astype(np.float32) - self.mean_C) / self.pooled_scale


class DistillSource:
    """The training set: worlds sampled by index, augmented, with teacher features beside them.

    Args:
        worlds: family -> training world.
        dev: family -> dev world; never the test split.
        weights: family -> share of draws.
        teacher: cached features, or None to train the supervised heads alone.
        dev_size: dev pictures per family.
        warped: families whose pictures may be shifted and zoomed.
    """

    def __init__(
        self,
        worlds: Mapping[str, World],
        dev: Mapping[str, World],
        weights: Mapping[str, float],
        teacher: Teacher | None,
        dev_size: int,
        warped: Sequence[str] = ("cifar10",),
    ) -> None:
        self.worlds, self._dev_worlds, self._weights = worlds, dev, weights
        self.teacher, self.dev_size, self.warped = teacher, dev_size, warped

    @property
    def names(self) -> tuple[str, ...]:
        """What drawings may show, by class; () without drawings."""
        return getattr(self.worlds.get("clipart"), "names", ())

    @property
    def sizes(self) -> Mapping[str, int]:
        """Family -> number of training pictures."""
        return {name: len(world) for name, world in self.worlds.items()}

    @property
    def weights(self) -> Mapping[str, float]:
        """Family -> share."""
        return self._weights

    @property
    def teacher_widths(self) -> tuple[int, int] | None:
        """(projected width, pooled width) of the teacher, or None."""
        return (self.teacher.map_NPD.shape[-1], self.teacher.pooled_NC.shape[-1]) if self.teacher else None

    def fetch(self, draws: Sequence[Draw], random: torch.Generator) -> DistillBatch:
        """Sample, mirror (neither words nor marks), shift and zoom a little (``warped``), jitter brightness."""
        mirrored = (torch.rand(len(draws), generator=random) < 0.5).tolist()
        kept = ("words", *MARKED)
        mirrored = [flip and family not in kept for flip, (family, _) in zip(mirrored, draws, strict=True)]
        batch = self._collect(self.worlds, draws, mirrored)
        images_NSS3 = mirror(batch.images_NSS3, torch.tensor(mirrored))
        warped = torch.tensor([family in self.warped for family, _ in draws])
        return replace(batch, images_NSS3=augment(images_NSS3, warped, random))

    def dev(self, family: str) -> DistillBatch:
        """Return the first dev pictures of a family, unaugmented."""
        world = self._dev_worlds[family]
        draws = [(family, i) for i in range(min(self.dev_size, len(world)))]
        return self._collect(self._dev_worlds, draws, None)

    def _collect(
        self, worlds: Mapping[str, World], draws: Sequence[Draw], mirrored: Sequence[bool] | None
    ) -> DistillBatch:
        n = len(draws)
        images = np.empty((n, SIZE, SIZE, 3), np.uint8)
        labels, spelled = np.full(n, -100, np.int64), np.full((n, MAX_LETTERS), -100, np.int64)
        d, c = self.teacher_widths or (1, 1)
        maps, pooled, taught = (
            np.zeros((n, 16, d), np.float32),
            np.zeros((n, c), np.float32),
            np.zeros(n, bool),
        )
        dense = np.empty((n, len(FACTS), PATCHES), np.int64)
        marks = np.empty((n, len(MARKS), PATCHES), np.int64)
        boxes = np.empty((n, PATCHES, 4), np.float32)
        for i, (family, index) in enumerate(draws):
            sample = worlds[family].sample(index)
            images[i] = sample.image
            fonts = getattr(worlds[family], "fonts", {})
            font = fonts.get(sample.meta.get("font"))
            dense[i] = dense_facts(
                sample, font=str(font) if font else None, mirrored=mirrored is not None and mirrored[i]
            )
            marks[i], boxes[i] = dense_marks(sample)
            if family == "words":
                spelled[i] = letters(sample.answer)
            elif family == "clipart":
                labels[i] = self.names.index(sample.answer)
            elif family not in MARKED:
                labels[i] = sample.meta["class"] if "class" in sample.meta else sample.meta["count"] - 1
            if self.teacher is None or mirrored is None:
                continue
            known = self.teacher.find(family, index, mirrored[i])
            if known is not None:
                maps[i], pooled[i], taught[i] = *known, True
        return DistillBatch(
            images_NSS3=torch.from_numpy(images),
            families=tuple(family for family, _ in draws),
            labels_N=torch.from_numpy(labels),
            letters_NL=torch.from_numpy(spelled),
            map_NPD=torch.from_numpy(maps),
            pooled_NC=torch.from_numpy(pooled),
            taught_N=torch.from_numpy(taught),
            dense_NFQ=torch.from_numpy(dense),
            marks_NFQ=torch.from_numpy(marks),
            boxes_NQL=torch.from_numpy(boxes),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillData:
    """Which worlds, how many pictures, which shares."""

    weights: dict[str, float] = field(
        default_factory=lambda: {"cifar10": 0.20, "fashion": 0.36, "words": 0.34, "counting": 0.10}
    )
    words: int = 250_000
    """Distinct training pictures of words; they are drawn when they are needed."""
    pseudo: float = 0.5
    """Share of made-up words among them."""
    counting: int = 100_000
    names: int = 150
    """Names of drawings; see ``worlds.clipart``."""
    drawn: int = 100_000
    """Training pictures each of drawings, of grounding scenes and of charts."""
    warped: tuple[str, ...] = ("cifar10",)
    """Families that are shifted and zoomed. Not garments: Fashion-MNIST centres all its pictures."""
    seed: int = 1
    """Seed of the rendered worlds; the teacher's features are for seed 1 (``worlds.distill``)."""
    teacher: str | None = "teacher.npz"
    """File of teacher features in the folder of prepared assets; none trains the supervised heads alone."""
    dev_size: int = 500
    folder: str | None = None
    """Folder of prepared assets; none takes ``$CHIASM_DATA`` or the platform's cache."""

    def open(self) -> DistillSource:
        """Open worlds and teacher.

        Raises:
            DataError: assets or teacher features are missing; the message says what to run.
            ConfigError: an unknown family.
        """
        makers = {
            "cifar10": lambda split: CifarWorld(split, seed=self.seed, folder=self.folder),
            "fashion": lambda split: FashionWorld(split, seed=self.seed, folder=self.folder),
            "words": lambda split: WordsWorld(
                split,
                seed=self.seed,
                size=self.words if split == "train" else None,
                pseudo=self.pseudo if split == "train" else 0.0,
                folder=self.folder,
            ),
            "counting": lambda split: CountingWorld(
                split, seed=self.seed, size=self.counting if split == "train" else None
            ),
            "clipart": lambda split: ClipartWorld(
                split,
                seed=self.seed,
                size=self.drawn if split == "train" else None,
                names=self.names,
                folder=self.folder,
            ),
            "grounding": lambda split: GroundingWorld(
                split, seed=self.seed, size=self.drawn if split == "train" else None
            ),
            "charts": lambda split: ChartsWorld(
                split, seed=self.seed, size=self.drawn if split == "train" else None, pixels=SIZE
            ),
        }
        chosen = [name for name, weight in self.weights.items() if weight > 0]
        unknown = set(chosen) - makers.keys()
        if unknown:
            raise ConfigError(f"unknown families {sorted(unknown)}: choose among {', '.join(makers)}")
        teacher = Teacher(assets_dir(self.folder) / self.teacher) if self.teacher else None
        train, dev = ({name: makers[name](split) for name in chosen} for split in ("train", "dev"))
        return DistillSource(train, dev, self.weights, teacher, self.dev_size, self.warped)


# --- model ----------------------------------------------------------------------------------------------------


class StudentModel(nn.Module):
    """InternViT and pixel unshuffle: (N, S, S, 3) uint8 -> (N, P, C) tokens as the language model gets them."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.vision = InternViT(config)
        self.width = 4 * config.hidden_size
        self.tokens = config.tokens // 4
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1) * 255, persistent=False)

    def pixels(self, images_NSS3: Tensor) -> Tensor:
        """(N, S, S, 3) uint8 -> (N, 3, S, S) float32, normalised by ImageNet's mean and deviation."""
        return (images_NSS3.permute(0, 3, 1, 2).float() - self.mean) / self.std

    def forward(self, images_NSS3: Tensor) -> Tensor:
        """Normalise, encode, drop the class token, fold 2 x 2 patches into one token."""
        return pixel_unshuffle(self.vision(self.pixels(images_NSS3))[:, 1:], 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSpec:
    """The student's shape, and whether its positions start as sines and cosines."""

    vision: InternViTConfig
    sincos: bool = False
    start: str | None = None
    """A finished run of a student of this shape, or a safetensors file of its encoder, to begin with."""

    def build(self) -> StudentModel:
        """Return the student with new weights, or those of ``start``.

        Raises:
            CheckpointError: ``start`` is neither, or of another shape.
        """
        model = StudentModel(self.vision)
        if self.sincos:
            sincos_positions_(model.vision.position_embedding, self.vision.grid)
        if self.start is not None:
            load_vision(model.vision, self.start)
        return model


def vision_weights(source: str | Path) -> dict[str, Tensor]:
    """Return InternViT weights by native name: of a distillation run's last checkpoint, or of a safetensors file.

    Raises:
        CheckpointError: there are none.
    """
    path = Path(source)
    if path.is_dir():
        state = RunFolder.open(path).load().weights
        state = {name.removeprefix("vision."): t for name, t in state.items() if name.startswith("vision.")}
    elif path.is_file():
        state = load_file(path)
    else:
        raise CheckpointError(
            f"no vision weights in {path}: run chiasm train internvl/mini_distill, then name its run folder "
            "with --set model.vision_from=runs/…"
        )
    if not state:
        raise CheckpointError(f"{path} holds no weights named vision.*: name a distillation run")
    return state


def load_vision(vision: nn.Module, source: str | Path) -> None:
    """Load what `vision_weights` finds into an encoder; CheckpointError where the shapes differ."""
    try:
        vision.load_state_dict(vision_weights(source))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source} does not fit the encoder: {reason}") from error


# --- objective ------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """A small head over all tokens: project each to ``narrow``, concatenate, classify ``slots`` x ``classes``."""

    def __init__(self, width: int, tokens: int, narrow: int, slots: int, classes: int) -> None:
        super().__init__()
        self.shape = (slots, classes)
        self.narrow = nn.Linear(width, narrow)
        self.out = nn.Linear(tokens * narrow, slots * classes)

    def forward(self, x_NPC: Tensor) -> Tensor:
        """(N, P, C) -> (N, slots, classes)."""
        return self.out(F.gelu(self.narrow(x_NPC)).flatten(1)).unflatten(1, self.shape)


class Distill(Objective):
    """Teacher regression and supervised heads over the student's tokens. Each picture's loss is the sum of its terms.

    Args:
        width: C of the tokens.
        tokens: P.
        teacher: (D, pooled width), or None without a teacher.
        spec: weights of the terms.
        names: classes of drawings. marks: whether there are families with marks.
    """

    def __init__(
        self,
        width: int,
        tokens: int,
        teacher: tuple[int, int] | None,
        spec: DistillObjective,
        *,
        names: int = 0,
        marks: bool = False,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.norm = nn.LayerNorm(width)
        self.to_map = nn.Linear(width, teacher[0]) if teacher else None
        self.to_pooled = nn.Linear(width, teacher[1]) if teacher else None
        self.classes = nn.ModuleDict(
            {name: nn.Linear(width, CLASSES[name]) for name in ("cifar10", "fashion")}
        )
        self.dense = nn.Linear(width, 4 * sum(FACTS.values()))
        self.count = Reader(width, tokens, spec.narrow, 1, CLASSES["counting"])
        self.letters = Reader(width, tokens, spec.narrow, MAX_LETTERS, ALPHABET)
        self.marks = nn.Linear(width, 4 * (sum(MARKS.values()) + 4)) if marks else None
        if names:
            self.classes["clipart"] = nn.Linear(width, names)

    def logits(self, x_NPC: Tensor, family: str) -> Tensor:
        """Return (N, slots, classes) of the family's supervised head for normed tokens."""
        if family == "words":
            return self.letters(x_NPC)
        if family == "counting":
            return self.count(x_NPC)
        return self.classes[family](x_NPC.mean(1))[:, None]

    def loss(self, model: nn.Module, batch: DistillBatch) -> Loss:
        """Return the loss of N pictures (weight N)."""
        x_NPC = self.norm(model(batch.images_NSS3))
        total = x_NPC.new_zeros((), dtype=torch.float32)
        metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        for family in sorted(set(batch.families)):
            rows = batch.rows(family)
            if family in MARKED:
                near, edges, right, seen = self._marks(
                    x_NPC[rows], batch.marks_NFQ[rows], batch.boxes_NQL[rows]
                )
                total = total + self.spec.dense * near + self.spec.boxes * edges
                metrics[f"{family}/dense"] = (near.detach(), len(rows))
                metrics[f"{family}/edges"] = (edges.detach(), len(rows))
                metrics[f"{family}/seen"] = (right, seen)
                continue
            target_NL = batch.letters_NL[rows] if family == "words" else batch.labels_N[rows][:, None]
            logits_NLK = self.logits(x_NPC[rows], family).float()
            each = F.cross_entropy(
                logits_NLK.flatten(0, 1),
                target_NL.flatten(),
                label_smoothing=self.spec.smoothing,
                reduction="sum",
            )
            # A word's letters are as many terms: their sum, scaled, so that reading is worth about one class.
            scale = self.spec.letters if family == "words" else 1.0
            total = total + scale * each
            hits = (logits_NLK.argmax(-1) == target_NL).sum()
            if family in ("words", "counting"):
                near, seen, right = self._dense(x_NPC[rows], batch.dense_NFQ[rows])
                total = total + self.spec.dense * near
                metrics[f"{family}/dense"] = (near.detach(), len(rows))
                metrics[f"{family}/seen"] = (right, seen)
            metrics[f"{family}/loss"] = (each.detach(), target_NL.numel())
            metrics[f"{family}/accuracy"] = (hits, target_NL.numel())
        taught = batch.taught_N.nonzero().flatten()
        if self.to_map is not None and self.to_pooled is not None and len(taught):
            t_NPC = x_NPC[taught]
            near = _regress(self.to_map(t_NPC).float(), batch.map_NPD[taught])
            pooled = _regress(self.to_pooled(t_NPC.mean(1)).float(), batch.pooled_NC[taught])
            total = total + self.spec.map * near + self.spec.pooled * pooled
            metrics["map/loss"] = (near.detach(), len(taught))
            metrics["pooled/loss"] = (pooled.detach(), len(taught))
        return Loss(total=total, weight=float(len(batch.families)), metrics=metrics)

    def _dense(self, x_NPC: Tensor, dense_NFQ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss (per picture: sum over facts of the mean over patches), and of the patches that show
        something how many there are and how many are recognised in every fact.
        """
        return _facts_loss(_by_patch(self.dense(x_NPC)), dense_NFQ, tuple(FACTS.values()))

    def _marks(
        self, x_NPC: Tensor, marks_NFQ: Tensor, boxes_NQL: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the loss of shapes and colours, that of edges (per picture: mean over its marked patches, in tenths of
        the picture), and of the patches that show something how many are recognised, and how many there are.
        """
        if self.marks is None:
            raise ConfigError("this objective was built without marks")
        out_NQK = _by_patch(self.marks(x_NPC))
        loss, seen, right = _facts_loss(out_NQK[..., :-4], marks_NFQ, tuple(MARKS.values()))
        there_NQ = ~boxes_NQL[..., 0].isnan()
        off_NQ = F.smooth_l1_loss(out_NQK[..., -4:] * 10, boxes_NQL.nan_to_num() * 10, reduction="none").mean(
            -1
        )
        counts_N = there_NQ.sum(1).clamp_min(1)
        edges = ((off_NQ * there_NQ).sum(1) / counts_N).sum()
        return loss, edges, right, seen

    def boxes(self, x_NPC: Tensor) -> Tensor:
        """(N, Q, 4): the box that every patch sees around its mark, in shares of the picture."""
        if self.marks is None:
            raise ConfigError("this objective was built without marks")
        return _by_patch(self.marks(x_NPC))[..., -4:]

    def evaluate(self, model: nn.Module, source: Source) -> dict[str, float]:
        """Return the heads' accuracy on the dev split by family; words by letter and by whole word; of families with
        marks the mean IoU of the boxes that marked patches see.
        """
        if not isinstance(source, DistillSource):
            raise ConfigError(f"Distill needs a DistillSource, got {type(source).__name__}")
        device = self.norm.weight.device
        scores = {}
        for family in sorted(f for f, w in source.weights.items() if w > 0):
            batch = source.dev(family).to(device)
            parts = [self.norm(model(part)) for part in batch.images_NSS3.split(100)]
            if family in MARKED:
                there_NQ = ~batch.boxes_NQL[..., 0].isnan()
                guess_ML = torch.cat([self.boxes(part) for part in parts])[there_NQ]
                scores[family] = float(_iou(guess_ML.float(), batch.boxes_NQL[there_NQ]).mean())
                continue
            guess_NL = torch.cat([self.logits(part, family).argmax(-1) for part in parts])
            right_NL = guess_NL == (batch.letters_NL if family == "words" else batch.labels_N[:, None])
            scores[family] = float(right_NL.all(1).float().mean())
            if family == "words":
                scores["letters"] = float(right_NL.float().mean())
        return scores


def _by_patch(y_NPK: Tensor) -> Tensor:
    """(N, P, 4K) -> (N, Q, K) float32, in the picture's order: a token's channels are its 2 x 2 patches, in rows."""
    side = math.isqrt(y_NPK.shape[1])
    y_NRSIJK = y_NPK.float().view(len(y_NPK), side, side, 2, 2, -1)
    return y_NRSIJK.permute(0, 1, 3, 2, 4, 5).reshape(len(y_NPK), 4 * side * side, -1)


def _facts_loss(
    logits_NQK: Tensor, facts_NFQ: Tensor, classes: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (per picture: sum over facts of the mean over patches); patches that show something; those right in all."""
    loss = logits_NQK.new_zeros((), dtype=torch.float32)
    there_NQ = torch.zeros_like(facts_NFQ[:, 0], dtype=torch.bool)
    right_NQ = torch.ones_like(there_NQ)
    for fact, part_NQK in enumerate(logits_NQK.split(classes, dim=-1)):
        target_NQ = facts_NFQ[:, fact]
        if target_NQ[0, 0] == -100:
            continue
        each_NQ = F.cross_entropy(part_NQK.flatten(0, 1), target_NQ.flatten(), reduction="none")
        loss = loss + each_NQ.sum() / target_NQ.shape[1]
        there_NQ |= target_NQ < part_NQK.shape[-1] - 1
        right_NQ &= part_NQK.argmax(-1) == target_NQ
    return loss, there_NQ.sum(), (there_NQ & right_NQ).sum()


def _iou(a_ML: Tensor, b_ML: Tensor) -> Tensor:
    """(M,) intersection over union of boxes (x0, y0, x1, y1); 0 where a box is inverted."""
    low_M2, high_M2 = torch.maximum(a_ML[:, :2], b_ML[:, :2]), torch.minimum(a_ML[:, 2:], b_ML[:, 2:])
    both_M = (high_M2 - low_M2).clamp_min(0).prod(1)
    areas = [(x[:, 2:] - x[:, :2]).clamp_min(0).prod(1) for x in (a_ML, b_ML)]
    return both_M / (areas[0] + areas[1] - both_M).clamp_min(1e-9)


def _regress(guess: Tensor, target: Tensor) -> Tensor:
    """Sum over pictures of smooth L1 (mean over all else) and cosine distance (mean over places)."""
    close = F.smooth_l1_loss(guess, target, reduction="none").flatten(1).mean(1)
    angle = 1 - F.cosine_similarity(guess, target, dim=-1)
    return (close + angle.reshape(len(angle), -1).mean(1)).sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillObjective:
    """Weights of the terms of ``Distill``."""

    map: float = 1.0
    pooled: float = 1.0
    letters: float = 0.3
    dense: float = 3.0
    boxes: float = 1.0
    smoothing: float = 0.05
    narrow: int = 48
    whiten: int = 0
    """Training pictures of each family from which the student's patch projection is whitened; 0: left random."""

    def build(self, model: nn.Module, source: Source) -> Distill:
        """Return the objective for a StudentModel and a DistillSource."""
        if not isinstance(model, StudentModel) or not isinstance(source, DistillSource):
            raise ConfigError("DistillObjective needs a StudentSpec model and DistillData")
        if self.whiten:
            draws = [(name, i) for name, size in source.sizes.items() for i in range(min(self.whiten, size))]
            images_NSS3 = source.fetch(draws, generator(0, "whiten")).images_NSS3
            whiten_patches_(model.vision.patch_embedding, model.pixels(images_NSS3))
        drawn = {family for family, weight in source.weights.items() if weight > 0}
        return Distill(
            model.width,
            model.tokens,
            source.teacher_widths,
            self,
            names=len(source.names),
            marks=bool(drawn & set(MARKED)),
        )
