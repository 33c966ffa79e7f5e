"""The cost of a training step: FLOPs against torch's counter, memory against the storages that are alive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from chiasm.data.sequence import IGNORE, IMAGE, MediaBatch, Sequence, Span
from chiasm.errors import ConfigError
from chiasm.media.tiles import TilePolicy
from chiasm.model import cost
from chiasm.model.alive import LiveBytes
from chiasm.model.causal import CausalVLM
from chiasm.model.train_cost import (
    Learns,
    TrainJob,
    adapter_parameters,
    flops_lines,
    nominal_tokens,
    parameter_lines,
    step_seconds,
)
from chiasm.model.train_memory import memory_lines, moment_lines
from chiasm.nn.lora import apply_lora, fused_splits
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.model import build_internvl

VISION = InternViTConfig(
    hidden_size=64,
    intermediate_size=256,
    layers=3,
    heads=4,
    patch_size=14,
    image_size=112,
    layer_scale_init=1.0,
)
LANGUAGE = LanguageConfig(
    family="qwen2",
    vocab_size=2000,
    hidden_size=128,
    intermediate_size=352,
    layers=3,
    heads=8,
    kv_heads=2,
    head_dim=16,
    qkv_bias=True,
)
CONFIG = InternVLConfig(vision=VISION, language=LANGUAGE, tiles=TilePolicy(image_size=112))
K = CONFIG.tokens_per_tile
TEXT = ((300, 200, 100), (0, 1, 0))
TILES = ((18 * K + 50, 10 * K + 30), (18, 10))
ADAPTERS = Learns(vision=False, projector=False, words=False, layers=False, head=False, rank=8)
LARGE = replace(CONFIG, language=replace(LANGUAGE, vocab_size=15_000))


def packed(config: InternVLConfig, lengths: tuple[int, ...], tiles: tuple[int, ...]) -> Sequence:
    """Documents that begin with their tiles; the second half of their text is learned."""
    random, out = torch.Generator().manual_seed(0), []
    side, words = config.tiles.image_size, config.language.vocab_size
    for length, shown in zip(lengths, tiles, strict=True):
        ids_T = torch.randint(0, words, (length,), generator=random)
        labels_T, kind_T = torch.full((length,), IGNORE), torch.zeros(length, dtype=torch.int8)
        learned = (length - shown * K) // 2
        labels_T[-learned:] = ids_T[-learned:]
        kind_T[: shown * K] = IMAGE
        tiles_N3SS = torch.randint(0, 256, (shown, 3, side, side), dtype=torch.uint8, generator=random)
        out.append(
            Sequence(
                ids_T=ids_T,
                kind_T=kind_T,
                doc_T=torch.zeros(length, dtype=torch.int32),
                pos_T=torch.arange(length).float(),
                labels_T=labels_T,
                weight_T=(labels_T != IGNORE).float(),
                spans=(Span(media="image", start=0, length=shown * K, first=0, items=shown),)
                if shown
                else (),
                media={"image": MediaBatch(tiles_N3SS)} if shown else {},
            )
        )
    return Sequence.pack(out)


def model_of(config: InternVLConfig, learns: Learns) -> CausalVLM:
    torch.manual_seed(0)
    model = build_internvl(config, generator=torch.Generator().manual_seed(0))
    model.embedder.vision.requires_grad_(learns.vision)
    model.embedder.connect.requires_grad_(learns.projector)
    model.trunk.requires_grad_(learns.layers)
    model.embedder.words.requires_grad_(learns.words)
    if not config.language.tie_words:
        model.head.requires_grad_(learns.head)
    if learns.rank:
        names = {"qkv": "attn.qkv", "out": "attn.out", "gate_up": "ffn.gate_up", "down": "ffn.down"}
        paths = [f"layers.*.{names[name]}" for name in sorted(learns.adapted)]
        dropout = 0.05 * learns.dropout
        apply_lora(model.trunk, paths, learns.rank, 16.0, dropout, splits=fused_splits(model.trunk))
    return model.train()


def job_of(config: InternVLConfig, batch: Sequence, learns: Learns, **more) -> TrainJob:
    return TrainJob(
        language=config.language,
        vision=config.vision,
        projector_inputs=config.projector_inputs,
        tokens_per_tile=config.tokens_per_tile,
        rows=len(batch),
        tiles=sum(len(media) for media in batch.media.values()),
        learned=int((batch.labels_T != IGNORE).sum()),
        documents=batch.docs,
        learns=learns,
        **more,
    )


def peak_of_a_step(model: CausalVLM, batch: Sequence, parts: int = 1) -> int:
    """Most bytes alive during the second step of AdamW (the first one makes its moments)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    rows = (batch.ids_T, batch.kind_T, batch.doc_T, batch.pos_T, batch.labels_T, batch.weight_T)
    with LiveBytes([*model.parameters(), *rows, *(m.data for m in batch.media.values())]) as alive:
        for _ in range(2):
            alive.restart()
            for _ in range(parts):
                model.loss(batch).mean.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return alive.peak


