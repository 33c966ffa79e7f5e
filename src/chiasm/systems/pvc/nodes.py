"""Models of PVC's recipes: an InternVL that is made a PVC on the way, a PVC folder, or a run to go on with.

Source: PVC (2412.09613): initialised from InternVL2; fact sheet, sections 2.2 and 4. A run keeps only what it trained;
what it began with is read again where it is needed (`opened_source`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from chiasm.checkpoint.adapters import Entry, OpenedCheckpoint, adapter_for, open_checkpoint
from chiasm.checkpoint.compose import trained_tensors
from chiasm.checkpoint.config import InternVLPublicConfig
from chiasm.checkpoint.convert import ConvertReport, companion_files, completed
from chiasm.checkpoint.edit import check_apart, draft_of
from chiasm.checkpoint.preprocess import read_tile_policy
from chiasm.checkpoint.store import CONFIG, read_json
from chiasm.checkpoint.vocab import check_rows
from chiasm.data.layout import LayoutSpec
from chiasm.errors import CheckpointError, TemplateError, UsageError
from chiasm.model.causal import CausalVLM
from chiasm.systems.pvc.config import PVCConfig
from chiasm.systems.pvc.convert import (
    PVCOptions,
    config_of,
    is_pvc,
    new_entries,
    open_pvc,
    retrofitted,
    write_pvc,
)
from chiasm.systems.pvc.load import spec_of
from chiasm.systems.pvc.model import build_pvc
from chiasm.systems.pvc.presets import preset
from chiasm.text.assumed import AssumedTokenizer
from chiasm.text.tokenizer import Tokenizer
from chiasm.train.run import RunFolder

__all__ = ["OLD_VISION", "PVCModel", "PVCSource", "export_run", "opened_source"]

Stored = Literal["float32", "bfloat16"]

OLD_VISION = (
    "embedder.vision.class_embedding",
    "embedder.vision.patch_embedding.*",
    "embedder.vision.position_embedding",
    "embedder.vision.layers.*.norm1.*",
    "embedder.vision.layers.*.attn.*",
    "embedder.vision.layers.*.ls1",
    "embedder.vision.layers.*.norm2.*",
    "embedder.vision.layers.*.mlp.*",
    "embedder.vision.layers.*.ls2",
)
"""What the encoder has of its InternViT, for ``Optim.freeze``: all else in it is new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PVCSource:
    """The weights of a PVC somewhere on disk, not yet read.

    Attributes:
        opened: the folder whose tokenizer and processor files belong to them.
        config: the model. public: what is noted of the InternVL in it.
        read: begins to read the native tensors; each reading is a new one.
    """

    opened: OpenedCheckpoint
    config: PVCConfig
    public: InternVLPublicConfig
    read: Callable[[], Iterator[tuple[str, Tensor]]]

    @property
    def parameters(self) -> tuple[Entry, ...]:
        """Of the model."""
        base = adapter_for(
            "original",
            language=self.config.language,
            vision=self.config.vision,
            downsample_ratio=self.config.downsample,
        )
        return (*base.plan, *new_entries(self.config))

    def with_chat(self, template: str | None, max_tiles: int | None) -> PVCSource:
        """Another chat template or number of tiles."""
        public, config = self.public, self.config
        if template is not None:
            public, config = replace(public, template=template), replace(config, template=template)
        if max_tiles is not None:
            low = min(public.min_dynamic_patch, max_tiles)
            public = replace(public, max_dynamic_patch=max_tiles, min_dynamic_patch=low)
            config = replace(config, tiles=replace(config.tiles, max_tiles=max_tiles, min_tiles=low))
        return replace(self, public=public, config=config)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the word table."""
        return Tokenizer.from_file(self.opened.reader.folder)

    def layout(self, max_length: int | None = None) -> LayoutSpec:
        """How the input is laid out; TemplateError where the config names no template."""
        if self.config.template is None:
            raise TemplateError(
                f"{self.opened.reader.folder} names no template: set it, --set model.template=internvl2_5"
            )
        spec = spec_of(self.config, self.tokenizer(), template=self.config.template)
        return spec if max_length is None else replace(spec, max_length=max_length)

    def build(self, *, vision: Stored = "float32", language: Stored = "float32") -> CausalVLM:
        """The model on the CPU. What is new in it and the projector are float32, the rest as asked for."""
        with torch.device("meta"):
            model = build_pvc(self.config)
        new = {entry.native for entry in new_entries(self.config)}

        def kind(name: str) -> torch.dtype:
            if name in new or name.startswith("embedder.connect."):
                return torch.float32
            return getattr(torch, vision if name.startswith("embedder.vision.") else language)

        tied = model.head.weight is model.embedder.words.weight  # type: ignore[union-attr]
        with self.opened.reader:
            state = {name: tensor.to(kind(name)) for name, tensor in self.read()}
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        if tied:
            model.head.weight = model.embedder.words.weight  # type: ignore[union-attr]
        missing = [name for name in missing if not (tied and name == "head.weight")]
        if missing or unexpected:
            raise CheckpointError(
                f"{self.opened.reader.folder} does not fit the model: missing {missing[:3]}, unexpected "
                f"{unexpected[:3]}"
            )
        model.head.used = check_rows(self.tokenizer(), self.config.language.vocab_size)  # type: ignore[assignment]
        return model.requires_grad_(True)


@dataclass(frozen=True, slots=True, kw_only=True)
class PVCModel:
    """A PVC that goes on from what is on disk."""

    path: str = ""
    """InternVL checkpoint in any layout (made a PVC by ``options``), PVC folder, or the folder of a run."""
    options: PVCOptions = field(default_factory=PVCOptions)
    """What a PVC has beyond its InternVL; as they are here where ``path`` is a PVC already, which has its own."""
    preset: str = ""
    """Release whose sizes are counted while ``path`` is not set."""
    template: str | None = None
    """Chat template; None keeps the checkpoint's, whose config must then name one."""
    max_tiles: int | None = None
    """Most tiles of a picture; None keeps the checkpoint's."""
    max_length: int | None = None
    """Longest sample; None is the context of the language model."""
    vision_dtype: Stored = "float32"
    """In which the encoder's old layers are kept: bfloat16 where they are frozen. What is new stays float32."""
    language_dtype: Stored = "float32"
    """In which the language model is kept: bfloat16 where it is frozen."""

    def source(self) -> PVCSource:
        """What the weights are, before training; UsageError where no path is set."""
        if not self.path:
            raise UsageError("model.path is not set: name a checkpoint or a run, --set model.path=FOLDER")
        return opened_source(self.path, self.options).with_chat(self.template, self.max_tiles)

    def sizes(self) -> PVCConfig:
        """The whole config; no weights are read. Without a path that of the preset."""
        if self.path:
            return self.source().config
        if not self.preset:
            raise UsageError(
                "model.path is not set: name the folder, or a release to count, --set model.preset=InternVL2-1B"
            )
        config = preset(self.preset, self.options)
        return config if self.template is None else replace(config, template=self.template)

    def layout(self) -> LayoutSpec:
        """How the model's input is laid out; without a path, text is counted by rule."""
        if self.path:
            return self.source().layout(self.max_length)
        config = self.sizes()
        tokenizer: Any = AssumedTokenizer(bos=config.language.family == "internlm2")
        spec = spec_of(config, tokenizer, template=config.template or "internvl2_5")
        return spec if self.max_length is None else replace(spec, max_length=self.max_length)

    def blank(self) -> CausalVLM:
        """The model without weights, to be counted."""
        with torch.device("meta"):
            return build_pvc(self.sizes())

    def build(self) -> CausalVLM:
        """Return the model with its weights."""
        return self.source().build(vision=self.vision_dtype, language=self.language_dtype)


