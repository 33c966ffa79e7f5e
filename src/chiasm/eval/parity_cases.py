"""The conversations that a model and a server are compared on: text, and pictures of every shape that tiling knows.

Pictures are computed, not stored: slow waves of colour with blocks and lines on them, so that a shifted tile, another
resizer or swapped channels change what is seen. Their sizes follow the side of the model's tile, so that a wide one is
cut into several at any size. Both sides get the same PNG bytes, as the data URL that the server is sent.
"""

from __future__ import annotations

import base64
import io
import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from chiasm.errors import ImageError
from chiasm.media.size import image_size

__all__ = ["Case", "drawn", "of_files", "standard_cases"]

TEXT_QUESTION = "What is the capital of France? Answer in one word."
PICTURE_QUESTION = "Describe the picture in a few words."
PAIR_QUESTION = "What differs between the pictures?"


@dataclass(frozen=True, slots=True)
class Case:
    """A conversation of one question: what it is called, its pictures as data URLs, their sizes, the question."""

    name: str
    question: str
    pictures: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()

    def for_model(self) -> list[dict[str, Any]]:
        """The messages as `ChatModel` takes them."""
        shown = [{"type": "image", "image": url} for url in self.pictures]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": self.question}]}]

    def for_server(self) -> list[dict[str, Any]]:
        """The messages as OpenAI's interface takes them; a text alone is a plain string."""
        if not self.pictures:
            return [{"role": "user", "content": self.question}]
        shown = [{"type": "image_url", "image_url": {"url": url}} for url in self.pictures]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": self.question}]}]


def drawn(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture that is the same everywhere, for a seed."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    rng = np.random.Generator(np.random.PCG64(seed))
    channels = []
    for _ in range(3):
        fx, fy = rng.uniform(0.5, 3.0, 2)
        phase = rng.uniform(0, 2 * np.pi)
        channels.append(127.5 * (1 + np.sin(2 * np.pi * (fx * x / width + fy * y / height) + phase)))
    pixels = np.stack(channels, axis=-1)
    for _ in range(6):
        left, top = int(rng.uniform(0, width * 0.8)), int(rng.uniform(0, height * 0.8))
        wide, high = max(1, int(width * rng.uniform(0.05, 0.3))), max(1, int(height * rng.uniform(0.05, 0.3)))
        pixels[top : top + high, left : left + wide] = rng.uniform(0, 255, 3)
    pixels[:: max(2, height // 12)] *= 0.5
    return Image.fromarray(pixels.round().astype(np.uint8), "RGB")


def standard_cases(side: int, *, pictures: bool = True) -> list[Case]:
    """The fixed set.

    Args:
        side: of the model's tile in pixels.
        pictures: whether the model sees any.
    """
    cases = [Case("text", TEXT_QUESTION)]
    if not pictures:
        return cases
    # The closest grid of each needs another number of tiles (3 x 3, 5 x 2, 3 x 4), so that their counts tell the limit.
    sizes = {
        "square": (3 * side, 3 * side),
        "wide": (5 * side // 2 + side // 20, side),
        "tall": (3 * side // 2, 2 * side - side // 40),
        "small": (max(2, side // 3), max(2, side // 3)),  # one tile, where ties are broken by size
    }
    for n, (name, size) in enumerate(sizes.items()):
        cases.append(_case(name, PICTURE_QUESTION, [drawn(*size, seed=n)]))
    pair = [drawn(side + side // 2, side, seed=8), drawn(side, side, seed=9)]
    return [*cases, _case("two", PAIR_QUESTION, pair)]


def of_files(paths: Sequence[str | Path]) -> list[Case]:
    """One case for each picture file; its bytes are sent as they are.

    Raises:
        ImageError: a file cannot be read, or is no picture.
    """
    cases = []
    for path in map(Path, paths):
        size = image_size(path)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ImageError(f"{path}: cannot be read ({error.strerror or error})") from None
        kind = mimetypes.guess_type(path.name)[0] or "image/png"
        cases.append(Case(path.name, PICTURE_QUESTION, (_url(raw, kind),), (size,)))
    return cases


def _case(name: str, question: str, images: list[Image.Image]) -> Case:
    urls = []
    for image in images:
        out = io.BytesIO()
        image.save(out, "PNG")
        urls.append(_url(out.getvalue(), "image/png"))
    return Case(name, question, tuple(urls), tuple(image.size for image in images))


def _url(raw: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"
