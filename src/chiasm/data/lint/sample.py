"""One row under the linter's eye: read, its pictures' headers looked at, its tokens counted as training would.

Nothing here judges; `chiasm.data.lint.rules` does. A `Sample` also holds why reading or laying out failed, in the words
of the code that training runs (`parse_messages`, `prompt_pieces`, `encode_pieces`), so the two cannot disagree.

A picture's header is read once while it stays among the last few thousand paths. Its `digest` is over the size and the
first and last 16 KiB of the file: enough to tell files apart, and a million photographs need not be read whole. With
`decode` every picture is opened as training opens it, and gets a perceptual hash (`picture_hash`).

Legend: S side of a tile, K rows a tile.
"""

from __future__ import annotations

import hashlib
import io
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from chiasm.data.layout import LayoutSpec, Shot, count_shots, prompt_pieces
from chiasm.data.message import Record, Turn, parse_messages
from chiasm.errors import ChiasmError, ImageError, MissingExtraError
from chiasm.media.fetch import is_url, load_bytes, short_name
from chiasm.media.image import MAX_PIXELS, open_image, quiet_pillow
from chiasm.media.size import image_size
from chiasm.text.labels import encode_pieces
from chiasm.text.templates import Piece, join

if TYPE_CHECKING:
    from chiasm.data.datasets import Dataset

__all__ = ["Picture", "Reader", "Sample", "digest8", "normalised", "picture_hash"]

_ENDS = 16 * 1024
_ORIENTATION_TAG = 0x0112
_HEADERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # as in chiasm.media.size: their header states the size
_CACHED = 8192
_ASSUMED_FRAMES = 8
_ALL_WHOLE, _SOME_WHOLE = 1000, 16

