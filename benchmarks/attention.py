"""Attention of one picture tile on a CPU: 1,025 tokens at once, the class token apart, and one head after the other.

The encoder's tile has 32 x 32 patches and a class token. An odd length is awkward for kernels that work in pairs and
blocks; this measures what handling it apart would bring, beside what `chiasm.nn.vit.attend_by_head` brings, which the
encoder with 8-bit activations uses. bf16, 16 heads of 64 channels, one thread, CPU time; errors against float64.

Run `python benchmarks/attention.py`, with `--write` to publish; `--toy` tries the script out.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from measure import alternate, compare, cpu_seconds, finish
from torch import Tensor

from chiasm.nn.vit import attend_by_head


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own kernel: what the encoder uses in bf16."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def class_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Patches among themselves in the fused kernel, the class token's key merged in, its query by plain products."""
    scale = q.shape[-1] ** -0.5
    patches, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[:, :, 1:], k[:, :, 1:], v[:, :, 1:]
    )
    score = (q[:, :, 1:] * k[:, :, :1]).sum(-1).float() * scale
    share = torch.sigmoid(score - lse.view_as(score)).to(q.dtype)[..., None]
    patches = torch.lerp(patches, v[:, :, :1].expand_as(patches), share)
    first = torch.softmax((q[:, :, :1] * scale) @ k.transpose(-1, -2), dim=-1) @ v
    return torch.cat((first, patches), dim=2).transpose(1, 2).flatten(2)


def in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fused kernel in float32."""
    return fused(q.float(), k.float(), v.float()).to(q.dtype)


WAYS = {
    "the class token apart": class_apart,
    "fused kernel in float32": in_float32,
    "one head after the other": attend_by_head,
}


@torch.inference_mode()
def measure(tokens: int = 1025, heads: int = 16, width: int = 64, repeats: int = 9) -> dict[str, Any]:
    """All ways beside the fused kernel."""
    torch.set_num_threads(1)
    qkv = torch.randn(1, tokens, 3 * heads * width, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, k, v = (x.unflatten(-1, (heads, width)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    true = fused(q.double(), k.double(), v.double())

    def error(way: Any) -> float:
        return float((way(q, k, v).double() - true).norm() / true.norm())

    seen = alternate(
        {
            name: (lambda way=way: cpu_seconds(lambda: way(q, k, v)) * 1e3)
            for name, way in {"fused": fused, **WAYS}.items()
        },
        repeats,
    )
    rows = [
        compare(
            f"attention of a tile, {tokens:,} tokens, {name}",
            seen["fused"],
            seen[name],
            note=f"error {error(way):.2%}, fused {error(fused):.2%}",
        )
        for name, way in WAYS.items()
    ]
    return {"rows": rows, "remark": "Peer: torch's fused attention in bf16."}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the result and rebuild the README's table")
    parser.add_argument("--toy", action="store_true", help="few tokens: tries the script out")
    args = parser.parse_args()
    if args.write and args.toy:
        parser.error("only the full protocol is published: leave out --toy")
    finish("attention", measure(33, 2, 8, 2) if args.toy else measure(), write=args.write)


if __name__ == "__main__":
    main()
