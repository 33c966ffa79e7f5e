"""Which frames of a video are looked at: samplers over time stamps. No decoding, no optional package.

Source: fact sheet InternVL 2.5, sections 3.1, 3.4 and 5. The samplers:

- ``middle``: n frames, evenly spread. Two published formulas for the index among T frames, k = 0 … n - 1:
  ``original`` (the README and video benchmarks of the release) is ``int(seg / 2 + round(seg * k))`` with
  ``seg = (T - 1) / n`` and rounding half to even; ``hf`` (the video processor of transformers) is
  ``arange(T / n / 2, T, T / n)`` rounded down.
- ``rand`` (training): T frames cut into n intervals, one frame of each at random. The released code never takes the
  last frame of an interval, and another rule where an interval has one frame only; here every frame has its chance.
  Drawn from the seed and the video's name, so that equally long videos get different frames, and each the same again.
- ``fps``: a frame at d/2, 3d/2, 5d/2, … seconds with d = 1 / fps, each time the nearest frame (of equally near ones
  the one with the even index, as NumPy rounds), none where the end is nearer. A frame that is nearest several times
  is taken once (the release repeats it). Where that makes more than ``max_frames``, the release drops the end of the
  video; here as many are spread over all of it (``middle``), none twice.

A formula that speaks of indices means evenly spaced frames. The T frames are therefore thought to be evenly spaced
between the first and the last one, and the frame nearest in time is taken: with a constant rate that is the formula
itself, with a variable one it is what the formula is for, and ``middle`` and ``rand`` may then take a frame twice. So
may ``original`` where as many frames are asked for as there are: 0, 1, 2, 2 of four. A video with fewer frames than
asked gives each of its frames once (the release repeats the last one, transformers refuses).

How many: ``frames``, or, where that is None, a number drawn evenly from ``min_frames`` to ``max_frames`` (training:
8 to 32 in InternVL 2.5, 16 to 96 in PVC), from the seed and the video's name too. A shorter video gives what it has.

Times are seconds after the first frame. A clip [start, end) holds the frames that begin in it, or else the one that
is on screen at its start.
"""

from __future__ import annotations

import math
import random
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from PIL import Image

from chiasm.errors import ConfigError, ImageError

__all__ = [
    "Formula",
    "FrameSampling",
    "Frames",
    "SamplingMode",
    "choose_frames",
    "fps_indices",
    "middle_indices",
    "rand_indices",
]

SamplingMode = Literal["middle", "rand", "fps"]
Formula = Literal["original", "hf"]

# Two time stamps that are nearer than this share of a frame's length are the same.
_SAME = 1e-6
# Frames a second; what lies outside is a mistake, and times would no longer be exact.
_SLOWEST, _FASTEST = 1e-6, 1e6
_LARGEST = sys.float_info.max


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameSampling:
    """How many frames of a video are taken, and which; see the module's first lines.

    Attributes:
        mode: ``middle``, ``rand`` or ``fps``.
        frames: how many with ``middle`` and ``rand``; None draws the number from min_frames to max_frames, each
            equally likely.
        fps: frames a second with ``fps``, from 0.000001 to 1000000; None means 1, and is the only value elsewhere.
        min_frames: least number asked for with ``fps``, and elsewhere if frames is None.
        max_frames: largest number, likewise.
        clip: (start, end) in seconds; None for the whole video.
        seed: of all that is drawn; the same seed takes the same frames of a video of the same name (path or URL, as
            given).
        formula: of ``middle``: ``original`` or ``hf``.
        folder_fps: frames a second of a folder or list of pictures, which cannot say it themselves.
    """

    mode: SamplingMode = "middle"
    frames: int | None = 8
    fps: float | None = None
    min_frames: int = 1
    max_frames: int = 64
    clip: tuple[float, float] | None = None
    seed: int = 0
    formula: Formula = "original"
    folder_fps: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in get_args(SamplingMode):
            raise ConfigError(f"sampling mode {self.mode!r} is unknown: {' | '.join(get_args(SamplingMode))}")
        if self.formula not in get_args(Formula):
            raise ConfigError(
                f"sampling formula {self.formula!r} is unknown: {' | '.join(get_args(Formula))}"
            )
        for name in ("frames", "min_frames", "max_frames"):
            value = getattr(self, name)
            if name == "frames" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.min_frames > self.max_frames:
            raise ConfigError(
                f"min_frames {self.min_frames} is above max_frames {self.max_frames}: lower one, raise one"
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"seed must be a whole number, not {self.seed!r}")
        for name in ("fps", "folder_fps"):
            value = getattr(self, name)
            if name == "fps" and value is None:
                continue
            if not _is_number(value) or not _SLOWEST <= value <= _FASTEST:
                raise ConfigError(
                    f"{name} must be a number from 0.000001 to 1000000 (frames a second), not {value!r:.60}"
                )
        if self.fps is not None and self.mode != "fps":
            raise ConfigError(f"fps does not go with sampling mode {self.mode}: leave one of them out")
        if self.clip is not None:
            object.__setattr__(self, "clip", _checked_clip(self.clip))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frames:
    """Frames taken from a video, decoded.

    Attributes:
        images: RGB, upright, in order of time; sizes may differ where the video changes its own.
        times: seconds after the video's first frame, one each.
        name: of the video.
        total: how many frames the video has.
        duration: its length in seconds.
    """

    images: tuple[Image.Image, ...]
    times: tuple[float, ...]
    name: str = "video"
    total: int = 0
    duration: float = 0.0

    def __post_init__(self) -> None:
        if len(self.images) != len(self.times):
            raise ImageError(
                f"{self.name}: {len(self.images)} frames but {len(self.times)} times: give one each"
            )
        if not self.images:
            raise ImageError(f"{self.name}: has no frames; give at least one")

    def __len__(self) -> int:
        return len(self.images)


