"""Fashion-MNIST: grey pictures of clothes, its official 60,000 / 10,000 split (Xiao, Rasul, Vollgraf 2017; MIT).

The last 5,000 training pictures are ``dev``. The files come from Debian's ``dataset-fashion-mnist``
(see ``worlds.assets``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from chiasm.worlds.assets import load_arrays
from chiasm.worlds.world import Sample, World, resize_square

__all__ = ["ANSWERS", "FashionWorld"]

#: The answer of each official class id 0..9.
ANSWERS = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
DEV = 5000


class FashionWorld(World):
    """Questions about 28 x 28 grey pictures (bright on black), enlarged to 64 x 64 RGB by PIL's bicubic.

    Args:
        split: "train" (the official training pictures but the last 5,000), "dev" (those), "test" (official).
        seed: changes the phrasing of training questions only.
        folder: where the prepared assets are (default: ``assets.assets_dir()``).

    Raises:
        DataError: Fashion-MNIST has not been prepared.
    """

    family = "fashion"
    questions = ("What piece of clothing is this?", "What kind of garment is it?", "Which item is shown?")

    def __init__(self, split: str, *, seed: int = 0, folder: str | Path | None = None) -> None:
        super().__init__(split, seed=seed)
        arrays = load_arrays("fashion", folder)
        source = "test" if split == "test" else "train"
        # A tiny synthetic set (tests) keeps at least half of its pictures for training.
        kept = max(len(arrays["train_labels"]) - DEV, len(arrays["train_labels"]) // 2)
        part = {"train": slice(0, kept), "dev": slice(kept, None), "test": slice(None)}[split]
        self._first = part.start or 0
        self._images = arrays[f"{source}_images"][part]
        self._labels = arrays[f"{source}_labels"][part]
        self._source = source

    def __len__(self) -> int:
        return len(self._labels)

    def sample(self, index: int) -> Sample:
        """Return sample ``index``; ``meta`` holds the class id and the row in the official file."""
        i = self.checked(index)
        label, row = int(self._labels[i]), self._first + i
        return Sample(
            image=resize_square(self._images[i]),
            question=self.questions[self.question_id(i)],
            answer=ANSWERS[label],
            family=self.family,
            key=f"fashion/{self._source}/{row}",
            meta={"class": label, "row": row},
        )

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the split's native pictures (N, 28, 28) uint8 and class ids (N,) int64, in sample order."""
        return self._images, self._labels

    def manifest(self) -> dict[str, Any]:
        """Return the base facts and the class answers in id order."""
        return super().manifest() | {"answers": list(ANSWERS)}
