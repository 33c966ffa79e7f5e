"""Checkpoint folders: lazy reading, atomic writing, and what hostile or broken files are answered with."""

import json
import os
import struct
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.checkpoint.random_checkpoints import write_folder, write_sharded

from chiasm.checkpoint import store
from chiasm.checkpoint.store import CheckpointReader, read_json, write_checkpoint, write_safetensors
from chiasm.errors import CheckpointError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
]


def few(dtype=torch.float32):
    return {f"t{i}": torch.arange(4 * i + 4, dtype=dtype).reshape(i + 1, 4) for i in range(5)}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def fails(match):
    return pytest.raises(CheckpointError, match=match)


# --- reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_folder, write_sharded])
def test_reads_what_safetensors_wrote(tmp_path, write):
    tensors = few(torch.bfloat16)
    write(tmp_path, {"model_type": "x"}, tensors)
    with CheckpointReader(tmp_path) as reader:
        assert sorted(reader.keys()) == sorted(reader) == sorted(tensors)
        assert len(reader) == 5
        assert "t1" in reader
        assert "no" not in reader
        for name, tensor in tensors.items():
            assert reader.shape(name) == tuple(tensor.shape)
            assert reader.dtype(name) is torch.bfloat16
            assert reader.nbytes(name) == tensor.nbytes
            assert same(reader.tensor(name), tensor)
        assert reader.config == {"model_type": "x"}


def test_a_tensor_outlives_the_reader(tmp_path):
    write_folder(tmp_path, {}, few())
    with CheckpointReader(tmp_path) as reader:
        kept = reader.tensor("t4")
    assert same(kept, few()["t4"])


def test_one_file_goes_before_an_index(tmp_path):
    write_sharded(tmp_path, {}, few(), 2)
    write_folder(tmp_path, {}, {"only": torch.zeros(2)})
    assert CheckpointReader(tmp_path).keys() == ["only"]


