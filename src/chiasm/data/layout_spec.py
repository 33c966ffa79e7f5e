"""LayoutSpec: all that decides how messages become rows; frozen plain data beside a tokenizer.

Source: fact sheet InternVL 2.5, sections 2.9 and 3.3; fact sheet PVC, section 2.1 (repeats). What is done with it is
in `chiasm.data.layout`, from where it is imported.

Legend: T rows, K rows a tile, R repeats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

from chiasm.data.message import Part
from chiasm.errors import ConfigError, TemplateError
from chiasm.media.frames import FrameSampling
from chiasm.media.tiles import TilePolicy
from chiasm.nn.losses import Count
from chiasm.text.templates import FrameTags, Template, get_frame_tags, get_template
from chiasm.text.tokenizer import Tokenizer

__all__ = ["LayoutSpec", "RepeatOrder", "Shot"]

RepeatOrder = Literal["tile", "repeat"]
"""Rows of a repeated span: all repeats of tile 0, then those of tile 1, …; or all tiles once, then all again, …"""

Shot = tuple[int, int]
"""(frames, tiles of a frame) of a video."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutSpec:
    """All that decides how messages become rows.

    Attributes:
        tokenizer: must know the three image tokens as soon as there is a picture.
        template: a `Template` or its name.
        tiles: how a picture becomes tiles; its budget is shared by the pictures of a conversation.
        tokens_per_tile: K, rows that one tile takes.
        image_start, image_end, image_context: the image tokens.
        max_length: longest allowed T; None for no limit.
        system: system message instead of the template's; "" for none. A system turn wins over it.
        loss_power: p of the loss weight x^-p of every learned row, x the number of learned rows of the sample
            (0 weighs tokens equally, 1 samples, 0.5 is the square-root compromise of InternVL 2.5).
        loss_count: what x counts: the learned rows of the whole "sample" (as the released code) or of the "response"
            that a row is part of (as the paper says). They differ where a conversation has several answers.
        sampling: which frames of a video are taken, unless its part says so itself. Default: 8 frames by the formula
            of the template's source (transformers' with `frames="hf"` there, else the release's).
        frame_tags: how frames are spelled, "docs", "hf" or "training" (`chiasm.text.templates.FRAME_TAGS`). Default:
            the template's own, which is "docs" for all but `internvl-hf`.
        repeats: R, how often every tile of a picture is encoded: it takes R * K rows.
        repeat_order: in which order these rows lie, "tile" or "repeat" (`RepeatOrder`).
        frame_tiles: largest number of tiles of a video's frame (a thumbnail, where the policy wants one, comes on
            top, as for pictures).
        video_repeats: how often every tile of a frame is encoded.
        max_frames: most frames of one video, where the model looks no further (the horizon of a temporal encoder);
            more are refused. None for no limit.
    """

    tokenizer: Tokenizer
    template: Template
    tiles: TilePolicy
    tokens_per_tile: int
    image_start: str = "<img>"
    image_end: str = "</img>"
    image_context: str = "<IMG_CONTEXT>"
    max_length: int | None = None
    system: str | None = None
    loss_power: float = 0.5
    loss_count: Count = "sample"
    sampling: FrameSampling | None = None
    frame_tags: str | None = None
    repeats: int = 1
    repeat_order: RepeatOrder = "tile"
    frame_tiles: int = 1
    video_repeats: int = 1
    max_frames: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "template", get_template(self.template))
        _ = self.frame_spelling
        for name in ("tokens_per_tile", "repeats", "frame_tiles", "video_repeats", "max_frames"):
            value = getattr(self, name)
            if name == "max_frames" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, found {value!r}")
        if self.repeat_order not in get_args(RepeatOrder):
            raise ConfigError(
                f"repeat_order is {self.repeat_order!r}: use {' or '.join(get_args(RepeatOrder))}"
            )
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"max_length must be at least 1 or None, found {self.max_length}")
        if not 0 <= self.loss_power <= 1:
            raise ConfigError(f"loss_power must lie in 0..1, found {self.loss_power}")
        if self.loss_count not in get_args(Count):
            raise ConfigError(f"loss_count is {self.loss_count!r}: use {' or '.join(get_args(Count))}")
        if not all(self.image_tokens) or len(set(self.image_tokens)) < 3:
            raise ConfigError("image_start, image_context and image_end must be three different tokens")

    @property
    def image_tokens(self) -> tuple[str, str, str]:
        """Start, context and end token, in the order in which a picture has them."""
        return self.image_start, self.image_context, self.image_end

    @property
    def frame_spelling(self) -> FrameTags:
        """How frames are spelled; ConfigError for an unknown name."""
        return get_frame_tags(self.frame_tags or self.template.frames)

    @property
    def image_rows(self) -> int:
        """Rows that one tile of a picture takes: R * K."""
        return self.repeats * self.tokens_per_tile

    @property
    def frame_rows(self) -> int:
        """Rows that one tile of a frame takes."""
        return self.video_repeats * self.tokens_per_tile

    def shot(self, frames: int, size: tuple[int, int]) -> Shot:
        """A video of so many frames of (width, height) pixels."""
        return frames, 1 if self.frame_tiles == 1 else self.tiles.count(*size, self.frame_tiles)

    def limited(self, max_tiles: int | None) -> LayoutSpec:
        """The same rules with another limit of tiles; None leaves it."""
        if max_tiles is None or max_tiles == self.tiles.max_tiles:
            return self
        return replace(self, tiles=_limited(self.tiles, max_tiles))

    def frame_sampling(self, part: Part, seed: int | None = None) -> FrameSampling:
        """Which frames of a video part are taken; ConfigError when its fields cannot be.

        `seed` is that of frames drawn at random, where the part does not say one itself.
        """
        formula = "hf" if self.template.frames == "hf" else "original"
        own = self.sampling or FrameSampling(formula=formula)
        asked = dict(part.sampling)
        if asked.get("fps") is not None:
            asked.setdefault("mode", "fps")
        if (
            asked.get("mode", own.mode) != "fps"
        ):  # then a rate is refused, but not for one of the layout's own
            asked.setdefault("fps", None)
        if seed is not None:
            asked.setdefault("seed", seed)
        return replace(own, **asked)

    @property
    def context_id(self) -> int:
        """Id of the context token.

        Raises TemplateError when an image token is missing from the vocabulary.
        """
        ids = {token: self.tokenizer.token_to_id(token) for token in self.image_tokens}
        for token, index in ids.items():
            if index is None:
                raise TemplateError(
                    f"this model reads no pictures (its tokenizer has no {token} token): leave them out or choose "
                    "another model"
                )
        return ids[self.image_context]  # type: ignore[return-value]

    @property
    def bos_id(self) -> int | None:
        """The begin token that comes first: the tokenizer's, if it puts one and the template follows it."""
        if not self.template.bos:
            return None
        first = self.tokenizer.encode("", add_special_tokens=True)[:1]
        return first[0] if first and first[0] == self.tokenizer.bos_id else None


@lru_cache(maxsize=256)
def _limited(policy: TilePolicy, max_tiles: int) -> TilePolicy:
    return replace(policy, max_tiles=max_tiles, min_tiles=min(policy.min_tiles, max_tiles))
