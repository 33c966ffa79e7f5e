"""PackedData: data sets on disk as packed training batches; a node of recipes.

What: ``PackedData`` (data sets, limits, packing), ``PackedSource`` (opened), and ``LayoutSource``, which says how
samples are laid out: ``TokenizerLayout`` names a tokenizer folder; a system may bring others (of a checkpoint, of a
model spec).
Source: fact sheet InternVL 2.5, sections 3 and 4: 16384 tokens and 48 tiles in pre-training, buffer 20.

A trainer that knows feeds asks the source for its own (``PackedSource.feed``). ``fetch`` is the plain way, whole
samples joined without limits: what packing must agree with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import torch

from chiasm.data.datasets import Dataset, DatasetSpec, blaming, mixture_weights, read_specs
from chiasm.data.feed import PackedFeed, SetOptions
from chiasm.data.layout import LayoutSpec, layout
from chiasm.data.mixture import Draw
from chiasm.data.packing import Method, Overflow, Packer
from chiasm.data.quarantine import Quarantine, QuarantinePolicy
from chiasm.data.sequence import Sequence as Row
from chiasm.errors import ConfigError
from chiasm.media.frames import FrameSampling
from chiasm.media.jpeg import jpeg_tiles
from chiasm.media.tiles import TilePolicy
from chiasm.nn.losses import Count
from chiasm.text.tokenizer import Tokenizer
from chiasm.train.recipe import Recipe
from chiasm.train.run import RunFolder

__all__ = ["LayoutSource", "PackedData", "PackedSource", "TokenizerLayout"]


class LayoutSource(Protocol):
    """Says how samples become rows: a frozen dataclass of plain data, as all nodes of a recipe."""

    def layout(self) -> LayoutSpec:
        """Return the rules; reads a tokenizer at most."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerLayout:
    """A tokenizer folder and the rules beside it; see ``LayoutSpec`` for the fields."""

    folder: str
    """Tokenizer or checkpoint folder."""
    template: str = "internvl2_5"
    tiles: TilePolicy = field(default_factory=TilePolicy)
    tokens_per_tile: int = 256
    max_length: int | None = None
    """The model's context: no document is longer."""
    system: str | None = None
    loss_power: float = 0.5
    loss_count: Count = "sample"
    frame_tags: str | None = "training"
    """How frames of videos are spelled; None: as the template does for answering."""

    def layout(self) -> LayoutSpec:
        """Return the rules."""
        return LayoutSpec(
            tokenizer=Tokenizer.from_file(self.folder),
            template=self.template,  # type: ignore[arg-type]
            tiles=self.tiles,
            tokens_per_tile=self.tokens_per_tile,
            max_length=self.max_length,
            system=self.system,
            loss_power=self.loss_power,
            loss_count=self.loss_count,
            frame_tags=self.frame_tags,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedData:
    """Data sets, packed over tokens and tiles.

    A step is ``recipe.batch`` packs in ``recipe.accumulate`` micro-batches.

    Attributes:
        layout: how samples are laid out; loss power and count are its own.
        meta: an InternVL meta JSON with the data sets, or one annotation file (JSONL, JSON, parquet, tar, a glob of
            shards); empty: only those of ``sets``.
        root: where relative paths of that one annotation file's pictures start; a meta JSON has its own.
        sets: name -> data set, beside those of ``meta`` (a name in both is an error).
        max_tokens: rows of a pack. max_tiles: tiles (pictures' and frames') of a pack; None: no limit.
        buffer: packs that are open at once. method: "best_fit" or "first_fit".
        overflow: "refuse", "truncate" or "split" what is too long (`chiasm.data.packing`).
        strict: fill packs up to the limits, so that all batches have the same sizes (FSDP, compile).
        resampling: shares of sets by "length" or by its square root, "sqrt".
        sampling: which frames of videos are taken; None: as the layout says. Training of the release:
            mode "rand", frames None, 8 to 32.
        jpeg: quality is drawn per "tile", as the release does, or per "image", in sets that are augmented.
        quarantine: when bad samples stop the run.
        dev: name -> data set that is never trained on; scored every ``recipe.eval_every`` steps.
        dev_rows: rows of each of these that are scored.

    Raises:
        ConfigError: there are no data sets, or a limit is not positive.
    """

    layout: LayoutSource
    meta: str = ""
    root: str = ""
    sets: Mapping[str, DatasetSpec] = field(default_factory=dict)
    max_tokens: int = 8192
    max_tiles: int | None = 24
    buffer: int = 20
    method: Method = "best_fit"
    overflow: Overflow = "refuse"
    strict: bool = False
    resampling: Literal["length", "sqrt"] = "length"
    sampling: FrameSampling | None = None
    jpeg: Literal["tile", "image"] = "tile"
    quarantine: QuarantinePolicy = field(default_factory=QuarantinePolicy)
    dev: Mapping[str, DatasetSpec] = field(default_factory=dict)
    dev_rows: int = 200

    def __post_init__(self) -> None:
        if not self.meta and not self.sets:
            raise ConfigError(
                "packed data needs data sets: set data.meta to an InternVL meta JSON, or data.sets"
            )
        if self.resampling not in ("length", "sqrt"):
            raise ConfigError(f"data.resampling must be length or sqrt, got {self.resampling!r}")
        if self.jpeg not in ("tile", "image"):
            raise ConfigError(f"data.jpeg must be tile or image, got {self.jpeg!r}")
        if self.strict and self.max_tiles is None:
            raise ConfigError("data.strict needs a limit of tiles: set data.max_tiles")
        self.packer()

    def packer(self, max_document: int | None = None) -> Packer:
        """Return an empty packer of these limits; ConfigError when they cannot be."""
        return Packer(
            max_tokens=self.max_tokens,
            max_tiles=self.max_tiles,
            buffer=self.buffer,
            method=self.method,
            overflow=self.overflow,
            max_document=max_document,
        )

    def specs(self) -> dict[str, DatasetSpec]:
        """Return all data sets by name; ConfigError when one name means two."""
        found = read_specs(self.meta, root=self.root) if self.meta else {}
        twice = sorted(found.keys() & self.sets.keys())
        if twice:
            raise ConfigError(f"data set {twice[0]!r} is in data.sets and in {self.meta}: rename one of them")
        return {**found, **self.sets}

    def open(self) -> PackedSource:
        """Return the source.

        Raises:
            DataError: a file is missing or empty; the message says which.
        """
        spec = self.layout.layout()
        if self.sampling is not None:
            spec = replace(spec, sampling=self.sampling)
        return PackedSource(self, self.specs(), spec)


class PackedSource:
    """Opened data sets. It is a ``Source`` too: `sizes`, `weights` and `fetch` serve a trainer without feeds."""

    def __init__(self, data: PackedData, specs: Mapping[str, DatasetSpec], spec: LayoutSpec) -> None:
        self.data, self.spec = data, spec
        self.sets: dict[str, Dataset] = {name: own.open(name) for name, own in specs.items()}
        self._weights = mixture_weights(self.sets, specs, resampling=data.resampling)
        self.options = {
            name: SetOptions(max_tiles=own.max_tiles, change=self._jpeg if own.augment else None)
            for name, own in specs.items()
        }

    @property
    def dev_families(self) -> tuple[str, ...]:
        """Names of the dev sets."""
        return tuple(self.data.dev)

    dev_losses = True

    def dev(self, family: str) -> Iterator[Row]:
        """Return the first rows of a dev set as documents: no augmentation, always the same frames.

        Raises:
            DataError: a row cannot be used; names it. Scores over what is left would not be comparable.
        """
        spec = self.data.dev[family]
        data = spec.open(family)
        for index in range(min(self.data.dev_rows, len(data))):
            with blaming(data, index):
                yield layout(data.record(index), self.spec, train=True, max_tiles=spec.max_tiles, seed=0)

    def _jpeg(self, tiles_N3SS: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        return jpeg_tiles(tiles_N3SS, chance, per=self.data.jpeg)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Set -> number of samples."""
        return {name: len(data) for name, data in self.sets.items()}

    @property
    def weights(self) -> Mapping[str, float]:
        """Set -> share."""
        return self._weights

    def fetch(self, draws: Sequence[Draw], random: torch.Generator) -> Row:
        """Return the draws as one packed sequence, whatever its size; raises what is wrong with a sample."""
        rows = []
        for name, index in draws:
            own = self.options[name]
            change = own.change
            augment = None if change is None else (lambda tiles, change=change: change(tiles, random))
            seed = int(torch.randint(2**31, (), generator=random))
            record = self.sets[name].record(index)
            rows.append(
                layout(record, self.spec, train=True, max_tiles=own.max_tiles, seed=seed, augment=augment)
            )
        return Row.pack(rows)

    def feed(self, recipe: Recipe, run: RunFolder | None = None) -> PackedFeed:
        """Return the feed of a run; bad samples are listed in its folder (``quarantine.jsonl``), if it has one.

        Of several processes each has a list of its own, the others ``quarantine-1.jsonl`` and so on: all of them plan
        everything, and each loads its share. What cannot be decoded is therefore counted by the process that loads it,
        against all samples drawn: with W processes `max_share` is reached at W times that share of such samples.
        """
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        path = None if run is None else Path(run.path) / f"quarantine{f'-{rank}' if rank else ''}.jsonl"
        return PackedFeed(
            self.sets,
            self.weights,
            self.spec,
            Quarantine(path, self.data.quarantine),
            packers=[self.data.packer(self.spec.max_length) for _ in range(recipe.accumulate)],
            packs=recipe.batch // recipe.accumulate,
            seed=recipe.seed,
            options=self.options,
            strict=self.data.strict,
        )
