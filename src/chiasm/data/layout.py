"""Layout: from messages to the Sequence that a model reads.

Source: fact sheet InternVL 2.5, sections 2.9 (templates, image expansion, label masks) and 3.3 (tile budget).

Every picture becomes `<img>`, then K rows of `<IMG_CONTEXT>` for each of its tiles (row by row, thumbnail last), then
`</img>`. Only the context rows stand for media (`kind_T == IMAGE`); an embedder overwrites them. One function lays
out training and inference, so the text that a model is asked is the text that it was taught.

Rules
- The texts of a conversation must not spell `<img>`, `</img>` or `<IMG_CONTEXT>`, in any turn: such rows would claim
  to be a picture. They are refused by name. Other special tokens in a text (`<|im_end|>`) keep their meaning, as in
  the released code; who serves strangers and does not want that filters them before.
- Nothing is ever cut off. What does not fit in `max_length` is an error that says what would help.
- Counting (`count_tokens`) and laying out share all code but the pixels, so they agree on every sequence.

Legend: T rows, K rows a tile, N tiles of all pictures, S side of a tile in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from chiasm.data.message import Part, Turn, parse_messages, spell_turn
from chiasm.data.sequence import IMAGE, TEXT, MediaBatch, Sequence, Span
from chiasm.errors import ConfigError, ContextOverflowError, DataError, TemplateError
from chiasm.media.image import open_image
from chiasm.media.size import image_size
from chiasm.media.tiles import TilePolicy
from chiasm.nn.losses import token_weights
from chiasm.text.labels import encode_pieces, official_labels, shift
from chiasm.text.templates import Piece, Template, get_template, join
from chiasm.text.tokenizer import Tokenizer

__all__ = ["LayoutSpec", "count_tokens", "layout", "prompt_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutSpec:
    """All that decides how messages become rows.

    Attributes:
        tokenizer: must know the three image tokens as soon as there is a picture.
        template: a `Template` or its name.
        tiles: how a picture becomes tiles; its budget is shared by the pictures of a conversation.
        tokens_per_tile: K, rows that one tile takes.
        image_start, image_end, image_context: the image tokens.
        max_length: longest allowed T; None for no limit.
        system: system message instead of the template's; "" for none. A system turn wins over it.
        loss_power: p of the loss weight x^-p of every learned row, x the number of learned rows of the sample
            (0 weighs tokens equally, 1 samples, 0.5 is the square-root compromise of InternVL 2.5).
    """

    tokenizer: Tokenizer
    template: Template
    tiles: TilePolicy
    tokens_per_tile: int
    image_start: str = "<img>"
    image_end: str = "</img>"
    image_context: str = "<IMG_CONTEXT>"
    max_length: int | None = None
    system: str | None = None
    loss_power: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "template", get_template(self.template))
        if self.tokens_per_tile < 1:
            raise ConfigError(f"tokens_per_tile must be at least 1, found {self.tokens_per_tile}")
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"max_length must be at least 1 or None, found {self.max_length}")
        if not 0 <= self.loss_power <= 1:
            raise ConfigError(f"loss_power must lie in 0..1, found {self.loss_power}")
        if not all(self.image_tokens) or len(set(self.image_tokens)) < 3:
            raise ConfigError("image_start, image_context and image_end must be three different tokens")

    @property
    def image_tokens(self) -> tuple[str, str, str]:
        """Start, context and end token, in the order in which a picture has them."""
        return self.image_start, self.image_context, self.image_end

    @property
    def context_id(self) -> int:
        """Id of the context token.

        Raises TemplateError when an image token is missing from the vocabulary.
        """
        ids = {token: self.tokenizer.token_to_id(token) for token in self.image_tokens}
        for token, index in ids.items():
            if index is None:
                raise TemplateError(
                    f"this model reads no pictures (its tokenizer has no {token} token): leave them out or choose "
                    "another model"
                )
        return ids[self.image_context]  # type: ignore[return-value]

    @property
    def bos_id(self) -> int | None:
        """The begin token that comes first: the tokenizer's, if it puts one and the template follows it."""
        if not self.template.bos:
            return None
        first = self.tokenizer.encode("", add_special_tokens=True)[:1]
        return first[0] if first and first[0] == self.tokenizer.bos_id else None


