"""Prepared assets in miniature: ten garments that differ by one bright row."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "assets"
    folder.mkdir()
    rng = np.random.default_rng(7)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.where(np.arange(n) % 3 == 0, 0, np.arange(n) % 10).astype(np.int64)
        images = rng.integers(0, 120, (n, 28, 28), dtype=np.uint8)
        images[np.arange(n), labels * 2] += 100
        return images, labels

    (train, train_labels), (test, test_labels) = draw(240), draw(60)
    np.savez(
        folder / "fashion.npz",
        train_images=train,
        train_labels=train_labels,
        test_images=test,
        test_labels=test_labels,
    )
    monkeypatch.setenv("CHIASM_DATA", str(folder))
    return folder
