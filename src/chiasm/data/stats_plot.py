"""A picture of what a data set holds: tokens, tiles and shapes of pictures as three histograms, drawn with Pillow.

Drawn at twice its size and reduced, so that edges and letters are smooth. One hue for all bars; what is typical is said
in words under each title, where a reader of a report looks first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from chiasm.data.stats import Bin, SetStats, aspect_bins, length_bins, whole_bins
from chiasm.errors import UsageError

__all__ = ["draw_stats", "save_plot"]

_SCALE = 2
_WIDTH, _HEIGHT = 1320, 430
_WIDEST = 64  # of a bar
_INK, _SOFT, _GRID, _PAPER = "#1f2933", "#66727f", "#e4e8ec", "#ffffff"
_BARS = ("#0072B2", "#009E73", "#D55E00")  # apart for colour-blind readers


def draw_stats(stats: SetStats) -> Image.Image:
    """Three panels side by side, 1320 x 430 pixels, RGB; a panel without data says so."""
    canvas = Image.new("RGB", (_WIDTH * _SCALE, _HEIGHT * _SCALE), _PAPER)
    draw = ImageDraw.Draw(canvas)
    _text(draw, (28, 16), f"{stats.name}: {stats.rows:,} rows", 19, _INK)
    if stats.unusable:
        note = f"{stats.unusable:,} of them cannot be trained on and are not shown"
        _text(draw, (_WIDTH - 28, 20), note, 13, _SOFT, anchor="ra")
    tokens, tiles = stats.tokens, stats.tiles
    panels: list[tuple[str, str, list[Bin]]] = [
        (
            "Tokens of a row",
            f"median {tokens.quantile(0.5):,}, 99 % up to {tokens.quantile(0.99):,}, longest {tokens.high:,}",
            length_bins(tokens),
        ),
        (
            "Tiles of a row",
            f"mean {tiles.mean:.1f}, 99 % up to {tiles.quantile(0.99):,}, most {tiles.high:,}",
            whole_bins(tiles),
        ),
        (
            "Width to height of pictures",
            f"{stats.aspects.n:,} pictures, median {stats.widths.quantile(0.5):,} x "
            f"{stats.heights.quantile(0.5):,} pixels",
            aspect_bins(stats),
        ),
    ]
    room = (_WIDTH - 56 + 36) // 3
    for n, (title, said, bins) in enumerate(panels):
        left = 28 + n * room
        _panel(draw, (left, 60, left + room - 36, _HEIGHT - 18), title, said, bins, _BARS[n])
    return canvas.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS)


def save_plot(stats: SetStats, path: str | Path) -> None:
    """Write `draw_stats` as the picture format of the file's ending.

    Raises:
        UsageError: an unknown ending, or the file cannot be written.
    """
    try:
        draw_stats(stats).save(path)
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"--plot {path}: cannot be written ({reason}): name a PNG file in a folder"
        ) from error


def _panel(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    title: str,
    said: str,
    bins: Sequence[Bin],
    colour: str,
) -> None:
    """One histogram: title, a line of words, a grid of shares, bars, labels under them."""
    left, top, right, bottom = box
    _text(draw, (left, top), title, 16, _INK)
    if not bins:
        _text(draw, (left, top + 24), "none", 13, _SOFT)
        return
    _text(draw, (left, top + 24), said, 13, _SOFT)
    slanted = max(len(one.label) for one in bins) > 3
    floor, ceiling, start = bottom - 74, top + 62, left + 44
    total = sum(one.count for one in bins)
    step = _step(max(one.count for one in bins) / total)
    highest = -(-max(one.count for one in bins) / total // step) * step
    level = 0.0
    while level <= highest + 1e-9:
        y = floor - (floor - ceiling) * level / highest
        _line(draw, (start, y, right, y), _GRID if level else _SOFT)
        _text(draw, (start - 8, y), f"{level:.0%}", 12, _SOFT, anchor="rm")
        level += step
    wide = (right - start) / len(bins)
    for n, one in enumerate(bins):
        x = start + wide * n
        height = (floor - ceiling) * one.count / total / highest
        if one.count:
            height = max(height, 1.5)
            gap = max(min(3.0, wide / 6), (wide - _WIDEST) / 2)
            draw.rounded_rectangle(
                [c * _SCALE for c in (x + gap, floor - height, x + wide - gap, floor)],
                radius=min(3.0, height / 2, wide / 4) * _SCALE,
                fill=colour,
                corners=(True, True, False, False),
            )
        if slanted:
            _slanted(draw, (x + wide / 2, floor + 6), one.label.replace("–", "-"))  # the font has no dash
        else:
            _text(draw, (x + wide / 2, floor + 6), one.label, 12, _SOFT, anchor="ma")


def _step(share: float) -> float:
    """Distance of grid lines: three to six of them up to the highest bar."""
    return next((step for step in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if share / step <= 5), 0.25)


def _font(size: float) -> Any:
    return ImageFont.load_default(size=size * _SCALE)


def _text(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: float,
    colour: str,
    anchor: str = "la",
) -> None:
    draw.text((at[0] * _SCALE, at[1] * _SCALE), text, fill=colour, font=_font(size), anchor=anchor)


def _line(draw: ImageDraw.ImageDraw, ends: tuple[float, float, float, float], colour: str) -> None:
    draw.line([c * _SCALE for c in ends], fill=colour, width=_SCALE)


def _slanted(draw: ImageDraw.ImageDraw, top_right: tuple[float, float], text: str) -> None:
    """A label that rises to the right and ends under its bar."""
    font = _font(11.5)
    x0, y0, x1, y1 = draw.textbbox((0, 0), text, font=font)
    label = Image.new("L", (round(x1 - x0) + 4, round(y1 - y0) + 4), 0)
    ImageDraw.Draw(label).text((2 - x0, 2 - y0), text, fill=255, font=font)
    turned = label.rotate(45, expand=True, resample=Image.Resampling.BICUBIC)
    x, y = round(top_right[0] * _SCALE), round(top_right[1] * _SCALE)
    draw.bitmap((x - turned.width + 6 * _SCALE, y), turned, fill=_SOFT)
