"""What loading costs in anonymous memory: at most 1.15 times the checkpoint, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.checkpoint.random_checkpoints import IMAGE_TOKEN, language_config, vision_config

from chiasm.checkpoint.adapters import adapter_for
from chiasm.checkpoint.config import InternVLPublicConfig
from chiasm.checkpoint.store import Written, write_checkpoint

PROBE = Path(__file__).with_name("memory_probe.py")
LIMIT = 1.15

# A hundred megabytes take seconds on an idle machine; the limit is for a busy one.
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory"),
]


def write_large(folder: Path, layout: str, layers: int, vocab: int) -> tuple[Written, float]:
    """A random bf16 checkpoint in the shape of a small InternVL; returns its size and a sum over it."""
    text = language_config("qwen2") | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
    }
    vision = vision_config() | {"hidden_size": 256, "intermediate_size": 1024}
    public = InternVLPublicConfig(
        vision=vision, llm=text, ps_version="v2", image_token_id=IMAGE_TOKEN, dtype="bfloat16"
    )
    adapter = adapter_for(layout, language=public.language_config(), vision=public.vision_config())
    # One stretch of noise serves all tensors as a view: what is measured is size, and time is short.
    some = torch.randint(-100, 100, (1 << 20,), generator=torch.Generator().manual_seed(0)).bfloat16()
    noise = some.repeat(-(-vocab * 1024 // len(some)))
    total = 0.0

    def tensors():
        nonlocal total
        for entry in adapter.plan:
            size = torch.Size(entry.shape).numel()
            tensor = noise[:size].view(entry.shape)
            total += float(tensor.view(-1)[:1000].sum(dtype=torch.float64))
            yield entry.native, tensor

    config = public.to_original() if layout == "original" else public.to_hf()
    written = write_checkpoint(folder, adapter.to_public(tensors()), config, max_shard_bytes=100_000_000)
    return written, total


def probe(folder: Path, way: str = "ours") -> dict:
    command = [sys.executable, str(PROBE), str(folder), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(written: Written, total: float, result: dict) -> None:
    assert result["weights"] == written.bytes
    assert result["sum"] == pytest.approx(total, rel=1e-9)
    assert result["looks"] > 20
    assert result["peak"] >= 0.95 * written.bytes  # else the meter saw nothing
    assert result["peak"] <= LIMIT * written.bytes
    # The weights are our own, not pages of the file.
    assert result["after"] >= 0.95 * written.bytes


def test_peak_anonymous_memory(tmp_path):
    written, total = write_large(tmp_path / "model", "hf", layers=3, vocab=32_000)
    assert 200e6 < written.bytes < 300e6
    assert len(written.shards) > 1
    check(written, total, probe(tmp_path / "model"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["original", "hf", "hf-old"])
def test_peak_anonymous_memory_of_a_gigabyte(tmp_path, layout):
    written, total = write_large(tmp_path / "model", layout, layers=24, vocab=64_000)
    assert 0.95e9 < written.bytes < 1.1e9
    result = probe(tmp_path / "model")
    print(f"{layout}: {result['peak'] / written.bytes:.4f} of {written.bytes} bytes")
    check(written, total, result)


@pytest.mark.slow
def test_the_meter_sees_a_naive_load(tmp_path):
    written, _ = write_large(tmp_path / "model", "hf", layers=3, vocab=32_000)
    result = probe(tmp_path / "model", "naive")
    assert result["peak"] > 1.5 * written.bytes


@pytest.mark.slow
@pytest.mark.parametrize(("how", "most"), [("int8", 0.97), ("int4", 0.85)])
def test_the_unrounded_model_is_never_there(tmp_path, how, most):
    """A gigabyte in bf16; a quarter of it are the word table and the head, of which there are two for a moment."""
    written, _ = write_large(tmp_path / "model", "original", layers=24, vocab=64_000)
    result = probe(tmp_path / "model", how)
    print(f"{how}: peak {result['peak'] / written.bytes:.4f}, after {result['after'] / written.bytes:.4f}")
    assert result["peak"] < most * written.bytes
