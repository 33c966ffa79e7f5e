"""What a model costs, on paper: parameters, multiplications, memory and time from configs alone.

Pure functions of configs and counts; nothing is built, nothing is measured but by `measure`. The tests hold them
against the real thing: parameters against modules on the meta device, FLOPs against torch's `FlopCounterMode`, cache
bytes against the cache's tensors, activations against the storages that are alive during a forward pass.

Conventions
- A FLOP is one multiplication or one addition: an (m, k) x (k, n) product is 2·m·k·n. Counted are matrix products, the
  patch convolution and both products of attention; biases, norms, activations, rotary turns and softmax are not (below
  1 % at released sizes). That is what torch's `FlopCounterMode` counts.
- Causal attention: a query sees itself and what is before it, so n new rows after p cached ones look at
  n·p + n·(n + 1) / 2 pairs (``causal="visible"``). `FlopCounterMode` and many papers count the whole rectangle,
  n·(p + n) (``causal="full"``), which kernels that skip the masked half do not compute.
- Time is a roofline for each stage: the larger of FLOPs / (machine FLOP/s · share) and bytes / (bandwidth · share),
  where the bytes are the weights and cached keys and values that must be read. Nothing is added for launching kernels,
  preprocessing or waiting, so very small models take longer than their estimate.
- Activations are counted in the model's dtype; norms that compute in float32 on a CPU are not added.

Legend: T tokens of a tile with its class token, C width, I inner width, H/G query and key/value heads, D head width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from chiasm.errors import ConfigError

if TYPE_CHECKING:
    from chiasm.parts.language.config import LanguageConfig
    from chiasm.parts.vision.internvit import InternViTConfig

__all__ = [
    "BYTES",
    "CHUNK",
    "DEVICES",
    "Machine",
    "cache_bytes",
    "cache_rows",
    "decode_flops",
    "head_flops",
    "language_activations",
    "language_flops",
    "language_parameters",
    "measure",
    "named_machine",
    "projector_flops",
    "projector_parameters",
    "vision_activations",
    "vision_flops",
    "vision_parameters",
]

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one number."""
CHUNK = 16
"""Most tiles that are encoded at once (`chiasm.parts.embed.encode_spans`)."""
GENERATED_ROOM = 256
"""Rows for an answer that the generation loop allocates at once."""

Causal = Literal["visible", "full"]


# Parameters ------------------------------------------------------------------------------------------------------


def vision_parameters(c: InternViTConfig) -> int:
    """Class token, patch projection, positions, and for each layer two norms, attention, MLP and two gains."""
    width, inner = c.hidden_size, c.intermediate_size
    norm = width * (2 if c.norm == "layer_norm" else 1)
    attention = 3 * width * width + 3 * width * c.qkv_bias + 2 * width * c.qk_norm + width * width + width
    mlp = 2 * width * inner + inner + width
    patches = width * c.channels * c.patch_size**2 + width
    return width + patches + (1 + c.tokens) * width + c.layers * (2 * norm + attention + mlp + 2 * width)


def projector_parameters(inputs: int, width: int) -> int:
    """A LayerNorm over `inputs` and two linear layers to `width`."""
    return 2 * inputs + (inputs * width + width) + (width * width + width)


def language_parameters(c: LanguageConfig) -> dict[str, int]:
    """Words, layers (with the final norm) and head; the head has none where it is the word table."""
    width, table = c.hidden_size, c.vocab_size * c.hidden_size
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    attention = (q + 2 * kv) * (width + c.qkv_bias) + 2 * c.head_dim * c.qk_norm + q * width
    layer = 2 * width + attention + 3 * width * c.intermediate_size
    return {"words": table, "layers": c.layers * layer + width, "head": 0 if c.tie_words else table}


# FLOPs -----------------------------------------------------------------------------------------------------------


def vision_flops(c: InternViTConfig, tiles: int = 1, *, select_layer: int = -1) -> int:
    """Encode tiles: each 2·P·C·channels·patch² + layers · (8·T·C² + 4·T·C·I + 4·T²·C), P = T - 1.

    Layers after `select_layer` do not run.
    """
    width, rows = c.hidden_size, 1 + c.tokens
    layer = 8 * rows * width**2 + 4 * rows * width * c.intermediate_size + 4 * rows**2 * width
    patches = 2 * c.tokens * width * c.channels * c.patch_size**2
    return tiles * (patches + (select_layer % (1 + c.layers)) * layer)


