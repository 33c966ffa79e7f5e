"""Opening pictures safely: whatever a user has becomes one upright RGB image, or one clear line.

What is done: CMYK and other colour spaces -> RGB; 16-bit and floating grey -> 8 bit by scaling (not
clipping); transparency, in whatever way a format says it, composited over white; EXIF orientation applied
(``orient=True``); an animation gives its first frame and a note. ICC profiles are not applied, as in the
released models' pipelines.

What is refused with `ImageError`, before any pixel is decoded where the header shows it: more than
`MAX_PIXELS`, zero-sized, truncated, damaged, not an image, an unlisted format (EPS, for one, would start
Ghostscript). Nothing is ever substituted for a picture that cannot be read.

Surprise: TIFF files are turned upright by Pillow while decoding, so ``orient=False`` does not affect them;
the pipelines of the released models have that too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from chiasm.errors import ImageError
from chiasm.media.fetch import file_error, is_url, load_bytes, local_path, short_name

__all__ = ["FORMATS", "MAX_PIXELS", "ImageSource", "Note", "open_image", "quiet_pillow", "to_rgb"]

MAX_PIXELS = 178_956_970
"""Largest accepted width x height; Pillow itself only warns in the upper half of this range."""

FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF"),
    *("ICO", "TGA", "PCX", "SGI", "QOI", "HEIF"),
)
"""Accepted formats, by Pillow's names; those that the installed Pillow cannot read are passed over."""

ImageSource = str | Path | bytes | Image.Image | np.ndarray
Note = Callable[[str], None]

_log = logging.getLogger("chiasm.media")

# EXIF orientation -> what turns the stored picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112


def open_image(
    source: ImageSource,
    *,
    orient: bool = True,
    on_note: Note | None = None,
    allow_files: bool = True,
    allow_urls: bool = True,
) -> Image.Image:
    """Open one picture as a decoded 8-bit RGB image of its own (the source is not changed).

    Args:
        source: path, ``data:`` URL, ``http(s)`` URL, encoded bytes, PIL image, or array (H, W), (H, W,
            1|3|4) of bool, uint8, uint16 or floats in 0..1.
        orient: turn the picture upright by its EXIF orientation. Box coordinates then refer to the upright
            picture.
        on_note: told, in one line, of what a user should know (only the first frame used, values rescaled);
            default: a warning of the logger ``chiasm.media``, which Python prints on stderr.
        allow_files: accept paths. A server turns this off for what comes over the network.
        allow_urls: accept ``http(s)`` URLs.

    Raises:
        ImageError: the picture cannot be read, for the reason and with the remedy that the message says.
    """
    note = on_note or _log.warning
    if isinstance(source, Image.Image):
        name = short_name(getattr(source, "filename", "") or "image")
        with quiet_pillow():
            return _finish(source, name, orient, note)
    if isinstance(source, np.ndarray):
        return to_rgb(_from_array(source), on_note=note)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(source), f"image of {len(source)} bytes", orient, note)
    if not isinstance(source, str | Path):
        raise ImageError(
            f"cannot open a {type(source).__name__} as an image; "
            "give a path, a URL, bytes, a PIL image or an array"
        )
    name = short_name(source)
    if isinstance(source, str) and is_url(source):
        if not allow_urls and source[:5].lower() != "data:":
            raise ImageError(f"{name}: URLs are not accepted here; send the picture itself (data: URL)")
        return _decode(io.BytesIO(load_bytes(source)), name, orient, note)
    if not allow_files:
        raise ImageError(f"{name}: paths are not accepted here; send the picture itself (data: URL)")
    path = local_path(source)
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe cannot be sought in
        return _decode(io.BytesIO(load_bytes(path)), name, orient, note)
    try:
        file = path.open("rb")
    except OSError as error:
        raise file_error(name, error) from error
    with file:
        return _decode(file, name, orient, note)


def to_rgb(image: Image.Image, *, name: str = "image", on_note: Note | None = None) -> Image.Image:
    """Return a picture in 8-bit RGB, a new image without metadata: depth scaled, transparency over white.

    Grey of 16 bits and 32-bit integers within 0..65535 are divided by 257 and rounded. Floats are taken to
    have the smallest full scale of 1, 255, 65535 that holds them. What fits no such scale is stretched from
    its own minimum and maximum, with a note.

    Raises:
        ImageError: non-finite values, or a colour space that cannot be converted.
    """
    transparency = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        grey_HW = _to_8_bit(np.asarray(image), name, on_note or _log.warning)
        rgb = Image.fromarray(grey_HW).convert("RGB")
        if isinstance(transparency, int):
            rgb.paste((255, 255, 255), mask=Image.fromarray(np.asarray(image) == transparency))
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        rgb = Image.alpha_composite(white, rgba).convert("RGB")
    else:
        try:
            rgb = image.convert("RGB")
        except ValueError as error:
            raise ImageError(
                f"{name}: the colour space {image.mode} is not supported; save it as RGB"
            ) from error
    # A picture that went through here is upright and opaque; leftover metadata must not turn it a second
    # time.
    rgb.info = {}
    return rgb


