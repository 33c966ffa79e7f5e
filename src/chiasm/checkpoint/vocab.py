"""Grow a vocabulary: the nine special tokens of InternVL and the rows they need in word table and output matrix.

Source: the training script of InternVL 2.5 (arXiv 2412.05271): special tokens are appended in a fixed order, both
matrices are cut or grown to exactly the tokenizer's size, and the new rows of the *output* matrix become the mean of
the old ones, so that an untrained token is as likely as an average one. New *input* rows keep their initialisation.

Rows that no token has (public language models pad their tables to round sizes) are padding: dropped before growing,
as the script does, so that a new token takes over the padding row of its id on the input side.
Legend: V rows (vocabulary), C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chiasm.errors import CheckpointError, ConfigError
from chiasm.text.tokenizer import Tokenizer

__all__ = ["SPECIAL_TOKENS", "Grown", "add_special_tokens", "check_rows", "resize_rows", "used_rows"]

SPECIAL_TOKENS = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
"""In the order in which they get their ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grown:
    """Matrices after a vocabulary has grown.

    Attributes:
        words_VC: the word table.
        head_VC: the output matrix; None where it is the word table itself.
        added: tokens that were new, with their ids.
    """

    words_VC: Tensor
    head_VC: Tensor | None
    added: dict[str, int]


def used_rows(tokenizer: Tokenizer) -> int:
    """Rows that the tokenizer's ids need: one more than the highest id."""
    return 1 + max(tokenizer.backend.get_vocab(with_added_tokens=True).values(), default=-1)


def check_rows(tokenizer: Tokenizer, rows: int) -> int:
    """Return how many of ``rows`` carry tokens; those after them are padding and must never be emitted.

    Raises:
        CheckpointError: the tokenizer has ids beyond the rows.
    """
    used = used_rows(tokenizer)
    if used > rows:
        raise CheckpointError(
            f"the tokenizer has ids up to {used - 1} but the word table only {rows} rows: "
            "they are not of one model, or its special tokens were never added"
        )
    return used


def resize_rows(
    weight_VC: Tensor, rows: int, *, generator: torch.Generator | None = None, std: float = 0.02
) -> Tensor:
    """A (rows, C) matrix that keeps the leading rows; new ones are drawn from Normal(0, std).

    Args:
        weight_VC: the matrix; it is not changed.
        rows: how many rows the result has.
        generator: draws the new rows (on the CPU, in float32, so that devices and dtypes agree); needed when growing.
        std: their standard deviation.

    Raises:
        ConfigError: ``rows`` is not positive, or rows are to be drawn without a generator.
    """
    if rows < 1:
        raise ConfigError(f"a word table needs at least one row, not {rows}")
    old = weight_VC.shape[0]
    out = weight_VC.new_empty(rows, weight_VC.shape[1])
    out[:old].copy_(weight_VC[:rows])
    if rows > old:
        if generator is None:
            raise ConfigError("new rows are drawn at random: give a generator with a seed")
        new = torch.empty(rows - old, weight_VC.shape[1])
        out[old:].copy_(new.normal_(0.0, std, generator=generator))
    return out


@torch.no_grad()
def add_special_tokens(
    tokenizer: Tokenizer,
    words_VC: Tensor,
    head_VC: Tensor | None = None,
    *,
    generator: torch.Generator,
    tokens: Sequence[str] = SPECIAL_TOKENS,
    std: float = 0.02,
    multiple: int = 1,
) -> Grown:
    """Add special tokens to a tokenizer and give them rows; tokens that it has already keep id and rows.

    Args:
        tokenizer: changed in place.
        words_VC: the word table, possibly with padding rows.
        head_VC: the output matrix; None where it is tied to the word table (whose new rows then become the mean,
            because in the source the output rule is applied last).
        generator: draws the input rows of new ids that had no padding row.
        tokens: what to add, in the order of their ids.
        std: standard deviation of drawn rows.
        multiple: round the number of rows up to a multiple of this with rows of zeros.

    Returns:
        The new matrices (the given ones where nothing is new) and the ids.

    Raises:
        CheckpointError: the tokenizer and the matrices do not belong together.
        ConfigError: ``multiple`` is below 1.
    """
    if multiple < 1:
        raise ConfigError(f"multiple is {multiple}: it must be at least 1")
    if head_VC is not None and head_VC.shape != words_VC.shape:
        raise CheckpointError(
            f"word table {tuple(words_VC.shape)} and output matrix {tuple(head_VC.shape)} differ in shape"
        )
    used = check_rows(tokenizer, words_VC.shape[0])
    tokenizer.add_special_tokens(tokens)
    # What was in the vocabulary before has an id below the old end.
    ids = {token: tokenizer.token_to_id(token) for token in tokens}
    added = {token: index for token, index in ids.items() if index is not None and index >= used}
    if not added:
        return Grown(words_VC=words_VC, head_VC=head_VC, added={})
    rows = used_rows(tokenizer)
    padded = -(-rows // multiple) * multiple
    words = _with_padding(resize_rows(words_VC, rows, generator=generator, std=std), padded)
    if head_VC is None:
        words[used:rows] = _mean(words_VC[:used])
        return Grown(words_VC=words, head_VC=None, added=added)
    head = head_VC.new_zeros(padded, head_VC.shape[1])
    head[:used].copy_(head_VC[:used])
    head[used:rows] = _mean(head_VC[:used])
    return Grown(words_VC=words, head_VC=head, added=added)


def _mean(weight_VC: Tensor) -> Tensor:
    """Mean row, summed in float32 whatever the dtype."""
    return weight_VC.mean(dim=0, dtype=torch.float32).to(weight_VC.dtype)


def _with_padding(weight_VC: Tensor, rows: int) -> Tensor:
    if rows == weight_VC.shape[0]:
        return weight_VC
    out = weight_VC.new_zeros(rows, weight_VC.shape[1])
    out[: weight_VC.shape[0]].copy_(weight_VC)
    return out
