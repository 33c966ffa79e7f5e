"""AssumedTokenizer: counts the tokens of a text where a model's own tokenizer is not at hand.

For plans on paper. Tags (`<|im_end|>`, `<img>`, `</img>`) are one token each, as in every released tokenizer; other
text is cut as byte-level tokenizers cut it before they merge, and each piece counts for a token or more: a Latin word
with the space before it one per six letters begun, a digit one, a Chinese or Japanese character one, a run of
punctuation or white space one. What the released vocabularies merge beyond that makes the real number smaller,
mostly that of the Chinese system messages.
"""

from __future__ import annotations

import re

__all__ = ["AssumedTokenizer"]

_TAG = re.compile(r"(<\|\w+\|>|</?\w+>)")
_PIECE = re.compile(r" ?[A-Za-zÀ-ɏ]+|\d|\s+| ?[^\w\s]+|.", re.DOTALL)
_LETTERS = 6


class AssumedTokenizer:
    """What `chiasm.data.layout` asks of a tokenizer, by rule instead of by vocabulary.

    Args:
        bos: whether the model's tokenizer puts a begin token first.
    """

    def __init__(self, *, bos: bool = False) -> None:
        self.bos_id = 1 if bos else None
        self._tags: dict[str, int] = {}

    def token_to_id(self, token: str) -> int | None:
        """Id of a tag, made up when it is first met; None for anything else."""
        return self._tags.setdefault(token, 2 + len(self._tags)) if _TAG.fullmatch(token) else None

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """As many ids as tokens are assumed; those of ordinary text are 0."""
        ids = [self.bos_id] if add_special_tokens and self.bos_id is not None else []
        for n, piece in enumerate(_TAG.split(text)):
            if n % 2:
                ids.append(self.token_to_id(piece) or 0)
            else:
                ids += [0] * sum(-(-len(p.strip()) // _LETTERS) or 1 for p in _PIECE.findall(piece))
        return ids
