"""The discovering converter: what is known, what is guessed, what is unknown; and never half a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.checkpoint import random_checkpoints as made

from chiasm.checkpoint.store import CheckpointReader
from chiasm.cli.app import main
from chiasm.errors import CheckpointError
from chiasm.systems.pvc.convert import open_pvc
from chiasm.systems.pvc.discover import convert_release, discover
from chiasm.systems.pvc.load import load_pvc
from tiny_tokenizers import byte_level

V, STACKED, SINES = made.V_WIDTH, 16 * made.V_WIDTH, 4
LAYER = "vision_model.encoder.layers.1."
NEW = {  # invented, as the release's are not known
    f"{LAYER}t_attn.qkv.weight": (3 * V, V),
    f"{LAYER}t_attn.qkv.bias": (3 * V,),
    f"{LAYER}t_attn.proj.weight": (V, V),
    f"{LAYER}t_attn.proj.bias": (V,),
    f"{LAYER}t_norm.weight": (V,),
    f"{LAYER}t_norm.bias": (V,),
    f"{LAYER}t_gate": (V,),
    f"{LAYER}adaLN_modulation.1.weight": (4 * V, V),
    f"{LAYER}adaLN_modulation.1.bias": (4 * V,),
    "vision_model.encoder.t_embedder.mlp.0.weight": (V, SINES),
    "vision_model.encoder.t_embedder.mlp.0.bias": (V,),
    "vision_model.encoder.t_embedder.mlp.2.weight": (V, V),
    "vision_model.encoder.t_embedder.mlp.2.bias": (V,),
    "mlp1.t_embedder.mlp.0.weight": (STACKED, SINES),
    "mlp1.t_embedder.mlp.0.bias": (STACKED,),
    "mlp1.t_embedder.mlp.2.weight": (STACKED, STACKED),
    "mlp1.t_embedder.mlp.2.bias": (STACKED,),
    "mlp1.adaLN_modulation.1.weight": (2 * STACKED, STACKED),
    "mlp1.adaLN_modulation.1.bias": (2 * STACKED,),
}


def release(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: tuple[int, ...] | None) -> Path:
    """A folder as the release's may be; `changes` by name, None takes a tensor away."""
    monkeypatch.setattr(made, "VOCAB", byte_level().vocab_size)
    config = made.original_config(
        force_image_size=56,
        downsample_ratio=0.25,
        model_type="pvc_internvl",
        image_repeat_time=4,
        video_repeat_time=1,
    )
    shapes = {**made.original_shapes(), **NEW}
    shapes |= {"mlp1.0.weight": (STACKED,), "mlp1.0.bias": (STACKED,), "mlp1.1.weight": (made.WIDTH, STACKED)}
    for name, shape in changes.items():
        shapes.pop(name) if shape is None else shapes.update({name: shape})
    made.write_folder(folder, config, made.random_tensors(shapes))
    byte_level().save(folder)
    return folder


def test_names_and_shapes_suggest_what_tensors_are(tmp_path, monkeypatch) -> None:
    found = discover(release(tmp_path / "r", monkeypatch))
    assert found.whole
    assert {f.key for f in found.guessed} == set(NEW)
    assert found.config is not None
    t = found.config.temporal
    assert (t.layers, t.gate, t.conditioned, t.conditioning) == (
        1,
        "channel",
        ("temporal", "ffn", "compress"),
        "full",
    )
    assert (t.time_sines, t.time_width, t.compress_time_width) == (SINES, V, STACKED)
    assert found.config.tokens_per_tile == 1


