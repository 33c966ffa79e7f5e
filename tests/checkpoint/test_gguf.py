"""The GGUF reader: decoding against slow twins, hostile files, the Llama mapping."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chiasm.checkpoint.gguf import GGUFFile, hf_llama_shapes, llama_config, to_hf_llama
from chiasm.errors import CheckpointError
from gguf_writer import Typed, gguf_bytes, quantise, text, tiny_llama, write_gguf

# --- slow, obviously right decoders ------------------------------------------------------------------------------


def half(raw):
    return struct.unpack("<e", raw)[0]


def f32(value):
    """Round to float32, as one float operation in C does."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def slow_f32(raw):
    return [struct.unpack("<f", raw[i : i + 4])[0] for i in range(0, len(raw), 4)]


def slow_f16(raw):
    return [half(raw[i : i + 2]) for i in range(0, len(raw), 2)]


def slow_q8_0(raw):
    out = []
    for start in range(0, len(raw), 34):
        d = half(raw[start : start + 2])
        out += [f32(struct.unpack("<b", raw[start + 2 + j : start + 3 + j])[0] * d) for j in range(32)]
    return out


def slow_q4_1(raw):
    out = []
    for start in range(0, len(raw), 20):
        d, m = half(raw[start : start + 2]), half(raw[start + 2 : start + 4])
        block = [0.0] * 32
        for j in range(16):
            byte = raw[start + 4 + j]
            block[j] = f32(f32((byte & 15) * d) + m)
            block[j + 16] = f32(f32((byte >> 4) * d) + m)
        out += block
    return out


SLOW = {"F32": (slow_f32, 4), "F16": (slow_f16, 2), "Q8_0": (slow_q8_0, 34), "Q4_1": (slow_q4_1, 20)}


