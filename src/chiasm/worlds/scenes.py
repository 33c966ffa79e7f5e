"""Scenes of 1 to 6 textured objects: attributes, counts, relations, comparisons, existence, boxes, captions.

An object is shape x colour x size x texture (``worlds.sprites``); it fills its box up to the outline. Objects stand
apart, except where a question needs one inside or over another. The 64 (shape, colour) pairs are divided among the
splits so that every shape and every colour occurs in each: a test scene is made only of test pairs, which never
occur in training. Answers are balanced by construction (``worlds.scene_questions``).

Frame: pixels, origin at the top left corner, x to the right, y down; boxes (x0, y0, x1, y1) have exclusive ends. A mask
holds the pixels that an object covers at least by half and that nothing on top covers by half; its box is around it.

Shape legend: H x W pixels (64 x 64 unless said otherwise), h x w of one object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from chiasm.errors import DataError
from chiasm.worlds.scene_questions import CONTAINERS, FAMILIES, Asked, Plan, ask, plan, wish
from chiasm.worlds.sprites import (
    ANGLES,
    COLOURS,
    SHAPES,
    TEXTURES,
    background,
    box_of,
    paste,
    shape_alpha,
    sprite_colours,
)
from chiasm.worlds.world import Sample, Thing, World

__all__ = ["FAMILIES", "ScenesWorld", "draw_objects", "object_masks", "pairs_of", "pixels_of"]

#: Sides of objects in 64ths of the picture's shorter side.
SMALL, LARGE = (10, 13), (18, 23)
_CONTAINER, _CONTENT = (22, 26), (9, 11)
_GAP, _EDGE = 2, 1
#: How many large objects find room beside the others.
_MOST_LARGE = (0, 1, 2, 3, 2, 2, 1)


def pairs_of(split: str) -> tuple[tuple[str, str], ...]:
    """Return the (shape, colour) pairs of a split: 40 for train, 8 for dev, 16 for test; disjoint.

    Pair (s, c) goes by (s + c) mod 8: 0 and 3 → test, 5 → dev, else train, so no shape or colour is missing anywhere.
    """
    home = {0: "test", 3: "test", 5: "dev"}
    return tuple(
        (shape, colour)
        for s, shape in enumerate(SHAPES)
        for c, colour in enumerate(COLOURS)
        if home.get((s + c) % 8, "train") == split
    )


def pixels_of(pixels: int | Sequence[int], least: int) -> tuple[int, int]:
    """Return (width, height) of a side or a pair of sides.

    Raises:
        DataError: not one or two whole numbers of at least ``least``.
    """
    sides = (pixels, pixels) if isinstance(pixels, int) else tuple(pixels)
    if len(sides) != 2 or any(not isinstance(side, int) or side < least for side in sides):
        raise DataError(f"pixels={pixels!r}: give a side or (width, height) of at least {least} pixels")
    return (sides[0], sides[1])


class ScenesWorld(World):
    """Questions about drawn scenes, and their boxes and masks.

    Args:
        split: "train", "dev" or "test"; decides the (shape, colour) pairs.
        seed: changes the scenes.
        size: number of samples (default 20,000 for train, 2,000 else).
        pixels: side or (width, height) of the pictures, at least 48.
        families: question families, asked in turn (each block of ``len(families)`` samples has every one once).
        rounds: questions a picture; further ones are of other families, as far as the scene has any.
        objects: least and largest number of objects; a question may need a narrower range.

    Raises:
        DataError: unknown family, or numbers out of range.
    """

    family = "scenes"
    version = 2

    def __init__(
        self,
        split: str,
        *,
        seed: int = 0,
        size: int | None = None,
        pixels: int | Sequence[int] = 64,
        families: Sequence[str] = FAMILIES,
        rounds: int = 1,
        objects: Sequence[int] = (1, 6),
    ) -> None:
        super().__init__(split, seed=seed)
        self.pixels = pixels_of(pixels, 48)
        self.families = (families,) if isinstance(families, str) else tuple(families)
        unknown = [name for name in self.families if name not in FAMILIES]
        if unknown or not self.families:
            raise DataError(f"unknown families {unknown} of scenes: choose from {', '.join(FAMILIES)}")
        self.least, self.most = (int(k) for k in objects)
        if not 1 <= self.least <= self.most <= 6:
            raise DataError(f"objects={tuple(objects)}: give least and largest number, 1..6")
        if self.most < 3 and {"relation", "comparison"} & set(self.families):
            raise DataError(
                f"objects={tuple(objects)}: relations and comparisons need up to 3 objects at least"
            )
        if not 1 <= rounds <= len(FAMILIES):
            raise DataError(f"rounds={rounds}: give 1..{len(FAMILIES)}")
        self.rounds = rounds
        self.pairs = pairs_of(split)
        self._colours_of = {s: [c for t, c in self.pairs if t == s] for s in SHAPES}
        self._size = size if size is not None else (20_000 if split == "train" else 2_000)

    def __len__(self) -> int:
        return self._size

    def family_of(self, index: int) -> str:
        """Return the question family of sample ``index``'s first question."""
        block, place = divmod(index, len(self.families))
        return self.families[int(self.random(block, "families").permutation(len(self.families))[place])]

    def sample(self, index: int) -> Sample:
        """Return sample ``index``; ``meta`` holds objects, background and, for each question, kind and facts."""
        i = self.checked(index)
        objects, asked, rng = self._scene(i)
        image, tone = self._draw(objects, rng)
        asked += self._further(asked, objects, tone["tone"], rng)
        # The first question of a caption names the background, which is drawn after the objects.
        if asked[0].kind == "caption":
            asked[0] = self._ask("caption", ("caption",), objects, tone["tone"], rng) or asked[0]
        rounds = tuple((one.question, one.answer) for one in asked)
        return Sample(
            image=image,
            question=rounds[0][0],
            answer=rounds[0][1],
            family=self.family,
            key=self.key(i),
            more=rounds[1:],
            meta={
                "objects": objects,
                "background": tone,
                "asked": [{"kind": one.kind, "about": list(one.about), **one.facts} for one in asked],
            },
        )

    def things(self, index: int) -> list[Thing]:
        """Return the objects with their visible boxes and masks; labels are "<colour> <shape>"."""
        objects, _, _ = self._scene(self.checked(index))
        masks = object_masks(objects, *self.pixels)
        return [
            Thing(label=f"{thing['colour']} {thing['shape']}", box=box_of(mask), mask=mask)
            for thing, mask in zip(objects, masks, strict=True)
        ]

    def manifest(self) -> dict[str, Any]:
        """Return the base facts, the split's pairs and all options."""
        return super().manifest() | {
            "pairs": [f"{colour} {shape}" for shape, colour in self.pairs],
            "pixels": list(self.pixels),
            "families": list(self.families),
            "rounds": self.rounds,
            "objects": [self.least, self.most],
        }

    # --- one scene ------------------------------------------------------------------------------------------

    def _scene(self, index: int) -> tuple[list[dict[str, Any]], list[Asked], np.random.Generator]:
        """Draw scenes until one serves the wished answer; the generator then stands where drawing begins."""
        rng = self.random(index)
        family = self.family_of(index)
        wished = wish(family, rng, self.pairs, self.most)
        while True:
            objects = self._objects(plan(family, wished, rng, self.pairs, self.least, self.most), rng)
            asked = self._ask(family, wished, objects, "light", rng) if objects else None
            if asked is not None:
                return objects, [asked], rng

    def _ask(
        self,
        family: str,
        wished: tuple[Any, ...],
        objects: list[dict[str, Any]],
        tone: str,
        rng: np.random.Generator,
    ) -> Asked | None:
        return ask(
            family,
            wished,
            objects,
            rng,
            pairs=self.pairs,
            size=self.pixels,
            tone=tone,
            varied=self.split == "train",
        )

    def _further(
        self, asked: list[Asked], objects: list[dict[str, Any]], tone: str, rng: np.random.Generator
    ) -> list[Asked]:
        """Ask up to ``rounds - 1`` more about the finished scene; a wish that it cannot serve is drawn again, 8
        times.
        """
        more: list[Asked] = []
        if self.rounds == 1:
            return more
        kinds = {asked[0].kind}
        for family in (FAMILIES[int(k)] for k in rng.permutation(len(FAMILIES))):
            if len(more) == self.rounds - 1:
                break
            if family in ("relation", "comparison") and len(objects) < 2:
                continue
            for _ in range(8):
                found = self._ask(family, wish(family, rng, self.pairs, self.most), objects, tone, rng)
                if found is not None and found.kind not in kinds:
                    kinds.add(found.kind)
                    more.append(found)
                    break
        return more

    def _objects(self, wanted: Plan, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Choose attributes and places; an empty list where the objects found no room."""
        objects: list[dict[str, Any]] = []
        large = 0
        for k in range(wanted.count):
            fixed = wanted.fixed[k] if k < len(wanted.fixed) else {}
            key, values = wanted.without if k >= len(wanted.fixed) else ("", ())
            while True:
                shape, colour = self.pairs[int(rng.integers(len(self.pairs)))]
                thing: dict[str, Any] = {
                    "shape": shape,
                    "colour": colour,
                    "size": "large" if rng.random() < 0.5 else "small",
                    "texture": TEXTURES[max(0, int(rng.integers(-1, len(TEXTURES))))],
                }
                if wanted.nested and k < 2:
                    thing["size"] = ("large", "small")[k]
                    if k == 0 and shape not in CONTAINERS:
                        continue
                elif large >= _MOST_LARGE[wanted.count]:
                    thing["size"] = "small"
                # Only shape and colour are drawn as a pair; the other attributes may simply be set.
                thing |= {name: value for name, value in fixed.items() if name in ("size", "texture")}
                if all(thing[name] == value for name, value in fixed.items()) and (
                    not key or thing[key] not in values
                ):
                    break
            if (wanted.nested or wanted.partial) and k == 1 and thing["colour"] == objects[0]["colour"]:
                return []  # would not stand out
            large += thing["size"] == "large"
            thing["angle"] = ANGLES[thing["shape"]][int(rng.integers(len(ANGLES[thing["shape"]])))]
            thing["variant"] = int(rng.integers(3))
            objects.append(thing)
        return _place(objects, wanted, *self.pixels, rng)

    def _draw(
        self, objects: list[dict[str, Any]], rng: np.random.Generator
    ) -> tuple[np.ndarray, dict[str, str]]:
        colours = [np.array(COLOURS[thing["colour"]], np.float32) for thing in objects]
        image, tone = background(rng, *self.pixels, colours)
        draw_objects(image, objects, rng)
        return np.clip(image + 0.5, 0, 255).astype(np.uint8), tone


def draw_objects(image: np.ndarray, objects: list[dict[str, Any]], rng: np.random.Generator) -> None:
    """Draw objects over (H, W, 3) float32 in their order, each colour off by at most 10 a channel."""
    jitter = rng.uniform(-10, 10, (len(objects), 3)).astype(np.float32)
    for thing, off in zip(objects, jitter, strict=True):
        x0, y0, x1, y1 = thing["cell"]
        colour = np.clip(np.array(COLOURS[thing["colour"]], np.float32) + off, 0, 255)
        alpha = shape_alpha(thing["shape"], x1 - x0, y1 - y0, thing["angle"])
        colours = sprite_colours(colour, thing["texture"], x1 - x0, y1 - y0, thing["variant"])
        paste(image, alpha, colour if colours is None else colours, x0, y0)


def object_masks(objects: list[dict[str, Any]], width: int, height: int) -> np.ndarray:
    """Return (N, H, W) bool: the visible pixels of every object, later ones on top."""
    masks = np.zeros((len(objects), height, width), bool)
    for k, thing in enumerate(objects):
        x0, y0, x1, y1 = thing["cell"]
        masks[k, y0:y1, x0:x1] = shape_alpha(thing["shape"], x1 - x0, y1 - y0, thing["angle"]) >= 0.5
        masks[:k, y0:y1, x0:x1] &= ~masks[k, y0:y1, x0:x1]
    return masks


def _place(
    objects: list[dict[str, Any]], wanted: Plan, width: int, height: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Give every object a cell (the rectangle it is drawn in) and a box; an empty list where there was no room."""
    unit = min(width, height) / 64
    gap = max(1, round(_GAP * unit))
    draws = iter(rng.random((90, 3)).tolist())
    cells: list[tuple[int, int, int, int]] = []
    for k, thing in enumerate(objects):
        low, high = LARGE if thing["size"] == "large" else SMALL
        if wanted.nested and k < 2:
            low, high = (_CONTAINER, _CONTENT)[k]
        while len(cells) == k:
            drawn = next(draws, None)
            if drawn is None:
                return []
            side = round((low + drawn[0] * (high - low)) * unit)
            if k == 1 and wanted.nested:
                room = (cells[0][2] - cells[0][0] - side) // 2
                slack = min(room, round(3 * unit))
                x = cells[0][0] + room + round((drawn[1] * 2 - 1) * slack)
                y = cells[0][1] + room + round((drawn[2] * 2 - 1) * slack)
                cells.append((x, y, x + side, y + side))
                continue
            if k == 1 and wanted.partial:
                # Over a corner of the first one, by 35 to 50 per cent of the smaller side each way.
                deep = round((0.35 + 0.15 * drawn[0]) * min(side, cells[0][2] - cells[0][0]))
                x = cells[0][2] - deep if drawn[1] < 0.5 else cells[0][0] + deep - side
                y = cells[0][3] - deep if drawn[2] < 0.5 else cells[0][1] + deep - side
                if min(x, y) < _EDGE or x + side > width - _EDGE or y + side > height - _EDGE:
                    return []
                cells.append((x, y, x + side, y + side))
                continue
            x = _EDGE + int(drawn[1] * (width - side - 2 * _EDGE + 1))
            y = _EDGE + int(drawn[2] * (height - side - 2 * _EDGE + 1))
            far = all(
                x >= c[2] + gap or c[0] >= x + side + gap or y >= c[3] + gap or c[1] >= y + side + gap
                for c in cells
            )
            if far:
                cells.append((x, y, x + side, y + side))
    for thing, cell in zip(objects, cells, strict=True):
        thing["cell"] = list(cell)
        thing["box"] = _visible_box(thing)
    if wanted.nested or wanted.partial:
        for thing, mask in zip(objects, object_masks(objects, width, height), strict=True):
            thing["box"] = list(box_of(mask))
    return objects


def _visible_box(thing: dict[str, Any]) -> list[int]:
    """The box of an object that nothing covers."""
    x, y, x1, y1 = thing["cell"]
    left, top, right, bottom = _inner_box(thing["shape"], x1 - x, y1 - y, thing["angle"])
    return [x + left, y + top, x + right, y + bottom]


_INNER: dict[tuple[str, int, int, int], tuple[int, int, int, int]] = {}


def _inner_box(shape: str, width: int, height: int, angle: int) -> tuple[int, int, int, int]:
    key = (shape, width, height, angle)
    if key not in _INNER:
        _INNER[key] = box_of(shape_alpha(*key) >= 0.5)
    return _INNER[key]
