"""A ChatModel of a few thousand random weights, and ragged conversations for it, some with pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tests.contracts import internvl
from tests.contracts.skeleton import LANGUAGE, initialise

from chiasm.data.layout import LayoutSpec
from chiasm.media.tiles import TilePolicy
from chiasm.model.causal import CausalVLM
from chiasm.model.chat import ChatModel
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.model import build_internvl
from tiny_tokenizers import byte_level

SIDE = 28
SWITCH = 16
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 6.0],
    "original_max_position_embeddings": SWITCH,
}


def tiny_model(**facts: Any) -> CausalVLM:
    """The InternVL skeleton of the contract tests (fp64) with other facts of its language model."""
    config = replace(internvl.CONFIG, language=replace(LANGUAGE, **facts))
    return initialise(build_internvl(config))


def tiny_chat(
    *, seed: int = 0, max_length: int | None = 1024, language: dict[str, Any] | None = None, **options: Any
) -> ChatModel:
    """An untrained InternVL in fp32 that knows the tokens of `byte_level`; `options` are those of ChatModel."""
    tokenizer = byte_level()
    facts: dict[str, Any] = {
        "family": "qwen2",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 24,
        "intermediate_size": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "qkv_bias": True,
    }
    config = InternVLConfig(
        vision=InternViTConfig(
            hidden_size=12, intermediate_size=20, layers=1, heads=2, patch_size=7, image_size=SIDE
        ),
        language=LanguageConfig(**{**facts, **(language or {})}),
        tiles=TilePolicy(image_size=SIDE, max_tiles=4),
        template="internvl2_5",
    )
    model = build_internvl(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(1)
    spec = LayoutSpec(
        tokenizer=tokenizer,
        template=config.template,
        tiles=config.tiles,
        tokens_per_tile=config.tokens_per_tile,
        max_length=max_length,
        system="Be brief.",
    )
    return ChatModel(model, spec, **options)


def picture(width: int = 60, height: int = 30, seed: int = 0) -> Image.Image:
    """Noise, the same for the same arguments."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ask(text: str, *pictures: Image.Image) -> list[dict[str, Any]]:
    """One question about some pictures."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": p} for p in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def ragged(
    number: int, *, seed: int = 0, longest: int = 300
) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """(messages, options) of unequal lengths, samplings and limits; every third one has a picture."""
    random = np.random.default_rng(seed)
    letters = list("abcdefgh ,.?")
    out = []
    for n in range(number):
        text = "".join(
            random.choice(letters, int(random.integers(1, longest) ** (1 if n % 5 == 0 else 0.6)) + 1)
        )
        shown = [picture(int(random.integers(20, 90)), 30, n)] if n % 3 == 0 else []
        options: dict[str, Any] = {"max_new_tokens": int(random.integers(1, 24))}
        if n % 4 == 1:
            options |= {"temperature": 0.9, "top_p": 0.9, "seed": n}
        if n % 4 == 2:
            options |= {"repetition_penalty": 1.2, "stop": ("a", "the")}
        out.append((ask(text, *shown), options))
    return out
