"""Tiny videos whose frames carry their own number as black and white bars, so that it survives compression."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

WIDTH, HEIGHT, BITS = 64, 48, 8


def numbered(n: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A picture of 8 vertical bars, the bits of n from left to right; its lower right corner is grey."""
    bits = [255 * (n >> bit & 1) for bit in range(BITS)]
    row = np.repeat(np.array(bits, dtype=np.uint8), width // BITS)
    picture = np.repeat(np.tile(row, (height, 1))[:, :, None], 3, axis=2)
    picture[height // 2 :, width // 2 :] = 128
    return picture


def number(image: Image.Image) -> int:
    """What `numbered` wrote; for an upright picture."""
    row = np.asarray(image.convert("L"))[: image.height // 4].mean(axis=0)
    width = image.width // BITS
    return int(sum((row[bit * width + width // 2] > 128) << bit for bit in range(BITS)))


def write_clip(
    path: Path,
    frames: int = 50,
    *,
    rate: int = 10,
    codec: str = "mpeg4",
    gop: int = 10,
    rotation: int | None = None,
    ticks: list[int] | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    audio: bool = False,
    video: bool = True,
    first: int = 0,
    options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
) -> Path:
    """A video of numbered frames. `ticks` are presentation times in milliseconds, for a variable frame rate."""
    base = Fraction(1, rate) if ticks is None else Fraction(1, 1000)
    with av.open(str(path), "w", options=options or {}) as container:
        sound = container.add_stream("aac", rate=16000) if audio else None
        if video:
            stream = container.add_stream(codec, rate=rate, options=codec_options or {})
            stream.width, stream.height = size
            stream.pix_fmt, stream.gop_size = "yuv420p", gop
            stream.codec_context.thread_count = 1
            if ticks is not None:
                stream.codec_context.time_base = base
            if rotation is not None:
                stream.set_display_rotation(rotation)
            for n in range(frames):
                frame = av.VideoFrame.from_ndarray(numbered(n, *size), format="rgb24")
                frame.pts, frame.time_base = (first + n if ticks is None else ticks[n]), base
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        if sound is not None:
            for n in range(16):
                tone = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
                tone.sample_rate, tone.pts = 16000, n * 1024
                container.mux(sound.encode(tone))
            container.mux(sound.encode())
    return path


def animation(path: Path, frames: int = 5, delays: list[int] | int = 100, **options: object) -> Path:
    """An animated GIF, WebP or PNG of numbered frames."""
    first, *rest = (Image.fromarray(numbered(n)) for n in range(frames))
    first.save(path, save_all=True, append_images=rest, duration=delays, **options)
    return path


def folder(path: Path, names: list[str]) -> Path:
    """Numbered pictures under these names, in this order."""
    path.mkdir()
    for n, name in enumerate(names):
        Image.fromarray(numbered(n)).save(path / name)
    return path
