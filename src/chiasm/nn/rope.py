"""Rotary position embedding (RoFormer, 2104.09864) with the scaling variants that the LLM families use.

A decoder block never knows where its rotation comes from: it receives a cos/sin table made here from the
float positions of a sequence, and applies it with `rotate`. Pairs are (i, i + D/2) ("rotate half").

Two kinds look at how long a document is: `dynamic` (NTK-aware: the base grows with the text) and `longrope`
(2402.13753, Phi-3's `su`: one set of factors up to the length of pre-training, another beyond). Each document of a
packed row has its own length, so each has its own frequencies.
Legend: T tokens, H heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chiasm.errors import ConfigError

KINDS = ("default", "linear", "dynamic", "llama3", "longrope")
_ALIASES = {"su": "longrope"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Frequencies of a rotary embedding: `head_dim` rotated channels, base `theta`, optional scaling.

    `scaling` is the public config's dict: {"rope_type" or "type": one of KINDS or "su", "factor": …}. For longrope it
    holds "short_factor" and "long_factor" (a number for each of the D/2 waves) and
    "original_max_position_embeddings"; "factor" (else `max_positions` / the original length) and "attention_factor"
    (else derived from "factor") are optional.
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
        if self.kind == "longrope":
            self._check_longrope()

    @property
    def kind(self) -> str:
        """One of KINDS."""
        scaling = self.scaling or {}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        return _ALIASES.get(kind, kind) if isinstance(kind, str) else kind

    @property
    def switch(self) -> int | None:
        """Longest document that is read with the first set of frequencies, where a longer one has another set.

        Keys in a cache keep the rotation they were stored with: a document that grows past this must be read again.
        """
        if self.kind != "longrope":
            return None
        return int((self.scaling or {})["original_max_position_embeddings"])

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied with: 1 except for longrope."""
        scaling = self.scaling or {}
        if self.kind != "longrope":
            return 1.0
        if scaling.get("attention_factor") is not None:
            return float(scaling["attention_factor"])
        old = float(scaling["original_max_position_embeddings"])
        given = scaling.get("factor")
        factor = self.max_positions / old if given is None else float(given)
        return math.sqrt(1 + math.log(factor) / math.log(old)) if factor > 1 else 1.0

    def refuse_crossing(self, past: Sequence[int], new: Sequence[int]) -> None:
        """Raise ConfigError where a document of `past` cached rows would grow past `switch` by `new` rows."""
        if self.switch is None:
            return
        for cached, rows in zip(past, new, strict=True):
            if 0 < cached <= self.switch < cached + rows:
                raise ConfigError(
                    f"a document of {cached} cached tokens grows past {self.switch}, where its rotary factors change: "
                    "read it again from its beginning"
                )

    def inverse_frequencies(self, longest: float = 0.0, device: torch.device | str | None = None) -> Tensor:
        """(D/2,) float32. `longest` is the largest position + 1 (only dynamic and longrope look at it)."""
        scaling = self.scaling or {}
        base, dim = self.theta, self.head_dim
        if self.kind == "dynamic":
            # NTK-aware: beyond the trained length the base grows so that the slowest wave spans the text.
            length = max(longest, self.max_positions)
            factor = float(scaling["factor"])
            base *= (factor * length / self.max_positions - (factor - 1)) ** (dim / (dim - 2))
        exponent = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
        waves = base**exponent
        if self.switch is not None:
            side = "long_factor" if longest > self.switch else "short_factor"
            waves = torch.tensor(scaling[side], dtype=torch.float32, device=device) * waves
        inv = 1.0 / waves
        if self.kind == "linear":
            inv = inv / float(scaling["factor"])
        elif self.kind == "llama3":
            low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
            old, factor = float(scaling["original_max_position_embeddings"]), float(scaling["factor"])
            wavelength = 2 * math.pi / inv
            blend = ((old / wavelength - low) / (high - low)).clamp(0, 1)
            inv = inv / factor * (1 - blend) + inv * blend
        return inv

    def table(
        self, pos_T: Tensor, dtype: torch.dtype, lengths: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cos and sin, each (T, 1, D), for float positions (T,). Angles are computed in float32.

        Args:
            pos_T: position of every row.
            dtype: of the result.
            lengths: rows of each document; None where all are of one.
        """
        angle = pos_T.float()[:, None] * self._frequencies(pos_T, lengths or (len(pos_T),))
        angle = torch.cat((angle, angle), dim=-1)[:, None]
        scale = self.attention_factor
        cos, sin = angle.cos(), angle.sin()
        if scale != 1:
            cos, sin = cos * scale, sin * scale
        return cos.to(dtype), sin.to(dtype)

    def _frequencies(self, pos_T: Tensor, lengths: Sequence[int]) -> Tensor:
        """(D/2,) where all documents share them, else (T, D/2)."""
        if self.kind not in ("dynamic", "longrope") or not pos_T.numel():
            return self.inverse_frequencies(device=pos_T.device)
        ends = torch.stack([part.max() for part in pos_T.split(list(lengths))]).tolist()  # one wait for all
        # Documents on the same side have the same frequencies, most often all of them.
        near = float(self.max_positions if self.switch is None else self.switch)
        sizes = [near if end < near else end + 1 if self.switch is None else math.inf for end in ends]
        tables = {size: self.inverse_frequencies(size, pos_T.device) for size in set(sizes)}
        if len(tables) == 1:
            return tables[sizes[0]]
        return torch.cat([tables[size].expand(n, -1) for size, n in zip(sizes, lengths, strict=True)])

    def _check_longrope(self) -> None:
        scaling = self.scaling or {}
        for name in ("short_factor", "long_factor"):
            values = scaling.get(name)
            if not isinstance(values, list | tuple) or len(values) != self.head_dim // 2:
                found = f"{len(values)} of them" if isinstance(values, list | tuple) else repr(values)
                raise ConfigError(
                    f"rope_scaling {name} must hold {self.head_dim // 2} numbers, half of head_dim "
                    f"{self.head_dim}; found {found}"
                )
            if not all(_positive(value) for value in values):
                raise ConfigError(f"rope_scaling {name} must hold positive numbers only")
        for name in ("factor", "attention_factor"):
            if scaling.get(name) is not None and not _positive(scaling[name]):
                raise ConfigError(f"rope_scaling {name} is {scaling[name]!r}: a positive number is needed")
        old = scaling.get("original_max_position_embeddings")
        if not isinstance(old, int) or isinstance(old, bool) or old < 2:
            raise ConfigError(
                f"rope_scaling of type longrope needs original_max_position_embeddings, a whole number; found {old!r}"
            )


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def rotate(x_THD: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate every head by the angles of its token: x·cos + (−x₂, x₁)·sin."""
    cos, sin = table
    half = x_THD.shape[-1] // 2
    turned = torch.cat((-x_THD[..., half:], x_THD[..., :half]), dim=-1)
    return x_THD * cos + turned * sin