CASES = {
    "text-heavy": (CONFIG, TEXT, Learns(), {}),
    "tile-heavy": (CONFIG, TILES, Learns(), {}),
    "adapters": (CONFIG, TEXT, ADAPTERS, {}),
    "adapters with dropout, of attention": (
        CONFIG,
        TEXT,
        replace(ADAPTERS, dropout=True, adapted=frozenset({"qkv", "out"})),
        {},
    ),
    "stage 1": (CONFIG, TILES, Learns(vision=False, words=False, layers=False, head=False), {}),
    "stage 1.5": (CONFIG, TILES, Learns(words=False, layers=False, head=False), {}),
    "frozen encoder": (CONFIG, TILES, Learns(vision=False), {}),
    "recomputed": (CONFIG, TILES, Learns(), {"recompute_vision": True, "recompute_language": True}),
    "recomputed text": (CONFIG, TEXT, Learns(), {"recompute_language": True}),
    "two micro-batches": (CONFIG, TILES, Learns(), {"micro_batches": 2}),
    "large vocabulary": (LARGE, TEXT, Learns(), {}),
    "tied words": (replace(LARGE, language=replace(LARGE.language, tie_words=True)), TEXT, Learns(), {}),
    "6B's eyes, Qwen3's heads": (
        replace(
            CONFIG,
            vision=replace(VISION, norm="rms_norm", qk_norm=True, qkv_bias=False),
            language=replace(LANGUAGE, family="qwen3", qkv_bias=False, qk_norm=True),
        ),
        TILES,
        Learns(),
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_planned_peak_is_that_of_a_step(name: str) -> None:
    config, (lengths, tiles), learns, switches = CASES[name]
    model, batch = model_of(config, learns), packed(config, lengths, tiles)
    model.trunk.checkpointing = switches.get("recompute_language", False)
    model.embedder.vision.checkpoint = switches.get("recompute_vision", False)
    measured = peak_of_a_step(model, batch, switches.get("micro_batches", 1))
    planned = memory_lines(job_of(config, batch, learns, **switches))["peak"].value
    # The requirement is 10 %; they agree within 3 %, and a tensor too many or too few in a layer would be more.
    assert planned == pytest.approx(measured, rel=0.035)


@pytest.mark.parametrize(
    "name", ["text-heavy", "tile-heavy", "adapters", "stage 1", "stage 1.5", "frozen encoder"]
)
def test_flops_are_those_that_run_forward_and_backward(name: str) -> None:
    config, (lengths, tiles), learns, _ = CASES[name]
    # One document, so that the counter's rectangle of causal attention is known.
    model, batch = model_of(config, learns), packed(config, (sum(lengths),), (sum(tiles),))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(batch).mean.backward()
    job = job_of(config, batch, learns)
    lines, T = flops_lines(job), len(batch)
    triangle = lines["decoder: attention"].value * ((2 * T) / (T + 1) - 1)
    unseen = 0.0
    if learns.vision:  # nobody asks for the gradient of pixels, which a factor of 3 counts
        v = config.vision
        unseen += job.tiles * 2 * v.tokens * v.hidden_size * v.channels * v.patch_size**2
    if learns.head:  # the head's gradient is added to in place, which the counter does not know
        unseen += cost.head_flops(config.language, job.learned)
    if not learns.enters:  # the first layer's input needs no gradient where nothing below it learns
        c = config.language
        unseen += 2 * T * c.hidden_size * ((c.heads + 2 * c.kv_heads) * c.head_dim + 3 * learns.rank)
    assert counter.get_total_flops() == pytest.approx(lines["total"].value + triangle - unseen, rel=1e-9)


def test_recomputed_layers_run_once_more() -> None:
    config, (lengths, tiles), learns, _ = CASES["tile-heavy"]
    batch = packed(config, lengths, tiles)
    plain, again = (
        job_of(config, batch, learns, recompute_vision=on, recompute_language=on) for on in (False, True)
    )
    more = flops_lines(again)["recomputed"].value
    T, n = len(batch), batch.docs
    c = config.language
    linear = cost.language_flops(c, T) - c.layers * 4 * c.heads * c.head_dim * T * (T + 1) // 2
    scores = c.layers * 4 * c.heads * c.head_dim * T * (T / n + 1) / 2
    assert more == pytest.approx(linear + scores + cost.vision_flops(config.vision, plain.tiles))
    assert flops_lines(again)["total"].value == flops_lines(plain)["total"].value + more
    assert memory_lines(again)["peak"].value < 0.6 * memory_lines(plain)["peak"].value


def test_parameters_are_counted_as_trained_or_frozen() -> None:
    batch = packed(CONFIG, *TEXT)
    model = model_of(CONFIG, ADAPTERS)
    job = job_of(CONFIG, batch, ADAPTERS)
    assert job.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert job.trained == adapter_parameters(LANGUAGE, 8)
    assert parameter_lines(job)["total"].value == sum(p.numel() for p in model.parameters())
    some = replace(ADAPTERS, adapted=frozenset({"qkv", "down"}))
    counted = sum(p.numel() for p in model_of(CONFIG, some).parameters() if p.requires_grad)
    assert job_of(CONFIG, batch, some).trained == counted


def test_devices_share_what_is_divided() -> None:
    batch = packed(CONFIG, *TILES)
    one, eight = (job_of(CONFIG, batch, Learns(), micro_batches=8, gpus=n, shard="full") for n in (1, 8))
    copies = job_of(CONFIG, batch, Learns(), micro_batches=8, gpus=8, shard="none")
    whole, part, copied = memory_lines(one), memory_lines(eight), memory_lines(copies)
    assert part["optimiser"].value == whole["optimiser"].value / 8
    assert part["gradients"].value == whole["gradients"].value / 8
    assert "gathered" in part
    assert "gathered" not in copied
    assert copied["optimiser"].value == whole["optimiser"].value
    assert flops_lines(one)["total"].value == flops_lines(eight)["total"].value
    assert step_seconds(eight, 1e12, 0.5) == pytest.approx(step_seconds(one, 1e12, 0.5) / 8)
    assert max(line.value for line in moment_lines(one).values()) == whole["peak"].value


def test_wrong_jobs_are_refused_in_one_line() -> None:
    batch = packed(CONFIG, *TEXT)
    for more, words in (
        ({"micro_batches": 512, "gpus": 7}, "do not divide among 7 devices"),
        ({"frozen": "int3"}, "dtype 'int3'"),
    ):
        with pytest.raises(ConfigError, match=words):
            job_of(CONFIG, batch, Learns(), **more)
    with pytest.raises(ConfigError, match="more than the 600 rows"):
        replace(job_of(CONFIG, batch, Learns()), tiles=1000)
    with pytest.raises(ConfigError, match="not both"):
        Learns(rank=4)
    with pytest.raises(ConfigError, match="a block has"):
        replace(ADAPTERS, adapted=frozenset({"gate"}))


def test_nominal_tokens_are_counted_as_in_the_report() -> None:
    assert nominal_tokens(5500, 512, 16_384) == 44e9
    assert nominal_tokens(22_000, 512, 16_384) == 176e9


def test_live_bytes_sees_views_frees_and_writes_in_place() -> None:
    x = torch.zeros(100)
    with LiveBytes([x]) as alive:
        assert alive.now == 400
        y = x + 1
        z = y[:10]
        y.mul_(2)
        assert alive.now == alive.peak == 800
        del y
        assert alive.now == 800  # the view keeps it
        del z
        assert alive.now == 400
        assert alive.peak == 800
        alive.restart()
        assert alive.peak == 400
