"""Load a checkpoint in a process of its own and print what it cost in anonymous memory, as JSON.

Run as ``python memory_probe.py FOLDER WAY``; WAY is ``ours``, a word of ``--quantize``, or ``naive`` (all tensors at
once, fused by concatenation, then copied into an allocated module: the control that shows that the meter sees).
"""

import json
import re
import sys
import threading
import time

import torch
from torch import nn

from chiasm.checkpoint.adapters import load_into, open_checkpoint
from chiasm.model.causal import CausalVLM
from chiasm.model.quantize import QUANTIZE, Quantization, Rounding
from chiasm.parts.connect.projector import Projector
from chiasm.parts.heads.text import TextHead
from chiasm.parts.language.decoder import build_decoder
from chiasm.parts.vision.internvit import InternViT


def resident(kind: str = "RssAnon") -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return int(re.search(rf"^{kind}:\s+(\d+) kB", file.read(), re.M).group(1)) * 1024


class Meter(threading.Thread):
    """The highest anonymous memory seen, looked at every few milliseconds and at every `look`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = self.base = resident()
        self.looks = 0
        self._end = threading.Event()

    def look(self) -> None:
        self.peak = max(self.peak, resident())
        self.looks += 1

    def run(self) -> None:
        while not self._end.is_set():
            self.look()
            time.sleep(0.003)

    def stop(self) -> None:
        self._end.set()
        self.join()
        self.look()


class Watched:
    """An adapter that has the meter look at each tensor."""

    def __init__(self, adapter, meter) -> None:
        self.adapter, self.meter = adapter, meter

    def from_public(self, reader, **options):
        for pair in self.adapter.from_public(reader, **options):
            self.meter.look()
            yield pair


def module(opened) -> nn.Module:
    embedder = nn.Module()
    embedder.vision = InternViT(opened.vision)
    embedder.connect = Projector(4 * opened.vision.hidden_size, opened.language.hidden_size)
    embedder.words = nn.Embedding(opened.language.vocab_size, opened.language.hidden_size)
    head = TextHead(opened.language.vocab_size, opened.language.hidden_size)
    return CausalVLM(embedder, build_decoder(opened.language), head)


def main(folder: str, way: str) -> None:
    torch.set_num_threads(1)
    opened = open_checkpoint(folder)
    with torch.device("meta"):
        module(opened)  # what imports and first calls cost is no part of the weights
    meter = Meter()
    meter.start()
    if way in ("ours", *QUANTIZE):
        with torch.device("meta"):
            model = module(opened)
        rounding = None if way == "ours" else Rounding(model, Quantization.parse(way))
        loaded = None if rounding is None else rounding.layer
        load_into(model, opened.reader, Watched(opened.adapter, meter), loaded=loaded)
        if rounding is not None:
            rounding.finish()
            meter.look()
    else:
        model = module(opened).to(torch.bfloat16)
        model.load_state_dict(dict(opened.adapter.from_public(opened.reader)))
    opened.reader.close()
    meter.stop()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    check = sum(float(p.detach().view(-1)[:1000].sum(dtype=torch.float64)) for p in model.parameters())
    print(
        json.dumps(
            {
                "weights": weights,
                "peak": meter.peak - meter.base,
                "after": resident() - meter.base,
                "looks": meter.looks,
                "sum": check,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
