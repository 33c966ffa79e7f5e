"""``chiasm data pack DATA --simulate``: how full packs will be, before anything is trained.

Rows are measured from headers with the layout of the model that is to be trained (`chiasm.data.layout.measure`), drawn
as the mixture draws them, and packed (`chiasm.data.packing`). Nothing is decoded and nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiasm.cli.terminal import note, one_line, paint, plain_text, waiting
from chiasm.errors import DataError, UsageError

if TYPE_CHECKING:
    from chiasm.data.layout import LayoutSpec
    from chiasm.data.packing import Item, Simulation

__all__ = ["pack_command"]

DRAWS = 20_000
"""Samples that are packed at least: small data are drawn several times, as training does."""
GOOD = 0.95
"""Fill that is worth recommending."""
BAR = 40


def pack_command(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Meta file, annotation file (JSONL, JSON, parquet, tar) or a quoted glob of shards.",
            show_default=False,
        ),
    ],
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Implied: packs are made while training, never ahead.")
    ] = True,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Rows of a pack.")] = 8192,
    max_tiles: Annotated[int, typer.Option(min=0, metavar="N", help="Tiles of a pack; 0: no limit.")] = 24,
    buffer: Annotated[int, typer.Option(min=1, metavar="N", help="Packs open at once.")] = 20,
    method: Annotated[str, typer.Option(metavar="NAME", help="best_fit or first_fit.")] = "best_fit",
    overflow: Annotated[
        str, typer.Option(metavar="NAME", help="refuse, truncate or split what is too long.")
    ] = "refuse",
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="PATH", help="Whose tokenizer, template and tiles: as for chiasm plan."
        ),
    ] = "chiasm-mini",
    root: Annotated[
        str, typer.Option(metavar="FOLDER", help="Where relative paths of pictures and videos start.")
    ] = "",
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Only N rows of each set, evenly spread over it."),
    ] = None,
    resampling: Annotated[
        str, typer.Option(metavar="NAME", help="Shares of sets by length or by its square root (sqrt).")
    ] = "length",
    min_frames: Annotated[
        int, typer.Option(min=1, metavar="N", help="Fewest frames of a video: data.min_frames of the recipe.")
    ] = 8,
    max_frames: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most frames of a video: data.max_frames of the recipe.")
    ] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the order and of the frames.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Simulate packing: fill on both axes before training.

    Exit status 1 if no row can be packed. Rows that cannot be read are named; chiasm data lint says more of them.
    """
    from chiasm.data.packing import Method, Overflow

    _one_of("--method", method, Method)
    _one_of("--overflow", overflow, Overflow)
    if resampling not in ("length", "sqrt"):
        raise UsageError(f"--resampling {resampling!r} is unknown: use length or sqrt")
    if max_frames < min_frames:
        raise UsageError(f"--max-frames {max_frames} is below --min-frames {min_frames}: give both")
    found = _measure(data, root, _as_trained(_layout(model), min_frames, max_frames), limit, resampling, seed)
    setting = _Setting(max_tokens, max_tiles or None, buffer, method, overflow)
    drawn = _draws(found, seed)
    chosen = setting.run(drawn)
    others = _others(setting, drawn, chosen)
    best = next((one for one in [(setting, chosen), *others] if one[1].token_fill >= GOOD), None)
    if best is None:
        best = max([(setting, chosen), *others], key=lambda one: one[1].token_fill)
    if as_json:
        print(json.dumps(_as_json(found, setting, chosen, others, best, len(drawn)), ensure_ascii=False))
    else:
        print("\n".join(_lines(found, setting, chosen, others, best, len(drawn))))


@dataclass(frozen=True, slots=True)
class _Setting:
    max_tokens: int
    max_tiles: int | None
    buffer: int
    method: str
    overflow: str

    def run(self, items: Sequence[Item]) -> Simulation:
        from chiasm.data.packing import simulate

        return simulate(items, **asdict(self))

    def __str__(self) -> str:
        tiles = "" if self.max_tiles is None else f" --max-tiles {self.max_tiles}"
        how = f"--method {self.method} --overflow {self.overflow}"
        return f"--max-tokens {self.max_tokens}{tiles} --buffer {self.buffer} {how}"


@dataclass(slots=True)
class _Found:
    """Measured rows by set, and what could not be."""

    sets: dict[str, list[Item]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    places: dict[tuple[Any, ...], str] = field(default_factory=dict)
    rows: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)

    @property
    def items(self) -> list[Item]:
        return [item for items in self.sets.values() for item in items]


