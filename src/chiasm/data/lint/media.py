"""The linter's rules for pictures and videos, from their headers (or decoded, with `decode`)."""

from __future__ import annotations

from collections.abc import Iterator

from chiasm.data.lint.rules import Context, rule
from chiasm.data.lint.sample import Sample

__all__ = ["HUGE_PIXELS", "THIN", "TINY"]

HUGE_PIXELS = 50_000_000
THIN = 20
TINY = 14


@rule(
    "C201",
    "picture-missing",
    "error",
    says="a picture is not there or cannot be read",
    example='"image": "no/such/file.png"',
    remedy="check the path and the root (--root)",
)
def picture_missing(sample: Sample, _: Context) -> Iterator[str]:
    """No file, a folder, no permission."""
    yield from (picture.reason for picture in sample.pictures if picture.problem == "missing")


@rule(
    "C202",
    "picture-damaged",
    "error",
    says="a picture is empty, zero-sized, no picture at all, or (with --decode) damaged behind its header",
    example="an HTML page saved as a.jpg",
    remedy="copy or download it again, or remove the row",
)
def picture_damaged(sample: Sample, _: Context) -> Iterator[str]:
    """From the header, unless everything is decoded."""
    yield from (picture.reason for picture in sample.pictures if picture.problem == "damaged")


@rule(
    "C203",
    "picture-too-large",
    "error",
    says="a picture has more pixels than are accepted",
    example="20000 x 20000 pixels",
    remedy="make it smaller",
)
def picture_too_large(sample: Sample, _: Context) -> Iterator[str]:
    """The limit of `open_image`."""
    yield from (picture.reason for picture in sample.pictures if picture.problem == "too large")


@rule(
    "C204",
    "picture-huge",
    "warning",
    says=f"a picture has more than {HUGE_PIXELS // 10**6} million pixels",
    example="12000 x 9000 pixels",
    remedy="make it smaller once: it is decoded in full size whenever it is drawn",
)
def picture_huge(sample: Sample, context: Context) -> Iterator[str]:
    """What decoding costs, the tiles do not show."""
    for picture in sample.pictures:
        width, height = picture.size
        if picture.known and width * height > HUGE_PIXELS:
            yield f"{picture.name}: {width}x{height} pixels"


@rule(
    "C205",
    "picture-rotated",
    "warning",
    says="EXIF turns a picture, and the row's boxes or sizes may mean the other way",
    example='orientation 6, "width": 4000, "height": 3000 as stored',
    remedy="save it upright without EXIF, and check boxes on the upright picture",
)
def picture_rotated(sample: Sample, context: Context) -> Iterator[str]:
    """Boxes of annotation tools refer to either; a policy without orientation shows the picture lying."""
    stated = _stated_sizes(sample)
    boxed = any("<box>" in text for _, _, text in sample.said)
    for n, picture in enumerate(sample.pictures):
        if not picture.known or picture.orientation not in range(2, 9):
            continue
        said = f"{picture.name}: EXIF orientation {picture.orientation}"
        lying = picture.stored != picture.size
        if not context.spec.tiles.orient:
            yield f"{said} is ignored by tile mode {context.spec.tiles.mode}: the model sees it turned"
        elif lying and n < len(stated) and stated[n] == picture.stored:
            yield f"{said}, but the row's {stated[n][0]}x{stated[n][1]} is its size as stored, not upright"
        elif boxed and not (n < len(stated) and stated[n] == picture.size and lying):
            yield f"{said}: boxes must refer to the upright picture of {picture.size[0]}x{picture.size[1]}"


def _stated_sizes(sample: Sample) -> list[tuple[int, int]]:
    """(width, height) as the row says them, one or a list."""
    extra = sample.record.extra if sample.record else {}
    width, height = extra.get("width"), extra.get("height")
    if isinstance(width, int) and isinstance(height, int):
        return [(width, height)]
    if isinstance(width, list) and isinstance(height, list) and len(width) == len(height):
        return [
            (w, h) for w, h in zip(width, height, strict=True) if isinstance(w, int) and isinstance(h, int)
        ]
    return []


@rule(
    "C206",
    "size-differs",
    "warning",
    says="the row's width and height are not the picture's",
    example='"width": 640, "height": 480 with a picture of 800x600',
    remedy="the picture was replaced or resized: check boxes in pixels, and correct or drop the fields",
)
def size_differs(sample: Sample, _: Context) -> Iterator[str]:
    """As stored or upright, either will do here."""
    for picture, (width, height) in zip(sample.pictures, _stated_sizes(sample), strict=False):
        if picture.known and (width, height) not in (picture.size, picture.stored):
            yield f"{picture.name}: {picture.size[0]}x{picture.size[1]} pixels, the row says {width}x{height}"


@rule(
    "C207",
    "odd-shape",
    "warning",
    says=f"a picture with a side under {TINY} pixels, or more than {THIN} times as long as wide",
    example="1 x 1 pixel",
    remedy="remove the row: tracking pixels, separators and failed crops teach nothing",
)
def odd_shape(sample: Sample, _: Context) -> Iterator[str]:
    """Tiles would stretch it beyond recognition."""
    for picture in sample.pictures:
        width, height = picture.size
        if picture.known and (min(width, height) < TINY or max(width, height) > THIN * min(width, height)):
            yield f"{picture.name}: {width}x{height} pixels"


@rule(
    "C208",
    "video-unusable",
    "error",
    says="a video is missing, damaged or without frames",
    example='"video": "cut-off.mp4"',
    remedy="copy or encode it again, or remove the row",
)
def video_unusable(sample: Sample, _: Context) -> Iterator[str]:
    """From its packets; nothing is decoded."""
    if sample.video_problem:
        yield sample.video_problem


@rule(
    "C209",
    "not-examined",
    "note",
    says="a picture behind a URL, or a video where PyAV is not installed",
    example='"image": "https://example.org/a.png"',
    remedy="download pictures once; pip install 'chiasm[video]' for videos",
)
def not_examined(sample: Sample, _: Context) -> Iterator[str]:
    """Counted as one tile, or as eight frames."""
    if sample.unexamined:
        yield sample.unexamined
