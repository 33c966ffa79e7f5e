"""Layout: from messages to the Sequence that a model reads.

Source: fact sheet InternVL 2.5, sections 2.9 (templates, image expansion, label masks) and 3.3 (tile budget); fact
sheet PVC, section 2.1 (repeats).

Every picture becomes `<img>`, then K rows of `<IMG_CONTEXT>` for each of its tiles (row by row, thumbnail last), then
`</img>`. Only the context rows stand for media (`kind_T == IMAGE`); an embedder overwrites them. One function lays
out training and inference, so the text that a model is asked is the text that it was taught.

A model that encodes a still picture as a short video of equal frames (PVC) takes R * K rows a tile
(`LayoutSpec.repeats`). The tiles lie in the media once, the picture stays one Span, which says how often (`repeats`).

A video becomes its sampled frames, each a picture of one tile with a tag of its own ("Frame1: ", spelled as
`LayoutSpec.frame_tags` says), numbered anew in every video. Frames are media of their own, media["video"] with the
time of each, `kind_T == VIDEO`, one Span a frame; the spans of one video have one `group`. They take no part in the
tile budget of the pictures. With `LayoutSpec.frame_tiles` a frame has up to so many tiles, cut by the same policy; the
size of the first frame decides for the whole video, and a video that changes its size is refused.

Rules
- The texts of a conversation must not spell `<img>`, `</img>` or `<IMG_CONTEXT>`, in any turn: such rows would claim
  to be a picture. They are refused by name. Other special tokens in a text (`<|im_end|>`) keep their meaning, as in
  the released code; who serves strangers and does not want that filters them before.
- Nothing is ever cut off. What does not fit in `max_length` is an error that says what would help.
- Counting (`count_tokens`, `measure`) and laying out share all code but the pixels, so they agree on every sequence.
  What a video has to offer is known from its time stamps; its frames are decoded when it is certain that they fit.

Training asks for more than inference, sample by sample: another tile limit (`max_tiles`, that of its data set), a seed
for frames that are drawn at random, and a change of the cut tiles (`augment`, JPEG). They are arguments, not fields of
the spec: one spec serves all samples. `measure` takes the first two, so that it counts what will be laid out.

Legend: T rows, K rows a tile, R repeats, N tiles of all pictures, F tiles of all frames of all videos, S side of a
tile in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from chiasm.data.layout_spec import LayoutSpec, RepeatOrder, Shot
from chiasm.data.message import Part, Turn, parse_messages, spell_turn
from chiasm.data.sequence import IMAGE, TEXT, VIDEO, MediaBatch, Sequence, Span
from chiasm.errors import ConfigError, ContextOverflowError, DataError, ImageError, TemplateError
from chiasm.media.image import open_image
from chiasm.media.size import image_size
from chiasm.media.video import Video, open_video
from chiasm.nn.losses import token_weights
from chiasm.text.labels import encode_pieces, official_labels, shift
from chiasm.text.templates import Piece, join

__all__ = [
    "Augment",
    "Block",
    "LayoutSpec",
    "Measure",
    "RepeatOrder",
    "Shot",
    "check_length",
    "count_shots",
    "count_tokens",
    "layout",
    "measure",
    "prompt_pieces",
    "prompt_text",
]

Augment = Callable[[Tensor], Tensor]
"""The uint8 tiles (N, 3, S, S) of one picture or one frame -> the same shape, changed."""


Block = tuple[int, int, int]
"""(first row, rows, tiles) of one picture or frame with its start and end token: what must not be cut."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What a conversation will take, known from headers: `measure`.

    Attributes:
        tokens: T.
        tiles: tiles of all pictures and of all frames of all videos, each once however often it is encoded.
        learned: rows that carry a label.
        cuts: the blocks that must not be cut, in order; between them a document may be cut at any row.
        runs: (first, end) of every run of rows that carry labels, in order: one for each answer.
    """

    tokens: int
    tiles: int
    learned: int
    cuts: tuple[Block, ...] = ()
    runs: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class _Rows:
    """A laid-out conversation without its pixels. `starts` are the first context rows of each picture and frame, in
    reading order, `kinds` says which of the two it is.
    """

    ids: list[int]
    learned: list[bool]
    starts: list[int]
    lengths: list[int]
    kinds: list[str]

    def places(self, kind: str) -> list[tuple[int, int]]:
        """(start, length) of every picture or of every frame."""
        return [
            (start, length)
            for start, length, own in zip(self.starts, self.lengths, self.kinds, strict=True)
            if own == kind
        ]


@dataclass(slots=True)
class _Films:
    """The opened videos of a conversation and the indices of the frames to take, in reading order."""

    videos: list[Video] = field(default_factory=list)
    plans: list[list[int]] = field(default_factory=list)

    def shots(self, spec: LayoutSpec) -> list[Shot]:
        """Frames of each video and tiles of each of them; a first frame is decoded where that decides."""
        for video, plan in zip(self.videos, self.plans, strict=True):
            _check_frames(len(plan), spec, video.name)
        return [
            (len(plan), 1) if spec.frame_tiles == 1 else spec.shot(len(plan), video.size)
            for video, plan in zip(self.videos, self.plans, strict=True)
        ]

    def batch(self, spec: LayoutSpec, augment: Augment | None) -> tuple[MediaBatch, list[Shot]]:
        """Decode: (F, 3, S, S) with times, and for each frame the number of its video and its tiles.

        One frame after the other is cut, so that no more than one is held in full size.
        """
        data: list[Tensor] = []
        times: list[float] = []
        places: list[tuple[int, int]] = []
        for n, (video, plan) in enumerate(zip(self.videos, self.plans, strict=True)):
            for image, when in video.each(plan):
                if spec.frame_tiles > 1 and image.size != video.size:
                    (width, height), (wide, high) = video.size, image.size
                    raise ImageError(
                        f"{video.name}: its frames have {width}x{height} pixels, but {wide}x{high} at {when:.2f} s: "
                        "they cannot share one tiling; convert it to one size, or take one tile a frame"
                    )
                tiles_N3SS = _augmented(spec.tiles.tile(image, spec.frame_tiles), augment)
                data.append(tiles_N3SS)
                times += [when] * len(tiles_N3SS)
                places.append((n, len(tiles_N3SS)))
        return MediaBatch(torch.cat(data), torch.tensor(times, dtype=torch.float64)), places


def layout(
    messages: Any,
    spec: LayoutSpec,
    *,
    train: bool = False,
    generate: bool | None = None,
    opener: Callable[..., Image] = open_image,
    video_opener: Callable[..., Video] = open_video,
    max_tiles: int | None = None,
    seed: int | None = None,
    augment: Augment | None = None,
) -> Sequence:
    """Lay out a conversation as one document.

    Args:
        messages: anything that `parse_messages` reads.
        spec: the rules.
        train: make labels and loss weights; answers are learned with their stop token.
        generate: append the header of an answer. Default: when the last turn is the user's and this is not training.
        opener: opens a picture, called as `opener(source, orient=...)`. A server passes one that refuses paths.
        video_opener: opens a video, called as `video_opener(source, folder_fps=...)`; likewise.
        max_tiles: instead of the spec's own limit of tiles.
        seed: of frames that are drawn at random (sampling mode "rand"); a part's own wins.
        augment: changes the tiles of each picture and each frame, called once for each in reading order, videos first.
            Keys are those of the changed tiles.

    Returns:
        A Sequence with media["image"] (N, 3, S, S) uint8 if there are pictures and media["video"] (F, 3, S, S) uint8
        with times if there are videos; one Span a picture and one a frame, whose key is a hash of its tiles. Pictures
        have group -1: each tile stands for itself. Tiles of one frame have one time.

    Raises:
        DataError: malformed messages, a reserved token in a text, parts that are no text or user's picture, or, in
            training, no answer to learn.
        TemplateError: the tokenizer lacks the image tokens.
        ImageError: a picture or video cannot be read.
        ConfigError: a video part asks for frames in a way that cannot be.
        MissingExtraError: a video needs PyAV.
        ContextOverflowError: T is above `max_length`, or the frames of a video above `max_frames`.
    """
    turns, spec = parse_messages(messages), spec.limited(max_tiles)
    spans: list[Span] = []
    media: dict[str, MediaBatch] = {}
    images = [opener(part.value, orient=spec.tiles.orient) for part in _media(turns)["image"]]
    counts = spec.tiles.counts(image.size for image in images)
    with ExitStack() as opened:
        films = _open_films(turns, spec, video_opener, opened, seed)
        shots = films.shots(spec)
        rows = _lay_rows(turns, spec, counts, shots, train, generate)
        _check_length(rows, spec, counts, shots)
        if train:
            _check_learned(rows)
        if films.videos:
            batch, frames = films.batch(spec, augment)
            first = 0
            for (group, items), (start, length) in zip(frames, rows.places("video"), strict=True):
                spans.append(
                    Span(
                        media="video",
                        start=start,
                        length=length,
                        first=first,
                        items=items,
                        key=_key(batch.data[first : first + items]),
                        group=group,
                        repeats=spec.video_repeats,
                    )
                )
                first += items
            media["video"] = batch
    if images:
        limit = spec.tiles.budget(len(images))
        tiles = [_augmented(spec.tiles.tile(image, limit), augment) for image in images]
        firsts = accumulate((len(group) for group in tiles), initial=0)
        for group, first, (start, length) in zip(tiles, firsts, rows.places("image"), strict=False):
            spans.append(
                Span(
                    media="image",
                    start=start,
                    length=length,
                    first=first,
                    items=len(group),
                    key=_key(group),
                    repeats=spec.repeats,
                )
            )
        media["image"] = MediaBatch(torch.cat(tiles) if len(tiles) > 1 else tiles[0])
    T = len(rows.ids)
    kind_T = torch.full((T,), TEXT, dtype=torch.int8)
    for span in spans:
        kind_T[span.start : span.start + span.length] = VIDEO if span.media == "video" else IMAGE
    labels_T = weight_T = None
    doc_T = torch.zeros(T, dtype=torch.int32)
    if train:
        labels_T = torch.tensor(shift(official_labels(rows.ids, rows.learned)), dtype=torch.int64)
        weight_T = token_weights(labels_T, doc_T, spec.loss_power, spec.loss_count)
    return Sequence(
        ids_T=torch.tensor(rows.ids, dtype=torch.int64),
        kind_T=kind_T,
        doc_T=doc_T,
        pos_T=torch.arange(T, dtype=torch.float32),
        labels_T=labels_T,
        weight_T=weight_T,
        spans=tuple(sorted(spans, key=lambda span: span.start)),
        media=media,
    )


def count_tokens(
    messages: Any,
    spec: LayoutSpec,
    *,
    sizes: Iterable[tuple[int, int]] | None = None,
    frames: Iterable[int | Shot] | None = None,
    train: bool = False,
    generate: bool | None = None,
    opener: Callable[..., Image] | None = None,
    video_opener: Callable[..., Video] = open_video,
) -> int:
    """T of `layout(messages, spec, …)` without decoding a picture; not limited by `max_length`.

    Args:
        messages: anything that `parse_messages` reads.
        spec: the rules.
        sizes: (width, height) in pixels of every picture in order, upright; default: read from the pictures' headers,
            or from the pictures as `opener` opens them.
        frames: how many are taken of every video in order, or (frames, tiles of a frame) where the spec allows
            several; default: from the videos' time stamps and the size of their first frame.
        train: as in `layout`.
        generate: as in `layout`.
        opener: as in `layout`; pictures are decoded for it.
        video_opener: as in `layout`.
    """
    turns = parse_messages(messages)
    counts, shots = _count_tiles(turns, spec, sizes, opener), _count_shots(turns, spec, frames, video_opener)
    return len(_lay_rows(turns, spec, counts, shots, train, generate).ids)


def measure(
    messages: Any,
    spec: LayoutSpec,
    *,
    sizes: Iterable[tuple[int, int]] | None = None,
    frames: Iterable[int | Shot] | None = None,
    train: bool = False,
    generate: bool | None = None,
    opener: Callable[..., Image] | None = None,
    video_opener: Callable[..., Video] = open_video,
    max_tiles: int | None = None,
    seed: int | None = None,
) -> Measure:
    """Count what `layout` with the same arguments will make, from headers; not limited by `max_length`.

    Arguments are as of `count_tokens`; `max_tiles` and `seed` as of `layout`. Damage behind a picture's header goes
    unnoticed here, all other errors of `layout` are raised.
    """
    turns, spec = parse_messages(messages), spec.limited(max_tiles)
    counts = _count_tiles(turns, spec, sizes, opener)
    shots = _count_shots(turns, spec, frames, video_opener, seed)
    rows = _lay_rows(turns, spec, counts, shots, train, generate)
    if train:
        _check_learned(rows)
    runs = _runs(rows.learned) if train else ()
    cuts = tuple(
        (start - 1, length + 2, length // (spec.image_rows if kind == "image" else spec.frame_rows))
        for start, length, kind in zip(rows.starts, rows.lengths, rows.kinds, strict=True)
    )
    return Measure(
        tokens=len(rows.ids),
        tiles=sum(tiles for *_, tiles in cuts),
        learned=sum(end - first for first, end in runs),
        cuts=cuts,
        runs=runs,
    )


def check_length(
    messages: Any,
    spec: LayoutSpec,
    *,
    sizes: Iterable[tuple[int, int]] | None = None,
    frames: Iterable[int | Shot] | None = None,
    train: bool = False,
    generate: bool | None = None,
    opener: Callable[..., Image] | None = None,
    video_opener: Callable[..., Video] = open_video,
) -> None:
    """Raise the ContextOverflowError that `layout` would, without decoding; arguments as of `count_tokens`."""
    turns = parse_messages(messages)
    counts, shots = _count_tiles(turns, spec, sizes, opener), _count_shots(turns, spec, frames, video_opener)
    _check_length(_lay_rows(turns, spec, counts, shots, train, generate), spec, counts, shots)


def prompt_text(
    messages: Any,
    spec: LayoutSpec,
    *,
    frames: Iterable[int | Shot] | None = None,
    train: bool = False,
    generate: bool | None = None,
    video_opener: Callable[..., Video] = open_video,
) -> str:
    """The text that is tokenised, each picture and frame written as start, one context and end token; no begin token.

    `frames` are as in `count_tokens`, `video_opener` as in `layout`.
    """
    return join(
        prompt_pieces(
            messages, spec, frames=frames, train=train, generate=generate, video_opener=video_opener
        )
    )


def prompt_pieces(
    messages: Any,
    spec: LayoutSpec,
    *,
    frames: Iterable[int | Shot] | None = None,
    train: bool = False,
    generate: bool | None = None,
    video_opener: Callable[..., Video] = open_video,
) -> list[Piece]:
    """The text of `prompt_text` in the pieces that are tokenised apart, each with whether it is learned."""
    turns = parse_messages(messages)
    shots = _count_shots(turns, spec, frames, video_opener)
    return _render(turns, spec, shots, train, generate)[0]


def count_shots(
    messages: Any,
    spec: LayoutSpec,
    *,
    video_opener: Callable[..., Video] = open_video,
    seed: int | None = None,
) -> list[Shot]:
    """(frames, tiles of a frame) that `layout` takes of every video, in order; also what `frames` may be elsewhere.

    Nothing is decoded but, where the spec allows several tiles, the first frame of each.
    """
    return _count_shots(parse_messages(messages), spec, None, video_opener, seed)


def _media(turns: list[Turn]) -> dict[str, list[Part]]:
    """The image and video parts in reading order; DataError for parts that cannot be laid out."""
    for n, turn in enumerate(turns):
        for part in turn.parts:
            if part.kind in ("image", "video") and turn.role != "user":
                what, whats = ("picture", "pictures") if part.kind == "image" else ("video", "videos")
                raise DataError(
                    f"messages[{n}]: a {what} in a turn of role {turn.role}: only users show {whats}"
                )
            if part.kind not in ("text", "image", "video"):
                raise DataError(f"messages[{n}]: {part.kind} parts cannot be laid out: write it as text")
    return {
        "image": [part for turn in turns for part in turn.of_kind("image")],
        "video": [part for turn in turns for part in turn.of_kind("video")],
    }


def _check_learned(rows: _Rows) -> None:
    if not any(rows.learned):
        raise DataError("nothing to learn: a training conversation needs an assistant turn")


def _runs(learned: list[bool]) -> tuple[tuple[int, int], ...]:
    """Runs of rows that carry a label: row t does where token t + 1 is learned (see `shift`)."""
    flags, out = bytes(learned[1:]), []
    end = 0
    while (first := flags.find(1, end)) >= 0:
        end = flags.find(0, first)
        end = len(flags) if end < 0 else end
        out.append((first, end))
    return tuple(out)


def _augmented(tiles_N3SS: Tensor, augment: Augment | None) -> Tensor:
    """The tiles as `augment` changes them; ConfigError where it gives something else than tiles."""
    if augment is None:
        return tiles_N3SS
    changed = augment(tiles_N3SS)
    if changed.shape != tiles_N3SS.shape or changed.dtype != tiles_N3SS.dtype:
        raise ConfigError(
            f"augment turned tiles {tuple(tiles_N3SS.shape)} of {tiles_N3SS.dtype} into {tuple(changed.shape)} of "
            f"{changed.dtype}: it must keep both"
        )
    return changed


def _open_films(
    turns: list[Turn],
    spec: LayoutSpec,
    opener: Callable[..., Video],
    opened: ExitStack,
    seed: int | None = None,
) -> _Films:
    """Open every video, to be closed with `opened`, and choose its frames; nothing is decoded."""
    films = _Films()
    for part in _media(turns)["video"]:
        sampling = spec.frame_sampling(part, seed)
        video = opened.enter_context(opener(part.value, folder_fps=sampling.folder_fps))
        # Who gives a list of pictures has chosen them; a sampling of the part's own chooses among them again. Their
        # rate says when they are, not which.
        as_given = video.whole and not set(part.sampling) - {"folder_fps"}
        films.videos.append(video)
        films.plans.append(list(range(len(video))) if as_given else video.plan(sampling))
    return films


def _count_tiles(
    turns: list[Turn],
    spec: LayoutSpec,
    given: Iterable[tuple[int, int]] | None,
    opener: Callable[..., Image] | None,
) -> list[int]:
    """Tiles of each picture, from the sizes as told or as found."""
    pictures = _media(turns)["image"]
    if given is None and opener is not None:
        given = [opener(part.value, orient=spec.tiles.orient).size for part in pictures]
    elif given is None:
        given = [image_size(part.value, orient=spec.tiles.orient) for part in pictures]
    found = list(given)
    if len(found) != len(pictures):
        raise DataError(f"{len(pictures)} picture(s) but {len(found)} size(s): give one (width, height) each")
    return spec.tiles.counts(found)


def _count_shots(
    turns: list[Turn],
    spec: LayoutSpec,
    given: Iterable[int | Shot] | None,
    opener: Callable[..., Video],
    seed: int | None = None,
) -> list[Shot]:
    """Frames of each video and tiles of each of them, as told or as found."""
    if given is None:
        with ExitStack() as opened:
            return _open_films(turns, spec, opener, opened, seed).shots(spec)
    found, videos = list(given), _media(turns)["video"]
    if len(found) != len(videos):
        raise DataError(f"{len(videos)} video(s) but {len(found)} number(s) of frames: give one each")
    if spec.frame_tiles > 1 and any(isinstance(shot, int) for shot in found):
        raise DataError(
            f"frames may have up to {spec.frame_tiles} tiles here: give (frames, tiles of a frame) of each video"
        )
    shots = [(shot, 1) if isinstance(shot, int) else shot for shot in found]
    for n, (count, _) in enumerate(shots, 1):
        _check_frames(count, spec, f"video {n}")
    return shots


def _check_frames(count: int, spec: LayoutSpec, name: str) -> None:
    if spec.max_frames is not None and count > spec.max_frames:
        raise ContextOverflowError(
            f"{name}: {count} frames are taken but the model looks at {spec.max_frames} at most: take fewer frames "
            "(frames, max_frames or fps of the sampling), or a shorter clip"
        )


def _render(
    turns: list[Turn], spec: LayoutSpec, shots: list[Shot], train: bool, generate: bool | None
) -> tuple[list[Piece], list[str]]:
    """Spell the conversation with one context token a picture or frame; the kinds say which of the two each is."""
    picture = "".join(spec.image_tokens)
    spoken: list[tuple[str, str]] = []
    kinds: list[str] = []
    left = iter(shots)
    seen = 0
    for n, turn in enumerate(turns):
        for token in spec.image_tokens:
            if token in turn.text:
                raise DataError(
                    f"messages[{n}]: its text contains {token}, which is reserved for pictures: remove it"
                )
        spelled = spell_turn(turn, before=seen, numbered=spec.template.numbered, where=f"messages[{n}]")
        seen += len(turn.of_kind("image"))
        text, closed = "", False
        for part in spelled:
            if not isinstance(part, Part):
                # A closed spelling of frames ends in the newline that follows a video.
                text += part.removeprefix("\n") if closed else part
                closed = False
                continue
            count = 1 if part.kind == "image" else next(left)[0]
            kinds += [part.kind] * count
            closed = part.kind == "video" and spec.frame_spelling.closed
            text += picture if part.kind == "image" else spec.frame_spelling.spell(picture, count)
        spoken.append((turn.role, text))
    if generate is None:
        generate = not train and turns[-1].role == "user"
    return spec.template.render(spoken, system=spec.system, generate=generate, train=train), kinds


def _lay_rows(
    turns: list[Turn],
    spec: LayoutSpec,
    counts: list[int],
    shots: list[Shot],
    train: bool,
    generate: bool | None,
) -> _Rows:
    """Tokenise, then give every picture and every frame its rows."""
    pieces, kinds = _render(turns, spec, shots, train, generate)
    ids, learned = encode_pieces(pieces, spec.tokenizer.encode, bos=spec.bos_id)
    left, tiles = iter(counts), (tiles for frames, tiles in shots for _ in range(frames))
    lengths = [
        spec.image_rows * next(left) if kind == "image" else spec.frame_rows * next(tiles) for kind in kinds
    ]
    if not kinds:
        return _Rows(ids, learned, [], [], [])
    context = spec.context_id
    found = [t for t, index in enumerate(ids) if index == context]
    if len(found) != len(kinds):
        raise TemplateError(
            f"{len(kinds)} picture(s) became {len(found)} {spec.image_context} token(s): "
            "the tokenizer must treat the image tokens as special"
        )
    starts: list[int] = []
    out_ids: list[int] = []
    out_learned: list[bool] = []
    done = 0
    for t, length in zip(found, lengths, strict=True):
        out_ids += ids[done:t]
        out_learned += learned[done:t]
        starts.append(len(out_ids))
        out_ids += [context] * length
        out_learned += [False] * length
        done = t + 1
    return _Rows(out_ids + ids[done:], out_learned + learned[done:], starts, lengths, kinds)


def _check_length(rows: _Rows, spec: LayoutSpec, counts: list[int], shots: list[Shot]) -> None:
    length = len(rows.ids)
    if spec.max_length is None or length <= spec.max_length:
        return
    remedy = "shorten the conversation"
    if counts:
        taken = sum(length for _, length in rows.places("image"))
        often = f" encoded {spec.repeats} times" if spec.repeats > 1 else ""
        remedy = (
            f"{taken} of them are {sum(counts)} image tiles{often}, so use fewer tiles "
            f"(max_tiles is {spec.tiles.max_tiles}), {'fewer repeats, ' if often else ''}fewer images, or a shorter "
            "conversation"
        )
    if shots:
        taken = sum(length for _, length in rows.places("video"))
        rest = f", and {sum(counts)} image tiles" if counts else ""
        several = any(tiles > 1 for _, tiles in shots)
        cut = f" of {sum(frames * tiles for frames, tiles in shots)} tiles" if several else ""
        remedy = (
            f"{taken} of them are {sum(frames for frames, _ in shots)} video frames{cut}{rest}, so use fewer frames, "
            f"{'fewer tiles a frame, ' if several else ''}fewer images, or a shorter conversation"
        )
    raise ContextOverflowError(
        f"the conversation takes {length} tokens but the limit is {spec.max_length}: {remedy}"
    )


def _key(tiles_N3SS: Tensor) -> str:
    """Hash of what the encoder will see of one picture: equal tiles, equal key, whatever file they are from."""
    digest = hashlib.blake2b(repr(tuple(tiles_N3SS.shape)).encode(), digest_size=16)
    digest.update(tiles_N3SS.contiguous().numpy().data)
    return digest.hexdigest()
