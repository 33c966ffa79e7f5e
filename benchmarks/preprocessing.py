"""Picture -> tiles -> normalised pixels: Chiasm beside the PIL processor of transformers.

The peer is `GotOcr2ImageProcessorPil`, which InternVL's processor of transformers uses where torchvision is absent.
All get a decoded PIL picture and give float32 pixels, at most 6 tiles and a thumbnail. Pictures are synthetic:
smooth waves with noise. CPU time, one thread.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from measure import alternate, compare, cpu_seconds, finish
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from chiasm.media.pixels import normalize
from chiasm.media.tiles import TilePolicy

SIZES = ((1920, 1280), (1280, 720), (640, 480))
NEEDED = 4.0


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Waves of a few dozen pixels in three colours, with noise of 12 grey levels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    channels = [
        128
        + 60 * np.sin(x / (37 + 9 * c))
        + 50 * np.cos(y / (23 + 5 * c))
        + rng.normal(0, 12, (height, width))
        for c in range(3)
    ]
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))


def measure(
    sizes: tuple[tuple[int, int], ...] = SIZES, *, side: int = 448, repeats: int = 15
) -> dict[str, Any]:
    """Two rows a size: fast and exact mode; in the notes, how the pixels differ from the peer's."""
    torch.set_num_threads(1)
    exact = TilePolicy(mode="hf", max_tiles=6, image_size=side)
    fast = TilePolicy(mode="hf", max_tiles=6, image_size=side, resize="fast")
    processor = GotOcr2ImageProcessorPil(
        crop_to_patches=True,
        max_patches=6,
        size={"height": side, "width": side},
        image_mean=list(exact.mean),
        image_std=list(exact.std),
    )
    rows = []
    for width, height in sizes:
        image = picture(width, height)
        calls = {
            "peer": lambda image=image: processor(image, return_tensors="pt")["pixel_values"],
            "fast": lambda image=image: normalize(fast.tile(image), fast),
            "exact": lambda image=image: normalize(exact.tile(image), exact),
        }
        identical = torch.equal(calls["peer"](), calls["exact"]())
        apart = (fast.tile(image).int() - exact.tile(image).int()).abs()
        timed = {name: lambda call=call: cpu_seconds(call) * 1e3 for name, call in calls.items()}
        seen = alternate(timed, repeats)
        tiles = exact.count(width, height)
        name = f"preprocessing {width}x{height} ({tiles} tiles)"
        row = compare(
            f"{name}, fast mode",
            seen["peer"],
            seen["fast"],
            required=f">= {NEEDED:g}x",
            note=f"grey levels apart: at most {int(apart.max())}, mean {float(apart.float().mean()):.4f}",
        )
        rows.append(row | {"ok": row["ratio"] >= NEEDED})
        rows.append(
            compare(
                f"{name}, exact mode",
                seen["peer"],
                seen["exact"],
                required="bit-identical",
                ok=identical,
                note="pixels are " + ("bit-identical" if identical else "NOT identical"),
            )
        )
    return {
        "rows": rows,
        "remark": "Peer: `GotOcr2ImageProcessorPil`. Normalisation included. CPU time, one thread.",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the result and rebuild the README's table")
    finish("preprocessing", measure(), write=parser.parse_args().write)


if __name__ == "__main__":
    main()
