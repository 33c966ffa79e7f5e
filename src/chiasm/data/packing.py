"""Packing: which samples share one row of bounded length, over tokens *and* tiles.

Source: fact sheet InternVL 2.5, section 3.5 (the paper's search and the released code's, which differ).

A `Packer` reads a stream of samples of known sizes (`chiasm.data.layout.measure`; nothing is opened here) and gives
out packs. Both methods keep at most `buffer` packs open.

- ``best_fit``, the paper's search: the open pack with the most tokens into which the sample fits, found by binary
  search; where its tiles do not fit, the next shorter one. A pack is full when no token fits. Beyond `buffer` open
  packs the one with the most tokens goes (ties: the older): it wastes least. Packs at the tile limit, which only text
  can still fill, are kept as long as they are at most half of the buffer; beyond that the one of them with the most
  tokens goes, or they would take it over where little text comes. The released code's rule, the most tiles, sends
  packs away that text would still fill: a tenth of all tokens of the example below (docs/packing.md has the figures).
  These rules alone would never let go of some packs: one at the limit of tiles that is a little shorter than all later
  ones, say. Its samples would not be seen in the whole run. So a pack goes, whatever it holds, once `PATIENCE` times
  `buffer` others were opened behind it.
- ``first_fit``, the released code's: open packs by falling number of tiles, the first into which the sample fits. A
  pack is full when either limit is reached. Beyond `buffer` the one with the most tiles goes. As in the released code,
  a pack with few tiles and hardly any room may stay open to the end of the run.

A sample that alone is beyond the limits is, by `overflow`,

- ``refuse``: left out, with a reason that begins with "too long";
- ``truncate``: cut at the limit, the rest is lost (the paper's first step); counted in rows;
- ``split``: cut into pieces. Samples that fit alone but into no open pack are then cut, too, as soon as half of the
  buffer is in use: the front fills the open pack with the most room. Here a cut is made only where both sides remain.

A cut never passes through a picture or a frame, its start and end token included; it moves before it. The released
code loses the text between the cut and the next picture and lets the right piece keep its positions; here pieces are
neighbours, nothing lies between them, and each is a document of its own (`Sequence.piece`). A piece with labels on at
most 1/256 of its rows teaches next to nothing: it is dropped, and counted. Whole samples never are.

The order of packs is a function of the stream alone. `state` is JSON data: keys and counts; no sample is measured
again.
"""

from __future__ import annotations

import math
import random
import time
from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from chiasm.data.layout import Block, Measure
from chiasm.errors import ConfigError, DataError

__all__ = [
    "EXAMPLE_TILES",
    "Item",
    "Key",
    "Method",
    "Overflow",
    "Pack",
    "Packer",
    "Piece",
    "Pushed",
    "Simulation",
    "example_items",
    "simulate",
]

Method = Literal["best_fit", "first_fit"]
Overflow = Literal["refuse", "truncate", "split"]
Key = tuple[str | int, ...]
"""Names a sample; plain JSON values, for instance (set, index, how-many-th time)."""

POOR = 256
"""A piece with labels on at most one in so many rows is dropped (released code)."""

PATIENCE = 5
"""With best_fit a pack goes once so many times `buffer` packs were opened behind it."""


