"""Root-mean-square normalisation, computed in fp32 whatever the dtype of the model.

Source: the norm of InternViT-6B and of every decoder family here (Qwen2, InternLM2, Llama): statistics and
division in fp32, the result rounded to the input's dtype, and only then multiplied by the learned gain. The
order matters in bf16: multiplying before rounding gives other last bits than the released models.

Shape legend: D = features; the leading dimensions are free.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["HeadNorm", "RMSNorm", "rms_norm", "rms_norm_reference"]


def rms_norm(x_D: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``x / sqrt(mean(x²) + eps) * weight`` over the last dimension, same shape and dtype as ``x``.

    Args:
        x_D: (..., D) of any floating dtype.
        weight_D: (D,) the gain, or one that broadcasts against ``x``; if its dtype is wider than that of ``x`` the
            result has the wider one.
        eps: added to the mean square.
    """
    if x_D.is_cuda:
        # One fused kernel; without a gain it normalises in fp32 and rounds to the input's dtype, as wanted.
        return F.rms_norm(x_D, (x_D.shape[-1],), None, eps) * weight_D
    # On a CPU the composite of torch is slower than this: a dot product needs no (..., D) buffer of squares.
    h_D = x_D.float()
    if torch.is_autocast_enabled("cpu"):  # it would take the dot product in bf16
        with torch.autocast("cpu", enabled=False):
            square_1 = torch.linalg.vecdot(h_D, h_D).unsqueeze(-1)
    else:
        square_1 = torch.linalg.vecdot(h_D, h_D).unsqueeze(-1)
    mean_square_1 = square_1 / h_D.shape[-1]
    return (h_D * torch.rsqrt(mean_square_1 + eps)).to(x_D.dtype) * weight_D


def rms_norm_reference(x_D: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Slow twin of `rms_norm`: the definition, step by step."""
    h_D = x_D.to(torch.float32)
    normalised_D = h_D / torch.sqrt((h_D * h_D).mean(dim=-1, keepdim=True) + eps)
    return normalised_D.to(x_D.dtype) * weight_D


class RMSNorm(nn.Module):
    """RMS normalisation over the last dimension with a learned gain ``weight`` (dim,), ones at the start."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x_D: torch.Tensor) -> torch.Tensor:
        """Normalise (..., dim); see `rms_norm`."""
        return rms_norm(x_D, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Show the width and eps in ``print(model)``."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class HeadNorm(nn.Module):
    """RMS normalisation of every query head and every key head on its own, before they are rotated (Qwen3).

    All query heads share one gain and all key heads another: ``weight`` holds the query's D numbers, then the key's.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.weight = nn.Parameter(torch.ones(2 * head_dim))
        self.eps = eps

    def forward(self, x_THD: torch.Tensor) -> torch.Tensor:
        """Normalise (T, H + G, D): query heads first, then key heads."""
        q_1D, k_1D = self.weight.view(2, 1, self.head_dim)
        gain_HD = torch.cat((q_1D.expand(self.heads, -1), k_1D.expand(self.kv_heads, -1)))
        return rms_norm(x_THD, gain_HD, self.eps)

    def extra_repr(self) -> str:
        """Show heads, width and eps in ``print(model)``."""
        return f"{self.heads} + {self.kv_heads} heads of {self.head_dim}, eps={self.eps}"
