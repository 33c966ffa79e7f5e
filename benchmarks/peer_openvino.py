"""OpenVINO GenAI beside Chiasm: the same weights, our two ways to compute them, and the gap.

Random weights in the shape of InternVL2.5-1B's decoder (Qwen2-0.5B: 24 layers, width 896, vocabulary 151,674), prompt
of 290 rows, 32 decoding steps, batch 1, greedy, one thread, CPU time. Contenders, by turns:

- `torch …`: our PyTorch path (bf16; `quantize="int8"`, `"int4"`);
- `openvino …`: our `backend="openvino"` with the weights in fp16, int8 and int4, through the same generation loop;
- `genai …`: `LLMPipeline` of OpenVINO GenAI on a stateful graph that this script writes from the same weights (ids in,
  logits out, its usual interface), so that neither an export tool nor another rounding stands between the two. It has
  two attention backends; the faster one counts, for each figure. It runs in its own process and environment.

Then the encoder (InternViT-300M, one tile): our two ways beside each other; GenAI has no loader for this encoder.

The second environment, once:

    python -m venv ../genai && ../genai/bin/pip install openvino-genai

Run `python benchmarks/peer_openvino.py --genai ../genai/bin/python` to see the table, with `--write` to publish it;
without `--genai` the peer's column is empty. `--toy` tries the script out. (The name is not `openvino.py`, because a
script's folder comes first on the import path.) Needs the extra `openvino`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from inference import Case, Clock, build_ours, full, run_ours, text_prompt, toy
from measure import alternate, compare, cpu_seconds, finish
from torch import Tensor

from chiasm.data.sequence import Sequence
from chiasm.model.causal import CausalVLM
from chiasm.model.openvino.check import agreement
from chiasm.model.openvino.export import Compiled, Options, write_graphs
from chiasm.model.openvino.graphs import Writer, decode
from chiasm.model.openvino.parts import compile_graph
from chiasm.model.openvino.weights import INT8, Scheme, matrix, openvino, schemes
from chiasm.model.quantize import quantize_model
from chiasm.systems.internvl.openvino import CompiledEmbedder, compiled_model, vision_side

PRECISIONS: dict[str, str | None] = {"16 bits": None, "int8": "int8", "int4": "int4"}
"""Name of a precision -> what `quantize` is there."""

Run = Callable[[Tensor], tuple[float, float]]
"""Ids of a prompt -> CPU milliseconds to the first token, and of each further one."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two cases, so that neither measurement carries the other's weights: `text` decodes, `picture` encodes."""

    text: Case
    picture: Case


def cases(*, layers: int = 24, repeats: int = 7) -> Pair:
    """The published cases (or fewer layers of them)."""
    return Pair(
        full(layers=layers, vision_layers=1, repeats=repeats),
        full(layers=1, vision_layers=layers, repeats=repeats),
    )


def tiny() -> Pair:
    """Small enough for a test of this script."""
    return Pair(toy(), toy())


# --- the graph that the peer runs -------------------------------------------------------------------------------------


def language_graph(model: CausalVLM, case: Case, quantize: str | None) -> Any:
    """The decoder between ids and logits, with the inputs that GenAI gives to every language model."""
    language, rope = schemes(quantize)[0], case.config.language.rope
    write = Writer(language)
    ov, op = write.ov, write.op
    inputs = {name: op.parameter([-1, -1], np.int64, name=name) for name in INPUTS}
    inputs["beam_idx"] = op.parameter([-1], np.int32, name="beam_idx")
    words = _shared(model.embedder.words.weight, language)  # type: ignore[arg-type, union-attr]
    x = op.gather(words, op.convert(inputs["input_ids"], ov.Type.i32), write.axis(0))
    waves = op.constant(rope.inverse_frequencies().numpy()[None, None])
    angle = op.multiply(op.unsqueeze(op.convert(inputs["position_ids"], ov.Type.f32), write.ints(2)), waves)
    angle = op.unsqueeze(op.concat([angle, angle], -1), write.ints(1))
    given = {
        "cos": op.cos(angle),
        "sin": op.sin(angle),
        "mask": _causal(write, inputs["input_ids"], inputs["attention_mask"]),
        "beam_idx": inputs["beam_idx"],
    }
    hidden, sinks = decode(write, model.trunk, x, given)  # type: ignore[arg-type]
    tied = model.head.weight is model.embedder.words.weight  # type: ignore[union-attr]
    head = words if tied else _shared(model.head.weight, language)  # type: ignore[arg-type]
    logits = op.matmul(hidden, head, False, True)
    logits.output(0).set_names({"logits"})
    for name, node in inputs.items():
        node.output(0).set_names({name})
    return ov.Model([op.result(logits)], sinks, list(inputs.values()), "language")


