"""Small deterministic pictures with questions, for the miniature experiments of `claims`.

What: one function a task, each from a NumPy generator to an ``Item``; ``item(task, split, seed, index)`` seeds that
generator from all four, so that the train, dev and test splits of a task never share a picture by construction of
their random streams. Text is drawn with Pillow's bundled font: nothing is read from disk or network.
Source: InternVL 2.5 fact sheet, section 7 (common rig).

Every picture is made of square cells of ``CELL`` pixels; a tile of the rig has 2 x 2 cells.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from chiasm.data.mixture import derive_seed
from chiasm.errors import ConfigError

__all__ = ["CELL", "COLOURS", "TASKS", "Item", "item", "jpeg", "running_sums", "worksheet"]

CELL = 14
"""Side of a cell in pixels: with patches of 7 and unshuffle 1/2, one visual token."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 70, 70),
    "grn": (70, 200, 90),
    "blu": (90, 120, 250),
    "yel": (235, 220, 60),
    "wht": (245, 245, 245),
    "pnk": (245, 130, 220),
}
"""Three letters each, so that answers of one kind have one length: a small model then learns in a few hundred
steps, not in a few thousand, where in the picture the next character stands."""
PAPER, INK, NIGHT = (230, 230, 230), (20, 20, 20), (25, 25, 25)
BASE, SMALL = 5, 4
"""Sums are of digits below `SMALL`, so that every running sum of eight is one letter, and are asked modulo `BASE`:
at once that is hard (no sum of parts comes near), step by step it is easy."""


@dataclass(frozen=True, slots=True)
class Item:
    """A picture, a question and its answer; ``facts`` are the answer's parts that a score counts."""

    image: Image.Image
    question: str
    answer: str
    facts: tuple[str, ...] = ()


