"""Read a video while it comes, and answer about what was seen so far.

Source: fact sheet PVC, "beyond the paper", 1: attention over time is causal, so that a frame is encoded once, with the
keys and values of earlier ones (`ProgressiveViT.step`). Here the encoder sees a window of frames and the first few, the
language model at most so many frames: the latest, and of those before them as many, evenly spread. Which ones depends
on their number alone. A question reads these frames anew (what is common with the question before it is remembered by
the prefix cache), so an answer depends on nothing that was asked before.

All memory is allocated with the first frame.

Up to the window, a streamed video is encoded as it is in a batch, exactly (with "relative" times where the stream's
horizon is the time of its last frame).

Legend: N tiles of a frame, K tokens of a tile, C width of the language model.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor

from chiasm.data.layout import layout
from chiasm.data.sequence import MediaBatch, Sequence
from chiasm.errors import ConfigError, DataError, UsageError
from chiasm.media.frames import Frames
from chiasm.media.pixels import normalize
from chiasm.model.answer import ModelInputs, Reply
from chiasm.systems.pvc.plan import ENCODED, video_times

if TYPE_CHECKING:
    from chiasm.systems.pvc.load import PVCChat

__all__ = ["FRAMES", "FrameStore", "VideoStream"]

FRAMES = 48
"""Most frames that the language model sees."""
WINDOW, SINK = 32, 1
"""Frames that the encoder sees of the past, and of the beginning."""

_number = itertools.count()


class FrameStore:
    """The tokens of the last frames, and of a bounded, evenly spread choice of those before them.

    Older frames are kept at multiples of a step, which doubles whenever twice as many are kept as are shown. So what is
    kept depends on the number of frames alone, and the memory does not grow.

    Args:
        shown: F, most frames that are ever shown.
        recent: how many of them are the latest.

    Raises:
        ConfigError: fewer than one frame is shown, or more recent ones than that.
    """

    def __init__(self, shown: int = FRAMES, recent: int | None = None) -> None:
        if shown < 1:
            raise ConfigError(f"a stream that shows {shown} frames cannot be: show at least 1")
        recent = max(1, shown // 2) if recent is None else recent
        if not 1 <= recent <= shown:
            raise ConfigError(
                f"{recent} recent of {shown} frames cannot be: show at least 1, the latest among them"
            )
        self.shown, self.recent = shown, recent
        self.past = shown - recent
        self.step = 1
        self.count = 0
        self._slot_of: dict[int, int] = {}  # number of a frame -> its place, rising
        self._free = list(range(recent + 2 * self.past + 1))
        self._tokens: Tensor | None = None
        self._times: dict[int, float] = {}

    def add(self, tokens_RC: Tensor, time: float) -> None:
        """Take the tokens of the next frame."""
        if self._tokens is None:
            self._tokens = tokens_RC.new_zeros(len(self._free), *tokens_RC.shape)
        slot = self._free.pop()
        self._tokens[slot] = tokens_RC
        self._slot_of[self.count], self._times[self.count] = slot, time
        self.count += 1
        leaving = self.count - 1 - self.recent  # it is no longer among the latest
        if leaving < 0:
            return
        if not self.past or leaving % self.step:
            self._drop(leaving)
            return
        older = [n for n in self._slot_of if n <= leaving]
        if len(older) > 2 * self.past:
            self.step *= 2
            for n in older:
                if n % self.step:
                    self._drop(n)

    def _drop(self, number: int) -> None:
        self._free.append(self._slot_of.pop(number))
        del self._times[number]

    def choice(self) -> list[int]:
        """Numbers of the frames to show, in order."""
        newest = [n for n in self._slot_of if n >= self.count - self.recent]
        older = [n for n in self._slot_of if n < self.count - self.recent]
        if len(older) > self.past:
            last = max(1, self.past - 1)
            older = [older[k * (len(older) - 1) // last] for k in range(self.past)]
        return older + newest

    def tokens(self, numbers: list[int]) -> Tensor:
        """(F, R, C) of these frames."""
        assert self._tokens is not None
        return self._tokens[[self._slot_of[n] for n in numbers]]

    def times(self, numbers: list[int]) -> list[float]:
        """When they were."""
        return [self._times[n] for n in numbers]

    @property
    def bytes(self) -> int:
        """Memory of the tokens."""
        return 0 if self._tokens is None else self._tokens.numel() * self._tokens.element_size()


class VideoStream:
    """A video that is being read.

    Args:
        chat: the model.
        frames: most frames that the language model sees.
        recent: how many of them are the latest; None: half.
        window, sink: frames that the encoder sees of the past, the present one among them, and of the beginning.
        horizon: seconds after the first frame at which relative times are 1: the length of the video. Needed by models
            with relative times; the others have no end.

    Raises:
        ConfigError: the numbers cannot be, the horizon is missing, or frames are repeated (`video_repeats`).
    """

    def __init__(
        self,
        chat: PVCChat,
        *,
        frames: int = FRAMES,
        recent: int | None = None,
        window: int = WINDOW,
        sink: int = SINK,
        horizon: float | None = None,
    ) -> None:
        config = chat.config
        if config.temporal.time == "relative" and (horizon is None or not horizon >= 0):
            raise ConfigError(
                "this model's times are relative, so a stream must know its length: give horizon in seconds, or use "
                "a model with temporal.time='seconds'"
            )
        if config.video_repeats != 1:
            raise ConfigError(f"a stream shows each frame once, but video_repeats is {config.video_repeats}")
        if window + sink > config.temporal.max_frames:
            raise ConfigError(
                f"a window of {window} frames and {sink} of the beginning are beyond the model's horizon of "
                f"{config.temporal.max_frames} frames: use fewer"
            )
        self.chat, self.horizon = chat, horizon
        self.store = FrameStore(frames, recent)
        self._vision: Any = chat.model.embedder.vision
        self._past = self._vision.new_cache(window, sink)
        self._name = f"stream {next(_number)}"
        self._first: float | None = None
        self._last = 0.0
        self._tiles = 0
        self._size: tuple[int, int] | None = None

    @property
    def seen(self) -> int:
        """Frames read so far."""
        return self.store.count

    @property
    def time(self) -> float:
        """Seconds from the first frame to the last one."""
        return self._last

    @torch.inference_mode()
    def add(self, image: Image, time: float) -> None:
        """Read the next frame.

        Args:
            image: the frame.
            time: when it is, in seconds, not before the frame in front of it.

        Raises:
            DataError: the time falls or lies behind the horizon, or, where frames have several tiles, the frame has
                another size.
        """
        config = self.chat.config
        first = time if self._first is None else self._first
        since = time - first
        if not since >= self._last:
            raise DataError(
                f"a frame at {time:g} s after one at {first + self._last:g} s: give frames in order of time"
            )
        if config.temporal.time == "relative" and since > (self.horizon or 0.0) * (1 + 1e-6):
            raise DataError(
                f"a frame {since:g} s after the first lies behind the stream's horizon of {self.horizon:g} s: give a "
                "longer one"
            )
        if config.frame_tiles > 1 and self._size not in (None, image.size):
            (width, height), (wide, high) = self._size, image.size  # type: ignore[misc]
            raise DataError(
                f"a frame of {wide}x{high} pixels in a video of {width}x{height}: they cannot share one tiling"
            )
        tiles_N3SS = self.chat.spec.tiles.tile(image, config.frame_tiles)
        when = video_times([0.0, since], config, horizon=self.horizon)[1]
        embedder = self.chat.model.embedder
        weight = self._vision.patch_embedding.weight
        pixels = normalize(tiles_N3SS.to(weight.device), config.tiles, dtype=weight.dtype)
        times_N = torch.full((len(tiles_N3SS),), when, dtype=torch.float64)
        trunk = self._vision.trunk(pixels)
        features = self._vision.step(trunk, times_N, self._past, config.select_layer)
        tokens_NKC = embedder.compressed(features, times_N)  # type: ignore[operator]
        self._first, self._last = first, since
        self._tiles, self._size = len(tiles_N3SS), image.size
        self.store.add(tokens_NKC.flatten(0, 1), since)

    def inputs(self, question: str) -> ModelInputs:
        """What the model reads for a question: the chosen frames, then the question.

        Raises:
            UsageError: no frame was read yet.
            ContextOverflowError: the frames do not fit.
        """
        if not self.seen:
            raise UsageError("no frame was read yet: add one before you ask")
        numbers = self.store.choice()
        spec = self.chat.spec
        # Laid out with pictures of a pixel: their rows are encoded already.
        blank = _blanks(len(numbers))
        rows = replace(
            spec,
            tiles=replace(spec.tiles, image_size=1, dynamic=False, thumbnail=False),
            tokens_per_tile=self._tiles * spec.tokens_per_tile,
            frame_tiles=1,
        )
        content = [{"type": "video", "video": blank}, {"type": "text", "text": question}]
        laid = layout([{"role": "user", "content": content}], rows)
        spans = tuple(
            replace(span, media=ENCODED, first=n, key=f"{self._name} frame {number}", group=-1)
            for n, (span, number) in enumerate(zip(laid.spans, numbers, strict=True))
        )
        times = torch.tensor(self.store.times(numbers), dtype=torch.float64)
        encoded = MediaBatch(self.store.tokens(numbers), times)
        sequence: Sequence = replace(laid, spans=spans, media={ENCODED: encoded})
        side = spec.tiles.image_size
        return ModelInputs(sequence.ids_T, torch.zeros(0, 3, side, side, dtype=torch.uint8), sequence)

    def stream(self, question: str, **options: Any) -> Generator[str, None, Reply]:
        """The answer about what was seen so far, piece by piece; options and errors as of `ChatModel.stream`."""
        return self.chat.answer(self.inputs(question), **options)

    def ask(self, question: str, **options: Any) -> Reply:
        """The answer about what was seen so far."""
        pieces = self.stream(question, **options)
        while True:
            try:
                next(pieces)
            except StopIteration as end:  # a generator's return value travels in here
                return end.value

    @property
    def bytes(self) -> int:
        """Memory of what is remembered: keys and values over time, tokens of frames."""
        return self.store.bytes + sum(past.bytes for past in self._past.layers)


def _blanks(count: int) -> Frames:
    """So many frames of one pixel."""
    from PIL import Image as Pictures

    pixel = Pictures.new("RGB", (1, 1))
    return Frames(images=(pixel,) * count, times=tuple(map(float, range(count))), name="stream", total=count)
