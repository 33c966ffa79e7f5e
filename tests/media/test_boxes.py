import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from chiasm.media.boxes import (
    Box,
    draw_boxes,
    format_box,
    iou,
    parse_boxes,
    pixels_to_thousand,
    pixels_to_unit,
    thousand_to_pixels,
    thousand_to_unit,
    unit_to_pixels,
    unit_to_thousand,
)


def found(text: str) -> list[tuple[str, tuple[float, ...]]]:
    return [(box.label, box.xyxy) for box in parse_boxes(text)]


def test_official_format() -> None:
    text = "<ref> the red dog </ref><box>[[10,20,300,400],[1, 2, 3, 4]]</box>, <ref>cat</ref><box>[[5,6,7,8]]</box>."
    assert found(text) == [
        ("the red dog", (10, 20, 300, 400)),
        ("the red dog", (1, 2, 3, 4)),
        ("cat", (5, 6, 7, 8)),
    ]
    assert [text[slice(*box.span)] for box in parse_boxes(text)] == [
        "[10,20,300,400]",
        "[1, 2, 3, 4]",
        "[5,6,7,8]",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<box>[[1,2,3,4]]</box>", [("", (1, 2, 3, 4))]),
        ("<box>[1,2,3,4]</box>", [("", (1, 2, 3, 4))]),
        ("<box>[[1,2,3,4]", [("", (1, 2, 3, 4))]),
        ("<box>[[1,2,3,4],[5,6,7", [("", (1, 2, 3, 4))]),
        ("[[1,2,3,4], [5,6,7,8]]", [("", (1, 2, 3, 4)), ("", (5, 6, 7, 8))]),
        ("[ [ 1 , 2 , 3 , 4 ] ]", [("", (1, 2, 3, 4))]),
        ("<ref>a</ref>[[1,2,3,4]] then [[5,6,7,8]]", [("a", (1, 2, 3, 4)), ("", (5, 6, 7, 8))]),
        (
            "<ref>a</ref><box>[[1,2,3,4]]</box><box>[[5,6,7,8]]</box>",
            [("a", (1, 2, 3, 4)), ("", (5, 6, 7, 8))],
        ),
        ("<ref>a</ref> stands at <box>[[1,2,3,4]]</box>", [("a", (1, 2, 3, 4))]),
        ("<ref>a <box>[[1,2,3,4]]</box>", [("", (1, 2, 3, 4))]),
        ("<ref>a</ref><ref>b</ref><box>[[1,2,3,4]]</box>", [("b", (1, 2, 3, 4))]),
        ("<box>[[0.1, .25, 0.5, 1.0]]</box>", [("", (100, 250, 500, 1000))]),
        ("<box>[[0,0,1,1]]</box>", [("", (0, 0, 1, 1))]),
        ("<box>[[-3,2,1200,4.5]]</box>", [("", (0, 2, 1000, 4.5))]),
        ("<box>[[9,8,1,2]]</box>", [("", (9, 8, 1, 2))]),
        ("the list [1,2,3,4] is no box", []),
        ("matrix [[1,2,3],[4,5,6]]", []),
        ("<box>[[a,2,3,4]]</box>", []),
        ("<box>[[1,2,3,4,5]]</box>", []),
        ("<box></box> [1,2,3,4]", []),
        ("[[1,2,3,4]] and [5,6,7,8]", [("", (1, 2, 3, 4))]),
        ("", []),
    ],
)
def test_forms(text: str, expected: list) -> None:
    assert found(text) == expected


PIECES = (
    *(
        "<ref>",
        "</ref>",
        "<box>",
        "</box>",
        "[",
        "]",
        "[[",
        "]]",
        ",",
        " ",
        "\n",
        "-",
        ".",
        "1",
        "999",
        "1e9",
    ),
    *("[1,2,3,4]", "[0.1,0.2,0.3,0.4]", "nan", "٣", "²", "dog", "é", "\0", "<", ">", "]]]", "[-1,"),
)
JUNK = st.one_of(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.text(max_size=30))


@given(JUNK)
def test_junk_never_raises_and_gives_valid_boxes(text: str) -> None:
    boxes = parse_boxes(text)
    for box in boxes:
        assert all(0 <= value <= 1000 for value in box.xyxy)
        assert text[box.span[0]] == "["
        assert text[box.span[1] - 1] == "]"
    assert [box.span for box in boxes] == sorted(box.span for box in boxes)


QUADS = st.tuples(*[st.integers(0, 1000)] * 4)
NAMES = st.text(st.characters(exclude_characters="<>[]", exclude_categories=["Cs"]), max_size=12).map(
    str.strip
)


@given(st.lists(st.tuples(NAMES, st.lists(QUADS, min_size=1, max_size=3)), max_size=4))
def test_what_is_written_is_read(groups: list) -> None:
    text = " and ".join(format_box(name, *quads) for name, quads in groups)
    assert found(text) == [(name, quad) for name, quads in groups for quad in quads]


