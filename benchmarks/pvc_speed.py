"""PVC: what four repeats of a tile cost, what a video takes of the context, and whether a stream keeps its memory.

- Encoder and compressor of InternViT-300M's size, one 448 tile, 4 repeats, bf16, one thread, CPU time. Peers: one pass
  of the plain encoder with InternVL's projector; and the same PVC without the shared trunk (every repeat through every
  layer).
- Rows that 64 frames take in the language model, beside InternVL's.
- A stream of frames at one a second, looped, with a question every minute: resident memory after the first minute and
  after the last one. The model is chiasm-mini made a PVC (recipe `pvc/mini` before training); the frames are those of
  `--clip FILE`, or the photographs of the package.

Run `python benchmarks/pvc_speed.py`, with `--write` to publish; `--toy` tries the script out.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measure import alternate, compare, cpu_seconds, finish
from PIL import Image
from torch import Tensor, nn

import chiasm
from chiasm.data.layout import LayoutSpec, count_tokens
from chiasm.media.tiles import TilePolicy
from chiasm.media.video import open_video
from chiasm.parts.compress.unshuffle import Unshuffle
from chiasm.parts.connect.conditioned import ConditionedProjector
from chiasm.parts.connect.projector import Projector
from chiasm.parts.vision.internvit import InternViT, InternViTConfig, internvit_300m
from chiasm.parts.vision.progressive import Clips, ProgressiveViT, TemporalConfig
from chiasm.systems.pvc import recipes
from chiasm.systems.pvc.load import PVCChat
from chiasm.text.assumed import AssumedTokenizer

REPEATS, LANGUAGE = 4, 896
LIMITS = {"last quarter": 2.4, "last sixth": 1.8, "last quarter, a quarter as wide": 2.4}
"""Times of one plain pass that encoder and compressor may take."""
NAIVE = 0.65
"""Share of the time without the shared trunk."""
DRIFT_SHARE, DRIFT_MB = 0.02, 20.0


def ways(vision: InternViTConfig) -> dict[str, TemporalConfig]:
    """The temporal layers that are measured."""
    quarter, sixth = max(1, vision.layers // 4), max(1, vision.layers // 6)
    return {
        "last quarter": TemporalConfig(layers=quarter),
        "last sixth": TemporalConfig(layers=sixth),
        "last quarter, a quarter as wide": TemporalConfig(
            layers=quarter, width=vision.hidden_size // 4, heads=2
        ),
    }


class Plain(nn.Module):
    """InternVL's encoder and projector."""

    def __init__(self, vision: InternViTConfig) -> None:
        super().__init__()
        self.vision, self.compress = InternViT(vision), Unshuffle(0.5)
        self.connect = Projector(4 * vision.hidden_size, LANGUAGE)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.connect(self.compress(self.vision(pixels)[:, 1:]))


class PVC(nn.Module):
    """PVC's encoder and compressor, for a quarter of the tokens of a frame."""

    def __init__(self, vision: InternViTConfig, temporal: TemporalConfig) -> None:
        super().__init__()
        self.vision, self.compress = ProgressiveViT(vision, temporal), Unshuffle(0.25)
        width = temporal.embedding(vision.hidden_size)
        self.connect = ConditionedProjector(16 * vision.hidden_size, LANGUAGE, embedding=width)

    def forward(self, pixels: Tensor, clips: Clips) -> Tensor:
        assert self.vision.time is not None
        tokens = self.compress(self.vision(pixels, clips=clips)[:, 1:])
        return self.connect(tokens, embedded_FE=self.vision.time(clips.times_F))


