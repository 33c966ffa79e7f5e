"""Training steps: packed documents beside a padded loop around transformers, in one process.

Both models have the same weights (copies) and read the same documents. The peer does what a Hugging Face training loop
does: eight documents at a time, padded to the longest, logits of every row, the library's own loss; gradients of
enough batches are added up that an optimiser step covers the documents of one pack. `grouped` is the same loop with
documents sorted by length before they are batched (`group_by_length`), which changes the order of the data. Ours packs
the documents and computes logits of the learned rows only.

Documents: text lengths log-normal (median 200, sigma 0.9), three tenths of them learned, at the end; tiles from
`chiasm.data.packing.EXAMPLE_TILES`. Two shapes: width 192 and the width of Qwen2-0.5B (896), four layers each, the
vocabulary of Qwen2.5 (151,674), and an encoder of four layers; packs of 4,096 tokens and 12 tiles. "Cached" leaves the
encoder out of both (its features are given). Costs are CPU milliseconds for each token that is not padding, in float32
and in bfloat16 (autocast, weights in float32).

Also: the share of a pack of 8,192 tokens and 24 tiles that stays empty, beside batches of eight, and the peak memory of
cross-entropy and its gradients for 4,096 rows, a width of 896 and 150,000 words, beside plain.

Run `python benchmarks/training.py` to see the table, with `--write` to publish it; `--toy` tries the script out.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from inference import TILES, Case, build_theirs
from measure import compare, finish
from torch import Tensor, nn

from chiasm.data.packing import EXAMPLE_TILES, Item, Packer, example_items, simulate
from chiasm.data.sequence import IGNORE, IMAGE, MediaBatch, Span
from chiasm.data.sequence import Sequence as Row
from chiasm.media.pixels import normalize
from chiasm.model.alive import LiveBytes
from chiasm.model.causal import CausalVLM
from chiasm.nn.losses import cross_entropy, cross_entropy_reference, token_weights
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.model import build_internvl

MEDIAN, SIGMA, LONGEST = 200.0, 0.9, 4096
LEARNED = 0.3
TOKENS, MAX_TILES, BUFFER = 8192, 24, 20
"""Limits of a pack."""
PADDED = 8
"""Documents of one padded batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One pair of models and how much is measured."""

    name: str
    config: InternVLConfig
    tokens: int = 4096
    tiles: int = 12
    repeats: int = 3
    """Turns, each on a pack of its own."""
    cached_repeats: int = 3

    @property
    def per_tile(self) -> int:
        """Rows of one tile."""
        return self.config.tokens_per_tile


def _language(width: int, heads: int, kv_heads: int, inner: int, vocab: int) -> LanguageConfig:
    return LanguageConfig(
        family="qwen2",
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        layers=4,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        rope_theta=1e6,
        qkv_bias=True,
        tie_words=True,
    )


def _vision(width: int, heads: int, patch: int, side: int) -> InternViTConfig:
    return InternViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        layers=4,
        heads=heads,
        patch_size=patch,
        image_size=side,
    )


def shapes(*, toy: bool = False) -> list[Shape]:
    """The two published shapes: small (16 rows a tile) and that of Qwen2-0.5B (64 rows a tile of 224 pixels)."""
    vocab = 512 if toy else 151_674
    small = InternVLConfig(
        vision=_vision(96, 4, 7, 56),
        language=_language(192, 3, 1, 512, vocab),
        tiles=replace(TILES, image_size=56),
    )
    if toy:
        return [Shape(name="toy", config=small, tokens=1024, tiles=8, repeats=1, cached_repeats=1)]
    large = InternVLConfig(
        vision=_vision(384, 6, 14, 224),
        language=_language(896, 14, 2, 4864, vocab),
        tiles=replace(TILES, image_size=224),
    )
    return [
        Shape(name="width 192", config=small),
        Shape(name="width 896", config=large, repeats=2, cached_repeats=1),  # a turn takes minutes
    ]


# --- documents ------------------------------------------------------------------------------------------------


def lengths(count: int, seed: int, longest: int = LONGEST) -> list[int]:
    """Text lengths of documents."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.empty(count).log_normal_(
        mean=torch.tensor(MEDIAN).log().item(), std=SIGMA, generator=random
    )
    return [int(x) for x in drawn.clamp(16, longest)]


