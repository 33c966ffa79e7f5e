"""``chiasm chat [IMAGE | VIDEO ...] "question"``: ask about pictures and videos.

Which word is what: the last one is the question unless it names a file or, without white space, ends like the name of
a picture or video; all before it are pictures, videos and folders of frames. So a mistyped ``phoot.jpg`` is a missing
file, and "What is in photo.jpg" a question. A folder as the last word is one if it is written with a slash at its end.
"""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiasm.cli.shown import close_videos, message, open_media, parse_clip, sampling_fields, take_frames
from chiasm.cli.terminal import note, plain_text, waiting
from chiasm.errors import DataError, ImageError, UsageError

if TYPE_CHECKING:
    from chiasm.model.chat import ChatModel, Reply

__all__ = [
    "IMAGE_SUFFIXES",
    "SamplingWord",
    "TileMode",
    "chat_command",
    "load_model",
    "split_words",
    "tell",
]

IMAGE_SUFFIXES = frozenset(
    [
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".bmp", ".dib", ".tif"),
        *(".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".ico", ".tga", ".pcx", ".sgi"),
        *(".qoi", ".heic", ".heif", ".svg"),
    ]
)
"""Endings by which a word is taken for a picture, readable or not."""


class TileMode(StrEnum):
    """The modes of `chiasm.media.tiles`, whose import would be paid for by every command's help."""

    CHIASM = "chiasm"
    ORIGINAL = "original"
    HF = "hf"


class SamplingWord(StrEnum):
    """The modes of `chiasm.media.frames`, likewise."""

    MIDDLE = "middle"
    RAND = "rand"
    FPS = "fps"


