"""Worlds on disk in public formats: InternVL's meta JSON over JSONL, COCO's JSON of boxes and masks.

Source: fact sheet InternVL 2.5, section 3.1 (meta and rows); the public COCO annotation format.

Both writers are atomic and resumable. Every file is written beside its place and renamed; rows are appended to
``NAME.jsonl.partial`` (COCO: ``NAME.coco.jsonl.partial``) and renamed when all are there. A second call with the same
world and options goes on behind the last whole row, and does nothing where all is done. Beside the rows lies
``NAME.manifest.json`` (``NAME.coco.manifest.json``), which says what they came from; rows of another world or of other
options are never continued but written anew.

Files, NAME = <family>_<split>: ``NAME.json`` (meta) · ``NAME.jsonl`` · ``images/NAME/00000.png`` or ``.jpg`` · clips
``videos/NAME/00000.mp4``, ``.gif`` or a folder of ``0000.png`` · ``NAME.coco.json``.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from chiasm.errors import DataError, missing_extra
from chiasm.worlds.rle import encode_rle
from chiasm.worlds.world import Sample, World

__all__ = ["Format", "Progress", "write_coco", "write_jsonl", "write_video"]

#: Pictures as "png" (exact) or "jpeg"; clips as "frames" (folders of PNG), "mp4" (extra ``video``) or "gif".
Format = Literal["png", "jpeg", "frames", "mp4", "gif"]
_PICTURES, _CLIPS = ("png", "jpeg"), ("frames", "mp4", "gif")

#: Called after every sample with (samples done, samples in all).
Progress = Callable[[int, int], None]


def write_jsonl(
    world: World,
    folder: str | Path,
    n: int | None = None,
    *,
    images: Format = "png",
    clips: Format = "frames",
    quality: int = 92,
    progress: Progress | None = None,
) -> Path:
    """Write the first ``n`` samples as picture files, one JSONL and the meta JSON of InternVL; return the meta's path.

    Paths in the meta and in the rows are relative to the meta file's folder. Rows: ``id``, ``image`` or ``video``,
    ``width``, ``height`` and ``conversations``, of all questions of a sample; of clips as frames ``folder_fps`` too.

    Args:
        world: what to write.
        folder: where to.
        n: how many samples (default: all).
        images: "png" or "jpeg".
        clips: "frames", "mp4" or "gif".
        quality: of JPEG, 1..100.
        progress: told after every sample.

    Raises:
        DataError: ``n`` is not between 1 and the world's length, or an unknown format.
        MissingExtraError: "mp4" without PyAV.
    """
    if images not in _PICTURES or clips not in _CLIPS or not 1 <= quality <= 100:
        raise DataError(
            f"cannot write images={images!r} clips={clips!r} quality={quality}: images are png or jpeg, "
            "clips are frames, mp4 or gif, quality is 1..100"
        )
    count = _count(world, n)
    root, name = Path(folder), f"{world.family}_{world.split}"
    if clips == "mp4":
        _import_av()  # before anything is written

    def row(index: int) -> dict[str, Any]:
        sample = world.sample(index)
        medium, relative = _write_medium(sample, root, name, index, images, clips, quality)
        said = []
        for k, (question, answer) in enumerate(sample.rounds):
            tag = f"<{medium}>\n" if k == 0 else ""
            said += [{"from": "human", "value": tag + question}, {"from": "gpt", "value": answer}]
        height, width = sample.image.shape[-3:-1]
        return {
            "id": sample.key,
            medium: relative,
            # Videos and animations say their rate themselves.
            **({"folder_fps": sample.fps} if sample.is_clip and clips == "frames" else {}),
            "width": width,
            "height": height,
            "conversations": said,
        }

    options = {"images": images, "clips": clips, "quality": quality}
    _write_rows(world, root / f"{name}.jsonl", count, options, row, progress)
    meta = {
        name: {
            "root": ".",
            "annotation": f"{name}.jsonl",
            "data_augment": False,
            "repeat_time": 1,
            "length": count,
        }
    }
    path = root / f"{name}.json"
    _replace(path, (json.dumps(meta, indent=1) + "\n").encode())
    return path


def write_coco(
    world: World,
    folder: str | Path,
    n: int | None = None,
    *,
    images: Format = "png",
    quality: int = 92,
    progress: Progress | None = None,
) -> Path:
    """Write the first ``n`` pictures and their objects as one COCO JSON; return its path.

    Boxes are [x, y, width, height] in pixels, masks compressed run lengths (``worlds.rle``). Image ids are sample
    indices, annotation ids count from 1, categories are the labels in alphabetical order from 1.

    Raises:
        DataError: as ``write_jsonl``; or the world knows no objects, or its samples are clips.
    """
    count = _count(world, n)
    if images not in _PICTURES or not 1 <= quality <= 100:
        raise DataError(f"cannot write images={images!r} quality={quality}: png or jpeg, 1..100")
    if type(world).things is World.things:
        raise DataError(f"the world {world.family} knows no boxes: write it with format internvl")
    root, name = Path(folder), f"{world.family}_{world.split}"

    def row(index: int) -> dict[str, Any]:
        sample = world.sample(index)
        if sample.is_clip:
            raise DataError(f"{sample.key} is a clip: COCO's format holds pictures")
        _, relative = _write_medium(sample, root, name, index, images, "frames", quality)
        things = []
        for thing in world.things(index):
            x0, y0, x1, y1 = thing.box
            one: dict[str, Any] = {"label": thing.label, "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0}
            if thing.mask is None:
                one["area"] = (x1 - x0) * (y1 - y0)
            else:
                one |= {"area": int(thing.mask.sum()), "segmentation": encode_rle(thing.mask)}
            things.append(one)
        height, width = sample.image.shape[:2]
        return {
            "image": {"id": index, "file_name": relative, "width": width, "height": height},
            "things": things,
        }

    rows = root / f"{name}.coco.jsonl"
    _write_rows(world, rows, count, {"images": images, "quality": quality}, row, progress)
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    labels = sorted({thing["label"] for entry in found for thing in entry["things"]})
    number = {label: k for k, label in enumerate(labels, 1)}
    annotations = []
    for entry in found:
        for thing in entry["things"]:
            label = thing.pop("label")
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": entry["image"]["id"],
                    "category_id": number[label],
                    **thing,
                }
            )
    out = {
        "info": {"description": f"Chiasm world {world.family}", "manifest": world.manifest()},
        "images": [entry["image"] for entry in found],
        "annotations": annotations,
        "categories": [{"id": number[label], "name": label} for label in labels],
    }
    path = root / f"{name}.coco.json"
    _replace(path, (json.dumps(out, ensure_ascii=False) + "\n").encode())
    return path


def write_video(frames: np.ndarray, path: str | Path, fps: float) -> Path:
    """Write (F, H, W, 3) uint8 as a video: H.264 for ``.mp4`` (extra ``video``), or an animated ``.gif``.

    H.264 loses detail and needs even sides (an odd one repeats its last row or column). A GIF has 256 colours a
    frame and delays in hundredths of a second; equal frames in a row become one that is shown longer.

    Raises:
        DataError: another ending.
        MissingExtraError: ``.mp4`` without PyAV.
    """
    path = Path(path)
    if path.suffix == ".gif":
        from PIL import Image

        pictures = [Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE) for frame in frames]
        stream = io.BytesIO()
        delay = max(20, round(100 / fps) * 10)
        pictures[0].save(
            stream, "GIF", save_all=True, append_images=pictures[1:], duration=delay, loop=0, optimize=False
        )
        _replace(path, stream.getvalue())
        return path
    if path.suffix != ".mp4":
        raise DataError(f"cannot write {path.name}: videos are .mp4 or .gif")
    av = _import_av()
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        track.height, track.width, track.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        track.options = {"crf": "18", "preset": "veryfast"}
        for frame in frames:
            container.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(track.encode())
    _replace(path, stream.getvalue())
    return path


# --- files ----------------------------------------------------------------------------------------------------


def _count(world: World, n: int | None) -> int:
    count = len(world) if n is None else n
    if not 1 <= count <= len(world):
        raise DataError(f"cannot write {count} samples of {world.family}/{world.split}: it has {len(world)}")
    return count


def _write_medium(
    sample: Sample, root: Path, name: str, index: int, images: Format, clips: Format, quality: int
) -> tuple[str, str]:
    """Write a sample's picture or clip; return ("image" or "video", its path below ``root``)."""
    if sample.is_clip:
        relative = f"videos/{name}/{index:05d}" + ("" if clips == "frames" else f".{clips}")
        if clips == "frames":
            for k, frame in enumerate(sample.frames()):
                stream = io.BytesIO()
                frame.save(stream, "PNG")
                _replace(root / relative / f"{k:04d}.png", stream.getvalue())
            for stale in (root / relative).glob(
                "[0-9][0-9][0-9][0-9].png"
            ):  # of a longer clip that was here before
                if int(stale.stem) >= len(sample.image):
                    stale.unlink()
        else:
            write_video(sample.image, root / relative, sample.fps)
        return "video", relative
    relative = f"images/{name}/{index:05d}." + ("png" if images == "png" else "jpg")
    stream = io.BytesIO()
    if images == "png":
        sample.picture().save(stream, "PNG")
    else:
        sample.picture().save(stream, "JPEG", quality=quality, subsampling=0)
    _replace(root / relative, stream.getvalue())
    return "image", relative


