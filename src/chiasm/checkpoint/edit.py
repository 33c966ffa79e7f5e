"""Change a checkpoint on its way from one file to another: tile size, vocabulary, language model; or take a part.

Source: the tools of the release (InternVL 2.5, arXiv 2412.05271: extraction of encoder and projector, replacing the
language model, resizing positions) and its training script (special tokens, rows of new tokens). Tensors stream: an
edit holds the one that it changes, and those that are not touched keep every bit.

A `Draft` is a model between reading and writing: its configs, and its native tensors in the order of
`chiasm.checkpoint.adapters.entries`. Each edit takes one and returns another.
Legend: V rows (vocabulary), C width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from chiasm.checkpoint.adapters import OpenedCheckpoint, TableAdapter, adapter_for, open_checkpoint
from chiasm.checkpoint.config import InternVLPublicConfig
from chiasm.checkpoint.store import Written, write_checkpoint
from chiasm.checkpoint.vocab import add_special_tokens, resize_rows
from chiasm.errors import ConfigError, UsageError
from chiasm.nn.vit import resize_positions
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.text.templates import get_template
from chiasm.text.tokenizer import Tokenizer

__all__ = [
    "Draft",
    "Part",
    "check_apart",
    "draft_of",
    "drawn_projector",
    "extract",
    "with_image_size",
    "with_language",
    "with_vocabulary",
]

Part = Literal["vision", "projector", "language"]

_POSITIONS = "embedder.vision.position_embedding"
_WORDS, _HEAD = "embedder.words.weight", "head.weight"
_VISION_AUTO_MAP = {
    "AutoConfig": "configuration_intern_vit.InternVisionConfig",
    "AutoModel": "modeling_intern_vit.InternVisionModel",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A model between reading and writing.

    Attributes:
        public: the whole public config.
        language, vision: the parts' own configs, in agreement with it and with the tensors.
        tensors: native (name, tensor), read once.
        tokenizer: what replaces the source's tokenizer files; None where those stay.
        notes: what the user should know, one sentence each.
    """

    public: InternVLPublicConfig
    language: LanguageConfig
    vision: InternViTConfig
    tensors: Iterator[tuple[str, Tensor]]
    tokenizer: Tokenizer | None = None
    notes: tuple[str, ...] = ()


def check_apart(src: Path, dst: Path) -> None:
    """Raise UsageError where ``dst`` is ``src``, holds it or lies in it."""
    here, there = src.resolve(), dst.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UsageError(f"{dst} is, holds or lies in the source {src}: write to a folder of its own")


def draft_of(opened: OpenedCheckpoint, public: InternVLPublicConfig | None = None) -> Draft:
    """A draft that changes nothing.

    Args:
        opened: the source; its reader must stay open until the draft is written.
        public: its config where more is known than the file says.

    Raises:
        UsageError: the source is a language model alone.
    """
    public = public or opened.public
    if public is None or opened.vision is None:
        raise UsageError(
            f"{opened.reader.folder} is a language model alone: an InternVL checkpoint is needed"
        )
    tensors = opened.adapter.from_public(opened.reader)
    return Draft(public=public, language=opened.language, vision=opened.vision, tensors=tensors)


def with_image_size(draft: Draft, side: int) -> Draft:
    """Tiles of another side: the positions are resampled (bicubic, in fp32) to its patch grid, for good.

    Without this the encoder resamples them in every forward pass; the results are equal but for one rounding.

    Raises:
        ConfigError: the tile is not made of whole patches, or its grid is not made of whole tokens.
    """
    old = draft.vision
    patches, s = side / old.patch_size, draft.public.downsample_ratio
    if side < 1 or patches != int(patches) or patches * s != int(patches * s):
        step = old.patch_size * round(1 / s)
        raise ConfigError(
            f"image size {side} is not a multiple of {step}, the pixels of one token: use for instance "
            f"{max(step, side // step * step)}"
        )
    vision = replace(old, image_size=side)
    public = replace(draft.public, vision={**draft.public.vision, "image_size": side}, force_image_size=side)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in draft.tensors:
            if name == _POSITIONS:
                tensor = resize_positions(tensor, (old.grid, old.grid), (vision.grid, vision.grid))
            yield name, tensor

    return replace(draft, vision=vision, public=public, tensors=tensors())


