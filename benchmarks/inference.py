"""Prefill, decoding and the first token of a picture question: Chiasm beside transformers, in one process.

Random weights in the shape of InternVL2.5-1B (InternViT-300M, Qwen2-0.5B, vocabulary 151,674), bf16, one thread,
batch 1, greedy. Both models share every weight in memory. The prompt has 290 rows: all of them text where prefill
and decoding are measured (what a row stands for makes no difference to the decoder), 256 of one picture tile and 34
of text where the first token is. Times are read where a token comes out of each loop (`Decoding.step`, a streamer of
`generate`): the first token ends the prefill, each of the 32 others is one decoding step.

Run `python benchmarks/inference.py` to see the table, with `--write` to publish it; `--toy` tries the script out.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from measure import alternate, compare, finish
from torch import Tensor, nn

from chiasm.checkpoint.adapters import adapter_for
from chiasm.data.sequence import IMAGE, MediaBatch, Sequence, Span
from chiasm.media.pixels import normalize
from chiasm.media.tiles import TilePolicy
from chiasm.model import generate as loop
from chiasm.model.causal import CausalVLM
from chiasm.model.prefix import PrefixCache
from chiasm.nn.products import single_row_products
from chiasm.parts.embed import FeatureCache
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig, internvit_300m
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.model import build_internvl

TILES = TilePolicy(dynamic=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is measured."""

    config: InternVLConfig
    prompt: int = 290
    steps: int = 32
    repeats: int = 7
    dtype: torch.dtype = torch.bfloat16


def full(*, layers: int = 24, vision_layers: int = 24, repeats: int = 7) -> Case:
    """The published case (or fewer layers of it)."""
    language = LanguageConfig(
        family="qwen2",
        vocab_size=151_674,
        hidden_size=896,
        intermediate_size=4864,
        layers=layers,
        heads=14,
        kv_heads=2,
        head_dim=64,
        rope_theta=1e6,
        qkv_bias=True,
        tie_words=True,
    )
    vision = replace(internvit_300m(), layers=vision_layers)
    return Case(config=InternVLConfig(vision=vision, language=language, tiles=TILES), repeats=repeats)


def toy() -> Case:
    """Small enough for a test of this script; its times mean nothing."""
    language = LanguageConfig(
        family="qwen2",
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        qkv_bias=True,
        tie_words=True,
    )
    vision = InternViTConfig(
        hidden_size=32, intermediate_size=64, layers=1, heads=2, patch_size=14, image_size=56
    )
    tiles = replace(TILES, image_size=56)
    return Case(
        config=InternVLConfig(vision=vision, language=language, tiles=tiles), prompt=12, steps=3, repeats=2
    )


def build_ours(case: Case) -> CausalVLM:
    """Our model with random weights: matrices and biases normal(0, 0.02), norms near 1, LayerScale 0.1."""
    with torch.device("meta"):
        model = build_internvl(case.config)
    model = model.to(case.dtype).to_empty(device="cpu").requires_grad_(False).eval()
    model.head.weight = model.embedder.words.weight  # type: ignore[assignment, union-attr]
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.normal_(0.0, 0.02, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1.0)
        elif name.endswith((".ls1", ".ls2")):
            parameter.add_(0.1)
    return model


def build_theirs(case: Case, ours: CausalVLM) -> nn.Module:
    """transformers' model on the same memory: its q, k, v, gate and up are row ranges of our fused matrices."""
    c = case.config
    config = transformers.InternVLConfig(
        text_config=c.language.to_public(),
        vision_config=c.vision.to_public("hf"),
        image_token_id=c.language.vocab_size - 1,
        image_seq_length=c.tokens_per_tile,
        tie_word_embeddings=c.language.tie_words,
        dtype=case.dtype,
    )
    with torch.device("meta"):
        model = transformers.InternVLForConditionalGeneration(config).to(case.dtype)
    adapter = adapter_for("hf", language=c.language, vision=c.vision)
    state = dict(adapter.to_public(dict(ours.named_parameters())))
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    text = model.model.language_model
    text.rotary_emb = type(text.rotary_emb)(config=config.text_config)  # its table is no parameter
    left = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    assert not left, left
    model.generation_config.eos_token_id = None  # random weights must not end early
    model.generation_config.pad_token_id = 0
    # Its parameters keep requires_grad, as from_pretrained leaves them. Without, torch would copy the whole word
    # matrix for the last row's logits (2.5 s): a trap, and no part of what is compared here.
    return model.eval()


