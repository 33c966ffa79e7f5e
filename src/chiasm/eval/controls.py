"""Answerers that do not look, and one that looks without a model: what a score must be held against.

What:
  ``majority``         the most frequent answer of the *training* split, whatever is asked
  ``blank_like``       the same questions about a picture of one grey (the model answers)
  ``derangement``      the same questions about another item's picture (the model answers)
  ``fit_linear``       multinomial logistic regression on raw pixels (LBFGS, L2), with ``fashion_linear``, which fits
                       it on the Fashion-MNIST training pictures, chooses its penalty on dev and keeps its answers

The linear control sees every training picture at its native resolution, which is more than the model sees; a model
that does not beat it has learnt nothing about garments that a template does not know.

Shape legend: N items, F features (pixels), K classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.errors import ConfigError, DataError
from chiasm.worlds.assets import assets_dir
from chiasm.worlds.fashion import ANSWERS, FashionWorld
from chiasm.worlds.world import World

__all__ = [
    "LinearControl",
    "Majority",
    "blank_like",
    "derangement",
    "fashion_linear",
    "fit_linear",
    "grey_level",
    "majority",
]

#: Training samples that are drawn to count the answers of a world without label arrays.
COUNTED = 4000
#: Penalties among which the linear control chooses on dev, strongest first (each starts from the one before).
PENALTIES = (1e-2, 1e-3, 1e-4, 1e-5)


# --- answers that do not depend on the picture ----------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Majority:
    """The most frequent training answer; of equally frequent ones the first in alphabetical order."""

    answer: str
    share: float
    counted: int


def majority(train: World) -> Majority:
    """Count the answers of a training split.

    Worlds of real pictures are counted completely (from their label arrays), drawn ones over their first samples.

    Raises:
        DataError: the world is empty.
    """
    answers = _answers(train)
    if not answers:
        raise DataError(f"world {train.family}/{train.split} is empty: no majority answer")
    counts = Counter(answers)
    answer = min(counts, key=lambda name: (-counts[name], name))
    return Majority(answer=answer, share=counts[answer] / len(answers), counted=len(answers))


def _answers(world: World) -> list[str]:
    arrays: Callable[[], tuple[np.ndarray, np.ndarray]] | None = getattr(world, "arrays", None)
    names = world.manifest().get("answers")
    if arrays is not None and names:
        return [names[label] for label in arrays()[1].tolist()]
    return [world.sample(i).answer for i in range(min(len(world), COUNTED))]


# --- pictures that do not show the answer ---------------------------------------------------------------------


def grey_level(train: World, samples: int = 200) -> int:
    """Return the mean of all channels over the first training pictures, 0 … 255."""
    count = min(samples, len(train))
    if not count:
        raise DataError(f"world {train.family}/{train.split} is empty: no mean grey")
    return round(float(np.mean([train.sample(i).image.mean() for i in range(count)])))


def blank_like(image_HW3: np.ndarray, level: int) -> np.ndarray:
    """Return a picture of the same size and one grey."""
    return np.full_like(image_HW3, level)


def derangement(n: int, seed: int) -> np.ndarray:
    """Return a permutation of 0 … n - 1 that moves everything: one random cycle through all items (Sattolo).

    Raises:
        DataError: fewer than two items.
    """
    if n < 2:
        raise DataError(f"cannot exchange the pictures of {n} item: evaluate at least two")
    rng = np.random.Generator(np.random.PCG64([seed, n]))
    order = np.arange(n)
    for last in range(n - 1, 0, -1):
        other = int(rng.integers(last))  # never `last` itself, so no item can come back to its place
        order[last], order[other] = order[other], order[last]
    return order


# --- raw pixels -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearControl:
    """A fitted multinomial logistic regression.

    Attributes:
        weight_KF, bias_K: in the precision of the features. mean_F: subtracted from the features first.
        penalty: L2 on the weights. loss: mean cross-entropy plus penalty at the optimum.
        gradient: largest entry of the gradient where the solver stopped. evaluations: of the loss.
    """

    weight_KF: Tensor
    bias_K: Tensor
    mean_F: Tensor
    penalty: float
    loss: float
    gradient: float
    evaluations: int

    def logits(self, features_NF: Tensor) -> Tensor:
        """Return (N, K) scores of (N, F) features."""
        return F.linear(features_NF - self.mean_F, self.weight_KF, self.bias_K)

    def predict(self, features_NF: Tensor) -> Tensor:
        """Return (N,) class ids."""
        return self.logits(features_NF).argmax(1)


def fit_linear(
    features_NF: Tensor,
    labels_N: Tensor,
    classes: int,
    *,
    penalty: float,
    start: LinearControl | None = None,
    steps: int = 400,
    tolerance: float = 1e-5,
) -> LinearControl:
    """Minimise mean cross-entropy + penalty / 2 * |W|^2 (the bias is free); full batch, LBFGS, strong Wolfe.

    The problem is convex, so the result does not depend on the start, which only saves time.

    Args:
        features_NF: (N, F) float32 or float64. labels_N: (N,) int64 in 0 … classes - 1.
        penalty: > 0.
        start: a solution for another penalty on the same features.
        steps: at most; fewer when no entry of the gradient exceeds ``tolerance``.

    Raises:
        ConfigError: a penalty that is not positive, or labels that do not fit.
    """
    if penalty <= 0:
        raise ConfigError(f"the penalty of the linear control must be > 0, got {penalty}")
    if len(labels_N) != len(features_NF) or not len(labels_N) or int(labels_N.max()) >= classes:
        raise ConfigError(f"{len(features_NF)} rows, {len(labels_N)} labels of {classes} classes do not fit")
    mean_F = features_NF.mean(0)
    centred_NF = features_NF - mean_F
    weight_KF = (
        features_NF.new_zeros(classes, features_NF.shape[1]) if start is None else start.weight_KF.clone()
    )
    bias_K = features_NF.new_zeros(classes) if start is None else start.bias_K.clone()
    parameters = [weight_KF.requires_grad_(), bias_K.requires_grad_()]
    solver = torch.optim.LBFGS(
        parameters,
        lr=1.0,
        max_iter=steps,
        max_eval=2 * steps,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    evaluations = 0

    def objective() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(centred_NF, weight_KF, bias_K), labels_N)
        loss = loss + 0.5 * penalty * weight_KF.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)  # pyright: ignore[reportArgumentType] (LBFGS wants the loss as a tensor)
        loss = float(objective().detach())
    gradient = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)
    return LinearControl(
        weight_KF=weight_KF.detach(),
        bias_K=bias_K.detach(),
        mean_F=mean_F,
        penalty=penalty,
        loss=loss,
        gradient=gradient,
        evaluations=evaluations,
    )


def fashion_linear(
    split: str,
    folder: str | Path | None = None,
    *,
    penalties: Sequence[float] = PENALTIES,
    cache: str | Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[list[str], dict[str, Any]]:
    """Return the linear control's answers to a Fashion-MNIST split, in sample order, and the facts of its fit.

    Fitted on the training split (raw native pixels / 255), its penalty chosen by accuracy on dev. Fitting takes
    some CPU-minutes, so weights and answers are kept in ``cache`` (default: ``assets_dir(folder)/cache``) under a
    digest of pictures, labels and settings.

    Args:
        split: "dev" or "test".
        folder: prepared assets.
        penalties: to choose among, strongest first.
        cache: where the fit is kept.
        report: is told what is being fitted.

    Raises:
        DataError: Fashion-MNIST has not been prepared, or the split is "train".
    """
    if split not in ("dev", "test"):
        raise DataError(f"the linear control answers dev or test, not {split!r}: it was fitted on train")
    worlds = {name: FashionWorld(name, folder=folder) for name in ("train", "dev", "test")}
    digest = hashlib.blake2s(json.dumps([1, list(penalties)]).encode(), digest_size=8)
    for world in worlds.values():
        for array in world.arrays():
            digest.update(np.ascontiguousarray(array).data)
    place = Path(cache) if cache is not None else assets_dir(folder) / "cache"
    path = place / f"fashion-linear-{digest.hexdigest()}.npz"
    kept = _read(path)
    if kept is None:
        kept = _fit_fashion(worlds, penalties, report)
        _write(path, kept)
    facts = json.loads(str(kept["facts"]))
    return [ANSWERS[label] for label in kept[f"{split}_N"].tolist()], facts


def _fit_fashion(
    worlds: dict[str, FashionWorld], penalties: Sequence[float], report: Callable[[str], None]
) -> dict[str, np.ndarray]:
    began = time.process_time()
    data = {name: _features(world) for name, world in worlds.items()}
    features, labels = data["train"]
    best, accuracy, tried, last = None, -1.0, [], None
    for penalty in penalties:
        last = fit_linear(features, labels, len(ANSWERS), penalty=penalty, start=last)
        dev = int((last.predict(data["dev"][0]) == data["dev"][1]).sum()) / len(data["dev"][1])
        tried.append(
            {
                "penalty": penalty,
                "dev_accuracy": dev,
                "loss": last.loss,
                "gradient": last.gradient,
                "evaluations": last.evaluations,
            }
        )
        report(f"raw-pixel linear control: penalty {penalty:g}, dev accuracy {dev:.4f}")
        if dev > accuracy:
            best, accuracy = last, dev
    if best is None:
        raise ConfigError("give the linear control at least one penalty")
    facts = {
        "method": "multinomial logistic regression on raw 28 x 28 pixels, L2, LBFGS",
        "trained_on": len(labels),
        "penalty": best.penalty,
        "tried": tried,
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    return {
        "weight_KF": best.weight_KF.numpy(),
        "bias_K": best.bias_K.numpy(),
        "mean_F": best.mean_F.numpy(),
        "dev_N": best.predict(data["dev"][0]).numpy(),
        "test_N": best.predict(data["test"][0]).numpy(),
        "facts": np.array(json.dumps(facts)),
    }


def _features(world: FashionWorld) -> tuple[Tensor, Tensor]:
    """Return (N, F) float32 pixels in 0..1 and (N,) labels."""
    images, labels = world.arrays()
    pixels_NF = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32)) / 255.0
    return pixels_NF, torch.from_numpy(labels.astype(np.int64))


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """Return the kept fit; None when there is none or the file is damaged (it is then fitted again)."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            kept = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return kept if {"dev_N", "test_N", "facts"} <= kept.keys() else None


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as out:
            np.savez(out, **arrays)  # pyright: ignore[reportArgumentType] (numpy's stub of **kwds)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
