"""CIFAR-10 photographs: our own re-split of the 10,000 images of its *test* set.

Only those 10,000 are reachable from a package index (see ``worlds.assets``), so they are divided here: 8,000 for
training, of which 500 are kept aside as ``dev``, and 2,000 for ``test``; each part has the same number of pictures
of every class. Scores on this split are not comparable with published CIFAR-10 scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from chiasm.errors import DataError
from chiasm.worlds.assets import load_arrays
from chiasm.worlds.world import Sample, World, resize_square

__all__ = ["ANSWERS", "CifarWorld"]

#: CIFAR's class name -> the answer in one plain word.
ANSWERS = {
    "airplane": "airplane",
    "automobile": "car",
    "bird": "bird",
    "cat": "cat",
    "deer": "deer",
    "dog": "dog",
    "frog": "frog",
    "horse": "horse",
    "ship": "ship",
    "truck": "truck",
}
TEST_SHARE, DEV_SHARE = 0.2, 0.05
_SPLIT_SEED = 20100


class CifarWorld(World):
    """Questions about 32 x 32 photographs, enlarged to 64 x 64 by PIL's bicubic.

    Args:
        split: "train" (7,500), "dev" (500) or "test" (2,000); stratified by class, fixed for ever.
        seed: changes the phrasing of training questions only.
        folder: where the prepared assets are (default: ``assets.assets_dir()``).

    Raises:
        DataError: CIFAR-10 has not been prepared.
    """

    family = "cifar10"
    questions = ("What is in the picture?", "What does the photo show?", "What is this?")

    def __init__(self, split: str, *, seed: int = 0, folder: str | Path | None = None) -> None:
        super().__init__(split, seed=seed)
        arrays = load_arrays("cifar10", folder)
        self.names = tuple(str(name) for name in arrays["names"])
        unknown = set(self.names) - set(ANSWERS)
        if unknown:
            raise DataError(f"cifar10.npz names the unknown classes {sorted(unknown)}: prepare it again")
        self.rows_N = _rows(arrays["labels"])[split]
        self._images = arrays["images"][self.rows_N]
        self._labels = arrays["labels"][self.rows_N]

    def __len__(self) -> int:
        return len(self.rows_N)

    def sample(self, index: int) -> Sample:
        """Return sample ``index``; ``meta`` holds the class id, CIFAR's class name and the row in the source."""
        i = self.checked(index)
        label = int(self._labels[i])
        return Sample(
            image=resize_square(self._images[i]),
            question=self.questions[self.question_id(i)],
            answer=ANSWERS[self.names[label]],
            family=self.family,
            key=f"cifar10/{int(self.rows_N[i])}",
            meta={"class": label, "name": self.names[label], "row": int(self.rows_N[i])},
        )

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the split's native pictures (N, 32, 32, 3) uint8 and class ids (N,) int64, in sample order."""
        return self._images, self._labels

    def manifest(self) -> dict[str, Any]:
        """Return the base facts and the class answers in id order."""
        return super().manifest() | {
            "answers": [ANSWERS[name] for name in self.names],
            "source": "cifar10 test",
        }


def _rows(labels_N: np.ndarray) -> dict[str, np.ndarray]:
    """Divide row numbers by class into test (20 %), dev (5 %) and train (75 %), each part in shuffled order."""
    rng = np.random.Generator(np.random.PCG64(_SPLIT_SEED))
    parts: dict[str, list[np.ndarray]] = {"test": [], "dev": [], "train": []}
    for label in range(int(labels_N.max()) + 1):
        rows = rng.permutation(np.flatnonzero(labels_N == label))
        tests, devs = round(len(rows) * TEST_SHARE), max(1, round(len(rows) * DEV_SHARE))
        parts["test"].append(rows[:tests])
        parts["dev"].append(rows[tests : tests + devs])
        parts["train"].append(rows[tests + devs :])
    return {split: rng.permutation(np.concatenate(rows)) for split, rows in parts.items()}
