"""chiasm chat: what reaches stdout, options, drawing, and the conversation at a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from tests.cli.conftest import Run, read_lines, write_internvl

import chiasm
from chiasm.cli import chat as chat_module
from chiasm.cli.chat import split_words
from chiasm.errors import UsageError
from chiasm.media.boxes import parse_boxes
from chiasm.media.tiles import Mode
from chiasm.model.chat import Reply

ASK = "What is this?"
SHORT = ("--max-new-tokens", 6)


def test_the_answer_alone_is_on_stdout(run: Run, tiny: Path, picture: Path) -> None:
    expected = chiasm.load(tiny).chat(ASK, [picture], max_new_tokens=6)
    plain = run("chat", picture, ASK, "--model", tiny, *SHORT)
    assert plain.code == 0
    assert plain.out == expected.text + "\n"
    assert plain.err == "note: the answer was cut after 6 tokens: see --max-new-tokens\n"
    streamed = run("chat", picture, ASK, "--model", tiny, "--stream", *SHORT)
    assert (streamed.out, streamed.err) == (plain.out, plain.err)
    (reply,) = read_lines(run("chat", picture, ASK, "--model", tiny, "--json", *SHORT).out)
    assert reply == expected.to_dict()


def test_pictures_stand_where_the_question_has_their_tags(run: Run, tiny: Path, picture: Path) -> None:
    image = {"type": "image", "image": str(picture)}
    model = chiasm.load(tiny, max_tiles=1)
    tagged = [
        {"role": "user", "content": [image, image, {"type": "text", "text": "Is <image> like <image>?"}]}
    ]
    expected = model.chat(tagged, max_new_tokens=6)
    assert model.chat("Is <image> like <image>?", [picture, picture], max_new_tokens=6) == expected
    words = ("chat", picture, picture, "Is <image> like <image>?", "--model", tiny, "--max-tiles", 1)
    assert run(*words, *SHORT).out == expected.text + "\n"


def test_the_question_may_come_on_stdin(run: Run, tiny: Path, picture: Path) -> None:
    expected = run("chat", picture, ASK, "--model", tiny, *SHORT).out
    for words in ([picture], [picture, "-"]):
        assert run("chat", *words, "--model", tiny, *SHORT, stdin=ASK.encode() + b"\n").out == expected


def test_options_reach_the_model(run: Run, tiny: Path, picture: Path) -> None:
    def usage(*options: object) -> dict:
        return json.loads(run("chat", picture, ASK, "--model", tiny, "--json", *SHORT, *options).out)["usage"]

    whole = usage()
    assert whole["tiles"] == 3
    assert usage("--max-tiles", 1)["tiles"] == 1
    assert usage("--system", "")["prompt_tokens"] < whole["prompt_tokens"]
    assert usage("--template", "chatml") == usage("--system", "")
    model = chiasm.load(tiny)
    options = {"temperature": 2.0, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.3, "seed": 7}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    sampled = run("chat", picture, ASK, "--model", tiny, *SHORT, *words)
    assert sampled.out == model.chat(ASK, [picture], max_new_tokens=6, **options).text + "\n"


@pytest.fixture(scope="module")
def sideways(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wide JPEG that its EXIF block turns upright to a tall one, and the same without that block."""
    folder = tmp_path_factory.mktemp("sideways")
    noise = np.random.default_rng(1).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(noise).save(folder / "stored.jpg")
    return folder / "turned.jpg", folder / "stored.jpg"


@pytest.mark.parametrize("mode", ["original", "hf"])
def test_the_released_pipelines_take_pictures_as_stored(
    run: Run, tiny: Path, sideways: tuple[Path, Path], mode: str, tmp_path: Path
) -> None:
    turned, stored = sideways
    sizes = {}
    for given in ([], ["--tile-mode", "chiasm"], ["--tile-mode", mode]):
        out = tmp_path / "drawn.png"
        assert run("chat", turned, ASK, "--model", tiny, *SHORT, *given, "--draw", out).code == 0
        with Image.open(out) as drawn:
            sizes[" ".join(given)] = drawn.size
    assert sizes == {"": (40, 90), "--tile-mode chiasm": (40, 90), f"--tile-mode {mode}": (90, 40)}

    def tiles(picture: Path, **options: Any) -> torch.Tensor:
        return chiasm.load(tiny, **options).inputs(ASK, [picture]).tiles

    assert torch.equal(tiles(turned, mode=mode), tiles(stored))
    assert not torch.equal(tiles(turned), tiles(stored))


