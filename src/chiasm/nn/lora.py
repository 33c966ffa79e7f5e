"""Low-rank adapters on linear layers, also on fused ones.

Source: LoRA (arXiv 2106.09685): ``y = W x + (alpha / rank) * B A dropout(x)`` with W frozen, A drawn at
random and B zero, so that training starts from the unchanged model. A fused layer (q | k | v rows in one
matrix) gets one adapter per split, which is the same function as separate adapters on separate layers.

Dtypes: the base may be bf16 while A and B are fp32 (their default). The adapter then computes in fp32 from
the layer's input, the sum is formed in fp32 and rounded once to the dtype of the base's output.

Shape legend: I features in, O features out, r rank, n splits of sizes O_1 + ... + O_n = O.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.errors import ConfigError

__all__ = [
    "LoRALinear",
    "apply_lora",
    "fused_splits",
    "merge_lora",
]

Splits = Callable[[str, nn.Linear], Sequence[int] | None]


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank correction for each of its splits.

    Args:
        base: the layer to adapt; its parameters are frozen and keep their dtype.
        rank: r, of every split.
        alpha: the correction is scaled by ``alpha / rank``.
        dropout: probability on the adapter's input while training (one mask for all splits).
        splits: rows of each split inside the output, None for one adapter.
        dtype: of A and B.

    Attributes:
        base: the frozen layer.
        lora_A: (n * rank, I), rows by split.
        lora_B: (O, rank), rows by split.

    Raises:
        ConfigError: rank is not positive, dropout is outside [0, 1), or the splits do not add up to O.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        splits: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.splits = tuple(splits) if splits is not None else (base.out_features,)
        if rank < 1:
            raise ConfigError(f"LoRA rank {rank} must be at least 1")
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"LoRA dropout {dropout} is outside [0, 1)")
        if sum(self.splits) != base.out_features or min(self.splits) < 1:
            raise ConfigError(
                f"LoRA splits {self.splits} do not add up to {base.out_features} output features"
            )
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.scale = alpha / rank
        self.dropout = dropout
        self.in_features, self.out_features = base.in_features, base.out_features
        device = base.weight.device
        self.lora_A = nn.Parameter(
            torch.empty(len(self.splits) * rank, base.in_features, dtype=dtype, device=device)
        )
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # the bound depends on I only, so splits agree

    def forward(self, x_I: Tensor) -> Tensor:
        """Map (..., I) to (..., O) in the dtype of the base's output."""
        out_O = self.base(x_I)
        x_I = F.dropout(x_I.to(self.lora_A.dtype), self.dropout, self.training)
        # Scaling here costs r numbers a row instead of O.
        low_R = F.linear(x_I, self.lora_A) * self.scale
        if len(self.splits) == 1:
            delta_O = F.linear(low_R, self.lora_B)
        else:
            lows, rows = low_R.split(self.rank, dim=-1), self.lora_B.split(self.splits)
            delta_O = torch.cat([F.linear(low, b) for low, b in zip(lows, rows, strict=True)], dim=-1)
        return (out_O + delta_O).to(out_O.dtype)

    def delta(self) -> Tensor:
        """Return the correction of the weight, (O, I) fp32: ``scale * B_i A_i`` stacked over the splits."""
        lows, rows = (
            self.lora_A.detach().float().split(self.rank),
            self.lora_B.detach().float().split(self.splits),
        )
        return self.scale * torch.cat([b @ a for a, b in zip(lows, rows, strict=True)])

    def merged(self) -> nn.Linear:
        """Fold the correction into the base (fp32 sum, rounded once to its dtype) and return the base."""
        with torch.no_grad():
            weight_OI = self.base.weight
            weight_OI.copy_((weight_OI.float() + self.delta()).to(weight_OI.dtype))
        return self.base

    def extra_repr(self) -> str:
        """Show the adapter in ``print(model)``."""
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout}, splits={self.splits}"


def fused_splits(module: nn.Module, names: Sequence[str] = ("qkv", "gate_up")) -> Splits:
    """Return a ``splits`` argument for `apply_lora` that asks each fused layer's parent for its ``splits``.

    Args:
        module: the same root that is given to `apply_lora`.
        names: attribute names of fused layers; other layers get one adapter.
    """

    def splits(path: str, linear: nn.Linear) -> Sequence[int] | None:
        parent, _, name = path.rpartition(".")
        return getattr(module.get_submodule(parent), "splits", None) if name in names else None

    return splits


def apply_lora(
    module: nn.Module,
    patterns: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    splits: Splits | None = None,
) -> list[str]:
    """Wrap, in place, every linear layer below ``module`` whose path matches; return the paths in order.

    Only the wrapped layers are frozen. To train adapters alone call ``module.requires_grad_(False)`` first.

    Args:
        module: root; paths are relative to it.
        patterns: shell patterns (``"layers.*.attn.qkv"``; ``*`` also crosses dots), any of which may match.
        rank: rank of each adapter.
        alpha: see `LoRALinear`.
        dropout: see `LoRALinear`.
        splits: (path, layer) -> rows of each split, or None for one adapter; see `fused_splits`.

    Raises:
        ConfigError: a pattern matches no linear layer, or the layer is adapted already.
    """
    linears = {path: child for path, child in module.named_modules() if isinstance(child, nn.Linear) and path}
    found = {p: [path for path in linears if fnmatchcase(path, p)] for p in patterns}
    for pattern, paths in found.items():
        if not paths:
            raise ConfigError(
                f"LoRA pattern {pattern!r} matches no linear layer: compare with named_modules()"
            )
    wanted = {path for paths in found.values() for path in paths}
    adapted = {path for path, child in module.named_modules() if isinstance(child, LoRALinear)}
    paths = [path for path in linears if path in wanted]
    for path in paths:
        if path.rpartition(".")[0] in adapted:
            raise ConfigError(f"{path.rpartition('.')[0]} has a LoRA adapter already: merge it first")
    for path in paths:
        linear = linears[path]
        sizes = splits(path, linear) if splits is not None else None
        adapter = LoRALinear(linear, rank, alpha, dropout=dropout, splits=sizes)
        _replace(module, path, adapter.train(linear.training))
    return paths


def merge_lora(module: nn.Module) -> list[str]:
    """Fold every adapter below ``module`` into its base and put the plain layer back; return the paths.

    The layers stay frozen.
    """
    adapters = {
        path: child for path, child in module.named_modules() if isinstance(child, LoRALinear) and path
    }
    for path, adapter in adapters.items():
        _replace(module, path, adapter.merged())
    return list(adapters)


def _replace(root: nn.Module, path: str, child: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, child)
