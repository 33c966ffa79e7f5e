"""Naming drawings: emoji of several sets and clip art, on coloured or photographic backgrounds.

Source of the drawings: ``worlds.art_assets`` (asset "emoji"). Every name of the dev and test splits also occurs in
training, but never in the same drawing:

- ``held_out="drawing"``: of each name, one set's drawing is kept for test and another one's for dev, chosen by a hash
  of the name; the sets left are for training. Sets that redraw each other (``RELATED``) are one.
- ``held_out="style"``: test has all drawings of one set (OpenMoji), dev of another (Twemoji), training the others; a
  test picture is then in a style that was never seen.

Names are balanced exactly: each block of ``len(names)`` samples has every name once.

Frame: pixels, origin at the top left corner, y down. Shape legend: H x W pixels, M drawings.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from chiasm.errors import DataError
from chiasm.worlds.assets import assets_dir, load_arrays
from chiasm.worlds.scenes import pixels_of
from chiasm.worlds.sprites import background, box_of, paste
from chiasm.worlds.world import Sample, Thing, World

__all__ = ["RELATED", "ClipartWorld", "Drawing", "HeldOut", "drawings_of", "photo_crop", "resize_drawing"]

HeldOut = Literal["drawing", "style"]
#: Set -> the family of sets that redraw the same designs.
RELATED = {"fluent-3d": "fluent", "fluent-flat": "fluent"}
_STYLE_OF = {"openmoji": "test", "twemoji": "dev"}
#: Photographs by split: a background of a test picture is never one of training.
_PHOTO_TEST, _PHOTO_DEV = 4, 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawing:
    """One named drawing: ``rgba`` is (64, 64, 4) uint8, cropped and centred; ``source`` its code or file."""

    name: str
    group: str
    style: str
    source: str
    rgba: np.ndarray


def _hash(*words: str) -> int:
    return int.from_bytes(hashlib.blake2s("/".join(words).encode(), digest_size=8).digest(), "little")


def drawings_of(
    split: str, held_out: HeldOut = "drawing", folder: str | Path | None = None
) -> tuple[Drawing, ...]:
    """Return a split's drawings, of names that all three splits have.

    Raises:
        DataError: the asset "emoji" has not been prepared, unknown ``held_out``, or too few sets to hold any out.
    """
    return _drawings(
        split, held_out, assets_dir(folder)
    )  # remembered by place, which the environment may change


@functools.lru_cache(maxsize=16)
def _drawings(split: str, held_out: HeldOut, folder: Path) -> tuple[Drawing, ...]:
    if held_out not in ("drawing", "style"):
        raise DataError(f"held_out={held_out!r}: choose drawing or style")
    arrays = load_arrays("emoji", folder)
    styles = [str(style) for style in arrays["styles"]]
    of_name: dict[int, list[int]] = {}
    for row, k in enumerate(arrays["concept"].tolist()):
        of_name.setdefault(k, []).append(row)
    out: list[Drawing] = []
    for k in sorted(of_name):
        name = str(arrays["names"][k])
        used = {styles[int(s)] for s in arrays["style"][of_name[k]]} - {"openclipart"}
        sets = {RELATED.get(style, style) for style in used}
        if held_out == "drawing":
            order = [family for _, family in sorted((_hash(name, family), family) for family in sets)]
            home = {order[0]: "test", order[1]: "dev"} if len(order) >= 3 else None
        else:
            home = _STYLE_OF if set(_STYLE_OF) < sets else None
        if home is None:
            continue
        for row in of_name[k]:
            style = styles[int(arrays["style"][row])]
            if home.get(RELATED.get(style, style), "train") == split:
                out.append(
                    Drawing(
                        name=name,
                        group=str(arrays["groups"][k]),
                        style=style,
                        source=str(arrays["codes"][row]),
                        rgba=arrays["images"][row],
                    )
                )
    if not out:
        raise DataError(
            f"no drawing can be held out by {held_out}: prepare at least three sets of emoji (docs/worlds.md)"
        )
    return tuple(out)


class ClipartWorld(World):
    """Questions about what a drawing shows.

    Args:
        split: "train", "dev" or "test".
        seed: changes places, sizes and backgrounds; never the division.
        size: number of samples (default 20,000 for train; else every drawing about three times).
        pixels: side or (width, height), at least 32.
        held_out: "drawing" or "style", see above.
        names: how many names (taken in a fixed random order, those of one word first), or the names themselves;
            default: all.
        photos: share of pictures with a photograph as background (asset "photos"), 0..1.
        folder: where the prepared assets are.

    Raises:
        DataError: an asset has not been prepared, or an unknown name.
    """

    family = "clipart"
    questions = ("What does the drawing show?", "What is drawn here?", "Name the drawing.")

    def __init__(
        self,
        split: str,
        *,
        seed: int = 0,
        size: int | None = None,
        pixels: int | Sequence[int] = 64,
        held_out: HeldOut = "drawing",
        names: int | Sequence[str] | None = None,
        photos: float = 0.0,
        folder: str | Path | None = None,
    ) -> None:
        super().__init__(split, seed=seed)
        self.pixels = pixels_of(pixels, 32)
        self.held_out: HeldOut = held_out
        if not 0.0 <= photos <= 1.0:
            raise DataError(f"photos={photos}: give the share of photographic backgrounds, 0..1")
        self.photos, self._folder = photos, folder
        self._of_name: dict[str, list[Drawing]] = {}
        for drawing in drawings_of(split, held_out, folder):
            self._of_name.setdefault(drawing.name, []).append(drawing)
        self.names = _chosen(tuple(self._of_name), names)
        if photos:
            _photos(split, assets_dir(folder))
        self._size = size if size is not None else (20_000 if split == "train" else 3 * len(self.names))

    def __len__(self) -> int:
        return self._size

    def name_of(self, index: int) -> str:
        """Return the name that sample ``index`` shows."""
        block, place = divmod(index, len(self.names))
        return self.names[int(self.random(block, "names").permutation(len(self.names))[place])]

    def sample(self, index: int) -> Sample:
        """Return sample ``index``; ``meta`` holds name, group, style, source, box and background."""
        i = self.checked(index)
        drawing, cell, facts, image = self._compose(i)
        mask = _mask(drawing, cell, self.pixels)
        return Sample(
            image=np.clip(image + 0.5, 0, 255).astype(np.uint8),
            question=self.questions[self.question_id(i)],
            answer=drawing.name,
            family=self.family,
            key=self.key(i),
            meta={
                "group": drawing.group,
                "style": drawing.style,
                "source": drawing.source,
                "box": list(box_of(mask)),
                "background": facts,
            },
        )

    def things(self, index: int) -> list[Thing]:
        """Return the drawing's box and mask (where it is at least half opaque)."""
        drawing, cell, _, _ = self._compose(self.checked(index))
        mask = _mask(drawing, cell, self.pixels)
        return [Thing(label=drawing.name, box=box_of(mask), mask=mask)]

    def manifest(self) -> dict[str, Any]:
        """Return the base facts, names, options and a digest of the drawings."""
        used = [drawing for name in self.names for drawing in self._of_name[name]]
        digest = hashlib.blake2s(digest_size=8)
        for drawing in used:
            digest.update(drawing.name.encode())
            digest.update(drawing.rgba.tobytes())
        return super().manifest() | {
            "names": list(self.names),
            "pixels": list(self.pixels),
            "held_out": self.held_out,
            "photos": self.photos,
            "drawings": len(used),
            "digest": digest.hexdigest(),
        }

    def _compose(self, index: int) -> tuple[Drawing, tuple[int, int, int], dict[str, str], np.ndarray]:
        """Return the drawing, its cell (x, y, side), the background's facts and the picture (H, W, 3) float32."""
        rng = self.random(index)
        choice = self._of_name[self.name_of(index)]
        drawing = choice[int(rng.integers(len(choice)))]
        width, height = self.pixels
        side = round(float(rng.uniform(0.6, 0.95)) * min(width, height))
        x, y = (int(rng.integers(0, space - side + 1)) for space in (width, height))
        if rng.random() < self.photos:
            image, facts = photo_crop(self.split, width, height, rng, self._folder)
        else:
            opaque = drawing.rgba[drawing.rgba[..., 3] > 127][:, :3]
            image, facts = background(rng, width, height, [opaque.mean(0)])
        rgba = resize_drawing(drawing, side)
        paste(image, rgba[..., 3] / np.float32(255.0), rgba[..., :3], x, y)
        return drawing, (x, y, side), facts, image