def test_the_tile_mode_reaches_the_model(run: Run, tiny: Path, picture: Path) -> None:
    """Two pictures share the budget of three tiles, but not in mode hf."""

    def tiles(*options: object) -> int:
        ran = run(
            "chat", picture, picture, ASK, "--model", tiny, "--json", *SHORT, "--max-tiles", 3, *options
        )
        return json.loads(ran.out)["usage"]["tiles"]

    assert [tiles(), tiles("--tile-mode", "original"), tiles("--tile-mode", "hf")] == [2, 2, 6]


def test_tile_modes_are_those_of_the_policy() -> None:
    assert tuple(mode.value for mode in chat_module.TileMode) == get_args(Mode)


def test_tile_modes_that_cannot_be(run: Run, tiny: Path, picture: Path) -> None:
    ran = run("chat", picture, ASK, "--model", tiny, "--tile-mode", "square")
    assert ran.code == 2
    assert "'square' is not one of" in ran.error_line
    ran = run("chat", picture, ASK, "--tile-mode", "original")
    assert ran.code == 2
    assert "option 'mode' is not known for this model, which does not cut pictures" in ran.error_line


def test_mode_hf_needs_a_thumbnail(run: Run, picture: Path, tmp_path: Path) -> None:
    folder = write_internvl(tmp_path / "bare", use_thumbnail=False)
    ran = run("chat", picture, ASK, "--model", folder, "--tile-mode", "hf")
    assert "mode hf always has a thumbnail" in ran.error_line
    assert run("chat", picture, ASK, "--model", folder, "--tile-mode", "original", *SHORT).code == 0


def test_several_pictures_and_data_urls(run: Run, tiny: Path, picture: Path) -> None:
    import base64

    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    ran = run("chat", picture, url, ASK, "--model", tiny, "--json", *SHORT)
    assert json.loads(ran.out)["usage"]["tiles"] == 6


