"""Models of recipes that begin with weights on disk: a checkpoint to go on with, or parts to put together.

Source: InternVL 2.5 (2412.05271, section 3): stage 1 puts an InternViT and a chat language model together; every later
stage goes on with the checkpoint of the one before; progressive scaling takes the encoder of a small run into a large
one. Both nodes build the model, tell its layout, and know its sizes without any weights, for `--dry-run` and `plan`.

A run keeps only what it trained. `drafted` puts that back into what the run began with, so a run folder can stand
wherever a checkpoint can: as the model of the next stage, as the source of an encoder, and for `chiasm convert`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from chiasm.checkpoint.adapters import OpenedCheckpoint, open_checkpoint
from chiasm.checkpoint.compose import VISION, Encoder, compose, open_encoder, with_encoder, with_trained
from chiasm.checkpoint.convert import ConvertReport, Target, completed, convert_draft
from chiasm.checkpoint.edit import Draft, check_apart, draft_of
from chiasm.checkpoint.preprocess import read_tile_policy
from chiasm.checkpoint.vocab import check_rows
from chiasm.data.layout import LayoutSpec
from chiasm.errors import CheckpointError, ConfigError, TemplateError, UsageError
from chiasm.model.causal import CausalVLM
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.load import config_from_public, spec_from_config
from chiasm.systems.internvl.model import build_internvl
from chiasm.systems.internvl.presets import preset
from chiasm.text.assumed import AssumedTokenizer
from chiasm.text.tokenizer import Tokenizer
from chiasm.train.run import RunFolder

__all__ = ["FromCheckpoint", "FromParts", "Source", "drafted", "encoder_of", "export_run", "is_run"]

Stored = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FromCheckpoint:
    """A model that goes on from a checkpoint folder or a run folder."""

    path: str = ""
    """InternVL checkpoint in any layout, or the folder of a run."""
    vision_from: str = ""
    """Checkpoint, InternViT alone or run whose encoder takes the place of this one's; "" keeps it."""
    preset: str = ""
    """Release whose sizes a plan takes while ``path`` is not set."""
    template: str | None = None
    """Chat template; None keeps the checkpoint's, whose config must then name one."""
    max_tiles: int | None = None
    """Most tiles of a picture; None keeps the checkpoint's."""
    max_length: int | None = None
    """Longest sample; None is the context of the language model."""
    vision_dtype: Stored = "float32"
    """In which the encoder is kept: bfloat16 where it is frozen."""
    language_dtype: Stored = "float32"
    """In which the language model is kept: bfloat16 where it is frozen (adapters beside it stay float32)."""

    def source(self) -> Source:
        """What the weights are, before training; UsageError where no path is set."""
        if not self.path:
            raise UsageError("model.path is not set: name a checkpoint or a run, --set model.path=FOLDER")
        found = drafted(self.path)
        if self.vision_from:
            found = replace(found, draft=with_encoder(found.draft, encoder_of(self.vision_from)))
        return found.with_chat(self.template, self.max_tiles)

    def encoder(self) -> Encoder:
        """The encoder that training begins with."""
        return encoder_of(self.vision_from or self.path)

    def outline(self) -> InternVLConfig:
        """The whole config; no weights are read. Without a path that of the preset."""
        if self.path:
            return self.source().config
        return _planned(self.preset, "model.path", self.template, self.max_tiles)

    def layout(self) -> LayoutSpec:
        """How the model's input is laid out; without a path, text is counted by rule."""
        if self.path:
            return self.source().layout(self.max_length)
        return _assumed(self.outline(), self.max_length)

    def build(self) -> CausalVLM:
        """Return the model with its weights."""
        return self.source().build(vision=self.vision_dtype, language=self.language_dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class FromParts:
    """A model put together of an encoder, a language model and a projector drawn anew: where stage 1 begins."""

    vision: str = ""
    """InternViT alone, InternVL checkpoint, or run (the encoder that it trained)."""
    language: str = ""
    """Language model alone, or InternVL checkpoint."""
    preset: str = ""
    """Release whose sizes a plan takes while the two are not set."""
    template: str = "internvl2_5"
    max_tiles: int = 12
    max_length: int | None = None
    downsample: float = 0.5
    seed: int = 0
    """Of the projector and of the rows of new tokens."""
    untie: bool = True
    """Whether a language model with tied words gets an output matrix of its own, as in all released sizes."""
    vision_dtype: Stored = "bfloat16"
    language_dtype: Stored = "bfloat16"

    def source(self) -> Source:
        """What the weights are, before training; UsageError where a part is not set."""
        for name in ("vision", "language"):
            if not getattr(self, name):
                raise UsageError(f"model.{name} is not set: name its folder, --set model.{name}=FOLDER")
        opened = open_checkpoint(self.language)
        draft = compose(
            encoder_of(self.vision),
            self.language,
            template=self.template,
            max_tiles=self.max_tiles,
            downsample=self.downsample,
            seed=self.seed,
            untie=self.untie,
        )
        # Its files are read as those of an original checkpoint: the language model's folder has none of pictures.
        opened = replace(
            opened, layout="original", vision=draft.vision, language=draft.language, public=draft.public
        )
        return Source(opened=opened, draft=draft)

    def encoder(self) -> Encoder:
        """The encoder that training begins with."""
        return encoder_of(self.vision)

    def outline(self) -> InternVLConfig:
        """The whole config; without both parts that of the preset."""
        if self.vision and self.language:
            return self.source().config
        return _planned(self.preset, "model.vision and model.language", self.template, self.max_tiles)

    def layout(self) -> LayoutSpec:
        """How the model's input is laid out; without both parts, text is counted by rule."""
        if self.vision and self.language:
            return self.source().layout(self.max_length)
        return _assumed(self.outline(), self.max_length)

    def build(self) -> CausalVLM:
        """Return the model; what is new in it depends on ``seed``."""
        return self.source().build(vision=self.vision_dtype, language=self.language_dtype)


NODES = {f"{node.__module__}:{node.__qualname__}": node for node in (FromCheckpoint, FromParts)}
"""As `train.recipe.resolved` names them."""


def _planned(name: str, field: str, template: str | None, max_tiles: int | None) -> InternVLConfig:
    if not name:
        raise UsageError(
            f"{field} is not set: name the folder, or a release to plan with, --set model.preset=InternVL2_5-1B"
        )
    config = preset(name)
    tiles = config.tiles if max_tiles is None else replace(config.tiles, max_tiles=max_tiles)
    return replace(config, template=template or config.template, tiles=tiles)


def _assumed(config: InternVLConfig, max_length: int | None) -> LayoutSpec:
    begins = config.language.family in ("internlm2", "internlm3", "phi3", "llama")
    tokenizer: Any = AssumedTokenizer(bos=begins)
    spec = spec_from_config(config, tokenizer, template=config.template or "internvl2_5")
    return spec if max_length is None else replace(spec, max_length=max_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Weights somewhere on disk, not yet read.

    Attributes:
        opened: the folder whose tokenizer and processor files belong to them.
        draft: configs and tensors; the tensors can be read once.
    """

    opened: OpenedCheckpoint
    draft: Draft

    def with_chat(self, template: str | None, max_tiles: int | None) -> Source:
        """Another chat template or number of tiles."""
        public = self.draft.public
        if template is not None:
            public = replace(public, template=template)
        if max_tiles is not None:
            public = replace(
                public,
                max_dynamic_patch=max_tiles,
                min_dynamic_patch=min(public.min_dynamic_patch, max_tiles),
            )
        return replace(self, draft=replace(self.draft, public=public))

    @property
    def config(self) -> InternVLConfig:
        """The whole native config."""
        public, layout = self.draft.public, self.opened.layout
        policy = read_tile_policy(self.opened.reader.folder, public, layout)  # type: ignore[arg-type]
        policy = replace(
            policy,
            image_size=public.image_size,
            min_tiles=public.min_dynamic_patch,
            max_tiles=public.max_dynamic_patch,
        )
        return config_from_public(public, policy, tie_words=self.draft.language.tie_words)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the word table."""
        return self.draft.tokenizer or Tokenizer.from_file(self.opened.reader.folder)

    def layout(self, max_length: int | None = None) -> LayoutSpec:
        """How the input is laid out; TemplateError where the config names no template."""
        config, tokenizer = self.config, self.tokenizer()
        _ = check_rows(tokenizer, config.language.vocab_size)
        if config.template is None:
            raise TemplateError(
                f"{self.opened.reader.folder} names no template: set it, --set model.template=internvl2_5"
            )
        spec = spec_from_config(config, tokenizer, template=config.template)
        return spec if max_length is None else replace(spec, max_length=max_length)

    def build(self, *, vision: Stored = "float32", language: Stored = "float32") -> CausalVLM:
        """The model on the CPU; the projector is always float32, and so are parts of which a dtype is not given."""
        with torch.device("meta"):
            model = build_internvl(self.config)
        kinds = {VISION: getattr(torch, vision), "embedder.connect.": torch.float32}
        other = getattr(torch, language)
        tied = model.head.weight is model.embedder.words.weight  # type: ignore[union-attr]
        with self.opened.reader:
            state = {
                name: tensor.to(next((kind for part, kind in kinds.items() if name.startswith(part)), other))
                for name, tensor in self.draft.tensors
            }
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        if tied:
            model.head.weight = model.embedder.words.weight  # type: ignore[union-attr]
        missing = [name for name in missing if not (tied and name == "head.weight")]
        if missing or unexpected:
            raise CheckpointError(
                f"{self.opened.reader.folder} does not fit the model: missing {missing[:3]}, unexpected "
                f"{unexpected[:3]}"
            )
        model.head.used = check_rows(self.tokenizer(), self.draft.language.vocab_size)  # type: ignore[assignment]
        return model.requires_grad_(True)


# Runs ------------------------------------------------------------------------------------------------------------


def is_run(path: str | Path) -> bool:
    """Whether this is the folder of a training run."""
    return (Path(path) / "run.json").is_file()


def drafted(path: str | Path) -> Source:
    """A checkpoint folder as it is, or a run's model after its last checkpoint.

    Raises:
        CheckpointError: the folder is neither, or damaged.
        UsageError: the run began with no checkpoint.
    """
    if not is_run(path):
        opened = open_checkpoint(path)
        if opened.public is None:
            raise UsageError(
                f"{path} is a language model alone: an InternVL checkpoint is needed (or put parts together, FromParts)"
            )
        opened.adapter.check(opened.reader)
        return Source(opened=opened, draft=draft_of(opened, completed(opened, opened.public, None)))
    run = RunFolder.open(path)
    found = _node(run).source()
    checkpoint = run.load()
    weights = {
        name: tensor for name, tensor in checkpoint.weights.items() if not name.startswith("objective.")
    }
    return replace(found, draft=with_trained(found.draft, weights, scales=_scales(run.info["recipe"])))


def _node(run: RunFolder) -> FromCheckpoint | FromParts:
    """The model node of a run, as it was when the run began."""
    said = dict(run.info["recipe"]["model"])
    kind = said.pop("type", "")
    if kind not in NODES:
        name = kind.rpartition(":")[2] or "unknown"
        raise UsageError(
            f"{run.path} trained a {name}, which began with no checkpoint: it cannot be put back into one "
            "(a run of internvl/mini_sft is written with --to bundle)"
        )
    return NODES[kind](**said)


def _scales(recipe: Mapping[str, Any]) -> dict[str, float]:
    """Alpha / rank of the adapters of a resolved recipe, by the part of the model that they are on."""
    out = {}
    for field, prefix in (("lora", "trunk."), ("vision_lora", VISION)):
        said = recipe.get(field) or {}
        rank, alpha = said.get("rank") or 0, said.get("alpha")
        if rank:
            out[prefix] = 2.0 if alpha is None else alpha / rank
    return out


def encoder_of(source: str | Path) -> Encoder:
    """The encoder of a run after its last checkpoint, of an InternVL checkpoint, or an InternViT alone.

    Raises:
        CheckpointError: there is none in this folder, or it is damaged.
        ConfigError: the run's recipe does not say how large its encoder is.
    """
    if not is_run(source):
        return open_encoder(source)
    run = RunFolder.open(source)
    recipe = run.info["recipe"]
    if recipe["model"].get("type") in NODES:
        draft = drafted(source).draft
        base, tensors = _node(run).encoder(), lambda: _only_vision(drafted(source).draft)
        return replace(base, config=draft.vision, tensors=tensors, where=str(source))
    said = _find(recipe["model"], f"{InternViTConfig.__module__}:{InternViTConfig.__qualname__}")
    if said is None:
        raise ConfigError(
            f"{source}: its recipe does not say how large its encoder is: name a checkpoint instead"
        )
    config = InternViTConfig(**{name: value for name, value in said.items() if name != "type"})
    weights = run.load().weights
    own = {name: t for name, t in weights.items() if name.startswith(VISION)}
    own = own or {f"embedder.{name}": t for name, t in weights.items() if name.startswith("vision.")}
    if not own:
        raise CheckpointError(f"{source} trained no encoder: name a run that did, or a checkpoint")
    return Encoder(
        config=config,
        public=config.to_public("original"),
        tensors=lambda: iter(own.items()),
        where=str(source),
    )


def _only_vision(draft: Draft) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in draft.tensors if name.startswith(VISION))


def _find(tree: Any, kind: str) -> dict[str, Any] | None:
    """The first node of a resolved tree that is of this type."""
    if isinstance(tree, dict):
        if tree.get("type") == kind:
            return tree
        return next((found for value in tree.values() if (found := _find(value, kind))), None)
    return None


def export_run(
    src: str | Path,
    dst: str | Path,
    to: Target,
    *,
    force: bool = False,
    verify: Callable[[Path], None] | None = None,
) -> ConvertReport:
    """Write the model of a run, after its last checkpoint, as a checkpoint of a public layout.

    Weights are those that the run began with, in the dtype in which they are stored there; what was trained takes
    their place, rounded to that dtype; adapters are merged. Tokenizer and processor files come along.

    Raises:
        UsageError: the run began with no checkpoint, or ``dst`` lies in what it began with.
        CheckpointError, ConfigError: as of `chiasm.checkpoint.convert.convert`.
    """
    check_apart(Path(src), Path(dst))
    found = drafted(src)
    report = convert_draft(found.opened, found.draft, dst, to, force=force, verify=verify)
    step = RunFolder.open(src).checkpoints()[-1]
    note = f"the model of the run {Path(src).resolve().name} after {step:,} steps"
    return replace(report, source="run", notes=(note, *report.notes))