@dataclass(frozen=True, slots=True)
class Item:
    """A sample as the packer sees it; see `Measure` for the fields.

    `runs` None: every row carries a label. With tiles and without `cuts` nobody knows where its pictures lie: it cannot
    be cut.
    """

    key: Key
    tokens: int
    tiles: int = 0
    cuts: tuple[Block, ...] = ()
    runs: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of(cls, key: Key, found: Measure) -> Item:
        """A measured sample."""
        return cls(key, found.tokens, found.tiles, found.cuts, found.runs)

    def learned(self, start: int, stop: int) -> int:
        """Labels of rows start … stop - 1 as a piece: its last row has none where the sample goes on."""
        runs = ((0, self.tokens),) if self.runs is None else self.runs
        found = sum(max(0, min(end, stop) - max(first, start)) for first, end in runs)
        cut = stop < self.tokens and any(first <= stop - 1 < end for first, end in runs)
        return found - cut

    def reach(self, start: int, tokens: int, tiles: float) -> int:
        """How far a piece from row `start` can go within these limits without cutting a picture."""
        stop = min(self.tokens, start + tokens)
        for first, length, own in self.cuts:
            if first < start:
                continue
            if first >= stop:
                break
            tiles -= own
            if tiles < 0 or first + length > stop:
                return first
        return stop

    def piece(self, start: int, stop: int) -> Piece:
        """Rows start … stop - 1."""
        if start == 0 and stop == self.tokens:
            return Piece(self.key, 0, stop, self.tiles, stop)
        tiles = sum(own for first, _, own in self.cuts if start <= first < stop)
        return Piece(self.key, start, stop, tiles, self.tokens)


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows start … stop - 1 of a sample of `total` rows."""

    key: Key
    start: int
    stop: int
    tiles: int
    total: int

    @property
    def tokens(self) -> int:
        """Rows."""
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether it is the whole sample."""
        return self.tokens == self.total

    def to_json(self) -> list[Any]:
        """As plain data."""
        return [list(self.key), self.start, self.stop, self.tiles, self.total]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Piece:
        """The inverse of `to_json`."""
        key, start, stop, tiles, total = data
        return cls(tuple(key), start, stop, tiles, total)


@dataclass(frozen=True, slots=True)
class Pack:
    """Pieces that share a row, in the order of the stream."""

    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """Rows of all pieces."""
        return sum(piece.tokens for piece in self.pieces)

    @property
    def tiles(self) -> int:
        """Tiles of all pieces."""
        return sum(piece.tiles for piece in self.pieces)

    def to_json(self) -> list[Any]:
        """As plain data."""
        return [piece.to_json() for piece in self.pieces]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Pack:
        """The inverse of `to_json`."""
        return cls(tuple(Piece.from_json(piece) for piece in data))


@dataclass(slots=True)
class Pushed:
    """What one sample brought about: packs that are done, why it was refused, pieces of it that were dropped."""

    packs: list[Pack] = field(default_factory=list)
    refused: str | None = None
    dropped: list[Piece] = field(default_factory=list)


@dataclass(slots=True)
class _Open:
    """A pack that still takes samples; `serial` counts the packs by age."""

    serial: int
    tokens: int
    tiles: int
    pieces: list[Piece]


@dataclass(slots=True, kw_only=True)
class Counts:
    """What a packer has done so far; `lost_rows` were cut off by "truncate" or dropped as pieces."""

    items: int = 0
    packs: int = 0
    tokens: int = 0
    tiles: int = 0
    refused: int = 0
    cut: int = 0
    dropped: int = 0
    lost_rows: int = 0