def test_which_word_is_what(picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noending").write_bytes(b"x")
    assert split_words([]) == ([], None)
    assert split_words(["Why?"]) == ([], "Why?")
    assert split_words(["a.png"]) == (["a.png"], None)
    assert split_words(["a.PNG", "https://x.org/y", "noending", "data: what for?"]) == (
        ["a.PNG", "https://x.org/y", "noending"],
        "data: what for?",
    )
    assert split_words(["noending"]) == (["noending"], None)
    assert split_words(["a.png", "-"]) == (["a.png"], None)
    assert split_words(["x" * 5000]) == ([], "x" * 5000)
    assert split_words(["a\0b"]) == ([], "a\0b")
    assert split_words(["phoot.jpg"]) == (["phoot.jpg"], None)
    with pytest.raises(UsageError, match="noend: no such file"):
        split_words(["noend", "Why?"])


@pytest.mark.parametrize(
    "question",
    [
        "Is this the same as b.png",
        "What is in photo.jpg",
        "http://x/y.png what is it",
        "what is http://x/y.png",
        "tests",
        "a\tb.png",
    ],
)
def test_questions_that_name_pictures_or_folders(
    question: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    assert split_words([question]) == ([], question)
    assert split_words(["a.png", question]) == (["a.png"], question)


def test_a_file_with_blanks_in_its_name_is_no_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my photo.jpg", "what is this"):
        (tmp_path / name).write_bytes(b"x")
        assert split_words([name]) == ([name], None)
        assert split_words([name, "Why?"]) == ([name], "Why?")


# --- drawing --------------------------------------------------------------------------------------------------


class Says:
    """A model that always says the same."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.name = "says"
        self.asked: list[object] = []
        self.model = SimpleNamespace(embedder=SimpleNamespace(vision=None))
        self.spec = SimpleNamespace(tiles=SimpleNamespace(orient=True))

    def chat(self, messages: object, images: object = (), **options: object) -> Reply:
        self.asked.append([dict(m) for m in messages] if isinstance(messages, list) else messages)
        if messages == "fail" or "fail" in str(messages[-1] if isinstance(messages, list) else ""):
            raise UsageError("no")
        return Reply(text=self.text, token_ids=[1], boxes=parse_boxes(self.text))

    def stream(self, messages: object, images: object = (), **options: object):
        reply = self.chat(messages, images, **options)
        yield from reply.text
        return reply


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Says:
    model = Says("<ref>cat</ref><box>[[100,100,900,900]]</box>")
    monkeypatch.setattr(chat_module, "load_model", lambda *a, **k: model)
    return model


def test_boxes_are_drawn(run: Run, says: Says, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "boxes.png"
    for flow in ("--no-stream", "--stream"):
        ran = run("chat", picture, "Where is the cat?", "--draw", out, flow)
        assert (ran.code, ran.err) == (0, "")
        with Image.open(out) as drawn, Image.open(picture) as before:
            assert drawn.size == before.size
            assert drawn.tobytes() != before.tobytes()
        out.unlink()


def test_an_answer_without_boxes_says_so(run: Run, says: Says, picture: Path, tmp_path: Path) -> None:
    says.text = "There is no cat."
    out = tmp_path / "boxes.png"
    ran = run("chat", picture, "Where is the cat?", "--draw", out)
    assert ran.code == 0
    assert ran.err.startswith("note: the answer names no boxes")
    assert out.exists()


def test_drawing_needs_one_picture_and_a_question(
    run: Run, says: Says, picture: Path, tmp_path: Path
) -> None:
    for words in ([picture, picture, ASK], [ASK]):
        ran = run("chat", *words, "--draw", tmp_path / "x.png")
        assert ran.code == 2
        assert ran.error_line == "error: --draw needs one picture and a question"


def test_control_characters_do_not_reach_a_terminal(
    run: Run, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    says.text = "a\x1b[2Jb\tc\nd\x9b"
    assert run("chat", "Why?", "--no-stream").out == "a\x1b[2Jb\tc\nd\x9b\n"
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True, raising=False)
    for flow in ("--no-stream", "--stream"):
        assert run("chat", "Why?", flow).out == "a[2Jb\tc\nd\n"


# --- the conversation -----------------------------------------------------------------------------------------


def talk(run: Run, monkeypatch: pytest.MonkeyPatch, lines: list[object], *words: object):
    """A conversation at a terminal; an exception among the lines is raised instead of a line."""
    left = iter(lines)

    def read(prompt: str = "") -> str:
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    monkeypatch.setattr("builtins.input", read)
    return run("chat", *words, terminal=True)


def test_turns_remember_what_was_said(
    run: Run, says: Says, monkeypatch: pytest.MonkeyPatch, picture: Path
) -> None:
    says.text = "fine"
    lines = [
        "How?",
        "",
        f"/image {picture}",
        "And this?",
        "fail",
        KeyboardInterrupt(),
        "/reset",
        "Again?",
        "/quit",
    ]
    ran = talk(run, monkeypatch, lines, picture)
    assert ran.code == 0
    assert ran.out == "fine\n" * 3
    first, second, third, fourth = says.asked
    kinds = [[part["type"] for part in m["content"]] for m in second if m["role"] == "user"]
    assert kinds == [["image", "text"], ["image", "text"]]
    assert [m["role"] for m in second] == ["user", "assistant", "user"]
    assert [m["role"] for m in third] == ["user", "assistant"] * 2 + ["user"]
    assert len(first) == 1
    assert [[part["type"] for part in m["content"]] for m in fourth] == [["text"]]
    assert "error: no" in ran.err
    assert "/quit or Ctrl-D ends" in ran.err
    assert "1 picture(s) will be shown" in ran.err


def test_the_conversation_of_a_real_model(
    run: Run, tiny: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [ASK, "/image nowhere.png", "/image", "/what", "More?"]
    ran = talk(run, monkeypatch, lines, picture, "--model", tiny, "--json", *SHORT)
    assert ran.code == 0
    first, second = read_lines(ran.out)
    assert first["usage"]["tiles"] == second["usage"]["tiles"] == 3
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
    assert "nowhere.png: no such file" in ran.err
    model = chiasm.load(tiny)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": ASK}]},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "More?"},
    ]
    assert second["token_ids"] == model.chat(messages, max_new_tokens=6).token_ids


def test_interrupted_turns_leave_what_was_said(monkeypatch: pytest.MonkeyPatch, says: Says) -> None:
    """Ctrl-C before, while and after the question is noted down: earlier turns stay, this one goes."""
    from chiasm.cli import repl

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    for earlier in ([], [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]):
        for where in ("checked_question", "tell"):
            said, shown = list(earlier), [Image.new("RGB", (4, 4))]
            with monkeypatch.context() as patch:
                patch.setattr(repl, where, interrupt)
                repl._turn(says, "Why?", said, shown, {}, as_json=False, flowing=False)  # type: ignore[arg-type]
            assert said == earlier
            assert len(shown) == 1
            repl._turn(says, "Why?", said, shown, {}, as_json=False, flowing=False)  # type: ignore[arg-type]
            assert [turn["role"] for turn in said[len(earlier) :]] == ["user", "assistant"]
            assert shown == []


def test_file_names_in_a_conversation(tmp_path: Path) -> None:
    from chiasm.cli.repl import _file_names

    spaced = tmp_path / "my photo.png"
    spaced.write_bytes(b"")
    assert _file_names(str(spaced)) == [str(spaced)]
    assert _file_names("a.png 'b c.png'") == ["a.png", "b c.png"]
    assert _file_names("it's.png") == ["it's.png"]