def chat_command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE_VIDEO_OR_QUESTION",
            help="Pictures and videos (files, URLs, folders of frames), then the question; without one it is read "
            "from stdin, or asked for at a terminal.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="A name of chiasm list, a folder, or OWNER/NAME of a model hub (extra hub), downloaded once.",
        ),
    ] = "chiasm-mini",
    revision: Annotated[
        str | None,
        typer.Option(metavar="REV", help="Branch, tag or commit on the hub; OWNER/NAME@REV is the same."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as one line of JSON.")] = False,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Print the answer as it comes (default: at a terminal)."),
    ] = None,
    draw: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the picture with the answer's boxes drawn.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token always.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total share.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many likeliest tokens; 0: from all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes repetitions rarer.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling, of tokens and of frames.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text (repeatable).")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message; '' for none.")] = None,
    template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Chat template, see chiasm list.")
    ] = None,
    max_tiles: Annotated[int | None, typer.Option(help="Most tiles that pictures are cut into.")] = None,
    tile_mode: Annotated[
        TileMode | None,
        typer.Option(
            metavar="MODE",
            help="How pictures are cut: chiasm (default) turns them upright by EXIF first; original and hf take them "
            "as stored, like the released pipelines, and with hf each may have --max-tiles.",
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            help="Frames taken of each video (default 8); with --sampling fps the most that are (64)."
        ),
    ] = None,
    sampling: Annotated[
        SamplingWord | None,
        typer.Option(
            metavar="MODE",
            help="Which frames: middle (default) spreads them evenly, rand takes one at random of each of N stretches, "
            "fps takes so many a second.",
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="Frames a second (1 with --sampling fps, which this implies)."),
    ] = None,
    stream_video: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Answer while this video is being read, frame by frame (a PVC): --fps frames a second (1), of which "
            "at most --frames (48) are shown. Without a question, lines of stdin are: @SECONDS QUESTION.",
        ),
    ] = None,
    every: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="With --stream-video: ask the question so often, not only at the end."
        ),
    ] = None,
    realtime: Annotated[
        bool, typer.Option("--realtime", help="With --stream-video: read no faster than it would be shown.")
    ] = False,
    clip: Annotated[
        str | None, typer.Option(metavar="START:END", help="The part of each video in seconds, as 2:8.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="float32, bfloat16, float16; default: as stored.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="cpu, cuda, cuda:1, mps; default: an NVIDIA GPU if there is one. Several, as cuda:0,cuda:1 or auto, "
            "share a model that one cannot hold.",
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="Round weights for speed and memory: int8, int4, int4-128 or w8a8 for the language model, vision-w8a8 "
            "for the encoder; joined by +.",
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="torch (default), or openvino: graphs for the CPU (extra openvino), written once into the cache.",
        ),
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same bits whatever else is answered with it.")
    ] = False,
) -> None:
    """Ask a question about pictures and videos.

    chiasm chat photo.jpg "What is this?" prints the answer; chiasm chat clip.mp4 "What happens?" shows frames of a
    video. Several of both are fine, and a folder of pictures is a video. So is an animated GIF, WebP or PNG file,
    where an option about frames is given; otherwise its first frame is shown. Without a question, a conversation
    begins: /image FILE and /video FILE show something, /reset forgets everything, /quit ends. A PVC answers while it
    reads a video: chiasm chat --model FOLDER --stream-video clip.mp4 --every 5 "What happens?".
    """
    given, question = split_words(words or [])
    if stream_video is None and (every is not None or realtime):
        raise UsageError("--every and --realtime belong to --stream-video")
    if stream_video is not None and (given or draw is not None or sampling is not None or stream):
        raise UsageError(
            "--stream-video shows that video alone: leave out other pictures, --draw, --sampling and --stream"
        )
    interactive = question is None and sys.stdin.isatty()
    if question is None and not interactive and stream_video is None:
        question = read_question()
    _check_draw(draw, given, interactive)
    if stream and as_json:
        raise UsageError(
            "--stream and --json exclude each other: JSON is printed when the answer is complete"
        )
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    mode = None if tile_mode is None else tile_mode.value
    wanted: dict[str, Any] = {
        "revision": revision,
        "dtype": dtype,
        "device": device,
        "quantize": quantize,
        "backend": backend,
        "deterministic": deterministic,
        "system": system,
        "template": template,
        "max_tiles": max_tiles,
        "mode": mode,
    }
    if stream_video is not None:
        from chiasm.cli.watch import watch

        watch(
            load_model(model, options, **wanted),
            stream_video,
            question,
            options,
            every=every,
            fps=1.0 if fps is None else fps,
            frames=frames,
            clip=None if clip is None else parse_clip(clip),
            realtime=realtime,
            as_json=as_json,
        )
        return
    fields = sampling_fields(
        frames=frames, mode=None if sampling is None else sampling.value, fps=fps, clip=clip, seed=seed
    )
    # Known before the model is: a picture from a pipe cannot be opened a second time.
    opened = open_media(given, orient=mode in (None, "chiasm"), animations=bool(fields))
    try:
        _check_films(opened, fields, draw, interactive)
        chosen = load_model(model, options, **wanted)
        shown = take_frames(opened, chosen, fields, question=question or "")
    finally:
        close_videos(opened)
    flowing = not as_json and (sys.stdout.isatty() if stream is None else stream)
    if interactive:
        from chiasm.cli.repl import converse

        converse(chosen, shown, options, as_json=as_json, flowing=flowing, sampling=fields)
        return
    assert question is not None
    asked = [message(question, shown)] if shown else question
    reply = tell(chosen, asked, options, as_json=as_json, flowing=flowing)
    if draw is not None:
        _draw(draw, shown[0], reply)


def split_words(words: list[str]) -> tuple[list[str], str | None]:
    """Pictures or videos and question; the question is None when it is to be read from elsewhere.

    Raises:
        UsageError: a word before the last is neither a file nor looks like a picture or video; the question is empty.
        DataError: the question is not text in UTF-8.
    """
    if not words:
        return [], None
    *front, last = words
    question: str | None = None
    if last != "-" and _is_question(last):
        question = checked_question(last)
    pictures = front if last == "-" or question is not None else [*front, last]
    for word in pictures:
        if not _is_picture(word):
            raise UsageError(
                f"{word}: no such file; write pictures and videos first, then the question as one word in quotes"
            )
    return pictures, question


def _is_question(word: str) -> bool:
    """Whether the last word is the question: no file, and either white space in it or nothing like a picture's name.

    A folder's name is a question too (it may be any word), unless a slash at its end says what it is; pipes are files
    here.
    """
    try:
        path = Path(word)
        if path.exists() and (not path.is_dir() or word.endswith(("/", os.sep))):
            return False
    except (OSError, ValueError):  # too long or impossible for a name
        pass
    return any(c.isspace() for c in word) or not _looks_like_picture(word)


