"""Compiled graphs as parts of a model: a trunk and a head that the one generation loop cannot tell from ours.

The trunk answers document by document: each has a state of its own in OpenVINO (an infer request), so that documents
that end or start over touch no other's. Weights are shared by all of them. `batch` is therefore bit-equal to `chat`,
and as fast as one question after the other.

Long prompts are read in chunks of `CHUNK` rows: the mask stays small, and scores above the diagonal of earlier chunks
are never computed.
Legend: T rows of all documents, n rows of one, S its rows with the past, C width, D head width, V words, N documents.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chiasm.data.sequence import Sequence
from chiasm.errors import ConfigError
from chiasm.model.causal import CausalVLM
from chiasm.model.openvino.weights import core, openvino
from chiasm.nn.attention import KVCache, Segments
from chiasm.nn.rope import Rope
from chiasm.parts.contracts import Emission, LossParts, ModelCache, Pick
from chiasm.parts.embed import WordTable

__all__ = [
    "CHUNK",
    "CompiledHead",
    "CompiledModel",
    "CompiledTrunk",
    "FloatWords",
    "StateCache",
    "compile_graph",
    "run_graph",
    "settings",
]

CHUNK = 1024
"""Most rows of a prompt that the trunk reads at once."""


def settings(dtype: str | None) -> dict[str, Any]:
    """Properties that graphs are compiled with.

    Args:
        dtype: float32 computes everything in float32, as exactly as the stored weights allow; bfloat16 and float16 are
            asked for (OpenVINO takes another where the CPU cannot), and None leaves that choice to OpenVINO.
            Unless float32 is asked for, products with compressed weights may round their inputs to int8.
    """
    found: dict[str, Any] = {
        # As PyTorch's own thread count, so that one setting serves both.
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    if dtype == "float32":
        # The cache of keys and values is kept in what is computed in: OpenVINO's default, 8 bits, is less exact and,
        # measured, slower.
        exact = {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_PRECISION_HINT": "f32"}
        return found | exact | {"KV_CACHE_PRECISION": "f32"}
    capable = "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    hints = {"bfloat16": "bf16", "float16": "f16"}
    if dtype is not None:
        found["INFERENCE_PRECISION_HINT"] = hints[dtype]
    return found | {"KV_CACHE_PRECISION": "bf16" if capable and dtype != "float16" else "f16"}


def compile_graph(graph: Any, dtype: str | None) -> Any:
    """A graph (or the path of a saved one), compiled for the CPU."""
    return core().compile_model(graph, "CPU", settings(dtype))


def run_graph(request: Any, **inputs: np.ndarray) -> np.ndarray:
    """The output of one pass. It lies in the request's memory: copy it before the next pass."""
    return request.infer(inputs, share_inputs=True, share_outputs=True)["out"]


@dataclass(slots=True, eq=False)
class _Document:
    """One document's infer request, which holds its keys and values, and how many rows it has read."""

    compiled: Any
    length: int = 0
    _request: Any = None

    @property
    def request(self) -> Any:
        """Made when the document is first read."""
        if self._request is None:
            self._request = self.compiled.create_infer_request()
        return self._request

    def forget(self) -> None:
        """Begin anew; the request and its buffers are used again."""
        self.length = 0
        if self._request is not None:
            self._request.reset_state()