@dataclass(frozen=True, slots=True)
class _Rows:
    """A laid-out conversation without its pixels. `starts` are the first context rows of the pictures."""

    ids: list[int]
    learned: list[bool]
    starts: list[int]
    lengths: list[int]


def layout(
    messages: Any,
    spec: LayoutSpec,
    *,
    train: bool = False,
    generate: bool | None = None,
    opener: Callable[..., Image] = open_image,
) -> Sequence:
    """Lay out a conversation as one document.

    Args:
        messages: anything that `parse_messages` reads.
        spec: the rules.
        train: make labels and loss weights; answers are learned with their stop token.
        generate: append the header of an answer. Default: when the last turn is the user's and this is not training.
        opener: opens a picture, called as `opener(source, orient=...)`. A server passes one that refuses paths.

    Returns:
        A Sequence with media["image"] (N, 3, S, S) uint8 if there are pictures (else no media), and one Span a
        picture, whose key is a hash of its tiles.

    Raises:
        DataError: malformed messages, a reserved token in a text, parts that are no text or user's picture, or, in
            training, no answer to learn.
        TemplateError: the tokenizer lacks the image tokens.
        ImageError: a picture cannot be read.
        ContextOverflowError: T is above `max_length`.
    """
    turns = parse_messages(messages)
    images = [opener(part.value, orient=spec.tiles.orient) for part in _pictures(turns)]
    counts = spec.tiles.counts(image.size for image in images)
    rows = _lay_rows(turns, spec, counts, train, generate)
    _check_length(rows, spec, counts)
    if train and not any(rows.learned):
        raise DataError("nothing to learn: a training conversation needs an assistant turn")
    spans: list[Span] = []
    media: dict[str, MediaBatch] = {}
    if images:
        limit = spec.tiles.budget(len(images))
        tiles = [spec.tiles.tile(image, limit) for image in images]
        firsts = accumulate((len(group) for group in tiles), initial=0)
        for group, first, start, length in zip(tiles, firsts, rows.starts, rows.lengths, strict=False):
            span = Span(
                media="image", start=start, length=length, first=first, items=len(group), key=_key(group)
            )
            spans.append(span)
        media["image"] = MediaBatch(torch.cat(tiles) if len(tiles) > 1 else tiles[0])
    T = len(rows.ids)
    kind_T = torch.full((T,), TEXT, dtype=torch.int8)
    for span in spans:
        kind_T[span.start : span.start + span.length] = IMAGE
    labels_T = weight_T = None
    doc_T = torch.zeros(T, dtype=torch.int32)
    if train:
        labels_T = torch.tensor(shift(official_labels(rows.ids, rows.learned)), dtype=torch.int64)
        weight_T = token_weights(labels_T, doc_T, spec.loss_power)
    return Sequence(
        ids_T=torch.tensor(rows.ids, dtype=torch.int64),
        kind_T=kind_T,
        doc_T=doc_T,
        pos_T=torch.arange(T, dtype=torch.float32),
        labels_T=labels_T,
        weight_T=weight_T,
        spans=tuple(spans),
        media=media,
    )


def count_tokens(
    messages: Any,
    spec: LayoutSpec,
    *,
    sizes: Iterable[tuple[int, int]] | None = None,
    train: bool = False,
    generate: bool | None = None,
) -> int:
    """T of `layout(messages, spec, …)` without decoding a picture; not limited by `max_length`.

    Args:
        messages: anything that `parse_messages` reads.
        spec: the rules.
        sizes: (width, height) in pixels of every picture in order, upright; default: read from the pictures' headers.
        train: as in `layout`.
        generate: as in `layout`.
    """
    turns = parse_messages(messages)
    pictures = _pictures(turns)
    found = (
        list(sizes)
        if sizes is not None
        else [image_size(p.value, orient=spec.tiles.orient) for p in pictures]
    )
    if len(found) != len(pictures):
        raise DataError(f"{len(pictures)} picture(s) but {len(found)} size(s): give one (width, height) each")
    return len(_lay_rows(turns, spec, spec.tiles.counts(found), train, generate).ids)


