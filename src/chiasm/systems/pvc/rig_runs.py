"""What the arms of PVC's claims do: one function an experiment, from a ``Trial`` to its metrics.

Source: PVC fact sheet, section 7. All training data is of the train split; what is measured is of the trial's own split
(dev while tuning, test when confirming). The arms of an experiment have as many parameters as its largest, within two
percent, and equal steps and pages or clips.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from chiasm.lab.claim import Trial
from chiasm.lab.training import train_rig
from chiasm.model.causal import CausalVLM
from chiasm.systems.pvc.rig import (
    RigModel,
    accuracies,
    changes,
    parameters_of,
    rig_recipe,
    spread,
    stopped,
)
from chiasm.systems.pvc.rig_data import RigData, RigSource

__all__ = ["anytime", "curve", "mixed", "model_of", "static_repeats", "video", "views"]

SIZES = ("vision_width", "vision_layers", "temporal_layers", "width", "layers", "ffn")
QUANTILES = (25, 50, 75)
"""Percent of the changes of training pages that lie below a threshold of `anytime`."""


def model_of(trial: Trial, *, largest: int = 4, **more: Any) -> RigModel:
    """The model of an arm: the rig's, smaller where the budget says so, with the parameters of a PVC of K = `largest`.

    The fewer the tokens the larger is the projector.
    """
    sizes: dict[str, Any] = {name: int(trial.budget[name]) for name in SIZES if name in trial.budget}
    base = RigModel(**sizes)
    return replace(base, parameters=parameters_of(replace(base, tokens=largest)), **more)


def _data(trial: Trial, tasks: Mapping[str, float], **more: Any) -> RigData:
    return RigData(**{"tasks": tasks, "seed": trial.seed, "size": int(trial.budget["items"]), **more})


def _train(trial: Trial, data: RigData, model: RigModel, *, batches: int = 1) -> CausalVLM:
    """Train on batches that are so many times as large as the budget's."""
    recipe = rig_recipe(
        data,
        model,
        steps=int(trial.budget["steps"]),
        batch=batches * int(trial.budget["batch"]),
        seed=trial.seed,
    )
    return train_rig(recipe)[0]


def _held_out(trial: Trial, data: RigData, **more: Any) -> RigSource:
    """Items like these from the trial's split, whole."""
    size = int(trial.budget["count"])
    return replace(data, **{"split": trial.split, "size": size, "varied": False, "cut": False, **more}).open()


# --- M1 -----------------------------------------------------------------------------------------------------


def static_repeats(trial: Trial) -> dict[str, float]:
    """Read a page through few tokens: once, again and again, or at once through as many as all repeats have.

    ``digits``: share of digits that are read. ``spread``: how much the repeats of a page differ before noise.
    """
    s = trial.arm.settings
    shape = {"tokens": int(s["tokens"]), "repeats": int(s["repeats"])}
    noise = RigModel().noise if s["noisy"] else 0.0
    model = model_of(trial, **shape, noise=noise, timed=bool(s["timed"]), attention=bool(s["attention"]))
    data = _data(trial, {"still": 1}, **shape)
    trained = _train(trial, data, model)
    found = accuracies(trained, _held_out(trial, data), "still")
    return found | {
        "spread": spread(trained, _held_out(trial, data, size=min(16, int(trial.budget["count"]))))
    }


# --- M2 -----------------------------------------------------------------------------------------------------


def video(trial: Trial) -> dict[str, float]:
    """Read the page behind the square of a clip, and follow the square, through 8 K tokens."""
    s = trial.arm.settings
    tokens, frames, pool = int(s["tokens"]), int(s["frames"]), int(s["pool"])
    model = model_of(trial, tokens=tokens, pool=pool, timed=bool(s["timed"]), attention=bool(s["attention"]))
    data = _data(trial, {"clip": 1}, tokens=tokens, frames=frames, window=pool, cut=True)
    return accuracies(_train(trial, data, model), _held_out(trial, data), "clip")


# --- M3 -----------------------------------------------------------------------------------------------------


def mixed(trial: Trial) -> dict[str, float]:
    """One PVC for pages and clips, or one for either; each task has equal items a step in both cases."""
    tasks = str(trial.arm.settings["tasks"]).split("+")
    data = _data(trial, dict.fromkeys(tasks, 1.0), cut=True)
    trained = _train(trial, data, model_of(trial), batches=len(tasks))
    source = _held_out(trial, data)
    return {name: value for task in tasks for name, value in accuracies(trained, source, task).items()}


# --- beyond -------------------------------------------------------------------------------------------------


def curve(trial: Trial) -> dict[str, float]:
    """Clips through so many tokens of so many frames; ``rows``: tokens in all."""
    tokens, frames = int(trial.arm.settings["tokens"]), int(trial.arm.settings["frames"])
    data = _data(trial, {"clip": 1}, tokens=tokens, frames=frames, cut=True)
    trained = _train(trial, data, model_of(trial, largest=1, tokens=tokens))
    return accuracies(trained, _held_out(trial, data), "clip") | {"rows": float(tokens * frames)}


def anytime(trial: Trial) -> dict[str, float]:
    """Read full and half-empty pages after one to four repeats, and after as many as change the tokens enough.

    ``r1`` … ``r4``: share of digits read from so many repeats. For each threshold (below which lie 25, 50, 75 percent
    of the changes from repeat to repeat of training pages): ``stop``, the share read when repeats end by it,
    ``repeats``, their mean number, ``even``, what that mean number would read were it the same for all pages
    (interpolated between ``r1`` … ``r4``).
    """
    data = _data(trial, {"still": 1}, full=0.5, varied=bool(trial.arm.settings["varied"]))
    trained = _train(trial, data, model_of(trial))
    source = _held_out(trial, data)
    counts = range(1, data.repeats + 1)
    out = {f"r{n}": accuracies(trained, source, "still", repeats=n)["digits"] for n in counts}
    known = changes(trained, replace(data, size=min(data.size, 300)).open())
    for percent in QUANTILES:
        right, repeats = stopped(trained, source, float(known.quantile(percent / 100)))
        even = float(np.interp(repeats, list(counts), [out[f"r{n}"] for n in counts]))
        out |= {f"stop{percent}": right, f"repeats{percent}": repeats, f"even{percent}": even}
    return out


def views(trial: Trial) -> dict[str, float]:
    """Read a page through five repeats: all the same, the page and its quarters, or the page from coarse to fine."""
    model = model_of(trial, repeats=5, views=str(trial.arm.settings["views"]))
    data = _data(trial, {"still": 1}, repeats=5)
    return accuracies(_train(trial, data, model), _held_out(trial, data), "still")
