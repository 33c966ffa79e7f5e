"""One model on several devices: which layers of the decoder go where.

The decoder is cut into contiguous runs of layers, one for each device in the order given. The encoder, the projector
and the word table stand on the first, the final norm and a head of its own on the last; a head that is the word table
stays with it. While a document is read, its rows move from device to device (`Decoder.devices`), so that one device
works at a time: this is for models that one device cannot hold, not for speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from chiasm.errors import ConfigError
from chiasm.model.causal import CausalVLM

__all__ = ["Placement", "cut", "place"]


def cut(layers: Sequence[int], first: int, last: int, room: Sequence[int]) -> list[int]:
    """Cut layers into contiguous runs so that the fullest device is as empty as can be.

    Args:
        layers: bytes of each layer. first, last: bytes that the first and last device hold besides.
        room: bytes that each device can take.

    Returns:
        for each layer the number of its device, ascending. Devices may be left without a layer.
    """
    sums = [0]
    for size in layers:
        sums.append(sums[-1] + size)

    def share(device: int, begin: int, end: int) -> float:
        load = sums[end] - sums[begin]
        load += first if device == 0 else 0
        load += last if device == len(room) - 1 else 0
        return load / room[device] if room[device] > 0 else (0.0 if load == 0 else float("inf"))

    # best[n]: (fullest share, where the last device's run begins) for the first n layers on the devices so far
    best = [(share(0, 0, n), (0,)) for n in range(len(layers) + 1)]
    for device in range(1, len(room)):
        best = [
            min(
                (max(best[begin][0], share(device, begin, end)), (*best[begin][1], begin))
                for begin in range(end + 1)
            )
            for end in range(len(layers) + 1)
        ]
    starts = best[-1][1]
    return [max(d for d, start in enumerate(starts) if start <= n) for n in range(len(layers))]


class Placement:
    """Where each parameter of a model goes.

    Args:
        model: on the meta device or anywhere; only its sizes are read.
        devices: at least one, in order.
        dtype: that it will have.
        room: bytes that each device can take; None asks CUDA devices for their free memory, less a tenth for what is
            computed, and takes all others as equal.
        weight_bytes: of each number in a linear layer of the decoder, where they are rounded.

    Raises:
        ConfigError: the model does not fit.
    """

    def __init__(
        self,
        model: CausalVLM,
        devices: Sequence[torch.device],
        dtype: torch.dtype,
        room: Sequence[int] | None = None,
        weight_bytes: float | None = None,
    ) -> None:
        self.devices = tuple(devices)
        blocks: nn.ModuleList = model.trunk.layers  # type: ignore[assignment]
        known = room is not None or all(d.type == "cuda" for d in devices)
        given = list(room) if room is not None else [_free(d) for d in devices]

        def size(module: nn.Module, each: float = dtype.itemsize) -> int:
            linear = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
            rest = sum(p.numel() for p in module.parameters()) - linear
            return round(linear * each + rest * dtype.itemsize)

        words = getattr(getattr(model.embedder, "words", None), "weight", None)
        self._own_head = getattr(model.head, "weight", None) is not words
        sizes = [size(block, weight_bytes or dtype.itemsize) for block in blocks]
        first, last = size(model.embedder), size(model.head) if self._own_head else 0
        of_layer = cut(sizes, first, last, given)
        loads = [0] * len(devices)
        for n, device in enumerate(of_layer):
            loads[device] += sizes[n]
        loads[0] += first
        loads[-1] += last
        for device, load, free in zip(devices, loads, given, strict=True):
            if known and load > free:
                raise ConfigError(
                    f"the model's {sum(loads) / 2**30:.1f} GiB do not fit on {', '.join(map(str, devices))}: {device} "
                    f"would hold {load / 2**30:.1f} GiB and has room for {free / 2**30:.1f}; name more devices, or a "
                    "narrower dtype"
                )
        self.of_layer = tuple(self.devices[n] for n in of_layer)

    def __call__(self, name: str) -> torch.device:
        """The device of a parameter, by its name in the model."""
        parts = name.split(".")
        if parts[:2] == ["trunk", "layers"]:
            return self.of_layer[int(parts[2])]
        own_head = parts[0] == "head" and self._own_head
        return self.devices[-1] if parts[0] == "trunk" or own_head else self.devices[0]


def place(model: CausalVLM, placement: Placement) -> None:
    """Tell a model whose parameters lie where `placement` says how its rows must move."""
    model.trunk.devices = placement.of_layer  # type: ignore[assignment]


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 40
    return int(torch.cuda.mem_get_info(device)[0] * 0.9)