def test_missing_folder_file_instead_and_empty_folder(tmp_path):
    with fails("does not exist"):
        CheckpointReader(tmp_path / "no")
    (tmp_path / "file").write_text("x")
    with fails("is a file, not a folder"):
        CheckpointReader(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with fails("neither model.safetensors nor model.safetensors.index.json"):
        CheckpointReader(tmp_path / "empty")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_with_a_remedy(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with fails(f"only pickled weights \\({name}\\).*save them as safetensors"):
        CheckpointReader(tmp_path)


def test_a_differently_named_file_is_pointed_at(tmp_path):
    save_file(few(), tmp_path / "weights.safetensors")
    with fails("rename"):
        CheckpointReader(tmp_path)


def test_missing_shard_is_named_with_what_it_holds(tmp_path):
    write_sharded(tmp_path, {}, few(), 2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with fails(r"shard model-00002-of-00002.safetensors is missing .* it holds 2 tensors \(t1, t3\)"):
        CheckpointReader(tmp_path)


def test_index_that_promises_too_much(tmp_path):
    write_sharded(tmp_path, {}, few(), 2)
    path = tmp_path / store.INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with fails("lacks the tensor ghost that model.safetensors.index.json promises"):
        CheckpointReader(tmp_path).shape("ghost")


@pytest.mark.parametrize(
    "place",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a/model.safetensors",
        "a\\model.safetensors",
        "C:model.safetensors",
        "..",
        "",
        "model.bin",
        "x\0.safetensors",
        3,
        None,
        ["model.safetensors"],
    ],
)
def test_index_must_stay_in_its_folder(tmp_path, place):
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file(few(), tmp_path / "model.safetensors")
    (inner / store.INDEX).write_text(json.dumps({"weight_map": {"t1": place}}))
    with fails("must be a .safetensors file in the same folder"):
        CheckpointReader(inner)


def test_links_inside_the_folder_are_followed(tmp_path):
    """Hub caches are folders of links into a store of blobs."""
    save_file(few(), tmp_path / "blob")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / store.SINGLE).symlink_to(tmp_path / "blob")
    assert len(CheckpointReader(folder)) == 5


@pytest.mark.parametrize("text", ['{"weight_map": 3}', '{"weight_map": {}}', "{}", "[]"])
def test_index_without_a_table(tmp_path, text):
    (tmp_path / store.INDEX).write_text(text)
    with fails("weight_map|JSON object"):
        CheckpointReader(tmp_path)


def broken(length, header=b"{}", data=b""):
    return struct.pack("<Q", length) + header + data


HOSTILE = {
    "empty file": (b"", "has 0 bytes"),
    "five bytes": (b"\0" * 5, "has 5 bytes"),
    "header of 2^63 bytes": (broken(1 << 63), "announces a header of 9223372036854775808 bytes"),
    "header of 2^64-1 bytes": (broken((1 << 64) - 1), "announces a header"),
    "header of 200 MB": (broken(200_000_000), "announces a header"),
    "header beyond the file": (broken(1000), "truncated: its header needs 1008 bytes, the file has 10"),
    "header is no JSON": (broken(4, b"abcd"), "truncated or damaged"),
    "header is a list": (broken(2, b"[]"), "truncated or damaged"),
    "header is not UTF-8": (broken(4, b"\xff\xfe\xff\xfe"), "truncated or damaged"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "html page": (b"<!DOCTYPE html><html>" * 50, "announces a header"),
}


def header(entry):
    text = json.dumps({"t": entry}).encode()
    return text, len(text)


for _name, _entry, _size in [
    ("data beyond the file", {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, 4),
    ("offsets backwards", {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}, 16),
    ("offsets and shape disagree", {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}, 16),
    ("shape overflows", {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 16]}, 16),
    ("negative shape", {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}, 16),
    ("bytes left over", {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, 40),
    ("unknown dtype", {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}, 16),
]:
    _text, _length = header(_entry)
    HOSTILE[_name] = (broken(_length, _text, b"\0" * _size), "truncated or damaged")


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_safetensors(tmp_path, case):
    content, message = HOSTILE[case]
    (tmp_path / store.SINGLE).write_bytes(content)
    with fails(message) as caught:
        CheckpointReader(tmp_path)
    assert "\n" not in str(caught.value)


def test_truncated_file_of_a_real_checkpoint(tmp_path):
    write_folder(tmp_path, {}, few())
    path = tmp_path / store.SINGLE
    os.truncate(path, path.stat().st_size - 1)
    with fails("truncated or damaged"):
        CheckpointReader(tmp_path)


@settings(max_examples=50)
@given(noise=st.binary(max_size=200))
def test_any_bytes_are_answered_with_an_error_of_ours(tmp_path_factory, noise):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / store.SINGLE).write_bytes(noise)
    with pytest.raises(CheckpointError):
        CheckpointReader(folder)


def test_unknown_tensor(tmp_path):
    write_folder(tmp_path, {}, few())
    for ask in ("shape", "dtype", "tensor", "nbytes"):
        with fails("has no tensor nope"):
            getattr(CheckpointReader(tmp_path), ask)("nope")


def test_missing_config(tmp_path):
    write_folder(tmp_path, {}, few())
    (tmp_path / "config.json").unlink()
    with fails("has no config.json"):
        _ = CheckpointReader(tmp_path).config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n"a": 1,\n"b" 2\n}', r"config.json:3: not valid JSON"),
        (b"", r"config.json:1: not valid JSON"),
        (b"[1]", r"a JSON object was expected, found list"),
        (b'{"a": "\xff"}', r"not UTF-8"),
        (b"[" * 200_000, r"not a sensible JSON|not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", r"not a sensible JSON"),
    ],
)
def test_malformed_json_names_file_and_line(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with fails(message):
        read_json(path)


def test_json_with_a_byte_order_mark(tmp_path):
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "c.json") == {"a": 1}
    with fails("cannot read"):
        read_json(tmp_path / "none.json")


# --- writing ---------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    spec=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=6
    ),
    limit=st.integers(1, 200),
)
def test_round_trip_of_any_tensors(tmp_path_factory, spec, limit):
    folder = tmp_path_factory.mktemp("trip") / "out"
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"n{i}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for i, (dtype, shape) in enumerate(spec)
    }
    written = write_checkpoint(folder, tensors.items(), {"a": 1}, max_shard_bytes=limit)
    reader = CheckpointReader(folder)
    assert sorted(reader.keys()) == sorted(tensors)
    assert all(same(reader.tensor(name), tensor) for name, tensor in tensors.items())
    assert written.tensors == len(tensors)
    assert written.bytes == sum(tensor.nbytes for tensor in tensors.values())
    # The package's own reader agrees, whole file by whole file.
    loaded = {k: v for shard in written.shards for k, v in load_file(folder / shard).items()}
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


def test_shards_and_index(tmp_path):
    tensors = few()  # 16, 32, 48, 64, 80 bytes
    written = write_checkpoint(
        tmp_path / "out", tensors.items(), {}, max_shard_bytes=100, metadata={"made": "x"}
    )
    assert written.shards == tuple(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    index = read_json(tmp_path / "out" / store.INDEX)
    assert index["metadata"]["total_size"] == 240
    assert index["weight_map"]["t3"] == "model-00002-of-00003.safetensors"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [*written.shards, store.INDEX, "config.json"]
    )
    with safe_open(tmp_path / "out" / written.shards[0], "pt") as file:
        assert file.metadata() == {"format": "pt", "made": "x"}


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    tensors = {"a": torch.zeros(2), "big": torch.zeros(100), "b": torch.zeros(2)}
    written = write_checkpoint(tmp_path / "out", tensors.items(), {}, max_shard_bytes=64)
    assert len(written.shards) == 3


