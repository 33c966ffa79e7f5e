"""Checkpoints of PVC: the folder that Chiasm writes and reads, and how an InternVL becomes a PVC.

A folder is laid out as an InternVL 2 in its original layout: the same names for the same tensors, the same files. New
modules stand beside them (`vision_model.encoder.layers.{i}.temporal.*`, `vision_model.time.*`, `mlp1.modulation.*`),
and `config.json` has the keys of the PVC release (`image_repeat_time`, …) and, under `chiasm_pvc`, what those cannot
say. The released PVC-InternVL2-8B names its new modules otherwise: `discover.py`.

Source: fact sheet PVC, sections 2.1, 2.2 (delayed initialisation) and 2.5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.checkpoint.adapters import Entry, OpenedCheckpoint, TableAdapter, adapter_for, open_checkpoint
from chiasm.checkpoint.config import InternVLPublicConfig
from chiasm.checkpoint.convert import ConvertReport, companion_files, completed
from chiasm.checkpoint.edit import Draft, check_apart, draft_of
from chiasm.checkpoint.lora import open_reader
from chiasm.checkpoint.preprocess import read_tile_policy
from chiasm.checkpoint.store import CONFIG, CheckpointReader, read_json, write_checkpoint
from chiasm.errors import CheckpointError, ConfigError, UsageError
from chiasm.media.tiles import TilePolicy
from chiasm.parts.connect.conditioned import coarsened
from chiasm.parts.vision.progressive import TemporalConfig
from chiasm.systems.pvc.config import PVCConfig, downsample_for
from chiasm.systems.pvc.model import build_pvc
from chiasm.text.templates import get_template

__all__ = [
    "MODEL_TYPE",
    "OWN",
    "OpenedPVC",
    "PVCOptions",
    "config_of",
    "extended",
    "is_pvc",
    "is_release",
    "new_entries",
    "open_pvc",
    "pvc_adapter",
    "retrofit",
    "retrofitted",
    "spell_new",
    "started",
    "to_public",
    "write_pvc",
]

MODEL_TYPE = "pvc_internvl"
OWN = "chiasm_pvc"
"""Key of `config.json` under which stands what the keys of the release cannot say."""

_VISION, _CONNECT = "embedder.vision.", "embedder.connect."


@dataclass(frozen=True, slots=True, kw_only=True)
class PVCOptions:
    """What a retrofit decides: everything of a PVC that its InternVL does not have. Fields as of `PVCConfig`."""

    temporal: TemporalConfig = dataclasses.field(default_factory=TemporalConfig)
    tokens: int = 64
    """Tokens of a tile, for each repeat."""
    repeats: int = 4
    video_repeats: int = 1
    repeat_order: str = "tile"
    frame_tiles: int = 1
    views: str = "same"
    copy: bool = True
    """Attention over time starts from the spatial attention of its layer, where it has its shape; else it is drawn."""
    seed: int = 0
    """Of what is drawn."""


def is_pvc(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a PVC, ours or the release's."""
    return config.get("model_type") == MODEL_TYPE


def is_release(config: Mapping[str, Any]) -> bool:
    """Whether it is that of a release, which says nothing of how its new modules are named."""
    return is_pvc(config) and OWN not in config


# Configurations ------------------------------------------------------------------------------------------------------


def config_of(
    public: InternVLPublicConfig,
    policy: TilePolicy,
    options: PVCOptions,
    *,
    tie_words: bool,
    tokens: int | None = None,
) -> PVCConfig:
    """The native config of a public one with these options.

    Args:
        tokens: of a tile, instead of the options'.

    Raises:
        ConfigError: they do not go together.
    """
    vision = public.vision_config()
    return PVCConfig(
        vision=vision,
        language=public.language_config(tie_words=tie_words),
        temporal=options.temporal,
        tiles=policy,
        repeats=options.repeats,
        video_repeats=options.video_repeats,
        repeat_order=options.repeat_order,  # type: ignore[arg-type]
        frame_tiles=options.frame_tiles,
        views=options.views,
        downsample=downsample_for(tokens or options.tokens, vision, policy.image_size),
        unshuffle=public.ps_version,  # type: ignore[arg-type]
        select_layer=public.select_layer,
        template=public.template or None,
        system=public.system_message,
    )


