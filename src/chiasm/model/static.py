"""A pass of fixed shapes through the decoder: what a GPU can replay as one graph.

Launching the few hundred kernels of a pass costs a GPU more time than one row keeps it busy. A CUDA graph records them
once and launches them together, which needs that nothing about the pass is decided on the host: no lengths in Python,
no buffers that grow. So this pass reads one row for *every* slot of the cache, takes positions and lengths as tensors,
writes keys and values at the place that a tensor says, and attends over the whole capacity behind a mask. Slots
without a document compute rubbish that nobody reads; what they write lies where the next owner's prompt goes first.

`run_eager` is the pass as it is, on any device, and the slow twin of the replayed one. The ragged pass of
`chiasm.model.generate` is the twin of both.

No GPU was at hand when this was written: eager and compiled passes are tested on a CPU, recording and replaying are
not.

Legend: N slots, C width, H query and G key/value heads of D channels, S capacity of a slot.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.model.causal import CausalVLM
from chiasm.nn.attention import KVCache
from chiasm.nn.block import Block, SwiGLU
from chiasm.nn.rope import rotate
from chiasm.parts.embed import WordTable
from chiasm.parts.language.decoder import Decoder

__all__ = ["StaticPass", "fits"]

_WARM_UP = 3  # passes before recording: libraries allocate their work space in the first ones


def fits(model: CausalVLM) -> bool:
    """Whether a model can decode in passes of fixed shapes: text embedded by a table, and a plain decoder.

    Rotations whose frequencies depend on the length of a document are decided on the host, and a decoder on several
    devices is no one graph.
    """
    trunk, embedder = model.trunk, model.embedder
    return (
        isinstance(trunk, Decoder)
        and trunk.devices is None
        and trunk.rope.kind not in ("dynamic", "longrope")
        and all(isinstance(block, Block) and isinstance(block.ffn, SwiGLU) for block in trunk.layers)
        and isinstance(getattr(embedder, "words", None), WordTable)
        and getattr(embedder, "new_cache", None) is None
    )


class StaticPass:
    """One pass over all slots of a cache.

    Args:
        model: one that `fits`.
        cache: its trunk's. Its buffers must exist (a prompt has been read) and stay the same; a cache that was resized
            or has grown needs a new pass (`matches` tells).
        graph: record on the first call, replay afterwards (CUDA only).
        compile: fuse the pass's kernels with `torch.compile` first, which takes some minutes once.
    """

    def __init__(
        self, model: CausalVLM, cache: KVCache, *, graph: bool | None = None, compile: bool = False
    ) -> None:
        self._model, self._cache = model, cache
        self._buffers = cache.buffers()
        k = self._buffers[0][0]
        self.slots, self.capacity = k.shape[0], k.shape[2]
        self.device = k.device
        self._graph_wanted = self.device.type == "cuda" if graph is None else graph
        self._graph: torch.cuda.CUDAGraph | None = None
        self._all = torch.arange(self.slots, device=self.device)
        self._keys = torch.arange(self.capacity, device=self.device)
        zeros = torch.zeros(self.slots, dtype=torch.int64, device=self.device)
        self._ids, self._past = zeros, zeros.clone()
        self._pos = torch.zeros(self.slots, device=self.device)
        self._hidden = torch.empty(0, device=self.device)
        self._call: Callable[[Tensor, Tensor, Tensor], Tensor] = self.run_eager
        if compile:
            self._call = torch.compile(self.run_eager, dynamic=False, fullgraph=True)

    def matches(self, cache: KVCache) -> bool:
        """Whether this pass was made for the buffers that the cache has now."""
        now = cache.buffers()
        return len(now) == len(self._buffers) and all(
            a is x and b is y for (a, b), (x, y) in zip(now, self._buffers, strict=True)
        )

    def room(self) -> bool:
        """Whether every document in the cache has room for one more row."""
        return max(self._cache.lengths) < self.capacity

    @torch.inference_mode()
    def __call__(self, ids: Seq[int], pos: Seq[float], slots: Seq[int]) -> Tensor:
        """Read one row of each of these documents and count it in.

        Args:
            ids, pos: token and position of each document's row. slots: where the documents lie in the cache.

        Returns:
            (len(slots), C) hidden states.
        """
        lengths = self._cache.lengths
        all_ids, all_pos = [0] * self.slots, [0.0] * self.slots
        for token, position, slot in zip(ids, pos, slots, strict=True):
            all_ids[slot], all_pos[slot] = token, position
        # A slot without a document has length 0 and writes its row 0, which its next owner's prompt overwrites.
        self._ids.copy_(torch.tensor(all_ids), non_blocking=True)
        self._pos.copy_(torch.tensor(all_pos), non_blocking=True)
        self._past.copy_(torch.tensor(lengths), non_blocking=True)
        if not self._graph_wanted:
            hidden_NC = self._call(self._ids, self._pos, self._past)
        else:
            if self._graph is None:
                self._record()
            assert self._graph is not None
            with torch.cuda.device(self.device):
                self._graph.replay()
            hidden_NC = self._hidden.clone()  # the next replay writes over it
        for slot in slots:
            self._cache.lengths[slot] += 1
        return hidden_NC if list(slots) == list(range(self.slots)) else hidden_NC[list(slots)]

    def run_eager(self, ids_N: Tensor, pos_N: Tensor, past_N: Tensor) -> Tensor:
        """(N,) tokens, positions, lengths -> (N, C) hidden states; keys and values go behind each document's past."""
        decoder = cast(Decoder, self._model.trunk)
        x_NC = cast(Any, self._model.embedder).words(ids_N)
        dtype = x_NC.dtype
        half = dtype == torch.float16
        table = decoder.rope.table(pos_N, dtype)
        mask_N11S = (self._keys <= past_N[:, None])[:, None, None]
        x_NC = x_NC.float() if half else x_NC
        for layer, (k_NGSD, v_NGSD) in zip(decoder.layers, self._buffers, strict=True):
            block = cast(Block, layer)
            attn = block.attn
            H, G, D = attn.heads, attn.kv_heads, attn.head_dim
            h_NC = block.norm1(x_NC)
            qkv = attn.qkv(h_NC.half() if half else h_NC).view(-1, H + 2 * G, D)
            qk = rotate(attn.qk_norm(qkv[:, : H + G]), table)
            k_NGSD[self._all, :, past_N] = qk[:, H:]
            v_NGSD[self._all, :, past_N] = qkv[:, H + G :]
            q_NGRD = qk[:, :H].reshape(-1, G, H // G, D)
            o = F.scaled_dot_product_attention(q_NGRD, k_NGSD, v_NGSD, attn_mask=mask_N11S)
            x_NC = x_NC + attn.out(o.reshape(-1, H * D))
            h_NC = block.norm2(x_NC)
            x_NC = x_NC + cast(SwiGLU, block.ffn)(h_NC.half() if half else h_NC)
        x_NC = decoder.norm(x_NC)
        return x_NC.half() if half else x_NC

    def _record(self) -> None:
        """Record the pass. The passes before it write where the replayed one writes again."""
        with torch.cuda.device(self.device):  # streams and captures belong to the current device
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self._call(self._ids, self._pos, self._past)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self._hidden = self._call(self._ids, self._pos, self._past)
            self._graph = graph