def with_vocabulary(draft: Draft, rows: int, *, needed: int = 0, seed: int = 0) -> Draft:
    """A word table (and output matrix) of another number of rows.

    New rows of the word table are drawn from Normal(0, 0.02), those of the output matrix are the mean of the old
    ones, as in the training script; of tied words the mean, because there the output's rule comes last.

    Args:
        draft: the model.
        rows: the wanted number.
        needed: fewest rows that its tokenizer allows.
        seed: of the drawn rows.

    Raises:
        ConfigError: ``rows`` is not positive, or less than ``needed``.
    """
    if rows < max(needed, 1):
        raise ConfigError(
            f"a vocabulary of {rows} rows is too small: the tokenizer has ids up to {needed - 1}"
        )
    old, tied = draft.language.vocab_size, draft.language.tie_words
    generator = torch.Generator().manual_seed(seed)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in draft.tensors:
            if name in (_WORDS, _HEAD) and rows != old:
                resized = resize_rows(tensor, rows, generator=generator)
                if rows > old and (name == _HEAD or tied):
                    resized[old:] = tensor.mean(dim=0, dtype=torch.float32).to(tensor.dtype)
                tensor = resized
            yield name, tensor

    return replace(
        draft,
        language=replace(draft.language, vocab_size=rows),
        public=replace(draft.public, llm={**draft.public.llm, "vocab_size": rows}),
        tensors=tensors(),
    )


def with_language(draft: Draft, folder: str | Path, *, template: str | None = None, seed: int = 0) -> Draft:
    """Another language model behind the same eyes.

    The encoder stays. So does the projector where the widths agree; else its norm stays, which belongs to the
    encoder, and its two layers are drawn anew, to be trained. The nine special tokens are added to the language
    model's tokenizer, and rows for them to its matrices, as the training script does.

    Args:
        draft: the model.
        folder: a language model alone, with its ``tokenizer.json``.
        template: chat template; None keeps the source's.
        seed: of drawn layers and rows.

    Raises:
        UsageError: ``folder`` is not a language model alone.
        TemplateError: answers could never end: the template's stop is no token of the new tokenizer.
        CheckpointError, ConfigError: the language model cannot be read.
    """
    opened = open_checkpoint(folder)
    if opened.layout != "text":
        raise UsageError(f"{folder} is a whole InternVL model: give a language model alone")
    tokenizer = Tokenizer.from_file(folder)
    name = template or draft.public.template or "internvl2_5"
    _ = get_template(name).stop_ids(tokenizer)
    opened.adapter.check(opened.reader)
    named = {entry.native: entry for entry in opened.adapter.plan}
    words = opened.adapter.read(opened.reader, named[_WORDS])
    head = opened.adapter.read(opened.reader, named[_HEAD]) if _HEAD in named else None
    grown = add_special_tokens(tokenizer, words, head, generator=torch.Generator().manual_seed(seed))
    language = replace(opened.language, vocab_size=grown.words_VC.shape[0])
    old, new = draft.language.hidden_size, language.hidden_size
    notes = () if old == new else (f"the projector was drawn anew ({old} -> {new} wide): train it",)
    stated, found = draft.public.dtype, str(words.dtype).removeprefix("torch.")
    if stated and stated != found:
        notes += (f"the language model stays in {found}, the encoder in {stated}: load it with one dtype",)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        drawn = None
        for native, tensor in draft.tensors:
            if not native.startswith(("embedder.vision.", "embedder.connect.")):
                continue
            if old != new and native.startswith(("embedder.connect.fc1.", "embedder.connect.fc2.")):
                drawn = drawn or drawn_projector(_stacked(draft), new, tensor.dtype, seed)
                tensor = drawn[native]
            yield native, tensor
        yield _WORDS, grown.words_VC
        with opened.reader:
            for entry in opened.adapter.plan:
                if entry.native not in (_WORDS, _HEAD):
                    yield entry.native, opened.adapter.read(opened.reader, entry)
        if grown.head_VC is not None:
            yield _HEAD, grown.head_VC

    return replace(
        draft,
        language=language,
        public=replace(
            draft.public.with_llm(opened.reader.config, vocab_size=language.vocab_size),
            template=name,
            tie_words=language.tie_words,
            image_token_id=tokenizer.token_to_id("<IMG_CONTEXT>"),
        ),
        tensors=tensors(),
        tokenizer=tokenizer,
        notes=(*draft.notes, *notes),
    )


def _stacked(draft: Draft) -> int:
    """Width of a token after unshuffling."""
    return draft.vision.hidden_size * round(1 / draft.public.downsample_ratio) ** 2