def to_public(public: InternVLPublicConfig, config: PVCConfig) -> dict[str, Any]:
    """The ``config.json`` of a PVC: that of its InternVL, the release's keys, and our own."""
    out = replace(public, downsample_ratio=config.downsample).to_original()
    out.pop("auto_map", None)  # remote code that would read another model
    own = {
        "temporal": dataclasses.asdict(config.temporal),
        "frame_tiles": config.frame_tiles,
        "views": config.views,
        "repeat_order": config.repeat_order,
    }
    return {
        **out,
        "architectures": ["PVCInternVLModel"],
        "model_type": MODEL_TYPE,
        "use_temporal": True,
        "image_repeat_time": config.repeats,
        "video_repeat_time": config.video_repeats,
        OWN: own,
    }


def _options_of(config: Mapping[str, Any], folder: Path) -> PVCOptions:
    """What a folder's config says; CheckpointError, in one line, where it is damaged."""
    path = folder / CONFIG
    try:
        own = dict(config[OWN])
        said = dict(own["temporal"])
        said["conditioned"] = tuple(said["conditioned"])
        known = {f.name for f in dataclasses.fields(TemporalConfig)}
        unknown = sorted(said.keys() - known)
        if unknown:
            raise CheckpointError(f"{path}: {OWN}.temporal has the unknown key {unknown[0]!r}: update chiasm")
        return PVCOptions(
            temporal=TemporalConfig(**said),
            repeats=config["image_repeat_time"],
            video_repeats=config["video_repeat_time"],
            repeat_order=own["repeat_order"],
            frame_tiles=own["frame_tiles"],
            views=own["views"],
        )
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}: it is not that of a whole PVC folder") from None
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is not that of a whole PVC folder: {reason}") from None


# Names ---------------------------------------------------------------------------------------------------------------


def new_entries(config: PVCConfig) -> tuple[Entry, ...]:
    """The parameters that a PVC has and its InternVL has not, as the model itself has them; no memory is taken."""
    base = {entry.native for entry in _base(config).plan}
    with torch.device("meta"):
        model = build_pvc(config)
    return tuple(
        Entry(name, tuple(parameter.shape), _rows(name, parameter.shape[0]))
        for name, parameter in model.named_parameters()
        if name not in base and name != "head.weight"
    )


