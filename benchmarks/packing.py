"""How full packs are, by method, and beside padded batches.

    python benchmarks/packing.py [--samples 50000] [--max-tokens 8192] [--max-tiles 24] [--buffer 20]

Prints the table of ``docs/packing.md``: `chiasm.data.packing.example_items` (text log-normal, median 200, sigma 0.9, a
committed list of tiles). Fill does not depend on the machine, samples a second (process CPU time) do.
"""

from __future__ import annotations

import argparse
import time
from unittest import mock

from chiasm.data.packing import Item, Packer, example_items, simulate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--max-tiles", type=int, default=24)
    parser.add_argument("--buffer", type=int, default=20)
    given = parser.parse_args()
    items = example_items(given.samples)
    limits = {"max_tokens": given.max_tokens, "max_tiles": given.max_tiles, "buffer": given.buffer}
    print(
        "| method | overflow | tokens filled | tiles filled | packs | samples/s |\n|---|---|---|---|---|---|"
    )
    for method in ("best_fit", "first_fit"):
        for overflow in ("refuse", "split"):
            started = time.process_time()
            found = simulate(items, method=method, overflow=overflow, **limits)
            rate = found.items / (time.process_time() - started)
            print(
                f"| {method} | {overflow} | {found.token_fill:.1%} | {found.tile_fill:.1%} | {found.packs} "
                f"| {rate:,.0f} |"
            )
    for rule in ("tiles", "tokens"):
        with (
            mock.patch.object(Packer, "_fullest", lambda self, rule=rule: most(self, rule)),
            mock.patch.object(Packer, "_overdue", return_value=None),  # the rule alone
        ):
            found = simulate(items, **limits)
        print(
            f"best_fit that lets go of the pack with the most {rule}: {found.token_fill:.1%}, {found.packs} packs"
        )
    for size in (8, 16):
        print(f"padded batches of {size}: {padded(items, size):.1%}")


def most(packer: Packer, rule: str) -> int:
    """Place of the open pack with the most tokens or tiles (of equal ones: the more tokens)."""
    opened = packer._open
    return max(range(len(opened)), key=lambda n: (getattr(opened[n], rule), opened[n].tokens))


def padded(items: list[Item], size: int) -> float:
    """Fill of batches in the order of the data, each as long as its longest sample."""
    batches = [items[at : at + size] for at in range(0, len(items), size)]
    slots = sum(len(batch) * max(item.tokens for item in batch) for batch in batches)
    return sum(item.tokens for item in items) / slots


if __name__ == "__main__":
    main()
