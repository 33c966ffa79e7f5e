"""From a PVC folder to a model that answers about pictures and videos."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from chiasm.checkpoint.store import CONFIG
from chiasm.checkpoint.vocab import check_rows
from chiasm.data.layout import LayoutSpec
from chiasm.errors import TemplateError, UsageError
from chiasm.media.frames import FrameSampling
from chiasm.model.answer import ModelInputs, Reply, parse_options
from chiasm.model.chat import ChatModel
from chiasm.model.loading import load_weights
from chiasm.systems.pvc.config import PVCConfig
from chiasm.systems.pvc.convert import open_pvc
from chiasm.systems.pvc.model import build_pvc, check_anytime
from chiasm.systems.pvc.stream import VideoStream
from chiasm.text.templates import get_template
from chiasm.text.tokenizer import Tokenizer

__all__ = ["FRAMES", "OPTIONS", "PVCChat", "layout_of_folder", "load_pvc", "spec_of"]

FRAMES = 64
"""Frames of a video, unless the question says otherwise (those of the release's example)."""

OPTIONS = ("repeats", "anytime", "views")
"""Options of `load_pvc` beside those of every model."""


class PVCChat(ChatModel):
    """A model that answers questions about pictures and videos.

    `anytime`, when set, repeats a picture only until its tokens change by less than this share
    (`PVCEmbedder.settled`). `watch` reads a video while it comes.
    """

    anytime: float | None = None

    @property
    def config(self) -> PVCConfig:
        """What the model is made of."""
        return self.model.embedder.config  # type: ignore[return-value]

    @property
    def facts(self) -> dict[str, Any]:
        """What answers depend on beside weights and layout: how time is counted, what repeats show, when they end."""
        found = {
            "temporal": asdict(self.config.temporal),
            "repeat_order": self.config.repeat_order,
            "views": self.config.views,
        }
        return found if self.anytime is None else {**found, "anytime": self.anytime}

    def inputs(self, messages: Any, images: Sequence[Any] = ()) -> ModelInputs:
        """Lay a conversation out, see `ChatModel.inputs`; with `anytime`, a picture has the repeats that it needs."""
        found = super().inputs(messages, images)
        if self.anytime is None or not found.sequence.spans_of("image"):
            return found
        sequence = self.model.embedder.settled(found.sequence, self.anytime)  # type: ignore[operator]
        return ModelInputs(sequence.ids_T, found.tiles, sequence)

    def answer(self, inputs: ModelInputs, **options: Any) -> Generator[str, None, Reply]:
        """The answer to inputs that were laid out already, piece by piece; see `ChatModel.stream`."""
        return self._pieces(inputs, parse_options(options), self.prefixes)

    def watch(self, **given: Any) -> VideoStream:
        """A video that is read frame by frame; arguments as of `VideoStream`."""
        return VideoStream(self, **given)


def spec_of(
    config: PVCConfig, tokenizer: Tokenizer, *, template: str, system: str | None = None
) -> LayoutSpec:
    """How the input of a PVC is laid out; `system` replaces the config's message."""
    horizon = config.temporal.max_frames // config.video_repeats
    sampling = FrameSampling(
        frames=min(FRAMES, horizon),
        formula="hf" if get_template(template).frames == "hf" else "original",
    )
    return LayoutSpec(
        tokenizer=tokenizer,
        template=get_template(template),
        tiles=config.tiles,
        tokens_per_tile=config.tokens_per_tile,
        max_length=config.language.max_positions,
        system=config.system if system is None else system,
        sampling=sampling,
        repeats=config.repeats,
        repeat_order=config.repeat_order,
        frame_tiles=config.frame_tiles,
        video_repeats=config.video_repeats,
        max_frames=horizon,
    )


def _template(config: PVCConfig, folder: Path) -> str:
    if config.template is None:
        raise TemplateError(
            f"{folder / CONFIG} names no template: pass template=/--template (internvl2_5 for InternVL 2.5)"
        )
    return config.template


def layout_of_folder(folder: str | Path, *, template: str | None = None) -> LayoutSpec:
    """How the input of a PVC folder is laid out; no weight is read.

    Raises:
        CheckpointError, ConfigError, TemplateError: as of `load_pvc`.
    """
    opened = open_pvc(folder)
    with opened.reader:
        tokenizer = Tokenizer.from_file(opened.reader.folder)
        check_rows(tokenizer, opened.config.language.vocab_size)
    return spec_of(opened.config, tokenizer, template=template or _template(opened.config, Path(folder)))


def load_pvc(
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | Sequence[torch.device] = "cpu",
    template: str | None = None,
    system: str | None = None,
    deterministic: bool = False,
    quantize: str | None = None,
    backend: str | None = None,
    repeats: int | None = None,
    anytime: float | None = None,
    views: str | None = None,
    **tiles: Any,
) -> PVCChat:
    """Load a PVC checkpoint folder.

    Args:
        folder: as `chiasm convert SRC DST --to pvc` writes it.
        dtype, device, template, system, deterministic, quantize: as of `chiasm.load`.
        backend: "torch" or None; a PVC has no other.
        repeats: of a tile of a picture, instead of the checkpoint's own; fewer are the first of these.
        anytime: repeat a picture only until its tokens change by less than this share, for instance 0.05.
        views: what the repeats show: "same", "crops" or "scales" (`PVCConfig.views`).
        tiles: fields of `TilePolicy` to override, for instance `max_tiles=6`.

    Raises:
        CheckpointError, ConfigError, TemplateError: one line that names the file, key or field.
        UsageError: another backend.
    """
    if backend not in (None, "torch"):
        raise UsageError(f"backend {backend!r} has no temporal layers: leave it out for a PVC")
    opened = open_pvc(folder, **tiles)
    with opened.reader:
        config = opened.config
        tokenizer = Tokenizer.from_file(opened.reader.folder)
        used = check_rows(tokenizer, config.language.vocab_size)
        if views is not None:
            config = replace(config, views=views)
        if repeats is not None and isinstance(repeats, int) and repeats > config.repeats:
            config = replace(config, repeats=repeats)  # they share the time from 0 to 1 among them
        if anytime is not None:
            check_anytime(anytime, config)
        spec = spec_of(config, tokenizer, template=template or _template(config, Path(folder)), system=system)
        if repeats is not None:
            spec = replace(spec, repeats=repeats)
        with torch.device("meta"):
            model = build_pvc(config)
        load_weights(
            model,
            opened.reader,
            opened.adapter,
            used=used,
            dtype=dtype,
            stored=opened.public.dtype,
            device=device,
            quantize=quantize,
        )
    chat = PVCChat(model, spec, name=Path(folder).name, deterministic=deterministic)
    chat.anytime = anytime
    return chat
