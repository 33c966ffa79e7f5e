"""Which pictures of a sequence are encoded together: from spans to clips, and back to rows.

Source: PVC (2412.09613); fact sheet, section 2.1. Each tile of a picture is a still video of its own. The frames of one
video are one sequence, whose spans stand apart in the text and have one group; where a frame has several tiles, the
tiles at one place are. Host integers only, no tensor is read but the time stamps.

Shape legend: N tiles of a shot, T frames, R copies of each, F = T * R, K tokens of a frame, C width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from chiasm.data.sequence import Sequence, Span
from chiasm.errors import DataError
from chiasm.systems.pvc.config import PVCConfig

__all__ = [
    "ENCODED",
    "Shot",
    "key_of",
    "repeat_times",
    "shots_of",
    "stray_items",
    "video_times",
    "with_repeats",
]


ENCODED = "encoded"
"""Medium of frames whose tokens (N, rows, C) are there already, as a stream has them (`stream.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """What is encoded together: the tiles of one picture, or all frames of one video.

    Attributes:
        media: "image" or "video".
        spans: in order; one of a picture, one a frame of a video.
        tiles: N, as many sequences.
        copies: R.
        times: of each of the T * R frames of a sequence, as the encoder counts them.
    """

    media: str
    spans: tuple[Span, ...]
    tiles: int
    copies: int
    times: tuple[float, ...]

    @property
    def items(self) -> list[int]:
        """Items of `media` in the order in which they are encoded: the first tile of all frames, then the second, …"""
        return [span.first + tile for tile in range(self.tiles) for span in self.spans]

    @property
    def frames(self) -> int:
        """F: frames of each sequence."""
        return len(self.spans) * self.copies

    def rows(self, tokens_FKC: Tensor, order: str) -> list[tuple[Span, Tensor]]:
        """Tokens (N * F, K, C) of this shot -> the rows (length, C) of each span, in the order of the layout."""
        x_NTRKC = tokens_FKC.unflatten(0, (self.tiles, len(self.spans), self.copies))
        if order == "repeat":
            x_NTRKC = x_NTRKC.transpose(0, 2)  # (R, T, N, K, C): all tiles, then all again
        return [(span, x_NTRKC[:, n].flatten(0, 2)) for n, span in enumerate(self.spans)]


def repeat_times(repeats: int, config: PVCConfig) -> tuple[float, ...]:
    """When the repeats of a still picture are.

    Relative times are those of the model's own number of repeats, so that the first two of four are the same whether
    the others follow or not; more repeats than that share the time from 0 to 1 among them.
    """
    if config.temporal.time == "seconds":
        return tuple(n * config.temporal.repeat_seconds for n in range(repeats))
    last = max(1, max(config.repeats, repeats) - 1)
    return tuple(n / last for n in range(repeats))


def video_times(
    seconds: list[float], config: PVCConfig, *, horizon: float | None = None
) -> tuple[float, ...]:
    """When the frames of a video are, given their time stamps in seconds.

    Args:
        horizon: with relative times, how many seconds after the first frame are 1; None: those of the last frame.

    Raises:
        DataError: time stamps fall, or are no numbers.
    """
    if any(not later >= earlier for earlier, later in pairwise(seconds)):
        raise DataError("the time stamps of a video's frames fall: give its frames in order of time")
    since = [when - seconds[0] for when in seconds]
    if config.temporal.time == "seconds":
        return tuple(since)
    last = since[-1] if horizon is None else horizon
    return tuple(when / last if last > 0 else 0.0 for when in since)


def shots_of(sequence: Sequence, config: PVCConfig) -> list[Shot]:
    """The shots of a sequence: its pictures in order, then its videos.

    Raises:
        DataError: frames of one video differ in their number of tiles or repeats, have no time stamps, fall in time or
            are more than the model's horizon; or a span has another number of rows than it is to get.
    """
    found = [_picture(span, config) for span in sequence.spans_of("image")]
    films: dict[int, list[Span]] = {}
    for n, span in enumerate(sequence.spans_of("video")):
        films.setdefault(span.group if span.group >= 0 else -1 - n, []).append(span)
    times_N = None
    if films:
        stamps = sequence.media["video"].times_N
        if stamps is None:
            raise DataError(
                "frames of a video have no time stamps: give MediaBatch.times_N, seconds of every item"
            )
        times_N = stamps.tolist()
    for spans in films.values():
        assert times_N is not None
        found.append(_film(spans, times_N, config))
    for shot in found:
        _check(shot, config)
    return found


def _picture(span: Span, config: PVCConfig) -> Shot:
    times = repeat_times(span.repeats, config)
    return Shot(media="image", spans=(span,), tiles=span.items, copies=span.repeats, times=times)


def _film(spans: list[Span], times_N: list[float], config: PVCConfig) -> Shot:
    first = spans[0]
    for span in spans:
        if (span.items, span.repeats) != (first.items, first.repeats):
            raise DataError(
                f"frames of one video have {first.items} and {span.items} tiles, {first.repeats} and {span.repeats} "
                "repeats: all frames of a video must be cut alike"
            )
    when = video_times([times_N[span.first] for span in spans], config)
    return Shot(
        media="video",
        spans=tuple(spans),
        tiles=first.items,
        copies=first.repeats,
        times=tuple(t for t in when for _ in range(first.repeats)),
    )


def _check(shot: Shot, config: PVCConfig) -> None:
    if shot.frames > config.temporal.max_frames:
        what = (
            f"a video of {len(shot.spans)} frames"
            if shot.media == "video"
            else f"a picture of {shot.copies} repeats"
        )
        remedy = "take fewer frames" if shot.media == "video" else "use fewer repeats"
        raise DataError(
            f"{what} is beyond the model's horizon of {config.temporal.max_frames} frames: {remedy}, or set "
            "temporal.max_frames"
        )
    wanted = shot.tiles * shot.copies * config.tokens_per_tile
    for span in shot.spans:
        if span.length != wanted:
            raise DataError(
                f"the {span.media} at row {span.start} has {span.length} rows, but its {shot.tiles} tile(s) x "
                f"{shot.copies} repeat(s) x {config.tokens_per_tile} tokens are {wanted}: lay it out for this model"
            )


def stray_items(sequence: Sequence) -> dict[str, list[int]]:
    """Items that no span stands for, by medium: those of `Sequence.padded`."""
    out = {}
    for media in ("image", "video"):
        if media in sequence.media:
            shown = {
                item
                for span in sequence.spans_of(media)
                for item in range(span.first, span.first + span.items)
            }
            out[media] = [item for item in range(len(sequence.media[media])) if item not in shown]
    return out


def key_of(shot: Shot, config: PVCConfig) -> str:
    """What the tokens of a shot may be remembered under; "" where an item has no key."""
    if not all(span.key for span in shot.spans):
        return ""
    facts = (shot.media, [s.key for s in shot.spans], shot.tiles, shot.copies, shot.times, config.views)
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def with_repeats(sequence: Sequence, repeats: Mapping[Span, int], config: PVCConfig) -> Sequence:
    """The sequence with fewer repeats of some pictures: the rows of their last repeats are left out.

    Positions are counted anew in every document. What the remaining repeats say does not change: a repeat sees the
    earlier ones only.

    Raises:
        DataError: a span is none of a picture of the sequence, or is to have more repeats than it has, or none; or it
            has more than the model's own number, whose relative times would change with their number.
    """
    keep_T = torch.ones(len(sequence), dtype=torch.bool)
    known = set(sequence.spans_of("image"))
    for span, wanted in repeats.items():
        if span not in known or not 1 <= wanted <= span.repeats:
            raise DataError(
                f"{wanted} repeats of a span that has {span.repeats}: keep 1 to all of a picture's"
            )
        if wanted < span.repeats > config.repeats and config.temporal.time == "relative":
            raise DataError(
                f"{wanted} of {span.repeats} repeats would be at other times: this model's own number is "
                f"{config.repeats}"
            )
        rows = keep_T[span.start : span.start + span.length]
        if config.repeat_order == "repeat":
            rows.view(span.repeats, -1)[wanted:] = False
        else:
            rows.view(span.items, span.repeats, -1)[:, wanted:] = False
    before = [0, *keep_T.cumsum(0).tolist()]
    spans = tuple(
        replace(
            span,
            start=before[span.start],
            length=before[span.start + span.length] - before[span.start],
            repeats=repeats.get(span, span.repeats),
        )
        for span in sequence.spans
    )
    where = keep_T.to(sequence.ids_T.device)
    doc_T = sequence.doc_T[where]
    starts = torch.searchsorted(doc_T, doc_T)  # first row of each row's document
    pos_T = (torch.arange(len(doc_T), device=doc_T.device) - starts).to(sequence.pos_T.dtype)

    def kept(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[where]

    return replace(
        sequence,
        ids_T=sequence.ids_T[where],
        kind_T=sequence.kind_T[where],
        doc_T=doc_T,
        pos_T=pos_T,
        labels_T=kept(sequence.labels_T),
        weight_T=kept(sequence.weight_T),
        spans=spans,
    )
