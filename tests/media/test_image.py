import base64
import http.server
import io
import logging
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image, ImageOps

from chiasm.errors import ImageError
from chiasm.media.fetch import load_bytes
from chiasm.media.image import MAX_PIXELS, open_image, to_rgb


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """A smooth colour picture, so that JPEG keeps it nearly as it is."""
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((width, height))


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def refused(source: object, **options: object) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(source, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert ";" in message  # what; remedy
    return message


def grey(image: Image.Image) -> list[int]:
    pixels = np.asarray(image)
    assert image.mode == "RGB"
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0].ravel().tolist()


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


# What must work.


def test_sources_give_the_same_picture(tmp_path: Path) -> None:
    image = picture()
    data = encoded(image)
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    lines = "data:image/png;base64," + base64.encodebytes(data).decode().rstrip("=\n")
    percent = "data:image/png," + "".join(f"%{byte:02x}" for byte in data)
    for source in (path, str(path), data, bytearray(data), image, np.asarray(image), url, lines, percent):
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), np.asarray(image))
        assert opened.info == {}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are a POSIX thing")
def test_pipes_are_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(encoded(picture()),))
    writer.start()
    assert open_image(pipe).size == (60, 40)
    writer.join()


def test_the_given_image_is_not_changed() -> None:
    image = picture().convert("RGBA")
    image.info["note"] = "kept"
    before = image.tobytes()
    open_image(image)
    assert (image.mode, image.info["note"], image.tobytes()) == ("RGBA", "kept", before)
    rgb = picture()
    assert open_image(rgb) is not rgb


@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("JPEG", "CMYK", {"quality": 100}),
        ("TIFF", "CMYK", {}),
        ("JPEG", "YCbCr", {"quality": 100}),
        ("PNG", "P", {}),
        ("GIF", "P", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("PPM", "RGB", {}),
        ("TGA", "RGB", {}),
        ("JPEG2000", "RGB", {}),
        ("QOI", "RGB", {}),
        ("ICO", "RGB", {"sizes": [(60, 40)]}),
    ],
)
def test_formats_and_colour_spaces(format: str, mode: str, options: dict) -> None:
    opened = open_image(encoded(picture().convert(mode), format, **options))
    assert opened.mode == "RGB"
    assert opened.size == (60, 40)
    # Palettes have few colours; the other ways back are nearly exact.
    assert difference(opened, picture()) < (20 if mode == "P" else 4)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    middle = b"".join(chunk(kind, body) for kind, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + head + middle + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


DEEP = [0, 128, 129, 257, 32767, 32768, 65406, 65535]
SCALED = [0, 0, 1, 1, 127, 128, 254, 255]


def test_deep_grey_is_scaled_not_clipped() -> None:
    values = np.array([DEEP], dtype=np.uint16)
    assert [round(value / 257) for value in DEEP] == SCALED
    assert grey(open_image(png(8, 1, 16, 0, b"\0" + values.astype(">u2").tobytes()))) == SCALED
    assert grey(open_image(Image.fromarray(values))) == SCALED
    assert grey(open_image(values)) == SCALED
    assert grey(open_image(encoded(Image.fromarray(values), "TIFF"))) == SCALED
    assert grey(open_image(Image.fromarray(values.astype(np.int32)))) == SCALED
    assert grey(open_image(b"P5 8 1 65535\n" + values.astype(">u2").tobytes())) == SCALED
    big_endian = Image.frombytes("I;16B", (8, 1), values.astype(">u2").tobytes())
    assert grey(open_image(big_endian)) == SCALED


def test_deep_grey_with_a_transparent_value_goes_over_white() -> None:
    rows = b"\0" + np.array([DEEP], dtype=">u2").tobytes()
    data = png(8, 1, 16, 0, rows, (b"tRNS", struct.pack(">H", 129)))
    assert grey(open_image(data)) == [0, 0, 255, 1, 127, 128, 254, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.25, 1.0], [0, 64, 255]),
        ([0.0, 64.0, 255.0], [0, 64, 255]),
        ([0.0, 16448.0, 65535.0], [0, 64, 255]),
    ],
)
def test_floating_grey(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert grey(open_image(image)) == expected
    assert grey(open_image(encoded(image, "TIFF"))) == expected


def test_values_of_no_usual_depth_are_stretched_with_a_note() -> None:
    for dtype in (np.float32, np.int32):
        notes: list[str] = []
        image = Image.fromarray(np.array([[-100, 0, 100000]], dtype=dtype))
        assert grey(open_image(image, on_note=notes.append)) == [0, 0, 255]
        assert "stretched" in notes[0]
    constant = Image.fromarray(np.full((1, 2), -5, dtype=np.int32))
    assert grey(open_image(constant, on_note=notes.append)) == [0, 0]


def test_transparency_goes_over_white() -> None:
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)])
    expected = [(255, 0, 0), (255, 255, 255), (127, 127, 127)]
    assert [tuple(p) for p in np.asarray(open_image(encoded(rgba)))[0]] == expected
    assert [tuple(p) for p in np.asarray(open_image(np.asarray(rgba)))[0]] == expected
    premultiplied = rgba.convert("RGBa")
    assert [tuple(p) for p in np.asarray(open_image(premultiplied))[0]] == expected
    la = Image.new("LA", (2, 1))
    la.putdata([(10, 255), (10, 0)])
    assert grey(open_image(encoded(la))) == [10, 255]