def test_guesses_must_be_confirmed(tmp_path, monkeypatch) -> None:
    folder = release(tmp_path / "r", monkeypatch)
    with pytest.raises(
        CheckpointError, match=r"is not converted: 19 only guessed .*--accept-guesses"
    ) as caught:
        convert_release(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    report = convert_release(folder, tmp_path / "out", accept_guesses=True)
    assert len(report.notes) == len({name.replace(".1.", ".") for name in NEW})
    model = load_pvc(tmp_path / "out", dtype="float32")
    assert len(model.chat("Hi", max_new_tokens=2).token_ids) <= 2
    with CheckpointReader(folder) as a:
        got = model.model.embedder.vision.layers[1].temporal.qkv.weight
        torch.testing.assert_close(got, a.tensor(f"{LAYER}t_attn.qkv.weight").float())
        got = model.model.embedder.connect.modulation.bias
        torch.testing.assert_close(got, a.tensor("mlp1.adaLN_modulation.1.bias").float())


def test_what_no_rule_knows_is_listed_and_stops(tmp_path, monkeypatch) -> None:
    folder = release(tmp_path / "r", monkeypatch, **{"mlp1.mixer.weight": (3, 5), f"{LAYER}puzzle": (2, 2)})
    found = discover(folder)
    assert {f.key for f in found.unknown} == {"mlp1.mixer.weight", f"{LAYER}puzzle"}
    assert any("unknown   mlp1.mixer.weight [3, 5] -> ?" in line for line in found.lines())
    with pytest.raises(CheckpointError, match=r"2 unknown \(first: "):
        convert_release(folder, tmp_path / "out", accept_guesses=True)
    names = {"mlp1.mixer.weight": "", "vision_model.encoder.layers.{i}.puzzle": ""}
    convert_release(folder, tmp_path / "out", names=names, accept_guesses=True)
    with open_pvc(tmp_path / "out").reader as reader:
        assert "mlp1.mixer.weight" not in reader


def test_names_win_over_guesses_and_make_one_of_three(tmp_path, monkeypatch) -> None:
    thirds = {
        f"{LAYER}time.{x}.{leaf}": (V, V) if leaf == "weight" else (V,)
        for x in "abc"
        for leaf in ("weight", "bias")
    }
    away = {f"{LAYER}t_attn.qkv.weight": None, f"{LAYER}t_attn.qkv.bias": None}
    folder = release(tmp_path / "r", monkeypatch, **thirds, **away)
    assert not discover(folder).whole
    general = "vision_model.encoder.layers.{i}."
    native = "embedder.vision.layers.{i}.temporal.qkv."
    names = {
        f"{general}time.{x}.{leaf}": f"{native}{leaf}:{third}"
        for x, third in zip("abc", "qkv", strict=True)
        for leaf in ("weight", "bias")
    }
    convert_release(folder, tmp_path / "out", names=names, accept_guesses=True)
    with CheckpointReader(folder) as a, CheckpointReader(tmp_path / "out") as b:
        expected = torch.cat([a.tensor(f"{LAYER}time.{x}.weight") for x in "abc"])
        assert torch.equal(b.tensor(f"{LAYER}temporal.qkv.weight"), expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({f"{LAYER}t_attn.proj.weight": None}, "1 without a tensor"),
        (
            {f"{LAYER}attn.proj.weight": None},
            r"1 missing \(first: vision_model.encoder.layers.1.attn.proj.weight",
        ),
        ({f"{LAYER}adaLN_modulation.1.weight": (9 * V, V)}, "9 x 8 rows is none of ours"),
        ({"mlp1.adaLN_modulation.1.weight": (3 * STACKED, STACKED)}, "unknown"),
        ({f"{LAYER}attn.proj.weight": (V, 2 * V)}, "1 of another shape"),
        (
            {name: None for name in NEW if name.startswith(LAYER)},
            "no tensor of a temporal layer was recognised",
        ),
    ],
)
def test_half_a_model_is_never_written(tmp_path, monkeypatch, changes, said) -> None:
    folder = release(tmp_path / "r", monkeypatch, **changes)
    with pytest.raises(CheckpointError, match=said):
        convert_release(folder, tmp_path / "out", accept_guesses=True)
    assert not (tmp_path / "out").exists()


def test_no_two_tensors_have_one_place(tmp_path, monkeypatch) -> None:
    """Else one of them would be left out without a word."""
    more = {f"{LAYER}puzzle.weight": (V, V), f"{LAYER}riddle.weight": (V, V)}
    folder = release(tmp_path / "r", monkeypatch, **more)
    place = "embedder.vision.layers.1.temporal.proj.weight"
    puzzle, riddle = more
    found = discover(folder, names={puzzle: place, riddle: ""})
    assert {f.key for f in found.unknown} == {f"{LAYER}t_attn.proj.weight"}
    with pytest.raises(CheckpointError, match=r"1 unknown \(first: .*t_attn\.proj\.weight"):
        convert_release(folder, tmp_path / "out", names={puzzle: place, riddle: ""}, accept_guesses=True)
    with pytest.raises(CheckpointError, match="are both named"):
        discover(folder, names={puzzle: place, riddle: place})
    names = {puzzle: place, riddle: "", f"{LAYER}t_attn.proj.weight": ""}
    convert_release(folder, tmp_path / "out", names=names, accept_guesses=True)
    with CheckpointReader(folder) as a, CheckpointReader(tmp_path / "out") as b:
        assert torch.equal(b.tensor(f"{LAYER}temporal.proj.weight"), a.tensor(puzzle))


