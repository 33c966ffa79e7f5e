"""PVCConfig: what a PVC model is made of.

Source: PVC (2412.09613) and the `config.json` keys of its release (fact sheet, section 2.1). It has all that an
InternVL has; new are the temporal layers, how often a picture is repeated, and a coarser unshuffle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from chiasm.data.layout import RepeatOrder
from chiasm.errors import ConfigError
from chiasm.media.tiles import TilePolicy
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.parts.vision.progressive import TemporalConfig

__all__ = ["VIEWS", "PVCConfig", "downsample_for"]

VIEWS = ("same", "crops", "scales")
"""What the repeats of a picture show, see `PVCConfig.views`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PVCConfig:
    """Encoder, compressor, language model and the rules of their input.

    Attributes:
        temporal: the temporal layers of the encoder, and what of encoder and projector follows the time.
        repeats: how often a tile of a picture is encoded (T_img of the paper).
        video_repeats: how often a frame of a video is.
        repeat_order: rows of a picture: "tile", all repeats of a tile before the next one, or "repeat", all tiles
            before the next repeat.
        frame_tiles: most tiles of a frame.
        views: what the repeats show: the "same" tile; "crops": the whole, then its quarters, enlarged, row by row;
            "scales": the tile at a rising share of its resolution, whole at last. Others than "same" cost a pass of all
            layers each.
        downsample: unshuffle ratio s; a tile of P patches becomes P·s² tokens: 16, 64 or 256 of a 448 tile with 0.125,
            0.25 (the paper) or 0.5.
        unshuffle: "v2" (all 2.x releases) or "v1" (the oldest; grid axes transposed).
        select_layer: which encoder layer is read (-1 is the last).
        template: name in `chiasm.text.templates.TEMPLATES`; None where the checkpoint names none.
        system: overrides the template's system message ("" for none).
        tiles: how an image becomes tiles.
    """

    vision: InternViTConfig
    language: LanguageConfig
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    tiles: TilePolicy = field(default_factory=TilePolicy)
    repeats: int = 4
    video_repeats: int = 1
    repeat_order: RepeatOrder = "tile"
    frame_tiles: int = 1
    views: str = "same"
    downsample: float = 0.25
    unshuffle: Literal["v1", "v2"] = "v2"
    select_layer: int = -1
    template: str | None = "internvl2_5"
    system: str | None = None

    def __post_init__(self) -> None:
        if self.tiles.image_size % self.vision.patch_size:
            raise ConfigError(
                f"tile size {self.tiles.image_size} is not a multiple of the patch size {self.vision.patch_size}"
            )
        side = self.tiles.image_size // self.vision.patch_size * self.downsample
        if side != int(side) or side < 1:
            raise ConfigError(f"downsample {self.downsample} does not divide the patch grid of a tile")
        for name in ("repeats", "video_repeats", "frame_tiles"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}: a whole number of at least 1 is needed")
        if max(self.repeats, self.video_repeats) > self.temporal.max_frames:
            raise ConfigError(
                f"{max(self.repeats, self.video_repeats)} repeats are beyond the horizon of "
                f"{self.temporal.max_frames} frames: use fewer, or set temporal.max_frames"
            )
        if self.repeat_order not in ("tile", "repeat"):
            raise ConfigError(f"repeat_order is {self.repeat_order!r}: use tile or repeat")
        if self.views not in VIEWS:
            raise ConfigError(f"views is {self.views!r}: use one of {', '.join(VIEWS)}")
        if self.temporal.layers > self.vision.layers:
            raise ConfigError(
                f"temporal.layers is {self.temporal.layers}, but the encoder has {self.vision.layers} layers: use fewer"
            )
        depth = self.select_layer % (1 + self.vision.layers)
        if depth <= self.vision.layers - self.temporal.layers:
            raise ConfigError(
                f"select_layer {self.select_layer} lies in front of all temporal layers: read a later one, or set "
                "temporal.layers"
            )

    @property
    def tokens_per_tile(self) -> int:
        """64 for the paper's model: (448 / 14 · 0.25)²; a picture's tile takes `repeats` times as many."""
        return int(self.tiles.image_size // self.vision.patch_size * self.downsample) ** 2

    @property
    def projector_inputs(self) -> int:
        """Width after unshuffling: 16,384 for InternViT-300M and 64 tokens."""
        return int(self.vision.hidden_size / self.downsample**2)

    @property
    def projector_embedding(self) -> int | None:
        """Width of the embedded times that the projector reads; None where it knows no time."""
        t = self.temporal
        if "compress" not in t.conditioned:
            return None
        if t.conditioning == "full":
            return t.compress_time_width or self.projector_inputs
        return t.embedding(self.vision.hidden_size)


def downsample_for(tokens: int, vision: InternViTConfig, image_size: int | None = None) -> float:
    """The unshuffle ratio that makes so many tokens of a tile.

    Raises:
        ConfigError: no whole number of patches would be one token; the possible numbers are named.
    """
    grid = (image_size or vision.image_size) // vision.patch_size
    fit = {(grid // f) ** 2: 1 / f for f in range(1, grid + 1) if grid % f == 0}
    if tokens not in fit:
        raise ConfigError(
            f"a tile of {grid} x {grid} patches cannot have {tokens} tokens: {', '.join(map(str, fit))}"
        )
    return fit[tokens]