INPUTS = ("input_ids", "attention_mask", "position_ids")


def _shared(weight: Tensor, scheme: Scheme | None) -> Any:
    """The word table, which is the head too: int8 beside any compressed layers, as in our own graphs."""
    return matrix(weight, INT8 if scheme else None)


def _causal(write: Writer, ids: Any, mask: Any) -> Any:
    """(1, 1, n, S): 0 where a row may look, else the lowest number; S is the length of `attention_mask`."""
    op = write.op
    new, all_rows = (op.gather(op.shape_of(x), write.axis(1), write.axis(0)) for x in (ids, mask))
    long = write.ov.Type.i64
    rows = op.range(op.subtract(all_rows, new), all_rows, write.axis(1), long)
    columns = op.range(write.axis(0), all_rows, write.axis(1), long)
    seen = op.less_equal(op.unsqueeze(columns, write.ints(0)), op.unsqueeze(rows, write.ints(1)))
    lowest = write.scalar(float(np.finfo(np.float32).min))
    return op.unsqueeze(op.select(seen, write.scalar(0.0), lowest), write.ints(0, 1))


def write_language(model: CausalVLM, case: Case, quantize: str | None, folder: Path) -> None:
    """A folder that LLMPipeline loads: prompts are given as ids, so it needs no tokenizer."""
    folder.mkdir(parents=True)
    openvino().serialize(language_graph(model, case, quantize), folder / "openvino_model.xml")
    (folder / "config.json").write_text(json.dumps(case.config.language.to_public()), encoding="utf-8")
    (folder / "generation_config.json").write_text("{}", encoding="utf-8")