def text_prompt(case: Case, seed: int) -> Tensor:
    """(T,) random ids without the picture's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, case.config.language.vocab_size - 1, (case.prompt,), generator=generator)


def picture_prompt(case: Case, seed: int) -> Sequence:
    """The prompt with one picture in front of the question; the picture and what precedes it are always the same."""
    c = case.config
    side, length = c.tiles.image_size, c.tokens_per_tile
    start = (case.prompt - length) // 2
    sequence = Sequence.of_text(text_prompt(case, seed))
    sequence.ids_T[:start] = text_prompt(case, 0)[:start]
    sequence.ids_T[start : start + length] = c.language.vocab_size - 1
    sequence.kind_T[start : start + length] = IMAGE
    noise = torch.randint(0, 256, (1, 3, side, side), generator=torch.Generator().manual_seed(1))
    span = Span(media="image", start=start, length=length, first=0, items=1, key="the picture")
    return replace(sequence, spans=(span,), media={"image": MediaBatch(noise.to(torch.uint8))})


@dataclass(slots=True)
class Clock:
    """CPU seconds at the start and at every token; also what `generate` takes for a streamer."""

    stamps: list[float]
    ids: list[int]
    prompt_seen: bool = False

    @classmethod
    def start(cls) -> Clock:
        return cls([time.process_time()], [])

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:  # `generate` first hands over the prompt
            self.prompt_seen = True
            return
        self.token(int(value))

    def token(self, token: int) -> None:
        self.stamps.append(time.process_time())
        self.ids.append(token)

    def end(self) -> None:
        pass

    @property
    def first(self) -> float:
        """Milliseconds to the first token."""
        return (self.stamps[1] - self.stamps[0]) * 1e3

    @property
    def step(self) -> float:
        """Milliseconds of a decoding step, mean over all."""
        return (self.stamps[-1] - self.stamps[1]) * 1e3 / (len(self.stamps) - 2)


def run_ours(model: CausalVLM, prompt: Sequence, tokens: int, prefixes: PrefixCache | None = None) -> Clock:
    clock = Clock.start()
    run = loop.Decoding(model, [prompt], limit=tokens, prefixes=prefixes)
    while events := run.step():
        clock.token(events[0].id or 0)
    return clock


@torch.inference_mode()
def run_theirs(model: Any, ids_T: Tensor, tokens: int, pixels: Tensor | None = None) -> Clock:
    clock = Clock.start()
    media = {} if pixels is None else {"pixel_values": pixels}
    ids_1T = ids_T[None]
    mask = torch.ones_like(ids_1T)
    model.generate(
        input_ids=ids_1T, attention_mask=mask, do_sample=False, max_new_tokens=tokens, streamer=clock, **media
    )
    return clock


def measure_text(case: Case, ours: CausalVLM, theirs: nn.Module) -> list[dict[str, Any]]:
    """Prefill and decoding; fresh prompts each turn, the same for both."""
    turn = {"ours": 0, "theirs": 0}
    tokens = case.steps + 1

    def prompt(who: str) -> Tensor:
        turn[who] += 1
        return text_prompt(case, turn[who])

    seen = alternate(
        {
            "theirs": lambda: run_theirs(theirs, prompt("theirs"), tokens),
            "ours": lambda: run_ours(ours, Sequence.of_text(prompt("ours")), tokens),
        },
        case.repeats,
    )
    assert all(len(clock.ids) == tokens for clocks in seen.values() for clock in clocks)
    peers, mine = seen["theirs"], seen["ours"]
    plain = alternate({"ours": lambda: _with_onednn(case, ours)}, min(3, case.repeats), warm_up=0)["ours"]
    same = [_common(a.ids, b.ids) for a, b in zip(peers, mine, strict=True)]
    return [
        compare("prefill, 290 rows", [c.first for c in peers], [c.first for c in mine], required=">= 0.95x"),
        compare(
            "decoding, a token",
            [c.step for c in peers],
            [c.step for c in mine],
            required=">= 1.1x",
            note=f"greedy tokens equal at the start: median {sorted(same)[len(same) // 2]} of {tokens}",
        ),
        compare(
            "decoding, a token, without our choice of kernel",
            [c.step for c in peers],
            [c.step for c in plain],
            note="oneDNN left on for single rows",
        ),
    ]


def measure_picture(case: Case, ours: CausalVLM, theirs: nn.Module) -> list[dict[str, Any]]:
    """Time to the first token of a picture question: when the picture is new, and when it was seen before.

    Then its features are remembered, or (as `ChatModel` does) also the keys and values of the beginning of the prompt,
    which two questions about a picture share: here all rows but the 17 of the question.
    """
    features, prefixes = FeatureCache(), PrefixCache(min_rows=1)
    ours.embedder.features = features  # type: ignore[assignment]
    question = iter(range(3, 10_000))
    pixels = normalize(picture_prompt(case, 0).media["image"].data, case.config.tiles, dtype=case.dtype)

    def new() -> Clock:
        features.clear()
        return run_ours(ours, picture_prompt(case, 1), 1)

    seen = alternate(
        {
            "theirs": lambda: run_theirs(theirs, picture_prompt(case, 2).ids_T, 1, pixels),
            "new": new,
            "features": lambda: run_ours(ours, picture_prompt(case, 2), 1),
            "prefix": lambda: run_ours(ours, picture_prompt(case, next(question)), 1, prefixes),
        },
        case.repeats,
    )
    peers, first, again, prefix = (
        [clock.first for clock in seen[name]] for name in ("theirs", "new", "features", "prefix")
    )
    assert prefixes.hits == case.repeats  # the warm-up reads it whole
    return [
        compare("first token, new picture", peers, first),
        compare("first token, second question, features remembered", peers, again, required=">= 3x"),
        compare("first token, second question, prompt remembered too", peers, prefix, required=">= 8x"),
    ]


def _with_onednn(case: Case, ours: CausalVLM) -> Clock:
    """Our loop as it would be without `single_row_products`."""
    loop.single_row_products = lambda active: single_row_products(False)  # type: ignore[assignment]
    try:
        return run_ours(ours, Sequence.of_text(text_prompt(case, 1)), case.steps + 1)
    finally:
        loop.single_row_products = single_row_products


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def measure(case: Case) -> dict[str, Any]:
    """All rows of a case, and the logits' distance as a check that both compute the same."""
    torch.set_num_threads(1)
    ours = build_ours(case)
    theirs = build_theirs(case, ours)
    distance = logits_distance(case, ours, theirs)
    rows = measure_text(case, ours, theirs) + measure_picture(case, ours, theirs)
    for row in rows:
        if row["required"]:
            row["ok"] = row["ratio"] >= float(row["required"].strip(">= x"))
    return {
        "rows": rows,
        "logits_distance": distance,
        "remark": "Peer: `InternVLForConditionalGeneration.generate`, bf16, SDPA. CPU time, one thread. Logits after "
        f"the picture prompt differ by {distance:.1%} of their standard deviation (root mean square; bf16 rounding).",
    }


@torch.inference_mode()
def logits_distance(case: Case, ours: CausalVLM, theirs: Any) -> float:
    """Root mean square difference of the last row's logits, in standard deviations of them."""
    prompt = picture_prompt(case, 0)
    pixels = normalize(prompt.media["image"].data, case.config.tiles, dtype=case.dtype)
    mine = ours.head.logits(ours.hidden(prompt)[-1:])[0]  # type: ignore[operator]
    peers = theirs(input_ids=prompt.ids_T[None], pixel_values=pixels, logits_to_keep=1).logits[0, -1].float()
    return float((mine - peers).square().mean().sqrt() / peers.std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the result and rebuild the README's table")
    parser.add_argument(
        "--layers", type=int, default=24, help="of decoder and encoder; fewer for a quick look"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--toy", action="store_true", help="a tiny model: tries the script out")
    args = parser.parse_args()
    if args.write and (args.toy or args.layers != 24 or args.repeats < 7):
        parser.error("only the full protocol is published: leave out --toy, --layers and --repeats")
    case = toy() if args.toy else full(layers=args.layers, vision_layers=args.layers, repeats=args.repeats)
    finish("inference", measure(case), write=args.write)


if __name__ == "__main__":
    main()