def _mask(drawing: Drawing, cell: tuple[int, int, int], pixels: tuple[int, int]) -> np.ndarray:
    x, y, side = cell
    mask = np.zeros(pixels[::-1], bool)
    mask[y : y + side, x : x + side] = resize_drawing(drawing, side)[..., 3] >= 128
    return mask


def resize_drawing(drawing: Drawing, side: int) -> np.ndarray:
    """Return (side, side, 4) float32 in 0..255; colours are weighted by opacity while averaging."""
    picture = Image.fromarray(drawing.rgba).convert("RGBa")
    small = picture.resize((side, side), Image.Resampling.BILINEAR).convert("RGBA")
    return np.asarray(small, np.float32)


def _chosen(known: tuple[str, ...], names: int | Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return known
    if isinstance(names, int):
        if not 1 <= names <= len(known):
            raise DataError(f"names={names}: there are 1..{len(known)}")
        order = sorted(known, key=lambda name: (" " in name, _hash("order", name)))
        return tuple(order[:names])
    wanted = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise DataError(f"no drawings of {', '.join(map(str, unknown)) or 'nothing'}: see ClipartWorld.names")
    return wanted


# --- photographs ----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _photos(split: str, folder: Path) -> tuple[tuple[str, np.ndarray], ...]:
    """The split's photographs, divided by a hash of their names; every split has at least one if there are three."""
    arrays = load_arrays("photos", folder)
    names = sorted((str(name) for name in arrays["names"]), key=lambda name: _hash("photo", name))
    share = len(names) / 20
    tests, devs = max(1, round(_PHOTO_TEST * share)), max(1, round(_PHOTO_DEV * share))
    parts = {"test": names[:tests], "dev": names[tests : tests + devs], "train": names[tests + devs :]}
    if not parts[split]:
        raise DataError(f"only {len(names)} photographs: prepare at least 3 (docs/worlds.md)")
    return tuple((name, arrays[f"photo_{name}"]) for name in parts[split])


def photo_crop(
    split: str, width: int, height: int, rng: np.random.Generator, folder: str | Path | None = None
) -> tuple[np.ndarray, dict[str, str]]:
    """Return a random crop of one of the split's photographs, (height, width, 3) float32, and its facts.

    Raises:
        DataError: the asset "photos" has not been prepared.
    """
    choice = _photos(split, assets_dir(folder))
    name, photo = choice[int(rng.integers(len(choice)))]
    fit = min(photo.shape[1] / width, photo.shape[0] / height)
    scale = float(rng.uniform(min(1.0, fit) * 0.6, fit))
    w, h = max(1, int(width * scale)), max(1, int(height * scale))
    x, y = int(rng.integers(photo.shape[1] - w + 1)), int(rng.integers(photo.shape[0] - h + 1))
    crop = Image.fromarray(photo[y : y + h, x : x + w]).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(crop, np.float32).copy(), {"kind": "photo", "tone": name}