def projector_flops(inputs: int, width: int, rows: int) -> int:
    """Project `rows` tokens: each 2 · (inputs·width + width²)."""
    return rows * 2 * (inputs * width + width * width)


def language_flops(c: LanguageConfig, rows: int, *, past: int = 0, causal: Causal = "visible") -> int:
    """The decoder over `rows` new tokens of one document after `past` cached ones, without its head.

    layers · (rows · 2 · (C·(H + 2G)·D + H·D·C + 3·C·I) + 4·H·D·pairs); pairs as the module's first lines say.
    """
    width, q, kv = c.hidden_size, c.heads * c.head_dim, c.kv_heads * c.head_dim
    row = 2 * (width * (q + 2 * kv) + q * width + 3 * width * c.intermediate_size)
    pairs = rows * past + (rows * (rows + 1) // 2 if causal == "visible" else rows * rows)
    return c.layers * (rows * row + 4 * q * pairs)


def head_flops(c: LanguageConfig, rows: int = 1, *, used: int | None = None) -> int:
    """Logits of `rows`: each 2 · C · V; `used` is V where only leading rows of the output matrix have tokens."""
    return rows * 2 * c.hidden_size * (c.vocab_size if used is None else used)


def decode_flops(c: LanguageConfig, prompt: int, new: int, *, used: int | None = None) -> int:
    """The `new` - 1 steps after the prompt, whose last row gives the first token; a step is one row and its logits."""
    steps = max(0, new - 1)
    # past runs over prompt, prompt + 1, …: one call with all rows would count the same pairs.
    return language_flops(c, steps, past=prompt) + head_flops(c, steps, used=used)


# Memory ----------------------------------------------------------------------------------------------------------


def cache_rows(prompt: int, new: int) -> int:
    """Rows that the KV cache has allocated for each document when an answer of `new` tokens ends.

    The loop allocates the prompt and up to 256 rows at once, then doubles; the last token is never read back.
    """
    rows, needed = prompt + min(new, GENERATED_ROOM), prompt + new - 1
    while rows < needed:
        rows = max(2 * rows, 64)
    return rows


def cache_bytes(c: LanguageConfig, rows: int, documents: int = 1, *, element: int = 2) -> int:
    """2 · layers · G · D · rows · documents · bytes."""
    return 2 * c.layers * c.kv_heads * c.head_dim * rows * documents * element


def vision_activations(c: InternViTConfig, tiles: int, *, element: int = 2) -> int:
    """Largest sum of tensors alive while `tiles` are encoded at once, without gradients.

    tiles · T · max(4·C + 2·I, 8·C, with QK-norm 10·C) · bytes: in the MLP the embedding, the layer's input, the
    residual, its norm and the inner rows before and after the GELU; in attention the embedding, the layer's input, its
    norm, q|k|v, and the result before and after its copy.
    """
    width = c.hidden_size
    wide = max(4 * width + 2 * c.intermediate_size, (10 if c.qk_norm else 8) * width)
    return tiles * (1 + c.tokens) * wide * element


def language_activations(c: LanguageConfig, rows: int, *, element: int = 2) -> int:
    """Largest sum of tensors alive while a decoder layer reads `rows`, without gradients.

    rows · (4·C + 4·I) · bytes: in the SwiGLU the embedded rows, the layer's input, the residual, its norm, gate|up,
    silu(gate) and the product.
    """
    return rows * (4 * c.hidden_size + 4 * c.intermediate_size) * element


# Time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What computes.

    Attributes:
        flops: matrix products, FLOP/s.
        bandwidth: memory, bytes/s.
        flops_share: of `flops`, what a whole model reaches.
        bandwidth_share: of `bandwidth`, likewise.
        memory: bytes; None where it is not known.
        source: where the figures are from, for people.
    """

    flops: float
    bandwidth: float
    flops_share: float = 1.0
    bandwidth_share: float = 1.0
    memory: float | None = None
    source: str = "given"

    def __post_init__(self) -> None:
        for name in ("flops", "bandwidth"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a number above 0, not {getattr(self, name)}")
        for name in ("flops_share", "bandwidth_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie above 0 and not above 1, not {getattr(self, name)}")

    def seconds(self, flops: float, read: float) -> float:
        """The larger of the time to compute and the time to read so many bytes."""
        return max(flops / (self.flops * self.flops_share), read / (self.bandwidth * self.bandwidth_share))


DEVICES: dict[str, tuple[float, float, float]] = {
    "h200": (989e12, 4.8e12, 141e9),
    "h100": (989e12, 3.35e12, 80e9),
    "h100-pcie": (756e12, 2.0e12, 80e9),
    "a100": (312e12, 2.039e12, 80e9),
    "a100-40gb": (312e12, 1.555e12, 40e9),
    "l40s": (362e12, 0.864e12, 48e9),
    "l4": (121e12, 0.3e12, 24e9),
    "rtx4090": (165e12, 1.008e12, 24e9),
    "rtx3090": (71e12, 0.936e12, 24e9),
    "mi300x": (1307e12, 5.3e12, 192e9),
}
"""Name -> (peak dense bf16 FLOP/s, memory bandwidth in bytes/s, memory in bytes).

Public figures, written down from the makers' data sheets (not fetched again here): NVIDIA H200, H100 (SXM5 and PCIe),
A100 (SXM4, 80 and 40 GB), L40S and L4 data sheets, whose sparse figures are halved; for the RTX 4090 and 3090 the
architecture papers of Ada and GA102, dense with fp32 accumulation; AMD Instinct MI300X data sheet. Peaks, which no
model reaches: `PEAK_SHARES` are taken of them.
"""

PEAK_SHARES = (0.5, 0.7)
"""Assumed shares (FLOP/s, bandwidth) of a data sheet's peak: assumptions, not measurements of this package."""
MEASURED_SHARES = (0.7, 0.5)
"""Assumed shares of what `measure` finds. `python benchmarks/plan_shares.py` gave, on one thread of an AMD EPYC with
AVX512_BF16 (torch 2.13, busy machine, CPU time): encoder 0.68 and prefill 0.77 of a product's rate, decoding 0.49 to
0.58 of a copy's bandwidth in bf16; 0.82, 0.85 and 0.48 in fp32. On a GPU they are unmeasured."""


def named_machine(
    name: str, flops_share: float | None = None, bandwidth_share: float | None = None
) -> Machine:
    """A machine of `DEVICES`; ConfigError with the known names when there is none."""
    if name.lower() not in DEVICES:
        raise ConfigError(f"no machine is called {name!r}: there are {', '.join(DEVICES)}")
    flops, bandwidth, memory = DEVICES[name.lower()]
    return Machine(
        flops=flops,
        bandwidth=bandwidth,
        memory=memory,
        flops_share=PEAK_SHARES[0] if flops_share is None else flops_share,
        bandwidth_share=PEAK_SHARES[1] if bandwidth_share is None else bandwidth_share,
        source=f"{name.lower()}, peak dense bf16 of its data sheet",
    )


def measure(
    *,
    dtype: str = "float32",
    seconds: float = 2.0,
    flops_share: float | None = None,
    bandwidth_share: float | None = None,
) -> Machine:
    """Time a matrix product and a copy on this machine (its first CUDA GPU if it has one), half of `seconds` each.

    The best of the repetitions counts. A copy of n bytes reads n and writes n.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side, numbers = (8192, 1 << 28) if device.type == "cuda" else (1024, 1 << 25)
    kind = getattr(torch, dtype)
    x, y = torch.ones(side, side, dtype=kind, device=device), torch.ones(numbers, device=device)
    z = torch.empty_like(y)
    with torch.inference_mode():
        product = _best(lambda: x @ x, seconds / 2, device.type)
        copy = _best(lambda: z.copy_(y), seconds / 2, device.type)
    where = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return Machine(
        flops=2 * side**3 / product,
        bandwidth=2 * numbers * y.element_size() / copy,
        flops_share=MEASURED_SHARES[0] if flops_share is None else flops_share,
        bandwidth_share=MEASURED_SHARES[1] if bandwidth_share is None else bandwidth_share,
        memory=memory,
        source=f"measured here ({device.type}, {where}; {dtype} product of {side} x {side}, copy)",
    )


def _best(step: Callable[[], object], seconds: float, device: str) -> float:
    """Least time of one step, at least three tried, within about so many seconds."""
    from torch import cuda

    best, end, tried = float("inf"), time.perf_counter() + seconds, 0
    while tried < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        if device == "cuda":
            cuda.synchronize()
        if tried:  # the first one warms up
            best = min(best, time.perf_counter() - start)
        tried += 1
    return best
