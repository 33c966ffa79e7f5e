"""Training recipes of the InternVL system.

``debug``: a toy of the whole pipeline, seconds on one core. ``mini_distill`` gives the bundled model its
eyes, ``mini_widen`` teaches them drawings, boxes and charts, ``mini_sft`` connects them to the language model.

The bundled model is trained by the three of them in turn::

    chiasm train internvl/mini_distill --id mini-distill
    chiasm train internvl/mini_widen --id mini-widen --set model.start=runs/mini-distill
    chiasm train internvl/mini_sft --id mini-sft --set model.vision_from=runs/mini-widen

The others are the recipes of the released models (`released.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch

from chiasm.checkpoint.adapters import open_checkpoint
from chiasm.checkpoint.vocab import SPECIAL_TOKENS, used_rows
from chiasm.checkpoint.wheel import smollm2_folder
from chiasm.data.layout import LayoutSpec
from chiasm.eval.families import OPTIONS
from chiasm.model.causal import CausalVLM
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig, internvit_mini
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.mini import MiniConfig, build_mini, spec_of
from chiasm.systems.internvl.model import build_internvl
from chiasm.systems.internvl.released import released
from chiasm.systems.internvl.table import RECIPES
from chiasm.text.tokenizer import Tokenizer, byte_tokenizer
from chiasm.train.distill import DistillData, DistillObjective, StudentSpec, load_vision
from chiasm.train.recipe import Group, Optim, Recipe, Schedule
from chiasm.train.sft import ChatSource, FinetuneObjective
from chiasm.worlds import CountingWorld, World, open_world

__all__ = ["debug", "mini_distill", "mini_sft", "mini_widen"]
__all__ += list(RECIPES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Callable[[], Recipe]:
    """The recipes of the released table."""
    if name not in RECIPES:
        raise AttributeError(f"{__name__} has no {name}")
    return partial(released, name)


# --- the toy --------------------------------------------------------------------------------------------------

_DEBUG = MiniConfig(
    vision=InternViTConfig(
        hidden_size=32,
        intermediate_size=64,
        layers=2,
        heads=2,
        patch_size=16,
        image_size=64,
        layer_scale_init=1.0,
        drop_path=0.1,
    )
)


_TOY_TOKENS = ("<|im_start|>", "<|im_end|>", *SPECIAL_TOKENS)
"""What the toy's tokenizer has beside the bytes: the chat template's tokens and those of pictures."""


def _debug_language(tokenizer: Tokenizer) -> LanguageConfig:
    return LanguageConfig(
        family="llama",
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        tie_words=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugModel:
    """A random InternVL of some 100,000 parameters."""

    def build(self) -> CausalVLM:
        """Return the model, drawn from the global generator."""
        return build_internvl(self.outline(), generator=torch.Generator().manual_seed(torch.initial_seed()))

    def outline(self) -> InternVLConfig:
        """The whole config."""
        tokenizer = byte_tokenizer(_TOY_TOKENS)
        return spec_of(_DEBUG, _debug_language(tokenizer), tokenizer)[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugData:
    """Counting scenes only; they need no assets."""

    size: int = 200
    dev_size: int = 20

    def open(self) -> ChatSource:
        """Return the source."""
        tokenizer = byte_tokenizer(_TOY_TOKENS)
        spec, _ = spec_of(_DEBUG, _debug_language(tokenizer), tokenizer)
        worlds, dev = ({"counting": CountingWorld(split, size=self.size)} for split in ("train", "dev"))
        return ChatSource(
            worlds, dev, {"counting": 1.0}, spec, mirrored=("counting",), dev_size=self.dev_size
        )


def debug() -> Recipe:
    """20 steps of a random toy model on counting scenes: every part of training, a few seconds."""
    return Recipe(
        name="debug",
        model=DebugModel(),
        objective=FinetuneObjective(),
        data=DebugData(),
        steps=20,
        batch=8,
        accumulate=2,
        optim=Optim(lr=3e-3, groups=(Group(pattern="embedder.vision.*", lr_scale=0.5),)),
        schedule=Schedule(warmup=3, final=0.1),
        eval_every=10,
        save_every=10,
    )


# --- chiasm-mini ----------------------------------------------------------------------------------------------


def mini_distill() -> Recipe:
    """Stage 1 of chiasm-mini: InternViT from scratch, taught by EfficientNet-Lite0 and by labels."""
    return Recipe(
        name="mini-distill",
        model=StudentSpec(vision=internvit_mini(), sincos=True),
        objective=DistillObjective(whiten=400),
        data=DistillData(),
        steps=6000,
        batch=96,
        accumulate=2,
        optim=Optim(
            lr=1e-3,
            weight_decay=0.05,
            beta2=0.99,
            groups=(Group(pattern="vision.layers.*", optimizer="muon", lr_scale=8.0, weight_decay=0.02),),
        ),
        schedule=Schedule(kind="linear", warmup=100, final=0.005),
        compute="bfloat16",
        eval_every=500,
        save_every=250,
        keep_last=2,
    )


def mini_widen() -> Recipe:
    """Stage 1b of chiasm-mini: the encoder goes on with drawings, box grounding and charts beside the first four.

    Half of stage 1's learning rate: at the whole one it forgot more than half of the words within 500 steps (dev).
    """
    first = mini_distill()
    return replace(
        first,
        name="mini-widen",
        model=StudentSpec(vision=internvit_mini(), sincos=True, start="runs/mini-distill"),
        objective=DistillObjective(),
        data=DistillData(
            weights={
                **{"cifar10": 0.12, "fashion": 0.16, "words": 0.26, "counting": 0.06},
                **{"clipart": 0.18, "grounding": 0.13, "charts": 0.09},
            }
        ),
        optim=replace(first.optim, lr=5e-4),
        steps=4000,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniModel:
    """chiasm-mini before stage 2: frozen language model, distilled encoder, fresh projector and adapters."""

    config: MiniConfig = field(default_factory=MiniConfig)
    language_folder: str | None = None
    """A Llama-layout folder; none takes SmolLM2 from its wheel."""
    language_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    vision_from: str | None = "runs/mini-widen"
    """A distillation run or a safetensors file; none starts from random weights."""

    def build(self) -> CausalVLM:
        """Return the model; its fresh weights are drawn from the global generator."""
        model, _ = build_mini(
            self.config,
            language_folder=self.language_folder,
            language_dtype=getattr(torch, self.language_dtype),
            seed=torch.initial_seed(),
        )
        if self.vision_from is not None:
            load_vision(model.get_submodule("embedder.vision"), self.vision_from)
        return model

    @property
    def adapters(self) -> tuple[int, tuple[str, ...]]:
        """Rank and layers of the adapters that ``build`` puts on the frozen language model."""
        return self.config.lora_rank, self.config.lora_targets

    def outline(self) -> InternVLConfig:
        """The whole config; no weights are read."""
        opened = open_checkpoint(self.language_folder or smollm2_folder())
        with opened.reader as reader:
            tokenizer = Tokenizer.from_file(reader.folder)
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        language = replace(opened.language, vocab_size=used_rows(tokenizer))
        return spec_of(self.config, language, tokenizer)[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniData:
    """The seven families as questions and answers."""

    config: MiniConfig = field(default_factory=MiniConfig)
    """The model's own, for template and tokens per tile."""
    language_folder: str | None = None
    weights: dict[str, float] = field(
        default_factory=lambda: {
            **{"cifar10": 0.10, "fashion": 0.13, "words": 0.33, "counting": 0.09},
            **{"clipart": 0.12, "grounding": 0.13, "charts": 0.10},
        }
    )
    words: int = 100_000
    drawn: int = 100_000
    """Training pictures each of drawings, of grounding scenes and of charts."""
    pseudo: float = 0.5
    spelled: tuple[str, ...] = ("words",)
    """Families whose answers are learned letter by letter: words of the held-out split were never an answer."""
    counting: int = 100_000
    seed: int = 2
    """Seed of the rendered worlds: other pictures than the distillation saw."""
    dev_size: int = 100
    folder: str | None = None
    """Folder of prepared assets; none takes ``$CHIASM_DATA`` or the platform's cache."""

    def open(self) -> ChatSource:
        """Return the source.

        Raises:
            DataError: assets of a family are missing; the message says what to run, and weight 0 leaves it out.
        """
        tokenizer = Tokenizer.from_file(self.language_folder or smollm2_folder())
        tokenizer.add_special_tokens(SPECIAL_TOKENS)
        spec = layout_of(self.config, tokenizer)
        train, dev = (
            {name: self._world(name, split) for name, weight in self.weights.items() if weight > 0}
            for split in ("train", "dev")
        )
        return ChatSource(
            train,
            dev,
            self.weights,
            spec,
            mirrored=("cifar10", "fashion", "counting", "clipart"),
            warped=("cifar10",),
            spelled=self.spelled,
            dev_size=self.dev_size,
        )

    def _world(self, family: str, split: str) -> World:
        options: dict[str, object] = {"seed": self.seed}
        if family in ("cifar10", "fashion", "words", "clipart", "charts"):
            options["folder"] = self.folder
        options |= OPTIONS.get(family, {})
        if split == "train" and family in ("clipart", "grounding", "charts"):
            options["size"] = self.drawn
        if split == "train" and family == "words":
            options |= {"size": self.words, "pseudo": self.pseudo}
        if split == "train" and family == "counting":
            options["size"] = self.counting
        return open_world(family, split, **options)


def layout_of(config: MiniConfig, tokenizer: Tokenizer) -> LayoutSpec:
    """Return how the bundled model's input is laid out; needs the tokenizer only, not the language model."""
    spec, _ = spec_of(config, _debug_language(tokenizer), tokenizer)
    return spec


def mini_sft() -> Recipe:
    """Stage 2 of chiasm-mini: projector, encoder and adapters learn to answer; the language model stays frozen."""
    return Recipe(
        name="mini-sft",
        model=MiniModel(),
        objective=FinetuneObjective(),
        data=MiniData(),
        steps=1700,
        batch=16,
        accumulate=2,
        optim=Optim(
            lr=1e-3,
            weight_decay=0.01,
            beta2=0.99,
            groups=(Group(pattern="embedder.vision.*", lr_scale=0.1),),
        ),
        schedule=Schedule(kind="cosine", warmup=100, final=0.02),
        compute="bfloat16",
        eval_every=500,
        save_every=100,
    )
