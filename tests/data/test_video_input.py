"""Videos of training data: mixed with pictures in one pack, and every kind of bad input in one clear line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.data.feed import PackedFeed
from chiasm.data.layout import LayoutSpec, count_tokens, layout, measure
from chiasm.data.message import Part, Record, Turn
from chiasm.data.packing import Packer
from chiasm.data.sequence import IMAGE, VIDEO, MediaBatch, Sequence
from chiasm.errors import ContextOverflowError, DataError, ImageError
from chiasm.media.frames import FrameSampling
from chiasm.media.tiles import TilePolicy
from clips import folder, number, write_clip
from tiny_tokenizers import byte_level

SIDE, ROWS, REPEATS = 8, 2, 4
FRAMES = FrameSampling(mode="rand", frames=None, min_frames=2, max_frames=7)


def spec(**options) -> LayoutSpec:
    return LayoutSpec(
        tokenizer=byte_level(),
        template="internvl2_5",
        tiles=TilePolicy(image_size=SIDE, max_tiles=4),
        system="",
        **{"tokens_per_tile": ROWS, "repeats": REPEATS, "sampling": FRAMES, **options},
    )


def record(*parts: Part, answer: str = "a cat") -> Record:
    return Record(turns=(Turn("user", (*parts, Part("text", "?"))), Turn.of("assistant", answer)))


def picture(seed: int) -> Part:
    draw = np.random.default_rng(seed)
    width, height = draw.integers(4, 40, 2)
    return Part("image", Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)))


class Rows:
    """A data set in memory."""

    def __init__(self, name: str, rows: list[Record]) -> None:
        self.name, self.rows = name, rows

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        return f"{self.name}.jsonl:{index + 1}"

    def record(self, index: int) -> Record:
        return self.rows[index]


class Bin:
    """A quarantine that keeps what it is given."""

    def __init__(self) -> None:
        self.listed: dict[str, str] = {}

    def add(self, where: str, dataset: str, reason: str) -> None:
        self.listed[where] = reason

    def seen(self, n: int) -> None:
        pass


def feed(sets: dict[str, list[Record]], rules: LayoutSpec, **limits: int) -> PackedFeed:
    return PackedFeed(
        {name: Rows(name, rows) for name, rows in sets.items()},
        {name: 1.0 for name in sets},
        rules,
        Bin(),
        packers=[Packer(**{"max_tokens": 400, "max_tiles": 24, "buffer": 3, **limits})],
        packs=1,
        seed=0,
    )


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("film") / "film", [f"{n}.png" for n in range(12)])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 50)


@pytest.mark.parametrize("frame_tiles", [1, 2])
def test_pictures_and_videos_share_packs(film: Path, clip: Path, frame_tiles: int) -> None:
    sets = {
        "pictures": [record(picture(n), picture(n + 50)) for n in range(9)],
        "videos": [
            record(Part("video", film)),
            record(Part("video", clip)),
            record(picture(7), Part("video", clip)),
        ],
    }
    rules = spec(frame_tiles=frame_tiles)
    packed = feed(sets, rules)
    mixed, lengths = 0, Counter()
    for step in range(12):
        (handle,) = packed.plan(step)
        row = packed.load(handle, step=step, part=0)
        assert row is not None
        assert len(row) == handle.tokens
        assert sum(map(len, row.media.values())) == handle.tiles <= 24
        mixed += {"image", "video"} <= row.media.keys()
        for span in row.spans:
            kind, often = (IMAGE, REPEATS) if span.media == "image" else (VIDEO, 1)
            assert span.repeats == often
            assert span.length == often * span.items * ROWS
            assert (row.kind_T[span.start : span.start + span.length] == kind).all()
            assert (span.group >= 0) == (span.media == "video")
        assert row.media["image"].times_N is None if "image" in row.media else True
        if "video" not in row.media:
            continue
        # Every group is one video of one document: its times rise, its documents do not mix.
        times_N = row.media["video"].times_N
        assert times_N is not None
        groups: dict[int, list] = {}
        for span in row.spans_of("video"):
            groups.setdefault(span.group, []).append(span)
        for spans in groups.values():
            assert len({int(row.doc_T[span.start]) for span in spans}) == 1
            firsts = [float(times_N[span.first]) for span in spans]
            assert firsts == sorted(set(firsts))
            for span in spans:
                assert len(set(times_N[span.first : span.first + span.items].tolist())) == 1
            lengths[len(spans)] += 1
    assert mixed >= 4
    assert set(lengths) <= set(range(2, 8))
    assert len(lengths) > 3
    assert not packed.quarantine.listed


def test_only_sampled_frames_are_decoded(tmp_path: Path) -> None:
    from chiasm.media.video import open_video

    path = write_clip(tmp_path / "long.mp4", 300, gop=5)
    opened = []

    def opener(source, **options):
        opened.append(open_video(source, **options))
        return opened[-1]

    rules = spec(sampling=FrameSampling(frames=4))
    made = layout(record(Part("video", path)), rules, train=True, video_opener=opener)
    assert len(made.media["video"]) == 4
    assert opened[0].decoded <= 4 * 7  # from a key frame on, and what the decoder works ahead
    measure(record(Part("video", path)), rules, train=True, video_opener=opener)
    assert opened[1].decoded == 0


def test_a_variable_frame_rate_goes_by_time(tmp_path: Path) -> None:
    ticks = [*range(0, 9000, 1000), *range(9000, 10000, 100)]
    path = write_clip(tmp_path / "vfr.mp4", len(ticks), ticks=ticks)
    made = layout(record(Part("video", path)), spec(sampling=FrameSampling(mode="fps", fps=0.5)), train=True)
    assert made.media["video"].times_N.tolist() == pytest.approx([1, 3, 5, 7, 9], abs=1e-3)


def test_missing_time_stamps_are_counted(tmp_path: Path) -> None:
    """H.264 in AVI has no presentation times: frames go by their number and the stated rate."""
    try:
        av.Codec("libx264", "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip("no H.264 encoder")
    path = write_clip(tmp_path / "bare.avi", 30, codec="libx264")
    made = layout(record(Part("video", path)), spec(sampling=FrameSampling(frames=5)), train=True)
    assert made.media["video"].times_N.tolist() == pytest.approx([0.2, 0.8, 1.4, 1.9, 2.5])


def cut_off(path: Path) -> Path:
    write_clip(path, 50, options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def no_frames(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return path


def two_sizes(path: Path) -> Path:
    one = write_clip(path.with_name("1.ts"), 10)
    two = write_clip(path.with_name("2.ts"), 10, size=(64, 96), first=10)
    path.write_bytes(one.read_bytes() + two.read_bytes())
    return path


def noise(path: Path) -> Path:
    path.write_bytes(np.random.default_rng(0).bytes(4000))
    return path


@pytest.mark.parametrize(
    ("name", "write", "options", "match"),
    [
        ("cut.mp4", cut_off, {}, r"cut\.mp4: is cut off"),
        ("noise.mp4", noise, {}, r"noise\.mp4: is not a video that can be read here"),
        ("none.avi", no_frames, {}, r"none\.avi: has no frames; give a video"),
        (
            "sizes.ts",
            two_sizes,
            {"frame_tiles": 4},
            r"sizes\.ts: its frames have 64x48 pixels, but 64x96 at .* s: they cannot share one tiling; convert it",
        ),
        ("gone.mp4", lambda path: path, {}, r"gone\.mp4: no such file"),
    ],
)
def test_a_bad_video_is_one_line_and_goes_to_the_quarantine(
    tmp_path: Path, name, write, options, match
) -> None:
    path = write(tmp_path / name)
    bad = record(Part("video", path))
    rules = spec(sampling=FrameSampling(frames=6), **options)
    with pytest.raises(ImageError, match=match) as caught:
        layout(bad, rules, train=True)
    assert "\n" not in str(caught.value)
    packed = feed({"mixed": [bad, record(picture(1))]}, rules, max_tokens=120)
    rows = [packed.load(packed.plan(step)[0], step=step, part=0) for step in range(3)]
    assert any(row is not None and "image" in row.media for row in rows)
    assert packed.quarantine.listed.keys() == {"mixed.jsonl:1"}


def test_frames_of_two_sizes_are_resized_one_by_one_where_a_frame_is_one_tile(tmp_path: Path) -> None:
    path = two_sizes(tmp_path / "sizes.ts")
    made = layout(record(Part("video", path)), spec(sampling=FrameSampling(frames=6)), train=True)
    assert len(made.media["video"]) == 6
    tiles = made.media["video"].data
    assert number(Image.fromarray(tiles[0].permute(1, 2, 0).numpy()).resize((64, 48))) == 1


def test_more_frames_than_the_model_looks_at(clip: Path) -> None:
    said = record(Part("video", clip, {"frames": 9}))
    match = r"clip\.mp4: 9 frames are taken but the model looks at 8 at most: take fewer frames"
    for count in (layout, measure, count_tokens):
        with pytest.raises(ContextOverflowError, match=match):
            count(said, spec(max_frames=8), train=True)
    with pytest.raises(ContextOverflowError, match="video 1: 9 frames are taken"):
        count_tokens(said, spec(max_frames=8), frames=[9], train=True)
    assert len(layout(said, spec(max_frames=9), train=True).media["video"]) == 9
    # Nothing was decoded to find out, and the feed leaves such a sample out.
    packed = feed({"long": [said, record(picture(1))]}, spec(max_frames=8))
    packed.plan(0)
    assert "looks at 8 at most" in packed.quarantine.listed["long.jsonl:1"]


def test_a_batch_with_and_without_time_stamps_is_refused(clip: Path) -> None:
    timed = layout(record(Part("video", clip)), spec(), train=True)
    bare = layout(record(Part("video", clip)), spec(), train=True)
    untimed = Sequence(
        **{
            name: getattr(bare, name)
            for name in ("ids_T", "kind_T", "doc_T", "pos_T", "labels_T", "weight_T", "spans")
        },
        media={"video": MediaBatch(bare.media["video"].data)},
    )
    with pytest.raises(
        DataError, match="some media of this batch have time stamps and others none: give all or none"
    ):
        Sequence.pack([timed, untimed])
    with pytest.raises(DataError, match="7 items but 3 time stamps"):
        MediaBatch(torch.zeros(7, 3, 2, 2, dtype=torch.uint8), torch.zeros(3))
