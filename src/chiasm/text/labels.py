"""Token ids of a rendered conversation, and which of them are learned.

Source: InternVL 2.5 fact sheet, section 2.9 (label masking). The rule: tokenise chunk by chunk (a chunk is a turn);
an answer and its stop token are learned; the header before it and the newline after it are not. The borders are
counted in tokens of the header and the tail, as the official recipe counts them, so a token that begins in the
header is never learned, even where a vocabulary merges the header's newline with newlines of the answer.

The recipes before 2.5 (Hermes-2, internlm2-chat, phi3-chat) mean the same rule but find the borders by splitting the
string; where that fails they drop the sample (several Phi-3 turns, an answer that spells the end tag), and an answer
without text loses its end tag there. Here such samples are learned like all others.

Legend: T tokens of the conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from chiasm.text.templates import Piece

__all__ = ["IGNORE", "encode_pieces", "official_labels", "shift"]

IGNORE = -100
"""Label of a position that predicts nothing (the same number as in `chiasm.data.sequence`)."""

Encode = Callable[[str], Sequence[int]]


def encode_pieces(
    pieces: Sequence[Piece], encode: Encode, *, bos: int | None = None
) -> tuple[list[int], list[bool]]:
    """Tokenise rendered pieces.

    Args:
        pieces: of `Template.render`.
        encode: text -> ids; special tokens in the text are recognised, none is added.
        bos: begin token to put first, if the tokenizer uses one.

    Returns:
        T token ids and T flags: whether that very token is learned (not shifted).
    """
    ids: list[int] = [] if bos is None else [bos]
    learned: list[bool] = [False] * len(ids)
    for _, group in groupby(pieces, key=lambda piece: piece.chunk):
        chunk = list(group)
        new = list(encode("".join(piece.text for piece in chunk)))
        ids += new
        learned += _mask(chunk, len(new), encode)
    return ids, learned


def _mask(chunk: list[Piece], length: int, encode: Encode) -> list[bool]:
    """Which of the `length` tokens of one chunk are learned."""
    where = [n for n, piece in enumerate(chunk) if piece.supervised]
    if not where:
        return [False] * length
    head = "".join(piece.text for piece in chunk[: where[0]])
    stop = chunk[where[-1]].text
    tail = "".join(piece.text for piece in chunk[where[-1] + 1 :])
    begin = len(encode(head))
    # The tail is counted where it stands, behind the stop token: on its own, some vocabularies spell it differently.
    end = length - (len(encode(stop + tail)) - len(encode(stop)) if tail else 0)
    return [begin <= t < end for t in range(length)]


def official_labels(ids: Sequence[int], learned: Sequence[bool]) -> list[int]:
    """T labels as the official recipe has them: the id itself where it is learned, IGNORE elsewhere."""
    return [i if keep else IGNORE for i, keep in zip(ids, learned, strict=True)]


def shift(labels: Sequence[int]) -> list[int]:
    """T labels as our heads read them: row t holds what comes at t + 1; the last row predicts nothing."""
    return [*labels[1:], IGNORE] if labels else []