def _one_of(option: str, value: str, names: Any) -> None:
    from typing import get_args

    if value not in get_args(names):
        raise UsageError(f"{option} {value!r} is unknown: use {', '.join(get_args(names))}")


def _layout(model: str) -> LayoutSpec:
    """How the model lays out; a note where its tokenizer is not at hand."""
    from chiasm.cli.plan import layout_of

    spec, notes = layout_of(model)
    for text in notes:
        note(text)
    return spec


def _as_trained(spec: LayoutSpec, min_frames: int, max_frames: int) -> LayoutSpec:
    """The layout with videos as the recipes of releases draw and spell them (`chiasm.train.meta_data`)."""
    from dataclasses import replace

    from chiasm.media.frames import FrameSampling

    frames = FrameSampling(mode="rand", frames=None, min_frames=min_frames, max_frames=max_frames)
    return replace(spec, sampling=frames, frame_tags="training")


def _measure(data: str, root: str, spec: LayoutSpec, limit: int | None, resampling: Any, seed: int) -> _Found:
    """Measure the rows of all sets."""
    from chiasm.data.datasets import mixture_weights, read_specs
    from chiasm.data.feed import BAD
    from chiasm.data.layout import measure
    from chiasm.data.mixture import derive_seed
    from chiasm.data.packing import Item

    specs = read_specs(data, root=root)
    opened = {name: own.open(name) for name, own in specs.items()}
    found = _Found(weights=mixture_weights(opened, specs, resampling=resampling))
    with waiting(f"measuring {data}"):
        for name, rows in opened.items():
            size = len(rows)
            taken = min(size, limit or size)
            own = spec.limited(specs[name].max_tiles)
            items = found.sets.setdefault(name, [])
            for index in (n * size // taken for n in range(taken)):
                found.rows += 1
                try:
                    frames = derive_seed(seed, "frames", name, index)
                    item = Item.of((name, index), measure(rows.record(index), own, train=True, seed=frames))
                except BAD as error:
                    where = rows.where(index)
                    found.bad.append((where, one_line(str(error)).removeprefix(where).lstrip(": ")))
                else:
                    items.append(item)
                    found.places[item.key] = rows.where(index)
    if not found.items:
        reason = f": {found.bad[0][0]}: {found.bad[0][1]}" if found.bad else ""
        raise DataError(f"none of the {found.rows} rows of {data} can be trained on{reason}")
    return found


def _draws(found: _Found, seed: int) -> list[Item]:
    """The rows in the order in which a mixture draws them."""
    from chiasm.data.mixture import Mixture

    sizes = {name: len(items) for name, items in found.sets.items() if items}
    weights = {name: found.weights[name] for name in sizes}
    mixture = Mixture(sizes, weights, batch=1, seed=seed)
    places = map(mixture.draw, range(max(DRAWS, sum(sizes.values()))))
    return [found.sets[name][index] for name, index in places]


def _others(
    setting: _Setting, drawn: Sequence[Item], chosen: Simulation
) -> list[tuple[_Setting, Simulation]]:
    """Settings near the given one, those that change least first."""
    from dataclasses import replace

    tokens, tiles = sum(item.tokens for item in drawn), sum(item.tiles for item in drawn)
    even = max(1, -(-21 * setting.max_tokens * tiles // (20 * tokens)))
    largest = max((block[2] for item in drawn for block in item.cuts), default=1)
    near = [replace(setting, method="best_fit"), replace(setting, method="best_fit", buffer=50)]
    if setting.max_tiles is not None and chosen.tile_fill > chosen.token_fill:
        near.append(replace(near[0], max_tiles=max(even, largest)))
    near.append(replace(near[0], overflow="split"))
    if len(near) > 3:
        near.append(replace(near[2], overflow="split"))
    return [(one, one.run(drawn)) for one in dict.fromkeys(near) if one != setting]


# --- printing -------------------------------------------------------------------------------------------------


def _too_long(found: _Found, setting: _Setting) -> list[Item]:
    tiles = setting.max_tiles or float("inf")
    long = [item for item in found.items if item.tokens > setting.max_tokens or item.tiles > tiles]
    return sorted(long, key=lambda item: (-item.tokens, item.key))


def _summary(values: Sequence[int]) -> dict[str, float]:
    ordered = sorted(values)
    at = {name: ordered[int(share * (len(ordered) - 1))] for name, share in (("median", 0.5), ("p95", 0.95))}
    return {"mean": round(sum(ordered) / len(ordered), 1), **at, "max": ordered[-1]}


def _bins(values: Sequence[int]) -> list[tuple[str, int]]:
    """Counts between powers of two, zero apart."""
    counts: dict[int, int] = {}
    for value in values:
        counts[value.bit_length()] = counts.get(value.bit_length(), 0) + 1
    out = []
    for power in range(min(counts), max(counts) + 1):
        low, high = (1 << power >> 1), (1 << power) - 1
        out.append((f"{low}" if low >= high else f"{low}-{high}", counts.get(power, 0)))
    return out


def _bars(title: str, bins: Sequence[tuple[str, int]]) -> list[str]:
    room, most = max(len(label) for label, _ in bins), max(count for _, count in bins)
    width = len(f"{most:,}")
    return [title] + [
        f"  {label:>{room}}  {count:>{width},} {'█' * -(-BAR * count // most)}".rstrip()
        for label, count in bins
    ]


def _as_json(
    found: _Found,
    setting: _Setting,
    chosen: Simulation,
    others: Sequence[tuple[_Setting, Simulation]],
    best: tuple[_Setting, Simulation],
    draws: int,
) -> dict[str, Any]:
    items, long = found.items, _too_long(found, setting)

    def told(one: Simulation) -> dict[str, Any]:
        # Times differ from run to run; the rest does not.
        return {k: v for k, v in asdict(one).items() if k != "seconds"} | {"waste": one.waste}

    return {
        "rows": found.rows,
        "usable": len(items),
        "bad": [{"where": where, "reason": reason} for where, reason in found.bad],
        "too_long": [
            {"where": found.places[item.key], "tokens": item.tokens, "tiles": item.tiles} for item in long
        ],
        "tokens": _summary([item.tokens for item in items]) | {"bins": _bins([i.tokens for i in items])},
        "tiles": _summary([item.tiles for item in items]) | {"bins": _bins([i.tiles for i in items])},
        "draws": draws,
        "settings": asdict(setting),
        "simulation": told(chosen),
        "others": [{"settings": asdict(one), "simulation": told(result)} for one, result in others],
        "recommended": asdict(best[0]) | {"token_fill": best[1].token_fill, "tile_fill": best[1].tile_fill},
    }


def _lines(
    found: _Found,
    setting: _Setting,
    chosen: Simulation,
    others: Sequence[tuple[_Setting, Simulation]],
    best: tuple[_Setting, Simulation],
    draws: int,
) -> list[str]:
    items, long = found.items, _too_long(found, setting)
    tokens, tiles = [item.tokens for item in items], [item.tiles for item in items]
    lines = [f"{found.rows:,} rows of {len(found.sets)} set(s), {len(items):,} usable"]
    for where, reason in found.bad[:3]:
        lines.append(plain_text(f"  left out: {where}: {reason}"))
    if len(found.bad) > 3:
        lines.append(f"  and {len(found.bad) - 3:,} more: chiasm data lint names them all")
    lines += ["", *_bars("tokens of a row", _bins(tokens)), "", *_bars("tiles of a row", _bins(tiles)), ""]
    fate = {"refuse": "left out", "truncate": "truncated", "split": "split"}[setting.overflow]
    lines.append(
        f"too long: {len(long):,} ({len(long) / len(items):.2%}), {fate}"
        + (f"; the longest has {max(tokens):,} tokens, the most tiles are {max(tiles)}" if long else "")
    )
    for item in long[:3]:
        lines.append(plain_text(f"  {found.places[item.key]}: {item.tokens:,} tokens, {item.tiles} tiles"))
    lines += ["", f"{draws:,} draws, {setting}"]
    lines.append(paint(f"  fill: {chosen.token_fill:.1%} of the tokens", "bold") + _tiles(setting, chosen))
    lines.append(
        f"  {chosen.packs:,} packs of {chosen.samples_per_pack:.1f} samples; {chosen.waste:.1%} of the rows would be "
        "padding"
    )
    if chosen.cut or chosen.dropped:
        lines.append(
            f"  {chosen.cut:,} cuts, {chosen.dropped:,} pieces dropped, {chosen.lost_rows:,} rows lost"
        )
    if others:
        lines += ["", "other settings"]
        lines += [
            f"  {result.token_fill:6.1%} of the tokens{_tiles(one, result)}: {one}" for one, result in others
        ]
    same = " (as given)" if best[0] == setting else ""
    lines += ["", f"recommended{same}: {best[0]}"]
    if best[1].token_fill < GOOD:
        lines.append(
            f"  no setting near it fills {GOOD:.0%}: raise --max-tokens, or --max-tiles where tiles are what is full"
        )
    return lines


def _tiles(setting: _Setting, result: Simulation) -> str:
    return "" if setting.max_tiles is None else f", {result.tile_fill:.1%} of the tiles"