def _write_rows(
    world: World,
    path: Path,
    count: int,
    options: dict[str, Any],
    row: Callable[[int], dict[str, Any]],
    progress: Progress | None,
) -> None:
    """Write ``count`` rows to ``path``, going on where a former call with the same manifest stopped."""
    partial, stamp = path.with_name(f"{path.name}.partial"), path.with_suffix(".manifest.json")
    manifest = json.dumps(world.manifest() | {"written": count, **options}, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    same = stamp.is_file() and stamp.read_text(encoding="utf-8") == manifest
    if same and path.is_file() and not partial.exists():
        if progress is not None:
            progress(count, count)
        return
    done = 0
    if same and partial.is_file():
        whole = partial.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]  # what is behind the last line break was cut off
        done = whole.count(b"\n")
        with partial.open("r+b") as out:
            out.truncate(len(whole))
    else:
        partial.write_bytes(b"")  # before the stamp: a stop in between must not make old rows look finished
        _replace(stamp, manifest.encode())
    with partial.open("ab") as out:
        for index in range(done, count):
            out.write((json.dumps(row(index), ensure_ascii=False) + "\n").encode())
            out.flush()
            if progress is not None:
                progress(index + 1, count)
    partial.replace(path)


def _replace(path: Path, data: bytes) -> None:
    """Write a neighbour file and rename it: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise missing_extra("av", "video") from error
    return av
