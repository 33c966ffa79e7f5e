"""SentencePiece models without the sentencepiece package: the protobuf is parsed here, `tokenizers` does the work.

Source: the public `sentencepiece_model.proto` (field numbers, defaults, piece types) and the documented encoding: text
is normalised (a compiled character map, white space collapsed and trimmed, a space put in front, spaces escaped as
U+2581), then cut by greedy merging of the neighbours whose union has the best score (BPE), or by the likeliest path
(unigram). A character that no piece has becomes its bytes `<0xNN>`, or the unknown piece.

What carries over exactly, what almost, and what is said:

- Merges of one piece (`aaa` = `a` + `aa` = `aa` + `a`) have one score there and a rank each here, so they differ where
  both overlap in the text; the better one is put first, and no text of the tests shows a difference.
- A BPE piece that no two pieces make up is never written here; there it is, if characters that are no pieces make it
  up. The number of such pieces is logged.
- Control pieces spelled out in a text are those tokens, as in transformers; SentencePiece itself takes them for text.
- Under unigram a text that spells a byte piece (`<0x0A>`) is taken for it, and of two equally likely paths another one
  may be found.
- White space as a suffix, word and character models are refused.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from chiasm.errors import CheckpointError

__all__ = ["SPACE", "Kind", "Piece", "Prefix", "SentencePieceModel", "backend_from_model", "read_model"]

_log = logging.getLogger("chiasm.text")

SPACE = "\u2581"
"""How a space is spelled in pieces."""

Prefix = Literal["each", "first", "never"]
"""Before which stretches of text between added tokens the model's space is put."""

_UNIGRAM, _BPE = 1, 2
_TYPES = {_UNIGRAM: "unigram", _BPE: "bpe", 3: "word", 4: "char"}
_MAX_PIECES = 4_000_000
_DAMAGED_MAP = "a SentencePiece model's character map is damaged: download it again"


