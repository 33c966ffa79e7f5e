"""Folders of GGUF files: which are replaced, what is written without a word lost, and what is said about it."""

import json

import pytest
import torch
from tests.checkpoint.servable import write_servable
from tests.checkpoint.test_to_gguf import fields, native

from chiasm.checkpoint.convert import convert_part
from chiasm.checkpoint.gguf import GGUFFile
from chiasm.checkpoint.gguf_write import write_gguf
from chiasm.checkpoint.llamacpp import read_language
from chiasm.checkpoint.to_gguf import convert_to_gguf
from chiasm.errors import CheckpointError, UsageError


def test_folders(tmp_path):
    write_servable(tmp_path / "a")
    convert_to_gguf(tmp_path / "a", tmp_path / "b")
    with pytest.raises(CheckpointError, match="not empty"):
        convert_to_gguf(tmp_path / "a", tmp_path / "b")
    convert_to_gguf(tmp_path / "a", tmp_path / "b", dtype="bf16", force=True)
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"model-bf16.gguf", "mmproj-bf16.gguf"}
    write_servable(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"config.json was not written by .* is not replaced"):
        convert_to_gguf(tmp_path / "c", tmp_path / "a", force=True)
    with pytest.raises(UsageError, match="holds or lies in the source"):
        convert_to_gguf(tmp_path / "a", tmp_path / "a" / "b")
    with pytest.raises(UsageError, match="unknown element type 'q4'"):
        convert_to_gguf(tmp_path / "a", tmp_path / "d", dtype="q4")
    (tmp_path / "a" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        convert_to_gguf(tmp_path / "a", tmp_path / "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["llama-70b-Q4_K_M.gguf", "model-f16.gguf", "mmproj-f32.gguf"])
def test_foreign_gguf_files_are_kept(tmp_path, name):
    write_servable(tmp_path / "a")
    for content in (b"precious", None):
        (tmp_path / "b").mkdir(exist_ok=True)
        if content is None:  # a whole file of another program
            write_gguf(tmp_path / "b" / name, {"general.architecture": "llama"}, [])
        else:
            (tmp_path / "b" / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} was not written by chiasm convert"):
            convert_to_gguf(tmp_path / "a", tmp_path / "b", force=True)
        assert [path.name for path in (tmp_path / "b").iterdir()] == [name]


def test_a_full_disk_names_the_target(tmp_path, monkeypatch):
    import chiasm.checkpoint.gguf_write as module

    def full(*_):
        raise OSError(28, "No space left on device")

    write_servable(tmp_path / "a")
    monkeypatch.setattr(module, "_write_tensor", full)
    with pytest.raises(CheckpointError) as caught:
        convert_to_gguf(tmp_path / "a", tmp_path / "b")
    assert str(caught.value) == f"cannot write {tmp_path / 'b' / 'model-f32.gguf'}: No space left on device"


@pytest.mark.parametrize("half", ["model", "mmproj"])
def test_what_is_written_otherwise_than_planned_is_noticed(tmp_path, monkeypatch, half):
    import chiasm.checkpoint.to_gguf as module

    def forgetful(path, metadata, tensors, **options):
        return write_gguf(path, metadata, tensors[:-1] if path.name.startswith(half) else tensors, **options)

    write_servable(tmp_path / "a")
    monkeypatch.setattr(module, "write_gguf", forgetful)
    with pytest.raises(CheckpointError):
        convert_to_gguf(tmp_path / "a", tmp_path / "b")

    def other(path, metadata, tensors, **options):
        return write_gguf(path, {**metadata, "qwen2.rope.freq_base": 9_999.0}, tensors, **options)

    monkeypatch.setattr(module, "write_gguf", other)
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'b' / 'model-f32.gguf'} does not read back"):
        convert_to_gguf(tmp_path / "a", tmp_path / "b")


def test_mixed_element_types_keep_every_bit(tmp_path):
    from safetensors.torch import load_file, save_file

    write_servable(tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    stored = load_file(path)
    for name in stored:
        if "tok_embeddings" in name or "embed_tokens" in name or "gate_proj" in name:
            stored[name] = stored[name].to(torch.bfloat16)
        if "mlp1.3" in name or "down_proj" in name:
            stored[name] = stored[name].to(torch.float16)
    save_file(stored, path, {"format": "pt"})
    report = convert_to_gguf(tmp_path / "a", tmp_path / "b")
    _, tensors = native(tmp_path / "a")
    with GGUFFile(tmp_path / "b" / report.shards[0]) as file:
        found = dict(read_language(file)[1])
        types = {info.type for info in file.tensors.values()}
        assert file.tensors["token_embd.weight"].type == "BF16"
    assert types == {"F32", "BF16", "F16"}
    for name, tensor in found.items():
        assert torch.equal(tensor, tensors[name].float()), name
    with GGUFFile(tmp_path / "b" / report.shards[1]) as file:
        assert file.tensors["mm.model.mlp.3.weight"].type == "F16"
        assert torch.equal(
            file.tensor("mm.model.mlp.3.weight"), tensors["embedder.connect.fc2.weight"].float()
        )
    stored = {name: tensor.double() for name, tensor in stored.items()}
    save_file(stored, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="float64, which would lose digits"):
        convert_to_gguf(tmp_path / "a", tmp_path / "c")


def test_no_template_is_written_where_none_says_the_same(tmp_path):
    write_servable(tmp_path / "a", "internlm2", template="internvl_zh")
    path = tmp_path / "a" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "THE LANGUAGE MODEL'S"}))
    report = convert_to_gguf(tmp_path / "a", tmp_path / "b")
    metadata, _ = fields(tmp_path / "b" / "model-f32.gguf")
    assert "tokenizer.chat_template" not in metadata
    assert any("'internvl_zh' has no Jinja form" in note and "--template" in note for note in report.notes)
    report = convert_to_gguf(tmp_path / "a", tmp_path / "c", template="internlm2-chat")
    assert not any("Jinja" in note for note in report.notes)


def test_both_orders_of_position_rows(tmp_path):
    write_servable(tmp_path / "a")
    _, tensors = native(tmp_path / "a")
    rows = tensors["embedder.vision.position_embedding"][0]
    for order, wanted in (("class-first", rows), ("class-last", rows.roll(-1, dims=0))):
        report = convert_to_gguf(tmp_path / "a", tmp_path / order, position_rows=order)
        with GGUFFile(tmp_path / order / "mmproj-f32.gguf") as file:
            assert torch.equal(file.tensor("v.position_embd.weight"), wanted)
            assert file.metadata["chiasm.position_rows"] == order
            said = file.metadata["general.description"]
        assert said in report.notes
        assert "llama.cpp" in said
        assert "v0.5.0" in said
        assert "--position-rows" in said
    with pytest.raises(UsageError, match="use one of class-last, class-first"):
        convert_to_gguf(tmp_path / "a", tmp_path / "x", position_rows="last")
    convert_part(tmp_path / "a", tmp_path / "text", "language")
    assert not convert_to_gguf(tmp_path / "text", tmp_path / "y").notes