def prompt_text(messages: Any, spec: LayoutSpec, *, train: bool = False, generate: bool | None = None) -> str:
    """The text that is tokenised, each picture written as start, one context and end token; no begin token."""
    return join(_render(parse_messages(messages), spec, train, generate))


def _pictures(turns: list[Turn]) -> list[Part]:
    """The image parts in reading order; DataError for parts that cannot be laid out."""
    for n, turn in enumerate(turns):
        for part in turn.parts:
            if part.kind == "image" and turn.role != "user":
                raise DataError(
                    f"messages[{n}]: a picture in a turn of role {turn.role}: only users show pictures"
                )
            if part.kind not in ("text", "image"):
                remedy = "give its frames as images" if part.kind == "video" else "write it as text"
                raise DataError(f"messages[{n}]: {part.kind} parts cannot be laid out: {remedy}")
    return [part for turn in turns for part in turn.of_kind("image")]


def _render(turns: list[Turn], spec: LayoutSpec, train: bool, generate: bool | None) -> list[Piece]:
    """Spell the conversation with one context token a picture."""
    picture = "".join(spec.image_tokens)
    spoken: list[tuple[str, str]] = []
    seen = 0
    for n, turn in enumerate(turns):
        for token in spec.image_tokens:
            if token in turn.text:
                raise DataError(
                    f"messages[{n}]: its text contains {token}, which is reserved for pictures: remove it"
                )
        spelled = spell_turn(turn, before=seen, numbered=spec.template.numbered, where=f"messages[{n}]")
        seen += len(turn.of_kind("image"))
        spoken.append((turn.role, "".join(picture if isinstance(part, Part) else part for part in spelled)))
    if generate is None:
        generate = not train and turns[-1].role == "user"
    return spec.template.render(spoken, system=spec.system, generate=generate, train=train)


def _lay_rows(
    turns: list[Turn], spec: LayoutSpec, counts: list[int], train: bool, generate: bool | None
) -> _Rows:
    """Tokenise, then give every picture its rows: `counts` tiles of K rows each."""
    pieces = _render(turns, spec, train, generate)
    ids, learned = encode_pieces(pieces, spec.tokenizer.encode, bos=spec.bos_id)
    lengths = [count * spec.tokens_per_tile for count in counts]
    if not counts:
        return _Rows(ids, learned, [], [])
    context = spec.context_id
    found = [t for t, index in enumerate(ids) if index == context]
    if len(found) != len(counts):
        raise TemplateError(
            f"{len(counts)} picture(s) became {len(found)} {spec.image_context} token(s): "
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
    return _Rows(out_ids + ids[done:], out_learned + learned[done:], starts, lengths)


def _check_length(rows: _Rows, spec: LayoutSpec, counts: list[int]) -> None:
    length = len(rows.ids)
    if spec.max_length is None or length <= spec.max_length:
        return
    remedy = "shorten the conversation"
    if counts:
        remedy = (
            f"{sum(rows.lengths)} of them are {sum(counts)} image tiles, so use fewer tiles "
            f"(max_tiles is {spec.tiles.max_tiles}), fewer images, or a shorter conversation"
        )
    raise ContextOverflowError(
        f"the conversation takes {length} tokens but the limit is {spec.max_length}: {remedy}"
    )


def _key(tiles_N3SS: Tensor) -> str:
    """Hash of what the encoder will see of one picture: equal tiles, equal key, whatever file they are from."""
    digest = hashlib.blake2b(repr(tuple(tiles_N3SS.shape)).encode(), digest_size=16)
    digest.update(tiles_N3SS.contiguous().numpy().data)
    return digest.hexdigest()
