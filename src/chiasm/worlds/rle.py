"""Masks as COCO's run lengths: uncompressed counts, the compressed string, and back.

Source: the public COCO annotation format. A mask is read column by column (all rows of column 0 first); ``counts`` are
lengths of runs of 0 and 1 in turn, the first one of 0 (and 0 if the mask begins with 1). In the compressed form each
count, from the fourth on less the one two before it, is written in groups of 5 bits, lowest first: bit 5 says that more
follow, bit 4 of the last group is the sign, and 48 is added to make each group a printable character.

Shape legend: H x W pixels of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from chiasm.errors import DataError

__all__ = ["decode_rle", "encode_rle", "pack_counts", "run_lengths", "run_lengths_reference", "unpack_counts"]


def run_lengths(mask: np.ndarray) -> list[int]:
    """Return the run lengths of a (H, W) bool mask in column order, beginning with a run of False."""
    flat = np.asarray(mask, bool).ravel(order="F")
    if not len(flat):
        return [0]
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [len(flat)]]))
    return [0, *runs.tolist()] if flat[0] else runs.tolist()


def run_lengths_reference(mask: np.ndarray) -> list[int]:
    """``run_lengths`` pixel by pixel: the slow twin."""
    counts, current, length = [], False, 0
    for column in range(mask.shape[1]):
        for row in range(mask.shape[0]):
            if bool(mask[row, column]) == current:
                length += 1
            else:
                counts.append(length)
                current, length = not current, 1
    return [*counts, length]


def pack_counts(counts: Sequence[int]) -> str:
    """Write run lengths as COCO's compressed string."""
    out = []
    for k, count in enumerate(counts):
        value = int(count) - int(counts[k - 2]) if k > 2 else int(count)
        more = True
        while more:
            group = value & 0x1F
            value >>= 5
            more = value != (-1 if group & 0x10 else 0)
            out.append(chr((group | (0x20 if more else 0)) + 48))
    return "".join(out)


def unpack_counts(text: str) -> list[int]:
    """Read what ``pack_counts`` wrote.

    Raises:
        DataError: a character outside of the alphabet, or the text ends inside a number.
    """
    counts: list[int] = []
    value, shift = 0, 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64:
            raise DataError(f"{character!r} cannot be in a compressed mask: the text is not COCO's RLE")
        value |= (group & 0x1F) << shift
        shift += 5
        if group & 0x20:
            continue
        if group & 0x10:
            value -= 1 << shift
        counts.append(value + counts[len(counts) - 2] if len(counts) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise DataError("a compressed mask ends inside a number: it was cut off")
    return counts


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Return {"size": [H, W], "counts": compressed string} of a (H, W) bool mask."""
    return {"size": [int(mask.shape[0]), int(mask.shape[1])], "counts": pack_counts(run_lengths(mask))}


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """Return the (H, W) bool mask of compressed or plain counts.

    Raises:
        DataError: the runs do not add up to the size.
    """
    height, width = (int(side) for side in rle["size"])
    counts = unpack_counts(rle["counts"]) if isinstance(rle["counts"], str) else list(rle["counts"])
    if sum(counts) != height * width or any(count < 0 for count in counts):
        raise DataError(f"runs of {sum(counts)} pixels do not fill a mask of {height} x {width}")
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape((height, width), order="F")