def drawn_projector(inputs: int, width: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """The projector's two layers with the initialisation of `nn.Linear`, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, fan in (("fc1", inputs), ("fc2", width)):
        weight, bias, bound = torch.empty(width, fan), torch.empty(width), 1 / math.sqrt(fan)
        nn.init.uniform_(weight, -bound, bound, generator=generator)
        nn.init.uniform_(bias, -bound, bound, generator=generator)
        out |= {f"embedder.connect.{name}.weight": weight, f"embedder.connect.{name}.bias": bias}
    return {name: tensor.to(dtype) for name, tensor in out.items()}


def extract(
    src: str | Path,
    dst: str | Path,
    part: Part,
    *,
    files: Mapping[str, str | bytes | Path] | None = None,
    force: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> Written:
    """Write one part of an InternVL checkpoint as a folder of its own.

    ``vision``: an `InternVisionModel` as released. ``projector``: the state of ``mlp1`` (``0.weight`` to ``3.bias``).
    ``language``: a language model alone in its family's own layout, which transformers reads (InternLM2 and its kind
    excepted, which need their remote code).

    Args:
        src: the checkpoint. dst: the folder to write; it appears whole or not at all.
        part: which.
        files: further files by name (a tokenizer's).
        force: replace ``dst`` if it is a checkpoint folder.
        max_shard_bytes: a weight file is closed before it would grow beyond this.

    Raises:
        UsageError: the part is unknown, or ``src`` is a language model alone.
        CheckpointError: ``src`` cannot be read or ``dst`` cannot be written.
    """
    if part not in get_args(Part):
        raise UsageError(f"unknown part {part!r}: extract one of {', '.join(get_args(Part))}")
    check_apart(Path(src), Path(dst))
    opened = open_checkpoint(src)
    with opened.reader:
        draft = draft_of(opened)
        opened.adapter.check(opened.reader)
        adapter, config = _PARTS[part](draft)
        wanted = {entry.native: entry for entry in adapter.plan}
        tensors = (
            (entry.native, opened.adapter.read(opened.reader, entry))
            for entry in opened.adapter.plan
            if entry.native in wanted
        )
        return write_checkpoint(
            dst,
            adapter.to_public(tensors),
            config,
            max_shard_bytes=max_shard_bytes,
            files=files,
            force=force,
        )


def _vision_alone(draft: Draft) -> tuple[TableAdapter, dict[str, Any]]:
    extras = draft.public.original_extras.get("vision_config", {})
    config = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "auto_map": _VISION_AUTO_MAP,
        **draft.public.vision,
        **copy.deepcopy(extras),
    }
    return _part_adapter(draft, "embedder.vision.", "vision_model."), _with_dtype(config, draft)


def _projector_alone(draft: Draft) -> tuple[TableAdapter, dict[str, Any]]:
    config = {
        "model_type": "internvl_mlp1",
        "vision_hidden_size": draft.vision.hidden_size,
        "downsample_ratio": draft.public.downsample_ratio,
        "llm_hidden_size": draft.language.hidden_size,
    }
    return _part_adapter(draft, "embedder.connect.", "mlp1."), _with_dtype(config, draft)


def _language_alone(draft: Draft) -> tuple[TableAdapter, dict[str, Any]]:
    config = {**draft.public.to_original()["llm_config"], "tie_word_embeddings": draft.language.tie_words}
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("type") == "su":
        config["rope_scaling"] = {
            **scaling,
            "type": "longrope",
        }  # its later name, the only one that all releases read
    return adapter_for("text", language=draft.language), _with_dtype(config, draft)


_PARTS = {"vision": _vision_alone, "projector": _projector_alone, "language": _language_alone}


def _part_adapter(draft: Draft, native: str, public: str) -> TableAdapter:
    """The original layout of the parameters below ``native``, without its prefix ``public``."""
    whole = adapter_for(
        "original",
        language=draft.language,
        vision=draft.vision,
        downsample_ratio=draft.public.downsample_ratio,
    )
    return replace(
        whole,
        plan=tuple(entry for entry in whole.plan if entry.native.startswith(native)),
        spell=lambda name: tuple(found.removeprefix(public) for found in whole.spell(name)),
    )


def _with_dtype(config: dict[str, Any], draft: Draft) -> dict[str, Any]:
    return config if draft.public.dtype is None else {**config, "torch_dtype": draft.public.dtype}