Encode = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What is known of one picture.

    Attributes:
        name: short, for messages.
        stored: (width, height) in pixels as in the file; (0, 0) if unknown.
        size: the same as the tile policy gets it.
        orientation: EXIF orientation, 1 upright.
        problem: "", "missing", "damaged", "too large" or "remote" (a URL that was not fetched).
        reason: what `open_image` says about the problem.
        digest: 8 bytes over the file, 0 if unknown.
        looks: perceptual hash, None if the picture was not decoded or shows too little.
    """

    name: str
    stored: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    problem: str = ""
    reason: str = ""
    digest: int = 0
    looks: int | None = None

    @property
    def known(self) -> bool:
        """Whether it can be counted: there and of a known size."""
        return not self.problem


@dataclass(slots=True, kw_only=True)
class Sample:
    """One row, as far as it could be read.

    Attributes:
        set_name: of its data set.
        index: in the set.
        where: file and line.
        record: None if the row cannot be read; `unreadable` then says why.
        turns: the conversation as it will be laid out; empty if it cannot be.
        said: (number, role, text) of the turns, even of a conversation that cannot be laid out.
        exchanges: (question, answer) pairs, both `normalised`; an answer without a question has "" for it.
        malformed: why the messages cannot be laid out (tags and pictures, order), or "".
        pictures: in reading order.
        video_problem: why a video cannot be used, or "".
        unexamined: what stands in the way of counting without being a fault (no PyAV, a URL), or "".
        refused: why the layout refuses it, of whatever kind, or "".
        text: all that is tokenised, pictures as one token each.
        tokens: T of the training sequence; None if it could not be counted.
        learned: how many of them are learned.
        parts: tokens by part: system, question, answer, image, video.
        tiles: of each picture.
        videos: of each video, its frames and the tiles of a frame.
        beyond: of a text longer than `max_length`: (learned tokens, whole or broken pictures or frames) beyond it;
            None if the text is not too long, or has both pictures and videos.
        whole_differs: tokenised at one go the text gives other tokens.
        merged: turns whose answer's first token begins in the header before it.
    """

    set_name: str
    index: int
    where: str
    record: Record | None = None
    turns: list[Turn] = field(default_factory=list)
    said: list[tuple[int, str, str]] = field(default_factory=list)
    exchanges: list[tuple[str, str]] = field(default_factory=list)
    unreadable: str = ""
    malformed: str = ""
    pictures: list[Picture] = field(default_factory=list)
    video_problem: str = ""
    unexamined: str = ""
    refused: str = ""
    text: str = ""
    tokens: int | None = None
    learned: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    tiles: list[int] = field(default_factory=list)
    videos: list[Shot] = field(default_factory=list)
    beyond: tuple[int, int] | None = None
    whole_differs: bool = False
    merged: int = 0

    @property
    def frames(self) -> int:
        """Frames of all videos."""
        return sum(frames for frames, _ in self.videos)

    @property
    def frame_tiles(self) -> int:
        """Tiles of all frames of all videos."""
        return sum(frames * tiles for frames, tiles in self.videos)

    @property
    def spoken(self) -> Sequence[Turn]:
        """The turns, even of a conversation that cannot be laid out."""
        return self.record.turns if self.record else ()


class Reader:
    """Reads rows and counts them.

    Args:
        spec: how training lays out; its `max_length` is left to the rules.
        decode: open every picture wholly instead of its header.
        whole: also tokenise texts at one go, to compare: of the first 1,000 rows of a set, then of every 16th.
    """

    def __init__(self, spec: LayoutSpec, *, decode: bool = False, whole: bool = True) -> None:
        self.spec, self.decode = spec, decode
        # A tokenizer by rule has no merges that could differ.
        self.whole = whole and hasattr(spec.tokenizer, "backend")
        # Headers and stop strings come again and again.
        self._short = lru_cache(4096)(lambda text: tuple(spec.tokenizer.encode(text)))
        self._by_path = lru_cache(_CACHED)(self._picture)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids; those of short texts are remembered."""
        return self._short(text) if len(text) <= 64 else tuple(self.spec.tokenizer.encode(text))

    def read(self, dataset: Dataset, index: int, spec: LayoutSpec | None = None) -> Sample:
        """Read and count one row; whatever is wrong with it is in the result, nothing raises.

        Args:
            dataset: the set.
            index: of the row.
            spec: other than the reader's own, as for a set with a tile limit of its own.
        """
        spec = spec or self.spec
        sample = Sample(set_name=dataset.name, index=index, where=dataset.where(index))
        try:
            sample.record = dataset.record(index)
        except ChiasmError as error:
            sample.unreadable = sample.refused = _after(str(error), sample.where)
            return sample
        sample.said = [(n, turn.role, turn.text) for n, turn in enumerate(sample.record.turns)]
        sample.exchanges = _exchanges(sample.said)
        media = [part for turn in sample.record.turns for part in turn.parts]
        sample.pictures = [self.picture(part.value) for part in media if part.kind == "image"]
        try:
            sample.turns = parse_messages(sample.record)
        except ChiasmError as error:
            sample.malformed = sample.refused = str(error)
            return sample
        try:
            self._count(sample, spec)
        except ChiasmError as error:
            sample.refused = str(error)
        return sample

    # Pictures ----------------------------------------------------------------------------------------------------

    def picture(self, source: Any) -> Picture:
        """What is known of a picture, by its path from memory."""
        if isinstance(source, str | Path) and not (isinstance(source, str) and is_url(source)):
            return self._by_path(str(source))
        return self._picture(source)

    def _picture(self, source: Any) -> Picture:
        name = short_name(source) if isinstance(source, str | Path) else _unnamed(source)
        if isinstance(source, bytearray | memoryview):
            source = bytes(source)
        if isinstance(source, str) and is_url(source):
            if source[:5].lower() != "data:" and not self.decode:
                return Picture(name=name, problem="remote")
            try:
                source = load_bytes(source)
            except ImageError as error:
                return Picture(name=name, problem="missing", reason=str(error))
        orient = self.spec.tiles.orient
        stored, orientation, digest = (0, 0), 1, 0
        try:
            if isinstance(source, str | Path):
                with open(source, "rb") as file:
                    digest = _digest_ends(file, os.fstat(file.fileno()).st_size)
                    stored, orientation = _header(file)
            elif isinstance(source, bytes):
                file = io.BytesIO(source)
                digest = _digest_ends(file, len(source))
                stored, orientation = _header(file)
        except (OSError, ValueError):
            pass  # opening it below says what is wrong, in training's words
        if stored[0] * stored[1] > MAX_PIXELS:
            return Picture(name=name, stored=stored, problem="too large", reason=_why(source, orient))
        lying = orient and orientation in (5, 6, 7, 8)
        size = (stored[1], stored[0]) if lying else stored
        looks = None
        try:
            if self.decode:
                image = open_image(source, orient=orient, on_note=lambda _: None)
                size, looks = image.size, picture_hash(image)
            elif not all(stored):
                size = image_size(source, orient=orient)
        except ImageError as error:
            there = not isinstance(source, str | Path) or os.path.isfile(source)
            return Picture(
                name=name, stored=stored, problem="damaged" if there else "missing", reason=str(error)
            )
        return Picture(
            name=name,
            stored=stored if all(stored) else size,
            size=size,
            orientation=orientation,
            digest=digest,
            looks=looks,
        )

    # Tokens ------------------------------------------------------------------------------------------------------

    def _count(self, sample: Sample, spec: LayoutSpec) -> None:
        """Lay the conversation out as training would, but for the pixels; raises what `layout` would."""
        videos = sum(len(turn.of_kind("video")) for turn in sample.turns)
        try:
            shots = count_shots(sample.turns, spec) if videos else []
        except ImageError as error:
            sample.video_problem = str(error)
            raise
        except MissingExtraError as error:
            sample.unexamined = str(error)
            shots = [(_ASSUMED_FRAMES, 1)] * videos
        pieces = prompt_pieces(sample.turns, spec, train=True, frames=shots)
        sample.text = join(pieces)
        # A chunk is tokenised here, counted below and compared below: once is enough.
        encode = cache(self.encode)
        ids, learned = encode_pieces(pieces, encode, bos=spec.bos_id)
        sample.learned = sum(learned)
        faulty = next((picture for picture in sample.pictures if picture.problem not in ("", "remote")), None)
        if faulty is not None:
            sample.refused = faulty.reason
        if any(picture.problem == "remote" for picture in sample.pictures):
            sample.unexamined = sample.unexamined or "a picture behind a URL is not fetched without --decode"
        shown = sample.text.count("".join(spec.image_tokens))
        if shown:
            found = ids.count(spec.context_id)
            if found != shown:
                sample.refused = (
                    f"{shown} picture(s) became {found} {spec.image_context} token(s): "
                    "the tokenizer must treat the image tokens as special"
                )
                return
        sample.videos = shots
        sample.tiles = spec.tiles.counts(
            picture.size if picture.known else (spec.tiles.image_size, spec.tiles.image_size)
            for picture in sample.pictures
        )
        image, video = spec.image_rows * sum(sample.tiles), spec.frame_rows * sample.frame_tiles
        if faulty is None:
            sample.tokens = len(ids) - shown + image + video
        if (
            sample.tokens is not None
            and spec.max_length is not None
            and sample.tokens > spec.max_length
            and not (sample.pictures and sample.frames)
        ):
            sample.beyond = _beyond(sample, ids, learned, spec)
        chunks = [list(group) for _, group in groupby(pieces, key=lambda piece: piece.chunk)]
        system = 0
        if chunks and not spec.template.by_exchange and pieces[0].chunk == 0:
            system = len(encode(join(chunks[0])))
        sample.parts = {
            "system": system,
            "question": len(ids) - shown - sample.learned - system,
            "answer": sample.learned,
            "image": image,
            "video": video,
        }
        if self.whole:
            self._compare(sample, chunks, ids if spec.bos_id is None else ids[1:], encode)

    def _compare(self, sample: Sample, chunks: list[list[Piece]], ids: list[int], encode: Encode) -> None:
        """Whether token borders fall where the pieces end."""
        at = 0
        for chunk in chunks:
            length = len(encode(join(chunk)))
            first = next((n for n, piece in enumerate(chunk) if piece.supervised), None)
            if first is not None:
                head = encode(join(chunk[:first]))
                sample.merged += list(head) != list(ids[at : at + len(head)])
            at += length
        # A habit of tokenizer and template rather than of single rows: some rows of a large set will do.
        if len(chunks) > 1 and (sample.index < _ALL_WHOLE or sample.index % _SOME_WHOLE == 0):
            sample.whole_differs = list(self.spec.tokenizer.encode(sample.text)) != list(ids)


