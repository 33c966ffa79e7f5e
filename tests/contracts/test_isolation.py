"""Packed documents learn what they learn alone: gradients against a padded batch with a plain attention mask.

The twin is written out here with nothing of the decoder but its weights: batch rows filled up at the right, a mask of
(B, L, L), softmax, a rotation and a norm of its own, cross-entropy from all logits, loss weights counted in a loop.
The encoder of pictures is shared; it sees tiles, not documents. A control shows that the comparison can fail: packed by
position numbers alone, gradients are far off.
Legend: B documents, L rows of the longest, C width, H heads, D head width.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.contracts.internvl import CONFIG
from tests.contracts.skeleton import VOCAB, document, initialise, noise
from torch import Tensor

from chiasm.data.sequence import IGNORE, IMAGE, VIDEO, MediaBatch, Sequence
from chiasm.model.causal import CausalVLM
from chiasm.nn import norms
from chiasm.nn.attention import Segments, attend, attend_reference
from chiasm.nn.losses import token_weights
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.systems.internvl.model import build_internvl

ROWS_A_TILE = 4


def norm64(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The library's norm computes in float32 whatever the dtype, which hides what is below 1e-7."""
    return x_D / torch.sqrt((x_D * x_D).mean(-1, keepdim=True) + eps) * weight_D


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    if request.param == torch.float64:
        monkeypatch.setattr(norms, "rms_norm", norm64)
    return request.param


def build(dtype: torch.dtype) -> CausalVLM:
    model = initialise(build_internvl(CONFIG)).to(dtype)
    with torch.no_grad():  # tamer than the skeletons: float32 shall lose little in itself
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.dim() > 1 else 1.0)
    return model


def talk(*parts: object, seed: int) -> Sequence:
    """A document of words (a number of them), pictures ("image", tiles) and frames ("video", frames).

    Only every second stretch of words is learned, so that it has several answers.
    """
    draw = torch.Generator().manual_seed(seed)
    rows: list = [1]
    tiles: dict[str, int] = {}
    learned: list[bool] = [False]
    answers = 0
    for part in parts:
        if isinstance(part, int):
            answers += 1
            rows += torch.randint(2, VOCAB, (part,), generator=draw).tolist()
            learned += [answers % 2 == 0] * part
            continue
        name, items = part
        kind = IMAGE if name == "image" else VIDEO
        for count in [items] if name == "image" else [1] * items:
            rows.append((name, kind, count * ROWS_A_TILE, count))
            learned += [False] * (count * ROWS_A_TILE)
        tiles[name] = tiles.get(name, 0) + items
    media = {
        name: MediaBatch(
            noise(n, 3, 16, 16, seed=seed + n),
            None if name == "image" else torch.arange(n, dtype=torch.float32),
        )
        for name, n in tiles.items()
    }
    row = document(rows, media, train=True)
    keep = torch.tensor([*learned[1:], False])
    assert row.labels_T is not None
    return replace(row, labels_T=torch.where(keep, row.labels_T, IGNORE))


MIXED = [
    talk(3, ("image", 2), 5, 4, 7, seed=1),
    talk(4, 30, seed=2),
    talk(2, ("video", 3), 2, 6, 3, 4, seed=3),
    talk(("image", 1), 3, 2, ("image", 3), 2, 9, seed=4),
    talk(1, 1, seed=5),
]
PATHS = {  # every way in which `attend` reads documents without a cache
    "one": [MIXED[0]],
    "equal": [talk(3, ("image", 1), 4, 6, seed=n) for n in range(3)],
    "short": MIXED,
    "ragged": [talk(3, 90, seed=6), *MIXED],
    "long": [talk(5, ("video", 2), 5, 290, seed=7), MIXED[0], MIXED[2]],
}


def path_of(lengths: list[int]) -> str:
    if len(lengths) == 1:
        return "one"
    if len(set(lengths)) == 1:
        return "equal"
    if max(lengths) > 256:
        return "long"
    return "short" if max(lengths) * len(lengths) <= 2 * sum(lengths) else "ragged"


def test_the_cases_take_the_paths_that_they_are_named_after() -> None:
    assert {name: path_of([len(d) for d in docs]) for name, docs in PATHS.items()} == {n: n for n in PATHS}


# --- the plain twin ---------------------------------------------------------------------------------------------


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return (wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + CONFIG.language.norm_eps)).to(
        x.dtype
    ) * weight


