"""Repeated tiles and frames of several tiles: rows, spans, counting and packing; nothing changes by default."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.data.layout import LayoutSpec, count_shots, count_tokens, layout, measure
from chiasm.data.packing import Item
from chiasm.data.sequence import IMAGE, VIDEO, Sequence, Span
from chiasm.errors import ConfigError, ContextOverflowError, DataError, ImageError
from chiasm.media.tiles import TilePolicy
from chiasm.media.video import open_video
from clips import write_clip
from tiny_tokenizers import byte_level

SIDE, ROWS = 8, 3


def make(max_tiles: int = 6, thumbnail: bool = True, **options) -> LayoutSpec:
    tiles = TilePolicy(image_size=SIDE, max_tiles=max_tiles, thumbnail=thumbnail)
    options = {"system": "", "tokens_per_tile": ROWS, "template": "internvl2_5", **options}
    return LayoutSpec(tokenizer=byte_level(), tiles=tiles, **options)


def pixels(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def picture(width: int, height: int) -> dict:
    return {"type": "image", "image": pixels(width, height)}


def film(frames: int, width: int, height: int) -> dict:
    return {"type": "video", "video": [pixels(width, height, n) for n in range(frames)]}


def talk(*parts: object) -> list[dict]:
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "Yes."}]


def test_a_repeated_picture_by_hand() -> None:
    said = talk(picture(16, 8), "What?")
    plain, often = layout(said, make()), layout(said, make(repeats=4))
    (one,), (four,) = plain.spans, often.spans
    assert (one.items, one.repeats, one.length) == (3, 1, 3 * ROWS)  # two tiles and the thumbnail
    assert (four.items, four.repeats, four.length) == (3, 4, 4 * 3 * ROWS)
    assert (four.start, four.first, four.key, four.group) == (one.start, one.first, one.key, -1)
    # The tiles lie in the media once; only context rows were added, right where the others are.
    assert torch.equal(often.media["image"].data, plain.media["image"].data)
    end = one.start + one.length
    more = torch.full((9 * ROWS,), int(plain.ids_T[one.start]))
    assert torch.equal(often.ids_T, torch.cat([plain.ids_T[:end], more, plain.ids_T[end:]]))
    assert int((often.kind_T == IMAGE).sum()) == 12 * ROWS
    assert often.pos_T.tolist() == list(range(len(often)))
    # In which order the rows lie is for the model to know: the sequence is the same.
    assert torch.equal(layout(said, make(repeats=4, repeat_order="repeat")).ids_T, often.ids_T)


def test_frames_of_several_tiles_share_one_tiling_and_one_time() -> None:
    spec = make(frame_tiles=2, thumbnail=False)
    said = talk(film(3, 16, 8), picture(8, 8), film(2, 8, 8), "What?")
    made = layout(said, spec)
    assert count_shots(said, spec) == [(3, 2), (2, 1)]
    frames = made.spans_of("video")
    assert [(s.first, s.items, s.length, s.group) for s in frames] == [
        (0, 2, 2 * ROWS, 0),
        (2, 2, 2 * ROWS, 0),
        (4, 2, 2 * ROWS, 0),
        (6, 1, ROWS, 1),
        (7, 1, ROWS, 1),
    ]
    batch = made.media["video"]
    assert batch.times_N is not None
    assert batch.times_N.tolist() == [0, 0, 1, 1, 2, 2, 0, 1]
    for n in range(3):
        assert torch.equal(batch.data[2 * n : 2 * n + 2], spec.tiles.tile(pixels(16, 8, n), 2))
    assert len({s.key for s in frames}) == 5
    assert made.spans_of("image")[0].items == 1
    # A policy that wants thumbnails gives them to frames too.
    assert count_shots(said, make(frame_tiles=2)) == [(3, 3), (2, 1)]


def test_repeated_frames() -> None:
    made = layout(talk(film(2, 16, 8), "What?"), make(video_repeats=2, repeats=4))
    assert [(s.items, s.repeats, s.length) for s in made.spans] == [(1, 2, 2 * ROWS)] * 2
    assert int((made.kind_T == VIDEO).sum()) == 4 * ROWS


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
TURNS = st.lists(
    st.tuples(
        st.lists(SIZES, max_size=2),
        st.lists(st.tuples(st.integers(1, 4), SIZES), max_size=2),
        st.sampled_from(["", "What is it?", "a b c " * 9]),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60)
@given(
    turns=TURNS,
    repeats=st.integers(1, 4),
    video_repeats=st.integers(1, 2),
    frame_tiles=st.integers(1, 4),
    thumbnail=st.booleans(),
    max_tiles=st.sampled_from([None, 1, 4]),
)
def test_a_measure_is_what_the_layout_makes(
    turns, repeats, video_repeats, frame_tiles, thumbnail, max_tiles
) -> None:
    spec = make(thumbnail=thumbnail, repeats=repeats, video_repeats=video_repeats, frame_tiles=frame_tiles)
    said = []
    for pictures, films, question in turns:
        said += talk(*(picture(*size) for size in pictures), *(film(n, *size) for n, size in films), question)
    found = measure(said, spec, train=True, max_tiles=max_tiles)
    made = layout(said, spec, train=True, max_tiles=max_tiles)
    assert found.tokens == len(made)
    assert found.tiles == sum(len(batch) for batch in made.media.values())
    assert found.cuts == tuple((span.start - 1, span.length + 2, span.items) for span in made.spans)
    context = spec.context_id
    for span in made.spans:
        often = repeats if span.media == "image" else video_repeats
        assert span.repeats == often
        assert span.length == often * span.items * ROWS
        assert (made.ids_T[span.start : span.start + span.length] == context).all()
    assert int((made.ids_T == context).sum()) == sum(span.length for span in made.spans)
    # Told sizes count as found ones do.
    told = count_tokens(
        said,
        spec.limited(max_tiles),
        sizes=[size for pictures, *_ in turns for size in pictures],
        frames=[spec.shot(n, size) for _, films, _ in turns for n, size in films],
        train=True,
    )
    assert told == found.tokens
    # Packed, split and cut between pictures, every span keeps its tiles and how often they are encoded.
    both = Sequence.pack([made, made])
    assert all(document.spans == made.spans for document in both.split())
    item = Item.of(("s", 0), found)
    for start, length, tiles in found.cuts[:1]:
        assert item.reach(0, start + length - 1, 1e9) == start
        assert item.piece(start, start + length).tiles == tiles
        assert made.piece(start, start + length).spans[0].repeats == made.spans[0].repeats


def test_what_cannot_be_is_refused() -> None:
    for name in ("repeats", "frame_tiles", "video_repeats"):
        for value in (0, -1, 2.0, True):
            with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least 1"):
                make(**{name: value})
    with pytest.raises(ConfigError, match="repeat_order is 'frame': use tile or repeat"):
        make(repeat_order="frame")
    with pytest.raises(DataError, match="repeats must be at least 1, found 0"):
        Span(media="image", start=0, length=1, first=0, items=1, repeats=0)
    said = talk(film(2, 16, 8), "?")
    with pytest.raises(DataError, match=r"give \(frames, tiles of a frame\)"):
        count_tokens(said, make(frame_tiles=2), frames=[2])
    assert count_tokens(said, make(), frames=[2]) == count_tokens(said, make())


def test_too_long_says_what_to_lower() -> None:
    said = talk(picture(16, 8), "?")
    with pytest.raises(
        ContextOverflowError, match=r"36 of them are 3 image tiles encoded 4 times, .*fewer repeats"
    ):
        layout(said, make(repeats=4, max_length=40))
    with pytest.raises(
        ContextOverflowError, match=r"18 of them are 2 video frames of 6 tiles, .*fewer tiles a frame"
    ):
        layout(talk(film(2, 16, 8), "?"), make(frame_tiles=2, max_length=20))
    with pytest.raises(ContextOverflowError, match=r"9 of them are 3 image tiles, so use fewer tiles"):
        layout(said, make(max_length=20))


def test_a_video_that_changes_its_size_has_no_common_tiling() -> None:
    mixed = {"type": "video", "video": [pixels(16, 8), pixels(16, 8), pixels(8, 16)]}
    with pytest.raises(ImageError, match=r"frames have 16x8 pixels, but 8x16 at 2\.00 s: they cannot share"):
        layout(talk(mixed, "?"), make(frame_tiles=2))
    # With one tile a frame each is resized by itself.
    assert len(layout(talk(mixed, "?"), make()).media["video"]) == 3


def test_the_size_of_a_turned_video_costs_one_frame(tmp_path) -> None:
    path = write_clip(tmp_path / "turned.mp4", 30, rotation=90)
    with open_video(path) as video:
        assert video.size == (48, 64)
        assert video.decoded == 1
        assert video.size == (48, 64)
        assert video.decoded == 1
        assert [image.size for image in video.read([0, 29]).images] == [(48, 64)] * 2
    spec = make(frame_tiles=6, thumbnail=False)
    said = talk({"type": "video", "video": path, "frames": 2}, "?")
    assert measure(said, spec).tokens == len(layout(said, spec))
