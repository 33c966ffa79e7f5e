"""Does a compiled graph compute what the model computes? Two distances, measured before a graph is ever served.

*Graph*: compiled in float32, against the PyTorch modules in float32 with the same rounded weights. Only the order of
sums may differ; anything beyond `GRAPH_BOUND` is a wrong graph, or an OpenVINO that computes another function.
*Served*: compiled the way that it will be used (bfloat16, inputs of compressed products rounded), against the
modules in float32 with the weights as they were. That is what the user pays; `SERVED_BOUNDS` says how much is too much.

Both are root mean squares of differences over the standard deviation of what is right: of the logits of two documents
(read, continued by one row each, twice, then by several at once) and of the tokens of a noisy tile; the larger counts.

The modules are copied to float32 one block at a time, so that the check needs little memory.
Legend: T rows, C width, V words.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.errors import ConfigError
from chiasm.model.causal import CausalVLM
from chiasm.model.openvino.parts import CompiledHead, CompiledTrunk, compile_graph, run_graph
from chiasm.model.openvino.weights import INT8, Scheme, rounded
from chiasm.nn.attention import Segments
from chiasm.parts.compress.unshuffle import Unshuffle
from chiasm.parts.connect.projector import Projector
from chiasm.parts.language.decoder import Decoder
from chiasm.parts.vision.internvit import InternViT

__all__ = ["GRAPH_BOUND", "SERVED_BOUNDS", "Agreement", "VisionSide", "agreement", "distance"]

GRAPH_BOUND = 1e-3
SERVED_BOUNDS = {None: 0.1, 8: 0.2, 4: 0.8}
"""By the bits of the language model's weights."""

_READ = ((8, 12), (1, 1), (1, 1), (3, 7))
"""Rows that each of two documents brings in each pass."""


@dataclass(frozen=True, slots=True)
class VisionSide:
    """From normalised pixels to rows of the language model."""

    vision: InternViT
    compress: Unshuffle
    connect: Projector
    select_layer: int = -1


@dataclass(frozen=True, slots=True)
class Agreement:
    """The two distances, see the module."""

    graph: float
    served: float

    def demand(self, name: str, scheme: Scheme | None) -> None:
        """Raise ConfigError where a distance is beyond its bound (or not a number)."""
        if not self.graph <= GRAPH_BOUND:
            raise ConfigError(
                f"the OpenVINO graph of {name} differs from the model by {self.graph:.1e} of the spread of its "
                f"results, more than {GRAPH_BOUND:.0e}: it will not be used; leave backend= out"
            )
        bound = SERVED_BOUNDS[scheme and scheme.bits]
        if not self.served <= bound:
            remedy = "leave quantize out, or use more bits" if scheme else 'use dtype="float32"'
            raise ConfigError(
                f"with these options OpenVINO's answers of {name} differ from the model's by {self.served:.0%} of the "
                f"spread of its results, more than {bound:.0%}: {remedy}"
            )


def agreement(
    model: CausalVLM,
    graphs: dict[str, Any],
    vision: VisionSide | None,
    schemes: tuple[Scheme | None, Scheme | None],
    dtype: str | None,
) -> Agreement:
    """Both distances of a model and its graphs.

    Args:
        graphs: "decoder", "head" and, beside a `vision` side, "vision".
        schemes: of the language model and of the encoder. dtype: as of `settings`.
    """
    exact = dtype == "float32"
    language, encoder = schemes
    strict = _logits_compiled(model, graphs, "float32")
    distances = [distance(strict, _logits(model, language, exact, rounding=True))]
    served = strict if exact else _logits_compiled(model, graphs, dtype)
    whole = [distance(served, _logits(model, None, True, rounding=False))]
    if vision is not None:
        config = vision.vision.config
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(1, config.channels, *[config.image_size] * 2, generator=generator)
        seen = _tokens_compiled(graphs["vision"], pixels, "float32")
        distances.append(distance(seen, _tokens(vision, pixels, encoder, exact, rounding=True)))
        seen = seen if exact else _tokens_compiled(graphs["vision"], pixels, dtype)
        whole.append(distance(seen, _tokens(vision, pixels, None, True, rounding=False)))
    return Agreement(max(distances), max(whole))


def distance(found: Tensor, right: Tensor) -> float:
    """Root mean square of the difference, in standard deviations of what is right; infinite for what is no number."""
    value = float((found - right).square().mean().sqrt() / right.std())
    return value if value == value else float("inf")


