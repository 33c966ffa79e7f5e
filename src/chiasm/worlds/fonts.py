"""The fonts of the word world, divided once into train, dev and test by type family.

Only upright regular and bold cuts are used. Relatives stay on one side: clones and derivatives (Liberation Sans and
FreeSans after Helvetica, Hack after DejaVu Sans Mono, Carlito after Lato, ...) are all in ``train``. Fonts are
known by file stem, so the division does not depend on which of them a machine has; the manifest of a word world
lists what was found with a hash of each file.

Where they are looked for: the prepared folder (``assets_dir()/fonts``) *alone* when it has any known font of each
split; else also the system's font folders and those that matplotlib bundles.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from PIL import ImageFont

from chiasm.errors import DataError
from chiasm.worlds.assets import assets_dir

__all__ = ["FONTS", "find_fonts", "font_hash", "load_font"]

#: Split -> file stems. Fixed: scores of chiasm-mini refer to this division.
FONTS: Mapping[str, tuple[str, ...]] = {
    "train": (
        *(
            "DejaVuSans",
            "DejaVuSans-Bold",
            "DejaVuSansMono",
            "DejaVuSansMono-Bold",
            "DejaVuSerif",
            "DejaVuSerif-Bold",
        ),
        *("Hack-Regular", "Hack-Bold"),
        *("FreeSans", "FreeSansBold", "LiberationSans-Regular", "LiberationSans-Bold"),
        *("LiberationSansNarrow-Regular", "LiberationSansNarrow-Bold"),
        *("FreeSerif", "FreeSerifBold", "LiberationSerif-Regular", "LiberationSerif-Bold"),
        *("FreeMono", "FreeMonoBold", "LiberationMono-Regular", "LiberationMono-Bold"),
        *("Courier Prime", "Courier Prime Bold"),
        *("Lato-Regular", "Lato-Bold", "Carlito-Regular", "Carlito-Bold"),
        *("Caladea-Regular", "Caladea-Bold"),
        *("Comfortaa-Regular", "Comfortaa-Bold", "Quicksand-Medium", "Quicksand-Bold"),
        *("LinLibertine_R", "LinLibertine_RB", "LinBiolinum_R", "LinBiolinum_RB"),
        *("AccanthisADFStd-Regular", "AccanthisADFStd-Bold"),
    ),
    "dev": ("Cantarell-Regular", "Cantarell-Bold", "BaskervaldADFStd", "BaskervaldADFStd-Bold", "cmss10"),
    "test": (
        *("OpenSans-Regular", "OpenSans-Bold", "Cabin-Regular", "Cabin-Bold", "GenBasR", "GenBasB"),
        *(
            "UniversalisADFStd-Regular",
            "UniversalisADFStd-Bold",
            "JetBrainsMono-Regular",
            "JetBrainsMono-Bold",
        ),
        "cmr10",
    ),
}


def find_fonts(split: str, folder: str | Path | None = None) -> dict[str, Path]:
    """Return the split's fonts that exist here, stem -> file, in the order of ``FONTS``.

    Args:
        split: "train", "dev" or "test".
        folder: the prepared assets (default: ``assets_dir()``).

    Raises:
        DataError: none of the split's fonts is there.
    """
    prepared = _index((str(assets_dir(folder) / "fonts"),))
    complete = all(any(stem in prepared for stem in stems) for stems in FONTS.values())
    known = prepared if complete else {**_index(_system_folders()), **prepared}
    found = {stem: known[stem] for stem in FONTS[split] if stem in known}
    if not found:
        raise DataError(
            f"no {split} font of the word world found: install matplotlib (it bundles some), or run "
            "`apt-get download fonts-dejavu-core fonts-open-sans fonts-cantarell` in DIR and "
            "`python -m chiasm.worlds.assets DIR`"
        )
    return found


@functools.lru_cache(maxsize=1024)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """Open a font at ``size`` pixels per em, once a process."""
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=256)
def font_hash(path: str) -> str:
    """Return the first 16 hex digits of the file's sha256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _system_folders() -> tuple[str, ...]:
    """Folders of the system and of matplotlib, lowest priority first; matplotlib is located, not imported."""
    home = Path.home()
    folders = {
        "darwin": [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library" / "Fonts"],
        "win32": [Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts"],
    }.get(
        sys.platform, [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), home / ".local/share/fonts"]
    )
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf")
    return tuple(str(folder) for folder in folders)


def _index(folders: tuple[str, ...]) -> dict[str, Path]:
    """Stem -> path of every known font file below the folders; of equals the last in sorted order wins."""
    wanted = {stem for stems in FONTS.values() for stem in stems}
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")) if Path(folder).is_dir() else ():
            if path.suffix.lower() in (".ttf", ".otf") and path.stem in wanted:
                found[path.stem] = path
    return found
