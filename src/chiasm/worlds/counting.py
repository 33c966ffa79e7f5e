"""Counting 1–5 composed objects; (shape, colour) pairs of dev and test never occur in training.

A scene is a light or dark background (plain, noisy or a gradient) with non-overlapping flat shapes of random
size and rotation. The 48 pairs of 6 shapes x 8 colours are divided so that every shape and every colour occurs
in every split: a test scene is made *only* of test pairs. Counts are balanced exactly: each run of five samples
has every count once.

Frame: pixels of the 64 x 64 picture, x to the right, y down; an object lies inside the circle (x, y, radius), and
circles are at least ``GAP`` px apart and ``EDGE`` px from the border, so that objects are separate for certain.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from chiasm.errors import DataError
from chiasm.worlds.world import SIZE, Sample, World

__all__ = ["COLOURS", "COUNTS", "SHAPES", "CountingWorld", "pairs_of", "render_scene", "shape_mask"]

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
#: Name -> RGB. Far from each other and from every background.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "green": (30, 150, 50),
    "blue": (35, 75, 215),
    "yellow": (245, 215, 25),
    "purple": (140, 40, 170),
    "orange": (248, 130, 15),
    "pink": (250, 120, 190),
    "cyan": (20, 190, 205),
}
COUNTS = ("one", "two", "three", "four", "five")
RADIUS = (5.5, 10.0)
GAP, EDGE = 2.0, 1.0
_SUPER = 4
#: A background keeps at least this RGB distance from every object on it.
_DISTANCE = 90.0


def pairs_of(split: str) -> tuple[tuple[str, str], ...]:
    """Return the (shape, colour) pairs of a split: 8 for dev, 8 for test, 32 for train; disjoint.

    Pair (s, c) goes by (s + c) mod 6: 0 → test, 3 → dev, else train, so no shape or colour is missing anywhere.
    """
    home = {0: "test", 3: "dev"}
    return tuple(
        (shape, colour)
        for s, shape in enumerate(SHAPES)
        for c, colour in enumerate(COLOURS)
        if home.get((s + c) % 6, "train") == split
    )


class CountingWorld(World):
    """Questions about how many objects a scene has.

    Args:
        split: "train", "dev" or "test"; decides the (shape, colour) pairs.
        seed: changes the scenes.
        size: number of samples (default 20,000 for train, 2,000 else).
        attributes: share of questions about one kind ("How many red squares are there?", answers from "one"
            on); the rest asks for all objects.

    Raises:
        DataError: ``attributes`` is not a share 0..1.
    """

    family = "counting"
    questions = ("How many objects are there?", "How many shapes do you see?", "Count the objects.")

    def __init__(
        self, split: str, *, seed: int = 0, size: int | None = None, attributes: float = 0.0
    ) -> None:
        super().__init__(split, seed=seed)
        if not 0.0 <= attributes <= 1.0:
            raise DataError(f"attributes={attributes}: give the share of attribute questions, 0..1")
        self.pairs = pairs_of(split)
        self.attributes = attributes
        self._size = size if size is not None else (20_000 if split == "train" else 2_000)

    def __len__(self) -> int:
        return self._size

    def count(self, index: int) -> int:
        """Return the number of objects of sample ``index``: each block of five samples is a permutation of 1..5."""
        return 1 + int(self.random(index // 5, "counts").permutation(5)[index % 5])

    def sample(self, index: int) -> Sample:
        """Return sample ``index``; ``meta`` holds ``count`` and ``objects`` (shape, colour, x, y, radius, angle)."""
        i = self.checked(index)
        rng = self.random(i)
        objects = self._place(self.count(i), rng)
        image = render_scene(objects, rng)
        question, answer = self.questions[self.question_id(i)], COUNTS[len(objects) - 1]
        if rng.random() < self.attributes:
            asked = objects[int(rng.integers(len(objects)))]
            shape, colour = asked["shape"], asked["colour"]
            same = sum(thing["shape"] == shape and thing["colour"] == colour for thing in objects)
            plural = "crosses" if shape == "cross" else f"{shape}s"
            question, answer = f"How many {colour} {plural} are there?", COUNTS[same - 1]
        return Sample(
            image=image,
            question=question,
            answer=answer,
            family=self.family,
            key=self.key(i),
            meta={"count": len(objects), "objects": objects},
        )

    def manifest(self) -> dict[str, Any]:
        """Return the base facts and the split's (shape, colour) pairs."""
        pairs = [f"{colour} {shape}" for shape, colour in self.pairs]
        return super().manifest() | {"pairs": pairs, "attributes": self.attributes}

    def _place(self, count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Draw ``count`` objects with separate circles by rejection; a crowded attempt starts anew."""
        while True:
            objects: list[dict[str, Any]] = []
            for _ in range(60):
                # Rounded before the test, so that what is stored is what was tested.
                radius = round(float(rng.uniform(*RADIUS)), 2)
                x, y = (round(float(v), 2) for v in rng.uniform(radius + EDGE, SIZE - radius - EDGE, 2))
                if all(
                    math.hypot(x - other["x"], y - other["y"]) >= radius + other["radius"] + GAP
                    for other in objects
                ):
                    shape, colour = self.pairs[int(rng.integers(len(self.pairs)))]
                    angle = round(float(rng.uniform(0.0, 360.0)), 1)
                    objects.append(
                        {"shape": shape, "colour": colour, "x": x, "y": y, "radius": radius, "angle": angle}
                    )
                    if len(objects) == count:
                        return objects


def shape_mask(thing: dict[str, Any], size: int = SIZE) -> np.ndarray:
    """Return the coverage (size, size) float32 in 0..1 of one object of a scene."""
    mask = np.zeros((size, size), np.float32)
    patch, x0, y0 = _patch(thing)
    mask[y0 : y0 + patch.shape[0], x0 : x0 + patch.shape[1]] = patch
    return mask


def render_scene(objects: list[dict[str, Any]], rng: np.random.Generator) -> np.ndarray:
    """Draw the objects over a random background; return (64, 64, 3) uint8."""
    image = _background([COLOURS[thing["colour"]] for thing in objects], rng)
    for thing in objects:
        patch, x0, y0 = _patch(thing)
        area = image[y0 : y0 + patch.shape[0], x0 : x0 + patch.shape[1]]
        area += patch[..., None] * (np.array(COLOURS[thing["colour"]], np.float32) - area)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _patch(thing: dict[str, Any]) -> tuple[np.ndarray, int, int]:
    """Return (coverage of the object's bounding square, its x0, its y0); drawn at 4x and averaged."""
    radius = thing["radius"]
    x0, y0 = math.floor(thing["x"] - radius), math.floor(thing["y"] - radius)
    side = math.ceil(2 * radius) + 1
    cx, cy, r = ((v * _SUPER) for v in (thing["x"] - x0, thing["y"] - y0, radius))
    canvas = Image.new("L", (side * _SUPER, side * _SUPER))
    draw = ImageDraw.Draw(canvas)
    if thing["shape"] == "circle":
        draw.ellipse((cx - r, cy - r, cx + r - 1, cy + r - 1), fill=255)
    else:
        turn = math.radians(thing["angle"])
        points = [
            (cx + r * scale * math.cos(turn + angle), cy + r * scale * math.sin(turn + angle))
            for angle, scale in _OUTLINES[thing["shape"]]
        ]
        draw.polygon(points, fill=255)
    patch = np.asarray(canvas.reduce(_SUPER), np.float32) / 255.0
    return patch[: SIZE - y0, : SIZE - x0], x0, y0


def _polar(points: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Convert corners to (angle, radius), scaled so that the farthest corner is at radius 1."""
    far = max(math.hypot(x, y) for x, y in points)
    return tuple((math.atan2(y, x), math.hypot(x, y) / far) for x, y in points)


#: Corners of each polygon as (angle in radians, share of the radius).
_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": _polar([(1, 1), (-1, 1), (-1, -1), (1, -1)]),
    "triangle": tuple((2 * math.pi * k / 3, 1.0) for k in range(3)),
    "star": tuple((math.pi * k / 5, 1.0 if k % 2 == 0 else 0.42) for k in range(10)),
    "cross": _polar(
        [
            (1, 3),
            (-1, 3),
            (-1, 1),
            (-3, 1),
            (-3, -1),
            (-1, -1),
            (-1, -3),
            (1, -3),
            (1, -1),
            (3, -1),
            (3, 1),
            (1, 1),
        ]
    ),
    "diamond": _polar([(2, 0), (0, 1.1), (-2, 0), (0, -1.1)]),
}


def _background(colours: list[tuple[int, int, int]], rng: np.random.Generator) -> np.ndarray:
    """Return a (64, 64, 3) float32 background that is far from every given colour."""
    while True:
        grey = rng.uniform(0, 60) if rng.random() < 0.5 else rng.uniform(190, 255)
        base = np.clip(grey + rng.uniform(-25, 25, 3), 0, 255)
        if all(float(np.linalg.norm(base - colour)) >= _DISTANCE for colour in colours):
            break
    kind, strength = int(rng.integers(3)), float(rng.uniform(5.0, 15.0))
    field = np.zeros((SIZE, SIZE, 1))
    if kind == 1:
        field = rng.uniform(-1.0, 1.0, (SIZE, SIZE, 1))
    elif kind == 2:
        ramp = np.linspace(-1.0, 1.0, SIZE)
        turn = rng.uniform(0.0, 2 * math.pi)
        field = (math.cos(turn) * ramp[:, None] + math.sin(turn) * ramp[None, :])[..., None]
    return (base + strength * field).astype(np.float32)