def _beyond(sample: Sample, ids: list[int], learned: list[bool], spec: LayoutSpec) -> tuple[int, int]:
    """What lies behind `max_length`, in a text of pictures or of frames."""
    lengths = iter(
        [spec.image_rows * n for n in sample.tiles]
        + [spec.frame_rows * tiles for frames, tiles in sample.videos for _ in range(frames)]
    )
    context = spec.context_id if sample.tiles or sample.frames else None
    at = lost = shown = 0
    for index, keep in zip(ids, learned, strict=True):
        at += next(lengths) if index == context else 1
        if at > (spec.max_length or 0):
            lost += keep
            shown += index == context
    return lost, shown


def normalised(text: str) -> str:
    """The text for comparison: one Unicode form, one case, single blanks, no tags of media."""
    plain = text.replace("<image>", " ").replace("<video>", " ")
    if not plain.isascii():
        plain = unicodedata.normalize("NFKC", plain)
    return " ".join(plain.casefold().split())


def _exchanges(said: list[tuple[int, str, str]]) -> list[tuple[str, str]]:
    pairs, question = [], ""
    for _, role, text in said:
        if role == "user":
            question = normalised(text)
        elif role == "assistant":
            pairs.append((question, normalised(text)))
            question = ""
    return pairs


def _after(message: str, where: str) -> str:
    """The message without the place, which the finding states itself."""
    rest = message.removeprefix(where)
    return rest.lstrip(":. ") if rest is not message and rest else message


