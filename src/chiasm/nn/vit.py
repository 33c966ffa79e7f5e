"""The block of a plain vision transformer, and what a patch grid needs: stochastic depth, position resizing.

Source: InternViT as released (InternVL 1.5 to 2.5): pre-norm block with LayerScale and DropPath,
``x += drop(attn(norm1(x)) * ls1)`` and ``x += drop(mlp(norm2(x)) * ls2)``; fused ``qkv`` of rows q | k | v;
optional QK-norm, an RMSNorm over the whole width *before* the split into heads; exact (erf) GELU.

Shape legend: N images, T = 1 + P tokens, P patches, C width, H heads, D = C / H, R x Q patch grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.nn.norms import RMSNorm
from chiasm.shapes import Float

__all__ = [
    "DropPath",
    "VitAttention",
    "VitBlock",
    "VitMLP",
    "attend_by_head",
    "drop_path_rates",
    "init_vit",
    "normed",
    "resize_positions",
    "vit_norm",
]


def resize_positions(
    position_embedding: Float[Tensor, "1 T C"], old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Tensor, "1 S C"]:
    """Resample learned positions to another patch grid; the class token's row is kept as it is.

    Args:
        position_embedding: (1, 1 + rows*columns, C) for ``old_grid``, class token first, patches row-major.
        old_grid: (rows, columns) the embedding was learned on.
        new_grid: (rows, columns) wanted; need not be square.

    Returns:
        (1, 1 + rows*columns, C) for ``new_grid`` in the dtype of the embedding; the very same tensor if the
        grids agree. Bicubic with half-pixel centres (align_corners=False), computed in fp32.

    Raises:
        ConfigError: the embedding does not have ``1 + old rows * old columns`` rows.
    """
    rows, columns = old_grid
    if position_embedding.shape[1] != 1 + rows * columns:
        raise ConfigError(
            f"position embedding has {position_embedding.shape[1]} rows but the grid {rows}x{columns} needs "
            f"{1 + rows * columns}: pass the grid that it was learned on"
        )
    if tuple(old_grid) == tuple(new_grid):
        return position_embedding
    class_11C, patches_1PC = position_embedding[:, :1], position_embedding[:, 1:]
    grid_1CRQ = patches_1PC.float().reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    resized_1CRQ = F.interpolate(grid_1CRQ, size=tuple(new_grid), mode="bicubic", align_corners=False)
    resized_1PC = resized_1CRQ.flatten(2).transpose(1, 2).to(position_embedding.dtype)
    return torch.cat([class_11C, resized_1PC], dim=1)


def drop_path_rates(rate: float, layers: int) -> list[float]:
    """Return the drop rate of each layer: linear in depth from 0 at the first to ``rate`` at the last."""
    return [rate * i / (layers - 1) for i in range(layers)] if layers > 1 else [0.0] * layers


def vit_norm(kind: str, dim: int, eps: float) -> nn.Module:
    """Return a ``"layer_norm"`` or an ``"rms_norm"`` of this width.

    Raises:
        ConfigError: the kind is neither.
    """
    if kind == "layer_norm":
        return nn.LayerNorm(dim, eps=eps)
    if kind == "rms_norm":
        return RMSNorm(dim, eps=eps)
    raise ConfigError(f"unknown norm {kind!r}: use 'layer_norm' or 'rms_norm'")


class DropPath(nn.Module):
    """Stochastic depth: in training, zero a whole sample with probability ``rate`` and rescale the others."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ConfigError(f"drop path rate {rate} is outside [0, 1)")
        self.rate = rate

    def forward(self, x_NTC: Tensor) -> Tensor:
        """Drop along the first dimension; the identity in eval mode or at rate 0."""
        if not self.training or self.rate == 0.0:
            return x_NTC
        kept_N11 = x_NTC.new_empty(x_NTC.shape[0], *[1] * (x_NTC.ndim - 1)).bernoulli_(1.0 - self.rate)
        return x_NTC * (kept_N11 / (1.0 - self.rate))

    def extra_repr(self) -> str:
        """Show the rate in ``print(model)``."""
        return f"{self.rate:.3f}"


