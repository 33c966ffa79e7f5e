"""A video that is read while it comes: as in a batch, within bounds, and the command that shows it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.checkpoint import random_checkpoints as made

from chiasm.cli.app import main
from chiasm.cli.watch import timed_questions
from chiasm.errors import ConfigError, DataError, UsageError
from chiasm.media.frames import Frames
from chiasm.nn.temporal import TemporalPast
from chiasm.parts.vision.progressive import TemporalConfig
from chiasm.systems.pvc.convert import PVCOptions, retrofit
from chiasm.systems.pvc.load import PVCChat, load_pvc
from chiasm.systems.pvc.stream import FrameStore
from clips import animation
from tiny_tokenizers import byte_level


def folder_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **temporal) -> Path:
    monkeypatch.setattr(made, "VOCAB", byte_level().vocab_size)
    source = made.write_original(
        tmp_path / "internvl", force_image_size=56, max_dynamic_patch=2, use_thumbnail=False
    )
    config = json.loads((source / "config.json").read_text())
    config["llm_config"]["max_position_embeddings"] = 4096
    (source / "config.json").write_text(json.dumps(config))
    byte_level().save(source)
    facts = {"layers": 1, "time_sines": 8, "time_width": 6, **temporal}
    retrofit(source, tmp_path / "pvc", PVCOptions(temporal=TemporalConfig(**facts), tokens=1))
    return tmp_path / "pvc"


def shaken(chat: PVCChat) -> PVCChat:
    """Trained, as it were: gates and modulations matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in chat.model.embedder.named_parameters():
            if any(word in name for word in ("gate", "modulation", "own")):
                parameter.normal_(0, 0.3, generator=generator)
    return chat


@pytest.fixture(params=["relative", "seconds"])
def chat(request, tmp_path, monkeypatch) -> PVCChat:
    return shaken(
        load_pvc(folder_of(tmp_path, monkeypatch, time=request.param), dtype="float32", device="cpu")
    )


