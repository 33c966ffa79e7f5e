"""From an InternVL checkpoint to a PVC folder and to a model that answers: names, weights, options, errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.checkpoint import random_checkpoints as made

import chiasm
from chiasm.checkpoint.store import CheckpointReader
from chiasm.cli.app import main
from chiasm.errors import CheckpointError, ConfigError, ContextOverflowError, UsageError
from chiasm.eval.families import describe
from chiasm.model.chat import Chats
from chiasm.parts.connect.conditioned import coarsened
from chiasm.parts.vision.progressive import TemporalConfig
from chiasm.systems.internvl.load import load_folder
from chiasm.systems.pvc.convert import PVCOptions, new_entries, open_pvc, retrofit, spell_new
from chiasm.systems.pvc.load import PVCChat, load_pvc
from tiny_tokenizers import byte_level

TEMPORAL = TemporalConfig(layers=1, time_sines=8, time_width=6)
SIDE = 56


@pytest.fixture
def internvl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An InternVL of random weights whose tile of 56 pixels has 4 x 4 patches and 4 tokens."""
    monkeypatch.setattr(made, "VOCAB", byte_level().vocab_size)
    folder = made.write_original(tmp_path / "internvl", force_image_size=SIDE, max_dynamic_patch=4)
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["max_position_embeddings"] = 1024
    (folder / "config.json").write_text(json.dumps(config))
    byte_level().save(folder)
    return folder


