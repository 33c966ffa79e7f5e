"""Small stand-ins for the assets "emoji" and "photos"."""

from pathlib import Path

import numpy as np

STYLES = ("noto", "fluent-3d", "fluent-flat", "twemoji", "openmoji", "openclipart")
NAMES = ("dog", "cat", "red apple", "bus", "lamp", "only two")


def write_drawings(folder: Path) -> None:
    """Six names in up to six styles: discs whose colour tells the name and whose radius tells the style."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:64, :64] - 31.5
    images, concept, style, codes = [], [], [], []
    for k, name in enumerate(NAMES):
        for s, _ in enumerate(STYLES[:2] if name == "only two" else STYLES):
            image = np.zeros((64, 64, 4), np.uint8)
            image[np.hypot(x, y) <= 20 + 2 * s] = (40 * k, 255 - 40 * k, 10 * s, 255)
            images.append(image)
            concept.append(k)
            style.append(s)
            codes.append(f"{k}-{s}")
    np.savez(
        folder / "emoji.npz",
        names=np.array(NAMES),
        groups=np.array(["things"] * len(NAMES)),
        styles=np.array(STYLES),
        images=np.stack(images),
        concept=np.array(concept),
        style=np.array(style),
        codes=np.array(codes),
    )


def write_photos(folder: Path, count: int = 12) -> None:
    """Grey pictures, each of its own brightness."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"photo{k}" for k in range(count)]
    photos = {f"photo_{name}": np.full((90, 120, 3), 10 * k, np.uint8) for k, name in enumerate(names)}
    np.savez(folder / "photos.npz", names=np.array(names), **photos)  # type: ignore[arg-type]
