"""Plots of claims as SVG, written by hand: every seed a dot, means, intervals, and the line that had to be passed.

Why no plotting library: a report must look the same on every machine and its changes must be readable, so its plots
are text, compared to the byte in the tests, need no extra, and browsers and code hosts show them as they are.

Legend: left panel, the compared sides (dots of one seed are joined); right panel, the effect of every seed
with its mean
and interval. Colours are those of the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from chiasm.lab.claim import Claim
from chiasm.lab.verdict import Judgement

__all__ = ["plot"]

WIDTH, HEIGHT, TOP, BOTTOM = 720, 300, 40, 50
LEFT = (70, 430)
RIGHT = (530, 690)
COLOUR = {"holds": "#1a7f37", "does not hold": "#cf222e", "inconclusive": "#9a6700", "invalid": "#6e7781"}


def plot(claim: Claim, judged: Judgement, title: str | None = None) -> str:
    """Return an SVG of a claim's values and effects; of an invalid claim the values alone."""
    rows = [judged.values.get(str(side), []) for side in claim.sides]
    finite = [v for row in rows for v in row if math.isfinite(v)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="11" fill="#24292f">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="12" y="20" font-size="13">{escape(title or claim.id)}: '
        f'<tspan font-weight="bold" fill="{COLOUR[judged.verdict]}">{judged.verdict}</tspan></text>',
    ]
    if finite:
        bounds = [claim.margin] if claim.kind == "exact" and claim.margin else []
        parts += _values(claim, rows, _Axis(finite + [b for b in bounds if b is not None], *LEFT))
    if judged.effect and claim.kind != "exact":
        parts += _effects(claim, judged)
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Axis:
    """A vertical scale with round ticks over a panel from x = left to x = right."""

    def __init__(self, values: Sequence[float], left: int, right: int) -> None:
        self.left, self.right = left, right
        low, high = min(values), max(values)
        span = (high - low) or abs(high) or 1.0
        step = _round_step(span / 4)
        self.low = math.floor((low - 0.05 * span) / step) * step
        self.high = math.ceil((high + 0.05 * span) / step) * step
        count = round((self.high - self.low) / step)
        self.ticks = [self.low + i * step for i in range(count + 1)]

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def draw(self) -> list[str]:
        lines = []
        for tick in self.ticks:
            y = self.y(tick)
            lines.append(f'<path d="M{self.left} {y}H{self.right}" stroke="#d0d7de"/>')
            lines.append(f'<text x="{self.left - 6}" y="{y + 4}" text-anchor="end">{_number(tick)}</text>')
        return lines


def _values(claim: Claim, rows: list[list[float]], axis: _Axis) -> list[str]:
    parts = axis.draw()
    width = (axis.right - axis.left) / len(rows)
    xs = [round(axis.left + width * (n + 0.5), 1) for n in range(len(rows))]
    seeds = max(map(len, rows))
    for seed in range(seeds):
        points = [
            (x, axis.y(row[seed]))
            for x, row in zip(xs, rows, strict=True)
            if seed < len(row) and math.isfinite(row[seed])
        ]
        if len(points) > 1:
            path = " ".join(f"{x},{y}" for x, y in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="#afb8c1"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="#0969da" fill-opacity="0.7"/>' for x, y in points]
    for x, row, side in zip(xs, rows, claim.compare, strict=True):
        good = [v for v in row if math.isfinite(v)]
        if good:
            y = axis.y(math.fsum(good) / len(good))
            parts.append(f'<path d="M{x - 16} {y}H{x + 16}" stroke="#24292f" stroke-width="2"/>')
        arm, _, metric = side.partition(":")
        parts.append(f'<text x="{x}" y="{HEIGHT - 32}" text-anchor="middle">{escape(arm)}</text>')
        parts.append(
            f'<text x="{x}" y="{HEIGHT - 18}" text-anchor="middle" fill="#6e7781">{escape(metric)}</text>'
        )
    return parts


def _effects(claim: Claim, judged: Judgement) -> list[str]:
    zero = 1.0 if claim.kind == "ratio" else 0.0
    m = claim.margin
    lines = [claim.delta] if m is None else ([-m, m] if claim.kind == "equivalent" else [-m])
    wanted = [float(line) for line in lines if line is not None]
    e = judged.estimate
    ends = [] if e is None else [e.mean, *(b for b in (e.low, e.high) if math.isfinite(b))]
    axis = _Axis([*judged.effect, zero, *wanted, *ends], *RIGHT)
    parts = axis.draw()
    parts.append(f'<path d="M{axis.left} {axis.y(zero)}H{axis.right}" stroke="#24292f"/>')
    parts += [
        f'<path d="M{axis.left} {axis.y(line)}H{axis.right}" stroke="#8250df" stroke-dasharray="5 4"/>'
        for line in wanted
    ]
    dots, bar = axis.left + 45, axis.left + 100
    parts += [
        f'<circle cx="{dots}" cy="{axis.y(v)}" r="3.5" fill="#0969da" fill-opacity="0.7"/>'
        for v in judged.effect
    ]
    if e is not None:
        low, high = max(e.low, axis.low), min(e.high, axis.high)
        colour = COLOUR[judged.verdict]
        parts.append(
            f'<path d="M{bar} {axis.y(low)}V{axis.y(high)}M{bar - 6} {axis.y(low)}H{bar + 6}'
            f'M{bar - 6} {axis.y(high)}H{bar + 6}" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<circle cx="{bar}" cy="{axis.y(e.mean)}" r="5" fill="{colour}"/>')
    what = {"ratio": "ratio", "monotone": "last - first"}.get(claim.kind, "difference")
    middle = (axis.left + axis.right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 32}" text-anchor="middle">{what}, 95 %</text>')
    return parts


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)


def _number(value: float) -> str:
    return f"{0.0 if abs(value) < 1e-12 else value:.3g}"