class Kind(IntEnum):
    """What a piece is, by its number in the file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float = 0.0
    kind: Kind = Kind.NORMAL


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """What a model file says, as far as it bears on ids; the defaults are those of the format.

    Attributes:
        pieces: the vocabulary in the order of the ids.
        type: ``"unigram"`` or ``"bpe"`` (other kinds are refused when a backend is made).
        byte_fallback: unknown characters become their bytes.
        charsmap: compiled character map; empty where text is taken as it is.
        dummy_prefix: a space is put in front.
        collapse: white space is trimmed, runs of it become one.
        escape: spaces are spelled as U+2581.
        suffix: pieces carry their space behind.
        bos: id of the begin piece; -1 where there is none. eos, pad: likewise.
    """

    pieces: tuple[Piece, ...]
    type: str = "unigram"
    byte_fallback: bool = False
    charsmap: bytes = b""
    dummy_prefix: bool = True
    collapse: bool = True
    escape: bool = True
    suffix: bool = False
    bos: int = 1
    eos: int = 2
    pad: int = -1
    unknown: int = field(init=False)

    def __post_init__(self) -> None:
        found = [n for n, piece in enumerate(self.pieces) if piece.kind == Kind.UNKNOWN]
        if len(found) != 1:
            raise CheckpointError(
                f"a SentencePiece model has one unknown piece, this one has {len(found)}: damaged file?"
            )
        if len({piece.text for piece in self.pieces}) != len(self.pieces):
            raise CheckpointError("a SentencePiece model has a piece twice: damaged file?")
        object.__setattr__(self, "unknown", found[0])

    def piece_at(self, index: int) -> str | None:
        """Text of the piece with this id; None outside the vocabulary (-1 stands for "none")."""
        return self.pieces[index].text if 0 <= index < len(self.pieces) else None


# --- the file --------------------------------------------------------------------------------------------------------


def read_model(path: str | Path) -> SentencePieceModel:
    """Read a SentencePiece model file.

    Raises:
        CheckpointError: the file cannot be read, or is no SentencePiece model.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if data.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not a model: run git lfs pull in that folder")
    try:
        return parse_model(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def parse_model(data: bytes) -> SentencePieceModel:
    """The model in the bytes of a file; CheckpointError where they are none."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                trainer |= dict(_fields(value))
            elif number == 3 and isinstance(value, bytes):
                normalizer |= dict(_fields(value))
            if len(pieces) > _MAX_PIECES:
                raise ValueError("too many pieces")
    except (ValueError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"not a SentencePiece model ({error}): download it again") from None
    if not pieces:
        raise CheckpointError("not a SentencePiece model (it has no pieces): download it again")
    charsmap = normalizer.get(2, b"")
    return SentencePieceModel(
        pieces=tuple(pieces),
        type=_TYPES.get(_number(trainer, 3, _UNIGRAM), "unknown"),
        byte_fallback=bool(_number(trainer, 35, 0)),
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        dummy_prefix=bool(_number(normalizer, 3, 1)),
        collapse=bool(_number(normalizer, 4, 1)),
        escape=bool(_number(normalizer, 5, 1)),
        suffix=bool(_number(trainer, 24, 0)),
        bos=_number(trainer, 41, 1),
        eos=_number(trainer, 42, 2),
        pad=_number(trainer, 43, -1),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a message's fields: varints and floats' bits as int, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            if at + size > len(data):
                raise ValueError("it ends within a number")
            yield number, int.from_bytes(data[at : at + size], "little")
            at += size
        elif wire == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("it ends within a field: truncated")
            yield number, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire} at byte {at}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("it ends within a number")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            if value >> 64:
                raise ValueError("a number of more than 64 bits")
            return value, at


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text, score = fields.get(1, b""), fields.get(2, 0)
    if not isinstance(text, bytes) or not isinstance(score, int):
        raise ValueError("a piece of another form")
    kind = Kind(_number(fields, 3, 1))
    return Piece(text.decode("utf-8"), struct.unpack("<f", score.to_bytes(8, "little")[:4])[0], kind)


def _number(fields: Mapping[int, int | bytes], number: int, default: int) -> int:
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise ValueError(f"field {number} is no number")
    return (
        value - (1 << 64) if value >= 1 << 63 else value
    )  # negative numbers are written in two's complement


# --- the backend -----------------------------------------------------------------------------------------------------


def backend_from_model(
    model: SentencePieceModel,
    *,
    prefix: Prefix | None = None,
    renamed: Mapping[int, str] | None = None,
) -> Backend:
    """The `tokenizers` object that gives the model's ids.

    Control pieces and the unknown one are special tokens, user-defined ones are added tokens: each is one id wherever
    it is spelled out. Added tokens of the release's configuration are the caller's.

    Args:
        model: of `read_model`.
        prefix: before which stretches between added tokens the space is put: each (as SentencePiece itself, which sees
            each stretch as a text), only the first of a text, or never. None: each where the model has a prefix.
        renamed: id -> text of added tokens that take a piece's place (InternLM2's unused ones) or text over.

    Raises:
        CheckpointError: the model is of a kind that cannot be carried over.
    """
    if model.type not in ("unigram", "bpe"):
        raise CheckpointError(
            f"a SentencePiece model of type {model.type} is not supported (bpe and unigram are): "
            "use the release's tokenizer.json"
        )
    if model.suffix:
        raise CheckpointError(
            "a SentencePiece model with white space as a suffix is not supported: use the release's tokenizer.json"
        )
    if prefix is None:
        prefix = "each" if model.dummy_prefix else "never"
    pieces = list(model.pieces)
    for index, text in (renamed or {}).items():
        if index < len(pieces):
            pieces[index] = Piece(text, pieces[index].score, Kind.CONTROL)
    bytes_there = sum(piece.kind == Kind.BYTE for piece in pieces) == 256
    if model.byte_fallback and not bytes_there:
        raise CheckpointError("a SentencePiece model with byte fallback lacks byte pieces: damaged file?")
    backend = Backend(_bpe(pieces, model, renamed or {}) if model.type == "bpe" else _unigram(pieces, model))
    steps = _normalizers(model, prefix)
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    if prefix == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE, prepend_scheme="first", split=False
        )
    out: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")] if model.escape else []
    out += [decoders.ByteFallback(), decoders.Fuse()]
    if prefix != "never":
        out.append(decoders.Strip(" ", 1 << 20 if model.collapse else 1, 0))
    backend.decoder = decoders.Sequence(out)
    added = [
        AddedToken(piece.text, normalized=False, special=piece.kind != Kind.USER_DEFINED)
        for piece in pieces
        if piece.kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
    ]
    spaced = [token.content for token in added if SPACE in token.content]
    if spaced and model.escape:
        raise CheckpointError(
            f"the user-defined piece {spaced[0]!r} holds a space, which is not supported: "
            "use the release's tokenizer.json"
        )
    backend.add_tokens(added)
    return backend


def _normalizers(model: SentencePieceModel, prefix: Prefix) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        _check_charsmap(model.charsmap)
        try:
            steps.append(normalizers.Precompiled(model.charsmap))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(_DAMAGED_MAP) from error
    if model.collapse:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if prefix == "each":
        steps.append(normalizers.Prepend(SPACE if model.escape else " "))
    if model.escape and prefix != "first":  # there the pre-tokenizer does it
        steps.append(normalizers.Replace(" ", SPACE))
    return steps


def _check_charsmap(data: bytes) -> None:
    """CheckpointError where a compiled character map points outside itself: the library would fail at some text.

    It is the size in bytes of a double array of 32-bit units (of darts-clone: a block of 256 holds what may follow one
    state), the units, and the replacements that they name by offset. All units are checked, not only those that can be
    reached.
    """
    size = int.from_bytes(data[:4], "little")
    words = data[4 + size :]
    if size < 4 or size % 4 or 4 + size > len(data):
        raise CheckpointError(_DAMAGED_MAP)
    units = struct.unpack_from(f"<{size // 4}I", data, 4)
    for at, unit in enumerate(units):
        if unit >> 31 and at:
            continue  # a value, which is read only by way of the unit that names it
        state = at ^ ((unit >> 10) << ((unit & 0x200) >> 6))
        good = (state | 0xFF) < len(units)
        if good and unit & 0x100:
            value = units[state] & 0x7FFF_FFFF
            good = value <= len(words) and (value == len(words) or words[value] & 0xC0 != 0x80)
        if not good:
            raise CheckpointError(_DAMAGED_MAP)


def _bpe(pieces: list[Piece], model: SentencePieceModel, renamed: Mapping[int, str]) -> models.BPE:
    taken = set(renamed.values())
    joined = {
        piece.text: piece.score for piece in pieces if piece.kind == Kind.NORMAL and piece.text not in taken
    }
    merges: list[tuple[float, int, str, str]] = []
    unreached = 0
    for text, score in joined.items():
        if len(text) == 1:
            continue
        splits = [(text[:n], text[n:]) for n in range(1, len(text))]
        known = [(left, right) for left, right in splits if left in joined and right in joined]
        if not known:
            unreached += any(
                (left in joined or len(left) == 1) and (right in joined or len(right) == 1)
                for left, right in splits
            )
        merges += [(-score, n, *split) for n, split in enumerate(_leftmost_first(known))]
    if unreached:
        _log.warning(
            "%d of %d SentencePiece pieces are made of characters that are no pieces, and will not be written",
            unreached,
            len(pieces),
        )
    # Stable, so that equal scores keep the order of their ids.
    merges.sort(key=lambda merge: merge[0])
    vocab = {piece.text: n for n, piece in enumerate(pieces) if piece.text not in taken}
    return models.BPE(
        vocab=vocab | {text: n for n, text in renamed.items()},
        merges=[(left, right) for _, _, left, right in merges],
        unk_token=pieces[model.unknown].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _leftmost_first(splits: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The ways to make one piece, in the order that comes closest to "leftmost first".

    Two of them overlap in a text a b c where a + b and b + c both spell the piece; the leftmost is then (a, b). So
    whatever ends in what another begins with goes first; among those that leave it open, the longer left part does.
    """
    rest = sorted(splits, key=lambda split: -len(split[0]))
    order: list[tuple[str, str]] = []
    while rest:
        free = next(
            (s for s in rest if not any(o[1] == s[0] and o[0] != s[1] for o in rest if o is not s)), rest[0]
        )
        order.append(free)
        rest.remove(free)
    return order


def _unigram(pieces: list[Piece], model: SentencePieceModel) -> models.Unigram:
    normal = [piece.score for piece in pieces if piece.kind == Kind.NORMAL]
    # What is no word must not be chosen, nor lower the price of the unknown, which is taken from the least score.
    least = min(normal, default=0.0)
    return models.Unigram(
        [(piece.text, piece.score if piece.kind == Kind.NORMAL else least) for piece in pieces],
        unk_id=model.unknown,
        byte_fallback=model.byte_fallback,
    )
