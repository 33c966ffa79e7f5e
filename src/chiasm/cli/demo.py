"""``chiasm demo``: a model answers a fixed list of questions about pictures it has never seen.

The list is in the package (``assets/demo/demo.json``) and was fixed before the bundled model was trained: pictures of
the test splits, and photographs that are marked as out of domain and counted apart. Right is what
``chiasm eval`` counts as right.

Last comes one video, which is no part of the list or of its counts: a slow zoom into the list's first picture of
clothes, made while the demo runs. The bundled model was trained on single pictures and has never seen a video.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiasm.cli.terminal import note, one_line, paint, waiting
from chiasm.errors import DataError, UsageError

if TYPE_CHECKING:
    from chiasm.model.chat import ChatModel

__all__ = [
    "Answered",
    "Question",
    "answer_all",
    "answer_clip",
    "demo_command",
    "is_right",
    "make_clip",
    "read_questions",
    "summary",
]

MAX_NEW_TOKENS = 16
CLIP_FRAMES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One entry of the list.

    Attributes:
        picture: file name beside the list. family: the world it is from, or "photograph".
        question, expected: what is asked and what is right.
        out_of_domain: far from what the bundled model has learned; counted apart.
        key: identifies the picture at its source. source, licence: where it is from and what it may be used for.
    """

    picture: str
    family: str
    question: str
    expected: str
    out_of_domain: bool
    key: str
    source: str
    licence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A question with the model's answer and the seconds it took."""

    question: Question
    answer: str
    right: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``--json`` prints it."""
        own = {"answer": self.answer, "right": self.right, "seconds": round(self.seconds, 3)}
        return dataclasses.asdict(self.question) | own


def demo_command(
    html: Annotated[Path, typer.Option(metavar="FILE", help="Where the contact sheet goes.")] = Path(
        "demo.html"
    ),
    no_html: Annotated[bool, typer.Option("--no-html", help="Write no contact sheet.")] = False,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Who answers: a name or a folder.")
    ] = "chiasm-mini",
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps; default: an NVIDIA GPU if there is one."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as one line of JSON.")] = False,
) -> None:
    """Answer a fixed list of questions about pictures and a clip.

    Prints what was expected and what was answered, right or wrong, and writes the same with the pictures to a page
    that needs no other file.
    """
    if not no_html and not html.parent.is_dir():
        raise UsageError(f"--html {html}: there is no folder {html.parent}")
    questions = read_questions()
    start = time.perf_counter()
    from chiasm.hub import load

    with waiting(f"loading {model}"):
        chosen = load(model, device=device)
    loaded = time.perf_counter() - start
    answers: list[Answered] = []
    for answered in answer_all(chosen, questions):
        if as_json:
            print(json.dumps(answered.to_dict(), ensure_ascii=False), flush=True)
        else:
            _print_row(answered, questions, first=not answers)
        answers.append(answered)
    film, frames = answer_clip(chosen, questions)
    if as_json:
        print(json.dumps(film.to_dict() | {"frames": frames}, ensure_ascii=False), flush=True)
    else:
        print("\n" + summary(answers))
        verdict = "right" if film.right else f"expected {film.question.expected}"
        print(f"not counted, {film.question.picture}, {frames} frames: {one_line(film.answer)} ({verdict})")
    seconds = sum(answered.seconds for answered in answers)
    note(f"{chosen.name} was loaded in {loaded:.1f} s and answered in {seconds:.1f} s")
    if not no_html:
        _write_sheet(html, chosen.name, answers, _results_of(model))
        note(f"the pictures with the answers are in {html}")


def read_questions() -> list[Question]:
    """The list of the package.

    Raises:
        DataError: it is not whole.
    """
    try:
        text = (files("chiasm") / "assets" / "demo" / "demo.json").read_text(encoding="utf-8")
        return [Question(**entry) for entry in json.loads(text)["pictures"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the demo's list cannot be read ({one_line(str(error))}): install chiasm again"
        ) from error


def read_picture(question: Question) -> bytes:
    """The picture's file; DataError if it is not there."""
    try:
        return (files("chiasm") / "assets" / "demo" / question.picture).read_bytes()
    except OSError as error:
        raise DataError(f"{question.picture} of the demo is missing: install chiasm again") from error


