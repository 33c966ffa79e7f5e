"""The attention seam: every attention of a decoder goes through `attend`.

A batch is never padded. It is one flat row of T tokens in which documents stand one after the other, and
`Segments` says (in host integers, so that no layer waits for the device) where each begins. The same call
serves packed training (documents isolated, causal), ragged prefill, and decoding with a KV cache.

Legend: T tokens of all documents, H query heads, G key/value heads (grouped queries, G divides H), D head width,
S keys of one document, N documents.
Surprise: on CPU, splitting by document beats one dense block mask by more than 2x, so splitting is the fast path
and the dense mask (`attend_reference`) is the slow twin that the tests compare with.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Segments:
    """How T flat rows divide into documents: `lengths[n]` rows each, cached (if at all) in row `slots[n]`."""

    lengths: tuple[int, ...]
    slots: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.slots):
            raise ConfigError(f"Segments has {len(self.lengths)} lengths but {len(self.slots)} slots")
        if any(n <= 0 for n in self.lengths):
            raise ConfigError(
                "Segments must not hold empty documents: drop them before building the sequence"
            )

    @classmethod
    def of(cls, lengths: Seq[int], slots: Seq[int] | None = None) -> Segments:
        """Documents of these lengths, in cache rows `slots` (default 0, 1, 2, …)."""
        lengths = tuple(int(n) for n in lengths)
        return cls(lengths, tuple(range(len(lengths))) if slots is None else tuple(int(s) for s in slots))

    @classmethod
    def from_docs(cls, doc_T: Tensor, slots: Seq[int] | None = None) -> Segments:
        """From document numbers, each of which must stand in one contiguous run."""
        if doc_T.numel() <= 1:  # every step of decoding one document
            return cls.of((1,) * doc_T.numel(), slots)
        runs, lengths = torch.unique_consecutive(doc_T, return_counts=True)
        if runs.unique().numel() != runs.numel():
            raise ConfigError("a packed document must be contiguous: doc_T returns to a number it had left")
        return cls.of(lengths.tolist(), slots)

    @property
    def total(self) -> int:
        """Rows of all documents, T."""
        return sum(self.lengths)

    @property
    def starts(self) -> tuple[int, ...]:
        """First row of each document."""
        out, at = [], 0
        for n in self.lengths:
            out.append(at)
            at += n
        return tuple(out)

    @property
    def last_rows(self) -> list[int]:
        """Index of the last row of each document."""
        return [start + n - 1 for start, n in zip(self.starts, self.lengths, strict=True)]


class KVCache:
    """Keys and values of past tokens for a stack of layers: two (slots, G, capacity, D) buffers a layer.

    `lengths[slot]` counts the past tokens that *all* layers have stored. Layers write the new rows behind
    them while a forward pass runs; `advance` counts them in once it has passed through every layer.
    Buffers are allocated at the first write and grow by doubling.
    """

    def __init__(self, layers: int, slots: int = 1, *, capacity: int = 0) -> None:
        self.lengths = [0] * slots
        self._capacity = capacity
        self._k: list[Tensor | None] = [None] * layers
        self._v: list[Tensor | None] = [None] * layers

    @property
    def slots(self) -> int:
        """Number of documents that it can hold."""
        return len(self.lengths)

    def past(self, segments: Segments) -> tuple[int, ...]:
        """Cached tokens of each document."""
        return tuple(self.lengths[s] for s in segments.slots)

    def write(self, layer: int, k_TGD: Tensor, v_TGD: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """Store new rows behind each document's past; returns the layer's (slots, G, capacity, D) buffers."""
        need = max(self.lengths[s] + n for s, n in zip(segments.slots, segments.lengths, strict=True))
        k, v = self._buffers(layer, need, k_TGD)
        at = 0
        for slot, n in zip(segments.slots, segments.lengths, strict=True):
            past = self.lengths[slot]
            k[slot, :, past : past + n] = k_TGD[at : at + n].transpose(0, 1)
            v[slot, :, past : past + n] = v_TGD[at : at + n].transpose(0, 1)
            at += n
        return k, v

    def advance(self, segments: Segments) -> None:
        """Count the rows in that every layer has now written."""
        for slot, n in zip(segments.slots, segments.lengths, strict=True):
            self.lengths[slot] += n

    def restart(self, slot: int) -> None:
        """Forget the past of one document; its rows are written over."""
        self.lengths[slot] = 0

    def keep(self, slots: Seq[int]) -> None:
        """Keep only these rows, in this order; they become rows 0, 1, … of a smaller cache."""
        if list(slots) == list(range(self.slots)):
            return
        for buffers in (self._k, self._v):
            for layer, x in enumerate(buffers):
                if x is not None:
                    buffers[layer] = x[torch.tensor(slots, device=x.device)]
        self.lengths = [self.lengths[s] for s in slots]

    def _buffers(self, layer: int, need: int, like: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._k[layer], self._v[layer]
        if k is None or v is None or k.shape[2] < need:
            if need > self._capacity:
                self._capacity = max(need, 2 * self._capacity, 64)
            shape = (self.slots, like.shape[1], self._capacity, like.shape[2])
            # Zeros, not empty memory: a NaN in rows that nobody wrote would survive a weight of zero.
            grown_k, grown_v = like.new_zeros(shape), like.new_zeros(shape)
            if k is not None and v is not None:
                grown_k[:, :, : k.shape[2]] = k
                grown_v[:, :, : v.shape[2]] = v
            k, v = self._k[layer], self._v[layer] = grown_k, grown_v
        return k, v


def attend(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    segments: Segments,
    *,
    cache: KVCache | None = None,
    layer: int = 0,
    causal: bool = True,
) -> Tensor:
    """Attention inside each document, over its cached past too when a cache is given.

    Args:
        q_THD: queries, already rotated. k_TGD, v_TGD: new keys and values (H a multiple of G).
        segments: the documents; their lengths must add up to T.
        cache: where keys and values of the past lie and where the new ones go (`layer` is its index).
        causal: a token sees its own document up to itself; else the whole document (no cache then).

    Returns:
        (T, H, D) in the dtype of the queries.

    Raises:
        ConfigError: lengths do not add up to T, or a cache is asked for non-causal attention.
    """
    T, H, D = q_THD.shape
    if segments.total != T:
        raise ConfigError(f"segments cover {segments.total} tokens but the row has {T}")
    if cache is None:
        if len(segments.lengths) == 1:
            return _one(q_THD, k_TGD.transpose(0, 1), v_TGD.transpose(0, 1), causal)
        longest = max(segments.lengths)
        if len(set(segments.lengths)) == 1:  # equal documents: one batched call
            q, k, v = (x.view(-1, longest, x.shape[1], D).transpose(1, 2) for x in (q_THD, k_TGD, v_TGD))
            return _batched(q, k, v, causal).transpose(1, 2).reshape(T, H, D)
        if causal and longest <= 256 and longest * len(segments.lengths) <= 2 * T:
            # Many short documents: one batched call over rows filled up at the right, which causality hides.
            rows = torch.arange(longest, device=q_THD.device)[None]
            starts, ends = (
                torch.tensor(x, device=q_THD.device)[:, None] for x in (segments.starts, segments.lengths)
            )
            real_NL = rows < ends
            index_NL = (starts + rows).clamp_max(T - 1)
            q, k, v = (x[index_NL].transpose(1, 2) for x in (q_THD, k_TGD, v_TGD))
            return _batched(q, k, v, causal).transpose(1, 2)[real_NL]
        parts = zip(*(x.split(segments.lengths) for x in (q_THD, k_TGD, v_TGD)), strict=True)
        return torch.cat([_one(q, k.transpose(0, 1), v.transpose(0, 1), causal) for q, k, v in parts])

    if not causal:
        raise ConfigError("a KV cache holds the past of causal attention only")
    past = cache.past(segments)
    k, v = cache.write(layer, k_TGD, v_TGD, segments)
    if len(segments.lengths) == T:  # one new token each: decoding
        return _decode(q_THD, k, v, segments.slots, [p + 1 for p in past])
    out, at = [], 0
    for slot, n, p in zip(segments.slots, segments.lengths, past, strict=True):
        out.append(_one(q_THD[at : at + n], k[slot, :, : p + n], v[slot, :, : p + n], True))
        at += n
    return out[0] if len(out) == 1 else torch.cat(out)


def _batched(q_NHLD: Tensor, k_NGLD: Tensor, v_NGLD: Tensor, causal: bool) -> Tensor:
    """Documents of one length L -> (N, H, L, D)."""
    N, H, L, D = q_NHLD.shape
    G = k_NGLD.shape[1]
    if not (
        q_NHLD.requires_grad and q_NHLD.device.type == "cpu" and q_NHLD.dtype == torch.bfloat16 and L <= 512
    ):
        return F.scaled_dot_product_attention(q_NHLD, k_NGLD, v_NGLD, is_causal=causal, enable_gqa=G != H)
    # The fused CPU kernel's bf16 backward takes 6x the time of two batched products (37 tokens, 9 heads, measured).
    q = q_NHLD.reshape(N * G, H // G * L, D)
    k, v = k_NGLD.reshape(N * G, L, D), v_NGLD.reshape(N * G, L, D)
    scores = torch.bmm(q, k.transpose(1, 2)).view(N * G, H // G, L, L).float() * D**-0.5
    if causal:
        scores = scores + torch.full((L, L), float("-inf"), device=q.device).triu(1)
    weights = scores.softmax(-1).to(v.dtype).view(N * G, -1, L)
    return torch.bmm(weights, v).view(N, H, L, D)


def _one(q_nHD: Tensor, k_GSD: Tensor, v_GSD: Tensor, causal: bool) -> Tensor:
    """One document: n queries that are the last n of S positions."""
    n, H, _ = q_nHD.shape
    G, S, _ = k_GSD.shape
    mask = None
    if causal and n < S:  # aligned to the lower right; a single query sees everything, so needs no mask
        mask = torch.ones(n, S, dtype=torch.bool, device=q_nHD.device).tril(S - n) if n > 1 else None
    o = F.scaled_dot_product_attention(
        q_nHD.transpose(0, 1)[None],
        k_GSD[None],
        v_GSD[None],
        attn_mask=mask,
        is_causal=causal and n == S and n > 1,
        enable_gqa=G != H,
    )
    return o[0].transpose(0, 1)


def _decode(q_NHD: Tensor, k: Tensor, v: Tensor, slots: Seq[int], lengths: list[int]) -> Tensor:
    """One query a document against its cached keys. Grouped heads fold into the query axis: no key is copied."""
    N, H, D = q_NHD.shape
    G = k.shape[1]
    longest = max(lengths)
    q = q_NHD.view(N, G, H // G, D)
    if tuple(slots) == tuple(range(k.shape[0])):
        k, v = k[:, :, :longest], v[:, :, :longest]
    else:
        rows = torch.tensor(slots, device=k.device)
        k, v = k[rows, :, :longest], v[rows, :, :longest]
    mask = None
    if min(lengths) != longest:
        ends = torch.tensor(lengths, device=q.device)
        mask = (torch.arange(longest, device=q.device) < ends[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(N, H, D)


def attend_reference(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, doc_T: Tensor, *, causal: bool = True
) -> Tensor:
    """The slow twin of `attend` without a cache: one dense (T, T) mask, plain softmax, fp32."""
    T, H, D = q_THD.shape
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1).float() for x in (k_TGD, v_TGD))
    scores = torch.einsum("thd,shd->hts", q_THD.float(), k) * D**-0.5
    seen = doc_T[:, None] == doc_T[None, :]
    if causal:
        seen = seen & torch.ones(T, T, dtype=torch.bool, device=seen.device).tril()
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).to(q_THD.dtype)
