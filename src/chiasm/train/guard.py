"""Guard: notices a step that would spoil a run, before its gradient is used.

What: ``Watch``, the memory behind a recipe's ``Guard``. A loss or gradient norm that is not a number always counts; a
leap of the loss counts against the median of the steps accepted before it, in robust standard deviations
(1.4826 x the median absolute deviation), which one leap among them cannot move.
Source: design of this package (no paper).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

from chiasm.errors import ChiasmError
from chiasm.train.recipe import Guard

__all__ = ["TrainingError", "Watch"]


class TrainingError(ChiasmError):
    """The run cannot go on: loss or gradient is not a number, the loss leapt, or there is nothing to train on."""


class Watch:
    """What a guard has seen so far.

    Args:
        guard: the recipe's.

    Attributes:
        skips: steps skipped in a row, up to now.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.skips = 0
        self._losses: deque[float] = deque(maxlen=guard.window)

    def complaint(self, loss: float, norm: float) -> str | None:
        """Return what is wrong with a step, None if nothing is (its loss then counts for the next ones)."""
        if self.guard.policy == "off":
            return None
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss:g}, gradient norm {norm:g}"
        if self.guard.spike is not None and len(self._losses) >= self.guard.window // 2:
            middle = statistics.median(self._losses)
            spread = 1.4826 * statistics.median(abs(x - middle) for x in self._losses)
            # A run whose losses hardly differ must not call a difference in the third digit a leap.
            limit = middle + self.guard.spike * max(spread, 0.01 * abs(middle))
            if loss > limit:
                return f"loss {loss:.4g} leapt over {limit:.4g} (median {middle:.4g})"
        self._losses.append(loss)
        self.skips = 0
        return None

    def decide(self, step: int, complaint: str, samples: Sequence[str]) -> None:
        """Return if the step is to be skipped.

        Args:
            step: its number, from 1.
            complaint: what is wrong with it.
            samples: the likely culprits, worst first.

        Raises:
            TrainingError: the policy is to stop, or too many steps in a row were skipped.
        """
        worst = ", ".join(samples[:3]) or "unknown"
        if self.guard.policy != "skip":
            raise TrainingError(
                f"step {step}: {complaint}; look at its samples, worst first: {worst}; or lower optim.lr, or set "
                "guard.policy=skip"
            )
        self.skips += 1
        if self.skips >= self.guard.max_skips:
            raise TrainingError(
                f"step {step}: {complaint}, the {self.skips}. step in a row to be skipped (guard.max_skips), with "
                f"{worst}: lower optim.lr or go back to an earlier checkpoint"
            )

    def state(self) -> dict[str, Any]:
        """Return what a resumed run must know, as JSON data."""
        return {"losses": list(self._losses), "skips": self.skips}

    def restore(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._losses.clear()
        self._losses.extend(state.get("losses", ()))
        self.skips = state.get("skips", 0)
