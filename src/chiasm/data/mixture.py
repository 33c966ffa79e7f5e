"""Which sample is read when: the stateless sampler of every training run.

What: ``Mixture``. There is no iterator and no position to save: the samples of a step are a pure function of
(seed, sizes, weights, batch, step), so resuming at step s is asking for step s.
Source: design of this package (no paper).

Order: the weights become a repeating pattern of ``period`` slots, spread as evenly as possible, so every batch
holds close to its share of each family; the j-th draw of a family is entry j mod n of that family's permutation of
epoch j // n, so nothing repeats before its whole family was read.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch

from chiasm.errors import ConfigError

__all__ = ["Draw", "Mixture", "derive_seed", "generator"]

Draw = tuple[str, int]
"""One sample: (family, index in that family)."""


def derive_seed(*parts: int | str) -> int:
    """Mix a seed with what it is for (``derive_seed(seed, "augment", step)``) into 63 well-spread bits."""
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts]
    low, high = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return (int(high) << 32 | int(low)) >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded with ``derive_seed(*parts)``."""
    return torch.Generator().manual_seed(derive_seed(*parts))


class Mixture:
    """A weighted mixture over families without any state.

    Args:
        sizes: family -> number of samples.
        weights: family -> relative share (need not sum to 1); families at 0 or absent are left out.
        batch: draws of one optimiser step.
        seed: of the permutations.
        period: length of the repeating pattern; shares are rounded to 1/period.

    Raises:
        ConfigError: no family is left, or a weighted family is unknown or empty.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, float],
        *,
        batch: int,
        seed: int,
        period: int = 1000,
    ) -> None:
        wanted = {name: float(w) for name, w in weights.items() if w > 0}
        for name in wanted:
            if sizes.get(name, 0) < 1:
                raise ConfigError(
                    f"family {name!r} has weight {wanted[name]:g} but no samples: prepare it or set 0"
                )
        if not wanted or batch < 1 or len(wanted) > period:
            raise ConfigError(
                f"a mixture needs batch >= 1 and 1..{period} weighted families, "
                f"got batch {batch} and {len(wanted)} families"
            )
        self.names = tuple(sorted(wanted))
        self.sizes = {name: int(sizes[name]) for name in self.names}
        self.batch, self.seed, self.period = batch, seed, period
        counts = _largest_remainder([wanted[name] for name in self.names], period)
        self._pattern = _spread(counts)
        onehot = self._pattern[:, None] == np.arange(len(self.names))[None, :]
        # _before[i, k]: draws of family k among the first i slots of a period.
        self._before = np.concatenate([np.zeros((1, len(self.names)), np.int64), onehot.cumsum(0)])

    def batch_indices(self, step: int) -> list[Draw]:
        """Return the draws of optimiser step ``step`` (0, 1, …): a pure function of the arguments."""
        if step < 0:
            raise ConfigError(f"step must be >= 0, got {step}")
        return [self.draw(position) for position in range(step * self.batch, (step + 1) * self.batch)]

    def draw(self, position: int) -> Draw:
        """Return the draw at ``position`` (0, 1, …) of the endless stream that the steps are cut from."""
        name, index, _ = self.place(position)
        return name, index

    def place(self, position: int) -> tuple[str, int, int]:
        """Return the draw at ``position`` and how often this very sample was drawn before, which is its epoch."""
        turn, slot = divmod(position, self.period)
        family = int(self._pattern[slot])
        name = self.names[family]
        nth = turn * int(self._before[-1, family]) + int(self._before[slot, family])
        epoch, place = divmod(nth, self.sizes[name])
        return name, int(_permutation(self.seed, name, epoch, self.sizes[name])[place]), epoch

    def epochs(self, steps: int) -> dict[str, float]:
        """Return how often each family is read through in ``steps`` steps."""
        share = self._before[-1] / self.period
        return {
            name: float(steps * self.batch * share[k] / self.sizes[name]) for k, name in enumerate(self.names)
        }


@lru_cache(maxsize=64)
def _permutation(seed: int, name: str, epoch: int, size: int) -> np.ndarray:
    return torch.randperm(size, generator=generator(seed, "order", name, epoch)).numpy()


def _largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Integers >= 1 in proportion to the weights whose sum is ``total``."""
    exact = np.asarray(weights) / sum(weights) * total
    counts = np.maximum(np.floor(exact).astype(int), 1)
    while counts.sum() < total:
        counts[int(np.argmax(exact - counts))] += 1
    while counts.sum() > total:
        counts[int(np.argmax(np.where(counts > 1, counts - exact, -np.inf)))] -= 1
    return counts.tolist()


def _spread(counts: Sequence[int]) -> np.ndarray:
    """Order ``counts[k]`` slots of each family k so that each is as even as possible (smooth round robin)."""
    share, total = np.asarray(counts), sum(counts)
    credit = np.zeros(len(counts), np.int64)
    pattern = np.empty(total, np.int64)
    for slot in range(total):
        credit += share
        chosen = int(np.argmax(credit))
        credit[chosen] -= total
        pattern[slot] = chosen
    return pattern
