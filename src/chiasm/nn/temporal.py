"""Attention over time and conditioning on it: what lets a vision transformer read frames one after the other.

Source: PVC (arXiv 2412.09613): temporal attention in which a token sees the tokens at its own place in its own and
earlier frames, and norms whose scale and shift follow from the time stamp. The time embedding is that of DiT
(arXiv 2212.09748): sinusoids, Linear, activation, Linear.

Everything new starts as nothing: a modulation of zeros is the plain norm, a gate of zeros no attention.

Shape legend: F frames of all sequences, T frames of one sequence, B sequences of equal length, N tokens of a frame,
C width of a token, A width of the temporal attention, H heads, D = A / H, E width of the time embedding, S frames kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.nn.norms import RMSNorm
from chiasm.nn.vit import normed
from chiasm.shapes import Float

__all__ = [
    "ACTIVATIONS",
    "TemporalAttention",
    "TemporalCache",
    "TemporalPast",
    "TimeEmbedding",
    "modulated",
    "sees",
    "sinusoid",
]

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU}
"""Name -> activation of time embeddings and in front of modulations."""

_BATCH = 1 << 15
"""Most sequences of one call of attention: CUDA's kernels take 65,535 at most, 64 tiles of 1,025 tokens are more."""


def sinusoid(times_F: Float[Tensor, " F"], width: int, period: float = 10_000.0) -> Float[Tensor, "F S"]:
    """Cosines, then sines, of the times at `width` / 2 frequencies from 1 down to nearly 1 / `period`.

    Computed and returned in float64; DiT's order and frequencies.

    Raises:
        ConfigError: the width is odd or below 2.
    """
    if width < 2 or width % 2:
        raise ConfigError(f"a sinusoidal embedding has an even width, not {width}: use for instance 256")
    steps_S = torch.arange(width // 2, dtype=torch.float64, device=times_F.device)
    angles_FS = times_F.double()[:, None] * torch.exp(steps_S * (-math.log(period) / (width // 2)))
    return torch.cat((angles_FS.cos(), angles_FS.sin()), dim=-1)


class TimeEmbedding(nn.Module):
    """(F,) times -> (F, E): sinusoids, Linear, activation, Linear, activation.

    The last activation stands in front of every modulation in DiT; here it is applied once for all of them.

    Args:
        sines: width of the sinusoidal embedding.
        width: E.
        act: name in `ACTIVATIONS`.
        scale: the times are multiplied by it, so that what distinguishes frames fits the frequencies.
        period: of the slowest sinusoid, about.

    Raises:
        ConfigError: an unknown activation or a width that cannot be.
    """

    def __init__(
        self,
        sines: int,
        width: int,
        *,
        act: str = "silu",
        scale: float = 1.0,
        period: float = 10_000.0,
    ) -> None:
        super().__init__()
        if act not in ACTIVATIONS:
            raise ConfigError(f"activation {act!r} is unknown: use one of {', '.join(ACTIVATIONS)}")
        if sines < 2 or sines % 2 or width < 1:
            raise ConfigError(f"a time embedding of {sines} sinusoids and width {width} cannot be")
        self.sines, self.width, self.scale, self.period = sines, width, scale, period
        self.fc1 = nn.Linear(sines, width)
        self.fc2 = nn.Linear(width, width)
        self.act = ACTIVATIONS[act]()

    def forward(self, times_F: Float[Tensor, " F"]) -> Float[Tensor, "F E"]:
        """Embed times, in the dtype of the weights."""
        # On the CPU, where the times come from: not every device has float64.
        waves_FS = sinusoid(times_F.cpu() * self.scale, self.sines, self.period)
        return self.act(self.fc2(self.act(self.fc1(waves_FS.to(self.fc1.weight)))))


def modulated(norm: nn.Module, x_FNC: Tensor, change_F2C: Tensor | None, dtype: torch.dtype) -> Tensor:
    """norm(x) * (1 + scale) + shift, with scale and shift (F, 2, C) of every frame; without them the norm alone."""
    h_FNC = normed(norm, x_FNC, dtype)
    if change_F2C is None:
        return h_FNC
    scale_F1C, shift_F1C = change_F2C.to(h_FNC.dtype).split(1, dim=1)
    return torch.addcmul(h_FNC + shift_F1C, h_FNC, scale_F1C)


def sees(frames: int, window: int | None = None, sink: int = 0, device: torch.device | None = None) -> Tensor:
    """(T, T) bool: whether frame i (row) sees frame j: itself, the `window` - 1 before it, and the first `sink`."""
    at_T = torch.arange(frames, device=device)
    past_TT = at_T[None] <= at_T[:, None]
    if window is None:
        return past_TT
    return past_TT & ((at_T[None] > at_T[:, None] - window) | (at_T[None] < sink))


class TemporalPast:
    """Keys and values of the frames that may still be seen, of B sequences that go on together, for one layer.

    The first `sink` frames stay for good; behind them is a ring of the last `window`. The memory is allocated with the
    first frame and never grows. The order of keys means nothing to attention, so a ring is read as it lies.
    """

    def __init__(self, window: int, sink: int = 0) -> None:
        if window < 1 or sink < 0:
            raise ConfigError(
                f"a window of {window} frames with {sink} sink frames cannot be: use 1 or more, 0 or more"
            )
        self.window, self.sink = window, sink
        self.frames = 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def append(self, k_MHD: Tensor, v_MHD: Tensor) -> tuple[Tensor, Tensor]:
        """Store one more frame, (M, H, D) with M = B * N; returns all that it sees, (M, H, S, D) each."""
        if self._k is None or self._v is None:
            M, H, D = k_MHD.shape
            self._k, self._v = (k_MHD.new_zeros(M, H, self.sink + self.window, D) for _ in range(2))
        if self._k.shape[0] != k_MHD.shape[0]:
            raise ConfigError(
                f"{k_MHD.shape[0]} tokens go on a past of {self._k.shape[0]}: a video has one number of tiles"
            )
        place = (
            self.frames if self.frames < self.sink else self.sink + (self.frames - self.sink) % self.window
        )
        self._k[:, :, place], self._v[:, :, place] = k_MHD, v_MHD
        self.frames += 1
        known = min(self.frames, self.sink + self.window)
        return self._k[:, :, :known], self._v[:, :, :known]

    @property
    def bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(x.numel() * x.element_size() for x in (self._k, self._v) if x is not None)


class TemporalAttention(nn.Module):
    """Causal attention over time: each token looks at the tokens at its place in its own and earlier frames.

    Args:
        width: C.
        heads: H, divides A.
        inner: A, the width of queries, keys and values; None: C.
        qkv_bias: bias on the fused projection (the output projection always has one).
        qk_norm: RMSNorm of queries and keys over A.
        norm_eps: eps of that norm.

    Raises:
        ConfigError: A is not a multiple of the heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        inner: int | None = None,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        inner = width if inner is None else inner
        if inner < 1 or heads < 1 or inner % heads:
            raise ConfigError(
                f"temporal attention of width {inner} is no multiple of its {heads} heads: change one"
            )
        self.heads, self.inner = heads, inner
        self.qkv = nn.Linear(width, 3 * inner, bias=qkv_bias)
        self.q_norm = RMSNorm(inner, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(inner, norm_eps) if qk_norm else None
        self.proj = nn.Linear(inner, width)

    @property
    def splits(self) -> tuple[int, int, int]:
        """Rows of q, k and v inside `qkv`."""
        return self.inner, self.inner, self.inner

    def _project(self, h_XC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(…, C) -> queries, keys, values (…, A)."""
        q, k, v = self.qkv(h_XC).chunk(3, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def forward(self, h_FNC: Tensor, lengths: Sequence[int]) -> Tensor:
        """Attend within each sequence: (F, N, C) -> (F, N, C).

        Args:
            h_FNC: frames of all sequences, one sequence after the other.
            lengths: frames of each. Sequences of one length are one batched call.

        Raises:
            ConfigError: the lengths do not add up to F.
        """
        frames = h_FNC.shape[0]
        if sum(lengths) != frames:
            raise ConfigError(f"sequences of {sum(lengths)} frames in all, but there are {frames} frames")
        if all(length == 1 for length in lengths):  # a frame that sees itself alone is given its own value
            return self.proj(self._project(h_FNC)[2])
        parts = self._project(h_FNC)
        if len(set(lengths)) == 1:
            return self.proj(self._batched(*parts, lengths[0]))
        out_FNA = torch.empty_like(parts[0])
        starts: dict[int, list[int]] = {}
        at = 0
        for length in lengths:
            starts.setdefault(length, []).append(at)
            at += length
        for length, firsts in starts.items():
            rows = [first + step for first in firsts for step in range(length)]
            index = torch.tensor(rows, device=h_FNC.device)
            q, k, v = (part[index] for part in parts)
            done = self._batched(q, k, v, length)
            out_FNA = out_FNA.index_copy(0, index, done)
        return self.proj(out_FNA)

    def _batched(self, q_FNA: Tensor, k_FNA: Tensor, v_FNA: Tensor, length: int) -> Tensor:
        """Sequences of one length."""
        frames, N, A = q_FNA.shape
        q, k, v = (
            x.view(-1, length, N, self.heads, A // self.heads).permute(0, 2, 3, 1, 4).flatten(0, 1)
            for x in (q_FNA, k_FNA, v_FNA)
        )
        parts = zip(q.split(_BATCH), k.split(_BATCH), v.split(_BATCH), strict=True)
        done = [F.scaled_dot_product_attention(*part, is_causal=length > 1) for part in parts]
        o_MHTD = done[0] if len(done) == 1 else torch.cat(done)
        o = o_MHTD.unflatten(0, (frames // length, N)).permute(0, 3, 1, 2, 4)
        return o.reshape(frames, N, A)

    def step(self, h_BNC: Tensor, past: TemporalPast) -> Tensor:
        """One more frame of B sequences: (B, N, C) -> (B, N, C); it is added to `past`."""
        B, N, _ = h_BNC.shape
        q, k, v = (x.view(B * N, self.heads, -1) for x in self._project(h_BNC))
        keys, values = past.append(k, v)
        parts = zip(q[:, :, None].split(_BATCH), keys.split(_BATCH), values.split(_BATCH), strict=True)
        o_MH1D = torch.cat([F.scaled_dot_product_attention(*part) for part in parts])
        return self.proj(o_MH1D.reshape(B, N, self.inner))

    def forward_reference(
        self, h_FNC: Tensor, lengths: Sequence[int], *, window: int | None = None, sink: int = 0
    ) -> Tensor:
        """Slow twin of `forward` and, with a window, of `step`: one sequence, one head, one softmax after the other."""
        out = []
        for part_TNC in h_FNC.split(list(lengths)):
            q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in self._project(part_TNC))
            seen_TT = sees(part_TNC.shape[0], window, sink, h_FNC.device)
            heads = []
            for h in range(self.heads):
                scores_NTT = torch.einsum("tnd,snd->nts", q[:, :, h], k[:, :, h]) * q.shape[-1] ** -0.5
                weights_NTT = scores_NTT.masked_fill(~seen_TT, float("-inf")).softmax(-1)
                heads.append(torch.einsum("nts,snd->tnd", weights_NTT, v[:, :, h]))
            out.append(torch.cat(heads, dim=-1))
        return self.proj(torch.cat(out))


@dataclass(slots=True)
class TemporalCache:
    """The past of every temporal layer of an encoder, of B sequences that go on together."""

    layers: list[TemporalPast] = field(default_factory=list)

    @classmethod
    def of(cls, layers: int, window: int, sink: int = 0) -> TemporalCache:
        """An empty past for so many layers."""
        return cls([TemporalPast(window, sink) for _ in range(layers)])

    @property
    def frames(self) -> int:
        """Frames read so far."""
        return self.layers[0].frames if self.layers else 0