def test_views_and_non_contiguous_tensors(tmp_path):
    whole = torch.arange(24.0).reshape(6, 4)
    tensors = {"top": whole[:2], "bottom": whole[2:], "turned": whole.T, "whole": whole}
    write_safetensors(tmp_path / "f.safetensors", tensors.items())
    loaded = load_file(tmp_path / "f.safetensors")
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


def test_one_shard_in_memory_at_most(tmp_path):
    alive = weakref.WeakSet()
    most = 0

    def stream():
        nonlocal most
        for i in range(20):
            tensor = torch.zeros(25)
            alive.add(tensor)
            most = max(most, len(alive))
            yield f"t{i}", tensor
            del tensor

    write_checkpoint(tmp_path / "out", stream(), {}, max_shard_bytes=400)  # four tensors a shard
    assert most <= 5  # a full shard, and the one that does not fit any more


def test_further_files(tmp_path):
    (tmp_path / "src.txt").write_text("from a path")
    files = {"a.txt": "text é", "b.bin": b"\0\1", "c.txt": tmp_path / "src.txt"}
    write_checkpoint(tmp_path / "out", few().items(), {"k": "é"}, files=files)
    assert (tmp_path / "out" / "a.txt").read_text(encoding="utf-8") == "text é"
    assert (tmp_path / "out" / "b.bin").read_bytes() == b"\0\1"
    assert (tmp_path / "out" / "c.txt").read_text() == "from a path"
    assert read_json(tmp_path / "out" / "config.json") == {"k": "é"}


def test_an_existing_folder_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(out, few().items(), {})  # empty: fine
    with fails("exists and is not empty"):
        write_checkpoint(out, {"new": torch.ones(1)}.items(), {})
    assert len(CheckpointReader(out)) == 5
    write_checkpoint(out, {"new": torch.ones(1)}.items(), {}, force=True)
    assert CheckpointReader(out).keys() == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_never_empties_a_folder_that_is_no_checkpoint(tmp_path):
    home = tmp_path / "home"
    (home / "photos").mkdir(parents=True)
    (home / "config.json").write_text("{}")
    with fails("is not a checkpoint folder"):
        write_checkpoint(home, few().items(), {}, force=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with fails("is not a checkpoint folder"):
        write_checkpoint(other, few().items(), {}, force=True)
    (tmp_path / "file").write_text("x")
    with fails("is a file"):
        write_checkpoint(tmp_path / "file", few().items(), {}, force=True)


def test_a_failure_leaves_nothing_and_keeps_the_old(tmp_path):
    out = tmp_path / "out"
    write_checkpoint(out, few().items(), {})

    def stream():
        yield "a", torch.ones(4)
        raise RuntimeError("source fell over")

    with pytest.raises(RuntimeError, match="fell over"):
        write_checkpoint(out, stream(), {}, force=True)
    with pytest.raises(RuntimeError, match="fell over"):
        write_checkpoint(tmp_path / "new", stream(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert len(CheckpointReader(out)) == 5


def test_what_cannot_be_written(tmp_path):
    with fails("occurs twice"):
        write_checkpoint(tmp_path / "a", [("x", torch.ones(1)), ("x", torch.ones(1))], {})
    with fails("occurs twice"):
        write_checkpoint(tmp_path / "a", [("x", torch.ones(1)), ("x", torch.ones(1))], {}, max_shard_bytes=1)
    with fails("reserved"):
        write_checkpoint(tmp_path / "a", [("__metadata__", torch.ones(1))], {})
    with fails("there are no tensors"):
        write_checkpoint(tmp_path / "a", [], {})
    with fails("max_shard_bytes"):
        write_checkpoint(tmp_path / "a", few().items(), {}, max_shard_bytes=0)
    with fails("dtype torch.complex128"):
        write_checkpoint(tmp_path / "a", [("x", torch.ones(1, dtype=torch.complex128))], {})
    (tmp_path / "file").write_text("x")
    with fails("cannot write"):
        write_checkpoint(tmp_path / "file" / "below", few().items(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    real = os.fsync

    def full(handle):
        real(handle)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with fails("No space left on device"):
        write_checkpoint(tmp_path / "out", few().items(), {})
    assert list(tmp_path.iterdir()) == []