def picture(seed: int, width: int = 40, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


FILM = Frames(
    images=tuple(picture(n) for n in range(6)),
    times=(0.0, 0.5, 1.5, 2.0, 4.0, 5.0),
    name="film",
    total=6,
    duration=5.5,
)


def watched(chat: PVCChat, film: Frames = FILM, **given):
    stream = chat.watch(horizon=film.times[-1] - film.times[0], **given)
    for image, when in zip(film.images, film.times, strict=True):
        stream.add(image, when)
    return stream


def asked(film: Frames, text: str = "What happens?") -> list[dict]:
    return [{"role": "user", "content": [{"type": "video", "video": film}, {"type": "text", "text": text}]}]


def test_within_the_window_a_streamed_video_is_a_shown_one(chat) -> None:
    batch = chat.inputs(asked(FILM))
    stream = watched(chat, window=6, sink=0)
    streamed = stream.inputs("What happens?")
    assert torch.equal(streamed.token_ids, batch.token_ids)
    rows = chat.model.embedder(batch.sequence).x_TC
    torch.testing.assert_close(chat.model.embedder(streamed.sequence).x_TC, rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chat.logits(streamed), chat.logits(batch), rtol=1e-4, atol=1e-4)
    expected = chat.chat(asked(FILM), max_new_tokens=5)
    reply = stream.ask("What happens?", max_new_tokens=5)
    assert reply.token_ids == expected.token_ids
    assert reply.usage["frames"] == 6
    assert "".join(stream.stream("What happens?", max_new_tokens=5)) == reply.text


def test_hours_into_a_video_a_stream_is_as_exact(chat) -> None:
    """Single precision would know such times to a few milliseconds only."""
    film = replace(FILM, times=tuple(40_000.1 + 0.7003 * when for when in FILM.times))
    batch, streamed = chat.inputs(asked(film)), watched(chat, film, window=6, sink=0).inputs("What happens?")
    rows = chat.model.embedder(batch.sequence).x_TC
    torch.testing.assert_close(chat.model.embedder(streamed.sequence).x_TC, rows, rtol=1e-5, atol=1e-5)


def test_frames_of_several_tiles_are_streamed_alike(tmp_path, monkeypatch) -> None:
    folder = folder_of(tmp_path, monkeypatch)
    config = json.loads((folder / "config.json").read_text())
    config["chiasm_pvc"]["frame_tiles"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    chat = shaken(load_pvc(folder, dtype="float32"))
    film = replace(FILM, images=tuple(picture(n, 120, 56) for n in range(6)))
    batch, streamed = chat.inputs(asked(film)), watched(chat, film).inputs("What happens?")
    assert batch.tiles.shape[0] == 12
    torch.testing.assert_close(chat.logits(streamed), chat.logits(batch), rtol=1e-4, atol=1e-4)
    stream = watched(chat, film)
    for size in ((40, 40), (56, 120)):  # of another number of tiles, and of as many in another grid
        with pytest.raises(DataError, match=rf"a frame of {size[0]}x{size[1]} pixels in a video of 120x56"):
            stream.add(picture(1, *size), film.times[-1])


def test_an_answer_depends_on_no_earlier_question(chat) -> None:
    one, other = watched(chat), chat.watch(horizon=5.0)
    for image, when in zip(FILM.images, FILM.times, strict=True):
        other.add(image, when)
        other.ask("What?", max_new_tokens=2)
    assert (
        one.ask("And now?", max_new_tokens=4).token_ids == other.ask("And now?", max_new_tokens=4).token_ids
    )


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 300), shown=st.integers(1, 12), data=st.data())
def test_frames_that_are_shown(count, shown, data) -> None:
    recent = data.draw(st.integers(1, shown))
    store = FrameStore(shown, recent)
    for n in range(count):
        store.add(torch.full((2, 3), float(n)), n / 2)
        where = store._tokens
    numbers = store.choice()
    assert numbers == sorted(set(numbers))
    assert len(numbers) <= shown
    latest = min(recent, count)
    assert numbers[-latest:] == list(range(count - latest, count))
    older = numbers[:-latest]
    if count <= shown:
        assert numbers == list(range(count))
    elif store.past:
        assert older[0] == 0
        assert store.past / 2 <= len(older) <= store.past
        if len(older) > 2:
            gaps = np.diff(older)
            assert gaps.max() <= 4 * gaps.min()
    assert store._tokens is where
    assert store.tokens(numbers)[:, 0, 0].tolist() == numbers
    assert store.times(numbers) == [n / 2 for n in numbers]
    assert len(store._slot_of) + len(store._free) == recent + 2 * store.past + 1


def test_memory_stays_as_it_is(tmp_path, monkeypatch) -> None:
    chat = load_pvc(folder_of(tmp_path, monkeypatch, time="seconds"), dtype="float32")
    stream = chat.watch(frames=6, window=4, sink=1)
    sizes = set()
    for n in range(40):
        stream.add(FILM.images[n % 6], float(n))
        sizes.add(stream.bytes)
        assert len(stream.inputs("What?").sequence.spans) == min(n + 1, 6)
    assert len(sizes) == 1
    assert stream.bytes > 0
    assert TemporalPast(3).bytes == 0


