"""LoRA-wrapped saves of the release: read as if the adapters had been merged.

Source: the training script of InternVL (arXiv 2412.05271): with `--use_llm_lora r` or `--use_backbone_lora r` the
language model or the encoder is wrapped by peft and saved so, under `….base_model.model.…` with `lora_A` and `lora_B`
beside the layers; `config.json` notes r under the same names, and the scale is always alpha / r = 2r / r.

Legend: O features out, I features in, r rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiasm.checkpoint.store import CheckpointReader
from chiasm.errors import CheckpointError

__all__ = ["MergedReader", "open_reader"]

_WRAPPED = {"language_model.": "use_llm_lora", "vision_model.": "use_backbone_lora"}
"""Part of the model -> key of config.json that holds the rank of its adapters."""
_PEFT = "base_model.model."
_LORA = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.weight")
_SCALE = 2.0  # alpha / r


def open_reader(folder: str | Path) -> CheckpointReader:
    """The tensors of a checkpoint folder, with LoRA adapters merged where it has any.

    Raises:
        CheckpointError: what the readers raise.
    """
    reader = CheckpointReader(folder)
    wrapped = tuple(part + _PEFT for part in _WRAPPED)
    if not any(key.startswith(wrapped) for key in reader):
        return reader
    reader.close()
    return MergedReader(folder)


class MergedReader(CheckpointReader):
    """A checkpoint whose encoder or language model peft has wrapped, under the names that it has without.

    A merged weight is computed when it is asked for: ``W + 2 B A``, summed in fp32 and rounded once to W's dtype.
    ``config`` says that there are no adapters.

    Args:
        folder: the checkpoint folder.

    Raises:
        CheckpointError: what `CheckpointReader` raises; or an adapter is incomplete, does not fit its layer, stands
            beside another one, or has another rank than ``config.json`` notes.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._stored: dict[str, str] = {}
        adapters: dict[str, dict[str, str]] = {}
        for key in self._shard_of:
            plain = _plain(key)
            found = _LORA.fullmatch(plain)
            if found is None:
                if plain in self._stored:
                    raise CheckpointError(f"{self.folder} has {plain} twice, wrapped and plain: keep one")
                self._stored[plain] = key
                continue
            sides = adapters.setdefault(f"{_without_base(found['layer'])}.weight", {})
            if found["side"] in sides:
                raise CheckpointError(
                    f"{self.folder} has several LoRA adapters on {found['layer']}: keep one"
                )
            sides[found["side"]] = key
        self._pairs = {name: self._pair(name, sides) for name, sides in adapters.items()}

    def __contains__(self, key: object) -> bool:
        return key in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json`` as it is after merging."""
        stated = super().config
        return {**stated, **{key: 0 for key in _WRAPPED.values() if stated.get(key)}}

    @property
    def merged(self) -> int:
        """How many weights have an adapter."""
        return len(self._pairs)

    def keys(self) -> list[str]:
        """Names of all tensors, without peft's."""
        return list(self._stored)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading its data."""
        return super().shape(self._stored.get(key, key))

    def dtype(self, key: str) -> torch.dtype:
        """Element type of a tensor, without reading its data."""
        return super().dtype(self._stored.get(key, key))

    def tensor(self, key: str) -> Tensor:
        """The tensor, merged where it has an adapter; else a view of the mapped file."""
        stored = super().tensor(self._stored.get(key, key))
        if key not in self._pairs:
            return stored
        a_rI, b_Or = (CheckpointReader.tensor(self, name).float() for name in self._pairs[key])
        return torch.addmm(stored.float(), b_Or, a_rI, alpha=_SCALE).to(stored.dtype)

    def _pair(self, name: str, sides: dict[str, str]) -> tuple[str, str]:
        """Stored names of A and B, after all that headers can tell has been checked."""
        some = next(iter(sides.values()))
        if sides.keys() != {"A", "B"} or name not in self._stored:
            lacking = name if name not in self._stored else f"its lora_{'A' if 'B' in sides else 'B'}"
            raise CheckpointError(f"{self.folder} has {some} but not {lacking}: download it again")
        (rank, inputs), (outputs, low) = (_matrix(self.shape(sides[side]), sides[side]) for side in "AB")
        if rank != low or self.shape(name) != (outputs, inputs):
            raise CheckpointError(
                f"{some} and its partner, ({outputs}, {low}) and ({rank}, {inputs}), do not fit {name} "
                f"{self.shape(name)}: they are of another model"
            )
        key = next((key for part, key in _WRAPPED.items() if name.startswith(part)), None)
        noted = super().config.get(key) if key else None
        if noted != rank:
            raise CheckpointError(
                f"{some} has rank {rank} but config.json says {key} {noted!r}, which also sets the strength of the "
                f"adapter: correct {key}"
            )
        return sides["A"], sides["B"]


def _matrix(shape: tuple[int, ...], name: str) -> tuple[int, int]:
    if len(shape) != 2:
        raise CheckpointError(f"{name} has shape {shape}: a LoRA weight is a matrix")
    return shape[0], shape[1]


def _plain(key: str) -> str:
    """A stored name without what wrapping added to it."""
    for part in _WRAPPED:
        if key.startswith(part + _PEFT):
            key = part + key.removeprefix(part + _PEFT)
    layer, dot, leaf = key.rpartition(".")
    return _without_base(layer) + dot + leaf


def _without_base(layer: str) -> str:
    """Current peft keeps the layer itself under ``base_layer``; older releases kept its name."""
    return layer.removesuffix(".base_layer")
