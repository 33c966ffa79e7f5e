"""How training samples of a released model are laid out: its checkpoint folder as a node of recipes.

Source: fact sheet InternVL 2.5, sections 2.5 (config), 2.9 (template) and 4 (loss weights).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from chiasm.checkpoint.adapters import open_checkpoint
from chiasm.data.layout import LayoutSpec
from chiasm.nn.losses import Count
from chiasm.systems.internvl.load import outline

__all__ = ["CheckpointLayout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLayout:
    """Tokenizer, template and tile policy of a checkpoint folder (original, -hf, or a language model alone)."""

    folder: str
    template: str | None = None
    """Instead of the checkpoint's own, or where it names none."""
    system: str | None = None
    max_tiles: int | None = None
    loss_power: float = 0.5
    loss_count: Count = "sample"

    def layout(self) -> LayoutSpec:
        """Return the rules; no weight is read.

        Raises:
            CheckpointError, ConfigError, TemplateError: as of `chiasm.systems.internvl.load.outline`.
        """
        tiles = {} if self.max_tiles is None else {"max_tiles": self.max_tiles}
        opened = open_checkpoint(self.folder)
        with opened.reader:
            found = outline(opened, template=self.template, system=self.system, **tiles)
        return replace(found.spec, loss_power=self.loss_power, loss_count=self.loss_count)
