"""From a checkpoint folder to a model that answers: both InternVL layouts, and language models alone.

Source: fact sheet InternVL 2.5, sections 2.5 to 2.9. Tensors go straight from the mapped files into a model that was
built on the meta device, so loading needs the memory of the weights and little more.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from chiasm.checkpoint.adapters import OpenedCheckpoint, load_into, open_checkpoint
from chiasm.checkpoint.config import InternVLPublicConfig
from chiasm.checkpoint.preprocess import read_tile_policy
from chiasm.checkpoint.store import CONFIG
from chiasm.checkpoint.vocab import check_rows
from chiasm.data.layout import LayoutSpec
from chiasm.errors import ConfigError, TemplateError
from chiasm.media.tiles import TilePolicy
from chiasm.model.causal import CausalVLM
from chiasm.model.chat import ChatModel
from chiasm.model.placement import Placement, place
from chiasm.model.quantize import Quantization, Rounding
from chiasm.parts.language.config import LanguageConfig
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.model import build_internvl, build_language_model
from chiasm.text.templates import get_template
from chiasm.text.tokenizer import Tokenizer

_log = logging.getLogger("chiasm.load")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: str | torch.dtype | None, stored: str | None = None) -> torch.dtype:
    """What to compute in: the caller's wish, else what the checkpoint was saved in, else float32.

    Raises ConfigError for a name that is not one of float32, bfloat16, float16, auto.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype if dtype not in (None, "auto") else stored or "float32"
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not known: use {', '.join(DTYPES)} or auto")
    return DTYPES[name]


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself. Before Ampere (8.0), NVIDIA's GPUs at most imitate it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


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
        _only_words(model, found.used)
        how = None if quantize is None else Quantization.parse(quantize)
        rounding = None if how is None else Rounding(model, how)
        chosen = resolve_dtype(dtype, found.dtype)
        several = () if isinstance(device, str | torch.device) else tuple(device)
        where: Any = several[0] if several else torch.device(device)  # type: ignore[arg-type]
        if dtype in (None, "auto") and chosen == torch.bfloat16:
            unable = [d for d in several or (where,) if not has_bfloat16(d)]
            if unable:
                _log.info("computing in float16: %s has no bfloat16", unable[0])
                chosen = torch.float16
        if len(several) > 1:
            where = Placement(model, several, chosen, weight_bytes=how.weight_bytes if how else None)
            place(model, where)
        load_into(
            model,
            opened.reader,
            opened.adapter,
            dtype=chosen,
            device=where,
            loaded=None if rounding is None else rounding.layer,
        )
        if rounding is not None:
            rounding.finish()
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


def _only_words(model: CausalVLM, used: int) -> None:
    """Keep the padding rows after the tokenizer's `used` ids from being written."""
    model.head.used = used  # type: ignore[assignment]