def picture(width: int = 60, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def asked(*media: Image.Image | list[Image.Image], text: str = "What is it?") -> list[dict]:
    parts = [
        {"type": "video", "video": m} if isinstance(m, list) else {"type": "image", "image": m} for m in media
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


FILM = [picture(40, 40, seed=n) for n in range(5)]


@pytest.mark.parametrize("conditioning", ["light", "full"])
def test_with_the_tokens_of_its_internvl_and_one_repeat_it_is_that_internvl(
    internvl, tmp_path, conditioning
) -> None:
    temporal = TemporalConfig(layers=2, time_sines=8, conditioning=conditioning)
    retrofit(internvl, tmp_path / "pvc", PVCOptions(temporal=temporal, tokens=4, repeats=1))
    old, new = load_folder(internvl, dtype="float32"), load_pvc(tmp_path / "pvc", dtype="float32")
    for messages in (
        asked(picture()),
        asked(picture(), picture(30, 60, seed=1)),
        asked(FILM),
        asked(text="Hi"),
    ):
        a, b = old.inputs(messages), new.inputs(messages)
        assert torch.equal(a.token_ids, b.token_ids)
        torch.testing.assert_close(new.logits(b), old.logits(a), rtol=1e-4, atol=1e-4)


def test_a_coarse_token_reads_the_mean_of_four(internvl, tmp_path) -> None:
    report = retrofit(internvl, tmp_path / "pvc", PVCOptions(temporal=TEMPORAL, tokens=1))
    assert report.target == "pvc"
    assert "each token of 1 a tile reads the mean of 4" in report.notes[0]
    old, new = load_folder(internvl, dtype="float32"), load_pvc(tmp_path / "pvc", dtype="float32")
    wide = coarsened(old.model.embedder.connect.state_dict(), made.V_WIDTH, 2, 2)
    for name, value in wide.items():
        torch.testing.assert_close(new.model.embedder.connect.state_dict()[name], value)
    pixels = new.pixels(new.inputs(asked(picture())))
    seen = old.model.embedder.vision(pixels)
    torch.testing.assert_close(new.model.embedder.vision(pixels), seen)
    # Repeats of a model that was never trained are copies of each other.
    rows = new.model.embedder(new.inputs(asked(picture(40, 40))).sequence).x_TC
    span = new.inputs(asked(picture(40, 40))).sequence.spans[0]
    assert (span.repeats, span.length) == (4, 4)
    torch.testing.assert_close(rows[span.start + 1], rows[span.start])


def test_attention_over_time_starts_as_the_spatial_one_or_is_drawn(internvl, tmp_path) -> None:
    retrofit(internvl, tmp_path / "a", PVCOptions(temporal=TEMPORAL, tokens=1))
    retrofit(internvl, tmp_path / "b", PVCOptions(temporal=TEMPORAL, tokens=1, copy=False, seed=3))
    retrofit(internvl, tmp_path / "c", PVCOptions(temporal=TEMPORAL, tokens=1, copy=False, seed=3))
    with (
        CheckpointReader(tmp_path / "a") as a,
        CheckpointReader(tmp_path / "b") as b,
        CheckpointReader(tmp_path / "c") as c,
    ):
        layer = "vision_model.encoder.layers.1."
        for leaf in ("qkv.weight", "qkv.bias", "proj.weight"):
            copied = a.tensor(f"{layer}temporal.{leaf}")
            assert torch.equal(copied, a.tensor(f"{layer}attn.{leaf}"))
            drawn = b.tensor(f"{layer}temporal.{leaf}")
            assert torch.equal(drawn, c.tensor(f"{layer}temporal.{leaf}"))
            assert not torch.equal(drawn, copied)
        assert torch.equal(b.tensor(f"{layer}norm_t.weight"), b.tensor(f"{layer}norm1.weight"))
        assert not a.tensor(f"{layer}temporal.qkv.weight").isnan().any()
        assert not a.tensor(f"{layer}gate").any()


def test_every_new_tensor_has_a_name_of_its_own(internvl, tmp_path) -> None:
    retrofit(internvl, tmp_path / "pvc", PVCOptions(temporal=TEMPORAL, tokens=1))
    opened = open_pvc(tmp_path / "pvc")
    with opened.reader as reader:
        names = [spell_new(entry.native) for entry in new_entries(opened.config)]
        assert len(set(names)) == len(names)
        assert set(names) <= set(reader)
        assert {key.split(".")[0] for key in names} == {"vision_model", "mlp1"}
        assert not opened.adapter.unmapped(reader)
        assert all(reader.dtype(key) == torch.bfloat16 for key in names)
    config = json.loads((tmp_path / "pvc" / "config.json").read_text())
    assert config["model_type"] == "pvc_internvl"
    assert (config["image_repeat_time"], config["downsample_ratio"]) == (4, 0.25)
    assert "auto_map" not in config


def test_a_pvc_is_loaded_by_its_folder_and_chats(internvl, tmp_path) -> None:
    retrofit(internvl, tmp_path / "pvc", PVCOptions(temporal=TEMPORAL, tokens=1))
    model = chiasm.load(tmp_path / "pvc", dtype="float32", device="cpu")
    assert isinstance(model, PVCChat)
    assert isinstance(model, Chats)
    one = model.chat(asked(picture()), max_new_tokens=4)
    again = model.chat(asked(picture()), max_new_tokens=4)
    assert one.text == again.text
    assert again.usage["reused_tokens"] > 0 or again.usage["prompt_tokens"] < 64
    several = model.chat(asked(picture(), picture(30, 60, seed=2)), max_new_tokens=4)
    assert several.usage["tiles"] > one.usage["tiles"]
    film = model.chat(asked(FILM), max_new_tokens=4)
    assert film.usage["frames"] == 5
    mixed = model.batch([asked(FILM, picture()), asked(picture()), "Hi"], max_new_tokens=4)
    assert mixed[1].token_ids == one.token_ids
    assert "".join(model.stream(asked(FILM), max_new_tokens=4)) == film.text


def test_options_of_inference(internvl, tmp_path) -> None:
    retrofit(internvl, tmp_path / "pvc", PVCOptions(temporal=TEMPORAL, tokens=1))
    folder = tmp_path / "pvc"
    two = load_pvc(folder, repeats=2).inputs(asked(picture(40, 40))).sequence
    assert two.spans[0].repeats == 2
    settled = load_pvc(folder, anytime=0.01, dtype="float32")
    assert (
        settled.inputs(asked(picture())).sequence.spans[0].repeats == 1
    )  # never trained: all repeats are equal
    assert (
        settled.chat(asked(picture()), max_new_tokens=3).text
        == load_pvc(folder, repeats=1, dtype="float32").chat(asked(picture()), max_new_tokens=3).text
    )
    for views in ("crops", "scales"):
        seen = load_pvc(folder, views=views)  # in the bfloat16 that is stored
        assert seen.config.views == views
        assert len(seen.chat(asked(picture()), max_new_tokens=2).token_ids) <= 2
    assert chiasm.load(folder, repeats=3, max_tiles=1, device="cpu").spec.repeats == 3
    for given, error, said in (
        ({"repeats": 0}, ConfigError, "repeats must be a whole number of at least 1"),
        ({"repeats": 97}, ConfigError, "97 repeats are beyond the horizon of 96 frames"),
        ({"anytime": -1}, ConfigError, "share of change above 0"),
        ({"anytime": "little"}, ConfigError, "anytime is 'little'"),
        ({"anytime": 0.1, "views": "crops"}, ConfigError, "anytime compares equal repeats"),
        ({"views": "zoom"}, ConfigError, "views is 'zoom'"),
        ({"backend": "openvino"}, UsageError, "no temporal layers"),
    ):
        with pytest.raises(error, match=said):
            load_pvc(folder, **given)
    with pytest.raises(UsageError, match="option 'repeats' is not known"):
        chiasm.load(internvl, repeats=2, device="cpu")


def test_manifests_tell_options_apart(internvl, tmp_path) -> None:
    """Kept answers of one way to look at pictures must not be taken for those of another."""
    retrofit(internvl, tmp_path / "pvc", PVCOptions(temporal=TEMPORAL, tokens=1))
    ways = ({}, {"repeats": 2}, {"anytime": 0.1}, {"anytime": 0.2}, {"views": "crops"})
    facts = [json.dumps(describe(load_pvc(tmp_path / "pvc", **way))) for way in ways]
    assert len(set(facts)) == len(ways)
    assert facts[0] == json.dumps(describe(load_pvc(tmp_path / "pvc")))
    config = json.loads((tmp_path / "pvc" / "config.json").read_text())
    config["chiasm_pvc"]["temporal"]["time"] = "seconds"
    (tmp_path / "pvc" / "config.json").write_text(json.dumps(config))
    assert json.dumps(describe(load_pvc(tmp_path / "pvc"))) not in facts


def test_more_repeats_than_its_own_may_stop_early(internvl, tmp_path) -> None:
    """The repeats that remain are those that were looked at, at the same times, and are not encoded again."""
    retrofit(internvl, tmp_path / "pvc", PVCOptions(temporal=TEMPORAL, tokens=1, repeats=2))
    model = load_pvc(tmp_path / "pvc", dtype="float32", repeats=6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.model.embedder.named_parameters():
            if any(word in name for word in ("gate", "modulation", "own")):
                parameter.normal_(0, 0.3, generator=generator)
    whole = model.inputs(asked(picture(40, 40))).sequence
    (span,) = whole.spans
    with torch.no_grad():
        rows = model.model.embedder(whole).x_TC[span.start : span.start + span.length]
        steps = [float((rows[n] - rows[n - 1]).norm() / rows[n].norm()) for n in range(1, 6)]
        stop = steps.index(min(steps[1:]), 1)
        model.anytime = (steps[stop] + min(steps[:stop])) / 2
        fewer = model.inputs(asked(picture(40, 40))).sequence
        (kept,) = fewer.spans
        assert 1 < kept.repeats < 6
        got = model.model.embedder(fewer).x_TC[kept.start : kept.start + kept.length]
    torch.testing.assert_close(got, rows[: kept.repeats], rtol=1e-5, atol=1e-6)


def test_a_rounded_pvc_answers(internvl, tmp_path) -> None:
    retrofit(internvl, tmp_path / "pvc", PVCOptions(temporal=TEMPORAL, tokens=1))
    model = load_pvc(tmp_path / "pvc", quantize="int8", dtype="float32")
    assert model.quantized == "int8"
    assert len(model.chat(asked(FILM), max_new_tokens=3).token_ids) <= 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_numbers(internvl, tmp_path, dtype) -> None:
    retrofit(internvl, tmp_path / "pvc", PVCOptions(temporal=TEMPORAL, tokens=1))
    model, exact = (load_pvc(tmp_path / "pvc", dtype=kind) for kind in (dtype, "float32"))
    for messages in (asked(picture()), asked(FILM)):
        got = model.logits(model.inputs(messages), positions=[-1])
        expected = exact.logits(exact.inputs(messages), positions=[-1])
        assert float((got - expected).norm() / expected.norm()) < 0.1
    stream = model.watch(horizon=4.0)
    for n, image in enumerate(FILM):
        stream.add(image, float(n))
    assert len(stream.ask("What?", max_new_tokens=2).token_ids) <= 2


def test_too_many_frames_are_refused(internvl, tmp_path) -> None:
    temporal = TemporalConfig(layers=1, time_sines=8, time_width=6, max_frames=4)
    retrofit(internvl, tmp_path / "pvc", PVCOptions(temporal=temporal, tokens=1))
    model = load_pvc(tmp_path / "pvc", dtype="float32")
    assert model.spec.sampling is not None
    assert model.spec.sampling.frames == 4
    with pytest.raises(ContextOverflowError, match="5 frames are taken but the model looks at 4 at most"):
        model.chat(asked(FILM))
    with pytest.raises(ContextOverflowError):
        model.chat(asked(*[[picture(40, 40)] * 4] * 90))


def test_the_command_line_knows_the_folder(internvl, tmp_path, capsys) -> None:
    retrofit(internvl, tmp_path / "pvc", PVCOptions(temporal=TEMPORAL, tokens=1))
    assert main(["show", str(tmp_path / "pvc"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["layout"], said["repeats"], said["temporal"]["layers"]) == ("pvc", 4, 1)
    assert main(["plan", str(tmp_path / "pvc")]) == 2
    assert "plan its InternVL" in capsys.readouterr().err
    for to in ("hf", "gguf", "vision"):
        assert main(["convert", str(tmp_path / "pvc"), str(tmp_path / "hf"), "--to", to]) == 2
        assert "no other layout can hold" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    Image.fromarray(np.zeros((40, 40, 3), dtype=np.uint8)).save(tmp_path / "black.png")
    words = [
        "chat",
        "-m",
        str(tmp_path / "pvc"),
        "--device",
        "cpu",
        "--max-new-tokens",
        "2",
        str(tmp_path / "black.png"),
    ]
    assert main([*words, "--json", "What is it?"]) == 0
    assert json.loads(capsys.readouterr().out)["usage"]["tiles"] == 1


def test_data_are_counted_as_the_folder_lays_them_out(internvl, tmp_path, capsys) -> None:
    """Repeats, frames and the horizon are the model's own."""
    temporal = TemporalConfig(layers=1, time_sines=8, time_width=6, max_frames=8)
    retrofit(internvl, tmp_path / "pvc", PVCOptions(temporal=temporal, tokens=1, repeats=3))
    (tmp_path / "clip").mkdir()
    for n in range(12):
        picture(40, 40, seed=n).save(tmp_path / "clip" / f"{n:02}.png")
    picture(40, 40).save(tmp_path / "p.png")
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    rows = [{"image": "p.png", "conversations": said}, {"video": "clip", "conversations": said}]
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    words = [str(file), "--root", str(tmp_path), "--model", str(tmp_path / "pvc")]
    assert main(["data", "stats", *words]) == 0
    assert "(1, encoded 3 times)" in capsys.readouterr().out
    assert main(["data", "lint", *words, "--frames", "4,8"]) == 0
    capsys.readouterr()
    assert main(["data", "lint", *words, "--frames", "4,10"]) == 1
    assert "10 frames are taken but the model looks at 8 at most" in capsys.readouterr().out
    packed = [
        "data",
        "pack",
        *words,
        "--min-frames",
        "4",
        "--max-frames",
        "8",
        "--max-tokens",
        "512",
        "--json",
    ]
    assert main(packed) == 0


@pytest.mark.parametrize("family", ["internlm2", "qwen3"])
def test_other_language_families(tmp_path, monkeypatch, family) -> None:
    monkeypatch.setattr(made, "VOCAB", byte_level().vocab_size)
    folder = made.write_original(tmp_path / "internvl", family, force_image_size=SIDE, six_b=True)
    byte_level().save(folder)
    retrofit(folder, tmp_path / "pvc", PVCOptions(temporal=TEMPORAL, tokens=4, repeats=1))
    old, new = load_folder(folder, dtype="float32"), load_pvc(tmp_path / "pvc", dtype="float32")
    messages = asked(picture(40, 40))
    expected = old.logits(old.inputs(messages))
    torch.testing.assert_close(new.logits(new.inputs(messages)), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_made_a_pvc_is_said(internvl, tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot become one for 16: use fewer"):
        retrofit(internvl, tmp_path / "pvc", PVCOptions(temporal=TEMPORAL, tokens=16))
    with pytest.raises(ConfigError, match=r"temporal\.layers is 6, but the encoder has 2 layers"):
        retrofit(internvl, tmp_path / "pvc", PVCOptions(tokens=1))
    with pytest.raises(UsageError, match="lies in the source"):
        retrofit(internvl, internvl / "pvc", PVCOptions(temporal=TEMPORAL, tokens=1))
    with pytest.raises(UsageError, match="language model alone"):
        retrofit(made.write_text(tmp_path / "text"), tmp_path / "pvc", PVCOptions(temporal=TEMPORAL))
    assert not (tmp_path / "pvc").exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c: c.pop("chiasm_pvc"), "in the layout of its release"),
        (lambda c: c.pop("image_repeat_time"), "lacks 'image_repeat_time'"),
        (lambda c: c["chiasm_pvc"]["temporal"].update(layers=0), r"temporal\.layers is 0"),
        (lambda c: c["chiasm_pvc"]["temporal"].update(colour=1), "unknown key 'colour'"),
        (lambda c: c.update(model_type="internvl_chat"), "is no PVC checkpoint"),
        (lambda c: c["chiasm_pvc"]["temporal"].update(layers=2), "does not fit its config: missing"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(internvl, tmp_path, spoil, said) -> None:
    folder = tmp_path / "pvc"
    retrofit(internvl, folder, PVCOptions(temporal=TEMPORAL, tokens=1))
    config = json.loads((folder / "config.json").read_text())
    spoil(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, ConfigError), match=said) as caught:
        load_pvc(folder)
    assert "\n" not in str(caught.value)