def test_format_is_the_official_one() -> None:
    assert (
        format_box("a dog", (1, 2, 3, 4), (5, 6, 7, 8)) == "<ref>a dog</ref><box>[[1,2,3,4],[5,6,7,8]]</box>"
    )
    assert format_box("", (1, 2, 3, 4)) == "<box>[[1,2,3,4]]</box>"


@pytest.mark.parametrize(
    "piece",
    ["[", "[ ", "[[1,", "[1,2,3,", "<box>", "<ref>", "<box>[[1,2,3,4],", "[" + " " * 50, "1", "[1,2,3,4] "],
)
def test_time_is_linear_in_the_length(piece: str) -> None:
    text = (piece * 200_000)[:200_000]
    start = time.process_time()
    parse_boxes(text)
    # A quadratic scan of this length takes minutes.
    assert time.process_time() - start < 2


def test_one_blank_run_is_read_once() -> None:
    start = time.process_time()
    parse_boxes("[" + " " * 400_000 + "x" + "[[1" + " " * 400_000 + "x")
    assert time.process_time() - start < 1


def test_official_rounding() -> None:
    assert pixels_to_thousand((100, 50, 400, 299), 800, 600) == (125, 83, 500, 498)
    # Halves go to the even neighbour, as Python's round has it.
    assert pixels_to_thousand((1, 3, 5, 7), 2000, 2000) == (0, 2, 2, 4)


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.tuples(*[st.floats(0, 1)] * 4),
)
def test_frames_agree(width: int, height: int, unit: tuple[float, float, float, float]) -> None:
    pixels = unit_to_pixels(unit, width, height)
    assert pixels_to_unit(pixels, width, height) == pytest.approx(unit, abs=1e-12)
    thousand = pixels_to_thousand(pixels, width, height)
    assert all(abs(a - b) <= 1 for a, b in zip(thousand, unit_to_thousand(unit), strict=True))
    back = thousand_to_pixels(thousand, width, height)
    tolerance = (width, height, width, height)
    assert all(abs(a - b) <= side / 2000 + 1e-9 for a, b, side in zip(back, pixels, tolerance, strict=True))
    assert thousand_to_unit(thousand) == pytest.approx(pixels_to_unit(back, width, height))


@given(QUADS)
def test_whole_thousandths_survive_the_way_through_pixels(quad: tuple[int, int, int, int]) -> None:
    assert pixels_to_thousand(thousand_to_pixels(quad, 1920, 1080), 1920, 1080) == quad


@given(QUADS, QUADS)
def test_iou_equals_counting_cells(a: tuple, b: tuple) -> None:
    a, b = tuple(v // 25 for v in a), tuple(v // 25 for v in b)
    mask_a, mask_b = np.zeros((41, 41), bool), np.zeros((41, 41), bool)
    mask_a[a[1] : a[3], a[0] : a[2]] = True
    mask_b[b[1] : b[3], b[0] : b[2]] = True
    union = (mask_a | mask_b).sum()
    expected = (mask_a & mask_b).sum() / union if union else 0.0
    assert iou(a, b) == pytest.approx(expected)
    assert iou(a, b) == iou(b, a)


def test_drawing_leaves_the_picture_and_marks_the_outline() -> None:
    image = Image.new("RGB", (400, 300), "white")
    boxes = [Box(label="dog", xyxy=(250, 500, 750, 900)), Box(label="cat", xyxy=(100, 300, 200, 400))]
    drawn = draw_boxes(image, boxes)
    assert image.getextrema() == ((255, 255),) * 3
    assert drawn.size == image.size
    pixels = np.asarray(drawn)
    # Left edge of the dog at x = 100, of the cat at x = 40; distinct colours; nothing inside.
    assert (pixels[220, 100] != 255).any()
    assert (pixels[105, 40] != 255).any()
    assert tuple(pixels[220, 100]) != tuple(pixels[105, 40])
    assert tuple(pixels[220, 200]) == (255, 255, 255)


def test_outline_grows_with_the_picture() -> None:
    def stroke(side: int) -> int:
        drawn = np.asarray(
            draw_boxes(Image.new("RGB", (side, side)), [Box(label="", xyxy=(250, 250, 750, 750))])
        )
        return int((drawn[side // 2, : side // 2] != 0).any(axis=1).sum())

    assert stroke(100) == 1
    assert stroke(1600) == 10


@given(
    st.integers(1, 120),
    st.integers(1, 120),
    st.lists(st.builds(Box, label=st.text(max_size=30), xyxy=QUADS), max_size=3),
)
def test_drawing_takes_any_box_on_any_picture(width: int, height: int, boxes: list[Box]) -> None:
    assert draw_boxes(Image.new("L", (width, height)), boxes).size == (width, height)


@pytest.mark.parametrize("width", [1, 5, 10, 20, 40])
def test_labels_wider_than_the_picture_are_cut(width: int) -> None:
    for length in (1, 2, 3, 4, 5, 79, 200):
        draw_boxes(Image.new("RGB", (width, 30)), [Box(label="W" * length, xyxy=(0, 0, 1000, 1000))])
