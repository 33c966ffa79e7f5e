"""PackedFeed: from data sets to the packed micro-batches of consecutive optimiser steps.

What: the Feed contract of the trainer (`chiasm.train.feed.Feed`) over data sets, a mixture, a packer and a layout.
Source: design of this package; what is packed how is in `chiasm.data.packing`.

Planning reads headers and decides which pieces share a pack; it is sequential. Loading decodes, lays out and joins;
it may happen in any thread and order. A step consists of A lanes, one for each micro-batch. Lane p has a packer of its
own and reads positions p, p + A, p + 2A, … of the mixture's endless stream, so that the order of the data does not
depend on how many processes share the lanes.

Nothing is drawn from a shared generator: frames and augmentation of a sample follow from (seed, set, index, how often
it was drawn before), not from where it was packed. What the next plan depends on is, beside the data, the position of
each lane, what its packer holds and which packs are done but not yet given out: `state`, some numbers a sample, as JSON
data.

Bad samples are left out, never replaced: a row that cannot be read, a broken header, a sample that is too long when it
is planned; a file that cannot be decoded when it is loaded. Each goes to the quarantine, which may end the run.

Legend: T rows, N tiles, S side of a tile in pixels.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chiasm.data.layout import Augment, LayoutSpec, Measure, layout, measure
from chiasm.data.mixture import Mixture, derive_seed, generator
from chiasm.data.packing import Item, Key, Pack, Packer, Piece
from chiasm.data.sequence import IGNORE
from chiasm.data.sequence import Sequence as Row
from chiasm.errors import (
    ConfigError,
    ContextOverflowError,
    DataError,
    ImageError,
    TemplateError,
    UsageError,
)

if TYPE_CHECKING:
    from chiasm.data.datasets import Dataset
    from chiasm.data.message import Record
    from chiasm.data.quarantine import Quarantine

__all__ = ["BAD", "Change", "PackedFeed", "Part", "SetOptions"]

BAD = (DataError, ImageError, TemplateError, ContextOverflowError, ConfigError)
"""What may be wrong with one sample. A missing package is wrong with the machine, and is raised."""

Change = Callable[[Tensor, torch.Generator], Tensor]
"""Augmentation: the uint8 tiles (N, 3, S, S) of one picture or frame, and where chance comes from -> changed tiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetOptions:
    """What one data set does otherwise: its limit of tiles, and a change of its tiles."""

    max_tiles: int | None = None
    change: Change | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """The packs of one micro-batch."""

    packs: tuple[Pack, ...]

    @property
    def tokens(self) -> int:
        """Rows of all packs, padding not counted."""
        return sum(pack.tokens for pack in self.packs)

    @property
    def tiles(self) -> int:
        """Tiles of all packs."""
        return sum(pack.tiles for pack in self.packs)


