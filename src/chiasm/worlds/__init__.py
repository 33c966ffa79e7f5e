"""Worlds with exact ground truth, written in the layouts of public data sets.

Each family is a ``World`` with random access by index. ``cifar10`` and ``fashion`` are real pictures, ``clipart`` named
drawings (see ``assets``); ``words``, ``counting``, ``scenes``, ``grounding``, ``pages``, ``charts`` and ``clips`` are
drawn here. ``open_world(family, split)`` opens one; ``available`` lists those whose assets are here, so a mixture
without CIFAR-10 is a shorter list and nothing else.

May import ``data`` and the rings below it; never a model.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chiasm.errors import DataError
from chiasm.worlds.assets import assets_dir, has_asset, load_arrays, prepare
from chiasm.worlds.charts import ChartsWorld
from chiasm.worlds.cifar10 import CifarWorld
from chiasm.worlds.clipart import ClipartWorld
from chiasm.worlds.clips import ClipsWorld
from chiasm.worlds.counting import CountingWorld
from chiasm.worlds.fashion import FashionWorld
from chiasm.worlds.grounding import GroundingWorld, box_scores, mean_box
from chiasm.worlds.pages import PagesWorld
from chiasm.worlds.scenes import ScenesWorld
from chiasm.worlds.words import WordsWorld
from chiasm.worlds.world import Sample, Thing, World, build_cache, cached, load_cache
from chiasm.worlds.writers import write_coco, write_jsonl, write_video

__all__ = [
    "FAMILIES",
    "WORLDS",
    "ChartsWorld",
    "CifarWorld",
    "ClipartWorld",
    "ClipsWorld",
    "CountingWorld",
    "FashionWorld",
    "GroundingWorld",
    "PagesWorld",
    "Sample",
    "ScenesWorld",
    "Thing",
    "WordsWorld",
    "World",
    "assets_dir",
    "available",
    "box_scores",
    "build_cache",
    "cached",
    "has_asset",
    "load_arrays",
    "load_cache",
    "mean_box",
    "open_world",
    "options_of",
    "prepare",
    "write_coco",
    "write_jsonl",
    "write_video",
]

#: The families of chiasm-mini v0, in the order that ids refer to; what ``chiasm eval`` asks unless told otherwise.
FAMILIES: dict[str, type[World]] = {
    "cifar10": CifarWorld,
    "fashion": FashionWorld,
    "words": WordsWorld,
    "counting": CountingWorld,
}

#: Every family -> its class.
WORLDS: dict[str, type[World]] = {
    **FAMILIES,
    "scenes": ScenesWorld,
    "grounding": GroundingWorld,
    "clipart": ClipartWorld,
    "pages": PagesWorld,
    "charts": ChartsWorld,
    "clips": ClipsWorld,
}

#: Family -> the asset without which it cannot be opened.
_NEEDS = {"cifar10": "cifar10", "fashion": "fashion", "clipart": "emoji"}


def options_of(family: str) -> tuple[str, ...]:
    """Return the names of the options that a family takes beside its split.

    Raises:
        DataError: unknown family; the message suggests the nearest.
    """
    if family not in WORLDS:
        near = difflib.get_close_matches(family, WORLDS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"unknown world {family!r}: {hint}choose one of {', '.join(WORLDS)}")
    return tuple(name for name in inspect.signature(WORLDS[family]).parameters if name != "split")


def open_world(family: str, split: str, **options: Any) -> World:
    """Open a family's split; ``options`` go to its class (``seed``, ``size``, ``folder``, ``pixels``, ...).

    Raises:
        DataError: unknown family, split or option, a value out of range, or an asset has not been prepared.
    """
    known = options_of(family)
    for name in options:
        if name not in known:
            raise DataError(f"the world {family} has no option {name!r}: it has {', '.join(known)}")
    for name, least in (("size", 1), ("rounds", 1), ("seed", 0)):
        value = options.get(name)
        if value is not None and (type(value) is not int or value < least):
            raise DataError(
                f"{name}={value!r} of the world {family}: give a whole number of at least {least}"
            )
    return WORLDS[family](split, **options)


def available(folder: str | Path | None = None, among: Iterable[str] = tuple(FAMILIES)) -> tuple[str, ...]:
    """Return the families that can be opened with the assets prepared in ``assets_dir(folder)``.

    Args:
        folder: the prepared assets.
        among: families to choose from (default: FAMILIES; ``WORLDS`` for all).
    """
    return tuple(name for name in among if name not in _NEEDS or has_asset(_NEEDS[name], folder))
