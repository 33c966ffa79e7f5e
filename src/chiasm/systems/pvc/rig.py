"""The rig of PVC's miniature experiments: a small PVC from the real parts, trained by the real trainer.

What: ``RigModel`` (its description), ``NarrowProjector`` (a conditioned projector whose tokens hold little),
``PooledEmbedder`` (the mean over time in the place of attention over it), ``rig_recipe``, and what is measured:
``accuracies``, ``stopped``, ``changes``, ``spread``. The data are in `rig_data`.
Source: PVC (2412.09613); fact sheet, section 7.

Arms differ in how many parameters they need. `RigModel.parameters` gives all of them as many, by the width of the
encoder's feed-forwards, as the one that needs most.

Shape legend: N pages, R repeats, K tokens of a frame, W width of a token in the bottleneck, F frames of all sequences,
M windows of frames, P patches, T tokens of a frame in the encoder (rows, of a packed batch), Q questions, C widths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from chiasm.data.mixture import derive_seed
from chiasm.data.sequence import IGNORE
from chiasm.data.sequence import Sequence as Row
from chiasm.errors import ConfigError
from chiasm.media.tiles import TilePolicy
from chiasm.model.causal import CausalVLM
from chiasm.parts.compress.unshuffle import Unshuffle
from chiasm.parts.connect.conditioned import ConditionedProjector
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.parts.vision.progressive import Clips, TemporalConfig
from chiasm.systems.pvc.config import PVCConfig, downsample_for
from chiasm.systems.pvc.model import PVCEmbedder, build_pvc
from chiasm.systems.pvc.plan import shots_of
from chiasm.systems.pvc.rig_data import DIGITS, MOTION, WORDS, RigData, RigSource
from chiasm.systems.pvc.rig_worlds import SIDE
from chiasm.train.recipe import Group, Optim, Recipe, Schedule
from chiasm.train.sft import FinetuneObjective

__all__ = [
    "NarrowProjector",
    "PooledEmbedder",
    "RigModel",
    "accuracies",
    "changes",
    "hits",
    "parameters_of",
    "rig_recipe",
    "spread",
    "stopped",
]

TIME_SCALE = 20.0
"""Learning rate of what knows the time, in that of the rest: it starts as nothing, and has little time."""


class NarrowProjector(ConditionedProjector):
    """A conditioned projector with a bottleneck behind it: W numbers a token, of mean square 1, and noise on them.

    What a token can hold is then finite, and known: W / 2 · log2(1 + 1 / noise²) bits.

    Args:
        in_dim, out_dim, embedding: as of `ConditionedProjector`.
        narrow: W.
        noise: standard deviation of the noise, also in evaluation; drawn from the global generator, which the trainer
            and `accuracies` seed.
    """

    def __init__(
        self, in_dim: int, out_dim: int, *, embedding: int | None, narrow: int, noise: float
    ) -> None:
        super().__init__(in_dim, out_dim, embedding=embedding)
        self.squeeze, self.widen = nn.Linear(out_dim, narrow), nn.Linear(narrow, out_dim)
        self.noise = noise

    def code(self, x_FKI: Tensor, times_F: Tensor | None = None, embedded_FE: Tensor | None = None) -> Tensor:
        """(F, K, W): what the tokens hold, without noise."""
        z_FKW = self.squeeze(super().forward(x_FKI, times_F, embedded_FE))
        return z_FKW * torch.rsqrt(z_FKW.square().mean(-1, keepdim=True) + 1e-6)

    def forward(  # type: ignore[override]
        self, x_FKI: Tensor, times_F: Tensor | None = None, embedded_FE: Tensor | None = None
    ) -> Tensor:
        """(F, K, C)."""
        z_FKW = self.code(x_FKI, times_F, embedded_FE)
        if self.noise:
            z_FKW = z_FKW + self.noise * torch.randn_like(z_FKW)
        return self.widen(z_FKW)


class PooledEmbedder(PVCEmbedder):
    """The mean over time: `pool` frames that follow one another share one set of features.

    The K · `pool` tokens made of them are dealt out to the frames' rows, K each: as many rows as without pooling. Its
    `compress` is therefore that of K · `pool` tokens. Sequences must have a multiple of `pool` frames.
    """

    pool: int = 1

    def compressed(self, features_FTC: Tensor, times_F: Tensor) -> Tensor:
        """(F, 1 + P, C') -> (F, K, C)."""
        mean_MTC = features_FTC.unflatten(0, (-1, self.pool)).mean(1)
        tokens = super().compressed(mean_MTC, times_F[:: self.pool])
        return tokens.unflatten(1, (self.pool, -1)).flatten(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RigModel:
    """A small PVC, or one of its rivals; fresh weights come from the global generator, as the trainer wants it.

    Attributes:
        vision_width, vision_layers, temporal_layers, width, layers: sizes; heads are 32 wide, patches 8 pixels.
        tokens: K, tokens of a frame.
        repeats: of a page that the model's times are reckoned for.
        attention: whether frames see earlier ones.
        timed: whether encoder and projector know the time.
        pool: frames whose features are averaged, see `PooledEmbedder`.
        views: what repeats show, see `PVCConfig.views`.
        narrow, noise: of the bottleneck, see `NarrowProjector`.
        ffn: width of the encoder's feed-forwards.
        parameters: when set, `ffn` follows from it: the width whose number of parameters comes nearest.
    """

    vision_width: int = 64
    vision_layers: int = 2
    temporal_layers: int = 1
    width: int = 64
    layers: int = 2
    tokens: int = 4
    repeats: int = 4
    attention: bool = True
    timed: bool = True
    pool: int = 1
    views: str = "same"
    narrow: int = 4
    noise: float = 0.1
    ffn: int = 128
    parameters: int = 0

    @property
    def config(self) -> PVCConfig:
        """The system's own configuration."""
        conditioned = ("temporal", "ffn", "compress") if self.attention else ("ffn", "compress")
        vision = InternViTConfig(
            hidden_size=self.vision_width,
            intermediate_size=_fitting(self) if self.parameters else self.ffn,
            layers=self.vision_layers,
            heads=max(1, self.vision_width // 32),
            patch_size=8,
            image_size=SIDE,
            layer_scale_init=1.0,  # so shallow a model learns from scratch at full speed
        )
        return PVCConfig(
            vision=vision,
            language=LanguageConfig(
                family="llama",
                vocab_size=WORDS,
                hidden_size=self.width,
                intermediate_size=3 * self.width,
                layers=self.layers,
                heads=max(1, self.width // 32),
                kv_heads=max(1, self.width // 32),
                head_dim=min(32, self.width),
                tie_words=True,
            ),
            temporal=TemporalConfig(
                layers=self.temporal_layers,
                attention=self.attention,
                conditioned=conditioned if self.timed else (),
                time_sines=32,
                time_width=32,
            ),
            tiles=TilePolicy(image_size=SIDE, dynamic=False),
            repeats=self.repeats,
            views=self.views,
            downsample=downsample_for(self.tokens, vision),
            template=None,
        )

    def build(self) -> CausalVLM:
        """Return the model."""
        random = torch.Generator().manual_seed(torch.initial_seed())
        model = _assembled(self, random)
        # Deviations of 0.02 are for widths of a thousand: a small model would spend its training on growing weights.
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and not name.endswith("modulation"):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5, generator=random)
        nn.init.normal_(model.embedder.vision.position_embedding, std=0.5, generator=random)  # type: ignore[union-attr]
        nn.init.normal_(model.embedder.words.weight, std=self.width**-0.5, generator=random)  # type: ignore[union-attr]
        return model


def _assembled(spec: RigModel, random: torch.Generator | None) -> CausalVLM:
    """The model, its decoder and words drawn from `random`; without one they are left unset."""
    c = spec.config
    model = build_pvc(c, generator=random)
    plain = model.embedder
    assert isinstance(plain, PVCEmbedder)
    ratio = downsample_for(spec.tokens * spec.pool, c.vision)
    project = NarrowProjector(
        round(c.vision.hidden_size / ratio**2),
        c.language.hidden_size,
        embedding=c.projector_embedding,
        narrow=spec.narrow,
        noise=spec.noise,
    )
    kind = PooledEmbedder if spec.pool > 1 else PVCEmbedder
    embedder = kind(plain.words, plain.vision, Unshuffle(ratio, c.unshuffle), project, c)
    if isinstance(embedder, PooledEmbedder):
        embedder.pool = spec.pool
    embedder.vision.chunked(None)
    model.embedder = embedder
    return model


@lru_cache(maxsize=256)
def parameters_of(spec: RigModel) -> int:
    """Parameters of the model, counted without allocating it."""
    with torch.device("meta"):
        return sum(p.numel() for p in _assembled(spec, None).parameters())


@lru_cache(maxsize=256)
def _fitting(spec: RigModel) -> int:
    """The width of the feed-forwards with which the model comes nearest to `spec.parameters`."""
    one, two = (parameters_of(replace(spec, parameters=0, ffn=n)) for n in (1, 2))
    found = 1 + round((spec.parameters - one) / (two - one))
    if found < 1:
        raise ConfigError(
            f"{spec.parameters} parameters are too few: without feed-forwards there are {2 * one - two}"
        )
    return found


# --- training -----------------------------------------------------------------------------------------------


def rig_recipe(
    data: RigData, model: RigModel, *, steps: int, batch: int, seed: int, lr: float = 1e-3
) -> Recipe:
    """Return the run: Muon for the layers' matrices, AdamW for the rest, short warm-up, cosine to zero."""
    groups = [Group(pattern="*layers.*", optimizer="muon", lr_scale=8.0)]
    if model.timed:
        groups += [Group(pattern=f"*{name}*", lr_scale=TIME_SCALE) for name in ("time", "modulation")]
    return Recipe(
        name="rig",
        model=model,
        objective=FinetuneObjective(),
        data=data,
        steps=steps,
        batch=batch,
        optim=Optim(lr=lr, weight_decay=0.02, beta2=0.98, groups=tuple(groups)),
        schedule=Schedule(warmup=max(1, min(50, steps // 10))),
        seed=seed,
        save_every=steps,
        log_every=max(1, steps // 20),
    )


# --- what is measured ---------------------------------------------------------------------------------------


@torch.inference_mode()
def hits(model: CausalVLM, row: Row) -> Tensor:
    """(T,) bool: rows whose label is the likeliest word; False where nothing is asked."""
    assert row.labels_T is not None
    asked = (row.labels_T != IGNORE).nonzero().flatten()
    guess = model.head.logits(model.hidden(row)[asked]).argmax(-1)  # type: ignore[operator]
    right_T = torch.zeros(len(row), dtype=torch.bool)
    right_T[asked] = guess == row.labels_T[asked]
    return right_T


def accuracies(
    model: CausalVLM, source: RigSource, task: str, *, repeats: int | None = None, batch: int = 100
) -> dict[str, float]:
    """Return the share of right answers about all items of a task.

    Of pages: ``digits``. Of clips: ``detail`` (digits), ``direction``, ``cell`` and ``turns`` (at the end, each of the
    clips whose answers to it are even), ``motion`` (the mean of the three), ``both`` (the mean of detail and motion).

    Args:
        repeats: of pages; None: the data's.
    """
    right = []
    with torch.random.fork_rng(devices=[]):
        for low in range(0, source.data.size, batch):
            torch.manual_seed(derive_seed(source.data.seed, "noise", low))
            draws = [(task, n) for n in range(low, min(low + batch, source.data.size))]
            rows_NQ = source.plan((task,) * len(draws), repeats).rows_NQ[task]
            right.append(hits(model, source.batch(draws, repeats))[rows_NQ])
    right_NQ = torch.cat(right)
    told_NQ = source.answers[task] != IGNORE
    detail = float(right_NQ[:, :DIGITS].sum() / told_NQ[:, :DIGITS].sum())
    if task == "still":
        return {"digits": detail}
    out = {"detail": detail}
    for n, kind in enumerate(MOTION):
        column = right_NQ[:, n - len(MOTION)]  # the last moment's questions are the last columns
        out[kind] = float(column[source.asked[task] == DIGITS + n].float().mean())
    motion = sum(out[kind] for kind in MOTION) / len(MOTION)
    return out | {"motion": motion, "both": (detail + motion) / 2}


@torch.inference_mode()
def changes(model: CausalVLM, source: RigSource, *, batch: int = 100) -> Tensor:
    """(N, R - 1): how much the tokens of each repeat of a page differ from those before, as `PVCEmbedder.settled` does.

    The bottleneck's noise is part of them.
    """
    embedder = _embedder(model)
    out = []
    with torch.random.fork_rng(devices=[]):
        for low in range(0, source.data.size, batch):
            torch.manual_seed(derive_seed(source.data.seed, "noise", low))
            row = source.batch([("still", n) for n in range(low, min(low + batch, source.data.size))])
            tokens_FKC = embedder.encode(shots_of(row, embedder.config), row)
            tokens_NRC = tokens_FKC.flatten(1).unflatten(0, (-1, source.data.repeats))
            out.append(tokens_NRC.diff(dim=1).norm(dim=-1) / tokens_NRC[:, 1:].norm(dim=-1))
    return torch.cat(out)


@torch.inference_mode()
def stopped(
    model: CausalVLM, source: RigSource, threshold: float, *, batch: int = 100
) -> tuple[float, float]:
    """Return (share of right digits, mean number of repeats) where pages are repeated until they change by less."""
    embedder = _embedder(model)
    right = asked = repeats = 0
    with torch.random.fork_rng(devices=[]):
        for low in range(0, source.data.size, batch):
            torch.manual_seed(derive_seed(source.data.seed, "noise", low))
            row = source.batch([("still", n) for n in range(low, min(low + batch, source.data.size))])
            row = embedder.settled(row, threshold)
            right += int(hits(model, row).sum())
            asked += int((row.labels_T != IGNORE).sum())  # type: ignore[union-attr]
            repeats += sum(span.repeats for span in row.spans)
    return right / asked, repeats / source.data.size


@torch.inference_mode()
def spread(model: CausalVLM, source: RigSource) -> float:
    """Return the largest difference between what two repeats of a page say, before any noise (whose scale is 1)."""
    embedder = _embedder(model)
    connect = embedder.connect
    assert isinstance(connect, NarrowProjector)
    row = source.batch([("still", n) for n in range(source.data.size)])
    shots = shots_of(row, embedder.config)
    copies = tuple(shot.copies for shot in shots)
    times_F = torch.tensor([t for shot in shots for t in shot.times], dtype=torch.float64)
    pixels_N3SS = embedder._normal(row.media["image"].data)
    features_FTC = embedder.vision(pixels_N3SS, clips=Clips(copies, copies, times_F))
    embedded = None if embedder.vision.time is None else embedder.vision.time(times_F)
    code_FKW = connect.code(embedder.compress(features_FTC[:, 1:]), times_F, embedded)
    code_NRX = code_FKW.flatten(1).unflatten(0, (-1, source.data.repeats))
    return float((code_NRX - code_NRX[:, :1]).abs().max())


def _embedder(model: CausalVLM) -> PVCEmbedder:
    assert isinstance(model.embedder, PVCEmbedder)
    return model.embedder
