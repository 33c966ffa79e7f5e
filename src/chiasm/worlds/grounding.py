"""Box grounding: 3 to 5 objects, one is asked for by its name, the answer is its box.

Each side of a box is 15 to 40 % of the picture's; boxes do not overlap; no two objects of a picture have the same
name. An object is a drawn shape ("red circle", shapes and colours divided as in ``worlds.scenes``) or a named
drawing ("dog", asset "emoji", divided as in ``worlds.clipart``). Answers are in the public format, ``<ref>red
circle</ref><box>[[x1,y1,x2,y2]]</box>``, whole numbers 0..1000 of width and height.

The control: ``mean_box`` is the best that an answer without looking can do, one constant box for all pictures.

Frame: pixels, origin at the top left corner, y down, exclusive ends. Shape legend: N samples, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from chiasm.errors import DataError
from chiasm.media.boxes import format_box, iou, pixels_to_thousand
from chiasm.worlds.clipart import Drawing, HeldOut, drawings_of, photo_crop, resize_drawing
from chiasm.worlds.scenes import object_masks, pairs_of, pixels_of
from chiasm.worlds.sprites import (
    ANGLES,
    COLOURS,
    TEXTURES,
    background,
    box_of,
    paste,
    shape_alpha,
    sprite_colours,
)
from chiasm.worlds.world import Sample, Thing, World

__all__ = ["SIDES", "GroundingWorld", "box_scores", "mean_box"]

#: Sides of a box as shares of the picture's width and height.
SIDES = (0.15, 0.40)
_GAP = 0.015


class GroundingWorld(World):
    """Questions for the box of one of several objects.

    Args:
        split: "train", "dev" or "test".
        seed: changes the pictures.
        size: number of samples (default 20,000 for train, 2,000 else).
        pixels: side or (width, height), at least 48.
        sprites: "shapes", or "drawings" (asset "emoji").
        photos: share of pictures with a photograph as background (asset "photos"), 0..1; only with drawings.
        held_out: of drawings, as in ``worlds.clipart``.
        folder: where the prepared assets are.

    Raises:
        DataError: an asset has not been prepared, or a value out of range.
    """

    family = "grounding"
    questions = (
        "Please provide the bounding box coordinate of the region this sentence describes: <ref>{name}</ref>",
        "Where is the {name}? Answer with its box.",
        "Locate the {name}.",
    )

    def __init__(
        self,
        split: str,
        *,
        seed: int = 0,
        size: int | None = None,
        pixels: int | Sequence[int] = 64,
        sprites: Literal["shapes", "drawings"] = "shapes",
        photos: float = 0.0,
        held_out: HeldOut = "drawing",
        folder: str | Path | None = None,
    ) -> None:
        super().__init__(split, seed=seed)
        self.pixels = pixels_of(pixels, 48)
        if sprites not in ("shapes", "drawings"):
            raise DataError(f"sprites={sprites!r}: choose shapes or drawings")
        if not 0.0 <= photos <= 1.0 or (photos and sprites == "shapes"):
            raise DataError(f"photos={photos} with {sprites}: it is a share 0..1, and needs drawings")
        self.sprites, self.photos, self.held_out, self._folder = sprites, photos, held_out, folder
        self.pairs = pairs_of(split)
        self._drawings = drawings_of(split, held_out, folder) if sprites == "drawings" else ()
        if photos:
            photo_crop(split, 8, 8, self.random(0), folder)
        self._size = size if size is not None else (20_000 if split == "train" else 2_000)

    def __len__(self) -> int:
        return self._size

    def sample(self, index: int) -> Sample:
        """Return sample ``index``; ``meta`` holds objects (name, box in pixels), the asked one's number, background."""
        i = self.checked(index)
        rng = self.random(i)
        objects, drawn = self._objects(rng)
        asked = int(rng.integers(len(objects)))
        image, facts = self._draw(objects, drawn, rng)
        name = objects[asked]["name"]
        return Sample(
            image=image,
            question=self.questions[self.question_id(i)].format(name=name),
            answer=format_box(name, pixels_to_thousand(objects[asked]["box"], *self.pixels)),
            family=self.family,
            key=self.key(i),
            meta={"objects": objects, "asked": asked, "background": facts},
        )

    def things(self, index: int) -> list[Thing]:
        """Return all objects with box and mask."""
        objects, drawn = self._objects(self.random(self.checked(index)))
        masks = self._masks(objects, drawn)
        return [
            Thing(label=thing["name"], box=tuple(thing["box"]), mask=mask)
            for thing, mask in zip(objects, masks, strict=True)
        ]

    def manifest(self) -> dict[str, Any]:
        """Return the base facts and all options."""
        return super().manifest() | {
            "pixels": list(self.pixels),
            "sprites": self.sprites,
            "photos": self.photos,
            "held_out": self.held_out if self.sprites == "drawings" else "pairs",
            "names": len({drawing.name for drawing in self._drawings} or self.pairs),
        }

    # --- one picture ----------------------------------------------------------------------------------------

    def _objects(self, rng: np.random.Generator) -> tuple[list[dict[str, Any]], list[Drawing]]:
        """Choose 3..5 objects and their places."""
        count = 3 + int(rng.integers(3))
        cells = _cells(count, *self.pixels, rng)
        objects: list[dict[str, Any]] = []
        drawn: list[Drawing] = []
        while len(objects) < count:
            cell = cells[len(objects)]
            if self.sprites == "drawings":
                drawing = self._drawings[int(rng.integers(len(self._drawings)))]
                thing: dict[str, Any] = {
                    "name": drawing.name,
                    "style": drawing.style,
                    "source": drawing.source,
                }
                if any(other["name"] == drawing.name for other in objects):
                    continue
                drawn.append(drawing)
            else:
                shape, colour = self.pairs[int(rng.integers(len(self.pairs)))]
                if any(other["name"] == f"{colour} {shape}" for other in objects):
                    continue
                thing = {
                    "name": f"{colour} {shape}",
                    "shape": shape,
                    "colour": colour,
                    "texture": TEXTURES[max(0, int(rng.integers(-1, len(TEXTURES))))],
                    "angle": ANGLES[shape][int(rng.integers(len(ANGLES[shape])))],
                    "variant": int(rng.integers(3)),
                }
            objects.append(thing | {"cell": list(cell)})
        for thing, mask in zip(objects, self._masks(objects, drawn), strict=True):
            thing["box"] = list(box_of(mask))
        return objects, drawn

    def _masks(self, objects: list[dict[str, Any]], drawn: list[Drawing]) -> np.ndarray:
        """Return (N, H, W) bool."""
        if self.sprites == "shapes":
            return object_masks(objects, *self.pixels)
        masks = np.zeros((len(objects), *self.pixels[::-1]), bool)
        for mask, thing, drawing in zip(masks, objects, drawn, strict=True):
            x0, y0, x1, y1 = thing["cell"]
            mask[y0:y1, x0:x1] = _fitted(drawing, x1 - x0, y1 - y0)[..., 3] >= 128
        return masks

    def _draw(
        self, objects: list[dict[str, Any]], drawn: list[Drawing], rng: np.random.Generator
    ) -> tuple[np.ndarray, dict[str, str]]:
        width, height = self.pixels
        if drawn:
            means = [drawing.rgba[drawing.rgba[..., 3] > 127][:, :3].mean(0) for drawing in drawn]
            if rng.random() < self.photos:
                image, facts = photo_crop(self.split, width, height, rng, self._folder)
            else:
                # Five drawings may leave no colour that is far from all of them; the largest one decides.
                image, facts = background(rng, width, height, means[:1])
            for thing, drawing in zip(objects, drawn, strict=True):
                x0, y0, x1, y1 = thing["cell"]
                rgba = _fitted(drawing, x1 - x0, y1 - y0)
                paste(image, rgba[..., 3] / np.float32(255.0), rgba[..., :3], x0, y0)
        else:
            colours = [np.array(COLOURS[thing["colour"]], np.float32) for thing in objects]
            image, facts = background(rng, width, height, colours)
            for thing, colour in zip(objects, colours, strict=True):
                x0, y0, x1, y1 = thing["cell"]
                fill = sprite_colours(colour, thing["texture"], x1 - x0, y1 - y0, thing["variant"])
                alpha = shape_alpha(thing["shape"], x1 - x0, y1 - y0, thing["angle"])
                paste(image, alpha, colour if fill is None else fill, x0, y0)
        return np.clip(image + 0.5, 0, 255).astype(np.uint8), facts


