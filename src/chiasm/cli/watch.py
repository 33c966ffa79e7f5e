"""``chiasm chat --stream-video FILE``: read a video frame by frame and answer while it is being read.

When a question is asked: a question on the command line every so many seconds of the video (``--every``) and at its
end; lines of stdin that begin with ``@SECONDS`` as soon as that much was seen, other lines of a pipe at the end; lines
typed at a terminal as soon as they are there. With ``--realtime`` a frame is read no sooner than it would be shown.
"""

from __future__ import annotations

import json
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from chiasm.cli.terminal import note, plain_text
from chiasm.errors import UsageError

if TYPE_CHECKING:
    from chiasm.model.chat import ChatModel

__all__ = ["Timed", "timed_questions", "watch"]

Timed = tuple[float, str]
"""(seconds of the video after which it is asked, question)."""

_AT = re.compile(r"@([0-9]+(?:\.[0-9]*)?)\s+(.+)")


def timed_questions(lines: Iterator[str]) -> list[Timed]:
    """Questions of a pipe in the order in which they are asked; those without ``@SECONDS`` come at the end."""
    found = []
    for line in lines:
        text = line.strip()
        if not text:
            continue
        match = _AT.fullmatch(text)
        found.append((float(match[1]), match[2]) if match else (float("inf"), text))
    return sorted(found, key=lambda one: one[0])


def watch(
    model: ChatModel,
    file: str,
    question: str | None,
    options: dict[str, Any],
    *,
    every: float | None,
    fps: float,
    frames: int | None,
    clip: tuple[float, float] | None,
    realtime: bool,
    as_json: bool,
) -> None:
    """Read a video and answer; what is printed says how far it had been read.

    Args:
        model: must be able to (`watch`).
        file: video file, folder, animation or URL. question: asked as the module's first lines say.
        options: of the answers.
        every: seconds between two times that ``question`` is asked; None: at the end only.
        fps: frames a second that are read. frames: most that the language model sees.
        clip: the part of the video.
        realtime: read no faster than it would be shown.
        as_json: one object a line.

    Raises:
        UsageError: the model cannot read a video while it comes, or nothing is asked.
    """
    from chiasm.media.frames import FrameSampling
    from chiasm.media.video import open_video

    begin = getattr(model, "watch", None)
    if begin is None:
        raise UsageError(
            f"{model.name} reads a video as a whole: --stream-video needs a PVC (chiasm convert SRC DST --to pvc)"
        )
    if every is not None and not every > 0:
        raise UsageError(f"--every {every:g}: give seconds above 0")
    asked = _Asked(question, every)
    with open_video(file) as video:
        plan = video.plan(FrameSampling(mode="fps", fps=fps, max_frames=max(1, len(video)), clip=clip))
        length = video.times[plan[-1]] - video.times[plan[0]]
        given = {} if frames is None else {"frames": frames}
        stream = begin(horizon=length, **given)

        def answer(text: str) -> None:
            _answer(stream, text, options, as_json=as_json)

        started = time.monotonic()
        for image, when in video.each(plan):
            since = when - video.times[plan[0]]
            asked.due(since, answer, seen=stream.seen)
            if realtime:
                time.sleep(max(0.0, started + since - time.monotonic()))
            stream.add(image, when)
        asked.rest(answer)
        note(f"{video.name}: {stream.seen} frames read, {stream.time:.2f} of {video.duration:.2f} seconds")


class _Asked:
    """Which questions are due: of the command line, of a pipe, or typed."""

    def __init__(self, question: str | None, every: float | None) -> None:
        self._question, self._every = question, every
        self._next = every
        self._timed: list[Timed] = []
        self._typed: queue.Queue[str | None] | None = None
        if question is not None:
            return
        if every is not None:
            raise UsageError("--every repeats a question: give one as the last word")
        if sys.stdin.isatty():
            self._typed = queue.Queue()
            threading.Thread(target=_type, args=(self._typed,), daemon=True).start()
            note("questions are answered as soon as they are typed")
            return
        self._timed = timed_questions(iter(sys.stdin))
        if not self._timed:
            raise UsageError("no question: give it as the last word, or lines on stdin (@SECONDS QUESTION)")

    def due(self, since: float, answer: Callable[[str], None], *, seen: int) -> None:
        """Ask what comes before the frame at `since` seconds."""
        while seen and self._next is not None and self._next < since:
            assert self._question is not None
            assert self._every is not None
            answer(self._question)
            while self._next < since:  # once, however long the video showed nothing new
                self._next += self._every
        while seen and self._timed and self._timed[0][0] < since:
            answer(self._timed.pop(0)[1])
        while seen and self._typed is not None and not self._typed.empty():
            line = self._typed.get()
            if line is None:
                self._typed = None
            else:
                answer(line)

    def rest(self, answer: Callable[[str], None]) -> None:
        """Ask what is left when the video has ended."""
        for _, text in self._timed:
            answer(text)
        if self._question is not None:
            answer(self._question)
        if self._typed is not None:
            note("the video has ended: ask on, or end with Ctrl-D")
            while (line := self._typed.get()) is not None:
                answer(line)


def _type(typed: queue.Queue[str | None]) -> None:
    for line in sys.stdin:
        if line.strip():
            typed.put(line.strip())
    typed.put(None)


def _answer(stream: Any, question: str, options: dict[str, Any], *, as_json: bool) -> None:
    reply = stream.ask(question, **options)
    if as_json:
        said = {"time": round(stream.time, 3), "seen": stream.seen, "question": question, **reply.to_dict()}
        print(json.dumps(said, ensure_ascii=False), flush=True)
        return
    text = plain_text(reply.text) if sys.stdout.isatty() else reply.text
    print(f"[{stream.time:.1f} s] {text}", flush=True)
