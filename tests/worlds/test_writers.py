"""Worlds on disk: public layouts, going on after a stop, videos, COCO."""

import json

import numpy as np
import pytest
from PIL import Image

from chiasm.data.message import from_row
from chiasm.errors import DataError, MissingExtraError
from chiasm.media.video import open_video
from chiasm.worlds import (
    ChartsWorld,
    ClipsWorld,
    CountingWorld,
    ScenesWorld,
    build_cache,
    load_cache,
    open_world,
    write_coco,
    write_jsonl,
    write_video,
)
from chiasm.worlds import writers as module
from chiasm.worlds.rle import decode_rle


def rows_of(path):
    meta = json.loads(path.read_text())
    ((name, facts),) = meta.items()
    lines = (path.parent / facts["annotation"]).read_text(encoding="utf-8").splitlines()
    assert facts["length"] == len(lines)
    return name, [json.loads(line) for line in lines]


def test_all_rounds_and_any_size(tmp_path):
    world = ScenesWorld("dev", size=5, rounds=3, pixels=(100, 70))
    name, rows = rows_of(write_jsonl(world, tmp_path))
    assert name == "scenes_dev"
    for index, row in enumerate(rows):
        sample = world.sample(index)
        with Image.open(tmp_path / row["image"]) as picture:
            np.testing.assert_array_equal(np.asarray(picture), sample.image)
        assert (row["width"], row["height"]) == (100, 70)
        turns = from_row(row).turns
        assert len(turns) == 2 * len(sample.rounds)
        assert [turn.text.removeprefix("<image>\n") for turn in turns[::2]] == [q for q, _ in sample.rounds]
        assert [turn.text for turn in turns[1::2]] == [a for _, a in sample.rounds]
        assert [len(turn.of_kind("image")) for turn in turns[::2]] == [1] + [0] * (len(turns) // 2 - 1)


def test_jpeg(tmp_path):
    world = ScenesWorld("dev", size=2)
    _, rows = rows_of(write_jsonl(world, tmp_path, images="jpeg", quality=95))
    with Image.open(tmp_path / rows[0]["image"]) as picture:
        assert picture.format == "JPEG"
        assert np.abs(np.asarray(picture).astype(int) - world.sample(0).image).mean() < 6


@pytest.mark.parametrize("kind", ["frames", "gif", "mp4"])
def test_clips(tmp_path, kind):
    if kind == "mp4":
        pytest.importorskip("av")
    world = ClipsWorld("dev", size=3, pixels=(65, 64))
    _, rows = rows_of(write_jsonl(world, tmp_path, clips=kind))
    for index, row in enumerate(rows):
        sample = world.sample(index)
        assert from_row(row).turns[0].text == f"<video>\n{sample.question}"
        (part,) = from_row(row).turns[0].of_kind("video")
        assert part.sampling == ({"folder_fps": sample.fps} if kind == "frames" else {})
        video = open_video(str(tmp_path / row["video"]), **part.sampling)
        read = [(np.asarray(frame).astype(int), time) for frame, time in video.each(list(range(len(video))))]
        video.close()
        assert len(read) == 8 or kind == "gif"
        assert all(abs(time * sample.fps - round(time * sample.fps)) < 0.05 for _, time in read)
        # What is on screen in the middle of each of the eight frames.
        frames = [[f for f, time in read if time <= (k + 0.5) / sample.fps][-1] for k in range(8)]
        apart = np.mean([np.abs(a[:64, :65] - b).mean() for a, b in zip(frames, sample.image, strict=True)])
        assert apart <= {"frames": 0, "gif": 3, "mp4": 9}[kind]


def test_a_shorter_clip_leaves_no_frames_of_a_longer_one(tmp_path):
    for frames in (12, 8):
        write_jsonl(ClipsWorld("test", size=1, frames=frames), tmp_path)
        (folder,) = (tmp_path / "videos" / "clips_test").iterdir()
        assert len(list(folder.iterdir())) == frames


def test_a_stopped_write_goes_on_where_it_stood(tmp_path):
    world = CountingWorld("dev", size=12)

    def stop(done: int, total: int) -> None:
        assert total == 9
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(world, tmp_path, 9, progress=stop)
    partial = tmp_path / "counting_dev.jsonl.partial"
    assert not (tmp_path / "counting_dev.json").exists()
    assert not (tmp_path / "counting_dev.jsonl").exists()
    with partial.open("ab") as out:
        out.write(b'{"id": "cut off')
    seen: list[int] = []
    path = write_jsonl(world, tmp_path, 9, progress=lambda done, total: seen.append(done))
    assert seen == [5, 6, 7, 8, 9]
    assert not partial.exists()
    whole = rows_of(path)
    assert whole == rows_of(write_jsonl(world, tmp_path / "whole", 9))
    # What is done is not done again.
    stamp = (tmp_path / "images/counting_dev/00000.png").stat().st_mtime_ns
    assert rows_of(write_jsonl(world, tmp_path, 9)) == whole
    assert (tmp_path / "images/counting_dev/00000.png").stat().st_mtime_ns == stamp


def test_other_options_begin_anew(tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(CountingWorld("dev", size=6, seed=1), tmp_path, progress=stop)
    other = CountingWorld("dev", size=6, seed=2)
    _, rows = rows_of(write_jsonl(other, tmp_path))
    assert [row["id"] for row in rows] == [other.key(index) for index in range(6)]
    # A stop between the new list and its manifest must not make the old rows look finished.
    (tmp_path / "counting_dev.jsonl.partial").write_bytes(b"")
    seen: list[int] = []
    write_jsonl(other, tmp_path, progress=lambda done, total: seen.append(done))
    assert seen == [1, 2, 3, 4, 5, 6]


def test_coco_boxes_and_masks(tmp_path):
    world = ScenesWorld("test", size=8)
    path = write_coco(world, tmp_path)
    coco = json.loads(path.read_text())
    assert path.name == "scenes_test.coco.json"
    assert [image["id"] for image in coco["images"]] == list(range(8))
    labels = {category["id"]: category["name"] for category in coco["categories"]}
    assert sorted(labels) == list(range(1, len(labels) + 1))
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    for image in coco["images"]:
        assert (tmp_path / image["file_name"]).is_file()
        mine = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        things = world.things(image["id"])
        assert [labels[a["category_id"]] for a in mine] == [thing.label for thing in things]
        for annotation, thing in zip(mine, things, strict=True):
            x, y, w, h = annotation["bbox"]
            assert (x, y, x + w, y + h) == thing.box
            mask = decode_rle(annotation["segmentation"])
            np.testing.assert_array_equal(mask, thing.mask)
            assert annotation["area"] == mask.sum()


def test_coco_without_masks_or_without_boxes(tmp_path):
    world = ChartsWorld("test", size=3, kinds=["bar"], fonts="bundled")
    coco = json.loads(write_coco(world, tmp_path, images="jpeg").read_text())
    assert {category["name"] for category in coco["categories"]} == {"bar"}
    for annotation in coco["annotations"]:
        assert "segmentation" not in annotation
        assert annotation["area"] == annotation["bbox"][2] * annotation["bbox"][3]
    with pytest.raises(DataError, match="knows no boxes"):
        write_coco(CountingWorld("test"), tmp_path, 2)
    with pytest.raises(DataError, match="is a clip"):
        write_coco(ClipsWorld("test"), tmp_path, 2)


def test_caches_hold_clips_and_rounds_but_one_size_only(tmp_path):
    clips = load_cache(build_cache(ClipsWorld("dev"), 3, tmp_path / "clips.npz"))
    assert clips["images"].shape == (3, 8, 64, 64, 3)
    assert "more" not in clips
    world = ScenesWorld("dev", rounds=2)
    scenes = load_cache(build_cache(world, 3, tmp_path / "scenes.npz"))
    assert json.loads(str(scenes["more"][1])) == [list(pair) for pair in world.sample(1).more]
    with pytest.raises(DataError, match="one size"):
        build_cache(ChartsWorld("dev", fonts="bundled"), 3, tmp_path / "charts.npz")


def test_what_cannot_be_written_is_named(tmp_path, monkeypatch):
    world = ScenesWorld("dev", size=3)
    with pytest.raises(DataError, match="cannot write 4 samples"):
        write_jsonl(world, tmp_path, 4)
    with pytest.raises(DataError, match="png or jpeg"):
        write_jsonl(world, tmp_path, images="bmp")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"\.mp4 or \.gif"):
        write_video(np.zeros((8, 8, 8, 3), np.uint8), tmp_path / "a.avi", 4)
    monkeypatch.setitem(module.__dict__["_import_av"].__globals__["__builtins__"], "__import__", _no_av)
    with pytest.raises(MissingExtraError, match=r"chiasm\[video\]"):
        write_jsonl(ClipsWorld("dev"), tmp_path, 1, clips="mp4")


def _no_av(name, *args, __real=__import__, **kwargs):
    if name == "av":
        raise ImportError(name)
    return __real(name, *args, **kwargs)


def test_registry_names_what_is_wrong():
    with pytest.raises(DataError, match="did you mean 'scenes'"):
        open_world("scene", "train")
    with pytest.raises(DataError, match="has no option 'colour': it has"):
        open_world("scenes", "train", colour=1)
    assert len(open_world("grounding", "dev", size=7)) == 7
