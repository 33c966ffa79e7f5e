"""InternVLConfig: what an InternVL model is made of.

Source: InternVL 2.5 (2412.05271, Tables 1 and 2) and the `config.json` of its releases.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from chiasm.errors import ConfigError
from chiasm.media.tiles import TilePolicy
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class InternVLConfig:
    """Encoder, compressor, language model and the rules of their input.

    Attributes:
        downsample: unshuffle ratio s; a tile of P patches becomes P·s² tokens of width C_vision / s².
        unshuffle: "v2" (all 2.x releases) or "v1" (the oldest; grid axes transposed).
        select_layer: which encoder layer is read (-1 is the last).
        template: name in `chiasm.text.templates.TEMPLATES`; None where the checkpoint names none.
        system: overrides the template's system message ("" for none).
        tiles: how an image becomes tiles.
    """

    vision: InternViTConfig
    language: LanguageConfig
    tiles: TilePolicy = field(default_factory=TilePolicy)
    downsample: float = 0.5
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

    @property
    def tokens_per_tile(self) -> int:
        """256 for the released models: (448 / 14 · 0.5)²."""
        return int(self.tiles.image_size // self.vision.patch_size * self.downsample) ** 2

    @property
    def projector_inputs(self) -> int:
        """Width after unshuffling: 4096 (300M) or 12800 (6B)."""
        return int(self.vision.hidden_size / self.downsample**2)