def _rows(name: str, rows: int) -> tuple[int, ...]:
    """Rows of the pieces that are adapted apart: queries, keys and values over time."""
    return (rows // 3,) * 3 if ".temporal.qkv." in name else (rows,)


def spell_new(native: str) -> str:
    """The name of a new module's tensor in a checkpoint folder."""
    if native.startswith(_CONNECT):
        return "mlp1." + native.removeprefix(_CONNECT)
    rest = native.removeprefix(_VISION)
    return ("vision_model.encoder." if rest.startswith("layers.") else "vision_model.") + rest


def _base(config: PVCConfig) -> TableAdapter:
    return adapter_for(
        "original", language=config.language, vision=config.vision, downsample_ratio=config.downsample
    )


def pvc_adapter(config: PVCConfig) -> TableAdapter:
    """Between the tensors of a PVC folder and native parameters."""
    base, new = _base(config), new_entries(config)
    names = {entry.native for entry in new}

    def spell(native: str) -> tuple[str, ...]:
        return (spell_new(native),) if native in names else base.spell(native)

    return replace(base, plan=(*base.plan, *new), spell=spell)


# Folders -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedPVC:
    """A PVC folder, understood; no tensor is read yet.

    Attributes:
        reader: its tensors. adapter: from their names to native ones.
        config: the whole model. public: what its ``config.json`` says of the InternVL in it.
    """

    reader: CheckpointReader
    adapter: TableAdapter
    config: PVCConfig
    public: InternVLPublicConfig

    @property
    def as_internvl(self) -> OpenedCheckpoint:
        """The folder as the files beside its weights are read."""
        return OpenedCheckpoint(
            reader=self.reader,
            layout="original",
            adapter=self.adapter,
            language=self.config.language,
            vision=self.config.vision,
            public=self.public,
        )


def open_pvc(folder: str | Path, **tiles: Any) -> OpenedPVC:
    """Read config and headers of a PVC folder.

    Args:
        folder: as `retrofit` and `discover.convert_release` write it.
        tiles: fields of `TilePolicy` to override.

    Raises:
        CheckpointError: the folder is none, is damaged, or is the release's own layout.
        ConfigError: the config describes no model.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if is_release(config):
        raise CheckpointError(
            f"{folder} is a PVC in the layout of its release, whose new modules must be named first: "
            f"chiasm convert {folder} DST --to pvc"
        )
    if not is_pvc(config):
        raise CheckpointError(f"{folder} is no PVC checkpoint (model_type {config.get('model_type')!r})")
    reader = open_reader(folder)
    public = InternVLPublicConfig.from_original(reader.config)
    policy = replace(read_tile_policy(folder, public, "original"), **tiles)
    options, tokens = _options_of(config, folder), public.tokens_per_tile
    native = config_of(public, policy, options, tie_words=False, tokens=tokens)
    if _base(native).spell("head.weight")[0] not in reader:
        native = config_of(public, policy, options, tie_words=True, tokens=tokens)
    return OpenedPVC(reader=reader, adapter=pvc_adapter(native), config=native, public=public)


def write_pvc(
    dst: str | Path,
    tensors: Iterator[tuple[str, Tensor]] | Mapping[str, Tensor],
    config: PVCConfig,
    public: InternVLPublicConfig,
    files: Mapping[str, str | bytes | Path],
    *,
    source: str,
    notes: tuple[str, ...] = (),
    force: bool = False,
) -> ConvertReport:
    """Write native tensors as a PVC folder, whole or not at all."""
    written = write_checkpoint(
        dst, pvc_adapter(config).to_public(tensors), to_public(public, config), files=files, force=force
    )
    return ConvertReport(
        source=source,
        target="pvc",
        folder=str(dst),
        tensors=written.tensors,
        bytes=written.bytes,
        shards=written.shards,
        files=tuple(sorted(files)),
        notes=notes,
    )


# From an InternVL ----------------------------------------------------------------------------------------------------


def retrofit(
    src: str | Path,
    dst: str | Path,
    options: PVCOptions | None = None,
    *,
    template: str | None = None,
    force: bool = False,
) -> ConvertReport:
    """Make a PVC of an InternVL checkpoint (2, 2.5, 3; any layout).

    The encoder then computes what it did (gates and modulations are zero); the projector reads the mean of the tokens
    that one coarse token holds (`coarsened`). It answers at once, and better after training.

    Args:
        src: the InternVL. dst: the folder to write; it appears whole or not at all.
        options: what is new.
        template: name of the chat template to note; None keeps the source's.
        force: replace ``dst`` if it is a checkpoint folder.

    Raises:
        UsageError: ``src`` is a language model alone, or ``dst`` lies in it.
        CheckpointError: ``src`` cannot be read or ``dst`` not be written.
        ConfigError: the options do not fit the model.
    """
    src, dst, options = Path(src), Path(dst), options or PVCOptions()
    check_apart(src, dst)
    opened = open_checkpoint(src)
    with opened.reader:
        if opened.public is None:
            raise UsageError(f"{src} is a language model alone: an InternVL checkpoint is needed")
        opened.adapter.check(opened.reader)
        public = completed(opened, opened.public, None)
        if template is not None:
            _ = get_template(template)
            public = replace(public, template=template)
        policy = read_tile_policy(src, opened.public, opened.layout)  # type: ignore[arg-type]
        config = config_of(public, policy, options, tie_words=opened.language.tie_words)
        tensors = retrofitted(draft_of(opened, public), config, options)
        start = (
            f"each token of {config.tokens_per_tile} a tile reads the mean of {_ratio(public, config) ** 2}"
        )
        return write_pvc(
            dst,
            tensors,
            config,
            public,
            companion_files(opened, public),
            source=opened.layout,
            notes=(f"new modules start as nothing, so the encoder is that of {src.name}; {start}",),
            force=force,
        )


def _ratio(public: InternVLPublicConfig, config: PVCConfig) -> int:
    """How much coarser the unshuffle becomes."""
    ratio = public.downsample_ratio / config.downsample
    if ratio < 1 or ratio != int(ratio):
        raise ConfigError(
            f"a projector for {public.tokens_per_tile} tokens a tile cannot become one for "
            f"{config.tokens_per_tile}: use fewer, by a whole factor a side"
        )
    return int(ratio)


def retrofitted(draft: Draft, config: PVCConfig, options: PVCOptions) -> Iterator[tuple[str, Tensor]]:
    """The native tensors of an InternVL on their way to a PVC: projector made coarser, then what is new.

    Raises:
        ConfigError: the projector is finer already.
    """
    ratio = _ratio(draft.public, config)
    factor = round(1 / draft.public.downsample_ratio)
    return extended(draft.tensors, config, ratio, factor, copied=options.copy, seed=options.seed)


def extended(
    tensors: Iterator[tuple[str, Tensor]],
    config: PVCConfig,
    ratio: int,
    factor: int,
    *,
    copied: bool = True,
    seed: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """Native tensors of an InternVL, the projector's made coarser, then what is new.

    Args:
        tensors: those of the projector together, those of a layer of the encoder before the end.
        config: of the PVC.
        ratio: how much coarser its unshuffle is. factor: f of the InternVL's.
        copied, seed: as of `started`.
    """
    connect: dict[str, Tensor] = {}
    old: dict[str, Tensor] = {}
    first = config.vision.layers - config.temporal.layers
    kind = torch.float32
    for name, tensor in tensors:
        if name.startswith(_CONNECT):
            connect[name.removeprefix(_CONNECT)] = tensor
            if len(connect) == 6:
                wide = coarsened(connect, config.vision.hidden_size, factor, ratio)
                yield from ((_CONNECT + leaf, value) for leaf, value in wide.items())
            continue
        if name.startswith(f"{_VISION}layers."):
            layer, _, leaf = name.removeprefix(f"{_VISION}layers.").partition(".")
            kind = tensor.dtype
            if int(layer) >= first and leaf.startswith(("attn.", "norm1.")):
                old[name] = tensor
        yield name, tensor
    yield from started(config, old, kind, copied=copied, seed=seed)


def started(
    config: PVCConfig, old: Mapping[str, Tensor], dtype: torch.dtype, *, copied: bool = True, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """New parameters as they start: gates and modulations zero, the rest copied from its layer or drawn.

    Args:
        old: native attention and first norm of the temporal layers.
        dtype: of what is made.
        copied: whether attention over time starts from the spatial one, where the shapes agree.
        seed: of what is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    for entry in new_entries(config):
        yield entry.native, _start(entry, config, old, generator, copied).to(dtype)


def _start(
    entry: Entry, config: PVCConfig, old: Mapping[str, Tensor], generator: torch.Generator, copied: bool
) -> Tensor:
    name, shape = entry.native, entry.shape
    if "modulation." in name or name.endswith((".own", ".gate")):
        return torch.zeros(shape)
    if ".temporal.proj." in name and config.temporal.gate == "none":
        return torch.zeros(shape)
    if ".norm_t." in name:
        return old[name.replace(".norm_t.", ".norm1.")]
    twin = old.get(name.replace(".temporal.", ".attn."))
    if ".temporal." in name and copied and twin is not None and tuple(twin.shape) == shape:
        return twin
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return torch.ones(shape)
    if len(shape) == 1:
        return torch.zeros(shape)
    return nn.init.trunc_normal_(torch.empty(shape), std=0.02, a=-0.04, b=0.04, generator=generator)
