"""A small GGUF writer for tests: enough to make good files, and bad ones by hand.

Quantisers here only have to produce valid blocks; their quality does not matter.
"""

import struct
from pathlib import Path

import numpy as np

CODES = {"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12}


class Typed:
    """A metadata value with an explicit type code, where Python's own type does not say it."""

    def __init__(self, code, value):
        self.code, self.value = code, value


def text(value):
    raw = value.encode("utf-8") if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def typed(value):
    """Return (type code, bytes)."""
    if isinstance(value, Typed):
        form = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
        return value.code, struct.pack(form[value.code], value.value)
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, text(value)
    items = [typed(item) for item in value]
    code = items[0][0] if items else 4
    return 9, struct.pack("<IQ", code, len(items)) + b"".join(raw for _, raw in items)


def quantise(kind, array):
    """Return the stored bytes of a float32 array, blocks of 32 along the last axis."""
    array = np.asarray(array, dtype=np.float32)
    if kind == "F32":
        return array.astype("<f4").tobytes()
    if kind == "F16":
        return array.astype("<f2").tobytes()
    blocks = array.reshape(-1, 32)
    if kind == "Q8_0":
        d = (np.abs(blocks).max(1) / 127).astype(np.float16)
        safe = np.where(d == 0, 1, d).astype(np.float32)
        q = np.clip(np.rint(blocks / safe[:, None]), -128, 127).astype(np.int8)
        return b"".join(d[i].tobytes() + q[i].tobytes() for i in range(len(blocks)))
    if kind == "Q4_1":
        m = blocks.min(1).astype(np.float16)
        d = ((blocks.max(1) - blocks.min(1)) / 15).astype(np.float16)
        safe = np.where(d == 0, 1, d).astype(np.float32)
        q = np.clip(np.rint((blocks - m.astype(np.float32)[:, None]) / safe[:, None]), 0, 15).astype(np.uint8)
        packed = q[:, :16] | (q[:, 16:] << 4)
        return b"".join(d[i].tobytes() + m[i].tobytes() + packed[i].tobytes() for i in range(len(blocks)))
    return b"\0" * array.size


def gguf_bytes(metadata, tensors, *, version=3, alignment=32):
    """``tensors``: name -> (type name, float array). Return the file's bytes."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        code, raw = typed(value)
        head += text(key) + struct.pack("<I", code) + raw
    data = b""
    for name, (kind, array) in tensors.items():
        shape = np.asarray(array).shape[::-1]
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        head += struct.pack("<IQ", CODES[kind], len(data))
        data += quantise(kind, array)
        data += b"\0" * (-len(data) % alignment)
    return head + b"\0" * (-len(head) % alignment) + data


def write_gguf(path: Path, metadata, tensors, **kwargs) -> Path:
    path.write_bytes(gguf_bytes(metadata, tensors, **kwargs))
    return path


def tiny_vocabulary():
    """Tokens, types and merges of a byte-level vocabulary: 2 control tokens, 256 bytes, 4 merges."""
    from chiasm.text.tokenizer import byte_alphabet

    merges = ["h e", "l l", "he ll", "hell o"]
    tokens = ["<|im_start|>", "<|im_end|>", *byte_alphabet().values(), *(m.replace(" ", "") for m in merges)]
    return tokens, [3, 3] + [1] * (len(tokens) - 2), merges


def tiny_llama(
    *, tied=True, kinds=("Q8_0", "Q4_1"), layers=2, hidden=64, heads=4, kv_heads=2, inner=96, seed=0
):
    """Metadata and tensors of a random Llama with the vocabulary above; ``kinds``: types of words and matrices."""
    tokens, types, merges = tiny_vocabulary()
    rng = np.random.default_rng(seed)
    head = hidden // heads

    def random(*shape):
        return rng.standard_normal(shape, dtype=np.float32) * 0.1

    metadata = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.context_length": 128,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": inner,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": len(tokens),
        "llama.rope.dimension_count": head,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [Typed(5, t) for t in types],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    words, matrix = kinds
    tensors = {"token_embd.weight": (words, random(len(tokens), hidden))}
    for i in range(layers):
        tensors |= {
            f"blk.{i}.attn_norm.weight": ("F32", 1 + random(hidden)),
            f"blk.{i}.ffn_down.weight": (matrix, random(hidden, inner)),
            f"blk.{i}.ffn_gate.weight": (matrix, random(inner, hidden)),
            f"blk.{i}.ffn_up.weight": (matrix, random(inner, hidden)),
            f"blk.{i}.ffn_norm.weight": ("F32", 1 + random(hidden)),
            f"blk.{i}.attn_k.weight": (matrix, random(kv_heads * head, hidden)),
            f"blk.{i}.attn_output.weight": (matrix, random(hidden, heads * head)),
            f"blk.{i}.attn_q.weight": (matrix, random(heads * head, hidden)),
            f"blk.{i}.attn_v.weight": (matrix, random(kv_heads * head, hidden)),
        }
    tensors["output_norm.weight"] = ("F32", 1 + random(hidden))
    if not tied:
        tensors["output.weight"] = (words, random(len(tokens), hidden))
    return metadata, tensors
