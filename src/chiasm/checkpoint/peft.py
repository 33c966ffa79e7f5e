"""LoRA adapters in PEFT's files: written for the public model, and read from it.

What: ``write_adapter`` (``adapter_model.safetensors`` and ``adapter_config.json``), ``read_adapter``.
Source: the files of peft (0.13 to 0.21): tensors ``base_model.model.<layer>.lora_A.weight`` (rank, in) and
``lora_B.weight`` (out, rank), the product counting alpha / rank times.

Our fused layers have one pair of matrices for each split (q, k, v; gate, up). Where a layout has a layer for each of
them they are written under its names. Where a layout fuses them too (Phi-3, the encoder of the original layout,
InternLM2's ``wqkv``) one pair must do: A of all splits below each other, B block-diagonal, rank and alpha times the
number of splits, which is the same function. Both are read back, also adapters that know only some of the splits.

Legend: O features out, I features in, r rank, n splits of sizes O_1 + ... + O_n = O.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from chiasm.checkpoint.adapters import TableAdapter
from chiasm.checkpoint.store import new_folder, read_json, write_safetensors
from chiasm.errors import CheckpointError
from chiasm.nn.lora import LoRALinear, apply_lora, fused_splits

__all__ = ["read_adapter", "write_adapter"]

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_REFUSED = {
    "use_dora": False,
    "use_qalora": False,
    "bias": "none",
    "modules_to_save": None,
    "fan_in_fan_out": False,
}
"""What an adapter's config may not ask for beyond plain LoRA, with the value that is none of it."""


