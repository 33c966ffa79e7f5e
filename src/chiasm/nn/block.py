"""The decoder block, composed rather than flagged: norms, attention, and a feed-forward that may route.

One block serves Qwen2 to Qwen3, Llama, InternLM2, Phi-3, and whatever else is RMSNorm + rotary grouped-query
attention + SwiGLU: what a family changes (biases, widths, frequencies, a norm of heads) arrives as constructor
arguments of the parts; what a *system* changes (experts per modality) arrives as another feed-forward module.

Projections are stored fused (`qkv` rows = q | k | v, `gate_up` rows = gate | up): fewer and larger matrix
products, which is most of the decoding speed on CPU. Checkpoint adapters split and join them.
Legend: T tokens, C width, H/G query and key/value heads, D head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.nn.attention import KVCache, Segments, attend
from chiasm.nn.rope import rotate


class FeedForward(Protocol):
    """Any module that maps (T, C) to (T, C) and may look at the kind of every row."""

    def __call__(self, x_TC: Tensor, kind_T: Tensor) -> Tensor:
        """See the class."""
        ...


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, through the one seam.

    `qk_norm`, where a family has one, maps the (T, H + G, D) query and key heads before they are rotated.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        qk_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if heads % kv_heads:
            raise ConfigError(f"heads ({heads}) must be a multiple of kv_heads ({kv_heads})")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * head_dim, bias=qkv_bias)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.qk_norm = nn.Identity() if qk_norm is None else qk_norm

    @property
    def splits(self) -> tuple[int, int, int]:
        """Rows of q, k and v inside `qkv`."""
        kv = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, kv, kv

    def forward(
        self,
        x_TC: Tensor,
        table: tuple[Tensor, Tensor],
        segments: Segments,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(T, C) -> (T, C); `table` holds the rotations of the T rows, `layer` is this one's place in the cache."""
        H, G = self.heads, self.kv_heads
        qkv = self.qkv(x_TC).view(-1, H + 2 * G, self.head_dim)
        qk = rotate(self.qk_norm(qkv[:, : H + G]), table)  # queries and keys turn in one call
        o = attend(qk[:, :H], qk[:, H:], qkv[:, H + G :], segments, cache=cache, layer=layer)
        return self.out(o.reshape(o.shape[0], -1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    @property
    def splits(self) -> tuple[int, int]:
        """Rows of gate and up inside `gate_up`."""
        return self.hidden, self.hidden

    def forward(self, x_TC: Tensor, kind_T: Tensor | None = None) -> Tensor:
        """(T, C) -> (T, C); every row alike."""
        gate, up = self.gate_up(x_TC).split(self.hidden, dim=-1)
        return self.down(F.silu(gate) * up)


class Routed(nn.Module):
    """Static experts by modality: rows of kind k go through `experts[str(k)]`, all others through `default`.

    Each expert sees only its own rows (gather, compute, scatter); `blended` is the slow twin that runs every
    expert on every row and masks.
    """

    def __init__(self, default: nn.Module, experts: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.default = default
        self.experts = nn.ModuleDict({str(kind): expert for kind, expert in experts.items()})

    def forward(self, x_TC: Tensor, kind_T: Tensor) -> Tensor:
        """(T, C) -> (T, C), each row through the expert of its kind."""
        out = torch.empty_like(x_TC)
        rest = torch.ones_like(kind_T, dtype=torch.bool)
        for kind, expert in self.experts.items():
            mine = kind_T == int(kind)
            rest &= ~mine
            out = out.index_put((mine.nonzero()[:, 0],), expert(x_TC[mine], kind_T[mine]))
        return out.index_put((rest.nonzero()[:, 0],), self.default(x_TC[rest], kind_T[rest]))

    def blended(self, x_TC: Tensor, kind_T: Tensor) -> Tensor:
        """The slow twin of `forward`."""
        out = self.default(x_TC, kind_T)
        for kind, expert in self.experts.items():
            out = torch.where((kind_T == int(kind))[:, None], expert(x_TC, kind_T), out)
        return out


class Block(nn.Module):
    """x += attn(norm1(x)); x += ffn(norm2(x))."""

    def __init__(self, norm1: nn.Module, attn: Attention, norm2: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.ffn = norm1, attn, norm2, ffn

    def forward(
        self,
        x_TC: Tensor,
        table: tuple[Tensor, Tensor],
        segments: Segments,
        kind_T: Tensor,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(T, C) -> (T, C). With a float16 `table`, attention and feed-forward compute in that, x may be float32."""
        half = table[0].dtype == torch.float16
        h_TC = self.norm1(x_TC)
        x_TC = x_TC + self.attn(h_TC.half() if half else h_TC, table, segments, cache, layer)
        h_TC = self.norm2(x_TC)
        return x_TC + self.ffn(h_TC.half() if half else h_TC, kind_T)