def _unnamed(source: Any) -> str:
    if isinstance(source, bytes | bytearray | memoryview):
        return f"picture of {len(source)} bytes"
    return getattr(source, "filename", "") or "picture in memory"


def _why(source: Any, orient: bool) -> str:
    """What opening the picture says; "" if it opens after all."""
    try:
        open_image(source, orient=orient, on_note=lambda _: None)
    except ImageError as error:
        return str(error)
    return ""


def _header(file: IO[bytes]) -> tuple[tuple[int, int], int]:
    """(width, height) as stored and the EXIF orientation; (0, 0) where the header does not tell."""
    file.seek(0)
    try:
        with quiet_pillow():
            image = Image.open(file, formats=_HEADERS)
            if image.format not in _HEADERS or not all(image.size):
                return (0, 0), 1
            # A damaged EXIF block turns nothing.
            try:
                orientation = image.getexif().get(_ORIENTATION_TAG, 1)
            except Exception:
                orientation = 1
            return image.size, orientation if isinstance(orientation, int) else 1
    except Image.DecompressionBombError:
        return (MAX_PIXELS + 1, 1), 1
    # Any plugin may fail in any way on a hostile header; opening the picture names it.
    except Exception:
        return (0, 0), 1


def _digest_ends(file: IO[bytes], size: int) -> int:
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    digest.update(file.read(_ENDS))
    if size > 2 * _ENDS:
        file.seek(-_ENDS, os.SEEK_END)
    digest.update(file.read(_ENDS))
    return int.from_bytes(digest.digest(), "little") or 1


def digest8(*texts: str) -> int:
    """A number of 8 bytes, never 0, from texts (lone surrogates included)."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little") or 1


def picture_hash(image: Image.Image) -> int | None:
    """64 bits: whether each of 8 x 8 cells is brighter than its right neighbour (a difference hash).

    Resizing, recompression and small changes of colour move few bits. None for a picture with too little in it, whose
    bits would be noise: fewer than six steps between neighbours of more than 3 grey levels.
    """
    cells_89 = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    steps_88 = cells_89[:, 1:] - cells_89[:, :-1]
    if int((np.abs(steps_88) > 3).sum()) < 6:
        return None
    bits = (steps_88 > 0).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
