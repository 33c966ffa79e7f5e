"""What ``chiasm chat`` shows a model: pictures and videos, opened before the model is loaded.

What is wrong with a file is then known at once, and a pipe is read once. Which frames of a video are taken depends on
the model (its template names the formula), so videos stay open until it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from chiasm.cli.terminal import note
from chiasm.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.media.frames import Frames
    from chiasm.media.video import Video
    from chiasm.model.chat import ChatModel

__all__ = ["close_videos", "message", "open_media", "parse_clip", "sampling_fields", "take_frames"]


def sampling_fields(
    *, frames: int | None, mode: str | None, fps: float | None, clip: str | None, seed: int
) -> dict[str, Any]:
    """The options as fields of a frame sampling, checked; only those that were given.

    Raises:
        UsageError: options that contradict each other.
        ConfigError: a value that cannot be.
    """
    from chiasm.media.frames import FrameSampling

    given: dict[str, Any] = {}
    if fps is not None:
        if mode not in (None, "fps"):
            raise UsageError(f"--fps does not go with --sampling {mode}: leave one of them out")
        given["fps"], mode = fps, "fps"
    if mode is not None:
        given["mode"] = mode
    if frames is not None:
        given["max_frames" if mode == "fps" else "frames"] = frames
    if clip is not None:
        given["clip"] = parse_clip(clip)
    if given:
        given["seed"] = seed
    _ = FrameSampling(**given)
    return given


def parse_clip(text: str) -> tuple[float, float]:
    """``START:END`` in seconds; UsageError for anything else."""
    start, colon, end = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return float(start), float(end)
    except ValueError:
        raise UsageError(f"--clip {text}: write START:END in seconds, for instance 2:8 or 0.5:3") from None


def open_media(words: list[str], *, orient: bool = True, animations: bool = False) -> list[Image | Video]:
    """Open all pictures and videos (files, folders, URLs).

    Args:
        words: as the user wrote them.
        orient: turn pictures upright by EXIF; must be what the model's tile policy says.
        animations: animated pictures are videos; otherwise their first frame is shown, and said so.
    """
    from chiasm.media.image import open_image
    from chiasm.media.video import is_video, open_video

    opened: list[Image | Video] = []
    try:
        for word in words:
            opened.append(
                open_video(word) if is_video(word, animations=animations) else open_image(word, orient=orient)
            )
    except BaseException:
        close_videos(opened)
        raise
    return opened


def close_videos(opened: list[Any]) -> None:
    """Close what `open_media` has opened."""
    from chiasm.media.video import Video

    for medium in opened:
        if isinstance(medium, Video):
            medium.close()


def take_frames(
    opened: list[Image | Video],
    model: ChatModel,
    fields: dict[str, Any],
    *,
    question: str = "",
    before: Sequence[Image | Frames] = (),
) -> list[Image | Frames]:
    """Pictures as they are, videos as the frames that the options and the model's own rules take.

    Args:
        opened: what `open_media` has opened.
        model: whose rules they are.
        fields: of a frame sampling, as given.
        question: what will be asked, as far as it is known.
        before: what will be shown with it besides.

    Raises:
        ContextOverflowError: more frames than the model's context holds; none has been decoded then.
        ImageError: a frame cannot be decoded.
    """
    from chiasm.data.layout import check_length
    from chiasm.data.message import Part
    from chiasm.media.frames import Frames
    from chiasm.media.video import Video

    plans = {
        n: medium.plan(model.spec.frame_sampling(Part("video", medium.name, fields)))
        for n, medium in enumerate(opened)
        if isinstance(medium, Video)
    }
    if plans:
        spec = model.spec
        counts: list[Any] = [
            spec.shot(len(frames), frames.images[0].size) for frames in before if isinstance(frames, Frames)
        ]
        counts += [
            (len(plan), 1) if spec.frame_tiles == 1 else spec.shot(len(plan), opened[n].size)
            for n, plan in plans.items()
        ]
        check_length(message(question, [*before, *opened]), model.spec, frames=counts)
    taken: list[Image | Frames] = []
    for n, medium in enumerate(opened):
        if not isinstance(medium, Video):
            taken.append(medium)
            continue
        with medium:
            frames = medium.read(plans[n])
        note(
            f"{frames.name}: {len(frames)} of {frames.total} frames, "
            f"{frames.times[0]:.2f} to {frames.times[-1]:.2f} of {frames.duration:.2f} seconds"
        )
        taken.append(frames)
    return taken


def message(question: str, shown: Sequence[Image | Frames | Video]) -> dict[str, Any]:
    """A user's message: what is shown, then the question."""
    from PIL.Image import Image

    parts: list[dict[str, Any]] = []
    for medium in shown:
        kind = "image" if isinstance(medium, Image) else "video"
        parts.append({"type": kind, kind: medium})
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
