"""The conversation of ``chiasm chat`` without a question: one line a turn, everything said so far is remembered."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Any

from chiasm.cli.chat import checked_question, tell
from chiasm.cli.shown import close_videos, message, open_media, take_frames
from chiasm.cli.terminal import fail, note, paint
from chiasm.errors import ChiasmError

if TYPE_CHECKING:
    from PIL.Image import Image

    from chiasm.media.frames import Frames
    from chiasm.model.chat import ChatModel

__all__ = ["converse"]

HELP = "/image FILE or /video FILE is shown with the next question; /reset forgets everything; /quit or Ctrl-D ends"


def converse(
    model: ChatModel,
    pictures: list[Image | Frames],
    options: dict[str, Any],
    *,
    as_json: bool,
    flowing: bool,
    sampling: dict[str, Any] | None = None,
) -> None:
    """Read questions from the terminal and answer them until /quit or the end of input.

    A turn that fails is reported and forgotten; Ctrl-C ends an answer, not the conversation.
    """
    _line_editing()
    print(paint(f"{model.name}. {HELP}.", "dim", stream=sys.stderr), file=sys.stderr)
    said: list[dict[str, Any]] = []
    shown = list(pictures)
    while True:
        try:
            line = _ask()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            note("/quit or Ctrl-D ends the conversation")
            continue
        if line.startswith("/"):
            command, _, rest = line.partition(" ")
            if command in ("/quit", "/exit"):
                return
            _obey(command, rest.strip(), model, said, shown, sampling or {})
        elif line:
            _turn(model, line, said, shown, options, as_json=as_json, flowing=flowing)


def _ask() -> str:
    prompt = "> "
    if not sys.stdout.isatty():  # the prompt is no part of the result
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    return input(prompt).strip()


def _obey(
    command: str,
    rest: str,
    model: ChatModel,
    said: list[dict[str, Any]],
    shown: list[Image | Frames],
    sampling: dict[str, Any],
) -> None:
    if command == "/reset":
        said.clear()
        shown.clear()
        note("everything is forgotten")
    elif command in ("/image", "/video") and rest:
        from chiasm.media.frames import Frames

        # Either word takes both, as a file says itself what it is; only an animated picture may be either.
        opened: list[Any] = []
        try:
            opened += open_media(
                _file_names(rest), orient=model.spec.tiles.orient, animations=command == "/video"
            )
            shown += take_frames(opened, model, sampling, before=shown)
        except ChiasmError as error:
            fail(str(error))
            return
        finally:
            close_videos(opened)
        films = sum(isinstance(medium, Frames) for medium in shown)
        counted = [f"{len(shown) - films} picture(s)"] * (len(shown) > films) + [f"{films} video(s)"] * (
            films > 0
        )
        note(f"{' and '.join(counted)} will be shown with the next question")
    else:
        note(HELP)


def _file_names(rest: str) -> list[str]:
    """One name, blanks and all, or several in the shell's spelling."""
    from pathlib import Path

    if Path(rest).expanduser().exists():
        return [str(Path(rest).expanduser())]
    try:
        return [str(Path(word).expanduser()) for word in shlex.split(rest)]
    except ValueError:  # an apostrophe without its partner
        return [rest]


def _turn(
    model: ChatModel,
    line: str,
    said: list[dict[str, Any]],
    shown: list[Image | Frames],
    options: dict[str, Any],
    *,
    as_json: bool,
    flowing: bool,
) -> None:
    """Answer one line; on success both sides are remembered and the pictures are part of the conversation."""
    before = len(said)  # Ctrl-C may come before or after either side is noted down
    try:
        said.append(message(checked_question(line), shown))
        reply = tell(model, said, options, as_json=as_json, flowing=flowing)
        said.append({"role": "assistant", "content": reply.text})
    except ChiasmError as error:
        del said[before:]
        fail(str(error))
        if shown:
            note("the pictures wait for the next question; /reset takes them away")
        return
    except KeyboardInterrupt:
        del said[before:]
        print(file=sys.stderr)
        note("stopped; this question is forgotten")
        return
    shown.clear()


def _line_editing() -> None:
    try:
        import readline  # noqa: F401  (input() uses it once it is there)
    except ImportError:  # not on every system
        return
