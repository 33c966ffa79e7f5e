"""What share of a plain product's rate, and of a copy's bandwidth, a model's stages reach on one CPU thread.

    python benchmarks/plan_shares.py [--dtype bfloat16] [--repeats 4]

The assumptions of ``chiasm plan --measure`` (`chiasm.model.cost.MEASURED_SHARES`) are from here. Random weights in the
shapes of InternVL2_5-1B with fewer layers: one tile through the encoder, a prompt of 290 tokens, the best of 12 steps
after it. Measured in process CPU time, alternating with `chiasm.model.cost.measure`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from unittest import mock

import torch

from chiasm.data.sequence import Sequence
from chiasm.model import cost
from chiasm.nn.products import single_row_products
from chiasm.parts.language.decoder import build_decoder, init_decoder
from chiasm.parts.vision.internvit import InternViT
from chiasm.systems.internvl.presets import preset

PROMPT, STEPS = 290, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=list(cost.BYTES))
    parser.add_argument("--repeats", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    kind = getattr(torch, given.dtype)
    config = preset("InternVL2_5-1B")
    vision, language = replace(config.vision, layers=4), replace(config.language, layers=6)
    torch.manual_seed(0)
    encoder, decoder = InternViT(vision), build_decoder(language)
    init_decoder(decoder)
    encoder, decoder = encoder.to(kind).eval(), decoder.to(kind).eval()
    tile, rows_TC = (
        torch.zeros(1, 3, 448, 448, dtype=kind),
        torch.randn(PROMPT, language.hidden_size).to(kind),
    )
    weights = cost.language_parameters(language)["layers"] * cost.BYTES[given.dtype]

    def read(rows: int, past: int, cache) -> float:
        sequence = Sequence.of_text([1] * rows)
        start = time.process_time()
        with single_row_products(rows == 1):
            decoder(
                rows_TC[:rows],
                kind_T=sequence.kind_T,
                segments=sequence.segments(),
                pos_T=sequence.pos_T + past,
                cache=cache,
            )
        return time.process_time() - start

    print(f"{given.dtype}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread")
    with torch.inference_mode():
        for n in range(given.repeats + 1):
            with mock.patch("time.perf_counter", time.process_time):
                machine = cost.measure(dtype=given.dtype, flops_share=1.0, bandwidth_share=1.0)
            start = time.process_time()
            encoder(tile)
            seen = time.process_time() - start
            cache = decoder.new_cache(1, capacity=PROMPT + STEPS)
            prefill = read(PROMPT, 0, cache)
            step = min(read(1, PROMPT + k, cache) for k in range(STEPS))
            if n:  # the first round warms up
                print(
                    f"product {machine.flops / 1e9:.0f} GFLOP/s, copy {machine.bandwidth / 1e9:.1f} GB/s; shares: "
                    f"encoder {machine.seconds(cost.vision_flops(vision), 0) / seen:.2f}, "
                    f"prefill {machine.seconds(cost.language_flops(language, PROMPT), 0) / prefill:.2f}, "
                    f"decode {machine.seconds(0, weights) / step:.2f} of the bandwidth"
                )


if __name__ == "__main__":
    main()