def write_adapter(
    model: nn.Module, folder: str | Path, adapter: TableAdapter, *, base: str = "", force: bool = False
) -> Path:
    """Write the LoRA layers of a model for peft; the folder appears whole or not at all.

    Args:
        model: with native names (``trunk.…``, ``embedder.vision.…``); its `LoRALinear` layers are written.
        folder: an existing empty folder is used, any other is refused without ``force``.
        adapter: of the layout that the adapter will be used with (`adapter_for`); ``text`` for a language model alone.
        base: id or path of the public model, noted in the config.
        force: replace an adapter that is there.

    Raises:
        CheckpointError: the model has no LoRA layer, or the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    dropout = 0.0
    for path, layer in _layers(model):
        dropout = layer.dropout
        for public, a_rI, b_Or in _public_pairs(path, layer, adapter):
            tensors[f"{_PREFIX}{public}.lora_A.weight"] = a_rI
            tensors[f"{_PREFIX}{public}.lora_B.weight"] = b_Or
            ranks[public] = a_rI.shape[0]
            alphas[public] = layer.scale * a_rI.shape[0]
    if not ranks:
        raise CheckpointError("this model has no LoRA layers: train with lora.rank or vision_lora.rank")
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if adapter.layout == "text" else None,
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    with new_folder(folder, force=force, owned=lambda path: (path / CONFIG).is_file()) as (temporary, target):
        write_safetensors(temporary / TENSORS, tensors.items())
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return target


def read_adapter(model: nn.Module, folder: str | Path, adapter: TableAdapter) -> list[str]:
    """Put the adapter of a folder on a model in place of its plain layers; return the native paths of these.

    The adapted layers' own weights are frozen; so should be the rest (``model.requires_grad_(False)``, before this).

    Args:
        model: without adapters on these layers.
        folder: as peft or `write_adapter` writes it.
        adapter: of the layout whose names it has.

    Raises:
        CheckpointError: a file is missing or damaged, the adapter is more than plain LoRA, a layer is not in the model,
            has an adapter already, or a pair does not fit its layer.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    for key, harmless in _REFUSED.items():
        if config.get(key) not in (harmless, None):
            raise CheckpointError(
                f"{folder / CONFIG}: {key}={config[key]!r} is more than LoRA, which is all that is read"
            )
    try:
        stored = load_file(folder / TENSORS)
        default = (int(config["r"]), float(config["lora_alpha"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is not a whole LoRA adapter ({' '.join(str(error).split())})"
        ) from error
    left = set(stored)
    paths = []
    for path, linear in [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear | LoRALinear)]:
        try:
            publics = [name.removesuffix(".weight") for name in adapter.spell(f"{path}.weight")]
        except (KeyError, ValueError):  # a layer that the layout has no name for
            continue
        pairs = [_stored_pair(stored, left, public) for public in publics]
        if not any(pairs):
            continue
        if isinstance(linear, LoRALinear):
            raise CheckpointError(f"{path} has an adapter already: merge it before reading {folder}")
        ranks = {a_rI.shape[0] for a_rI, _ in filter(None, pairs)}
        scales = {
            _scale(config, public, *default) for public, pair in zip(publics, pairs, strict=True) if pair
        }
        if len(ranks) > 1 or len(scales) > 1:
            raise CheckpointError(
                f"{folder}: the layers {', '.join(publics)}, one here, have different ranks or alphas: make them equal"
            )
        rank, scale = ranks.pop(), scales.pop()
        apply_lora(
            model,
            [path],
            rank,
            scale * rank,
            float(config.get("lora_dropout") or 0.0),
            splits=fused_splits(model),
        )
        layer = model.get_submodule(path)
        assert isinstance(layer, LoRALinear)
        _fill(layer, pairs, f"{folder}: {publics[0]}", _rows(path, adapter), linear)
        paths.append(path)
    if left or not paths:
        odd = sorted(left)[0] if left else "nothing"
        raise CheckpointError(
            f"{folder} adapts {odd}, which the model has not in the {adapter.layout} layout: "
            "give the layout of its base"
        )
    return paths


def _layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


def _rows(path: str, adapter: TableAdapter) -> Tensor | None:
    """The layout's order of a layer's output rows, where it is another."""
    return adapter.qkv_rows if path.startswith("trunk.") and path.endswith(".attn.qkv") else None


def _public_pairs(
    path: str, layer: LoRALinear, adapter: TableAdapter
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(Public layer, A (r, I), B (O, r)) of each public layer that makes ours."""
    publics = [name.removesuffix(".weight") for name in adapter.spell(f"{path}.weight")]
    a_all, b_all = (x.detach().float().cpu() for x in (layer.lora_A, layer.lora_B))
    if len(publics) == len(layer.splits):
        yield from zip(publics, a_all.split(layer.rank), b_all.split(layer.splits), strict=True)
        return
    b_OR = torch.block_diag(*b_all.split(layer.splits))
    rows = _rows(path, adapter)
    yield publics[0], a_all, b_OR if rows is None else b_OR[rows]


def _stored_pair(stored: dict[str, Tensor], left: set[str], public: str) -> tuple[Tensor, Tensor] | None:
    names = [f"{_PREFIX}{public}.lora_{side}.weight" for side in "AB"]
    left.difference_update(names)
    there = [stored[name].float() for name in names if name in stored]
    if len(there) == 1:
        raise CheckpointError(f"the adapter has one of {names[0]} and {names[1]} only: save it again")
    return (there[0], there[1]) if there else None


def _scale(config: dict[str, Any], public: str, rank: int, alpha: float) -> float:
    """The factor of one layer, alpha / rank."""

    def of(pattern: str, default: float) -> float:
        # peft matches the end of a layer's path; keys are regular expressions, in practice names.
        table = config.get(pattern) or {}
        found = [
            v for k, v in table.items() if public == k or public.endswith(f".{k}") or fnmatchcase(public, k)
        ]
        return float(found[0]) if found else default

    r, a = of("rank_pattern", rank), of("alpha_pattern", alpha)
    return a / math.sqrt(r) if config.get("use_rslora") else a / r


def _fill(
    layer: LoRALinear,
    pairs: list[tuple[Tensor, Tensor] | None],
    what: str,
    rows: Tensor | None,
    linear: nn.Linear,
) -> None:
    """Copy public pairs into a fresh layer, whose B is zero where there is none."""
    n = len(layer.splits)
    if len(pairs) == 1 and n > 1:  # one pair for all splits: each gets the whole A and its own rows of B
        assert pairs[0] is not None
        a_rI, b_Or = pairs[0]
        if rows is not None and len(b_Or) == len(rows):  # stored == native[rows]
            b_Or = torch.empty_like(b_Or).index_copy_(0, rows, b_Or)
        lows, ups = [a_rI] * n, [b_Or]
    else:
        lows = [pair[0] if pair else torch.zeros(layer.rank, layer.in_features) for pair in pairs]
        ups = [
            pair[1] if pair else torch.zeros(size, layer.rank)
            for pair, size in zip(pairs, layer.splits, strict=True)
        ]
    a_all, b_all = torch.cat(lows), torch.cat(ups)
    if a_all.shape != layer.lora_A.shape or b_all.shape != layer.lora_B.shape:
        raise CheckpointError(
            f"{what}: its pair, {tuple(a_all.shape)} and {tuple(b_all.shape)}, does not fit a layer of "
            f"{linear.in_features} inputs and {linear.out_features} outputs: it is of another model"
        )
    with torch.no_grad():
        layer.lora_A.copy_(a_all)
        layer.lora_B.copy_(b_all)