def test_palette_colour_and_bit_transparency() -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([0, 0, 0, 200, 100, 50, 9, 9, 9])
    palette.putdata([0, 1, 2])
    data = encoded(palette, transparency=bytes([0, 255, 128]))
    assert [tuple(p) for p in np.asarray(open_image(data))[0]] == [(255,) * 3, (200, 100, 50), (132,) * 3]
    gif = encoded(palette, "GIF", transparency=1)
    assert tuple(np.asarray(open_image(gif))[0, 1]) == (255, 255, 255)
    rgb = png(2, 1, 8, 2, b"\0" + bytes([1, 2, 3, 4, 5, 6]), (b"tRNS", struct.pack(">HHH", 4, 5, 6)))
    assert np.asarray(open_image(rgb))[0].tolist() == [[1, 2, 3], [255, 255, 255]]
    bit = Image.fromarray(np.array([[True, False]]))
    assert bit.mode == "1"
    assert grey(open_image(encoded(bit))) == [255, 0]
    assert grey(open_image(np.array([[True, False]]))) == [255, 0]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), format, exif=exif)
    with Image.open(io.BytesIO(data)) as stored:
        as_stored = stored.convert("RGB")
        upright = ImageOps.exif_transpose(stored).convert("RGB")
    opened = open_image(data)
    assert np.array_equal(np.asarray(opened), np.asarray(upright))
    assert opened.size == ((40, 60) if orientation > 4 else (60, 40))
    # A second opening turns nothing again.
    assert np.array_equal(np.asarray(open_image(opened)), np.asarray(upright))
    assert np.array_equal(np.asarray(open_image(data, orient=False)), np.asarray(as_stored))


def test_tiff_is_upright_either_way() -> None:
    data = encoded(picture(), "TIFF", tiffinfo={0x0112: 6})
    turned = picture().transpose(Image.Transpose.ROTATE_270)
    for orient in (True, False):
        assert np.array_equal(np.asarray(open_image(data, orient=orient)), np.asarray(turned))


def test_damaged_exif_is_noted_and_the_picture_used() -> None:
    notes: list[str] = []
    bad = b"Exif\0\0II*\0\xff\xff\xff\xff"
    opened = open_image(encoded(picture(), "JPEG", exif=bad), on_note=notes.append)
    assert opened.size == (60, 40)
    assert all("EXIF" in note for note in notes)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_give_the_first_frame_and_a_note(
    format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"moving.{format.lower()}"
    options = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(path, format, save_all=True, append_images=frames[1:], **options)
    notes: list[str] = []
    opened = open_image(path, on_note=notes.append)
    assert tuple(np.asarray(opened)[5, 5]) == (255, 0, 0)
    assert len(notes) == 1
    assert "first frame" in notes[0]
    with caplog.at_level(logging.WARNING):
        open_image(path)
    assert "first frame" in caplog.text


def test_second_pictures_of_a_phone_are_not_an_animation() -> None:
    notes: list[str] = []
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture()])
    assert open_image(data, on_note=notes.append).size == (60, 40)
    assert notes == []


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2)])
def test_any_aspect_ratio(size: tuple[int, int]) -> None:
    assert open_image(encoded(Image.new("RGB", size))).size == size