def _fitted(drawing: Drawing, width: int, height: int) -> np.ndarray:
    """Return (height, width, 4) float32: the drawing's opaque part stretched over the cell."""
    from PIL import Image

    x0, y0, x1, y1 = box_of(drawing.rgba[..., 3] >= 128)
    side = resize_drawing(drawing, 64)[y0:y1, x0:x1].astype(np.uint8)
    small = Image.fromarray(side).convert("RGBa").resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(small.convert("RGBA"), np.float32)


def _cells(count: int, width: int, height: int, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Draw ``count`` separate rectangles with sides of SIDES, the largest first; a crowded attempt starts anew."""
    gap = max(1, round(_GAP * min(width, height)))
    # A mask may lose a pixel at the tips of a shape, hence one more at the lower end.
    low = tuple(int(np.ceil(SIDES[0] * side)) + 1 for side in (width, height))
    high = tuple(int(SIDES[1] * side) for side in (width, height))
    while True:
        draws = iter(rng.random((24 * count, 2)).tolist())
        sides = rng.random((count, 2)).tolist()
        sizes = [
            (low[0] + round(u * (high[0] - low[0])), low[1] + round(v * (high[1] - low[1]))) for u, v in sides
        ]
        sizes.sort(key=lambda side: -side[0] * side[1])
        cells: list[tuple[int, int, int, int]] = []
        for w, h in sizes:
            for _ in range(24):
                u, v = next(draws)
                x, y = int(u * (width - w + 1)), int(v * (height - h + 1))
                if all(
                    x >= c[2] + gap or c[0] >= x + w + gap or y >= c[3] + gap or c[1] >= y + h + gap
                    for c in cells
                ):
                    cells.append((x, y, x + w, y + h))
                    break
            else:
                break
        if len(cells) == count:
            # Objects are listed in any order, so that size does not follow from place in the list.
            return [cells[int(k)] for k in rng.permutation(count)]


# --- the control ----------------------------------------------------------------------------------------------


def mean_box(world: GroundingWorld, n: int | None = None) -> tuple[float, float, float, float]:
    """Return the mean of the asked boxes of the first ``n`` samples (default: all), in 0..1000 of width and height."""
    return tuple(np.mean(_asked(world, n), 0).tolist())


def box_scores(
    world: GroundingWorld, boxes: Sequence[float] | Sequence[Sequence[float]], n: int | None = None
) -> dict[str, float]:
    """Score answered boxes (0..1000), one for each of the first ``n`` samples or one for all of them.

    Returns:
        ``iou``: the mean; ``accuracy``: the share with at least 0.5.

    Raises:
        DataError: neither one box nor one for each sample.
    """
    truth = _asked(world, n)
    given = np.asarray(boxes, float)
    if given.shape not in ((4,), (len(truth), 4)):
        raise DataError(
            f"boxes of the shape {given.shape}: give one box, or one for each of {len(truth)} samples"
        )
    found = [iou(a, b) for a, b in zip(np.broadcast_to(given, (len(truth), 4)).tolist(), truth, strict=True)]
    return {"iou": float(np.mean(found)), "accuracy": float(np.mean(np.array(found) >= 0.5))}


def _asked(world: GroundingWorld, n: int | None) -> list[tuple[int, int, int, int]]:
    boxes = []
    for index in range(len(world) if n is None else n):
        rng = world.random(world.checked(index))
        objects, _ = world._objects(rng)
        boxes.append(pixels_to_thousand(objects[int(rng.integers(len(objects)))]["box"], *world.pixels))
    return boxes
