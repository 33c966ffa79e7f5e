"""Width and height of a picture, from its header where that is enough.

Token counts need sizes only: a planner that counts a million samples must not decode a million pictures. The answer
is always what `open_image` would give; where a header can not promise that, the picture is opened after all.
"""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from chiasm.media.fetch import is_url, local_path
from chiasm.media.image import MAX_PIXELS, ImageSource, open_image, quiet_pillow

__all__ = ["image_size"]

# Formats whose header states the decoded size; TIFF is turned while it is decoded, icons hold several sizes.
_PLAIN = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_ORIENTATION_TAG = 0x0112
_LYING = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def image_size(source: ImageSource, *, orient: bool = True) -> tuple[int, int]:
    """(width, height) in pixels of what `open_image(source, orient=orient)` returns.

    Raises:
        ImageError: as `open_image`, except that damage behind the header goes unnoticed.
    """
    if isinstance(source, np.ndarray):
        return open_image(source).size
    # A picture without a format was made in memory; another one may still be undecoded.
    if isinstance(source, Image.Image) and (source.format is None or source.format in _PLAIN):
        return _upright(source) if orient else source.size
    if isinstance(source, bytes | bytearray | memoryview):  # of a shard, say
        found = _from_header(io.BytesIO(source), orient)
        if found is not None:
            return found
    if isinstance(source, str | Path) and not (isinstance(source, str) and is_url(source)):
        path = local_path(source)
        found = _from_header(path, orient) if os.path.isfile(path) else None
        if found is not None:
            return found
    return open_image(source, orient=orient).size


def _from_header(source: Path | io.BytesIO, orient: bool) -> tuple[int, int] | None:
    """None where the header does not tell, or the file is not as it should be (`open_image` then says why)."""
    # Whatever is wrong here, opening the picture finds it again and names it.
    try:
        with quiet_pillow(), Image.open(source, formats=_PLAIN) as image:
            if image.format not in _PLAIN or not 0 < image.width * image.height <= MAX_PIXELS:
                return None
            return _upright(image) if orient else image.size
    except Exception:
        return None


def _upright(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    try:
        lying = _exif(image).get(_ORIENTATION_TAG, 1) in _LYING
    except Exception:  # a damaged EXIF block turns nothing
        lying = False
    return (height, width) if lying else (width, height)


def _exif(image: Image.Image) -> Image.Exif:
    """What `image.getexif()` returns, without decoding a PNG that says nothing behind its pixels.

    Pillow decodes every PNG for it, because EXIF may stand there.
    """
    if image.format == "PNG" and not _says_more(getattr(image, "fp", None)):
        return Image.Image.getexif(image)
    return image.getexif()


def _says_more(file: IO[bytes] | None) -> bool:
    """Whether a PNG has EXIF or text behind its pixels; True where that is not to be seen."""
    if file is None:
        return True
    before = file.tell()
    try:
        file.seek(8)
        pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"IEND":
                return False
            pixels = pixels or kind == b"IDAT"
            if pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(length + 4, os.SEEK_CUR)
        return True
    finally:
        file.seek(before)