def _is_picture(word: str) -> bool:
    """Whether a word in front is meant as a picture or video: something that exists, a URL, or by its ending."""
    if _looks_like_picture(word):
        return True
    try:
        return Path(word).exists()
    except (OSError, ValueError):
        return False


def _looks_like_picture(word: str) -> bool:
    """Whether a word is a URL or ends like the name of a picture or video."""
    from chiasm.media.fetch import is_url
    from chiasm.media.video import VIDEO_SUFFIXES

    if is_url(word):
        return not any(c.isspace() for c in word)
    return Path(word).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES


def checked_question(text: str) -> str:
    """The question, if it is one; see `split_words` for the errors."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            "the question is not UTF-8 text: set a UTF-8 locale, or convert it with iconv"
        ) from None
    if not text.strip():
        raise UsageError("the question is empty: give it as the last word, in quotes")
    return text


def read_question() -> str:
    """The question from stdin, without its last line break.

    Raises:
        DataError: it is not UTF-8.
        UsageError: there is none.
    """
    raw = sys.stdin.buffer.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the question on stdin is not UTF-8 text (byte {error.start}): convert it, for instance with iconv"
        ) from None
    if not text.strip():
        raise UsageError("no question: give it as the last word, in quotes, or on stdin")
    return text.removesuffix("\n").removesuffix("\r")


def load_model(name: str, options: dict[str, Any], **given: Any) -> ChatModel:
    """Load a model by name, folder or id; the options of its answers are checked before that."""
    with waiting(f"loading {name}"):
        from chiasm.hub import load
        from chiasm.model.chat import Options

        _ = Options(**options).sampling
        return load(name, **{key: value for key, value in given.items() if value is not None})


def tell(
    model: ChatModel,
    messages: Any,
    options: dict[str, Any],
    *,
    as_json: bool,
    flowing: bool,
) -> Reply:
    """Print the answer to stdout, whole or as it comes, and return it."""
    if flowing:
        safe = sys.stdout.isatty()
        pieces = model.stream(messages, **options)
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:  # a generator's return value travels in here
                reply = end.value
                break
            print(plain_text(piece) if safe else piece, end="", flush=True)
        print(flush=True)
    else:
        reply = model.chat(messages, **options)
        if as_json:
            print(json.dumps(reply.to_dict(), ensure_ascii=False), flush=True)
            return reply
        print(plain_text(reply.text) if sys.stdout.isatty() else reply.text, flush=True)
    if reply.finish == "length":
        note(f"the answer was cut after {len(reply.token_ids)} tokens: see --max-new-tokens")
    return reply


def _check_draw(draw: Path | None, given: list[str], interactive: bool) -> None:
    """Everything about --draw that can be known before the model runs."""
    if draw is None:
        return
    if interactive or len(given) != 1:
        raise UsageError("--draw needs one picture and a question")
    from PIL import Image

    suffix = draw.suffix.lower()
    Image.init()
    if Image.EXTENSION.get(suffix) not in Image.SAVE:
        raise UsageError(f"--draw {draw}: {suffix or 'no ending'} is no picture format: use .png or .jpg")
    if not draw.parent.is_dir():
        raise UsageError(f"--draw {draw}: there is no folder {draw.parent}")


def _check_films(opened: list[Any], fields: dict[str, Any], draw: Path | None, interactive: bool) -> None:
    """Everything about videos that can be known before the model runs."""
    from chiasm.media.frames import FrameSampling
    from chiasm.media.video import Video

    videos = [medium for medium in opened if isinstance(medium, Video)]
    if draw is not None and videos:
        raise UsageError("--draw needs one picture and a question")
    if fields and not videos and not interactive:
        raise UsageError(
            "--frames, --sampling, --fps and --clip are for videos: name one, a folder or an animation"
        )
    for video in videos:
        video.plan(FrameSampling(**fields))


def _draw(file: Path, picture: Any, reply: Reply) -> None:
    from chiasm.media.boxes import draw_boxes

    try:
        draw_boxes(picture, reply.boxes).save(file)
    except (OSError, ValueError) as error:
        raise ImageError(f"{file}: cannot be written ({error})") from error
    if not reply.boxes:
        note(f"the answer names no boxes; {file} is the picture as it was")