def turn(x_BLHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x_BLHD.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def padded_logits(model: CausalVLM, documents: list[Sequence]) -> Tensor:
    """(B, L, V) of documents in a batch of equal rows, each seeing its own rows up to itself."""
    c = CONFIG.language
    words = model.embedder.words.weight
    B, L = len(documents), max(map(len, documents))
    rows = []
    for row in documents:
        x = [words[i] for i in row.ids_T]
        for span in row.spans:
            tiles = row.media[span.media].data[span.first : span.first + span.items]
            for offset, feature in enumerate(model.embedder.encode(tiles).flatten(0, 1)):
                x[span.start + offset] = feature
        rows.append(torch.stack(x + [words[0]] * (L - len(row))))
    x_BLC = torch.stack(rows)
    allowed = torch.ones(L, L, dtype=torch.bool).tril()[None].repeat(B, 1, 1)
    for b, row in enumerate(documents):
        allowed[b, :, len(row) :] = False
    allowed |= torch.eye(L, dtype=torch.bool)  # a padding row sees itself, so that its softmax is a number
    wave = 1.0 / c.rope.theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)
    angle = (torch.arange(L).float()[:, None] * wave)[None, :, None]
    cos, sin = angle.cos().to(x_BLC.dtype), angle.sin().to(x_BLC.dtype)
    for block in model.trunk.layers:
        w = {name: p for name, p in block.named_parameters()}
        h = plain_norm(x_BLC, w["norm1.weight"])
        q, k, v = (h @ w["attn.qkv.weight"].T).split(
            [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim], dim=-1
        )
        q = turn(q.reshape(B, L, c.heads, c.head_dim), cos, sin)
        k = turn(k.reshape(B, L, c.kv_heads, c.head_dim), cos, sin)
        v = v.reshape(B, L, c.kv_heads, c.head_dim)
        heads = []
        for head in range(c.heads):
            group = head // (c.heads // c.kv_heads)
            scores = q[:, :, head] @ k[:, :, group].transpose(1, 2) / math.sqrt(c.head_dim)
            heads.append(scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v[:, :, group])
        x_BLC = x_BLC + torch.cat(heads, dim=-1) @ w["attn.out.weight"].T
        h = plain_norm(x_BLC, w["norm2.weight"])
        gate, up = (h @ w["ffn.gate_up.weight"].T).chunk(2, dim=-1)
        x_BLC = x_BLC + (gate * torch.sigmoid(gate) * up) @ w["ffn.down.weight"].T
    return plain_norm(x_BLC, model.trunk.norm.weight) @ model.head.weight.T


def answers_of(row: Sequence) -> list[list[int]]:
    """Rows of each answer."""
    assert row.labels_T is not None
    out: list[list[int]] = []
    for t, label in enumerate(row.labels_T.tolist()):
        if label == IGNORE:
            continue
        if out and out[-1][-1] == t - 1:
            out[-1].append(t)
        else:
            out.append([t])
    return out


def padded_loss(model: CausalVLM, documents: list[Sequence], power: float, count: str) -> Tensor:
    """Σ w CE / Σ w with w = x ** -power, x the labelled tokens of the sample or of the answer."""
    logp = padded_logits(model, documents).log_softmax(-1)
    total, weight = torch.zeros((), dtype=logp.dtype), 0.0
    for b, row in enumerate(documents):
        answers = answers_of(row)
        for answer in answers:
            x = len(answer) if count == "response" else sum(map(len, answers))
            for t in answer:
                assert row.labels_T is not None
                total = total - x**-power * logp[b, t, row.labels_T[t]]
                weight += x**-power
    return total / weight


# --- packed -----------------------------------------------------------------------------------------------------


def packed_loss(model: CausalVLM, row: Sequence) -> Tensor:
    """The model's own loss; in fp64 from its hidden states, as the head sums in fp32."""
    if next(model.parameters()).dtype == torch.float32:
        return model.loss(row).mean
    assert row.labels_T is not None
    assert row.weight_T is not None
    keep = row.labels_T != IGNORE
    logp = (model.hidden(row)[keep] @ model.head.weight.T).log_softmax(-1)
    weight = row.weight_T[keep].double()
    return -(logp.gather(1, row.labels_T[keep, None])[:, 0] * weight).sum() / weight.sum()


def weighed(documents: list[Sequence], power: float, count: str) -> list[Sequence]:
    """As the layout weighs a document."""
    return [
        replace(d, weight_T=token_weights(d.labels_T, d.doc_T, power, count))  # type: ignore[arg-type]
        for d in documents
    ]


def gradients(model: CausalVLM, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for name, p, g in zip(names, parameters, found, strict=True)
    }


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of a parameter's gradient, relative to that gradient (both by their norms)."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-12)) for n in a)


def limit(dtype: torch.dtype) -> float:
    return 1e-10 if dtype == torch.float64 else 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_packed_gradients_are_those_of_a_padded_batch(path: str, dtype: torch.dtype) -> None:
    model, documents = build(dtype), weighed(PATHS[path], 0.0, "sample")
    packed = packed_loss(model, Sequence.pack(documents))
    padded = padded_loss(model, documents, 0.0, "sample")
    assert abs(packed.item() - padded.item()) <= limit(dtype) * padded.item()
    there = gradients(model, padded)
    assert all(bool(g.any()) for g in there.values())
    assert difference(gradients(model, packed), there) <= limit(dtype)