def tile_counts(count: int, seed: int, most: int) -> list[int]:
    """Tiles of documents, drawn from the committed list."""
    kept = [n for n in EXAMPLE_TILES if n <= most]
    picks = torch.randint(0, len(kept), (count,), generator=torch.Generator().manual_seed(seed))
    return [kept[i] for i in picks]


def document(shape: Shape, text: int, tiles: int, random: torch.Generator) -> Row:
    """Random text of `text` rows whose last part is learned, one picture of `tiles` tiles in front."""
    K, side, vocab = shape.per_tile, shape.config.tiles.image_size, shape.config.language.vocab_size
    T, pictures = text + K * tiles, K * tiles
    ids_T = torch.randint(0, vocab - 1, (T,), generator=random)
    ids_T[:pictures] = vocab - 1
    labels_T = torch.full((T,), IGNORE)
    first = T - max(1, round(LEARNED * text))
    labels_T[first - 1 : T - 1] = ids_T[first:]
    spans: tuple[Span, ...] = ()
    media: dict[str, MediaBatch] = {}
    if tiles:
        pixels = torch.randint(0, 256, (tiles, 3, side, side), generator=random, dtype=torch.uint8)
        spans, media = (
            (Span(media="image", start=0, length=pictures, first=0, items=tiles),),
            {"image": MediaBatch(pixels)},
        )
    doc_T = torch.zeros(T, dtype=torch.int32)
    kind_T = torch.zeros(T, dtype=torch.int8)
    kind_T[:pictures] = IMAGE
    return Row(
        ids_T=ids_T,
        kind_T=kind_T,
        doc_T=doc_T,
        pos_T=torch.arange(T, dtype=torch.float32),
        labels_T=labels_T,
        weight_T=token_weights(labels_T, doc_T, 0.0),
        spans=spans,
        media=media,
    )


