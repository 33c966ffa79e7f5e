"""One rendered word: words *and* fonts of the three splits are disjoint.

Words: ``wordlist.txt`` (2,050 common English words of 3–6 letters, compiled for this project), divided by a hash of
the word: 80 % train, 8 % dev, 12 % test. Fonts: ``worlds.fonts``. Colours, size, position, rotation (± 5°) and a
light background texture are random; text and background differ by at least ``CONTRAST`` in luma.

With ``pseudo > 0`` that share of the training pictures shows a random pronounceable string instead (its answer is
the string), which makes a reader spell rather than guess from a vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from chiasm.errors import DataError
from chiasm.worlds.fonts import find_fonts, font_hash, load_font
from chiasm.worlds.world import SIZE, Sample, World

__all__ = ["MAX_LETTERS", "WordsWorld", "letters", "render_word", "word_split", "words_of"]

MAX_LETTERS = 6
#: Smallest difference in luma (0..255) between text and background.
CONTRAST = 110.0
_SUPER = 2  # text is drawn at twice the size, rotated there and reduced: smooth edges at 64 px
_LUMA = np.array([0.299, 0.587, 0.114])


def word_split(word: str) -> str:
    """Return the split that ``word`` belongs to: a pure function of its letters."""
    bucket = int.from_bytes(hashlib.blake2s(word.encode(), digest_size=4).digest(), "little") % 100
    return "train" if bucket < 80 else "dev" if bucket < 88 else "test"


@functools.cache
def words_of(split: str) -> tuple[str, ...]:
    """Return the split's words in alphabetical order."""
    text = resources.files("chiasm.worlds").joinpath("wordlist.txt").read_text(encoding="ascii")
    return tuple(word for word in text.split() if word_split(word) == split)


def letters(word: str) -> np.ndarray:
    """Return (6,) int64: 0..25 for a..z at each position, 26 behind the word's end."""
    codes = [ord(letter) - ord("a") for letter in word]
    return np.array(codes + [26] * (MAX_LETTERS - len(codes)), np.int64)


class WordsWorld(World):
    """Questions about one rendered word.

    Args:
        split: "train", "dev" or "test".
        seed: changes words, fonts, colours and places; never the division into splits.
        size: number of samples (default 20,000 for train, 2,000 else).
        pseudo: share of random strings among the training pictures, 0..1.
        folder: where the prepared assets are (default: ``assets.assets_dir()``).

    Raises:
        DataError: no font of the split is available, or ``pseudo`` is given for dev or test.
    """

    family = "words"
    questions = ("What word is written?", "Which word is this?", "Read the word.")

    def __init__(
        self,
        split: str,
        *,
        seed: int = 0,
        size: int | None = None,
        pseudo: float = 0.0,
        folder: str | Path | None = None,
    ) -> None:
        super().__init__(split, seed=seed)
        if not 0.0 <= pseudo <= 1.0 or (pseudo and split != "train"):
            raise DataError(f"pseudo={pseudo} for {split}: it is a share 0..1 of training pictures only")
        self.words = words_of(split)
        self.fonts = find_fonts(split, folder)
        self.pseudo = pseudo
        self._paths = tuple(str(path) for path in self.fonts.values())
        self._stems = tuple(self.fonts)
        self._size = size if size is not None else (20_000 if split == "train" else 2_000)

    def __len__(self) -> int:
        return self._size

    def sample(self, index: int) -> Sample:
        """Return sample ``index``; ``meta`` holds font, em size, angle in degrees and whether it is a real word."""
        i = self.checked(index)
        rng = self.random(i)
        made_up = bool(rng.random() < self.pseudo)
        word = _pseudo_word(rng) if made_up else self.words[int(rng.integers(len(self.words)))]
        font = int(rng.integers(len(self._paths)))
        image, facts = render_word(word, self._paths[font], rng)
        return Sample(
            image=image,
            question=self.questions[self.question_id(i)],
            answer=word,
            family=self.family,
            key=self.key(i),
            meta={"font": self._stems[font], "pseudo": made_up, **facts},
        )

    def manifest(self) -> dict[str, Any]:
        """Return the base facts, the number of words and each font with a hash of its file."""
        fonts = {stem: font_hash(str(path)) for stem, path in self.fonts.items()}
        return super().manifest() | {"words": len(self.words), "pseudo": self.pseudo, "fonts": fonts}


