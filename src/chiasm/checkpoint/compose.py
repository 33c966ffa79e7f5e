"""A whole InternVL out of parts: an encoder from one folder, a language model from another, a projector drawn anew.

Source: InternVL 2.5 (2412.05271, section 3): stage 1 begins with a pre-trained InternViT, a chat language model and a
random projector; progressive scaling hands the encoder of a small model to a large one. The nine special tokens and
their rows are those of the training script (`chiasm.checkpoint.vocab`).

Legend: V rows of the vocabulary, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiasm.checkpoint.adapters import Entry, TableAdapter, adapter_for, entries, open_checkpoint
from chiasm.checkpoint.config import InternVLPublicConfig
from chiasm.checkpoint.edit import Draft, drawn_projector
from chiasm.checkpoint.store import CheckpointReader
from chiasm.checkpoint.vocab import add_special_tokens
from chiasm.errors import CheckpointError, ConfigError
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.text.templates import get_template
from chiasm.text.tokenizer import Tokenizer

__all__ = ["VISION", "Encoder", "compose", "open_encoder", "trained_tensors", "with_encoder", "with_trained"]

VISION = "embedder.vision."
_WORDS, _HEAD = "embedder.words.weight", "head.weight"
_ALONE = ("InternVisionModel", "intern_vit_6b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """An InternViT somewhere on disk.

    Attributes:
        config: its shape.
        public: the same as an original ``vision_config``.
        tensors: yields (native name with its prefix `VISION`, tensor); may be called several times.
        where: folder, for messages.
    """

    config: InternViTConfig
    public: dict[str, Any]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    where: str


def open_encoder(folder: str | Path) -> Encoder:
    """The encoder of an InternVL checkpoint, or an `InternVisionModel` alone (as released, or as `extract` writes it).

    Raises:
        CheckpointError: the folder holds neither, or its tensors do not fit its config.
        ConfigError: the encoder is no InternViT.
    """
    folder = Path(folder)
    with CheckpointReader(folder) as reader:
        config = reader.config
    if "vision_config" in config:
        opened = open_checkpoint(folder)
        if opened.vision is None or opened.public is None:
            raise CheckpointError(
                f"{folder} has no encoder: name an InternVL checkpoint or an InternViT alone"
            )
        opened.adapter.check(opened.reader)
        adapter, public, vision = opened.adapter, dict(opened.public.vision), opened.vision
    elif config.get("model_type") in _ALONE or _ALONE[0] in (config.get("architectures") or ()):
        vision = InternViTConfig.from_public(config, "original")
        adapter, public = _alone(vision), {**vision.to_public("original")}
        with CheckpointReader(folder) as reader:
            adapter.check(reader)
    else:
        raise CheckpointError(
            f"{folder} is neither an InternVL checkpoint nor an InternViT alone (model_type "
            f"{config.get('model_type')!r})"
        )

    def tensors() -> Iterator[tuple[str, Tensor]]:
        with (
            open_checkpoint(folder).reader
            if "vision_config" in config
            else CheckpointReader(folder) as reader
        ):
            for entry in adapter.plan:
                if entry.native.startswith(VISION):
                    yield entry.native, adapter.read(reader, entry)

    return Encoder(config=vision, public=public, tensors=tensors, where=str(folder))


def _alone(vision: InternViTConfig) -> TableAdapter:
    """The adapter of an encoder alone: the original names without ``vision_model.``."""
    # Any decoder will do: its entries are left out, and an encoder's names do not depend on it.
    words = LanguageConfig(
        family="qwen2",
        vocab_size=1,
        hidden_size=2,
        intermediate_size=1,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=2,
        qkv_bias=True,
    )
    whole = adapter_for("original", language=words, vision=vision)
    plan = tuple(entry for entry in entries(language=words, vision=vision) if entry.native.startswith(VISION))
    return replace(
        whole,
        plan=plan,
        spell=lambda name: tuple(found.removeprefix("vision_model.") for found in whole.spell(name)),
    )


def compose(
    encoder: Encoder,
    language: str | Path,
    *,
    template: str = "internvl2_5",
    max_tiles: int = 12,
    downsample: float = 0.5,
    seed: int = 0,
    untie: bool = True,
) -> Draft:
    """A model of an encoder, a language model and a projector drawn anew.

    Args:
        encoder: its eyes.
        language: folder of a language model alone, or of an InternVL checkpoint whose language model is taken.
        template: chat template; its stop must be a token.
        max_tiles: most tiles of a picture, for the config.
        downsample: side of the token grid over side of the patch grid.
        seed: of the projector and of new rows.
        untie: give a language model with tied words an output matrix of its own, at first a copy (the release does so
            in all sizes: its config has ``tie_word_embeddings`` false).

    Raises:
        CheckpointError, ConfigError: a part cannot be read.
        TemplateError: answers could never end: the template's stop is no token of the tokenizer.
    """
    opened = open_checkpoint(language)
    opened.adapter.check(opened.reader)
    tokenizer = Tokenizer.from_file(language)
    named = {entry.native: entry for entry in opened.adapter.plan}
    words = opened.adapter.read(opened.reader, named[_WORDS])
    head = opened.adapter.read(opened.reader, named[_HEAD]) if _HEAD in named else None
    if head is None and untie:
        head = words.clone()
    grown = add_special_tokens(tokenizer, words, head, generator=torch.Generator().manual_seed(seed))
    _ = get_template(template).stop_ids(tokenizer)
    tied = opened.language.tie_words and not untie
    decoder = replace(opened.language, vocab_size=grown.words_VC.shape[0], tie_words=tied)
    stored = str(words.dtype).removeprefix("torch.")
    llm = opened.reader.config if opened.public is None else opened.public.to_original()["llm_config"]
    public = InternVLPublicConfig.from_original(
        {
            "architectures": ["InternVLChatModel"],
            "model_type": "internvl_chat",
            "downsample_ratio": downsample,
            "ps_version": "v2",
            "select_layer": -1,
            "force_image_size": encoder.config.image_size,
            "dynamic_image_size": True,
            "use_thumbnail": True,
            "min_dynamic_patch": 1,
            "max_dynamic_patch": max_tiles,
            "pad2square": False,
            "template": template,
            "torch_dtype": stored,
            "vision_config": encoder.public,
            "llm_config": {**llm, "vocab_size": decoder.vocab_size, "tie_word_embeddings": tied},
        }
    )
    public = replace(
        public, tie_words=decoder.tie_words, image_token_id=tokenizer.token_to_id("<IMG_CONTEXT>")
    )
    inputs = encoder.config.hidden_size * round(1 / downsample) ** 2

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from encoder.tensors()
        drawn = drawn_projector(inputs, decoder.hidden_size, words.dtype, seed)
        yield "embedder.connect.norm.weight", torch.ones(inputs, dtype=words.dtype)
        yield "embedder.connect.norm.bias", torch.zeros(inputs, dtype=words.dtype)
        yield from drawn.items()
        yield _WORDS, grown.words_VC
        with opened.reader:
            for entry in opened.adapter.plan:
                if entry.native.startswith("trunk."):
                    yield entry.native, opened.adapter.read(opened.reader, entry)
        if grown.head_VC is not None:
            yield _HEAD, grown.head_VC

    return Draft(
        public=public, language=decoder, vision=encoder.config, tensors=tensors(), tokenizer=tokenizer
    )


def with_encoder(draft: Draft, encoder: Encoder) -> Draft:
    """The same model with the weights of another encoder of the same shape.

    Raises:
        ConfigError: the shapes differ.
    """
    same = replace(
        encoder.config, drop_path=draft.vision.drop_path, layer_scale_init=draft.vision.layer_scale_init
    )
    if same != draft.vision:
        raise ConfigError(
            f"the encoder of {encoder.where} ({_size(encoder.config)}) does not fit the model's ({_size(draft.vision)})"
        )

    def tensors() -> Iterator[tuple[str, Tensor]]:
        kinds: dict[str, torch.dtype] = {}
        for name, tensor in draft.tensors:
            if name.startswith(VISION):
                kinds[name] = tensor.dtype
            else:
                yield name, tensor
        for name, tensor in encoder.tensors():
            yield name, tensor.to(kinds[name])

    return replace(draft, tensors=tensors())


def _size(c: InternViTConfig) -> str:
    return f"{c.layers} layers of {c.hidden_size}, tiles of {c.image_size} in patches of {c.patch_size}"


def with_trained(draft: Draft, weights: Mapping[str, Tensor], *, scales: Mapping[str, float]) -> Draft:
    """The model after training: trained tensors in place of its own, adapters merged; see `trained_tensors`."""
    plan = entries(
        language=draft.language, vision=draft.vision, downsample_ratio=draft.public.downsample_ratio
    )
    return replace(draft, tensors=trained_tensors(draft.tensors, plan, weights, scales=scales))


def trained_tensors(
    tensors: Iterator[tuple[str, Tensor]],
    parameters: Iterable[Entry],
    weights: Mapping[str, Tensor],
    *,
    scales: Mapping[str, float],
) -> Iterator[tuple[str, Tensor]]:
    """Trained tensors in the place of those that training began with, adapters merged (summed in fp32, rounded once).

    Args:
        tensors: native tensors that training began with.
        parameters: those of the model.
        weights: native name -> tensor; ``….lora_A`` and ``….lora_B`` beside the layer that they adapt.
        scales: alpha / rank of the adapters below ``trunk.`` and ``embedder.vision.``.

    Raises:
        CheckpointError: a weight has no place in the model or another shape.
    """
    plan = {entry.native: entry for entry in parameters}
    pairs = {name.removesuffix(".lora_A") for name in weights if name.endswith(".lora_A")}
    direct = {name for name in weights if not name.endswith((".lora_A", ".lora_B"))}
    if _HEAD in direct and _HEAD not in plan:  # tied words: one parameter under the word table's name
        direct.discard(_HEAD)
    for name in (*sorted(direct), *(f"{path}.weight" for path in sorted(pairs))):
        if name not in plan:
            raise CheckpointError(f"the trained weight {name} has no place in the model: is this its run?")
        if name in direct and tuple(weights[name].shape) != plan[name].shape:
            raise CheckpointError(
                f"the trained weight {name} is {tuple(weights[name].shape)}, the model has {plan[name].shape}"
            )

    def merged() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            path = name.removesuffix(".weight")
            if name in direct:
                tensor = weights[name].to(tensor.dtype)
            if path in pairs and name.endswith(".weight"):
                a, b = (weights[f"{path}.lora_{side}"].float() for side in "AB")
                scale = next(value for prefix, value in scales.items() if name.startswith(prefix))
                rank = b.shape[1]
                rows = plan[name].rows if a.shape[0] > rank else plan[name].shape[:1]
                delta = torch.cat([y @ x for x, y in zip(a.split(rank), b.split(list(rows)), strict=True)])
                tensor = (tensor.float() + scale * delta).to(tensor.dtype)
            yield name, tensor

    return merged()
