"""The demo: its list, the table, and the contact sheet."""

from __future__ import annotations

import html.parser
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from tests.cli.conftest import Run, read_lines

from chiasm.cli.demo import Answered, answer_clip, is_right, read_picture, read_questions, summary
from chiasm.cli.sheet import contact_sheet, score_rows
from chiasm.errors import DataError
from chiasm.worlds.counting import pairs_of
from chiasm.worlds.words import word_split


def test_the_list_is_held_out_and_free_to_ship() -> None:
    questions = read_questions()
    held_out = [q for q in questions if not q.out_of_domain]
    assert len(held_out) >= 8
    assert len(questions) - len(held_out) == 2
    assert {q.family for q in held_out} == {"words", "counting", "fashion"}
    for question in questions:
        assert question.source
        assert question.licence
        assert "cifar" not in question.key
        with Image.open(io.BytesIO(read_picture(question))) as image:
            image.load()
            assert max(image.size) <= 256
    assert all("/test/" in q.key for q in held_out)
    assert all(word_split(q.expected) == "test" for q in held_out if q.family == "words")
    assert sum(len(read_picture(q)) for q in questions) < 400_000


def test_drawn_pictures_are_the_worlds_own() -> None:
    import numpy as np

    from chiasm.worlds import open_world

    assert pairs_of("test")
    world = open_world("counting", "test", seed=0)
    for question in read_questions():
        if question.family != "counting":
            continue
        sample = world.sample(int(question.key.rsplit("/", 1)[1]))
        with Image.open(io.BytesIO(read_picture(question))) as image:
            assert np.array_equal(np.asarray(image), sample.image)
        assert (question.question, question.expected) == (sample.question, sample.answer)


def answered(right: tuple[bool, ...] = ()) -> list[Answered]:
    questions = read_questions()
    verdicts = right or tuple(n % 2 == 0 for n in range(len(questions)))
    return [
        Answered(question=q, answer=q.expected if ok else "<b>&nonsense", right=ok, seconds=0.1)
        for q, ok in zip(questions, verdicts, strict=True)
    ]


def test_right_is_what_the_evaluation_calls_right() -> None:
    count = next(q for q in read_questions() if q.expected == "three")
    word = next(q for q in read_questions() if q.expected == "lynx")
    assert is_right("Three.", count)
    assert is_right("3", count)
    assert not is_right("four", count)
    assert is_right(" Lynx ", word)
    assert not is_right("lynxes", word)
    assert not is_right("", word)


def test_held_out_and_other_pictures_are_counted_apart() -> None:
    assert summary(answered()) == "held-out pictures: 5 of 9 right; out of domain: 1 of 2 right"


def test_the_demo_in_the_terminal(run: Run, tiny: Path, tmp_path: Path) -> None:
    page = tmp_path / "demo.html"
    ran = run("demo", "--model", tiny, "--html", page)
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert len(lines) == 1 + len(read_questions()) + 3
    assert lines[-1].startswith("not counted, zoom into fashion-0.png, 8 frames: ")
    assert lines[-2] == "held-out pictures: 0 of 9 right; out of domain: 0 of 2 right"
    assert sum(line.endswith("out of domain") for line in lines) == 2
    assert str(page) in ran.err
    assert page.read_text(encoding="utf-8").count("<figure") == len(read_questions())
    rows = read_lines(run("demo", "--model", tiny, "--json", "--no-html").out)
    *rows, film = rows
    assert [row["picture"] for row in rows] == [q.picture for q in read_questions()]
    assert (film["picture"], film["frames"], film["out_of_domain"]) == ("zoom into fashion-0.png", 8, True)
    assert {"answer", "right", "seconds", "licence", "out_of_domain"} <= set(rows[0])


def test_the_page_goes_where_it_can(run: Run, tiny: Path, tmp_path: Path) -> None:
    assert "no folder" in run("demo", "--model", tiny, "--html", tmp_path / "no" / "x.html").error_line
    ran = run("demo", "--model", tiny, "--html", tmp_path)
    assert ran.code == 2


class Page(html.parser.HTMLParser):
    """Collects what a page refers to, and checks that its tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        self.images += tag == "img"
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


RESULTS = {
    "families": {
        "words": {
            "score": {"n": 1000, "accuracy": 0.5, "interval": [0.469, 0.531]},
            "controls": {"majority": {"accuracy": 0.01}, "blank": {"accuracy": 0.0}},
        },
        "fashion": {
            "score": {"n": 2000, "accuracy": 0.85, "interval": [0.83, 0.87]},
            "controls": {"majority": {"accuracy": 0.1}, "pixels": {"accuracy": 0.826}},
        },
    }
}


def test_the_page_stands_alone() -> None:
    answers = answered()
    pictures = [read_picture(a.question) for a in answers]
    page = Page()
    text = contact_sheet("<model>", answers, pictures, RESULTS)
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.images == len(answers)
    assert all(link.startswith("data:image/") for link in page.links)
    assert "&lt;b&gt;&amp;nonsense" in text
    assert "<b>&nonsense" not in text
    assert "&lt;model&gt;" in text
    assert text.count('class="badge"') == 2
    assert "<td><b>50.0 (46.9 to 53.1)</b></td><td>1.0</td><td>0.0</td><td></td>" in text


@pytest.mark.parametrize(
    "results", [{}, {"families": {}}, {"families": {"a": {"score": 1}}}, {"families": 3}]
)
def test_a_page_without_scores(results: dict) -> None:
    assert score_rows(results) == []
    answers = answered()[:1]
    assert "<table" not in contact_sheet("m", answers, [read_picture(answers[0].question)], results)


def test_the_package_list_is_plain_json() -> None:
    from importlib.resources import files

    text = (files("chiasm") / "assets" / "demo" / "demo.json").read_text(encoding="utf-8")
    assert json.loads(text)["version"] == 1


@pytest.mark.parametrize("name", ["chat", "batch"])
def test_examples_run(
    tiny: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import runpy
    import sys

    script = Path(__file__).resolve().parents[2] / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tiny)])
    runpy.run_path(str(script), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_a_list_without_clothes_is_one_line() -> None:
    others = [question for question in read_questions() if question.family != "fashion"]
    with pytest.raises(
        DataError, match=r"^the demo's list has no picture of clothes .*: install chiasm again$"
    ):
        answer_clip(None, others)  # type: ignore[arg-type]  # not asked


def test_the_clip_is_a_zoom_into_a_picture_of_the_list() -> None:
    from chiasm.cli.demo import CLIP_FRAMES, make_clip
    from chiasm.media.video import open_video

    picture = read_picture(next(q for q in read_questions() if q.family == "fashion"))
    with open_video(make_clip(picture)) as video, Image.open(io.BytesIO(picture)) as first:
        assert len(video) == CLIP_FRAMES
        assert video.duration == pytest.approx(1.2)
        frames = video.read([0, CLIP_FRAMES - 1])
        assert frames.images[0].tobytes() == first.convert("RGB").tobytes()
        assert frames.images[1].tobytes() != frames.images[0].tobytes()