# What must fail, in one line.


@pytest.mark.parametrize(
    "format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "TGA", "QOI"]
)
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_truncated_files(format: str, part: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = encoded(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), format)
    path = tmp_path / "half"
    path.write_bytes(data[: int(len(data) * part)])
    message = refused(path)
    assert str(path) in message


def test_not_images(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    assert f"{text}: is not an image" in refused(text)
    empty = tmp_path / "empty.png"
    empty.touch()
    assert f"{empty}: is empty" in refused(empty)
    assert "no such file" in refused(tmp_path / "absent.png")
    assert "is a folder" in refused(tmp_path)
    assert "no such file" in refused(text / "below.png")
    assert "file name" in refused("a\0b.png")
    assert "file name" in refused("x" * 10_000)
    assert len(refused("x" * 10_000)) < 400
    assert "a?b.png" in refused("a\nb.png")
    assert "is empty" in refused(b"")
    assert "not an image" in refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "cannot open a NoneType" in refused(None)
    assert "cannot open a list" in refused([1, 2])


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(picture()))

    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Not by chmod: the superuser may read everything.
    monkeypatch.setattr(Path, "open", deny)
    assert "permission" in refused(path)


def test_zero_sized() -> None:
    assert "zero-sized" in refused(png(0, 5, 8, 2, b""))
    assert "zero-sized" in refused(Image.new("RGB", (0, 5)))
    assert "zero-sized" in refused(np.zeros((5, 0, 3), np.uint8))


def test_bombs_are_refused_before_decoding() -> None:
    assert MAX_PIXELS == 178_956_970
    assert "limit" in refused(png(20_000, 20_000, 1, 0, b""))
    assert "limit" in refused(png(178_956_971, 1, 1, 0, b""))
    assert "limit" in refused(np.broadcast_to(np.uint8(0), (20_000, 20_000)))


def test_the_limit_is_our_own_and_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "20000x20000" in refused(png(20_000, 20_000, 1, 0, b""))
    monkeypatch.setattr("chiasm.media.image.MAX_PIXELS", 1600)
    for image in (Image.new("L", (41, 40)), encoded(Image.new("L", (40, 41))), np.zeros((1, 1601), bool)):
        assert "limit" in refused(image)
    for image in (Image.new("L", (40, 40)), encoded(Image.new("L", (40, 40))), np.zeros((1, 1600), bool)):
        assert open_image(image).mode == "RGB"


def test_a_size_that_shows_only_while_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some plugins (ICO, for one) meet the true size in load(): that is the same answer, not a bug's."""
    data = encoded(Image.new("L", (4, 4)))

    def load(self: object) -> None:
        raise Image.DecompressionBombError("huge")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    assert "limit" in refused(data)


def test_no_warning_where_pillow_would_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    # In the upper half of the accepted range Pillow warns of a bomb, and warnings are errors here.
    data = encoded(Image.new("L", (40, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(data))
    assert open_image(data).size == (40, 40)


def test_values_that_are_no_numbers() -> None:
    assert "finite" in refused(Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)))
    assert "0..1" in refused(np.array([[0, np.nan]]))


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 2), np.int64), np.full((2, 2), 2.0), np.zeros(4, np.uint8), np.zeros((3, 8, 8), np.uint8)],
)
def test_arrays_of_unclear_meaning(array: np.ndarray) -> None:
    refused(array)