@torch.inference_mode()
def encoder_rows(vision: InternViTConfig, repeats: int) -> list[dict[str, Any]]:
    """Time of a tile that is shown four times, beside one plain pass and beside four whole ones."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    side = vision.image_size
    pixels = torch.randn(1, 3, side, side, dtype=torch.bfloat16)
    four = pixels.expand(REPEATS, -1, -1, -1).contiguous()
    shared = Clips.stills(1, REPEATS)
    apart = Clips((1,) * REPEATS, (REPEATS,), shared.times_F)
    plain = Plain(vision).bfloat16().eval()
    models = {name: PVC(vision, temporal).bfloat16().eval() for name, temporal in ways(vision).items()}
    calls: dict[str, Callable[[], object]] = {"plain": lambda: cpu_seconds(lambda: plain(pixels)) * 1e3}
    for name, model in models.items():
        calls[name] = lambda model=model: cpu_seconds(lambda: model(pixels, shared)) * 1e3
        calls[f"{name}, apart"] = lambda model=model: cpu_seconds(lambda: model(four, apart)) * 1e3
    seen = alternate(calls, repeats)
    rows = []
    for name in models:
        times = compare("", seen["plain"], seen[name])
        factor = 1 / times["ratio"]
        rows.append(
            compare(
                f"tile of {side} px to tokens, {REPEATS} repeats, {name} temporal, beside one plain pass",
                seen["plain"],
                seen[name],
                required=f"<= {LIMITS[name]}x the time",
                ok=factor <= LIMITS[name],
                note=f"{factor:.2f}x the time",
            )
        )
        naive = compare("", seen[f"{name}, apart"], seen[name])
        share = 1 / naive["ratio"]
        rows.append(
            compare(
                f"the same, {name} temporal, beside every repeat through every layer",
                seen[f"{name}, apart"],
                seen[name],
                required=f"<= {NAIVE} of the time",
                ok=share <= NAIVE,
                note=f"{share:.2f} of the time",
            )
        )
    return rows


def context_row(frames: int = 64) -> dict[str, Any]:
    """Rows of a prompt with so many frames."""
    spec = LayoutSpec(
        tokenizer=AssumedTokenizer(),  # type: ignore[arg-type]
        template="internvl2_5",  # type: ignore[arg-type]
        tiles=TilePolicy(),
        tokens_per_tile=256,
    )
    parts = [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "What happens?"}]
    asked = [{"role": "user", "content": parts}]
    bare = count_tokens(asked, replace(spec, tokens_per_tile=1), frames=[frames]) - frames
    theirs = count_tokens(asked, spec, frames=[frames]) - bare
    ours = count_tokens(asked, replace(spec, tokens_per_tile=64), frames=[frames]) - bare
    return compare(
        f"rows of {frames} frames in the language model, beside InternVL",
        [theirs],
        [ours],
        unit="rows",
        required="1/4",
        ok=4 * ours == theirs,
    )


def resident() -> float:
    """Megabytes of this process that lie in memory (Linux)."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1e3


def looped(clip: str | None) -> Iterator[Image.Image]:
    """Frames of a clip at one a second, or the package's photographs, again and again."""
    if clip is None:
        folder = Path(chiasm.__file__).parent / "assets" / "demo"
        images = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))]
    else:
        with open_video(clip) as video:
            taken = sorted({min(range(len(video)), key=lambda n: abs(video.times[n] - s)) for s in range(60)})
            images = [image for image, _ in video.each(taken)]
    while True:
        yield from images


def stream_row(
    chat: PVCChat, *, minutes: int = 10, minute: int = 60, clip: str | None = None
) -> dict[str, Any]:
    """Resident memory of a stream after its first minute and after its last one."""
    stream, frames = chat.watch(horizon=float(minutes * minute)), looped(clip)
    held: list[float] = []
    for n in range(1, minutes * minute + 1):
        stream.add(next(frames), float(n))
        if n % minute == 0:
            stream.ask("What is to be seen?", max_new_tokens=8)
            held.append(resident())
    drift = held[-1] - held[0]
    return compare(
        f"memory of a stream, minute {minutes} beside minute 1",
        [held[0]],
        [held[-1]],
        unit="MB",
        required=f"drift < {DRIFT_SHARE:.0%} and < {DRIFT_MB:g} MB",
        ok=drift < DRIFT_SHARE * held[0] and drift < DRIFT_MB,
        note=f"drift {drift:+.1f} MB",
    )


def mini_chat() -> PVCChat:
    """chiasm-mini made a PVC."""
    node = recipes.MiniPVC(language_dtype="float32")
    return PVCChat(node.build(), node.sizes()[1], name="pvc-mini")


def toy_chat() -> PVCChat:
    """The model of the debug recipe."""
    return PVCChat(recipes.DebugPVC().build(), recipes.DebugData().layout(), name="pvc-debug")


def measure(*, toy: bool = False, repeats: int = 7, clip: str | None = None) -> dict[str, Any]:
    """All rows."""
    vision = internvit_300m()
    if toy:
        vision = InternViTConfig(
            hidden_size=32, intermediate_size=64, layers=12, heads=4, patch_size=4, image_size=32
        )
        rows = encoder_rows(vision, 2)
        rows += [context_row(), stream_row(toy_chat(), minutes=2, minute=6, clip=clip)]
    else:
        rows = encoder_rows(vision, repeats)
        rows += [context_row(), stream_row(mini_chat(), clip=clip)]
    return {"rows": rows, "remark": "Random weights for times; the stream's model is chiasm-mini made a PVC."}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the result and rebuild the README's table")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: tries the script out")
    parser.add_argument("--clip", metavar="FILE", help="video that the stream loops; default: photographs")
    args = parser.parse_args()
    if args.write and args.toy:
        parser.error("only the full protocol is published: leave out --toy")
    finish("pvc_speed", measure(toy=args.toy, clip=args.clip), write=args.write)


if __name__ == "__main__":
    main()
