"""The attention seam: every attention of a decoder goes through `attend`.

A batch is never padded. It is one flat row of T tokens in which documents stand one after the other, and
`Segments` says (in host integers, so that no layer waits for the device) where each begins. The same call
serves packed training (documents isolated, causal), ragged prefill, and decoding with a KV cache.

Legend: T tokens of all documents, H query heads, G key/value heads (grouped queries, G divides H), D head width,
S keys of one document, N documents.
Surprise: on CPU, splitting by document beats one dense block mask by more than 2x, so splitting is the fast path
and the dense mask (`attend_reference`) is the slow twin that the tests compare with. With a cache the slow twin is
`attend` itself, called for one document after the other.
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
    them while a forward pass runs; `advance` counts them in once it has passed through every layer: a pass that
    fails leaves every document as it was. Buffers are allocated at the first write and grow by doubling, up to
    `bound` where somebody knows the longest document that can come.
    """

    bound: int | None = None

    def __init__(self, layers: int, slots: int = 1, *, capacity: int = 0) -> None:
        self._lengths = [0] * slots
        self._capacity = capacity
        self._k: list[Tensor | None] = [None] * layers
        self._v: list[Tensor | None] = [None] * layers
        self._planned: dict[torch.device, _Plan] = {}

    @property
    def lengths(self) -> list[int]:
        """Cached tokens of every slot."""
        return self._lengths

    @property
    def slots(self) -> int:
        """Number of documents that it can hold."""
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """Rows of every slot in buffers that are allocated now or next."""
        return self._capacity

    def past(self, segments: Segments) -> tuple[int, ...]:
        """Cached tokens of each document."""
        return tuple(self.lengths[s] for s in segments.slots)

    def view(self, slots: Seq[int]) -> KVCache:
        """The same memory seen by a pass over some documents only: its slot n is slot `slots[n]` of this one."""
        return self if list(slots) == list(range(self.slots)) else _View(self, slots)

    def resolve(self, segments: Segments) -> tuple[KVCache, Segments]:
        """The cache that owns the buffers, and the segments in its slots."""
        return self, segments

    def buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer that has written, (slots, G, capacity, D) each: the memory itself."""
        return [(k, v) for k, v in zip(self._k, self._v, strict=True) if k is not None and v is not None]

    def write(self, layer: int, k_TGD: Tensor, v_TGD: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """Store new rows behind each document's past; returns the layer's (slots, G, capacity, D) buffers."""
        need = max(self.lengths[s] + n for s, n in zip(segments.slots, segments.lengths, strict=True))
        k, v = self._buffers(layer, need, k_TGD)
        plan = self._plan(segments, k_TGD.device)
        for at, n, slot, past in plan.long:
            k[slot, :, past : past + n] = k_TGD[at : at + n].transpose(0, 1)
            v[slot, :, past : past + n] = v_TGD[at : at + n].transpose(0, 1)
        if plan.row_N is not None:  # all single rows in one call, not in one for each document
            k[plan.slot_N, :, plan.past_N] = k_TGD[plan.row_N]
            v[plan.slot_N, :, plan.past_N] = v_TGD[plan.row_N]
        return k, v

    def advance(self, segments: Segments) -> None:
        """Count the rows in that every layer has now written."""
        self._planned.clear()
        for slot, n in zip(segments.slots, segments.lengths, strict=True):
            self._lengths[slot] += n

    def restart(self, slot: int) -> None:
        """Forget the past of one document. Its rows become zeros: nothing of it can reach who has the slot next."""
        self._planned.clear()
        for x in (*self._k, *self._v):
            if x is not None:
                x[slot].zero_()
        self._lengths[slot] = 0

    def resize(self, keep: Seq[int], slots: int, capacity: int | None = None) -> None:
        """Copy the documents `keep` into slots 0, 1, … of new buffers for `slots` documents of `capacity` rows.

        A capacity that is too small for what they hold is taken as that; None leaves it as it is. Old and new buffers
        are there together for a moment: where there is no memory for that, everything stays as it was.
        """
        lengths = [self.lengths[s] for s in keep]
        used = max(lengths, default=0)
        capacity = max(used, self._capacity if capacity is None else capacity)
        kept = torch.tensor(keep, dtype=torch.int64)

        def copied(x: Tensor | None) -> Tensor | None:
            if x is None or not slots:
                return None
            new = x.new_zeros(slots, x.shape[1], capacity, x.shape[3])
            new[: len(keep), :, :used] = x[kept, :, :used]
            return new

        k, v = ([copied(x) for x in buffers] for buffers in (self._k, self._v))
        self._planned.clear()
        self._k, self._v, self._capacity = k, v, capacity
        self._lengths = lengths + [0] * (slots - len(keep))

    def take(self, slot: int) -> list[tuple[Tensor, Tensor]]:
        """A copy of one document's keys and values, (G, S, D) each, for every layer."""
        n = self.lengths[slot]
        return [(k[slot, :, :n].clone(), v[slot, :, :n].clone()) for k, v in self.buffers()]

    def put(self, slot: int, saved: Seq[tuple[Tensor, Tensor]], rows: int) -> None:
        """Let the document in an empty slot begin with the first `rows` rows of what `take` gave."""
        self._planned.clear()
        for layer, (k_GSD, v_GSD) in enumerate(saved):
            k, v = self._buffers(layer, rows, k_GSD.transpose(0, 1))
            k[slot, :, :rows] = k_GSD[:, :rows]
            v[slot, :, :rows] = v_GSD[:, :rows]
        self._lengths[slot] = rows

    def _plan(self, segments: Segments, device: torch.device) -> _Plan:
        """How this pass is divided; made once for all layers of a device."""
        plan = self._planned.get(device)
        if plan is None or plan.segments is not segments:
            plan = self._planned[device] = _Plan.of(segments, self.past(segments), device)
        return plan

    def _buffers(self, layer: int, need: int, like: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._k[layer], self._v[layer]
        if k is None or v is None or k.shape[2] < need:
            if need > self._capacity:
                grown = max(need, 2 * self._capacity, 64)
                self._capacity = grown if self.bound is None else max(need, min(grown, self.bound))
            shape = (self.slots, like.shape[1], self._capacity, like.shape[2])
            # Zeros, not empty memory: a NaN in rows that nobody wrote would survive a weight of zero.
            grown_k, grown_v = like.new_zeros(shape), like.new_zeros(shape)
            if k is not None and v is not None:
                grown_k[:, :, : k.shape[2]] = k
                grown_v[:, :, : v.shape[2]] = v
            k, v = self._k[layer], self._v[layer] = grown_k, grown_v
        return k, v


class _View(KVCache):
    """Some documents of a cache, renumbered (`KVCache.view`)."""

    def __init__(self, whole: KVCache, slots: Seq[int]) -> None:
        self._whole, self._slots = whole, tuple(slots)
        self._resolved: tuple[Segments, Segments] | None = None

    @property
    def lengths(self) -> list[int]:
        return [self._whole.lengths[s] for s in self._slots]

    def resolve(self, segments: Segments) -> tuple[KVCache, Segments]:
        if self._resolved is None or self._resolved[0] is not segments:
            there = Segments(segments.lengths, tuple(self._slots[s] for s in segments.slots))
            self._resolved = segments, there
        return self._whole.resolve(self._resolved[1])

    def advance(self, segments: Segments) -> None:
        whole, there = self.resolve(segments)
        whole.advance(there)


APART = 100
"""Keys whose reading takes the time of one more attention call on a CPU (2 key heads of 64 channels, measured)."""
APART_ELSEWHERE = 8192
"""The same where calls are launched (an estimate: a few microseconds at the bandwidth of a GPU)."""


@dataclass(slots=True)
class _Plan:
    """How one pass through a cache is divided: documents with a call of their own, and all others together.

    apart: (first row, rows, slot, past) of documents that bring several rows, or one row and a very long past.
    long: those of them that are written by a call of their own, too. slots_M, row_M: slot and row of the others,
    which bring one row each. low, high: their slots lie in this range. `inside` says that the range is read as it
    lies, M of its rows being of use; else their keys are gathered. row_N, slot_N, past_N: where rows that are written
    together come from and go.
    """

    segments: Segments
    apart: list[tuple[int, int, int, int]]
    long: list[tuple[int, int, int, int]]
    slots_M: list[int]
    row_M: Tensor | None = None
    low: int = 0
    high: int = 0
    inside: bool = True
    local_M: Tensor | None = None
    mask: Tensor | None = None
    longest: int = 0
    row_N: Tensor | None = None
    slot_N: Tensor | None = None
    past_N: Tensor | None = None

    @classmethod
    def of(cls, segments: Segments, past: tuple[int, ...], device: torch.device) -> _Plan:
        """The plan for documents of these pasts."""
        every = list(zip(segments.starts, segments.lengths, segments.slots, past, strict=True))
        single = [d for d in every if d[1] == 1]
        call = APART if device.type == "cpu" else APART_ELSEWHERE
        limit = _longest_together([d[3] + 1 for d in single], call)
        together = [d for d in single if d[3] < limit]
        plan = cls(
            segments,
            apart=[d for d in every if d[1] > 1 or d[3] >= limit],
            long=[d for d in every if d[1] > 1 or len(single) <= 2],
            slots_M=[d[2] for d in together],
        )

        def tensor(values: Seq[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        if len(single) > 2:
            rows, _, slots, pasts = zip(*single, strict=True)
            plan.row_N, plan.slot_N, plan.past_N = tensor(rows), tensor(slots), tensor(pasts)
        if not together:
            return plan
        M = len(together)
        plan.low, plan.high = min(plan.slots_M), max(plan.slots_M) + 1
        if plan.apart or segments.total > M:
            plan.row_M = tensor([d[0] for d in together])
        width = plan.high - plan.low
        plan.inside = width <= 2 * M
        lengths = [d[3] + 1 for d in together]
        plan.longest = max(lengths)
        if plan.inside and plan.slots_M != list(range(plan.low, plan.high)):
            plan.local_M = tensor([s - plan.low for s in plan.slots_M])
            ends = [
                1
            ] * width  # slots of the range that are not in this call look at one key; nobody reads the result
            for slot, length in zip(plan.slots_M, lengths, strict=True):
                ends[slot - plan.low] = length
            lengths = ends
        elif not plan.inside:
            plan.local_M = tensor(plan.slots_M)
        if min(lengths) != plan.longest:
            seen = torch.arange(plan.longest, device=device) < tensor(lengths)[:, None]
            plan.mask = seen[:, None, None]
        return plan


def _longest_together(lengths: list[int], call: int) -> int:
    """Up to how many keys a document reads them in one call with others, where each pays for the longest.

    The sum of what is read together and of the longer ones' own calls, `call` keys each, is least there.
    """
    order = sorted(lengths, reverse=True)
    if not order:
        return 0
    best, cost, apart = order[0], order[0] * len(order), 0
    for n, longest in enumerate(order):
        total = apart + longest * (len(order) - n)
        if total < cost:
            best, cost = longest, total
        apart += longest + call
    return best


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
        cache: where keys and values of the past lie and where the new ones go (`layer` is its index). Some documents
            may bring one row and others many: the single rows are one batched call.
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
    cache, segments = cache.resolve(segments)
    k, v = cache.write(layer, k_TGD, v_TGD, segments)
    plan = cache._plan(segments, q_THD.device)
    if not plan.apart:  # one new token each: decoding
        return _decode(q_THD, k, v, plan)
    if not plan.slots_M and len(plan.apart) == 1:
        _, n, slot, p = plan.apart[0]
        return _one(q_THD, k[slot, :, : p + n], v[slot, :, : p + n], True)
    out = torch.empty_like(q_THD)
    for at, n, slot, p in plan.apart:
        out[at : at + n] = _one(q_THD[at : at + n], k[slot, :, : p + n], v[slot, :, : p + n], True)
    if plan.row_M is not None:
        out[plan.row_M] = _decode(q_THD[plan.row_M], k, v, plan)
    return out


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
    n, H, D = q_nHD.shape
    G, S, _ = k_GSD.shape
    mask = None
    if (
        n == 1 < S
    ):  # it sees everything; grouped heads fold into the query axis (in bf16 on a CPU, a tenth of the time)
        q = q_nHD.reshape(1, G, H // G, D)
        return F.scaled_dot_product_attention(q, k_GSD[None], v_GSD[None]).reshape(1, H, D)
    if causal and n < S:  # aligned to the lower right
        mask = torch.ones(n, S, dtype=torch.bool, device=q_nHD.device).tril(S - n)
    o = F.scaled_dot_product_attention(
        q_nHD.transpose(0, 1)[None],
        k_GSD[None],
        v_GSD[None],
        attn_mask=mask,
        is_causal=causal and n == S and n > 1,
        enable_gqa=G != H,
    )
    return o[0].transpose(0, 1)


def _decode(q_MHD: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> Tensor:
    """One query a document against its cached keys. Grouped heads fold into the query axis: no key is copied."""
    M, H, D = q_MHD.shape
    G, longest = k.shape[1], plan.longest
    if not plan.inside:  # few documents, far apart: their keys are copied, not those between them read
        k, v = k[plan.local_M, :, :longest], v[plan.local_M, :, :longest]
    else:
        k, v = k[plan.low : plan.high, :, :longest], v[plan.low : plan.high, :, :longest]
    if plan.inside and plan.local_M is not None:
        q = q_MHD.new_zeros(plan.high - plan.low, H, D).index_copy(0, plan.local_M, q_MHD)
        o = F.scaled_dot_product_attention(q.view(-1, G, H // G, D), k, v, attn_mask=plan.mask)
        return o.reshape(-1, H, D)[plan.local_M]
    q = q_MHD.reshape(M, G, H // G, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=plan.mask).reshape(M, H, D)


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
