"""The conditioned projector: InternVL's projector whose norm follows the time of the frame.

Source: PVC (arXiv 2412.09613), adaptive compression; fact sheet, section 2.3. Behind a coarser unshuffle (4 x 4 in the
place of 2 x 2) it makes 64 tokens of a tile; what a token holds may depend on when its frame is.

`coarsened` makes the weights of such a projector from those of one for a finer unshuffle.

Shape legend: F frames, U tokens of a frame, I visual width after unshuffling, D width of the language model, E width of
the time embedding, k ratio of the two unshuffles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.nn.temporal import TimeEmbedding, modulated
from chiasm.nn.vit import init_vit
from chiasm.parts.connect.projector import Projector

__all__ = ["ConditionedProjector", "coarsened"]


class ConditionedProjector(Projector):
    """LayerNorm(in) with scale and shift of the time, Linear(in, out), exact GELU, Linear(out, out).

    Fresh modulations are zero: the projector is then the plain one of the same weights.

    Args:
        in_dim: I. out_dim: D.
        embedding: E of the embedded times that it is given; None: it knows no time.
        time: an embedding of its own, in the place of one that it is given (its width must be E).
        norm_eps: eps of the LayerNorm.

    Raises:
        ConfigError: a width is not positive, or the embedding's is not E.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        embedding: int | None = None,
        time: TimeEmbedding | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(in_dim, out_dim, norm_eps=norm_eps)
        if time is not None and time.width != embedding:
            raise ConfigError(
                f"the projector's time embedding has width {time.width}, {embedding} is asked for"
            )
        self.time = time
        self.modulation = None if embedding is None else nn.Linear(embedding, 2 * in_dim)
        if time is not None:
            init_vit([time])
        self.start_as_nothing()

    def start_as_nothing(self) -> None:
        """Zero the modulation."""
        if self.modulation is not None:
            with torch.no_grad():
                self.modulation.weight.zero_()
                self.modulation.bias.zero_()

    def forward(  # type: ignore[override]
        self, x_FUI: Tensor, times_F: Tensor | None = None, embedded_FE: Tensor | None = None
    ) -> Tensor:
        """Project (F, U, I) to (F, U, D).

        Args:
            x_FUI: tokens of frames.
            times_F: when each frame is, for a projector with an embedding of its own.
            embedded_FE: the embedded times, for one without.

        Raises:
            ConfigError: it is conditioned, and was not told the times in its way.
        """
        change_F2I = None
        if self.modulation is not None:
            if self.time is not None and times_F is not None:
                embedded_FE = self.time(times_F)
            if embedded_FE is None:
                raise ConfigError("a conditioned projector must be told when its frames are")
            change_F2I = self.modulation(embedded_FE).unflatten(-1, (2, -1))
        h_FUI = modulated(self.norm, x_FUI, change_F2I, self.norm.weight.dtype)
        return self.fc2(F.gelu(self.fc1(h_FUI)))


def coarsened(state: dict[str, Tensor], channels: int, factor: int, ratio: int) -> dict[str, Tensor]:
    """The weights of a projector behind a `ratio` times coarser unshuffle, made from those behind a finer one.

    A coarse token holds k x k fine ones (k = `ratio`). Its first matrix is that of the fine projector, repeated for
    each of them and divided by k²; gain and shift of the norm are repeated. So, of the fine tokens u_1 … u_n of one
    coarse token v, n = k²:

    - fc1(z) of the new projector is fc1 of the old one on the mean of the fine tokens that z holds, exactly, for any z;
    - if the u_i are equal, the new projector of v is the old projector of u_1, exactly;
    - else it is the old projector on the mean of the u_i after its norm, but that mean and variance of the norm are
      taken over all of v, not over each u_i.

    Args:
        state: ``norm.weight``, ``norm.bias``, ``fc1.weight``, … of the fine projector; others are passed on.
        channels: C, channels of a patch.
        factor: f of the fine unshuffle: its tokens hold f x f patches.
        ratio: k, 1 changes nothing.

    Raises:
        ConfigError: the shapes are not those of such a projector.
    """
    stacked = channels * factor * factor
    found = state["fc1.weight"].shape[1]
    if ratio < 1 or found != stacked:
        raise ConfigError(
            f"a projector of {found} inputs does not read {factor} x {factor} patches of {channels} channels"
        )
    if ratio == 1:
        return dict(state)

    def spread(x: Tensor) -> Tensor:
        """(…, f f C) -> (…, k f k f C): patch (di, dj) of the coarse token is patch (di % f, dj % f) of a fine one."""
        patches = x.unflatten(-1, (factor, factor, channels))
        wide = patches.repeat(*(1,) * (x.dim() - 1), ratio, ratio, 1)
        return wide.flatten(-3)

    out = dict(state)
    out["fc1.weight"] = spread(state["fc1.weight"] / ratio**2)
    for name in ("norm.weight", "norm.bias"):
        out[name] = spread(state[name])
    return out
