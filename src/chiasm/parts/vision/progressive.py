"""ProgressiveViT: an InternViT whose last layers see earlier frames and know when each frame was.

Source: PVC (arXiv 2412.09613), fact sheet sections 2.2 and 9. A still picture is a video of equal frames; frame t is
encoded with a view of frames before it, so that it may say what they have not said. Which sublayers are conditioned,
in which order they come, and how they are gated is not known of the release: each is a field of `TemporalConfig`.

New weights start as nothing (gates and modulations are zero), so that with the weights of an InternViT a fresh
ProgressiveViT computes what that InternViT computes. Names of the old weights are those of an InternViT.

Repeats of one picture are equal until the first sublayer that knows the time. All before it, the trunk, is computed
once for all of them, which is exact. The spatial attention of the first temporal layer belongs to it, by default.

Shape legend: N pictures, F frames (pictures after repeating) of all sequences, B sequences that go on together,
P patches, T = 1 + P tokens of a frame (class token first), C width, E width of the time embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from chiasm.errors import ConfigError
from chiasm.nn.temporal import (
    ACTIVATIONS,
    TemporalAttention,
    TemporalCache,
    TemporalPast,
    TimeEmbedding,
    modulated,
)
from chiasm.nn.vit import VitAttention, VitBlock, VitMLP, drop_path_rates, init_vit, vit_norm
from chiasm.parts.vision.internvit import InternViT, InternViTConfig

__all__ = ["Clips", "ProgressiveViT", "TemporalBlock", "TemporalConfig"]

CONDITIONED = ("spatial", "temporal", "ffn", "compress")
PLACES = {"before_spatial": 0, "after_spatial": 1, "after_ffn": 2}
"""Where the attention over time stands -> how many sublayers are in front of it."""
GATES = ("channel", "scalar", "time", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporalConfig:
    """What a ProgressiveViT has beyond an InternViT. What the paper leaves open has the default that starts as nothing.

    Attributes:
        layers: how many of the last layers are temporal (the paper's L, whose value is not known; a quarter of 24).
        attention: False leaves the attention over time out (an ablation: frames know the time, not one another).
        width: of queries, keys and values over time; None: that of the encoder. Narrower is cheaper.
        heads: over time; None: those of the encoder, at the same width of a head where `width` is another.
        place: where in its layer the attention over time stands.
        gate: what the attention over time is multiplied by: a number a "channel", one "scalar", a function of the
            "time", or "none" (its output projection is zero at first, then).
        conditioned: whose norm's scale and shift follow from the time; "compress" is the norm of the projector. ()
            leaves the time out (an ablation), unless the gate asks for it.
        conditioning: "full": a matrix of its own for every layer, at the width of the encoder, and an embedding of its
            own for the compressor, at the width of its input (what the size of the release hints at). "light": one
            matrix for all layers and a bias of its own for each, at a width of 256.
        time_sines: width of the sinusoidal embedding.
        time_width: E; None: C where conditioning is full, 256 where it is light.
        compress_time_width: the same for the compressor with full conditioning; None: the width of its input.
        time_act: activation of the embedding, and in front of the modulations.
        time: "relative": 0 at the first frame, 1 at the last. "seconds": after the first frame.
        time_scale: the times are multiplied by it before they are embedded; None: 1000 for relative, 1 for seconds.
        repeat_seconds: with "seconds", what lies between two repeats of a still picture.
        max_frames: longest sequence of frames: the model's horizon.
    """

    layers: int = 6
    attention: bool = True
    width: int | None = None
    heads: int | None = None
    place: str = "after_spatial"
    gate: str = "channel"
    conditioned: tuple[str, ...] = ("temporal", "ffn", "compress")
    conditioning: str = "light"
    time_sines: int = 256
    time_width: int | None = None
    compress_time_width: int | None = None
    time_act: str = "silu"
    time: str = "relative"
    time_scale: float | None = None
    repeat_seconds: float = 1.0
    max_frames: int = 96

    def __post_init__(self) -> None:
        object.__setattr__(self, "conditioned", tuple(self.conditioned))
        choices = {
            "place": tuple(PLACES),
            "gate": GATES,
            "conditioning": ("full", "light"),
            "time": ("relative", "seconds"),
            "time_act": tuple(ACTIVATIONS),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"temporal.{name} is {getattr(self, name)!r}: use one of {', '.join(known)}"
                )
        unknown = [name for name in self.conditioned if name not in CONDITIONED]
        if unknown or len(set(self.conditioned)) < len(self.conditioned):
            raise ConfigError(
                f"temporal.conditioned is {list(self.conditioned)}: name some of {', '.join(CONDITIONED)}, "
                "each once"
            )
        whole = ("layers", "width", "heads", "time_sines", "time_width", "compress_time_width", "max_frames")
        for name in whole:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"temporal.{name} is {value!r}: a whole number of at least 1 is needed")
        if self.time_sines % 2:
            raise ConfigError(f"temporal.time_sines is {self.time_sines}: it must be even")
        for name in ("time_scale", "repeat_seconds"):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, int | float) or isinstance(value, bool) or value <= 0
            ):
                raise ConfigError(f"temporal.{name} is {value!r}: a number above 0 is needed")

    @property
    def scale(self) -> float:
        """What times are multiplied by."""
        if self.time_scale is not None:
            return float(self.time_scale)
        return 1000.0 if self.time == "relative" else 1.0

    @property
    def modulates(self) -> tuple[str, ...]:
        """Sublayers of a temporal layer whose norm is conditioned, in the order of their rows in a modulation."""
        said = [name for name in ("spatial", "temporal", "ffn") if name in self.conditioned]
        return tuple(name for name in said if self.attention or name != "temporal")

    @property
    def timed(self) -> bool:
        """Whether a layer of the encoder knows the time."""
        return bool(self.modulates) or (self.attention and self.gate == "time")

    def rows(self, width: int) -> int:
        """Rows of a layer's modulation: scale and shift of every conditioned norm, and a gate that follows the time."""
        return width * (2 * len(self.modulates) + (self.attention and self.gate == "time"))

    def embedding(self, width: int) -> int:
        """E for an encoder of this width."""
        return self.time_width or (width if self.conditioning == "full" else 256)


@dataclass(frozen=True, slots=True)
class Clips:
    """How pictures become frames, and which frames are one sequence.

    Attributes:
        copies: how often each picture is repeated, one frame after the other.
        lengths: frames of each sequence; together they are all copies.
        times_F: when each frame is, as the config counts time.
    """

    copies: tuple[int, ...]
    lengths: tuple[int, ...]
    times_F: Tensor

    def __post_init__(self) -> None:
        if any(n < 1 for n in (*self.copies, *self.lengths)):
            raise ConfigError(
                "a picture is shown at least once, and a sequence has a frame: repeats 0 cannot be"
            )
        if sum(self.copies) != sum(self.lengths) or sum(self.copies) != len(self.times_F):
            raise ConfigError(
                f"{sum(self.copies)} frames, but sequences of {sum(self.lengths)} and {len(self.times_F)} times"
            )

    @classmethod
    def stills(cls, pictures: int, repeats: int = 1) -> Clips:
        """Pictures, each a sequence of equal frames, whose times go from 0 to 1."""
        times = torch.arange(repeats, dtype=torch.float64) / max(1, repeats - 1)
        return cls((repeats,) * pictures, (repeats,) * pictures, times.repeat(pictures))

    @property
    def repeated(self) -> bool:
        """Whether any picture is shown more than once."""
        return any(n > 1 for n in self.copies)

    def fan_out(self, x_NTC: Tensor) -> Tensor:
        """(N, …) -> (F, …): each picture as often as it is shown."""
        if not self.repeated:
            return x_NTC
        if len(set(self.copies)) == 1:
            return x_NTC.repeat_interleave(self.copies[0], dim=0)
        index = [n for n, copies in enumerate(self.copies) for _ in range(copies)]
        return x_NTC[torch.tensor(index, device=x_NTC.device)]


class TemporalBlock(VitBlock):
    """A layer of an InternViT with attention over time, whose norms may follow the time.

    Args:
        config: the encoder's shape. temporal: what is new.
        drop_path: of the two old sublayers.
    """

    def __init__(self, config: InternViTConfig, temporal: TemporalConfig, drop_path: float = 0.0) -> None:
        width, eps = config.hidden_size, config.norm_eps
        super().__init__(
            vit_norm(config.norm, width, eps),
            VitAttention(width, config.heads, qkv_bias=config.qkv_bias, qk_norm=config.qk_norm, norm_eps=eps),
            vit_norm(config.norm, width, eps),
            VitMLP(width, config.intermediate_size),
            width=width,
            layer_scale=config.layer_scale_init,
            drop_path=drop_path,
        )
        self.place, self.gated_by = temporal.place, temporal.gate
        self.modulates = temporal.modulates
        self.chunk: int | None = None
        """Frames (over time: tokens of as many frames) that one call takes where no gradient is wanted; None: all."""
        self.norm_t = self.temporal = self.gate = None
        if temporal.attention:
            heads, inner = _heads(config, temporal)
            self.norm_t = vit_norm(config.norm, width, eps)
            self.temporal = TemporalAttention(
                width, heads, inner=inner, qkv_bias=config.qkv_bias, qk_norm=config.qk_norm, norm_eps=eps
            )
            if temporal.gate in ("channel", "scalar"):
                self.gate = nn.Parameter(torch.zeros(width if temporal.gate == "channel" else 1))
        # With light conditioning, what this layer adds to the modulation that all share.
        self.modulation: nn.Linear | None = None
        self.own: nn.Parameter | None = None
        rows = temporal.rows(width)
        if rows and temporal.conditioning == "full":
            self.modulation = nn.Linear(temporal.embedding(width), rows)
        elif rows:
            self.own = nn.Parameter(torch.zeros(rows))

    @property
    def order(self) -> tuple[str, ...]:
        """The sublayers as they come."""
        if self.temporal is None:
            return "spatial", "ffn"
        order = ["spatial", "ffn"]
        order.insert(PLACES[self.place], "temporal")
        return tuple(order)

    @property
    def shared(self) -> tuple[str, ...]:
        """The first sublayers, which know neither time nor other frames: equal frames are still equal behind them."""
        order = self.order
        first = next(
            (n for n, name in enumerate(order) if name == "temporal" or name in self.modulates), len(order)
        )
        return order[:first]

    def changes(self, embedded_FE: Tensor | None, shared_FR: Tensor | None) -> dict[str, Tensor]:
        """Scale and shift (F, 2, C) of each conditioned norm and, where it follows the time, the gate (F, 1, C).

        Args:
            embedded_FE: the embedded times; None where nothing is conditioned.
            shared_FR: the modulation that all layers share, with light conditioning.
        """
        if embedded_FE is None or (self.modulation is None and self.own is None):
            return {}
        if self.modulation is not None:
            rows_FR = self.modulation(embedded_FE)
        else:
            assert self.own is not None
            assert shared_FR is not None
            rows_FR = shared_FR + self.own
        width = self.ls1.shape[0]
        parts_FKC = rows_FR.unflatten(-1, (-1, width))
        found = {name: parts_FKC[:, 2 * n : 2 * n + 2] for n, name in enumerate(self.modulates)}
        if self.gated_by == "time" and self.temporal is not None:
            found["gate"] = parts_FKC[:, 2 * len(self.modulates) :]
        return found

    def forward(
        self,
        x_NTC: Tensor,
        lengths: Sequence[int] = (),
        embedded_FE: Tensor | None = None,
        shared_FR: Tensor | None = None,
        *,
        only: Sequence[str] | None = None,
        past: TemporalPast | None = None,
        reference: tuple[int | None, int] | None = None,
    ) -> Tensor:
        """Apply the layer: (F, T, C) -> (F, T, C).

        Args:
            x_NTC: the frames of all sequences, one sequence after the other; one frame a sequence with `past`.
            lengths: frames of each sequence; () is one a sequence.
            embedded_FE, shared_FR: the embedded times and the modulation that all layers share, as of `changes`.
            only: the sublayers to apply; None: all.
            past: what the sequences have shown before; this frame is added.
            reference: (window, sink): attend over time by the slow twin.
        """
        # Made in here: where processes share the layers, one has its parameters whole only while it runs.
        changes = self.changes(embedded_FE, shared_FR)
        lengths = lengths or (1,) * x_NTC.shape[0]
        for name in self.order if only is None else only:
            if name == "spatial":
                x_NTC = self._by_frame(x_NTC, changes.get(name), self._spatial)
            elif name == "ffn":
                x_NTC = self._by_frame(x_NTC, changes.get(name), self._ffn)
            else:
                x_NTC = self._over_time(x_NTC, lengths, changes, past, reference)
        return x_NTC

    def _spatial(self, x_FTC: Tensor, change_F2C: Tensor | None) -> Tensor:
        h_FTC = modulated(self.norm1, x_FTC, change_F2C, self.ls1.dtype)
        return torch.addcmul(x_FTC, self.drop_path(self.attn(h_FTC)), self.ls1)

    def _ffn(self, x_FTC: Tensor, change_F2C: Tensor | None) -> Tensor:
        h_FTC = modulated(self.norm2, x_FTC, change_F2C, self.ls2.dtype)
        return torch.addcmul(x_FTC, self.drop_path(self.mlp(h_FTC)), self.ls2)

    def _by_frame(
        self, x_FTC: Tensor, change_F2C: Tensor | None, apply: Callable[[Tensor, Tensor | None], Tensor]
    ) -> Tensor:
        """A sublayer in which frames do not see each other, so many at a time as `chunk` allows."""
        frames, chunk = x_FTC.shape[0], self.chunk
        if chunk is None or frames <= chunk or torch.is_grad_enabled():
            return apply(x_FTC, change_F2C)
        changes = [None] * -(-frames // chunk) if change_F2C is None else change_F2C.split(chunk)
        return torch.cat([apply(x, change) for x, change in zip(x_FTC.split(chunk), changes, strict=True)])

    def _over_time(
        self,
        x_FTC: Tensor,
        lengths: Sequence[int],
        changes: dict[str, Tensor],
        past: TemporalPast | None,
        reference: tuple[int | None, int] | None,
    ) -> Tensor:
        assert self.temporal is not None
        assert self.norm_t is not None
        frames, tokens, _ = x_FTC.shape
        change, gate = changes.get("temporal"), changes.get("gate", self.gate)
        out = []
        step = tokens
        if self.chunk is not None and frames > self.chunk and not torch.is_grad_enabled() and past is None:
            step = max(1, tokens * self.chunk // frames)  # tokens do not see each other here
        for part_FUC in x_FTC.split(step, dim=1):
            h_FUC = modulated(self.norm_t, part_FUC, change, self.ls1.dtype)
            if past is not None:
                o_FUC = self.temporal.step(h_FUC, past)
            elif reference is not None:
                o_FUC = self.temporal.forward_reference(
                    h_FUC, lengths, window=reference[0], sink=reference[1]
                )
            else:
                o_FUC = self.temporal(h_FUC, lengths)
            out.append(
                part_FUC + o_FUC if gate is None else torch.addcmul(part_FUC, o_FUC, gate.to(o_FUC.dtype))
            )
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def _heads(config: InternViTConfig, temporal: TemporalConfig) -> tuple[int, int]:
    """Heads and width over time."""
    inner = temporal.width or config.hidden_size
    if temporal.heads is not None:
        return temporal.heads, inner
    side = config.hidden_size // config.heads
    if inner % side:
        raise ConfigError(
            f"temporal.width {inner} is no multiple of the encoder's head of {side} channels: change it, or set "
            "temporal.heads"
        )
    return inner // side, inner


class ProgressiveViT(InternViT):
    """The encoder: pictures, how they are repeated and grouped, and their times in; one feature a token out.

    Parameters are drawn from the global generator of torch: seed it, or load weights.

    Args:
        config: the shape of the InternViT. temporal: what is new.

    Raises:
        ConfigError: more temporal layers than layers, or heads that do not fit.
    """

    def __init__(self, config: InternViTConfig, temporal: TemporalConfig) -> None:
        if temporal.layers > config.layers:
            raise ConfigError(
                f"temporal.layers is {temporal.layers}, but the encoder has {config.layers} layers: use fewer"
            )
        super().__init__(config)
        self.temporal = temporal
        rates = drop_path_rates(config.drop_path, config.layers)
        for at in range(self.trunk_layers, config.layers):
            self.layers[at] = TemporalBlock(config, temporal, rates[at])
        self.time: TimeEmbedding | None = None
        self.modulation: nn.Linear | None = None
        compresses = "compress" in temporal.conditioned and temporal.conditioning == "light"
        if temporal.timed or compresses:
            self.time = TimeEmbedding(
                temporal.time_sines,
                temporal.embedding(config.hidden_size),
                act=temporal.time_act,
                scale=temporal.scale,
            )
        if temporal.timed and temporal.conditioning == "light":
            self.modulation = nn.Linear(self.time.width, temporal.rows(config.hidden_size))  # type: ignore[union-attr]
        init_vit(
            [*self.layers[self.trunk_layers :], *(m for m in (self.time, self.modulation) if m is not None)]
        )
        self.start_as_nothing()

    @property
    def trunk_layers(self) -> int:
        """Layers before the first temporal one."""
        return self.config.layers - self.temporal.layers

    @property
    def temporal_blocks(self) -> list[TemporalBlock]:
        """The temporal layers, first to last."""
        return [layer for layer in self.layers[self.trunk_layers :] if isinstance(layer, TemporalBlock)]

    def start_as_nothing(self) -> None:
        """Zero gates and modulations: the encoder is then the InternViT of its old weights."""
        with torch.no_grad():
            if self.modulation is not None:
                self.modulation.weight.zero_()
                self.modulation.bias.zero_()
            for block in self.temporal_blocks:
                for parameter in (block.gate, block.own):
                    if parameter is not None:
                        parameter.zero_()
                if block.modulation is not None:
                    block.modulation.weight.zero_()
                    block.modulation.bias.zero_()
                if block.temporal is not None and block.gated_by == "none":
                    block.temporal.proj.weight.zero_()
                    block.temporal.proj.bias.zero_()

    def chunked(self, frames: int | None) -> ProgressiveViT:
        """Bound the memory of long sequences: so many frames at a time in what frames do alone. Returns itself."""
        for block in self.temporal_blocks:
            block.chunk = frames
        return self

    def forward(  # type: ignore[override]
        self,
        pixels_N3HW: Tensor,
        select_layer: int = -1,
        *,
        checkpoint: bool | None = None,
        clips: Clips | None = None,
    ) -> Tensor:
        """Encode pictures as frames of sequences.

        Args:
            pixels_N3HW: (N, channels, H, W) normalised pixels; see `InternViT.forward`.
            select_layer: likewise.
            checkpoint: likewise.
            clips: how they are repeated and grouped; None: each a sequence of one frame at time 0.

        Returns:
            (F, 1 + P, C), sequence by sequence, frame by frame; class token first.

        Raises:
            ConfigError: as of `InternViT.forward`, the clips are of other pictures, or a sequence is longer than the
                horizon.
        """
        return self.hidden_states(pixels_N3HW, (select_layer,), checkpoint=checkpoint, clips=clips)[0]

    def hidden_states(
        self,
        pixels_N3HW: Tensor,
        select_layers: Sequence[int],
        *,
        checkpoint: bool | None = None,
        clips: Clips | None = None,
    ) -> tuple[Tensor, ...]:
        """Return several hidden states of one pass, each for all frames; arguments as of `forward`."""
        clips = self._checked(clips, pixels_N3HW.shape[0])
        depths = [self._depth(select) for select in select_layers]
        keep = torch.is_grad_enabled() and (self.checkpoint if checkpoint is None else checkpoint)
        trunk = min(max(depths), self.trunk_layers)
        x_NTC, kept = self._old_layers(pixels_N3HW, trunk, depths, keep)
        kept = {depth: clips.fan_out(x) for depth, x in kept.items()}
        if max(depths) > self.trunk_layers:
            x_NTC = self._shared_part(x_NTC, keep)
            self._new_layers(clips.fan_out(x_NTC), clips, kept, depths, keep)
        return tuple(kept[depth] for depth in depths)

    def trunk(self, pixels_N3HW: Tensor) -> Tensor:
        """(N, 1 + P, C): all that knows neither time nor other frames, once for all repeats; `step` goes on from it."""
        keep = torch.is_grad_enabled() and self.checkpoint
        return self._shared_part(self._old_layers(pixels_N3HW, self.trunk_layers, (), keep)[0], keep)

    def finish(self, trunk_NTC: Tensor, clips: Clips, select_layer: int = -1) -> Tensor:
        """(F, 1 + P, C) from what `trunk` gave for the pictures: the rest of `forward`."""
        depth = self._temporal_depth(select_layer)
        clips = self._checked(clips, trunk_NTC.shape[0])
        kept: dict[int, Tensor] = {}
        keep = torch.is_grad_enabled() and self.checkpoint
        self._new_layers(clips.fan_out(trunk_NTC), clips, kept, [depth], keep)
        return kept[depth]

    def new_cache(self, window: int, sink: int = 0) -> TemporalCache:
        """An empty past for sequences that are read frame by frame: each frame sees `window` frames and the first
        `sink`.
        """
        return TemporalCache.of(len(self.temporal_blocks), window, sink)

    def step(
        self, trunk_BTC: Tensor, times_B: Tensor, cache: TemporalCache, select_layer: int = -1
    ) -> Tensor:
        """One more frame of B sequences, given what `trunk` made of it: (B, 1 + P, C) -> (B, 1 + P, C).

        As long as the past holds all earlier frames, the result is that of `forward` for all of them.
        """
        depth = self._temporal_depth(select_layer)
        embedded, shared = self._condition(times_B)
        x_BTC = trunk_BTC
        for n, block in enumerate(self.temporal_blocks[: depth - self.trunk_layers]):
            only = block.order[len(block.shared) :] if n == 0 else None
            x_BTC = block(x_BTC, (), embedded, shared, only=only, past=cache.layers[n])
        return x_BTC

    def forward_reference(
        self,
        pixels_N3HW: Tensor,
        select_layer: int = -1,
        *,
        clips: Clips | None = None,
        window: int | None = None,
        sink: int = 0,
    ) -> Tensor:
        """Slow twin of `forward` and of `step`: every repeat goes through every layer, time by the plainest means."""
        clips = self._checked(clips, pixels_N3HW.shape[0])
        x_FTC = self.embed(clips.fan_out(pixels_N3HW))
        embedded, shared = self._condition(clips.times_F)
        for layer in self.layers[: self._depth(select_layer)]:
            if isinstance(layer, TemporalBlock):
                x_FTC = layer(x_FTC, clips.lengths, embedded, shared, reference=(window, sink))
            else:
                x_FTC = layer(x_FTC)
        return x_FTC

    # Parts of a pass -------------------------------------------------------------------------------------------------

    def _checked(self, clips: Clips | None, pictures: int) -> Clips:
        if clips is None:
            clips = Clips.stills(pictures)
        if len(clips.copies) != pictures:
            raise ConfigError(f"clips of {len(clips.copies)} pictures for {pictures}: they belong to others")
        longest = max(clips.lengths, default=0)
        if longest > self.temporal.max_frames:
            raise ConfigError(
                f"a sequence of {longest} frames is beyond the model's horizon of {self.temporal.max_frames}: take "
                "fewer frames or repeats, or set temporal.max_frames"
            )
        return clips

    def _temporal_depth(self, select_layer: int) -> int:
        depth = self._depth(select_layer)
        if depth <= self.trunk_layers:
            raise ConfigError(
                f"select_layer {select_layer} lies in front of the temporal layers, of which there are "
                f"{self.temporal.layers}: read a later one"
            )
        return depth

    def _old_layers(
        self, pixels_N3HW: Tensor, count: int, depths: Sequence[int], keep: bool
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The first layers, and the hidden states at these depths among them."""
        chunk = self.temporal_blocks[0].chunk
        parts = [pixels_N3HW]
        if chunk is not None and not torch.is_grad_enabled():
            parts = list(pixels_N3HW.split(chunk))
        kept: dict[int, list[Tensor]] = {}
        out = []
        for part in parts:
            x_NTC = self.embed(part)
            if x_NTC.dtype == torch.float16:
                x_NTC = x_NTC.float()  # what the layers add to may pass float16's 65,504
            for depth in range(count + 1):
                if depth:
                    layer = self.layers[depth - 1]
                    x_NTC = recompute(layer, x_NTC, use_reentrant=False) if keep else layer(x_NTC)
                if depth in depths:
                    kept.setdefault(depth, []).append(x_NTC)
            out.append(x_NTC)
        join = torch.cat if len(parts) > 1 else (lambda tensors: tensors[0])
        return join(out), {depth: join(found) for depth, found in kept.items()}

    def _shared_part(self, x_NTC: Tensor, keep: bool) -> Tensor:
        """The sublayers of the first temporal layer that equal frames still go through alike."""
        first = self.temporal_blocks[0]
        if not first.shared:
            return x_NTC
        if keep:
            return recompute(first, x_NTC, only=first.shared, use_reentrant=False)  # type: ignore[return-value]
        return first(x_NTC, only=first.shared)

    def _new_layers(
        self, x_FTC: Tensor, clips: Clips, kept: dict[int, Tensor], depths: Sequence[int], keep: bool
    ) -> None:
        """The temporal layers without the part of `_shared_part`; hidden states at these depths are put into `kept`."""
        embedded, shared = self._condition(clips.times_F)
        for n, block in enumerate(self.temporal_blocks[: max(depths) - self.trunk_layers]):
            only = block.order[len(block.shared) :] if n == 0 else None
            if keep:
                x_FTC = recompute(
                    block, x_FTC, clips.lengths, embedded, shared, only=only, use_reentrant=False
                )  # type: ignore[assignment]
            else:
                x_FTC = block(x_FTC, clips.lengths, embedded, shared, only=only)
            depth = self.trunk_layers + n + 1
            if depth in depths:
                kept[depth] = x_FTC

    def _condition(self, times_F: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The embedded times (F, E), and the modulation that all layers share (F, R)."""
        if self.time is None or not self.temporal.timed:
            return None, None
        embedded_FE = self.time(times_F)
        return embedded_FE, None if self.modulation is None else self.modulation(embedded_FE)
