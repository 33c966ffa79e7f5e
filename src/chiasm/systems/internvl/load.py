"""From a checkpoint folder to a model that answers: both InternVL layouts, and language models alone.

Source: fact sheet InternVL 2.5, sections 2.5 to 2.9. Tensors go straight from the mapped files into a model that was
built on the meta device, so loading needs the memory of the weights and little more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from chiasm.checkpoint.adapters import OpenedCheckpoint, open_checkpoint
from chiasm.checkpoint.config import InternVLPublicConfig
from chiasm.checkpoint.preprocess import read_tile_policy
from chiasm.checkpoint.store import CONFIG
from chiasm.checkpoint.vocab import check_rows
from chiasm.data.layout import LayoutSpec
from chiasm.errors import TemplateError
from chiasm.media.tiles import TilePolicy
from chiasm.model.chat import ChatModel
from chiasm.model.loading import has_bfloat16, load_weights, resolve_dtype
from chiasm.parts.language.config import LanguageConfig
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.model import build_internvl, build_language_model
from chiasm.text.templates import get_template
from chiasm.text.tokenizer import Tokenizer

__all__ = [
    "Outline",
    "config_from_public",
    "has_bfloat16",
    "load_folder",
    "outline",
    "resolve_dtype",
    "spec_from_config",
]


def config_from_public(
    public: InternVLPublicConfig, policy: TilePolicy, *, tie_words: bool
) -> InternVLConfig:
    """The native config of a public one; its template is None where an original config names none."""
    return InternVLConfig(
        vision=public.vision_config(),
        language=public.language_config(tie_words=tie_words),
        tiles=policy,
        downsample=public.downsample_ratio,
        unshuffle=public.ps_version,  # type: ignore[arg-type]
        select_layer=public.select_layer,
        template=public.template or None,
        system=public.system_message,
    )


def load_folder(
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | Sequence[torch.device] = "cpu",
    template: str | None = None,
    system: str | None = None,
    deterministic: bool = False,
    quantize: str | None = None,
    backend: str | None = None,
    **tiles: Any,
) -> ChatModel:
    """Load a checkpoint folder (original or -hf InternVL, or a language model alone).

    Args:
        dtype: "float32", "bfloat16", "float16", "auto" or None (as stored, but float16 in the place of a bfloat16 that
            the GPU cannot compute in).
        device: one, or several that share the decoder's layers (see `chiasm.model.placement`).
        template: chat template, where the checkpoint's own is to be overridden. system: likewise its message.
        quantize: weights to round while they are loaded, see `chiasm.model.quantize`.
        backend: "openvino" answers through compiled graphs, which are written once; None and "torch" in PyTorch.
        tiles: fields of `TilePolicy` to override, for instance `max_tiles=6`, `resize="fast"`.

    Raises:
        CheckpointError, ConfigError, TemplateError: one line that names the file, key or field (a tokenizer with
            ids beyond the word table is among them).
    """
    opened = open_checkpoint(folder)
    with opened.reader:
        found = outline(opened, template=template, system=system, **tiles)
        if backend == "openvino":
            from chiasm.model.openvino.export import sources_of
            from chiasm.systems.internvl.openvino import compiled_chat

            return compiled_chat(
                Path(folder).name,
                found.config,
                found.spec,
                sources=sources_of(Path(folder)),
                load=lambda stored: load_folder(folder, dtype=stored, template=template, **tiles),
                dtype=dtype,
                quantize=quantize,
                deterministic=deterministic,
            )
        with torch.device("meta"):
            if isinstance(found.config, InternVLConfig):
                model = build_internvl(found.config)
            else:
                model = build_language_model(found.config)
        load_weights(
            model,
            opened.reader,
            opened.adapter,
            used=found.used,
            dtype=dtype,
            stored=found.dtype,
            device=device,
            quantize=quantize,
        )
    return ChatModel(model, found.spec, name=Path(folder).name, deterministic=deterministic)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What a checkpoint folder is, before any of its weights is read.

    Attributes:
        config: the whole model, or the decoder of a language model alone.
        spec: how its input is laid out.
        used: leading rows of the word table that tokens have.
        dtype: what the config says that the weights are stored in.
    """

    config: InternVLConfig | LanguageConfig
    spec: LayoutSpec
    used: int
    dtype: str | None


def outline(
    opened: OpenedCheckpoint, *, template: str | None = None, system: str | None = None, **tiles: Any
) -> Outline:
    """Settle what a checkpoint is and how one talks to it; arguments and errors are those of `load_folder`."""
    folder = opened.reader.folder
    tokenizer = Tokenizer.from_file(folder)
    if opened.public is None:
        stored = opened.reader.config.get("dtype") or opened.reader.config.get("torch_dtype")
        used = check_rows(tokenizer, opened.language.vocab_size)
        spec = LayoutSpec(
            tokenizer=tokenizer,
            template=get_template(template or "chatml"),
            tiles=TilePolicy(),
            tokens_per_tile=1,
            max_length=opened.language.max_positions,
            system=system,
        )
        return Outline(config=opened.language, spec=spec, used=used, dtype=stored)
    policy = replace(read_tile_policy(folder, opened.public, opened.layout), **tiles)  # type: ignore[arg-type]
    config = config_from_public(opened.public, policy, tie_words=opened.language.tie_words)
    used = check_rows(tokenizer, config.language.vocab_size)
    chosen = template or config.template
    if chosen is None:
        # A guess would answer, only worse: the releases differ in their turns and system messages.
        raise TemplateError(
            f"{folder / CONFIG} names no template: pass template=/--template (internvl2_5 for InternVL 2.5)"
        )
    spec = spec_from_config(config, tokenizer, template=chosen, system=system)
    return Outline(config=config, spec=spec, used=used, dtype=opened.public.dtype)


def spec_from_config(
    config: InternVLConfig, tokenizer: Tokenizer, *, template: str, system: str | None = None
) -> LayoutSpec:
    """How the input of an InternVL is laid out; `system` replaces the config's message."""
    return LayoutSpec(
        tokenizer=tokenizer,
        template=get_template(template),
        tiles=config.tiles,
        tokens_per_tile=config.tokens_per_tile,
        max_length=config.language.max_positions,
        system=config.system if system is None else system,
    )