def _decode(file: IO[bytes], name: str, orient: bool, note: Note) -> Image.Image:
    with quiet_pillow(), _identify(file, name) as image:
        return _finish(image, name, orient, note)


def _identify(file: IO[bytes], name: str) -> Image.Image:
    """Read the header. Common formats are tried first: loading all of Pillow's plugins takes a while."""
    Image.preinit()
    if not file.read(1):
        raise ImageError(f"{name}: is empty (0 bytes); copy or download it again")
    try:
        for load_plugins in (None, Image.init):
            if load_plugins is not None:
                load_plugins()
            file.seek(0)
            with contextlib.suppress(UnidentifiedImageError):
                return Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    # Any plugin may fail in any way on a hostile header; that all means one thing to the user.
    except Exception as error:
        raise _damaged(name, error) from error
    raise ImageError(
        f"{name}: is not an image that can be read here (unknown format, damaged header or zero-sized); "
        "save it as PNG or JPEG"
    )


def _finish(image: Image.Image, name: str, orient: bool, note: Note) -> Image.Image:
    """Check the size, decode, convert, turn upright."""
    if image.width < 1 or image.height < 1:
        raise ImageError(f"{name}: is zero-sized ({image.width}x{image.height}); give a picture with pixels")
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name, image.size)
    try:
        # A phone's JPEG may carry further pictures (depth, gain map) in an MPO; that is no animation.
        animated = image.format != "MPO" and getattr(image, "is_animated", False)
        image.load()
        rgb = to_rgb(image, name=name, on_note=note)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # some plugins learn the true size only while decoding
        raise _too_large(name) from error
    # Decoders report damage by nearly every exception type there is.
    except Exception as error:
        raise _damaged(name, error) from error
    if animated:
        note(f"{name}: is animated or has several pages; only the first frame is used")
    if orient:
        try:
            turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
        # The metadata block is parsed by hand in Pillow and may be damaged while the picture is not.
        except Exception:
            turn = None
            note(f"{name}: its EXIF block is damaged; the picture is used as it is stored, without rotation")
        if turn is not None:
            rgb = rgb.transpose(turn)
    return rgb


def _to_8_bit(values_HW: np.ndarray, name: str, note: Note) -> np.ndarray:
    """Scale deep grey values to uint8; see `to_rgb` for the full scales."""
    if not np.isfinite(values_HW).all():
        raise ImageError(f"{name}: has pixels that are not finite numbers; replace them before opening it")
    low, high = float(values_HW.min()), float(values_HW.max())
    full = 65535.0
    if values_HW.dtype.kind == "f":
        full = next((scale for scale in (1.0, 255.0, 65535.0) if high <= scale), 0.0)
    if low >= 0 and high <= full:
        return np.rint(values_HW * (255.0 / full)).astype(np.uint8)
    note(f"{name}: values from {low:g} to {high:g} fit no usual depth and were stretched to 0..255")
    span = high - low or 1.0
    return np.rint((values_HW.astype(np.float64) - low) * (255.0 / span)).astype(np.uint8)


def _from_array(array: np.ndarray) -> Image.Image:
    """An array as a PIL image; only types and shapes with one meaning are taken."""
    shape = array.shape
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(
            f"array image of shape {shape} cannot be used; give (height, width) or (height, width, 1 | 3 | 4)"
        )
    if array.shape[0] < 1 or array.shape[1] < 1:
        raise ImageError(f"array image of shape {shape} is zero-sized; give a picture with pixels")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise _too_large("array image", (array.shape[1], array.shape[0]))
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = np.rint(array * (255.0 / 65535.0)).astype(np.uint8)
    elif array.dtype.kind == "f":
        # Written so that NaN fails it too.
        if not (array.min() >= 0 and array.max() <= 1):
            raise ImageError(
                "array image of floats must lie in 0..1; scale it, or give uint8 values in 0..255"
            )
        array = np.rint(array.astype(np.float64) * 255.0).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(
            f"array image of {array.dtype} cannot be used; give uint8 (0..255), uint16, bool or floats in 0..1"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _too_large(name: str, size: tuple[int, int] | None = None) -> ImageError:
    what = f"has {size[0]}x{size[1]} pixels, more than" if size else "has more pixels than"
    return ImageError(f"{name}: {what} the limit of {MAX_PIXELS:,}; make it smaller first")


def _damaged(name: str, error: Exception) -> ImageError:
    reason = short_name(str(error) or type(error).__name__, 100)
    return ImageError(f"{name}: is truncated or damaged ({reason}); copy, download or save it again")


class _Quiet:
    """Silences Pillow's warnings while any thread is inside; the last one to leave restores the filters.

    `warnings.catch_warnings` alone is not safe with threads: two overlapping uses can leave the filters of
    one behind for good. What those warnings say is covered here: sizes by our own limit, damage by errors.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved: Any = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._saved.__exit__(None, None, None)


quiet_pillow = _Quiet()
"""Context in which Pillow warns of nothing; safe with threads."""