class VitAttention(nn.Module):
    """Bidirectional multi-head attention over the tokens of one image, with SDPA.

    Args:
        width: C, a multiple of ``heads``.
        heads: number of heads.
        qkv_bias: whether the fused projection has a bias (the output projection always has one).
        qk_norm: normalise queries and keys over the full width before the head split.
        norm_eps: eps of that norm.
    """

    def __init__(
        self, width: int, heads: int, *, qkv_bias: bool = True, qk_norm: bool = False, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.width = width
        self.by_head = False
        """On a CPU in bfloat16, attend one head after the other (see `attend_by_head`)."""
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.q_norm = RMSNorm(width, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(width, norm_eps) if qk_norm else None
        self.proj = nn.Linear(width, width)

    @property
    def splits(self) -> tuple[int, int, int]:
        """Rows of q, k and v inside `qkv`."""
        return self.width, self.width, self.width

    def forward(self, x_NTC: Tensor) -> Tensor:
        """Attend within each image: (N, T, C) -> (N, T, C), any T."""
        q_NTC, k_NTC, v_NTC = self.qkv(x_NTC).chunk(3, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q_NTC, k_NTC = self.q_norm(q_NTC), self.k_norm(k_NTC)
        q_NHTD, k_NHTD, v_NHTD = (self._split_heads(y) for y in (q_NTC, k_NTC, v_NTC))
        narrow = x_NTC.device.type == "cpu" and q_NTC.dtype == torch.bfloat16
        if narrow and self.by_head and not q_NTC.requires_grad:
            return self.proj(attend_by_head(q_NHTD, k_NHTD, v_NHTD))
        if narrow and q_NTC.requires_grad:
            # The fused CPU kernel's bf16 backward takes 3x the time of two batched products (65 tokens, measured).
            weights_NHTT = torch.softmax(
                (q_NHTD * q_NHTD.shape[-1] ** -0.5) @ k_NHTD.transpose(-1, -2), dim=-1
            )
            out_NHTD = weights_NHTT @ v_NHTD
        else:
            out_NHTD = F.scaled_dot_product_attention(q_NHTD, k_NHTD, v_NHTD)
        return self.proj(out_NHTD.transpose(1, 2).flatten(2))

    def _split_heads(self, y_NTC: Tensor) -> Tensor:
        return y_NTC.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward_reference(self, x_NTC: Tensor) -> Tensor:
        """Slow twin of `forward`: explicit softmax, one head at a time."""
        q_NTC, k_NTC, v_NTC = self.qkv(x_NTC).chunk(3, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q_NTC, k_NTC = self.q_norm(q_NTC), self.k_norm(k_NTC)
        dim = q_NTC.shape[-1] // self.heads
        heads = []
        for h in range(self.heads):
            q_NTD, k_NTD, v_NTD = (y[..., h * dim : (h + 1) * dim] for y in (q_NTC, k_NTC, v_NTC))
            weights_NTT = torch.softmax(q_NTD @ k_NTD.transpose(1, 2) * dim**-0.5, dim=-1)
            heads.append(weights_NTT @ v_NTD)
        return self.proj(torch.cat(heads, dim=-1))


def attend_by_head(q_NHTD: Tensor, k_NHTD: Tensor, v_NHTD: Tensor, *, rows: int = 512) -> Tensor:
    """Bidirectional attention with the scores of one head at a time, (N, H, T, D) -> (N, T, H * D).

    The scores of `rows` queries stay in the processor's cache, where plain products and a softmax take about half the
    time of the fused kernel for 1,025 bfloat16 tokens (benchmarks/attention.py). The price: scores are rounded to the
    dtype of the inputs before the softmax. That error is below the one of 8-bit activations, and above the fused
    kernel's; hence it is used beside the former only.
    """
    N, H, T, D = q_NHTD.shape
    out_NTHD = q_NHTD.new_empty(N, T, H, D)
    for n in range(N):
        for h in range(H):
            q_TD, k_TD, v_TD = (x[n, h].contiguous() for x in (q_NHTD, k_NHTD, v_NHTD))
            q_TD = q_TD * D**-0.5
            k_DT = k_TD.t()
            for q_RD, out_RD in zip(q_TD.split(rows), out_NTHD[n, :, h].split(rows), strict=True):
                out_RD.copy_(torch.softmax(q_RD @ k_DT, dim=-1) @ v_TD)
    return out_NTHD.flatten(2)


class VitMLP(nn.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_NTC: Tensor) -> Tensor:
        """Map (…, C) to (…, C), token by token."""
        return self.fc2(F.gelu(self.fc1(x_NTC)))


class VitBlock(nn.Module):
    """One pre-norm layer with LayerScale and DropPath, composed of the norms, attention and MLP it is given.

    Args:
        norm1: norm before the attention.
        attn: (N, T, C) -> (N, T, C).
        norm2: norm before the MLP.
        mlp: (N, T, C) -> (N, T, C).
        width: C, for the LayerScale gains ``ls1`` and ``ls2``.
        layer_scale: their initial value.
        drop_path: rate of this layer.
    """

    def __init__(
        self,
        norm1: nn.Module,
        attn: nn.Module,
        norm2: nn.Module,
        mlp: nn.Module,
        *,
        width: int,
        layer_scale: float = 1.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm1, attn, norm2, mlp
        self.ls1 = nn.Parameter(torch.full((width,), float(layer_scale)))
        self.ls2 = nn.Parameter(torch.full((width,), float(layer_scale)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x_NTC: Tensor) -> Tensor:
        """Apply the layer: (N, T, C) -> (N, T, C). x may be float32 where the layer's parameters are float16."""
        # addcmul scales and adds in one pass over memory.
        h_NTC = normed(self.norm1, x_NTC, self.ls1.dtype)
        x_NTC = torch.addcmul(x_NTC, self.drop_path(self.attn(h_NTC)), self.ls1)
        h_NTC = normed(self.norm2, x_NTC, self.ls2.dtype)
        return torch.addcmul(x_NTC, self.drop_path(self.mlp(h_NTC)), self.ls2)


def normed(norm: nn.Module, x_NTC: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm of x; of a float32 x beside float16 parameters in float16, computed in float32."""
    if dtype != torch.float16 or x_NTC.dtype == dtype:
        return norm(x_NTC)
    if isinstance(norm, nn.LayerNorm):
        weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
        return F.layer_norm(x_NTC, norm.normalized_shape, weight, bias, norm.eps).to(dtype)
    return norm(x_NTC).to(dtype)


def init_vit(modules: Sequence[nn.Module], std: float = 0.02) -> None:
    """Draw linear and patch projections from a normal cut at two deviations and zero their biases."""
    for root in modules:
        for module in root.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