def item(task: str, split: str, seed: int, index: int) -> Item:
    """Return one item: a pure function of its arguments.

    Raises:
        ConfigError: no such task, or no such split.
    """
    if task not in TASKS:
        raise ConfigError(f"the rig has no task {task!r}: it has {', '.join(TASKS)}")
    if split not in ("train", "dev", "test"):
        raise ConfigError(f"split {split!r} must be train, dev or test")
    random = np.random.Generator(np.random.PCG64(derive_seed(seed, "rig", task, split, index)))
    return TASKS[task](random)


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Return the picture after one JPEG compression (libjpeg's default chroma subsampling, as cameras use)."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def running_sums(digits: list[int]) -> str:
    """Spell the running sums, a letter each (a for 0), and again modulo `BASE`: [3, 0, 3] -> ``ddg 331``."""
    sums = [sum(digits[: n + 1]) for n in range(len(digits))]
    return "".join(chr(ord("a") + s) for s in sums) + " " + "".join(str(s % BASE) for s in sums)


def worksheet(digits: list[int]) -> str:
    """Spell twelve lines about digits: they, and functions of each of them alone (plus one, nine minus, halves, …)."""
    functions = (
        lambda d: d,
        lambda d: (d + 1) % 10,
        lambda d: 9 - d,
        lambda d: d // 2,
        lambda d: d % 2,
        lambda d: (d + 5) % 10,
        lambda d: d * d % 10,
        lambda d: 3 * d % 10,
        lambda d: max(d, 5),
        lambda d: min(d, 5),
        lambda d: (d - 1) % 10,
        lambda d: d,
    )
    return " ".join("".join(str(f(d)) for d in digits) for f in functions)


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _write(
    image: Image.Image, text: str, centre: tuple[float, float], size: int, ink: tuple[int, ...]
) -> None:
    ImageDraw.Draw(image).text(centre, text, font=_font(size), fill=ink, anchor="mm")


# --- tiling: four panels of 2 x 2 small digits in one colour; the page is 2 x 2 tiles large -----------------


def _page(random: np.random.Generator, grain: float = 20.0) -> tuple[Image.Image, str, str]:
    """The page, its colour, and its digits panel by panel (the order of the tiles and of their tokens).

    Without grain nothing is lost by shrinking: a network reads 3-pixel digits of a clean page as well as any.
    """
    side = 4 * CELL
    name = list(COLOURS)[random.integers(len(COLOURS))]
    code = "".join(str(d) for d in random.integers(0, 10, 16))
    tint = tuple(15 + channel // 8 for channel in COLOURS[name])
    image = Image.new("RGB", (side, side), tint)
    for n, digit in enumerate(code):
        panel, cell = divmod(n, 4)
        column, row = 2 * (panel % 2) + cell % 2, 2 * (panel // 2) + cell // 2
        shift = random.uniform(-1, 1, 2)
        centre = (CELL * (column + 0.5) + float(shift[0]), CELL * (row + 0.5) + float(shift[1]))
        _write(image, digit, centre, 8, COLOURS[name])
    grainy = np.asarray(image, np.float64) + random.normal(0, 1, (side, side, 1)) * grain
    return Image.fromarray(grainy.clip(0, 255).round().astype(np.uint8)), name, code


def _code(random: np.random.Generator) -> Item:
    image, _, code = _page(random)
    return Item(image, "text?", code, tuple(code))


def _panel(random: np.random.Generator) -> Item:
    image, _, code = _page(random, grain=0.0)
    return Item(image.crop((0, 0, 2 * CELL, 2 * CELL)), "text?", code[:4], tuple(code[:4]))


def _panel_colour(random: np.random.Generator) -> Item:
    image, name, _ = _page(random, grain=0.0)
    return Item(image.crop((0, 0, 2 * CELL, 2 * CELL)), "colour?", name, (name,))


def _code_clean(random: np.random.Generator) -> Item:
    image, _, code = _page(random, grain=0.0)
    return Item(image, "text?", code, tuple(code))


def _colour_clean(random: np.random.Generator) -> Item:
    image, name, _ = _page(random, grain=0.0)
    return Item(image, "colour?", name, (name,))


def _colour(random: np.random.Generator) -> Item:
    image, name, _ = _page(random)
    return Item(image, "colour?", name, (name,))


# --- loss exponent: four coloured digits, one in each token; a short and a long answer about them ----------


def _scene(random: np.random.Generator) -> tuple[Image.Image, list[int]]:
    image = Image.new("RGB", (2 * CELL, 2 * CELL), NIGHT)
    digits = [int(d) for d in random.integers(0, 10, 4)]
    names = [list(COLOURS)[i] for i in random.integers(0, len(COLOURS), 4)]
    for n, (digit, name) in enumerate(zip(digits, names, strict=True)):
        _write(image, str(digit), (CELL * (n % 2 + 0.5), CELL * (n // 2 + 0.5)), 12, COLOURS[name])
    return image, digits


def _scan(random: np.random.Generator) -> Item:
    image, digits = _scene(random)
    answer = "".join(map(str, digits))
    return Item(image, "digits", answer, tuple(answer))


def _short(random: np.random.Generator) -> Item:
    image, digits = _scene(random)
    return Item(image, "low right", str(digits[3]), (str(digits[3]),))


def _long(random: np.random.Generator) -> Item:
    image, digits = _scene(random)
    return Item(image, "worksheet", worksheet(digits), tuple(worksheet(digits).replace(" ", "")))


def _long_loop(random: np.random.Generator) -> Item:
    """The long question with an answer that repeats its first line, as broken generators write."""
    image, digits = _scene(random)
    return Item(image, "worksheet", " ".join(["".join(map(str, digits))] * 12))


# --- probes: one large digit ----------------------------------------------


def _glyph(random: np.random.Generator) -> Item:
    digit, name = str(random.integers(0, 10)), list(COLOURS)[random.integers(len(COLOURS))]
    image = Image.new("RGB", (2 * CELL, 2 * CELL), NIGHT)
    shift = random.uniform(-4, 4, 2)
    _write(
        image,
        digit,
        (CELL + float(shift[0]), CELL + float(shift[1])),
        int(random.integers(14, 24)),
        COLOURS[name],
    )
    return Item(image, "digit?", digit, (digit,))


# --- JPEG: faint digits on grey -------------- ----------------------------


def _faint(random: np.random.Generator) -> Item:
    size, digits = (4 * CELL, 2 * CELL), [int(d) for d in random.integers(0, 10, 8)]
    ink = Image.new("L", size, 0)
    for n, digit in enumerate(digits):
        shift = random.uniform(-1, 1, 2)
        centre = (CELL * (n % 4 + 0.5) + float(shift[0]), CELL * (n // 4 + 0.5) + float(shift[1]))
        ImageDraw.Draw(ink).text(centre, str(digit), font=_font(12), fill=255, anchor="mm")
    contrast = float(random.uniform(12, 24))
    grey = (random.uniform(110, 120) + contrast * np.asarray(ink, np.float64) / 255).round().astype(np.uint8)
    image = Image.fromarray(np.repeat(grey[..., None], 3, 2))
    answer = "".join(map(str, digits))
    return Item(image, "read", answer, tuple(answer))


# --- eight digits, 4 x 2: read them, short and long answers, their sum modulo 5 with and without steps -----


def _digits(random: np.random.Generator, top: int = 10, cells: int = 8) -> tuple[Image.Image, list[int]]:
    image = Image.new("RGB", (cells // 2 * CELL, 2 * CELL), PAPER)
    digits = [int(d) for d in random.integers(0, top, cells)]
    for n, digit in enumerate(digits):
        centre = (CELL * (n % (cells // 2) + 0.5), CELL * (n // (cells // 2) + 0.5))
        jitter = random.uniform(-1, 1, 2)
        _write(image, str(digit), (centre[0] + float(jitter[0]), centre[1] + float(jitter[1])), 12, INK)
    return image, digits


def _read(random: np.random.Generator) -> Item:
    image, digits = _digits(random)
    answer = "".join(map(str, digits))
    return Item(image, "read", answer, tuple(answer))


def _read_small(random: np.random.Generator) -> Item:
    image, digits = _digits(random, SMALL)
    answer = "".join(map(str, digits))
    return Item(image, "read", answer, tuple(answer))


def _sum(random: np.random.Generator) -> Item:
    image, digits = _digits(random, SMALL)
    total = str(sum(digits) % BASE)
    return Item(image, "sum", total, (total,))


def _sum_cot(random: np.random.Generator) -> Item:
    image, digits = _digits(random, SMALL)
    answer, total = "".join(map(str, digits)), str(sum(digits) % BASE)
    return Item(image, "sum, step by step", f"{answer} {running_sums(digits)}. Answer: {total}", (total,))


TASKS: dict[str, Callable[[np.random.Generator], Item]] = {
    "panel": _panel,
    "panel_colour": _panel_colour,
    "code_clean": _code_clean,
    "code": _code,
    "colour_clean": _colour_clean,
    "colour": _colour,
    "scan": _scan,
    "short": _short,
    "long": _long,
    "long_loop": _long_loop,
    "glyph": _glyph,
    "faint": _faint,
    "read": _read,
    "read_small": _read_small,
    "sum": _sum,
    "sum_cot": _sum_cot,
}