class PackedFeed:
    """Packed micro-batches.

    Args:
        sets: name -> data set.
        weights: name -> share of draws.
        spec: how a sample is laid out. Its `max_length` does not apply: the packers' limits do.
        quarantine: where bad samples go.
        packers: one for each lane (`Recipe.accumulate` of them), alike.
        packs: packs of one micro-batch, joined to one row.
        seed: of the order and of all that is drawn.
        options: name -> what that set does otherwise.
        strict: fill every pack up to the packer's limits, with rows that learn nothing and tiles that stand nowhere, so
            that all batches have the same sizes.
        remember: samples whose measures are kept for the next time (not those with videos, whose frames may be drawn).

    Raises:
        ConfigError: no packers, or packers without a limit of tiles where padding is strict.
    """

    def __init__(
        self,
        sets: Mapping[str, Dataset],
        weights: Mapping[str, float],
        spec: LayoutSpec,
        quarantine: Quarantine,
        *,
        packers: Sequence[Packer],
        packs: int,
        seed: int,
        options: Mapping[str, SetOptions] | None = None,
        strict: bool = False,
        remember: int = 50_000,
    ) -> None:
        if not packers or packs < 1:
            raise ConfigError(f"a packed feed needs lanes and packs, found {len(packers)} and {packs}")
        if strict and packers[0].max_tiles == math.inf:
            raise ConfigError("strict padding needs a limit of tiles: set max_tiles")
        self.sets, self.quarantine, self.seed, self.strict = sets, quarantine, seed, strict
        self.lanes, self.packs = len(packers), packs
        sizes = {name: len(data) for name, data in sets.items()}
        self.mixture = Mixture(sizes, weights, batch=self.lanes, seed=seed)
        self._packers = list(packers)
        self._positions = list(range(self.lanes))
        self._ready: list[deque[Pack]] = [deque() for _ in packers]
        self._step = 0
        self._failed: set[Key] = set()
        self._remember = remember
        self._measures: OrderedDict[tuple[str, int], Measure] = OrderedDict()
        spec = replace(spec, max_length=None)
        self._options = {name: (options or {}).get(name, SetOptions()) for name in self.mixture.names}
        self._specs = {name: spec.limited(own.max_tiles) for name, own in self._options.items()}
        self._spec = spec

    # --- planning ---

    def plan(self, step: int) -> list[Part]:
        """The micro-batches of a step, one for each lane; steps must be asked for one after the other.

        Raises:
            UsageError: it is another step's turn.
            DataError: the quarantine ends the run, or a lane finds no usable sample any more.
        """
        if step != self._step:
            raise UsageError(f"this feed goes on with step {self._step}, not {step}: restore its state first")
        parts = [Part(tuple(self._next(lane) for _ in range(self.packs))) for lane in range(self.lanes)]
        self._step += 1
        return parts

    def _next(self, lane: int) -> Pack:
        """The next pack of a lane."""
        ready, packer = self._ready[lane], self._packers[lane]
        barren, patience = 0, 2 * sum(self.mixture.sizes.values())
        while not ready:
            name, index, nth = self.mixture.place(self._positions[lane])
            self._positions[lane] += self.lanes
            self.quarantine.seen(1)
            item = self._item(name, index, nth)
            if item is not None:
                pushed = packer.push(item)
                ready.extend(pushed.packs)
                if pushed.refused is not None:
                    self._bad(name, index, pushed.refused)
                    item = None
            barren = 0 if item is not None else barren + 1
            if barren > patience:
                raise DataError(
                    f"none of the last {barren} samples can be used (the last: {self.sets[name].where(index)} of "
                    f"{name}): look at the quarantine list"
                )
        return ready.popleft()

    def _item(self, name: str, index: int, nth: int) -> Item | None:
        """A sample measured, or None when it is bad."""
        known = self._measures.get((name, index))
        if known is not None:
            self._measures.move_to_end((name, index))
            return Item.of((name, index, nth), known)
        try:
            record = self.sets[name].record(index)
            found = measure(record, self._specs[name], train=True, seed=self._frames(name, index, nth))
        except BAD as error:
            problem = error
        else:
            if self._remember and not _has_video(record):
                self._measures[name, index] = found
                if len(self._measures) > self._remember:
                    self._measures.popitem(last=False)
            return Item.of((name, index, nth), found)
        self._bad(name, index, str(problem))
        return None

    def _frames(self, name: str, index: int, nth: int) -> int:
        return derive_seed(self.seed, "frames", name, index, nth)

    def _bad(self, name: str, index: int, reason: str) -> None:
        """Leave a sample out; raises what the quarantine raises."""
        self.quarantine.add(self.sets[name].where(index), name, reason)

    # --- loading ---

    def load(self, handle: Part, *, step: int, part: int) -> Row | None:
        """The batch of one micro-batch, on the CPU: its packs joined. None when all of its samples are bad.

        With strict padding there is always a batch; one whose samples are all bad is padding alone, of weight 0.
        """
        rows = []
        for pack in handle.packs:
            documents = [row for piece in pack.pieces if (row := self._document(piece)) is not None]
            if self.strict:
                rows.append(self._padded(documents))
            elif documents:
                rows.append(Row.pack(documents))
        return Row.pack(rows) if rows else None

    def _document(self, piece: Piece) -> Row | None:
        """A piece laid out as a document, or None when its sample is bad."""
        name, index, nth = piece.key
        if not isinstance(name, str) or not isinstance(index, int) or not isinstance(nth, int):
            raise ConfigError(f"{piece.key!r} is not a sample of this feed")
        try:
            data, change = self.sets[name], self._options[name].change
            augment = None
            if change is not None:
                augment = _with(change, generator(self.seed, "augment", name, index, nth))
            row = layout(
                data.record(index),
                self._specs[name],
                train=True,
                seed=self._frames(name, index, nth),
                augment=augment,
            )
            if len(row) != piece.total:
                raise DataError(
                    f"took {piece.total} tokens when it was measured but takes {len(row)} now: its files have changed"
                )
            if piece.whole:
                return row
            # This, too, finds what has changed: pictures that lie elsewhere now, where the cut goes through one.
            return row.piece(
                piece.start, piece.stop, power=self._spec.loss_power, count=self._spec.loss_count
            )
        except BAD as error:
            problem = error
        self._failed.add(piece.key)
        self._bad(name, index, str(problem))
        return None

    def _padded(self, documents: list[Row]) -> Row:
        """One pack of exactly the limits' sizes."""
        packer, side = self._packers[0], self._spec.tiles.image_size
        if documents:
            row = Row.pack(documents)
        else:
            nothing = torch.full((0,), IGNORE, dtype=torch.int64)
            row = replace(Row.of_text([]), labels_T=nothing, weight_T=torch.zeros(0))
        return row.padded(packer.max_tokens, int(packer.max_tiles), shape=(3, side, side))

    # --- what the trainer asks beside ---

    def names(self, handle: Part) -> list[str]:
        """Set and place of each document of the batch, in order; samples that failed to load are left out.

        What strict padding adds to a pack is a document too, named "padding".
        """
        out = []
        for pack in handle.packs:
            kept = [piece for piece in pack.pieces if piece.key not in self._failed]
            for name, index, _ in (piece.key for piece in kept):
                out.append(f"{name} {self.sets[str(name)].where(int(index))}")
            if self.strict and sum(piece.tokens for piece in kept) < self._packers[0].max_tokens:
                out.append("padding")
        return out

    @property
    def capacity(self) -> dict[str, int]:
        """What one micro-batch holds at most: tokens and, where there is a limit, tiles."""
        packer = self._packers[0]
        limits = {"tokens": packer.max_tokens, "tiles": packer.max_tiles}
        return {name: int(limit) * self.packs for name, limit in limits.items() if limit != math.inf}

    def about(self, steps: int) -> str:
        """One line for the log."""
        packer = self._packers[0]
        limits = ", ".join(f"{limit // self.packs} {name}" for name, limit in self.capacity.items())
        sets = ", ".join(f"{name} {size}" for name, size in self.mixture.sizes.items())
        how = f"{packer.method}, {packer.overflow} what overflows, {packer.buffer} open"
        return f"{self.lanes} x {self.packs} packs of {limits} a step ({how}); samples: {sets}"

    @property
    def counts(self) -> dict[str, int]:
        """Totals of all lanes: samples, packs, rows, tiles, refused, cut, dropped pieces, lost rows."""
        lanes = [packer.state()["counts"] for packer in self._packers]
        return {name: sum(lane[name] for lane in lanes) for name in lanes[0]}

    def state(self) -> dict[str, Any]:
        """All that the next plan depends on, as JSON data."""
        return {
            "step": self._step,
            "seed": self.seed,
            "packs": self.packs,
            "sizes": self.mixture.sizes,
            "positions": list(self._positions),
            "packers": [packer.state() for packer in self._packers],
            "ready": [[pack.to_json() for pack in ready] for ready in self._ready],
            "quarantine": self.quarantine.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a feed of the same settings was.

        Raises:
            ConfigError: other lanes, packs, seed or packing. DataError: a data set has another length now.
        """
        for name, own in (("seed", self.seed), ("packs", self.packs)):
            if state[name] != own:
                raise ConfigError(f"the feed was saved with {name} {state[name]}, not {own}: start a new run")
        if len(state["positions"]) != self.lanes:
            raise ConfigError(
                f"the feed was saved with {len(state['positions'])} lanes, not {self.lanes}: accumulate must stay"
            )
        if state["sizes"] != self.mixture.sizes:
            names = sorted(state["sizes"].keys() | self.mixture.sizes.keys())
            odd = next(n for n in names if state["sizes"].get(n) != self.mixture.sizes.get(n))
            raise DataError(
                f"data set {odd} has {self.mixture.sizes.get(odd, 0)} samples but had {state['sizes'].get(odd, 0)} "
                "when the run was saved: restore the file or start a new run"
            )
        self._step = state["step"]
        self._positions = list(state["positions"])
        for packer, saved in zip(self._packers, state["packers"], strict=True):
            packer.restore(saved)
        self._ready = [deque(Pack.from_json(pack) for pack in lane) for lane in state["ready"]]
        self.quarantine.restore(state["quarantine"])


def _with(change: Change, chance: torch.Generator) -> Augment:
    return lambda tiles_N3SS: change(tiles_N3SS, chance)


def _has_video(record: Record) -> bool:
    return any(part.kind == "video" for turn in record.turns for part in turn.parts)