def answer_all(model: ChatModel, questions: list[Question]) -> Iterator[Answered]:
    """Ask one question after the other; greedy, so the answers are the same every time."""
    for question in questions:
        start = time.perf_counter()
        reply = model.chat(question.question, [read_picture(question)], max_new_tokens=MAX_NEW_TOKENS)
        yield Answered(
            question=question,
            answer=reply.text.strip(),
            right=is_right(reply.text, question),
            seconds=time.perf_counter() - start,
        )


def make_clip(picture: bytes) -> bytes:
    """A video of 1.2 seconds that slowly zooms into a picture: an animated WebP, lossless."""
    from PIL import Image

    from chiasm.media.image import open_image

    image = open_image(picture)
    frames = []
    for n in range(CLIP_FRAMES):
        x, y = image.width * n / 100, image.height * n / 100
        box = (x, y, image.width - x, image.height - y)
        frames.append(image.resize(image.size, Image.Resampling.BICUBIC, box=box))
    out = io.BytesIO()
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    return out.getvalue()


def answer_clip(model: ChatModel, questions: list[Question]) -> tuple[Answered, int]:
    """Ask about the demo's video; its answer, and how many frames the model was shown.

    Raises:
        DataError: the list has no picture of clothes to make it of.
    """
    first = next((question for question in questions if question.family == "fashion"), None)
    if first is None:
        raise DataError("the demo's list has no picture of clothes to make a video of: install chiasm again")
    question = dataclasses.replace(first, picture=f"zoom into {first.picture}", out_of_domain=True)
    start = time.perf_counter()
    shown = {"type": "video", "video": make_clip(read_picture(first))}
    asked = [{"role": "user", "content": [shown, {"type": "text", "text": question.question}]}]
    reply = model.chat(asked, max_new_tokens=MAX_NEW_TOKENS)
    answered = Answered(
        question=question,
        answer=reply.text.strip(),
        right=is_right(reply.text, question),
        seconds=time.perf_counter() - start,
    )
    return answered, reply.usage["frames"]


def is_right(answer: str, question: Question) -> bool:
    """Whether the answer is the expected one, by the rule of ``chiasm eval``."""
    from chiasm.eval.metrics import exact_match

    return exact_match(answer, question.expected, numbers=question.family == "counting")


def summary(answers: list[Answered]) -> str:
    """One line: how many are right, held-out pictures and others apart."""
    said = []
    for title, out in (("held-out pictures", False), ("out of domain", True)):
        group = [answered for answered in answers if answered.question.out_of_domain is out]
        if group:
            said.append(f"{title}: {sum(answered.right for answered in group)} of {len(group)} right")
    return "; ".join(said)


def _print_row(answered: Answered, questions: list[Question], *, first: bool) -> None:
    """One line of the table; the header comes with the first."""
    widths = [
        max(len(title), *(len(getattr(question, name)) for question in questions))
        for title, name in (("picture", "picture"), ("question", "question"), ("expected", "expected"))
    ]
    cells = "  ".join(f"{{:{width}}}" for width in widths).format
    if first:
        print(paint("   " + cells("picture", "question", "expected") + "  answer", "bold"))
    mark = paint("✓", "green") if answered.right else paint("✗", "red")
    question = answered.question
    shown = one_line(answered.answer)
    shown = shown if len(shown) <= 60 else shown[:59] + "…"
    line = (
        cells(question.picture, question.question, question.expected)
        + "  "
        + paint(f"{shown or '(nothing)':12}", "green" if answered.right else "red")
    )
    badge = paint("  out of domain", "yellow") if question.out_of_domain else ""
    line = line if badge else line.rstrip()
    print(f" {mark} {line}{badge}", flush=True)


def _results_of(model: str) -> dict[str, Any]:
    """The evaluation that a model's card was written from (``results.json`` beside its weights); {} without one."""
    if model == "chiasm-mini":
        with as_file(files("chiasm") / "assets" / "chiasm_mini") as folder:
            return _results_of(str(folder))
    try:
        results = json.loads((Path(model) / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) else {}


def _write_sheet(file: Path, name: str, answers: list[Answered], results: dict[str, Any]) -> None:
    from chiasm.cli.sheet import contact_sheet

    pictures = [read_picture(answered.question) for answered in answers]
    try:
        file.write_text(contact_sheet(name, answers, pictures, results), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--html {file}: cannot be written ({error.strerror or error})") from error