@pytest.mark.parametrize("count", ["sample", "response"])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_weighted_losses_equal_the_formula_over_a_padded_batch(
    power: float, count: str, dtype: torch.dtype
) -> None:
    model = build(dtype)
    packed = packed_loss(model, Sequence.pack(weighed(MIXED, power, count)))
    padded = padded_loss(model, MIXED, power, count)
    # Loss weights are kept in float32.
    allowed = 1e-5 if dtype == torch.float32 else 1e-7
    assert difference(gradients(model, packed), gradients(model, padded)) <= allowed


def test_the_ways_to_weigh_differ() -> None:
    """So that the test above would notice one taken for another."""
    model = build(torch.float64)
    ways = [(0.0, "sample"), (0.5, "sample"), (1.0, "sample"), (0.5, "response"), (1.0, "response")]
    losses = [round(padded_loss(model, MIXED, *way).item(), 6) for way in ways]
    assert len(set(losses)) == len(ways)


def test_position_numbers_alone_do_not_isolate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: one causal row whose positions restart leaks, and the comparison sees it."""
    monkeypatch.setattr(norms, "rms_norm", norm64)
    model, documents = build(torch.float64), weighed(MIXED, 0.0, "sample")
    packed = Sequence.pack(documents)
    leaking = replace(packed, doc_T=torch.zeros_like(packed.doc_T))
    assert torch.equal(leaking.pos_T, packed.pos_T)
    there = gradients(model, padded_loss(model, documents, 0.0, "sample"))
    wrong = gradients(model, packed_loss(model, leaking))
    whole = torch.cat([g.flatten() for g in there.values()])
    off = torch.cat([(wrong[n] - g).flatten() for n, g in there.items()]).norm() / whole.norm()
    assert float(off) > 0.1, off


def test_strict_padding_changes_no_gradient_and_keeps_the_encoder_in_the_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(norms, "rms_norm", norm64)
    model = build(torch.float64)
    row = Sequence.pack(weighed(MIXED, 0.5, "sample"))
    filled = row.padded(len(row) + 13, 12)
    assert sum(map(len, filled.media.values())) == 12
    assert (
        difference(gradients(model, packed_loss(model, filled)), gradients(model, packed_loss(model, row)))
        <= 1e-10
    )
    text = weighed([MIXED[1]], 0.5, "sample")[0]
    packed_loss(model, text.padded(50, 3, shape=(3, 16, 16))).backward()
    seen = {
        n: p.grad
        for n, p in model.named_parameters()
        if n.startswith(("embedder.vision", "embedder.connect"))
    }
    assert all(g is not None and not g.any() for g in seen.values())


def test_padded_packs_encode_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they show: processes that share an encoder's weights must call it in step."""
    model, calls = build(torch.float32), []
    encode = model.embedder.encode
    monkeypatch.setattr(model.embedder, "encode", lambda tiles: calls.append(len(tiles)) or encode(tiles))
    for documents in (MIXED, MIXED[:1], [MIXED[1]], [MIXED[2]]):
        calls.clear()
        model.hidden(Sequence.pack(documents).padded(140, 20, shape=(3, 16, 16)))
        assert calls == [16, 4]


# --- attention alone --------------------------------------------------------------------------------------------

LENGTHS = {
    "one": [9],
    "equal": [8, 8, 8],
    "short": [5, 9, 7, 8, 1],
    "ragged": [60, 3, 9, 1],
    "long": [300, 20, 5],
}


def rows(lengths: list[int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths), heads, 8) for heads in (4, 2, 2)]
    return [
        torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("path", LENGTHS)
def test_attention_gradients_are_those_of_the_dense_mask(path: str, dtype: torch.dtype) -> None:
    lengths = LENGTHS[path]
    assert path_of(lengths) == path
    q, k, v = rows(lengths, dtype)
    out = attend(q, k, v, Segments.of(lengths))
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = torch.autograd.grad(out, (q, k, v), pull)
    docs = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    wanted = torch.autograd.grad(attend_reference(q, k, v, docs), (q, k, v), pull)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for a, b in zip(got, wanted, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("path", [name for name in LENGTHS if name != "one"])
def test_nothing_of_a_document_reaches_another_not_even_a_bit(path: str, dtype: torch.dtype) -> None:
    lengths = LENGTHS[path]
    first = lengths[0]

    def pass_of(other_start: bool) -> list[Tensor]:
        q, k, v = rows(lengths, dtype)
        if other_start:
            mine = rows(lengths, dtype, seed=9)
            q, k, v = (
                torch.cat([b[:first], a[first:]]).detach().requires_grad_()
                for a, b in zip((q, k, v), mine, strict=True)
            )
        out = attend(q, k, v, Segments.of(lengths))
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))]

    for a, b in zip(pass_of(False), pass_of(True), strict=True):
        assert not torch.equal(a[:first], b[:first])
        assert torch.equal(a[first:], b[first:])


def test_the_tiny_encoder_is_what_the_cases_assume() -> None:
    assert isinstance(CONFIG.vision, InternViTConfig)
    assert CONFIG.tokens_per_tile == ROWS_A_TILE
