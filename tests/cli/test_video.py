"""chiasm chat with videos: options, files of all kinds, several turns, and every failure in one line."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
from PIL import Image
from tests.cli.conftest import Run, read_lines
from tests.cli.test_chat import talk
from tests.media.test_video import without_av

import chiasm
from chiasm.cli.chat import SamplingWord, split_words
from chiasm.errors import UsageError
from chiasm.media.frames import SamplingMode
from chiasm.media.video import open_video
from clips import animation, folder, numbered, write_clip

ASK = "What happens?"
SHORT = ("--max-new-tokens", 4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 50)


def asked(*videos: object, **sampling: object) -> list[dict]:
    parts = [{"type": "video", "video": video, **sampling} for video in videos]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": ASK}]}]


def test_a_video_is_answered(run: Run, tiny: Path, clip: Path) -> None:
    expected = chiasm.load(tiny).chat(asked(clip), max_new_tokens=4)
    ran = run("chat", clip, ASK, "--model", tiny, "--json", *SHORT)
    assert ran.code == 0
    assert read_lines(ran.out) == [expected.to_dict()]
    assert expected.usage["frames"] == expected.usage["tiles"] == 8
    assert ran.err.splitlines()[0] == f"note: {clip}: 8 of 50 frames, 0.30 to 4.60 of 5.00 seconds"
    assert run("chat", clip, ASK, "--model", tiny, *SHORT).out == expected.text + "\n"
    assert run("chat", clip, "--model", tiny, *SHORT, stdin=ASK.encode()).out == expected.text + "\n"
    assert run("chat", clip, ASK, "--model", tiny, "--stream", *SHORT).out == expected.text + "\n"


@pytest.mark.parametrize(
    ("options", "sampling", "said"),
    [
        (["--frames", 3], {"frames": 3}, "3 of 50 frames, 0.80 to 4.10"),
        (["--frames", 3, "--clip", "2:4"], {"frames": 3, "clip": (2, 4)}, "3 of 50 frames, 2.30 to 3.60"),
        (["--sampling", "rand", "--seed", 5], {"mode": "rand", "seed": 5}, "8 of 50 frames"),
        (["--sampling", "fps"], {"mode": "fps"}, "5 of 50 frames, 0.50 to 4.50"),
        (["--fps", 2], {"fps": 2}, "10 of 50 frames"),
        (["--fps", 2, "--frames", 4], {"fps": 2, "max_frames": 4}, "4 of 50 frames"),
        (["--fps", 0.5, "--sampling", "fps", "--clip", "0.5:99"], {"fps": 0.5, "clip": (0.5, 99)}, "2 of 50"),
    ],
)
def test_which_frames(
    run: Run, tiny: Path, clip: Path, options: list[object], sampling: dict, said: str
) -> None:
    ran = run("chat", clip, ASK, "--model", tiny, "--json", *SHORT, *options)
    assert said in ran.err
    reply = json.loads(ran.out)
    model = chiasm.load(tiny)
    expected = model.chat(asked(clip, **sampling), max_new_tokens=4, seed=sampling.get("seed", 0))
    assert reply == expected.to_dict()


def test_the_template_decides_on_the_formula(run: Run, tiny: Path, clip: Path) -> None:
    said = {
        template: run("chat", clip, ASK, "--model", tiny, "--frames", 2, "--template", template, *SHORT).err
        for template in ("internvl2_5", "internvl-hf")
    }
    assert "1.20 to 3.60" in said["internvl2_5"]
    assert "1.20 to 3.70" in said["internvl-hf"]


def test_modes_are_those_of_the_sampling() -> None:
    assert {mode.value for mode in SamplingWord} == set(SamplingMode.__args__)


def test_several_videos_pictures_folders_and_animations(
    run: Run, tiny: Path, clip: Path, picture: Path, tmp_path: Path
) -> None:
    frames = folder(tmp_path / "frames", ["a2.png", "a10.png"])
    gif = animation(tmp_path / "a.gif", 3)
    words = [picture, clip, frames, gif]
    ran = run(
        "chat",
        *words,
        ASK,
        "--model",
        tiny,
        "--json",
        "--frames",
        2,
        "--max-tiles",
        1,
        "--system",
        "",
        *SHORT,
    )
    assert ran.code == 0, ran
    usage = json.loads(ran.out)["usage"]
    assert (usage["tiles"], usage["frames"]) == (7, 6)
    notes = ran.err.splitlines()
    assert [line.split(": ")[1].rsplit("/")[-1] for line in notes[:3]] == ["clip.mp4", "frames", "a.gif"]
    still = tmp_path / "still.gif"
    Image.fromarray(numbered(1)).save(still)
    assert json.loads(run("chat", still, ASK, "--model", tiny, "--json", *SHORT).out)["usage"]["frames"] == 0


def test_an_animation_is_a_video_where_frames_are_asked_for(run: Run, tiny: Path, tmp_path: Path) -> None:
    gif = animation(tmp_path / "a.gif", 3)
    words = ("chat", gif, ASK, "--model", tiny, "--json", *SHORT)
    still = run(*words)
    assert json.loads(still.out)["usage"]["frames"] == 0
    assert "first frame" in still.err
    moving = run(*words, "--frames", 3)
    assert json.loads(moving.out)["usage"]["frames"] == 3
    assert "3 of 3 frames" in moving.err


def test_which_word_is_a_video(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "frames").mkdir()
    assert split_words(["clip.mp4"]) == (["clip.mp4"], None)
    assert split_words(["frames", "Why?"]) == (["frames"], "Why?")
    assert split_words(["frames"]) == ([], "frames")
    assert split_words(["frames/"]) == (["frames/"], None)
    assert split_words(["clap.MKV", "Why?"]) == (["clap.MKV"], "Why?")
    with pytest.raises(UsageError, match="noend: no such file"):
        split_words(["noend", "Why?"])


def test_a_conversation_about_a_video(
    run: Run, tiny: Path, clip: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [ASK, "/video nowhere.mp4", f"/video {clip}", f"/image {picture}", "More?", "/quit"]
    options = ("--model", tiny, "--json", "--frames", 2, "--max-tiles", 1, "--system", "", *SHORT)
    ran = talk(run, monkeypatch, lines, clip, *options)
    assert ran.code == 0
    first, second = read_lines(ran.out)
    assert (first["usage"]["frames"], second["usage"]["frames"]) == (2, 4)
    assert second["usage"]["tiles"] == 5
    assert "nowhere.mp4: no such file" in ran.err
    assert "1 picture(s) and 1 video(s) will be shown" in ran.err
    assert ran.err.count("2 of 50 frames") == 2


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--clip", "2"], 2, "--clip 2: write START:END in seconds, for instance 2:8"),
        (["--clip", "a:b"], 2, "--clip a:b: write START:END"),
        (["--clip", "3:1"], 1, "a clip must start at 0 or later and end after it has begun, not 3:1"),
        (
            ["--clip", "7:9"],
            1,
            "clip.mp4: the clip 7:9 lies outside of its 5.00 seconds; give seconds within it",
        ),
        (["--fps", "0"], 1, "fps must be a number from 0.000001 to 1000000 (frames a second), not 0.0"),
        (["--fps", "nan"], 1, "fps must be a number from 0.000001"),
        (["--frames", "0"], 1, "frames must be a whole number of at least 1"),
        (["--sampling", "best"], 2, "'best' is not one of"),
        (
            ["--sampling", "rand", "--fps", "2"],
            2,
            "--fps does not go with --sampling rand: leave one of them out",
        ),
        (["--draw", "x.png"], 2, "--draw needs one picture and a question"),
        (["--frames", "50", "--max-tiles", "1"], 1, "50 video frames, so use fewer frames"),
    ],
)
def test_options_that_cannot_be(
    run: Run, tiny: Path, clip: Path, options: list[str], code: int, said: str, tmp_path: Path
) -> None:
    if said.startswith("50 video"):
        clip = write_clip(tmp_path / "long.mp4", 60)
    ran = run("chat", clip, ASK * (20 if said.startswith("50 video") else 1), "--model", tiny, *options)
    lines = [line for line in ran.err.splitlines() if not line.startswith("note: ")]
    assert (ran.code, len(lines)) == (code, 1), ran
    assert said in lines[0]


def test_too_many_frames_are_refused_before_any_is_decoded(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chiasm.media import video as video_module

    opened = []

    def spy(source: object, **options: object) -> video_module.Video:
        opened.append(open_video(source, **options))
        return opened[-1]

    monkeypatch.setattr(video_module, "open_video", spy)
    long = write_clip(tmp_path / "long.mp4", 60)
    line = run("chat", long, ASK, "--model", tiny, "--frames", 100_000).error_line
    assert "but the limit is 512: 60 of them are 60 video frames, so use fewer frames" in line
    assert [video.decoded for video in opened] == [0]
    # What is to be shown besides counts too.
    half = ("--model", tiny, "--frames", 30, *SHORT)
    lines = [f"/video {long}", f"/video {long}", "/quit"]
    assert "but the limit is 512: 60 of them are 60 video frames" in talk(run, monkeypatch, lines, *half).err
    assert [video.decoded > 0 for video in opened] == [False, True, False]


def test_sampling_without_a_video(run: Run, picture: Path) -> None:
    ran = run("chat", picture, ASK, "--frames", 3)
    assert ran.code == 2
    assert "--frames, --sampling, --fps and --clip are for videos" in ran.error_line


def test_bad_videos_before_the_model_is_loaded(
    run: Run, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chiasm.cli import chat as chat_module

    monkeypatch.setattr(chat_module, "load_model", lambda *a, **k: pytest.fail("loaded a model"))
    (tmp_path / "text.mp4").write_text("Hello")
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:2000])
    (tmp_path / "none").mkdir()
    write_clip(tmp_path / "song.mp4", audio=True, video=False)
    for name, said in {
        "nowhere.mp4": "no such file",
        "text.mp4": "is not a video that can be read here",
        "cut.mp4": "cut off",
        "none": "is a folder without pictures",
        "song.mp4": "holds no video (audio only)",
    }.items():
        line = run("chat", clip, tmp_path / name, ASK).error_line
        assert name in line
        assert said in line
    monkeypatch.setattr(builtins, "__import__", without_av)
    assert "av is not installed: run pip install 'chiasm[video]'" in run("chat", clip, ASK).error_line
