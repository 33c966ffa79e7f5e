"""MetaData: the user's data sets of a meta JSON for the recipes of systems, packed and laid out for their models.

Source: InternVL 2.5 (2412.05271, sections 3.2 and 4.2): the meta JSON of the release names data sets, samples are
packed over tokens and tiles, the loss is weighted by the inverse square root of a sample's learned tokens.

No data are shipped with Chiasm; `docs/recipes.md` says how to write a meta JSON. This node names only what such a
recipe sets; the rest of `chiasm.train.packed.PackedData` keeps its defaults.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from chiasm.data.layout import LayoutSpec
from chiasm.data.quarantine import QuarantinePolicy
from chiasm.errors import ConfigError, DataError
from chiasm.media.frames import FrameSampling

__all__ = ["MetaData", "ModelLayout"]


class HasLayout(Protocol):
    """A model node that knows how its input is laid out."""

    def layout(self) -> LayoutSpec:
        """Return the rules; no weight is read."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayout:
    """How training samples of a model node are laid out (a `chiasm.train.packed.LayoutSource`)."""

    model: HasLayout
    loss_power: float = 0.5
    loss_count: Literal["sample", "response"] = "sample"

    def layout(self) -> LayoutSpec:
        """Return the rules: the model's, with the weights of the loss."""
        changes: dict[str, Any] = {"loss_power": self.loss_power}
        if self.loss_count != "sample":
            changes["loss_count"] = self.loss_count
        # Frames are spelled as the training of the release spells them.
        return replace(self.model.layout(), **changes, frame_tags="training")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaData:
    """Data sets of a meta JSON."""

    meta: str = ""
    """InternVL meta JSON: name -> {root, annotation, data_augment, repeat_time, max_dynamic_patch?}; or one annotation
    file of any format (JSONL, JSON, parquet, tar, a glob of shards)."""
    root: str = ""
    """Where relative paths of that one annotation file's pictures start."""
    dev: str = ""
    """Held-out data sets, named as those of ``meta``: scored every ``eval_every`` steps, never trained on."""
    dev_root: str = ""
    dev_rows: int = 200
    """Rows of each of them that are scored."""
    max_tokens: int = 16_384
    """Rows of a pack."""
    max_tiles: int = 48
    """Tiles and frames of a pack."""
    buffer: int = 20
    """Packs that are open at once."""
    method: Literal["best_fit", "first_fit"] = "best_fit"
    """best_fit is the paper's search, first_fit that of the released code."""
    overflow: Literal["refuse", "truncate", "split"] = "refuse"
    strict: bool = False
    """Fill packs up with padding, so that all have the same sizes."""
    resampling: Literal["length", "sqrt"] = "length"
    loss_power: float = 0.5
    """0 weighs tokens alike, 1 samples, 0.5 is the square root of the release."""
    loss_count: Literal["sample", "response"] = "sample"
    """What the loss weight counts: as the released code (sample) or as the paper's text (response)."""
    min_frames: int = 8
    max_frames: int = 32
    jpeg: Literal["tile", "image"] = "tile"
    """What draws a JPEG quality of its own in sets with ``data_augment``."""
    max_bad: float = 0.01
    """Share of bad samples (left out and listed in the run's folder) above which the run stops."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_tiles", "buffer", "min_frames", "dev_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.loss_power <= 1:
            raise ConfigError(f"data.loss_power must lie in [0, 1], got {self.loss_power}")
        if self.max_frames < self.min_frames:
            raise ConfigError(f"data.max_frames {self.max_frames} is below data.min_frames {self.min_frames}")

    def found(self) -> str:
        """The meta JSON, or the one annotation file.

        Raises:
            DataError: it is not set, or no file.
        """
        if not self.meta:
            raise DataError(
                "data.meta is not set: name your meta JSON or JSONL, --set data.meta=FILE (docs/recipes.md)"
            )
        if not Path(self.meta).is_file() and not glob.has_magic(self.meta):
            raise DataError(f"data.meta: there is no file {self.meta}")
        return self.meta

    def open(self) -> Any:
        """Refuse: samples cannot be laid out without the model that reads them (see `open_for`)."""
        raise DataError(
            "the data of this recipe are laid out for its model: open them with train.data.open_data"
        )

    def open_for(self, model: HasLayout) -> Any:
        """Return the source for a model node.

        Raises:
            DataError: the meta JSON is not set, or a file of it is missing or malformed.
        """
        meta = self.found()
        from chiasm.data.datasets import read_specs
        from chiasm.train.packed import PackedData

        sampling = FrameSampling(
            mode="rand", frames=None, min_frames=self.min_frames, max_frames=self.max_frames
        )
        return PackedData(
            layout=ModelLayout(model=model, loss_power=self.loss_power, loss_count=self.loss_count),
            meta=meta,
            root=self.root,
            dev=read_specs(self.dev, root=self.dev_root) if self.dev else {},
            dev_rows=self.dev_rows,
            max_tokens=self.max_tokens,
            max_tiles=self.max_tiles,
            buffer=self.buffer,
            method=self.method,
            overflow=self.overflow,
            strict=self.strict,
            resampling=self.resampling,
            sampling=sampling,
            jpeg=self.jpeg,
            quarantine=QuarantinePolicy(max_share=self.max_bad),
        ).open()