class Packer:
    """Packs a stream of samples; see the module's first lines for the rules.

    Args:
        max_tokens: rows of a pack.
        max_tiles: tiles of a pack; None for no limit.
        buffer: packs that may be open after a sample was taken.
        method: "best_fit" or "first_fit".
        overflow: "refuse", "truncate" or "split".
        max_document: rows of one document (the model's context), if that is less than `max_tokens`.

    Attributes:
        counts: totals since the start, or since the start of the run that was restored.

    Raises:
        ConfigError: a limit is not positive, or a name is unknown.
    """

    def __init__(
        self,
        *,
        max_tokens: int,
        max_tiles: int | None,
        buffer: int = 20,
        method: Method = "best_fit",
        overflow: Overflow = "refuse",
        max_document: int | None = None,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("max_tiles", max_tiles), ("buffer", buffer)):
            if (value is not None or name != "max_tiles") and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"packing {name} must be a whole number of at least 1, found {value!r}")
        if method not in get_args(Method):
            raise ConfigError(f"packing method {method!r} is unknown: use {' or '.join(get_args(Method))}")
        if overflow not in get_args(Overflow):
            raise ConfigError(f"overflow {overflow!r} is unknown: use {', '.join(get_args(Overflow))}")
        if max_document is not None and max_document < 1:
            raise ConfigError(f"packing max_document must be at least 1 or None, found {max_document}")
        self.max_tokens, self.buffer = max_tokens, buffer
        self.max_tiles: float = math.inf if max_tiles is None else max_tiles
        self.method, self.overflow = method, overflow
        self.document = min(max_tokens, max_document or max_tokens)
        self.counts = Counts()
        self._open: list[_Open] = []
        self._serial = 0

    def __len__(self) -> int:
        """Open packs."""
        return len(self._open)

    def push(self, item: Item) -> Pushed:
        """Take one sample."""
        out = Pushed()
        self.counts.items += 1
        if item.tokens < 1:
            out.refused = "too short: no tokens"
        elif item.tokens <= self.document and item.tiles <= self.max_tiles:
            self._place(item, 0, item.tokens, out)
        else:
            self._cut(item, out)
        self.counts.refused += out.refused is not None
        return out

    def flush(self) -> list[Pack]:
        """Give out all open packs, oldest first; for data that ends."""
        rest = sorted(self._open, key=lambda pack: pack.serial)
        self._open = []
        return [self._done(pack) for pack in rest]

    def state(self) -> dict[str, Any]:
        """All that the next packs depend on, as JSON data."""
        opened = [[pack.serial, [piece.to_json() for piece in pack.pieces]] for pack in self._open]
        return {
            "settings": self._settings(),
            "serial": self._serial,
            "open": opened,
            "counts": asdict(self.counts),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`; ConfigError where it was saved with other settings."""
        settings = self._settings()
        if state["settings"] != settings:
            name = next(n for n in settings if state["settings"].get(n) != settings[n])
            raise ConfigError(
                f"the packer was saved with {name} {state['settings'].get(name)!r} and cannot go on with "
                f"{settings[name]!r}: start a new run"
            )
        self._serial, self._open, self.counts = state["serial"], [], Counts(**state["counts"])
        for serial, data in state["open"]:  # in the order that searching relies on
            pieces = [Piece.from_json(piece) for piece in data]
            tokens, tiles = sum(p.tokens for p in pieces), sum(p.tiles for p in pieces)
            self._open.append(_Open(serial, tokens, tiles, pieces))

    def _settings(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "max_tiles": None if math.isinf(self.max_tiles) else self.max_tiles,
            "buffer": self.buffer,
            "method": self.method,
            "overflow": self.overflow,
            "max_document": self.document,
        }

    # --- cutting ---

    def _cut(self, item: Item, out: Pushed) -> None:
        """A sample beyond the limits: refuse, truncate or split it."""
        limit = f"{self.document} tokens" + (
            "" if math.isinf(self.max_tiles) else f", {self.max_tiles} tiles"
        )
        size = f"too long: {item.tokens} tokens, {item.tiles} tiles (limit {limit})"
        if self.overflow == "refuse":
            out.refused = size
            return
        large = [c for c in item.cuts if c[1] > self.document or c[2] > self.max_tiles]
        if large:
            out.refused = (
                f"{size}, and one picture of {large[0][1]} tokens, {large[0][2]} tiles cannot be cut"
            )
            return
        if item.tiles and not item.cuts:
            out.refused = f"{size}, and where its pictures lie is not known"
            return
        if self.overflow == "truncate":
            stop = item.reach(0, self.document, self.max_tiles)
            if item.learned(0, stop) < 1:
                out.refused = f"{size}, and nothing to learn is left of its first {stop} tokens"
                return
            self.counts.cut += 1
            self.counts.lost_rows += item.tokens - stop
            self._place(item, 0, stop, out)
            return
        spans, start = [], 0
        while start < item.tokens:
            stop = item.reach(start, self.document, self.max_tiles)
            spans.append((start, stop))
            start = stop
        kept = [span for span in spans if not self._poor(item, *span)]
        if not kept:
            out.refused = f"{size}, and no piece of it has more than 1/{POOR} labelled tokens"
            return
        self.counts.cut += len(spans) - 1
        for first, stop in spans:
            if (first, stop) in kept:
                self._place(item, first, stop, out)
                continue
            out.dropped.append(item.piece(first, stop))
            self.counts.dropped += 1
            self.counts.lost_rows += stop - first

    def _poor(self, item: Item, start: int, stop: int) -> bool:
        """Whether a piece has too little to learn."""
        return item.learned(start, stop) * POOR <= stop - start

    def _fill_gap(self, item: Item, start: int, stop: int) -> tuple[int, int] | None:
        """(place in the list, row) where a piece that fits nowhere may be cut to fill an open pack; None: not."""
        if self.overflow != "split" or 2 * len(self._open) < self.buffer or (item.tiles and not item.cuts):
            return None
        # The most room, so that samples are cut into few and large pieces.
        order = sorted(range(len(self._open)), key=lambda n: (self._open[n].tokens, self._open[n].serial))
        for n in order:
            pack = self._open[n]
            row = item.reach(start, self.max_tokens - pack.tokens, self.max_tiles - pack.tiles)
            if start < row < stop and not self._poor(item, start, row) and not self._poor(item, row, stop):
                return n, row
        return None

    # --- placing ---

    def _place(self, item: Item, start: int, stop: int, out: Pushed) -> None:
        """Put a piece that fits into an empty pack where it belongs, and give out what is done."""
        while True:
            piece = item.piece(start, stop)
            at = self._search(piece)
            if at is not None:
                self._add(self._open.pop(at), piece, out)
                return
            gap = self._fill_gap(item, start, stop)
            if gap is None:
                self._serial += 1
                self._add(_Open(self._serial, 0, 0, []), piece, out)
                return
            self.counts.cut += 1
            self._add(self._open.pop(gap[0]), item.piece(start, gap[1]), out)
            start = gap[1]

    def _search(self, piece: Piece) -> int | None:
        """Where the piece fits, by the method."""
        tokens, tiles = self.max_tokens - piece.tokens, self.max_tiles - piece.tiles
        if self.method == "first_fit":
            return next(
                (n for n, pack in enumerate(self._open) if pack.tiles <= tiles and pack.tokens <= tokens),
                None,
            )
        for n in range(bisect_right(self._open, tokens, key=_tokens) - 1, -1, -1):
            if self._open[n].tiles <= tiles:
                return n
        return None

    def _add(self, pack: _Open, piece: Piece, out: Pushed) -> None:
        """Put a piece into a pack that was taken out of the list; the list then holds at most `buffer`."""
        pack.pieces.append(piece)
        pack.tokens += piece.tokens
        pack.tiles += piece.tiles
        if pack.tokens == self.max_tokens or (self.method == "first_fit" and pack.tiles == self.max_tiles):
            out.packs.append(self._done(pack))
            return
        insort(self._open, pack, key=_rank if self.method == "best_fit" else _falling)
        if len(pack.pieces) > 1:
            return  # none was opened: there are no more than before, and none is older
        last = self._overdue() if self.method == "best_fit" else None
        if last is None and len(self._open) > self.buffer:
            last = 0 if self.method == "first_fit" else self._fullest()
        if last is not None:
            out.packs.append(self._done(self._open.pop(last)))

    def _overdue(self) -> int | None:
        """The oldest pack, if it has waited too long."""
        oldest = min(range(len(self._open)), key=lambda n: self._open[n].serial)
        waited = self._serial - self._open[oldest].serial
        return oldest if waited >= PATIENCE * self.buffer else None

    def _fullest(self) -> int:
        """The most tokens, of those at the tile limit if these are more than half of the buffer."""
        at_limit = [n for n, pack in enumerate(self._open) if pack.tiles >= self.max_tiles]
        pool = at_limit if 2 * len(at_limit) > self.buffer else range(len(self._open))
        return max(pool, key=lambda n: _rank(self._open[n]))

    def _done(self, pack: _Open) -> Pack:
        self.counts.packs += 1
        self.counts.tokens += pack.tokens
        self.counts.tiles += pack.tiles
        return Pack(tuple(pack.pieces))


def _tokens(pack: _Open) -> int:
    return pack.tokens


def _rank(pack: _Open) -> tuple[int, int]:
    return pack.tokens, -pack.serial


def _falling(pack: _Open) -> tuple[int, int]:
    return -pack.tiles, pack.serial


# --- before training ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What packing a stream would give.

    Fill is that of the packs that the stream brought forth; what is open at its end (`rest`) would be filled on by more
    samples. A stream that brings forth none is judged by its rest.

    Attributes:
        items: samples that were offered. refused, cut, dropped, lost_rows: as in `Counts`.
        packs: packs of the stream. rest: packs open at its end.
        tokens, tiles: of the packs.
        token_fill, tile_fill: shares of the two limits (tile_fill 0 without a limit).
        samples_per_pack: pieces in a pack.
        seconds: of packing.
    """

    items: int
    refused: int
    cut: int
    dropped: int
    lost_rows: int
    packs: int
    rest: int
    tokens: int
    tiles: int
    token_fill: float
    tile_fill: float
    samples_per_pack: float
    seconds: float

    @property
    def waste(self) -> float:
        """Share of rows that would be padding."""
        return 1 - self.token_fill


def simulate(
    items: Iterable[Item | tuple[int, int]],
    *,
    max_tokens: int,
    max_tiles: int | None,
    buffer: int = 20,
    method: Method = "best_fit",
    overflow: Overflow = "refuse",
) -> Simulation:
    """Pack a stream without any data.

    Args:
        items: samples, or their (tokens, tiles).
        max_tokens, max_tiles, buffer, method, overflow: as of `Packer`.

    Raises:
        DataError: there is no sample that fits.
    """
    packer = Packer(
        max_tokens=max_tokens, max_tiles=max_tiles, buffer=buffer, method=method, overflow=overflow
    )
    given = [item if isinstance(item, Item) else Item((n,), *item) for n, item in enumerate(items)]
    started = time.perf_counter()
    packs = [pack for item in given for pack in packer.push(item).packs]
    seconds = time.perf_counter() - started
    rest = packer.flush()
    shown = packs or rest
    if not shown:
        raise DataError(f"none of {len(given)} samples fits into {max_tokens} tokens: raise --max-tokens")
    tokens, tiles = sum(pack.tokens for pack in shown), sum(pack.tiles for pack in shown)
    counts = packer.counts
    return Simulation(
        items=counts.items,
        refused=counts.refused,
        cut=counts.cut,
        dropped=counts.dropped,
        lost_rows=counts.lost_rows,
        packs=len(packs),
        rest=len(rest),
        tokens=tokens,
        tiles=tiles,
        token_fill=tokens / (len(shown) * max_tokens),
        tile_fill=0.0 if max_tiles is None else tiles / (len(shown) * max_tiles),
        samples_per_pack=sum(len(pack.pieces) for pack in shown) / len(shown),
        seconds=seconds,
    )


EXAMPLE_TILES = (
    *[0] * 16,  # text
    *[1] * 8,
    *[3] * 6,
    *[5] * 4,
    *[7] * 3,
    *[8] * 2,  # eight frames of a video
    13,
)
"""Tiles of 40 samples, of the kinds that InternVL's mixture has: what benchmarks and tests draw from."""


def example_items(
    n: int, *, median: float = 200, sigma: float = 0.9, tokens_per_tile: int = 256, seed: int = 0
) -> list[Item]:
    """N samples as a mixture has them: text of log-normal length, tiles drawn from `EXAMPLE_TILES`.

    Args:
        n: how many. median, sigma: of the text's tokens. tokens_per_tile: rows of a tile, on top of the text.
        seed: of the draws.
    """
    draw = random.Random(seed)
    out = []
    for index in range(n):
        text = max(1, round(draw.lognormvariate(math.log(median), sigma)))
        tiles = draw.choice(EXAMPLE_TILES)
        cuts = ((0, tiles * tokens_per_tile, tiles),) if tiles else ()
        out.append(Item((index,), text + tiles * tokens_per_tile, tiles, cuts))
    return out
