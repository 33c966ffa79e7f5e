"""The projector: visual tokens into the width of the language model.

Source: InternVL (arXiv 2404.16821, 2412.05271), ``mlp1``: LayerNorm, Linear, GELU, Linear. It is the only
part that is always trained from scratch.

Shape legend: leading dimensions free, I = visual width after unshuffling, D = width of the language model.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.nn.vit import normed
from chiasm.shapes import Float

__all__ = ["Projector"]


class Projector(nn.Module):
    """LayerNorm(in), Linear(in, out), exact GELU, Linear(out, out), with biases.

    Args:
        in_dim: I, the visual width (4 x that of the encoder after 2 x 2 unshuffling).
        out_dim: D, the width of the language model.
        norm_eps: eps of the LayerNorm; the release has 1e-5.

    Raises:
        ConfigError: a width is not positive.
    """

    def __init__(self, in_dim: int, out_dim: int, *, norm_eps: float = 1e-5) -> None:
        super().__init__()
        if in_dim < 1 or out_dim < 1:
            raise ConfigError(f"projector widths must be at least 1, not {in_dim} and {out_dim}")
        self.norm = nn.LayerNorm(in_dim, eps=norm_eps)
        self.fc1 = nn.Linear(in_dim, out_dim)
        self.fc2 = nn.Linear(out_dim, out_dim)

    def forward(self, x_NUI: Float[Tensor, "*N I"]) -> Float[Tensor, "*N D"]:
        """Project (..., I) to (..., D), token by token."""
        h_NUI = normed(self.norm, x_NUI, self.norm.weight.dtype)
        return self.fc2(F.gelu(self.fc1(h_NUI)))
