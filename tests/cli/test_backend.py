"""`--backend openvino` and `chiasm.load(…, backend="openvino")`: the same answers, the cache, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.cli.conftest import Run, read_lines

import chiasm
from chiasm.checkpoint.wheel import smollm2_folder
from chiasm.errors import CheckpointError, ConfigError, MissingExtraError, UsageError
from chiasm.model.openvino import export
from chiasm.model.openvino.check import Agreement

ASK = "What is this?"
SHORT = {"max_new_tokens": 8}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("CHIASM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    """What the cache holds, unfinished work included."""
    return sorted(path for path in cache.iterdir() if not path.name.endswith(".lock"))


def never(*_: object, **__: object) -> None:
    pytest.fail("the graphs were written again")


@pytest.mark.parametrize("family", ["original", "alone"])
def test_answers_are_those_of_pytorch(
    cache: Path, tiny: Path, tiny_words: Path, picture: Path, family: str
) -> None:
    folder = tiny if family == "original" else tiny_words
    ours = chiasm.load(folder, dtype="float32")
    compiled = chiasm.load(folder, dtype="float32", backend="openvino")
    shown = [picture] if family == "original" else []
    inputs = ours.inputs(ASK, shown)
    torch.testing.assert_close(compiled.logits(inputs), ours.logits(inputs), rtol=1e-4, atol=1e-4)
    expected = ours.chat(ASK, shown, **SHORT)
    assert compiled.chat(ASK, shown, **SHORT) == expected
    assert "".join(compiled.stream(ASK, shown, **SHORT)) == expected.text
    sampled = {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.2}
    assert compiled.chat("Why?", **SHORT, **sampled) == ours.chat("Why?", **SHORT, **sampled)
    talk = [
        {"role": "user", "content": ASK},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "What colour?"},
    ]
    conversations = [ASK, talk, "Why?"]
    together = compiled.batch(conversations, **SHORT)
    assert together == [compiled.chat(c, **SHORT) for c in conversations]
    assert [r.token_ids for r in together] == [ours.chat(c, **SHORT).token_ids for c in conversations]


def test_a_picture_is_encoded_once(cache: Path, tiny: Path, picture: Path) -> None:
    model = chiasm.load(tiny, backend="openvino")
    model.chat(ASK, [picture], **SHORT)
    model.chat("Is it a dog?", [picture], **SHORT)
    assert (model.features.misses, model.features.hits) == (1, 1)


def test_the_graphs_are_written_once(cache: Path, tiny: Path, monkeypatch, caplog) -> None:
    first = chiasm.load(tiny, backend="openvino").chat(ASK, **SHORT)
    assert "OpenVINO graphs written once" in caplog.text
    (entry,) = entries(cache)
    record = json.loads((entry / "entry.json").read_text(encoding="utf-8"))
    assert record["agreement"]["graph"] < 1e-3
    monkeypatch.setattr(export, "_build", never)
    assert chiasm.load(tiny, backend="openvino", system="").chat(ASK, **SHORT).token_ids
    assert chiasm.load(tiny, backend="openvino").chat(ASK, **SHORT) == first


def test_what_changes_makes_another_entry(cache: Path, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    tiny = Path(shutil.copytree(tiny, tmp_path / "tiny"))
    chiasm.load(tiny, backend="openvino")
    chiasm.load(tiny, backend="openvino", quantize="int8")
    assert len(entries(cache)) == 2
    weights = min(tiny.glob("*.safetensors"))
    state = weights.stat()
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns + 1))  # as if they had been written again
    chiasm.load(tiny, backend="openvino")
    monkeypatch.setattr(export, "_FORMAT", export._FORMAT + 1)
    chiasm.load(tiny, backend="openvino")
    assert len(entries(cache)) == 4


@pytest.mark.parametrize("damage", ["cut", "text", "record", "words"])
def test_a_damaged_entry_is_written_again(cache: Path, tiny: Path, caplog, damage: str) -> None:
    expected = chiasm.load(tiny, backend="openvino").chat(ASK, **SHORT)
    (entry,) = entries(cache)
    if damage == "cut":
        (entry / "decoder.bin").write_bytes((entry / "decoder.bin").read_bytes()[:-1])
    elif damage == "text":
        text = (entry / "head.xml").read_text(encoding="utf-8")
        (entry / "head.xml").write_text(text.replace("MatMul", "MatMal"), encoding="utf-8")
    elif damage == "record":
        (entry / "entry.json").write_text("{", encoding="utf-8")
    else:  # as long as it was, and noticed only when it is read
        size = (entry / "words.safetensors").stat().st_size
        (entry / "words.safetensors").write_bytes(b"\xff" * size)
    caplog.clear()
    assert chiasm.load(tiny, backend="openvino").chat(ASK, **SHORT) == expected
    assert "OpenVINO graphs written once" in caplog.text
    assert ("cannot be used" in caplog.text) == (damage == "words")
    assert entries(cache) == [entry]


def test_a_graph_that_disagrees_is_not_kept(cache: Path, tiny: Path, monkeypatch) -> None:
    monkeypatch.setattr(export, "agreement", lambda *_: Agreement(0.5, 0.5))
    with pytest.raises(ConfigError, match=r"OpenVINO graph of .* differs from the model by 5\.0e-01"):
        chiasm.load(tiny, backend="openvino")
    assert entries(cache) == []


def test_a_cache_that_cannot_be_written_is_named(cache: Path, tiny: Path) -> None:
    cache.write_text("a file", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cannot be written .*CHIASM_CACHE"):
        chiasm.load(tiny, backend="openvino")


def test_it_only_answers(cache: Path, tiny: Path) -> None:
    model = chiasm.load(tiny, backend="openvino")
    with pytest.raises(ConfigError, match="only answers"):
        model.model.loss(model.inputs(ASK).sequence)


def test_the_missing_extra_is_named(cache: Path, tiny: Path, monkeypatch) -> None:
    """Runs without openvino too."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        MissingExtraError, match=r"openvino is not installed: run pip install 'chiasm\[openvino\]'"
    ):
        chiasm.load(tiny, backend="openvino")
    assert not cache.exists()