def test_streams_that_cannot_be(chat) -> None:
    relative = chat.config.temporal.time == "relative"
    if relative:
        with pytest.raises(ConfigError, match="times are relative, so a stream must know its length"):
            chat.watch()
    with pytest.raises(ConfigError, match="beyond the model's horizon of 96"):
        chat.watch(horizon=1.0, window=96)
    with pytest.raises(ConfigError, match="a stream that shows 0 frames cannot be"):
        chat.watch(horizon=1.0, frames=0)
    with pytest.raises(ConfigError, match="5 recent of 4 frames"):
        chat.watch(horizon=1.0, frames=4, recent=5)
    stream = chat.watch(horizon=1.0)
    with pytest.raises(UsageError, match="no frame was read yet"):
        stream.ask("What?")
    stream.add(FILM.images[0], 3.0)
    with pytest.raises(DataError, match=r"a frame at 2 s after one at 3 s"):
        stream.add(FILM.images[0], 2.0)
    with pytest.raises(DataError, match="give frames in order of time"):
        stream.add(FILM.images[0], float("nan"))
    if relative:
        with pytest.raises(DataError, match=r"behind the stream's horizon of 1 s"):
            stream.add(FILM.images[0], 4.5)
    stream.add(FILM.images[0], 4.0)
    assert stream.seen == 2


# The command ---------------------------------------------------------------------------------------------------------


def test_questions_of_a_pipe() -> None:
    lines = ["@7.5 later", "", "at the end", "@2 first", "@x no time"]
    assert timed_questions(iter(lines)) == [
        (2.0, "first"),
        (7.5, "later"),
        (float("inf"), "at the end"),
        (float("inf"), "@x no time"),
    ]


def test_the_command_answers_while_the_video_is_read(tmp_path, monkeypatch, capsys) -> None:
    folder = folder_of(tmp_path, monkeypatch)
    clip = animation(tmp_path / "clip.gif", 12, 500)  # six seconds
    words = [
        "chat",
        "--model",
        str(folder),
        "--stream-video",
        str(clip),
        "--device",
        "cpu",
        "--max-new-tokens",
        "3",
    ]
    assert main([*words, "--fps", "4", "--every", "2", "--json", "What happens?"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["seen"] for one in said] == sorted(one["seen"] for one in said)
    assert said[-1]["seen"] == 12
    assert len(said) == 3
    assert all(one["usage"]["frames"] == one["seen"] for one in said)
    assert main([*words, "--fps", "4", "--frames", "4", "What?"]) == 0
    assert capsys.readouterr().out.startswith("[5.5 s] ")


class Typed(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [Typed, io.StringIO])
def test_questions_are_typed_or_piped(tmp_path, monkeypatch, capsys, kind) -> None:
    folder = folder_of(tmp_path, monkeypatch)
    clip = animation(tmp_path / "clip.gif", 6, 500)
    monkeypatch.setattr("sys.stdin", kind("@1 What now?\n\nAnd at the end?\n"))
    words = [
        "chat",
        "--model",
        str(folder),
        "--stream-video",
        str(clip),
        "--device",
        "cpu",
        "--max-new-tokens",
        "2",
    ]
    assert main([*words, "--fps", "4", "--json"]) == 0
    printed = capsys.readouterr()
    said = [json.loads(line) for line in printed.out.splitlines()]
    assert len(said) == 2
    if kind is Typed:
        assert [one["question"] for one in said] == ["@1 What now?", "And at the end?"]
        assert "answered as soon as they are typed" in printed.err
    else:
        assert [(one["question"], one["seen"]) for one in said] == [("What now?", 3), ("And at the end?", 6)]


def test_the_command_says_what_cannot_be(tmp_path, monkeypatch, capsys) -> None:
    clip = str(animation(tmp_path / "clip.gif", 3))
    for words, said in (
        (["--every", "2", "What?"], "belong to --stream-video"),
        (["--stream-video", clip, "--draw", "x.png", "What?"], "shows that video alone"),
        (["--stream-video", clip, "--every", "0", "--model", "smollm2", "What?"], "needs a PVC"),
    ):
        if "smollm2" in words:
            words[words.index("smollm2")] = str(_internvl(tmp_path, monkeypatch))
        assert main(["chat", *words]) == 2
        assert said in capsys.readouterr().err


def _internvl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(made, "VOCAB", byte_level().vocab_size)
    folder = made.write_original(tmp_path / "plain", force_image_size=56)
    byte_level().save(folder)
    return folder