class StateCache(KVCache):
    """The documents being read, each with an infer request of its own; see `KVCache` for what the methods mean."""

    def __init__(self, compiled: Any, slots: int = 1) -> None:
        self._compiled = compiled
        self.documents = [_Document(compiled) for _ in range(slots)]

    @property
    def lengths(self) -> list[int]:
        """Cached rows of every slot."""
        return [document.length for document in self.documents]

    @property
    def capacity(self) -> int:
        """Rows of the longest document: OpenVINO grows each one's buffers by itself."""
        return max(self.lengths, default=0)

    def view(self, slots: Seq[int]) -> StateCache:
        """The same documents for a pass over some of them only."""
        part = StateCache(self._compiled, 0)
        part.documents = [self.documents[slot] for slot in slots]
        return part

    def advance(self, segments: Segments) -> None:
        """Count the rows in that have been read."""
        for slot, n in zip(segments.slots, segments.lengths, strict=True):
            self.documents[slot].length += n

    def restart(self, slot: int) -> None:
        """Forget the past of one document."""
        self.documents[slot].forget()

    def resize(self, keep: Seq[int], slots: int, capacity: int | None = None) -> None:
        """The documents `keep` first, then empty ones, `slots` in all; nothing is copied."""
        kept = [self.documents[slot] for slot in keep]
        self.documents = kept + [_Document(self._compiled) for _ in range(slots - len(kept))]

    def take(self, slot: int) -> list[tuple[Tensor, Tensor]]:
        """A copy of one document's keys and values, (G, S, D) float32 each, for every layer."""
        states = {state.name: state for state in self.documents[slot].request.query_state()}
        return [
            (_copied(states[f"keys.{i}"]), _copied(states[f"values.{i}"])) for i in range(len(states) // 2)
        ]

    def put(self, slot: int, saved: Seq[tuple[Tensor, Tensor]], rows: int) -> None:
        """Let the document in an empty slot begin with the first `rows` rows of what `take` gave."""
        states = {state.name: state for state in self.documents[slot].request.query_state()}
        for i, pair in enumerate(saved):
            for name, x_GSD in zip(("keys", "values"), pair, strict=True):
                array = np.ascontiguousarray(x_GSD[None, :, :rows].numpy())
                states[f"{name}.{i}"].state = openvino().Tensor(array)
        self.documents[slot].length = rows


def _copied(state: Any) -> Tensor:
    return torch.from_numpy(state.state.data.copy())[0]


class CompiledTrunk(nn.Module):
    """(T, C) rows -> (T, C) hidden states through a compiled decoder.

    Args:
        compiled: of `chiasm.model.openvino.graphs.decoder_graph`.
        rope: rotary frequencies of the decoder, which the graph takes as tables.
    """

    def __init__(self, compiled: Any, rope: Rope) -> None:
        super().__init__()
        self.compiled, self.rope = compiled, rope

    def new_cache(self, slots: int = 1, *, capacity: int = 0) -> StateCache:
        """An empty cache for `slots` documents; OpenVINO grows its buffers itself."""
        return StateCache(self.compiled, slots)

    def forward(
        self,
        x_TC: Tensor,
        *,
        kind_T: Tensor,
        segments: Segments,
        pos_T: Tensor,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Read the rows, each document into its own state (a passing one without a cache).

        Raises ConfigError for a cache that is not this trunk's, and where a cached document grows past the length at
        which its rotary frequencies change (`Rope.switch`).
        """
        if cache is None:
            cache, segments = self.new_cache(len(segments.lengths)), Segments.of(segments.lengths)
        states = cache
        if not isinstance(states, StateCache):
            raise ConfigError("the cache is not one of the openvino backend: use the model's own new_cache")
        past = states.past(segments)
        self.rope.refuse_crossing(past, segments.lengths)
        cos_T1D, sin_T1D = self.rope.table(pos_T, torch.float32, segments.lengths)
        tables = [t[:, 0].numpy()[None, None] for t in (cos_T1D, sin_T1D)]
        rows_1TC = np.ascontiguousarray(x_TC.detach().float().numpy())[None]
        out_TC = torch.empty(x_TC.shape, dtype=torch.float32)
        for slot, begin, n, before in zip(
            segments.slots, segments.starts, segments.lengths, past, strict=True
        ):
            request = states.documents[slot].request
            for at in range(begin, begin + n, CHUNK):
                end = min(at + CHUNK, begin + n)
                hidden_1nC = run_graph(
                    request,
                    rows=rows_1TC[:, at:end],
                    cos=tables[0][:, :, at:end],
                    sin=tables[1][:, :, at:end],
                    mask=_mask(end - at, before + end - begin),
                    beam_idx=_FIRST,
                )
                out_TC[at:end] = torch.from_numpy(hidden_1nC[0])
        states.advance(segments)
        return out_TC


_FIRST = np.zeros(1, np.int32)


def _mask(n: int, S: int) -> np.ndarray:
    """(1, 1, n, S): 0 where one of the last n of S positions may look, else minus infinity."""
    if n == 1:
        return np.zeros((1, 1, 1, S), np.float32)
    return np.triu(np.full((n, S), -np.inf, np.float32), S - n + 1)[None, None]


class CompiledHead(nn.Module):
    """Text head: one compiled product with the rows of the vocabulary that tokens have.

    Args:
        compiled: of `chiasm.model.openvino.graphs.head_graph`.
    """

    def __init__(self, compiled: Any) -> None:
        super().__init__()
        self._request = compiled.create_infer_request()

    def logits(self, hidden_NC: Tensor) -> Tensor:
        """(N, C) -> (N, V) float32."""
        hidden = np.ascontiguousarray(hidden_NC.detach().float().numpy())
        return torch.from_numpy(run_graph(self._request, hidden=hidden).copy())

    def step(self, hidden_NC: Tensor, docs: list[int], pick: Pick, cache: ModelCache) -> Emission:
        """One token for every document."""
        logits_NV = self.logits(hidden_NC)
        ids = [pick(logits_V, doc) for logits_V, doc in zip(logits_NV, docs, strict=True)]
        return Emission(ids=list(ids), next=Sequence.of_rows(ids))


class FloatWords(WordTable):
    """A word table in its stored type whose rows come out in float32, as the graphs take them."""

    def __init__(self, weight_VC: Tensor) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(weight_VC, requires_grad=False)

    def forward(self, ids_T: Tensor) -> Tensor:
        """(T,) ids -> (T, C) float32."""
        return super().forward(ids_T).float()


class CompiledModel(CausalVLM):
    """A CausalVLM whose trunk and head are compiled graphs: it answers, and learns nothing."""

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def loss(self, sequence: Sequence) -> LossParts:
        """Raise ConfigError: there are no weights here that could learn."""
        raise ConfigError(
            "the openvino backend only answers: load the model without backend= to compute a loss"
        )