def pack_of(shape: Shape, seed: int) -> list[Row]:
    """The documents of one full pack."""
    texts = lengths(400, seed, shape.tokens // 2)
    tiles = tile_counts(400, seed, shape.tiles // 2)
    packer = Packer(max_tokens=shape.tokens, max_tiles=shape.tiles, buffer=BUFFER)
    for n, (text, count) in enumerate(zip(texts, tiles, strict=True)):
        for pack in packer.push(Item((n,), text + shape.per_tile * count, count)).packs:
            random = torch.Generator().manual_seed(seed)
            numbers = [int(piece.key[0]) for piece in pack.pieces]
            return [document(shape, texts[number], tiles[number], random) for number in numbers]
    raise AssertionError("400 documents fill no pack")


# --- models ---------------------------------------------------------------------------------------------------


def build(shape: Shape) -> tuple[CausalVLM, nn.Module]:
    """Our model and transformers', of equal random weights, each with its own."""
    random = torch.Generator().manual_seed(0)
    ours = build_internvl(shape.config, generator=random)
    ours.head.weight = ours.embedder.words.weight  # type: ignore[assignment, union-attr]
    case = Case(config=shape.config, dtype=torch.float32)
    theirs = copy.deepcopy(build_theirs(case, ours))
    return ours.train(), theirs.train()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The same optimiser for both."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)


class Given(nn.Module):
    """An embedder whose picture rows are given: what a frozen encoder leaves when its features are kept."""

    def __init__(self, words: nn.Module) -> None:
        super().__init__()
        self.words = words

    def forward(self, sequence: Row, cache: object = None) -> Any:
        from chiasm.parts.contracts import Embedded

        x_TC = self.words(sequence.ids_T)
        seen_T = sequence.kind_T == IMAGE
        return Embedded(torch.where(seen_T[:, None], features(sequence.ids_T, x_TC.shape[1]), x_TC))


def features(ids: Tensor, width: int) -> Tensor:
    """Stand-ins for kept features: (…, width), constant."""
    return torch.full((*ids.shape, width), 0.02)


def step_ours(
    model: CausalVLM, optimizer: torch.optim.Optimizer | None, rows: Sequence[Row], dtype: torch.dtype
) -> float:
    """One step on the documents as one pack; returns the mean loss of its learned tokens."""
    pack = Row.pack(rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        part = model.loss(pack).parts["text"]
    if optimizer is not None:
        part.mean.backward()
        _finish(model, optimizer)
    return float(part.mean.detach())


def _finish(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def padded(shape: Shape, rows: Sequence[Row], *, grouped: bool) -> Iterator[dict[str, Tensor]]:
    """The documents in batches of eight, padded on the right."""
    order = sorted(rows, key=len) if grouped else list(rows)
    for at in range(0, len(order), PADDED):
        group = order[at : at + PADDED]
        longest = max(map(len, group))

        def fill(name: str, value: int, group: list[Row] = group, longest: int = longest) -> Tensor:
            return torch.stack(
                [F.pad(getattr(row, name), (0, longest - len(row)), value=value) for row in group]
            )

        # transformers shifts labels itself: undo our shift.
        labels = torch.stack(
            [F.pad(row.labels_T, (1, longest - len(row) - 1), value=IGNORE) if len(row) < longest
             else F.pad(row.labels_T[:-1], (1, 0), value=IGNORE) for row in group]  # type: ignore[index]
        )  # fmt: skip
        mask = torch.stack([(torch.arange(longest) < len(row)).long() for row in group])
        batch = {"input_ids": fill("ids_T", 0), "attention_mask": mask, "labels": labels}
        pictures = [row.media["image"].data for row in group if row.media]
        if pictures:
            batch["pixel_values"] = normalize(torch.cat(pictures), shape.config.tiles, dtype=torch.float32)
        yield batch


def step_theirs(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    shape: Shape,
    rows: Sequence[Row],
    dtype: torch.dtype,
    *,
    cached: bool,
    grouped: bool = False,
) -> float:
    """One optimiser step on the same documents, in padded batches; returns the mean loss of their learned tokens."""
    learned = sum(int((row.labels_T != IGNORE).sum()) for row in rows)  # type: ignore[union-attr]
    mean = 0.0
    for batch in padded(shape, rows, grouped=grouped):
        share = int((batch["labels"] != IGNORE).sum()) / learned
        if cached:
            batch.pop("pixel_values", None)
            ids = batch.pop("input_ids")
            words = model.get_input_embeddings()(ids)  # type: ignore[operator]
            seen = ids == shape.config.language.vocab_size - 1
            batch["inputs_embeds"] = torch.where(seen[..., None], features(ids, words.shape[-1]), words)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        if optimizer is not None:
            (loss * share).backward()
        mean += float(loss.detach()) * share
    if optimizer is not None:
        _finish(model, optimizer)
    return mean


# --- measurements ---------------------------------------------------------------------------------------------


def compare_steps(shape: Shape, dtype: torch.dtype, *, cached: bool) -> list[dict[str, Any]]:
    """Rows of the table for one shape, precision and arm."""
    ours, theirs = build(shape)
    if cached:
        ours.embedder = Given(ours.embedder.words)  # type: ignore[arg-type]
    first = pack_of(shape, 1000)
    with torch.no_grad():
        a = step_ours(ours, None, first, dtype)
        b = step_theirs(theirs, None, shape, first, dtype, cached=cached)
        c = step_theirs(theirs, None, shape, first, dtype, cached=cached, grouped=True)
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    if max(abs(a - b), abs(a - c)) > bound * abs(a):
        raise SystemExit(
            f"{shape.name}: cross-entropy {a:.6f}, padded {b:.6f}, grouped {c:.6f}: not the same work"
        )
    mine, yours = adamw(ours), adamw(theirs)
    packs = itertools.count()

    def timed(call: Any, rows: list[Row]) -> float:
        begin = time.process_time()
        call(rows)
        return (time.process_time() - begin) * 1e3 / sum(map(len, rows))

    def turn(most: int | None = None) -> tuple[float, float, float]:
        rows = pack_of(shape, next(packs))[:most]
        return (
            timed(lambda r: step_ours(ours, mine, r, dtype), rows),
            timed(lambda r: step_theirs(theirs, yours, shape, r, dtype, cached=cached), rows),
            timed(lambda r: step_theirs(theirs, yours, shape, r, dtype, cached=cached, grouped=True), rows),
        )

    turn(2)  # two documents: memory is allocated and kernels are chosen
    seen = [turn() for _ in range(shape.cached_repeats if cached else shape.repeats)]
    us, peer, grouped = (list(column) for column in zip(*seen, strict=True))
    arm, precision = "cached features" if cached else "end to end", str(dtype).removeprefix("torch.")
    what = f"training, {shape.name}, {arm}, {precision}"
    required = 0.0
    if not cached:
        required = 1.5
    elif shape.name == "width 192":
        required = 5.0
    row = compare(what, peer, us, unit="ms/token", required=f">= {required:g}x" if required else "")
    if required:
        row["ok"] = row["ratio"] >= required
    row["note"] = f"same mean loss {a:.4f} before training"
    return [row, compare(f"{what}, peer grouped by length", grouped, us, unit="ms/token")]


def fill(*, items: int = 20_000) -> dict[str, Any]:
    """The row of what stays empty: 256 rows a tile, as InternVL has them."""
    drawn = example_items(items)
    found = simulate(drawn, max_tokens=TOKENS, max_tiles=MAX_TILES, buffer=BUFFER)
    groups = [drawn[at : at + PADDED] for at in range(0, items, PADDED)]
    held = sum(item.tokens for item in drawn)
    padded_rows = sum(len(group) * max(item.tokens for item in group) for group in groups)
    what = (
        f"empty rows, {TOKENS} tokens and {MAX_TILES} tiles a pack, {BUFFER} open; peer: batches of {PADDED}"
    )
    return compare(
        what,
        [100 * (1 - held / padded_rows)],
        [100 * (1 - found.token_fill)],
        unit="%",
        required="<= 5 %",
        ok=found.token_fill >= 0.95,
    )


def cross_entropy_memory(*, rows: int = 4096, width: int = 896, vocabulary: int = 150_000) -> dict[str, Any]:
    """The row of peak bytes, forward and backward, beyond the head and its gradient."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=random).requires_grad_()
    head = torch.randn(vocabulary, width, generator=random).mul_(0.02).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,), generator=random)
    weight = torch.ones(rows)
    head.grad = torch.zeros_like(head)

    def peak(call: Any) -> int:
        with LiveBytes() as live:
            total, count = call(hidden, head, labels, weight)
            (total / count).backward()
        hidden.grad = None
        return live.peak

    # Forming the head's gradient takes one buffer of its size, in both.
    size = head.numel() * 4
    plain, ours = peak(cross_entropy_reference) - size, peak(cross_entropy) - size
    return compare(
        f"peak memory of cross-entropy, {rows:,} rows, {vocabulary:,} words",
        [plain / 2**30],
        [ours / 2**30],
        unit="GiB",
        required=">= 4x",
        ok=4 * ours <= plain,
    )


def measure(*, toy: bool = False) -> dict[str, Any]:
    """All rows of the table."""
    rows = []
    for shape in shapes(toy=toy):
        for dtype in (torch.float32, torch.bfloat16):
            for cached in (True, False):
                rows += compare_steps(shape, dtype, cached=cached)
                print(f"{rows[-2]['name']}: {rows[-2]['ratio']:.2f}x", flush=True)
    rows.append(fill(items=2_000 if toy else 20_000))
    sizes = {"rows": 1200, "width": 16, "vocabulary": 4000} if toy else {}
    rows.append(cross_entropy_memory(**sizes))
    return {"rows": rows, "note": "Milliseconds of CPU a token that is not padding, one thread."}


def main(arguments: Iterable[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.write and options.toy:
        parser.error("--toy measures nothing worth keeping: leave out --write")
    torch.set_num_threads(1)
    finish("training", measure(toy=options.toy), write=options.write)


if __name__ == "__main__":
    main()