def middle_indices(total: int, n: int, formula: Formula = "original") -> list[int]:
    """Evenly spread n of `total` frames; all of them where there are fewer. Sorted; `original` may repeat some."""
    if n > total:
        return list(range(total))
    if formula == "hf":
        step = total / n
        return [min(int(step / 2 + k * step), total - 1) for k in range(n)]
    segment = (total - 1) / n
    return [int(segment / 2 + round(segment * k)) for k in range(n)]


def rand_indices(total: int, n: int, seed: int = 0, name: str = "video") -> list[int]:
    """One frame of each of n intervals of `total` frames; all frames where there are fewer.

    The same seed and name draw the same frames, in every process.
    """
    n = min(n, total)
    draw = random.Random(f"{seed} {name}")  # hashed by SHA-512, not by hash()
    # In whole numbers: what NumPy's linspace rounds down to, without its rounding errors.
    edges = [total * k // n for k in range(n + 1)]
    return [draw.randrange(low, high) for low, high in pairwise(edges)]


def fps_indices(
    times: Sequence[float], fps: float, start: float, end: float, *, most: int | None = None
) -> list[int]:
    """The frames nearest to start + d/2, start + 3d/2, … below `end` with d = 1 / fps, each once; [] where none is.

    The work grows with the frames that are found, not with `fps`, and stops at `most` of them.
    """
    # A time nearer to the end than to the last frame belongs to the frame that would come next, hence to none.
    stretched = [*times, max(end, times[-1])]
    gap = _gap(stretched)
    found: list[int] = []
    k = 0
    while most is None or len(found) < most:
        index = _nearest(stretched, start + (0.5 + k) / fps, gap)
        if index == len(times):
            break
        if not found or found[-1] != index:
            found.append(index)
        # All moments before the middle to the next frame are nearest to this one.
        middle = (stretched[index] + stretched[index + 1]) / 2
        k = max(k + 1, math.floor((middle - start) * fps - 0.5))
    return found


def choose_frames(
    times: Sequence[float], duration: float, sampling: FrameSampling, *, name: str = "video"
) -> list[int]:
    """Indices of the frames to look at, in order; at least one.

    Args:
        times: seconds after the first frame, rising, at least one.
        duration: when the last frame ends.
        sampling: the rules.
        name: of the video, for errors and for what ``rand`` draws.

    Raises:
        ImageError: the clip begins where the video has ended.
    """
    start, end = 0.0, duration
    low, high = 0, len(times)
    if sampling.clip is not None:
        start, end = sampling.clip
        margin = _SAME * (_gap(times) or 1.0)
        if start >= max(duration, times[-1] + margin):
            raise ImageError(
                f"{name}: the clip {start:g}:{end:g} lies outside of its {duration:.2f} seconds; "
                "give seconds within it"
            )
        low, high = bisect_left(times, start - margin), bisect_left(times, end - margin)
        if low >= high:  # shorter than a frame: what is on screen then
            low = max(0, bisect_right(times, start + margin) - 1)
            high = low + 1
        end = min(end, duration)
    inside = times[low:high]
    total = len(inside)
    if sampling.mode == "fps":
        rate = 1.0 if sampling.fps is None else sampling.fps
        found = fps_indices(inside, rate, start, end, most=sampling.max_frames + 1)
        n = min(max(len(found), sampling.min_frames), sampling.max_frames)
        if len(found) == n:
            return [low + index for index in found]
        if n == total:
            return list(range(low, high))
    elif sampling.frames is None:
        n = random.Random(f"n{sampling.seed} {name}").randint(sampling.min_frames, sampling.max_frames)
    else:
        n = sampling.frames
    if n > total:
        return list(range(low, high))
    if sampling.mode == "rand":
        even = rand_indices(total, n, sampling.seed, name)
    else:
        even = middle_indices(total, n, sampling.formula)
    gap = _gap(inside)
    taken = [low + _nearest(inside, inside[0] + index * gap, gap) for index in even]
    return sorted(set(taken)) if sampling.mode == "fps" else taken


def _gap(times: Sequence[float]) -> float:
    """Mean distance of the frames; 0 for one frame."""
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0


def _nearest(times: Sequence[float], moment: float, gap: float) -> int:
    """Index of the time stamp nearest to a moment; of two equally near ones the even index."""
    after = bisect_left(times, moment)
    if after in (0, len(times)):
        return min(after, len(times) - 1)
    left, right = moment - times[after - 1], times[after] - moment
    if abs(left - right) <= _SAME * gap:
        return after - after % 2
    return after if right < left else after - 1


def _is_number(value: object) -> bool:
    # Compared, not converted: an integer may be too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _checked_clip(clip: object) -> tuple[float, float]:
    if not isinstance(clip, list | tuple) or len(clip) != 2 or not all(map(_is_number, clip)):
        raise ConfigError(f"a clip is (start, end) in seconds, not {clip!r:.60}")
    start, end = float(clip[0]), float(clip[1])
    if start < 0 or end <= start:
        raise ConfigError(
            f"a clip must start at 0 or later and end after it has begun, not {start:g}:{end:g}"
        )
    return start, end