def file_with_raw(path, kind, raw, shape):
    """A file with one tensor whose stored bytes are exactly ``raw``."""
    head = gguf_bytes({}, {"x": (kind, np.zeros(shape, np.float32))})
    path.write_bytes(head[: len(head) - (-(-len(raw) // 32) * 32)] + raw)
    return path


@pytest.mark.parametrize("kind", SLOW)
def test_decoding_equals_the_slow_twin(kind, tmp_path):
    slow, block_bytes = SLOW[kind]
    rng = np.random.default_rng(7)
    blocks = 4 * 12
    raw = bytearray(rng.integers(0, 256, blocks * block_bytes, dtype=np.uint8).tobytes())
    if kind in ("Q8_0", "Q4_1"):  # any finite half for the scales, subnormals included
        for start in range(0, len(raw), block_bytes):
            for field in range(0, 2 if kind == "Q8_0" else 4, 2):
                bits = int(rng.integers(0, 0x7C00)) | (int(rng.integers(0, 2)) << 15)
                raw[start + field : start + field + 2] = struct.pack("<H", bits)
    raw = bytes(raw)
    shape = (4, blocks // 4 * (32 if kind in ("Q8_0", "Q4_1") else 1))
    with GGUFFile(file_with_raw(tmp_path / "x.gguf", kind, raw, shape)) as file:
        got = file.tensor("x")
    assert got.dtype == torch.float32
    assert got.shape == shape
    want = torch.tensor(slow(raw), dtype=torch.float64).to(torch.float32).reshape(shape)
    assert torch.equal(got.nan_to_num(1.5), want.nan_to_num(1.5))


def test_known_block():
    d, m = np.float16(0.5), np.float16(-2.0)
    raw = d.tobytes() + m.tobytes() + bytes([0xF0 | 3] + [0] * 15)
    assert slow_q4_1(raw)[0] == 3 * 0.5 - 2
    assert slow_q4_1(raw)[16] == 15 * 0.5 - 2


def test_infinite_scale_is_kept_without_a_warning(tmp_path):
    raw = struct.pack("<e", float("inf")) + bytes(32)
    with GGUFFile(file_with_raw(tmp_path / "x.gguf", "Q8_0", raw, (1, 32))) as file:
        assert file.tensor("x").isnan().all()


def test_reading_agrees_with_the_gguf_package(tmp_path):
    import gguf

    metadata, tensors = tiny_llama()
    path = write_gguf(tmp_path / "x.gguf", metadata, tensors)
    theirs = gguf.GGUFReader(str(path))
    with GGUFFile(path) as ours:
        assert [t.name for t in theirs.tensors] == list(ours.tensors)
        for tensor in theirs.tensors:
            want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(ours.tensor(tensor.name).numpy(), want)
        for key, value in ours.metadata.items():
            assert theirs.get_field(key).contents() == value


def test_metadata_types_and_version_2(tmp_path):
    metadata = {
        "u8": Typed(0, 200),
        "i8": Typed(1, -3),
        "u16": Typed(2, 60000),
        "i16": Typed(3, -30000),
        "u32": 4_000_000_000,
        "i32": Typed(5, -5),
        "f32": 0.5,
        "yes": True,
        "text": "grüße",
        "u64": Typed(10, 2**63),
        "i64": Typed(11, -(2**62)),
        "f64": Typed(12, 1e300),
        "numbers": [1, 2, 3],
        "flags": [True, False],
        "words": ["a", "", "ü"],
        "nested": [[1, 2], [3]],
        "empty": [],
    }
    with GGUFFile(write_gguf(tmp_path / "x.gguf", metadata, {}, version=2)) as file:
        assert file.version == 2
        assert file.metadata == {k: v.value if isinstance(v, Typed) else v for k, v in metadata.items()}
        assert file.metadata["flags"][0] is True


def test_alignment_of_the_file_is_used(tmp_path):
    tensors = {"a": ("F32", np.arange(3)), "b": ("F32", np.arange(5))}
    path = write_gguf(tmp_path / "x.gguf", {"general.alignment": 256}, tensors, alignment=256)
    with GGUFFile(path) as file:
        assert file.tensors["b"].offset % 256 == 0
        assert file.tensor("b").tolist() == [0, 1, 2, 3, 4]


def test_axes_are_in_torch_order_and_scalars_work(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = write_gguf(tmp_path / "x.gguf", {}, {"m": ("F16", array), "s": ("F32", np.float32(4))})
    with GGUFFile(path) as file:
        matrix, scalar = file.tensor("m"), file.tensor("s")
    assert matrix.tolist() == array.tolist()  # also: usable after close
    assert scalar.shape == ()
    assert scalar.item() == 4


# --- bad files ---------------------------------------------------------------------------------------------------


def refused(path, *parts):
    with pytest.raises(CheckpointError) as caught:
        GGUFFile(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for part in parts:
        assert part in message
    return message


def head(tensors=0, values=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def entry(name="x", shape=(32,), code=0, offset=0):
    dims = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", code, offset)


BAD = {
    "empty": (b"", "empty file"),
    "short": (b"GG", "not a GGUF file"),
    "magic": (b"PK\3\4" + bytes(60), "not a GGUF file"),
    "header cut": (b"GGUF\3\0\0\0\1", "byte 8"),
    "version 1": (head(version=1), "version 1"),
    "version 9": (head(version=9), "version 9"),
    "big endian": (head(version=3 << 24), "big-endian"),
    "absurd metadata count": (head(values=2**63), "table of"),
    "absurd tensor count": (head(tensors=2**64 - 1), "table of"),
    "absurd key": (head(values=1) + struct.pack("<Q", 2**60) + bytes(64), "at most 65535"),
    "absurd string": (
        head(values=1) + text("k") + struct.pack("<IQ", 8, 2**62) + bytes(9),
        "are left at byte",
    ),
    "absurd array": (
        head(values=1) + text("k") + struct.pack("<IIQ", 9, 4, 2**62) + bytes(9),
        "are left at byte",
    ),
    "absurd string array": (
        head(values=1) + text("k") + struct.pack("<IIQ", 9, 8, 2**40),
        "are left at byte",
    ),
    "deep arrays": (
        head(values=1) + text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 99,
        "deeper",
    ),
    "value type": (head(values=1) + text("k") + struct.pack("<I", 77) + bytes(8), "unknown value type 77"),
    "array item type": (head(values=1) + text("k") + struct.pack("<IIQ", 9, 77, 1) + bytes(8), "type 77"),
    "not utf-8": (head(values=1) + text(b"\xff\xfe") + bytes(16), "not UTF-8"),
    "key twice": (head(values=2) + (text("k") + struct.pack("<IB", 0, 1)) * 2, "is there twice"),
    "tensor twice": (head(tensors=2) + entry() + entry(offset=128) + bytes(512), "is there twice"),
    "too many axes": (head(tensors=1) + entry(shape=(1,) * 5) + bytes(512), "5 axes"),
    "too large tensor": (head(tensors=1) + entry(shape=(2**40, 2**40)) + bytes(512), "ends at byte"),
    "overflowing shape": (head(tensors=1) + entry(shape=(2**63, 2)) + bytes(512), "ends at byte"),
    "far offset": (head(tensors=1) + entry(offset=2**62) + bytes(512), "ends at byte"),
    "odd offset": (head(tensors=1) + entry(offset=3) + bytes(512), "no multiple of 32"),
    "half block": (head(tensors=1) + entry(shape=(33,), code=8) + bytes(512), "whole Q8_0 blocks"),
    "overlap": (head(tensors=2) + entry("a") + entry("b", offset=96) + bytes(512), "overlap"),
    "alignment 0": (
        head(values=1) + text("general.alignment") + struct.pack("<II", 4, 0) + bytes(64),
        "not a power of two",
    ),
    "alignment text": (
        head(values=1) + text("general.alignment") + struct.pack("<I", 8) + text("x"),
        "power of two",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_line(name, tmp_path):
    data, part = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    refused(path, part)


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "none.gguf", "cannot be opened")
    refused(tmp_path, "cannot be opened")


def test_every_truncation_is_refused(tmp_path):
    metadata, tensors = tiny_llama(layers=1)
    whole = gguf_bytes(
        {"general.architecture": "llama", "words": ["a", "bc"]}, {"x": ("Q4_1", np.ones((2, 32)))}
    )
    path = tmp_path / "cut.gguf"
    stored = len(whole) - (-(2 * 20) % 32)  # the last padding may be missing
    for length in range(stored):
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole[:stored])
    GGUFFile(path).close()
    big = gguf_bytes(metadata, tensors)
    path.write_bytes(big[: len(big) * 2 // 3])
    refused(path, "at byte", "damaged")


@given(st.data())
def test_flipped_bytes_never_escape_the_error_type(tmp_path_factory, data):
    whole = bytearray(gguf_bytes({"a": "b", "c": [1, 2], "d": ["x"]}, {"x": ("Q8_0", np.ones((2, 32)))}))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "flip.gguf"
    path.write_bytes(bytes(whole))
    message = ""
    try:
        with GGUFFile(path) as file:
            for name in file.tensors:
                file.tensor(name)
    except CheckpointError as error:
        message = str(error)
    assert "\n" not in message


def test_unsupported_type_names_it_only_when_used(tmp_path):
    path = write_gguf(
        tmp_path / "x.gguf", {"k": 1}, {"x": ("Q4_K", np.ones((1, 256))), "y": ("F32", np.ones(2))}
    )
    with GGUFFile(path) as file:
        assert file.metadata == {"k": 1}
        assert file.tensor("y").tolist() == [1, 1]
        with pytest.raises(CheckpointError, match=r"'x' has type Q4_K.*F32, F16, Q4_1, Q8_0"):
            file.tensor("x")
        with pytest.raises(CheckpointError, match="no tensor 'z'"):
            file.tensor("z")


# --- the Llama mapping -------------------------------------------------------------------------------------------


def permute(weight, heads):
    """The writer's side: (head, half, pair) rows -> (head, pair, half), spelled out row by row."""
    rows = weight.shape[0]
    pairs = rows // heads // 2
    out = np.empty_like(weight)
    for head_index in range(heads):
        for pair in range(pairs):
            for side in range(2):
                base = head_index * 2 * pairs
                out[base + 2 * pair + side] = weight[base + side * pairs + pair]
    return out


@pytest.mark.parametrize("tied", [True, False])
def test_llama_names_shapes_and_permutation(tied, tmp_path):
    metadata, tensors = tiny_llama(tied=tied, kinds=("F32", "F32"))
    original = {name: np.array(array) for name, (_, array) in tensors.items()}
    for name, (kind, array) in list(tensors.items()):
        if "attn_q" in name or "attn_k" in name:
            tensors[name] = (kind, permute(array, 4 if "attn_q" in name else 2))
    with GGUFFile(write_gguf(tmp_path / "x.gguf", metadata, tensors)) as file:
        state = dict(to_hf_llama(file))
        assert {n: tuple(t.shape) for n, t in state.items()} == hf_llama_shapes(file)
        assert list(state) == list(hf_llama_shapes(file))
    assert ("lm_head.weight" in state) is not tied
    assert len(state) == len(tensors)
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
        "model.layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight",
        "model.layers.1.self_attn.v_proj.weight": "blk.1.attn_v.weight",
        "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
        "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
        "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
        "model.norm.weight": "output_norm.weight",
    }
    for ours, theirs in pairs.items():
        np.testing.assert_array_equal(state[ours].numpy(), original[theirs], err_msg=ours)


def test_config_values(tmp_path):
    metadata, tensors = tiny_llama()
    with GGUFFile(write_gguf(tmp_path / "x.gguf", metadata, tensors)) as file:
        config = llama_config(file.metadata, file.tensors)
    expected = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": 262,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,  # not 9.999999747378752e-06
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    assert expected.items() <= config.items()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"general.architecture": "qwen2"}, "architecture 'qwen2'"),
        ({"llama.rope.scaling.type": "yarn"}, "scales its rotary"),
        ({"llama.embedding_length": 0}, "embedding_length"),
        ({"llama.embedding_length": "many"}, "embedding_length"),
        ({"llama.attention.head_count_kv": 3}, "do not fit"),
        ({"llama.rope.dimension_count": 8}, "do not fit"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "positive number"),
        ({"llama.block_count": 2_000_000_000}, "incomplete"),
        ({"llama.feed_forward_length": 128}, "has shape"),
        ({"llama.block_count": 1}, "no place"),
    ],
)
def test_impossible_llama_is_refused(change, part, tmp_path):
    metadata, tensors = tiny_llama()
    with (
        GGUFFile(write_gguf(tmp_path / "x.gguf", metadata | change, tensors)) as file,
        pytest.raises(CheckpointError, match=part) as caught,
    ):
        next(to_hf_llama(file))
    assert str(file.path) in str(caught.value)


def test_missing_and_foreign_tensors_are_named(tmp_path):
    metadata, tensors = tiny_llama()
    less = {k: v for k, v in tensors.items() if k != "blk.1.ffn_up.weight"} | {"dummy": ("F32", np.ones(2))}
    for change, part in (
        (less, r"'blk.1.ffn_up.weight' is missing"),
        (tensors | {"blk.0.attn_q.bias": ("F32", np.ones(64))}, "bias tensors"),
        (tensors | {"rope_freqs.weight": ("F32", np.ones(8))}, "rotary frequencies"),
        (tensors | {"strange.weight": ("F32", np.ones(8))}, "no place.*strange.weight"),
    ):
        path = write_gguf(tmp_path / "x.gguf", metadata, change)
        with GGUFFile(path) as file, pytest.raises(CheckpointError, match=part):
            hf_llama_shapes(file)


def test_the_writer_makes_valid_blocks():
    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    for kind, tolerance in (("Q8_0", 0.01), ("Q4_1", 0.05)):
        got = np.array(SLOW[kind][0](quantise(kind, values))).reshape(2, 32)
        assert np.abs(got - values).max() < tolerance
