"""Rotary position embedding (RoFormer, 2104.09864) with the scaling variants that the LLM families use.

A decoder block never knows where its rotation comes from: it receives a cos/sin table made here from the
float positions of a sequence, and applies it with `rotate`. Pairs are (i, i + D/2) ("rotate half").
Legend: T tokens, H heads, D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chiasm.errors import ConfigError

KINDS = ("default", "linear", "dynamic", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Frequencies of a rotary embedding: `head_dim` rotated channels, base `theta`, optional scaling.

    `scaling` is the public config's dict: {"rope_type" or "type": default | linear | dynamic | llama3, "factor": …}.
    """

    head_dim: int
    theta: float = 10_000.0
    scaling: dict[str, Any] | None = None
    max_positions: int = 2048

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} must be even for rotary embedding")
        if self.kind not in KINDS:
            raise ConfigError(f"rope_scaling type {self.kind!r} is not known; supported: {', '.join(KINDS)}")

    @property
    def kind(self) -> str:
        """One of KINDS."""
        scaling = self.scaling or {}
        return scaling.get("rope_type") or scaling.get("type") or "default"

    def inverse_frequencies(self, longest: float = 0.0, device: torch.device | str | None = None) -> Tensor:
        """(D/2,) float32. `longest` is the largest position + 1 (only the dynamic kind looks at it)."""
        scaling = self.scaling or {}
        base, dim = self.theta, self.head_dim
        if self.kind == "dynamic":
            # NTK-aware: beyond the trained length the base grows so that the slowest wave spans the text.
            length = max(longest, self.max_positions)
            factor = float(scaling["factor"])
            base *= (factor * length / self.max_positions - (factor - 1)) ** (dim / (dim - 2))
        exponent = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
        inv = 1.0 / (base**exponent)
        if self.kind == "linear":
            inv = inv / float(scaling["factor"])
        elif self.kind == "llama3":
            low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
            old, factor = float(scaling["original_max_position_embeddings"]), float(scaling["factor"])
            wavelength = 2 * math.pi / inv
            blend = ((old / wavelength - low) / (high - low)).clamp(0, 1)
            inv = inv / factor * (1 - blend) + inv * blend
        return inv

    def table(self, pos_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cos and sin, each (T, 1, D), for float positions (T,). Angles are computed in float32."""
        longest = float(pos_T.max()) + 1 if self.kind == "dynamic" and pos_T.numel() else 0.0
        inv = self.inverse_frequencies(longest, pos_T.device)
        angle = pos_T.float()[:, None] * inv[None]
        angle = torch.cat((angle, angle), dim=-1)[:, None]
        return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_THD: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate every head by the angles of its token: x·cos + (−x₂, x₁)·sin."""
    cos, sin = table
    half = x_THD.shape[-1] // 2
    turned = torch.cat((-x_THD[..., half:], x_THD[..., :half]), dim=-1)
    return x_THD * cos + turned * sin