def test_colour_space_without_a_way_to_rgb(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_way(*_: object) -> None:
        raise ValueError("conversion not supported")  # what older Pillow says of LAB

    image = Image.new("LAB", (2, 2))
    monkeypatch.setattr(Image.Image, "convert", no_way)
    assert "LAB" in refused(image)


@pytest.mark.parametrize(
    "url", ["data:image/png;base64", "data:image/png;base64,%%%", "data:;base64,AAA", "data:,"]
)
def test_broken_data_urls(url: str) -> None:
    refused(url)


def test_only_http_schemes() -> None:
    for url in ("ftp://host/a.png", "file:///etc/passwd", "gopher://host/", "s3://bucket/key"):
        assert "scheme" in refused(url)


def test_what_a_server_forbids(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture()))
    assert "paths are not accepted" in refused(path, allow_files=False)
    assert "URLs are not accepted" in refused("http://localhost/a.png", allow_urls=False)
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    assert open_image(url, allow_files=False, allow_urls=False).size == (60, 40)


# Over HTTP, from a server on this machine.


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = encoded(picture())
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd" if "file" in self.path else "/picture")
            self.end_headers()
        elif self.path == "/huge":
            self.reply(b"x", length=2**40)
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 5000)
        elif self.path == "/short":
            self.reply(body, length=len(body) + 10)
        elif self.path == "/slow":
            self.server.hold.wait(5)
        elif self.path == "/page":
            self.reply(b"<html>")
        elif self.path.startswith("/picture"):
            self.reply(body)
        else:
            self.send_error(404)

    def reply(self, body: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.hold = threading.Event()
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.hold.set()
        httpd.shutdown()
        thread.join()


def test_http(server: str) -> None:
    for path in ("/picture", "/moved", "/picture?token=secret#part"):
        assert np.array_equal(np.asarray(open_image(server + path)), np.asarray(picture()))
    assert "404" in refused(server + "/absent")
    assert "not an image" in refused(server + "/page")
    assert "not allowed" in refused(server + "/moved-file")
    assert "64 MiB" in refused(server + "/huge")
    assert "broke off" in refused(server + "/short")
    assert "secret" not in refused(server + "/absent?token=secret")
    with pytest.raises(ImageError, match="MiB"):
        load_bytes(server + "/endless", limit=4000)
    with pytest.raises(ImageError, match="timed out"):
        load_bytes(server + "/slow", timeout=0.2)


def test_nobody_listens(server: str) -> None:
    assert "cannot be fetched" in refused("http://127.0.0.1:1/a.png")
    assert "cannot be fetched" in refused("http://[::1/a.png")
    assert "cannot be fetched" in refused("http://127.0.0.1:port/a.png")


def test_load_bytes_of_files_has_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(100))
    assert load_bytes(path, limit=100) == bytes(100)
    with pytest.raises(ImageError, match="MiB"):
        load_bytes(path, limit=99)
    with pytest.raises(ImageError, match="MiB"):
        load_bytes("data:;base64," + base64.b64encode(bytes(100)).decode(), limit=99)


# Robustness.

SEEDS = [
    encoded(picture(12, 9), "PNG"),
    encoded(picture(12, 9), "JPEG"),
    encoded(picture(12, 9).convert("P"), "GIF"),
    encoded(picture(12, 9), "TIFF", compression="tiff_lzw"),
    encoded(picture(12, 9), "WEBP"),
    encoded(picture(12, 9), "BMP"),
    encoded(picture(12, 9), "ICO", sizes=[(12, 9)]),
    encoded(picture(12, 9), "JPEG2000"),
]


@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=4)), max_size=4),
    st.integers(0, 10_000),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_bytes_give_a_picture_or_one_line(
    data: bytes, edits: list[tuple[int, bytes]], cut: int
) -> None:
    damaged = bytearray(data)
    for at, piece in edits:
        at %= len(damaged) + 1
        damaged[at : at + len(piece)] = piece
    if cut < len(damaged):
        del damaged[cut:]
    message = ""
    try:
        assert open_image(bytes(damaged), on_note=lambda _: None).mode == "RGB"
    except ImageError as error:
        message = str(error)
    assert message.isprintable()


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        open_image(data)


def test_many_threads_leave_the_warning_filters_as_they_were() -> None:
    data = encoded(picture(200, 200), "JPEG")
    before = list(warnings.filters)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                open_image(data)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(warnings.filters) == before


def test_to_rgb_is_a_new_image() -> None:
    image = picture()
    assert to_rgb(image) is not image