def _documents(model: CausalVLM) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Embedded rows (T, C) of two documents, and what each pass reads of each: their row numbers."""
    words: nn.Module = model.embedder.words  # type: ignore[assignment]
    used = model.head.used or words.weight.shape[0]  # type: ignore[union-attr, index]
    generator = torch.Generator().manual_seed(0)
    totals = [sum(pair[n] for pair in _READ) for n in range(2)]
    rows = [words.weight[torch.randint(0, used, (total,), generator=generator)].float() for total in totals]  # type: ignore[index]
    at, passes = [0, 0], []
    for pair in _READ:
        passes.append([torch.arange(at[n], at[n] + pair[n]) for n in range(2)])
        at = [at[n] + pair[n] for n in range(2)]
    return [row.detach() for row in rows], passes


@torch.no_grad()
def _logits(model: CausalVLM, scheme: Scheme | None, exact: bool, *, rounding: bool) -> Tensor:
    """(T, V) logits of both documents by the PyTorch modules, each read at once without a cache."""
    decoder: Decoder = model.trunk  # type: ignore[assignment]
    documents, _ = _documents(model)
    x_TC = torch.cat(documents)
    lengths = [len(rows) for rows in documents]
    pos_T = torch.cat([torch.arange(n).float() for n in lengths])
    table = decoder.rope.table(pos_T, torch.float32, lengths)
    kind_T = torch.zeros(len(x_TC), dtype=torch.int64)
    for i, block in enumerate(decoder.layers):
        x_TC = _float(block, scheme, exact, rounding)(x_TC, table, Segments.of(lengths), kind_T, None, i)
    hidden_TC = _float(decoder.norm, None, exact, False)(x_TC)
    weight: Tensor = model.head.weight[: model.head.used]  # type: ignore[index, misc, assignment]
    weight = rounded(weight, INT8 if scheme else None, exact=exact) if rounding else weight.float()
    return hidden_TC @ weight.T


@torch.no_grad()
def _logits_compiled(model: CausalVLM, graphs: dict[str, Any], dtype: str | None) -> Tensor:
    """(T, V) logits of both documents by the graphs: cached, continued by single rows and by several."""
    trunk = CompiledTrunk(compile_graph(graphs["decoder"], dtype), model.trunk.rope)  # type: ignore[arg-type]
    head = CompiledHead(compile_graph(graphs["head"], dtype))
    documents, passes = _documents(model)
    cache = trunk.new_cache(2)
    pieces: list[list[Tensor]] = [[], []]
    for parts in passes:
        lengths = [len(part) for part in parts]
        hidden_TC = trunk(
            torch.cat([documents[n][part] for n, part in enumerate(parts)]),
            kind_T=torch.zeros(sum(lengths), dtype=torch.int64),
            segments=Segments.of(lengths),
            pos_T=torch.cat(parts).float(),
            cache=cache,
        )
        for n, rows in enumerate(hidden_TC.split(lengths)):
            pieces[n].append(rows)
    return head.logits(torch.cat(pieces[0] + pieces[1]))


@torch.no_grad()
def _tokens(
    side: VisionSide, pixels: Tensor, scheme: Scheme | None, exact: bool, *, rounding: bool
) -> Tensor:
    """(K, C) tokens of one tile by the PyTorch modules."""
    encoder = side.vision
    stem = InternViT(replace(encoder.config, layers=1))
    for name in ("patch_embedding.weight", "patch_embedding.bias", "class_embedding", "position_embedding"):
        value = encoder.get_parameter(name).detach()
        kept = rounded(value, None, exact=exact) if rounding and name.endswith("weight") else value.float()
        stem.get_parameter(name).data = kept
    x_NTC = stem.embed(pixels)
    for block in encoder.layers[: side.select_layer % (1 + len(encoder.layers))]:
        x_NTC = _float(block, scheme, exact, rounding)(x_NTC)
    return _float(side.connect, scheme, exact, rounding)(side.compress(x_NTC[:, 1:]))[0]


@torch.no_grad()
def _tokens_compiled(graph: Any, pixels: Tensor, dtype: str | None) -> Tensor:
    request = compile_graph(graph, dtype).create_infer_request()
    return torch.from_numpy(run_graph(request, pixels=pixels.numpy()).copy())[0]


def _float(module: nn.Module, scheme: Scheme | None, exact: bool, rounding: bool) -> nn.Module:
    """A float32 copy, its matrices rounded as the graph's are."""
    module = copy.deepcopy(module).float()
    for child in module.modules():
        if rounding and isinstance(child, nn.Linear):
            child.weight.data = rounded(child.weight, scheme, exact=exact)
    return module
