"""Videos in the layout: frames of one tile, tags, times, groups, counting, and the text of transformers' processor."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer as Backend

from chiasm.data.layout import LayoutSpec, check_length, count_tokens, layout, prompt_text
from chiasm.data.message import from_row
from chiasm.data.sequence import IMAGE, TEXT, VIDEO, Sequence
from chiasm.errors import ConfigError, ContextOverflowError, DataError, ImageError
from chiasm.media.frames import FrameSampling
from chiasm.media.image import open_image
from chiasm.media.tiles import TilePolicy
from chiasm.media.video import open_video, read_frames
from clips import folder, number, numbered, write_clip
from tiny_tokenizers import byte_level

SIDE, ROWS = 8, 3
MARK = "<img><IMG_CONTEXT></img>"


def make(template: str = "internvl2_5", max_tiles: int = 6, **options) -> LayoutSpec:
    tiles = TilePolicy(image_size=SIDE, max_tiles=max_tiles, mode="original")
    options = {"system": "", "tokens_per_tile": ROWS, **options}
    return LayoutSpec(tokenizer=byte_level(), template=template, tiles=tiles, **options)


def ask(*parts: object) -> dict:
    return {"role": "user", "content": list(parts)}


def video(source: object, **sampling: object) -> dict:
    return {"type": "video", "video": source, **sampling}


def image(seed: int = 0) -> dict:
    return {"type": "image", "image": Image.fromarray(numbered(seed))}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 50)


def test_one_video_by_hand(clip: Path) -> None:
    spec = make()
    said = ask(video(clip, frames=2), "What happens?")
    made = layout(said, spec)
    context = spec.tokenizer.token_to_id("<IMG_CONTEXT>")
    ids: list[int] = []
    for before in ("<|im_start|>user\nFrame1: <img>", "</img>\nFrame2: <img>"):
        ids += [*spec.tokenizer.encode(before), *[context] * ROWS]
    ids += spec.tokenizer.encode("</img>\nWhat happens?<|im_end|>\n<|im_start|>assistant\n")
    assert made.ids_T.tolist() == ids
    assert made.kind_T.tolist() == [VIDEO if i == context else TEXT for i in ids]
    assert set(made.media) == {"video"}
    frames = read_frames(clip, FrameSampling(frames=2))
    assert [number(i) for i in frames.images] == [12, 36]
    batch = made.media["video"]
    assert torch.equal(batch.data, torch.cat([spec.tiles.tile(i, 1) for i in frames.images]))
    assert batch.times_N.dtype == torch.float64
    assert batch.times_N.tolist() == pytest.approx([1.2, 3.6])
    assert [(s.media, s.length, s.first, s.items, s.group) for s in made.spans] == [
        ("video", ROWS, 0, 1, 0),
        ("video", ROWS, 1, 1, 0),
    ]
    assert made.spans[0].key != made.spans[1].key
    assert count_tokens(said, spec) == len(made)


def test_both_spellings_and_that_of_training(clip: Path) -> None:
    def text(said: object, **options: object) -> str:
        spelled = prompt_text(said, make(**options))
        return spelled.partition("user\n")[2].partition("<|im_end|>")[0]

    two = video(clip, frames=2)
    docs = f"Frame1: {MARK}\nFrame2: {MARK}\nWhat?"
    for said in (ask(two, "What?"), ask(two, "<video>\nWhat?")):
        assert text(said) == docs
        assert text(said, template="internvl-hf") == docs
        assert text(said, template="chatml") == docs
        assert text(said, frame_tags="training") == docs.replace("Frame", "Frame-")
    # Right after the tag, the documented spelling closes the last frame and the joined ones do not.
    close = ask(two, "<video>What?")
    assert text(close) == docs
    assert text(close, template="internvl-hf") == docs.replace("\nWhat?", "What?")
    assert text(close, template="internvl-hf", frame_tags="docs") == docs
    assert text(close, frame_tags="hf") == docs.replace("\nWhat?", "What?")
    assert text(ask(two, "Look: <video>\n\nWhat?")) == f"Look: {docs[:-5]}\nWhat?"
    with pytest.raises(ConfigError, match="unknown spelling of frames 'x': known are docs, hf, training"):
        make(frame_tags="x")


def test_the_formula_is_that_of_the_template(clip: Path) -> None:
    times = {
        template: layout(ask(video(clip)), make(template)).media["video"].times_N.tolist()
        for template in ("internvl2_5", "internvl-hf")
    }
    assert times["internvl2_5"] == pytest.approx([0.3, 0.9, 1.5, 2.1, 2.7, 3.4, 4.0, 4.6])
    assert times["internvl-hf"] == pytest.approx([0.3, 0.9, 1.5, 2.1, 2.8, 3.4, 4.0, 4.6])


def test_several_videos_and_pictures_mixed(clip: Path, tmp_path: Path) -> None:
    frames = folder(tmp_path / "frames", ["1.png", "2.png", "3.png"])
    said = [
        ask(image(7), video(clip, frames=2), "Same?"),
        {"role": "assistant", "content": "No."},
        ask(video(frames, folder_fps=2), image(8), "And now?"),
    ]
    spec = make()
    text = prompt_text(said, spec)
    assert f"user\n{MARK}\nFrame1: {MARK}\nFrame2: {MARK}\nSame?" in text
    assert f"user\nFrame1: {MARK}\nFrame2: {MARK}\nFrame3: {MARK}\n{MARK}\nAnd now?" in text
    made = layout(said, spec)
    assert [s.media for s in made.spans] == ["image", *["video"] * 5, "image"]
    assert [s.group for s in made.spans] == [-1, 0, 0, 1, 1, 1, -1]
    assert made.media["video"].times_N.tolist() == pytest.approx([1.2, 3.6, 0, 0.5, 1.0])
    assert len(made.media["image"].data) == sum(s.items for s in made.spans if s.media == "image")
    for span in made.spans:
        rows = made.kind_T[span.start : span.start + span.length]
        assert (rows == (VIDEO if span.media == "video" else IMAGE)).all()
        assert span.length == span.items * ROWS
    # The frames take nothing from the budget of the pictures.
    alone = layout([ask(image(7), image(8), "Same?")], spec)
    assert torch.equal(made.media["image"].data, alone.media["image"].data)
    assert count_tokens(said, spec) == len(made)
    both = Sequence.pack([made, made])
    assert [s.group for s in both.spans[7:]] == [-1, 2, 2, 3, 3, 3, -1]
    for document in both.split():
        assert torch.equal(document.media["video"].times_N, made.media["video"].times_N)
        assert document.spans == made.spans


def test_lists_of_pictures_are_taken_whole_unless_told() -> None:
    pictures = [Image.fromarray(numbered(n)) for n in range(11)]
    assert len(layout(ask(video(pictures)), make()).spans) == 11
    assert len(layout(ask(video(pictures, frames=3)), make()).spans) == 3
    assert len(layout(ask(video(read_frames(pictures))), make()).spans) == 11
    timed = layout(ask(video(pictures, folder_fps=2)), make()).media["video"]
    assert timed.times_N.tolist() == [n / 2 for n in range(11)]


def test_a_folder_of_any_name_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder(Path("list of pictures"), [f"{n}.png" for n in range(11)])
    assert len(layout(ask(video("list of pictures")), make()).spans) == 8


def test_sampling_of_the_part_the_layout_or_the_default(clip: Path) -> None:
    def frames(spec: LayoutSpec, **sampling: object) -> int:
        return len(layout(ask(video(clip, **sampling)), spec).spans)

    assert frames(make()) == 8
    own = make(sampling=FrameSampling(mode="fps", fps=2, clip=(1, 3)))
    assert frames(own) == 4
    assert frames(own, fps=1) == 2
    assert frames(own, mode="middle", frames=5) == 5
    assert frames(make(), fps=1) == 5
    assert frames(make(), fps=None) == 8
    for mode in ("middle", "rand"):
        with pytest.raises(ConfigError, match=rf"fps does not go with sampling mode {mode}: leave one"):
            frames(own, mode=mode, fps=2)
    with pytest.raises(ConfigError, match="frames must be a whole number"):
        frames(make(), frames="8")


def test_rows_of_a_data_set_with_a_clip(clip: Path) -> None:
    row = {
        "video": clip.name,
        "clip": [1, 2],
        "conversations": [{"from": "human", "value": "<video>\nQ"}, {"from": "gpt", "value": "A"}],
    }
    made = layout(from_row(row).resolved(clip.parent), make(), train=True)
    times = made.media["video"].times_N
    assert ((times >= 1) & (times < 2)).all()
    assert (made.labels_T >= 0).any()
    row["clip"] = [7, 9]
    with pytest.raises(ImageError, match=r"clip\.mp4: the clip 7:9 lies outside of its 5\.00 seconds"):
        layout(from_row(row).resolved(clip.parent), make())


def test_too_many_frames_are_refused_before_any_is_decoded(
    clip: Path,
) -> None:
    said = ask(video(clip, frames=20), image(), "What?")
    exact = count_tokens(said, make())
    assert len(layout(said, make(max_length=exact))) == exact
    opened = []

    def spy(source: object, **options: object):
        opened.append(open_video(source, **options))
        return opened[-1]

    match = rf"takes {exact} tokens but the limit is {exact - 1}: 60 of them are 20 video frames, and 7 .*fewer frames"
    with pytest.raises(ContextOverflowError, match=match):
        layout(said, make(max_length=exact - 1), video_opener=spy)
    assert [v.decoded for v in opened] == [0]
    count_tokens(said, make(), video_opener=spy)
    prompt_text(said, make(), video_opener=spy)
    assert [v.decoded for v in opened] == [0, 0, 0]


def test_openers_are_asked_in_counting_too(clip: Path) -> None:
    closed = partial(open_image, allow_files=False), partial(open_video, allow_files=False)
    options = {"opener": closed[0], "video_opener": closed[1]}
    for said in (ask(video(str(clip))), ask({"type": "image", "image": "a.png"})):
        for function in (layout, count_tokens, check_length):
            with pytest.raises(ImageError, match="paths are not accepted here"):
                function(said, make(), **options)
    with pytest.raises(ImageError, match="paths are not accepted here"):
        prompt_text(ask(video(str(clip))), make(), video_opener=closed[1])
    given = ask(video(clip.read_bytes()), image(), "What?")
    assert count_tokens(given, make(), **options) == len(layout(given, make()))


def test_frames_are_cut_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, decoded = [], []
    tile = TilePolicy.tile

    def spy(source: object, **options: object):
        opened.append(open_video(source, **options))
        return opened[-1]

    def count(*given: object):
        decoded.append(opened[-1].decoded)
        return tile(*given)

    monkeypatch.setattr(TilePolicy, "tile", count)
    layout(ask(video([Image.fromarray(numbered(n)) for n in range(4)])), make(), video_opener=spy)
    assert decoded == [1, 2, 3, 4]


def test_checking_the_length_is_what_layout_does(clip: Path) -> None:
    said = ask(video(clip, frames=20), image(), "What?")
    exact = count_tokens(said, make())
    check_length(said, make(max_length=exact))
    for function in (check_length, layout):
        with pytest.raises(ContextOverflowError, match=r"60 of them are 20 video frames, and 7 image tiles"):
            function(said, make(max_length=exact - 1))
    with pytest.raises(ContextOverflowError, match=r"600 of them are 200 video frames"):
        check_length(said, make(max_length=exact), frames=[200])


def test_counting_by_given_numbers_touches_no_file(clip: Path) -> None:
    said = [ask(video("nowhere.mp4"), "a"), {"role": "assistant", "content": "b"}, ask(video("no.mkv"), "c")]
    other = [ask(video(clip, frames=3), "a"), said[1], ask(video(clip, frames=4), "c")]
    assert count_tokens(said, make(), frames=[3, 4]) == len(layout(other, make()))
    assert prompt_text(said, make(), frames=[3, 4]) == prompt_text(other, make())
    with pytest.raises(DataError, match=r"2 video\(s\) but 1 number\(s\) of frames"):
        count_tokens(said, make(), frames=[3])
    for function in (layout, count_tokens, prompt_text):
        with pytest.raises(ImageError, match=r"nowhere\.mp4: no such file"):
            function(said, make())


samplings = st.fixed_dictionaries(
    {},
    optional={
        "frames": st.integers(1, 12),
        "mode": st.sampled_from(["middle", "rand", "fps"]),
        "clip": st.tuples(st.floats(0, 4.9), st.floats(5, 9)),
        "fps": st.floats(0.1, 5),
        "seed": st.integers(0, 9),
    },
).filter(lambda said: "fps" not in said or said.get("mode", "fps") == "fps")


@given(parts=st.lists(st.one_of(samplings, st.just(None), st.just("text")), min_size=1, max_size=4))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counting_agrees(clip: Path, parts: list[object]) -> None:
    said = ask(*(image() if p is None else p if isinstance(p, str) else video(clip, **p) for p in parts))
    made = layout(said, make())
    assert count_tokens(said, make()) == len(made)
    kinds = made.kind_T.tolist()
    assert kinds.count(VIDEO) == ROWS * sum(s.media == "video" for s in made.spans)
    assert [s.start for s in made.spans] == sorted(s.start for s in made.spans)


def test_same_ids_as_transformers_processor() -> None:
    """Its own spelling of a video, in the text that its chat template makes of it."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.internvl.processing_internvl import InternVLProcessor

    class Processor(InternVLProcessor):
        # The check of the parts' classes looks up video processors, which do not import without torchvision.
        def check_argument_for_proper_class(self, argument_name, argument):
            return None

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(byte_level().backend.to_str()),
        extra_special_tokens={**names, "video_token": "<video>"},
    )
    processor = Processor(None, tokenizer, image_seq_length=ROWS, chat_template="unused")
    pictures = [Image.fromarray(numbered(n)) for n in range(5)]
    theirs = processor.replace_video_token({"pixel_values_videos": torch.zeros(1, 5, 3, SIDE, SIDE)}, 0)
    text = f"<|im_start|>user\n{theirs}\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    made = layout(ask(video(pictures), "What?"), make("internvl-hf"))
    assert made.ids_T.tolist() == tokenizer(text)["input_ids"]
