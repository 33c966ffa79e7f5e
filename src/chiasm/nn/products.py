"""Matrix products with one row: what decoding one document on a CPU consists of.

In bf16, torch hands every product to oneDNN, whose blocked kernel (`brg_matmul`) is made for many rows. torch's own
matrix-vector kernel took 1/1.7 to 1/3.0 of its time on the five matrix shapes of a 0.5B decoder (torch 2.13,
AVX512_BF16, one thread, one run on a busy machine), with the same error against the fp64 product. The only
way to it is the switch of oneDNN, which is process-wide; hence the counting below.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["single_row_products"]


class _Switch:
    """How many threads want oneDNN off, and what it was before the first of them."""

    lock = threading.Lock()
    holders = 0
    before = True


@contextmanager
def single_row_products(active: bool = True) -> Iterator[None]:
    """Let one-row products inside the block run on torch's own kernel; no effect on a GPU or in fp32.

    Other threads see the switch too: what they compute meanwhile stays right but large bf16 products are slower.
    Nested and overlapping blocks are fine; the last one to leave restores the switch.

    Args:
        active: False makes the block do nothing, for callers who know their rows only at run time.
    """
    if not active:
        yield
        return
    with _Switch.lock:
        if _Switch.holders == 0:
            _Switch.before = bool(torch.backends.mkldnn.enabled)  # type: ignore[truthy-bool]
            torch.backends.mkldnn.enabled = False
        _Switch.holders += 1
    try:
        yield
    finally:
        with _Switch.lock:
            _Switch.holders -= 1
            if _Switch.holders == 0:
                torch.backends.mkldnn.enabled = _Switch.before
