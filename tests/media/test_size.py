"""Sizes from headers are the sizes of the opened pictures, whatever the file."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from chiasm.errors import ImageError
from chiasm.media.image import open_image
from chiasm.media.size import image_size


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orient", [True, False])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_same_as_opened(tmp_path, suffix, orientation, orient):
    path = tmp_path / f"x.{suffix}"
    Image.new("RGB", (5, 3)).save(path, exif=turned(orientation))
    assert image_size(path, orient=orient) == open_image(path, orient=orient).size
    with Image.open(path) as picture:
        assert image_size(picture, orient=orient) == open_image(picture, orient=orient).size


def test_other_sources(tmp_path):
    Image.new("P", (7, 2)).save(tmp_path / "x.gif")
    buffer = io.BytesIO()
    Image.new("RGB", (4, 9)).save(buffer, "PNG")
    assert image_size(str(tmp_path / "x.gif")) == (7, 2)
    assert image_size(buffer.getvalue()) == (4, 9)
    assert image_size(np.zeros((3, 6, 3), np.uint8)) == (6, 3)
    assert image_size(Image.new("L", (6, 3))) == (6, 3)


def test_headers_are_enough(tmp_path, monkeypatch):
    Image.new("RGB", (50, 40)).save(tmp_path / "x.jpg")
    monkeypatch.setattr("chiasm.media.size.open_image", lambda *_, **__: pytest.fail("decoded"))
    assert image_size(tmp_path / "x.jpg") == (50, 40)


def test_errors_are_those_of_opening(tmp_path):
    (tmp_path / "x.png").write_bytes(b"nothing")
    for source in (tmp_path / "x.png", tmp_path / "missing.png", tmp_path, b"", 7):
        with pytest.raises(ImageError) as caught:
            image_size(source)
        with pytest.raises(ImageError) as same:
            open_image(source)
        assert str(caught.value) == str(same.value)


def test_a_bomb_is_refused(tmp_path):
    Image.new("1", (20000, 9000)).save(tmp_path / "x.png")
    with pytest.raises(ImageError, match="more pixels than the limit"):
        image_size(tmp_path / "x.png")


def test_bytes_need_no_decoding_either(monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40)).save(buffer, "JPEG", exif=turned(6))
    monkeypatch.setattr("chiasm.media.size.open_image", lambda *_, **__: pytest.fail("decoded"))
    assert image_size(buffer.getvalue()) == (40, 50)
    assert image_size(buffer.getvalue(), orient=False) == (50, 40)


def chunks(data):
    at = 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big") + 12
        yield data[at : at + length]
        at += length


def test_a_png_is_not_decoded_for_its_orientation(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    Image.new("RGB", (5, 3)).save(path, exif=turned(6))
    kinds = {chunk[4:8]: chunk for chunk in chunks(path.read_bytes())}
    head = path.read_bytes()[:8]
    late = head + b"".join(kinds[kind] for kind in (b"IHDR", b"IDAT", b"eXIf", b"IEND"))
    (tmp_path / "late.png").write_bytes(late)
    Image.new("RGB", (5, 3)).save(tmp_path / "plain.png")
    loads = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: loads.append(self) or load(self))
    assert image_size(path) == (3, 5)
    assert image_size(tmp_path / "plain.png") == (5, 3)
    assert not loads
    assert image_size(tmp_path / "late.png") == (3, 5)  # behind the pixels: nothing but decoding finds it
    assert loads
    monkeypatch.undo()
    with Image.open(path) as picture:
        assert image_size(picture) == (3, 5)
        assert open_image(picture).size == (3, 5)  # the file is where it was
