"""A tiny InternVL that is shown videos: the same as its frames shown as pictures, remembered, in several turns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.cli.conftest import write_internvl

import chiasm
from chiasm.errors import ContextOverflowError
from chiasm.media.frames import FrameSampling
from chiasm.media.video import read_frames
from chiasm.model.chat import ChatModel
from clips import write_clip

ASK = "What happens?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return chiasm.load(write_internvl(tmp_path_factory.mktemp("tiny")), max_tiles=1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 30)


def show(*media: object, text: str = ASK) -> list[dict]:
    parts = [
        {"type": "video", "video": m, "frames": 3} if isinstance(m, Path) else {"type": "image", "image": m}
        for m in media
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_a_video_is_its_frames(model: ChatModel, clip: Path) -> None:
    frames = read_frames(clip, FrameSampling(frames=3))
    inputs = model.inputs(show(clip))
    text = "".join(f"Frame{n + 1}: <image>\n" for n in range(3))
    same = model.inputs(show(*frames.images, text=text + ASK))
    assert inputs.token_ids.tolist() == same.token_ids.tolist()
    assert torch.equal(inputs.tiles, same.tiles)
    assert torch.equal(model.pixels(inputs), model.pixels(same))
    assert torch.equal(model.logits(inputs), model.logits(same))
    reply = model.chat(show(clip), max_new_tokens=4)
    assert reply.token_ids == model.chat(show(*frames.images, text=text + ASK), max_new_tokens=4).token_ids
    assert (reply.usage["tiles"], reply.usage["frames"]) == (3, 3)


def test_tiles_are_in_the_order_of_the_prompt(model: ChatModel, clip: Path) -> None:
    frames = read_frames(clip, FrameSampling(frames=3))
    picture = frames.images[1]
    inputs = model.inputs(show(clip, picture, clip))
    assert inputs.tiles.shape[0] == 7
    assert torch.equal(inputs.tiles[3], inputs.tiles[1])
    assert torch.equal(inputs.tiles[4:], inputs.tiles[:3])
    assert model.chat(show(clip, picture, clip), max_new_tokens=2).usage["frames"] == 6


def test_frames_are_remembered_over_turns(model: ChatModel, clip: Path) -> None:
    model.features.clear()
    first = model.chat(show(clip), max_new_tokens=3)
    misses = model.features.misses
    later = [*show(clip), {"role": "assistant", "content": first.text}, {"role": "user", "content": "Sure?"}]
    reply = model.chat(later, max_new_tokens=3)
    assert model.features.misses == misses
    assert reply.usage["frames"] == 3
    # And batched with conversations of other kinds, none has an influence on the others.
    several = model.batch([show(clip), "Hi.", show(read_frames(clip).images[0])], max_new_tokens=3)
    assert several[0].token_ids == first.token_ids
    assert [r.usage["frames"] for r in several] == [3, 0, 0]


def test_training_reaches_the_encoder_through_frames(model: ChatModel, clip: Path) -> None:
    sequence = model.inputs(show(clip)).sequence
    model.model.zero_grad()
    model.model.embedder(sequence).x_TC.sum().backward()
    assert model.model.embedder.vision.patch_embedding.weight.grad.abs().sum() > 0
    model.model.zero_grad()


def test_no_room(model: ChatModel, clip: Path) -> None:
    many = [{"role": "user", "content": [{"type": "video", "video": clip, "frames": 30}] * 4 + [ASK]}]
    with pytest.raises(ContextOverflowError, match="120 video frames, so use fewer frames"):
        model.chat(many)
