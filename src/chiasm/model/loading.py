"""Weights from mapped files into a model on the meta device: dtype, devices and rounding, whatever the system is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from chiasm.checkpoint.adapters import StateDictAdapter, load_into
from chiasm.checkpoint.store import CheckpointReader
from chiasm.errors import ConfigError
from chiasm.model.causal import CausalVLM
from chiasm.model.placement import Placement, place
from chiasm.model.quantize import Quantization, Rounding

__all__ = ["DTYPES", "has_bfloat16", "load_weights", "resolve_dtype"]

_log = logging.getLogger("chiasm.load")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: str | torch.dtype | None, stored: str | None = None) -> torch.dtype:
    """What to compute in: the caller's wish, else what the checkpoint was saved in, else float32.

    Raises ConfigError for a name that is not one of float32, bfloat16, float16, auto.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype if dtype not in (None, "auto") else stored or "float32"
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not known: use {', '.join(DTYPES)} or auto")
    return DTYPES[name]


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself. Before Ampere (8.0), NVIDIA's GPUs at most imitate it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def load_weights(
    model: CausalVLM,
    reader: CheckpointReader,
    adapter: StateDictAdapter,
    *,
    used: int,
    dtype: str | torch.dtype | None = None,
    stored: str | None = None,
    device: str | torch.device | Sequence[torch.device] = "cpu",
    quantize: str | None = None,
) -> CausalVLM:
    """Fill a model that was built on the meta device; returns it.

    Args:
        model: names its parameters natively.
        reader: the checkpoint. adapter: from its names to native ones.
        used: leading rows of the word table that tokens have; those behind them are never written.
        dtype: "float32", "bfloat16", "float16", "auto" or None (as stored, but float16 in the place of a bfloat16 that
            the GPU cannot compute in).
        stored: what the config says that the weights are stored in.
        device: one, or several that share the decoder's layers (see `chiasm.model.placement`).
        quantize: weights to round while they are loaded, see `chiasm.model.quantize`.

    Raises:
        CheckpointError, ConfigError, UsageError: one line that names the file, key or field.
    """
    model.head.used = used  # type: ignore[assignment]
    how = None if quantize is None else Quantization.parse(quantize)
    rounding = None if how is None else Rounding(model, how)
    chosen = resolve_dtype(dtype, stored)
    several = () if isinstance(device, str | torch.device) else tuple(device)
    where: Any = several[0] if several else torch.device(device)  # type: ignore[arg-type]
    if dtype in (None, "auto") and chosen == torch.bfloat16:
        unable = [d for d in several or (where,) if not has_bfloat16(d)]
        if unable:
            _log.info("computing in float16: %s has no bfloat16", unable[0])
            chosen = torch.float16
    if len(several) > 1:
        where = Placement(model, several, chosen, weight_bytes=how.weight_bytes if how else None)
        place(model, where)
    load_into(
        model,
        reader,
        adapter,
        dtype=chosen,
        device=where,
        loaded=None if rounding is None else rounding.layer,
    )
    if rounding is not None:
        rounding.finish()
    return model