class GenAI:
    """The peer's process (see genai_worker.py)."""

    def __init__(self, python: str, folders: list[Path]) -> None:
        worker = Path(__file__).with_name("genai_worker.py")
        self._process = subprocess.Popen(
            [python, str(worker), *map(str, folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions = self._line()

    def run(self, model: str, backend: str, tokens: int) -> Run:
        """A contender."""

        def call(ids: Tensor) -> tuple[float, float]:
            asked = {"model": model, "backend": backend, "ids": ids.tolist(), "tokens": tokens}
            assert self._process.stdin is not None
            print(json.dumps(asked), file=self._process.stdin, flush=True)
            told = self._line()
            assert len(told["ids"]) == tokens, f"the peer wrote {len(told['ids'])} tokens, not {tokens}"
            return told["first"], told["step"]

        return call

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer's process ended with status {self._process.wait()}")
        return json.loads(line)


# --- contenders -------------------------------------------------------------------------------------------------------


def through_openvino(model: CausalVLM, case: Case, quantize: str | None) -> CausalVLM:
    """Our model behind compiled graphs, as `backend="openvino"` serves it."""
    side = vision_side(model)
    made = write_graphs(model, side, Options(quantize=quantize))
    compiled = {name: compile_graph(graph, None) for name, graph in made.graphs.items()}
    words = model.embedder.words.weight.detach()  # type: ignore[union-attr, operator]
    entry = Compiled(compiled["decoder"], compiled["head"], compiled["vision"], words, Path(), None)  # type: ignore[arg-type]
    return compiled_model(entry, case.config)


def through_torch(model: CausalVLM, quantize: str | None) -> CausalVLM:
    """Our model in PyTorch, its language side rounded."""
    if quantize is None:
        return model
    model = copy.deepcopy(model)
    quantize_model(model, quantize)
    return model


def contenders(case: Case, model: CausalVLM, genai: GenAI | None) -> dict[str, Run]:
    """Name -> how it runs. Whoever has another way to compute the same adds it here and in `rivals`."""

    def ours(built: CausalVLM) -> Run:
        def call(ids: Tensor) -> tuple[float, float]:
            clock: Clock = run_ours(built, Sequence.of_text(ids), case.steps + 1)
            return clock.first, clock.step

        return call

    found: dict[str, Run] = {}
    for name, quantize in PRECISIONS.items():
        found[f"torch {name}"] = ours(through_torch(model, quantize))
        found[f"openvino {name}"] = ours(through_openvino(model, case, quantize))
        if genai is not None:
            for backend in ("SDPA", "PA"):
                found[f"genai {name} {backend}"] = genai.run(name, backend, case.steps + 1)
    return found


def rivals(name: str) -> tuple[list[str], list[str]]:
    """For a precision: the peer's contenders, of which the faster counts, and ours."""
    return [f"genai {name} SDPA", f"genai {name} PA"], [f"openvino {name}", f"torch {name}"]


def measure_text(case: Case, runs: dict[str, Run]) -> list[dict[str, Any]]:
    """Prefill and decoding; fresh prompts each turn, the same for all."""
    turn = dict.fromkeys(runs, 0)

    def call(name: str) -> tuple[float, float]:
        turn[name] += 1
        return runs[name](text_prompt(case, turn[name]))

    seen = alternate({name: lambda name=name: call(name) for name in runs}, case.repeats)
    rows = []
    for figure, title in enumerate((f"prefill, {case.prompt} rows", "decoding, a token")):
        values = {name: [times[figure] for times in all_times] for name, all_times in seen.items()}
        for precision in PRECISIONS:
            peers, mine = rivals(precision)
            present = [name for name in peers if name in values]
            peer = min(present, key=lambda name: float(np.median(values[name])), default=None)
            for name in mine:
                note = "" if peer is None else f"peer's attention: {peer.rsplit(' ', 1)[1]}"
                label = f"{title}, {precision}, {name.split()[0]}"
                rows.append(compare(label, peer and values[peer], values[name], note=note))  # type: ignore[arg-type]
    return rows


def measure_picture(case: Case, model: CausalVLM) -> list[dict[str, Any]]:
    """One tile through encoder and projector; the peer is our own PyTorch path in bf16."""
    side = case.config.tiles.image_size
    generator = torch.Generator().manual_seed(1)
    tile = torch.randint(0, 256, (1, 3, side, side), generator=generator).to(torch.uint8)
    rounded = copy.deepcopy(model)
    quantize_model(rounded, "vision-w8a8")
    ways = {
        "torch 16 bits": model.embedder,
        "torch w8a8": rounded.embedder,
        "openvino 16 bits": through_openvino(model, case, None).embedder,
        "openvino w8a8": through_openvino(model, case, "vision-w8a8").embedder,
    }
    assert isinstance(ways["openvino w8a8"], CompiledEmbedder)

    def call(embedder: Any) -> float:
        with torch.inference_mode():
            return cpu_seconds(lambda: embedder.encode(tile)) * 1e3

    seen = alternate({name: lambda way=way: call(way) for name, way in ways.items()}, case.repeats)
    peer = seen.pop("torch 16 bits")
    note = "peer: our PyTorch path, 16 bits"
    return [compare(f"encoder, one tile, {name}", peer, values, note=note) for name, values in seen.items()]


def measure(pair: Pair, python: str | None) -> dict[str, Any]:
    """All rows; and how far each set of graphs is from the model (`chiasm.model.openvino.check`)."""
    torch.set_num_threads(1)
    model = build_ours(pair.text)
    distances = {}
    for name, quantize in PRECISIONS.items():
        graphs = write_graphs(model, None, Options(quantize=quantize)).graphs
        found = agreement(model, graphs, None, schemes(quantize), None)
        distances[name] = {"graph": found.graph, "served": found.served}
        del graphs
    genai = None
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in PRECISIONS]
        if python is not None:
            for folder, quantize in zip(folders, PRECISIONS.values(), strict=True):
                write_language(model, pair.text, quantize, folder)
            genai = GenAI(python, folders)
        try:
            rows = measure_text(pair.text, contenders(pair.text, model, genai))
        finally:
            if genai is not None:
                genai.close()
    del model
    rows += measure_picture(pair.picture, build_ours(replace(pair.picture)))
    versions = {"openvino": openvino().__version__} | ({} if genai is None else {"genai": genai.versions})
    said = "not run" if genai is None else f"openvino-genai {genai.versions['openvino_genai']}"
    apart = "; ".join(f"{n} {d['graph']:.0e} / {d['served']:.1%}" for n, d in distances.items())
    return {
        "rows": rows,
        "distances": distances,
        "versions": versions,
        "remark": f"Peer of prefill and decoding: {said}, `LLMPipeline` on a graph of the same weights, in its own "
        f"process. openvino {openvino().__version__}. CPU time, one thread. 16 bits is bf16 in PyTorch and fp16 "
        "weights with bf16 products in OpenVINO. Our graphs differ from the model by (graph / with rounding): "
        f"{apart}.",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--genai", metavar="PYTHON", help="Python of an environment that has openvino-genai")
    parser.add_argument("--write", action="store_true", help="keep the result and rebuild the README's table")
    parser.add_argument("--layers", type=int, default=24, help="fewer for a quick look")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--toy", action="store_true", help="a tiny model: tries the script out")
    args = parser.parse_args()
    if args.write and (args.toy or args.layers != 24 or args.repeats < 5 or args.genai is None):
        parser.error("only the full protocol is published: needs --genai, and neither --toy nor --layers")
    pair = tiny() if args.toy else cases(layers=args.layers, repeats=args.repeats)
    finish("peer_openvino", measure(pair, args.genai), write=args.write)


if __name__ == "__main__":
    main()