def render_word(word: str, font_path: str, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    """Draw ``word`` once: random size, place, rotation, colours, texture.

    Returns:
        image (64, 64, 3) uint8 and the facts {"em": font size in px, "angle": degrees counter-clockwise,
        "box": [x0, y0, x1, y1] of the inked pixels, x1 and y1 exclusive}.
    """
    angle = float(rng.uniform(-5.0, 5.0))
    em, mask = _text_mask(word, font_path, float(rng.uniform(0.85, 1.0)), angle)
    height, width = mask.shape
    y = int(rng.integers(1, SIZE - height))  # at least 1 px of background all around
    x = int(rng.integers(1, SIZE - width))
    alpha = np.zeros((SIZE, SIZE), np.float32)
    alpha[y : y + height, x : x + width] = mask
    ink, paper = _colours(rng)
    background = paper + _texture(rng)
    image = background + alpha[..., None] * (ink - background)
    inked = alpha > 0.5
    ys, xs = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    box = (
        [int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1]
        if len(xs)
        else [x, y, x + width, y + height]
    )
    facts = {"em": em, "angle": round(angle, 3), "box": box}
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), facts


def _text_mask(word: str, font_path: str, fill: float, angle: float) -> tuple[float, np.ndarray]:
    """Return (em size in px, mask (h, w) float32 0..1) with h, w ≤ 62, cropped to the ink.

    ``fill`` is the share of the 60 px line that the word takes, unless its em would exceed 34 px.
    """
    probe = load_font(font_path, 64).getbbox(word)
    em = min(34.0, 60.0 * fill * 64.0 / max(1.0, probe[2] - probe[0]))
    font = load_font(font_path, max(8, round(em * _SUPER)))
    left, top, right, bottom = (int(edge) for edge in font.getbbox(word))
    pad = 2 * _SUPER
    canvas = Image.new("L", (right - left + 2 * pad, bottom - top + 2 * pad))
    ImageDraw.Draw(canvas).text((pad - left, pad - top), word, fill=255, font=font)
    canvas = canvas.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    box = canvas.getbbox()
    if box is None:  # a font without glyphs for these letters
        raise DataError(f"the font {font_path} draws nothing for {word!r}: remove it from the fonts folder")
    canvas = canvas.crop(box)
    scale = min(1 / _SUPER, 62 / canvas.width, 62 / canvas.height)
    size = (max(1, round(canvas.width * scale)), max(1, round(canvas.height * scale)))
    small = canvas.resize(size, Image.Resampling.BOX if scale == 1 / _SUPER else Image.Resampling.BILINEAR)
    return em, np.asarray(small, np.float32) / 255.0


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return (ink, paper), (3,) float32 in 0..255, at least CONTRAST apart in luma."""
    while True:
        ink, paper = rng.uniform(0, 255, (2, 3))
        if abs(float((ink - paper) @ _LUMA)) >= CONTRAST:
            return ink.astype(np.float32), paper.astype(np.float32)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Return a faint (64, 64, 3) float32 offset: nothing, a gradient, coarse blotches or grain."""
    kind, strength = int(rng.integers(4)), float(rng.uniform(4.0, 16.0))
    ramp = np.linspace(-1.0, 1.0, SIZE, dtype=np.float32)
    if kind == 1:
        a, b = rng.uniform(-1.0, 1.0, 2)
        field = a * ramp[:, None] + b * ramp[None, :]
    elif kind == 2:
        field = np.kron(rng.uniform(-1.0, 1.0, (8, 8)), np.ones((8, 8)))
    elif kind == 3:
        field = rng.uniform(-1.0, 1.0, (SIZE, SIZE))
    else:
        field = np.zeros((SIZE, SIZE))
    return (strength * field).astype(np.float32)[..., None].repeat(3, axis=2)


def _pseudo_word(rng: np.random.Generator) -> str:
    """Return 3–6 letters, consonants and vowels in turn with some doubled consonants; always a train string."""
    consonants, vowels = "bcdfghjklmnpqrstvwxyz", "aeiou"
    while True:
        length = int(rng.integers(3, MAX_LETTERS + 1))
        vowel = bool(rng.integers(2))
        word = ""
        while len(word) < length:
            group = vowels if vowel else consonants
            word += group[int(rng.integers(len(group)))]
            vowel = not vowel if rng.random() < 0.85 else vowel
        if word_split(word) == "train":
            return word
