"""From a recipe to a planned training step: what it trains, what a micro-batch holds, which data it reads.

A model node that knows its sizes (`outline`) is planned without any weights. Of packed data only the limits are known
before they are read, so a plan takes full packs, and says what it assumes about documents and learned rows; worlds are
asked for one real micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from chiasm.checkpoint.adapters import entries
from chiasm.data.mixture import Mixture, generator
from chiasm.data.sequence import IGNORE, Sequence
from chiasm.errors import ChiasmError, ConfigError
from chiasm.model.train_cost import LINEAR, Learns, TrainJob
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.data import MetaData
from chiasm.systems.internvl.presets import PRESETS
from chiasm.train.recipe import Recipe

__all__ = ["DOCUMENT", "Micro", "data_summary", "job_of", "learns_of", "micro_of"]

DOCUMENT = 2048
"""Assumed rows of a packed document, where none has been read."""
LEARNED = 0.5
"""Assumed share of a pack's text rows that carry a label."""
_LAYERS = {"attn.qkv": "qkv", "attn.out": "out", "ffn.gate_up": "gate_up", "ffn.down": "down"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Micro:
    """What one micro-batch holds; `notes` say what is assumed."""

    rows: int
    tiles: int
    learned: int
    documents: int
    notes: tuple[str, ...] = ()


def micro_of(recipe: Recipe, config: InternVLConfig) -> Micro:
    """The micro-batch of a recipe: full packs, or one that is read from its worlds.

    Raises:
        DataError: the data of a recipe without packs cannot be opened.
    """
    data: Any = recipe.data
    size = recipe.batch // recipe.accumulate
    if hasattr(data, "max_tokens") and hasattr(data, "max_tiles"):
        rows = size * data.max_tokens
        room = rows // config.tokens_per_tile
        tiles = room if data.max_tiles is None else min(size * data.max_tiles, room)
        learned = int(LEARNED * (rows - tiles * config.tokens_per_tile))
        documents = max(1, rows // DOCUMENT)
        notes = (
            f"full packs: {rows:,} rows and {tiles} tiles a micro-batch; documents of {DOCUMENT:,} rows and labels on "
            f"{LEARNED:.0%} of the text rows are assumed",
        )
        return Micro(rows=rows, tiles=tiles, learned=learned, documents=documents, notes=notes)
    source = data.open()
    draws = Mixture(source.sizes, source.weights, batch=recipe.batch, seed=recipe.seed).batch_indices(0)[
        :size
    ]
    batch = source.fetch(draws, generator(recipe.seed, "augment", 0, 0))
    if not isinstance(batch, Sequence) or batch.labels_T is None:
        raise ConfigError(f"{recipe.name} does not train on sequences of words: its steps are not planned")
    return Micro(
        rows=len(batch),
        tiles=sum(len(media) for media in batch.media.values()),
        learned=int((batch.labels_T != IGNORE).sum()),
        documents=batch.docs,
        notes=("rows and tiles are those of the first micro-batch",),
    )


def learns_of(recipe: Recipe, config: InternVLConfig) -> tuple[Learns, tuple[str, ...]]:
    """Which parts a recipe trains, by its patterns and its model node; notes name parts that are trained in part."""
    optim, model = recipe.optim, recipe.model
    rank, targets, dropout = recipe.lora.rank, recipe.lora.targets, recipe.lora.dropout
    frozen: tuple[str, ...] = ()
    own = getattr(
        model, "adapters", None
    )  # of a node that puts adapters on its model itself, and freezes the rest
    if own is not None:
        rank, targets = own
        dropout, frozen = 0.0, ("embedder.words.*", "trunk.*", "head.*")
    if rank:
        frozen += ("embedder.words.*", "trunk.*", "head.*")
    names = [
        entry.native
        for entry in entries(
            language=config.language, vision=config.vision, downsample_ratio=config.downsample
        )
    ]

    def matches(name: str, patterns: Iterable[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    def chosen(name: str, patterns: Iterable[str]) -> bool:
        # Tied words are meant by the output matrix's name too.
        also = config.language.tie_words and name == "embedder.words.weight"
        return matches(name, patterns) or (also and matches("head.weight", patterns))

    trained = {
        name
        for name in names
        if (not optim.train or chosen(name, optim.train))
        and not chosen(name, optim.freeze)
        and not matches(name, frozen)
    }
    parts = {
        "vision": "embedder.vision.",
        "projector": "embedder.connect.",
        "words": "embedder.words.",
        "layers": "trunk.",
        "head": "head.",
    }
    found, notes = {}, []
    for part, prefix in parts.items():
        all_of, of_it = (
            [n for n in names if n.startswith(prefix)],
            {n for n in trained if n.startswith(prefix)},
        )
        found[part] = bool(of_it)
        if of_it and len(of_it) < len(all_of):
            notes.append(f"{part}: {len(of_it)} of {len(all_of)} tensors are trained; planned as if all were")
    if config.language.tie_words:
        found["head"] = found["words"]
    paths = {
        path: name for path, name in _LAYERS.items() if not targets or matches(f"layers.0.{path}", targets)
    }
    adapted = frozenset(paths.values()) if rank else LINEAR
    return Learns(**found, rank=rank, adapted=adapted, dropout=bool(rank and dropout)), tuple(notes)


def job_of(
    recipe: Recipe, *, gpus: int = 1, shard: Literal["full", "none"] = "full", cuda: bool = True
) -> tuple[TrainJob, tuple[str, ...]]:
    """The recipe's optimiser step on so many devices, and what is assumed.

    Raises:
        ConfigError: the model is not one that is planned, or the micro-batches do not divide among the devices.
        UsageError, CheckpointError, DataError: the sizes of the model or its data cannot be read.
    """
    outline = getattr(recipe.model, "outline", None)
    if outline is None:
        raise ConfigError(f"{type(recipe.model).__name__} does not tell its sizes: its steps are not planned")
    config: InternVLConfig = outline()
    micro, (learns, notes) = micro_of(recipe, config), learns_of(recipe, config)
    kept = [
        getattr(recipe.model, field, "float32")
        for field, part in (("vision_dtype", learns.vision), ("language_dtype", learns.layers))
        if not part
    ]
    release = getattr(recipe.model, "preset", "")
    if release and not (getattr(recipe.model, "path", "") or getattr(recipe.model, "language", "")):
        notes += (f"sizes are those of the release {release}, until the model's folders are set",)
        if PRESETS[release].unverified:
            notes += (f"not confirmed by a release: {', '.join(PRESETS[release].unverified)}",)
    if recipe.vision_lora.rank:
        notes += ("adapters on the encoder are not planned: it counts as frozen or trained whole",)
    job = TrainJob(
        language=config.language,
        vision=config.vision,
        projector_inputs=config.projector_inputs,
        tokens_per_tile=config.tokens_per_tile,
        select_layer=config.select_layer,
        rows=micro.rows,
        tiles=micro.tiles,
        learned=micro.learned,
        documents=micro.documents,
        micro_batches=recipe.accumulate,
        learns=learns,
        compute=recipe.compute,
        frozen="bfloat16" if "bfloat16" in kept else "float32",
        recompute_vision=recipe.checkpointing in ("vision", "all"),
        recompute_language=recipe.checkpointing in ("language", "all"),
        gpus=gpus,
        shard=shard,
        foreach=cuda,
    )
    return job, micro.notes + notes


def data_summary(recipe: Recipe) -> dict[str, Any]:
    """Data sets of a recipe as plain data: rows, weight, passes; or why they cannot be told, under "missing"."""
    data: Any = recipe.data
    try:
        if isinstance(data, MetaData):
            return {"sets": _meta_sets(data)}
        source = data.open()
        passes = Mixture(source.sizes, source.weights, batch=recipe.batch, seed=recipe.seed).epochs(
            recipe.steps
        )
    except (ChiasmError, OSError) as error:
        return {"missing": str(error)}
    total = sum(source.weights.values())
    sets = {
        name: {"rows": rows, "share": source.weights.get(name, 0.0) / total, "passes": passes.get(name, 0.0)}
        for name, rows in source.sizes.items()
    }
    return {"sets": sets}


def _meta_sets(data: MetaData) -> dict[str, dict[str, Any]]:
    """Rows and shares of the data sets; rows are indexed, nothing else is read."""
    from chiasm.data.datasets import mixture_weights, read_specs

    specs = read_specs(data.found(), root=data.root)
    sets = {name: spec.open(name) for name, spec in specs.items()}
    weights = mixture_weights(sets, specs, resampling=data.resampling)
    total = sum(weights.values()) or 1.0
    return {
        name: {"rows": len(one), "repeat": specs[name].repeat_time, "share": weights[name] / total}
        for name, one in sets.items()
    }