def test_wrong_options_are_named_before_anything_is_read(tiny: Path) -> None:
    with pytest.raises(UsageError, match="backend 'openvin' is not known: use torch or openvino"):
        chiasm.load(tiny, backend="openvin")
    with pytest.raises(ConfigError, match="device 'cuda' does not go with the openvino backend"):
        chiasm.load(tiny, backend="openvino", device="cuda")
    with pytest.raises(ConfigError, match=r"dtype float64 is not one .*: use float32"):
        chiasm.load(tiny, backend="openvino", dtype=torch.float64)
    with pytest.raises(UsageError, match="use int8"):
        chiasm.load(tiny, backend="openvino", quantize="w8a8")
    assert chiasm.load(tiny, backend="torch").chat(ASK, **SHORT) == chiasm.load(tiny).chat(ASK, **SHORT)


def test_the_command_line_has_it(cache: Path, run: Run, tiny: Path, picture: Path) -> None:
    words = ("chat", picture, ASK, "--model", tiny, "--json", "--max-new-tokens", 8, "--dtype", "float32")
    expected = read_lines(run(*words).out)
    first = run(*words, "--backend", "openvino")
    assert read_lines(first.out) == expected
    assert "note: tiny: OpenVINO graphs written once" in first.err
    again = run(*words, "--backend", "openvino")
    assert (read_lines(again.out), again.err) == (expected, "")
    refused = run(*words, "--backend", "onnx")
    assert refused.code == 2
    assert refused.error_line == "error: backend 'onnx' is not known: use torch or openvino"


def test_progress_is_drawn_on_a_terminal_alone(cache: Path, tiny: Path, monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, pipe = Terminal(), io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    for stream, quantize in ((terminal, None), (pipe, "int8")):
        monkeypatch.setattr(sys, "stderr", stream)
        chiasm.load(tiny, backend="openvino", quantize=quantize)
    assert "tiny: writing OpenVINO graphs" in terminal.getvalue()
    assert "writing" not in pipe.getvalue()
    assert "\x1b" not in pipe.getvalue()


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_wheel")
def test_the_bundled_model_answers_the_same(tmp_path: Path, monkeypatch) -> None:
    """Real weights, adapters merged."""
    words = smollm2_folder()
    (tmp_path / words.name).symlink_to(words)
    monkeypatch.setenv("CHIASM_CACHE", str(tmp_path))
    ours = chiasm.load("chiasm-mini")
    compiled = chiasm.load("chiasm-mini", backend="openvino", dtype="float32")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for image in (Image.fromarray(pixels), Image.new("RGB", (80, 60), "red")):
        expected = ours.chat(ASK, [image], **SHORT)
        assert compiled.chat(ASK, [image], **SHORT) == expected
        inputs = ours.inputs(
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": ASK}]}]
        )
        torch.testing.assert_close(compiled.logits(inputs), ours.logits(inputs), rtol=1e-4, atol=2e-4)