def opened_source(path: str | Path, options: PVCOptions | None = None) -> PVCSource:
    """A PVC folder as it is, an InternVL with these options, or a run's model after its last checkpoint.

    Raises:
        CheckpointError: the folder is none of these, or damaged.
        ConfigError: the options do not fit the InternVL.
        UsageError: it is a language model alone, a run that began with no checkpoint, or options are given for what
            is a PVC already.
    """
    path, options = Path(path), options or PVCOptions()
    run = (path / "run.json").is_file()
    whole = run or ((path / CONFIG).is_file() and is_pvc(read_json(path / CONFIG)))
    if whole and options != PVCOptions():
        raise UsageError(
            f"{path} is a PVC already, which keeps its own temporal layers, tokens and repeats: leave out model.options"
        )
    if run:
        return _trained(RunFolder.open(path))
    if whole:
        found = open_pvc(path)
        return PVCSource(
            opened=found.as_internvl,
            config=found.config,
            public=found.public,
            read=lambda: found.adapter.from_public(found.reader),
        )
    opened = open_checkpoint(path)
    if opened.public is None:
        raise UsageError(f"{path} is a language model alone: an InternVL checkpoint is needed")
    opened.adapter.check(opened.reader)
    public = completed(opened, opened.public, None)
    policy = read_tile_policy(path, opened.public, opened.layout)  # type: ignore[arg-type]
    config = config_of(public, policy, options, tie_words=opened.language.tie_words)
    _ = retrofitted(draft_of(opened, public), config, options)  # says now what cannot be
    return PVCSource(
        opened=opened,
        config=config,
        public=public,
        read=lambda: retrofitted(draft_of(opened, public), config, options),
    )