def test_layers_are_folded_where_they_are_alike(tmp_path, monkeypatch) -> None:
    first = "vision_model.encoder.layers.0."
    folder = release(tmp_path / "r", monkeypatch, **{f"{first}puzzle": (2, 2), f"{LAYER}puzzle": (3, 2)})
    lines = [line for line in discover(folder).lines() if "puzzle" in line]
    assert [line.split(" -> ")[0] for line in lines] == [
        "unknown   vision_model.encoder.layers.{i}.puzzle [2, 2] (layers 0)",
        "unknown   vision_model.encoder.layers.{i}.puzzle [3, 2] (layers 1)",
    ]


def test_a_name_that_the_folder_has_not_is_refused(tmp_path, monkeypatch) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor mlp1\.nothing that InternVL lacks"):
        discover(release(tmp_path / "r", monkeypatch), names={"mlp1.nothing": ""})
    monkeypatch.setattr(made, "VOCAB", 40)
    with pytest.raises(CheckpointError, match="is no PVC checkpoint"):
        discover(made.write_original(tmp_path / "i"))


# The command ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def call(*words: object) -> Ran:
        code = main(["convert", *map(str, words)])
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    return call


def test_one_command_makes_a_pvc_of_an_internvl(tmp_path, monkeypatch, run) -> None:
    monkeypatch.setattr(made, "VOCAB", byte_level().vocab_size)
    folder = made.write_original(tmp_path / "i", force_image_size=56)
    byte_level().save(folder)
    sets = [
        "--set",
        "tokens=1",
        "--set",
        "temporal.layers=1",
        "--set",
        "temporal.time=seconds",
        "--set",
        "repeats=2",
    ]
    result = run(folder, tmp_path / "pvc", "--to", "pvc", *sets, "--json")
    assert result.code == 0, result
    assert json.loads(result.out)["target"] == "pvc"
    config = open_pvc(tmp_path / "pvc").config
    assert (config.repeats, config.temporal.time, config.temporal.layers) == (2, "seconds", 1)
    again = run(tmp_path / "pvc", tmp_path / "x", "--to", "pvc")
    assert again.code == 2
    assert again.err.splitlines() == [f"error: {tmp_path / 'pvc'} is a PVC folder of Chiasm already"]
    wrong = run(folder, tmp_path / "x", "--to", "pvc", "--set", "temporal.leyers=1")
    assert wrong.code == 2
    assert "did you mean 'layers'?" in wrong.err
    assert run(folder, tmp_path / "x", "--to", "hf", "--set", "tokens=1").code == 2
    assert run(folder, tmp_path / "x", "--to", "pvc", "--accept-guesses").code == 2
    assert run(folder, tmp_path / "x", "--to", "pvc", "--vocab-size", "99").code == 2


def test_the_command_reports_and_refuses_until_it_is_told(tmp_path, monkeypatch, run) -> None:
    folder = release(tmp_path / "r", monkeypatch, **{"mlp1.mixer.weight": (3, 5)})
    refused = run(folder, tmp_path / "out", "--to", "pvc")
    assert refused.code == 1
    assert "note: unknown mlp1.mixer.weight [3, 5] -> ?" in refused.err
    assert "note: guess mlp1.adaLN_modulation.1.weight" in refused.err
    assert refused.err.splitlines()[-1].startswith("error: ")
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"mlp1.mixer.weight": ""}))
    done = run(folder, tmp_path / "out", "--to", "pvc", "--names", names, "--accept-guesses")
    assert done.code == 0, done
    assert open_pvc(tmp_path / "out").config.temporal.conditioning == "full"
