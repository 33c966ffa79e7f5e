"""Procedural worlds with exact ground truth, written in the layouts of public data sets.

Four families, each a ``World`` with random access: ``cifar10`` and ``fashion`` (real pictures, see ``assets``),
``words`` and ``counting`` (drawn). ``open_world(family, split)`` opens one; ``available`` lists those whose assets
are here, so a mixture without CIFAR-10 is a shorter list and nothing else.

May import ``data`` and the rings below it; never a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chiasm.errors import DataError
from chiasm.worlds.assets import assets_dir, has_asset, load_arrays, prepare
from chiasm.worlds.cifar10 import CifarWorld
from chiasm.worlds.counting import CountingWorld
from chiasm.worlds.fashion import FashionWorld
from chiasm.worlds.words import WordsWorld
from chiasm.worlds.world import Sample, Thing, World, build_cache, cached, load_cache
from chiasm.worlds.writers import write_coco, write_jsonl, write_video

__all__ = [
    "FAMILIES",
    "CifarWorld",
    "CountingWorld",
    "FashionWorld",
    "Sample",
    "WordsWorld",
    "World",
    "assets_dir",
    "available",
    "build_cache",
    "cached",
    "has_asset",
    "load_arrays",
    "load_cache",
    "open_world",
    "prepare",
    "write_jsonl",
]

#: Family -> class, in the order that ids refer to.
FAMILIES: dict[str, type[World]] = {
    "cifar10": CifarWorld,
    "fashion": FashionWorld,
    "words": WordsWorld,
    "counting": CountingWorld,
}


def open_world(family: str, split: str, **options: Any) -> World:
    """Open a family's split; ``options`` go to its class (``seed``, ``size``, ``folder``, ...).

    Raises:
        DataError: unknown family or split, or an asset has not been prepared.
    """
    if family not in FAMILIES:
        raise DataError(f"unknown world {family!r}: choose one of {', '.join(FAMILIES)}")
    return FAMILIES[family](split, **options)


def available(folder: str | Path | None = None) -> tuple[str, ...]:
    """Return the families that can be opened with the assets prepared in ``assets_dir(folder)``."""
    real = ("cifar10", "fashion")
    return tuple(family for family in FAMILIES if family not in real or has_asset(family, folder))