def _trained(run: RunFolder) -> PVCSource:
    """The model of a run: what it began with, and in its place what it trained."""
    found = _node(run.info["recipe"]["model"], run.path).source()
    checkpoint = run.load()
    weights = {name: t for name, t in checkpoint.weights.items() if not name.startswith("objective.")}
    scales = _scales(run.info["recipe"])
    return replace(
        found, read=lambda: trained_tensors(found.read(), found.parameters, weights, scales=scales)
    )


def _node(said: Mapping[str, Any], path: Path) -> PVCModel:
    """The model node of a run, as it was when the run began."""
    fields = dict(said)
    kind = fields.pop("type", "")
    if kind != f"{PVCModel.__module__}:{PVCModel.__qualname__}":
        name = kind.rpartition(":")[2] or "unknown"
        raise UsageError(f"{path} trained a {name}, which is no PVC that began with a checkpoint")
    options = {key: value for key, value in fields.pop("options").items() if key != "type"}
    temporal = {key: value for key, value in options.pop("temporal").items() if key != "type"}
    temporal["conditioned"] = tuple(temporal["conditioned"])
    kind_of = PVCOptions.__dataclass_fields__["temporal"].default_factory
    return PVCModel(**fields, options=PVCOptions(**options, temporal=kind_of(**temporal)))  # type: ignore[misc]


def _scales(recipe: Mapping[str, Any]) -> dict[str, float]:
    """Alpha / rank of the adapters of a resolved recipe, by the part of the model that they are on."""
    out = {}
    for name, prefix in (("lora", "trunk."), ("vision_lora", "embedder.vision.")):
        said = recipe.get(name) or {}
        rank, alpha = said.get("rank") or 0, said.get("alpha")
        if rank:
            out[prefix] = 2.0 if alpha is None else alpha / rank
    return out


def export_run(src: str | Path, dst: str | Path, *, force: bool = False) -> ConvertReport:
    """Write the model of a run, after its last checkpoint, as a PVC folder; adapters are merged.

    Raises:
        UsageError: the run is none of a PVC, or ``dst`` lies in it.
        CheckpointError: the run has no checkpoint, or ``dst`` cannot be written.
    """
    check_apart(Path(src), Path(dst))
    found = opened_source(src)
    step = RunFolder.open(src).checkpoints()[-1]
    with found.opened.reader:
        return write_pvc(
            dst,
            found.read(),
            found.config,
            found.public,
            companion_files(found.opened, found.public),
            source="run",
            notes=(f"the model of the run {Path(src).resolve().name} after {step:,} steps",),
            force=force,
        )
