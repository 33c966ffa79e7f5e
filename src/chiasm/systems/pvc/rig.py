"""The rig of PVC's miniature experiments: a small PVC from the real parts, trained by the real trainer.

What: ``RigModel`` (its description), ``NarrowProjector`` (a conditioned projector whose tokens hold little),
``PooledEmbedder`` (the mean over time in the place of attention over it), ``RigData`` (pages and clips of `rig_worlds` as
packed sequences, whole batches at once), ``rig_recipe``, and what is measured: ``accuracies``.
Source: PVC (2412.09613); fact sheet, section 7.

A document is the tokens of a page or of a clip and behind them its questions, a word each; the answer, a word, is
predicted at the question's own row. So one encoded picture teaches all of its answers, and what its few tokens leave
out is missing in one of them. Arms of an experiment that share a seed share their data and its order.

Arms differ in how many parameters they need. `RigModel.parameters` gives all of them as many, by the width of the
encoder's feed-forwards, as the one that needs most.

Shape legend: N documents, R repeats, T frames, K tokens of a frame, W width of a token in the bottleneck, F frames of all
documents, P patches, Q questions, A answers, S side of a page, C widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from chiasm.data.mixture import Draw, derive_seed
from chiasm.data.sequence import IGNORE, IMAGE, TEXT, VIDEO, MediaBatch, Span
from chiasm.data.sequence import Sequence as Row
from chiasm.errors import ConfigError
from chiasm.media.tiles import TilePolicy
from chiasm.model.causal import CausalVLM
from chiasm.parts.compress.unshuffle import Unshuffle
from chiasm.parts.connect.conditioned import ConditionedProjector
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.parts.vision.progressive import TemporalConfig
from chiasm.systems.pvc.config import PVCConfig, downsample_for
from chiasm.systems.pvc.model import PVCEmbedder, build_pvc
from chiasm.systems.pvc.rig_worlds import (
    ANSWERS,
    CELLS,
    FRAMES,
    QUESTIONS,
    SIDE,
    SPRITE,
    SQUARE,
    STEPS,
    Items,
    answers_of,
    items,
    ways,
)
from chiasm.train.recipe import Group, Optim, Recipe, Schedule
from chiasm.train.sft import FinetuneObjective

__all__ = [
    "DIGITS",
    "MOTION",
    "NarrowProjector",
    "PooledEmbedder",
    "RigData",
    "RigModel",
    "RigSource",
    "accuracies",
    "hits",
    "rig_recipe",
]

MOTION = ("direction", "cell", "turns")
"""Kinds of questions about the square, as they follow those about digits in `QUESTIONS`."""
DIGITS = len(QUESTIONS) - len(MOTION)
SHARES = (0.25, 0.5, 0.25)
"""Of the loss about the square, which weighs as much as that of the page: where it is must be learned first."""
MEDIA, ASKED, SAID = 0, 1, 1 + len(QUESTIONS)
"""Words: the placeholder of media, the first question, the first answer."""
WORDS = SAID + len(ANSWERS)
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

    def code(
        self, x_FKI: Tensor, times_F: Tensor | None = None, embedded_FE: Tensor | None = None
    ) -> Tensor:
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
        start: a safetensors file with first weights, by their names.
    """

    vision_width: int = 64
    vision_layers: int = 3
    temporal_layers: int = 2
    width: int = 64
    layers: int = 2
    tokens: int = 1
    repeats: int = 4
    attention: bool = True
    timed: bool = True
    pool: int = 1
    views: str = "same"
    narrow: int = 16
    noise: float = 0.1
    ffn: int = 128
    parameters: int = 0
    start: str = ""

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
        # Deviations of 0.02 are for widths of a thousand: a small model would spend its training on growing its weights.
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and not name.endswith("modulation"):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5, generator=random)
        nn.init.normal_(model.embedder.vision.position_embedding, std=0.5, generator=random)  # type: ignore[union-attr]
        nn.init.normal_(model.embedder.words.weight, std=self.width**-0.5, generator=random)  # type: ignore[union-attr]
        if self.start:
            # Tied words have one name in the file.
            model.load_state_dict(load_file(self.start), strict=False)
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


# --- pages and clips as sequences ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RigData:
    """Pages and clips of `rig_worlds` with all of their questions.

    Attributes:
        tasks: "still", "clip" -> share of the draws.
        split, seed: of the items.
        size: items of each task.
        tokens: K of the model that will read them.
        repeats: of a page.
        varied: while training, each batch has its own number of repeats, 1 to `repeats`, evenly.
        cut: while training, each batch has clips of its own length: all frames, the first half, the first quarter, …
            down to one window, evenly.
        frames: of a clip that are shown, the last of each of so many equal parts.
        window: shown frames behind which the square is asked about, of the clip so far.
        full: share of the pages that are full; the others have up to three quarters (of a still page at least one), the
            rest being blank and not asked about.
    """

    tasks: Mapping[str, float]
    split: str = "train"
    seed: int = 0
    size: int = 1000
    tokens: int = 1
    repeats: int = 4
    varied: bool = False
    cut: bool = False
    frames: int = FRAMES
    window: int = 1
    full: float = 1.0

    def __post_init__(self) -> None:
        for name, whole, part in (("frames", FRAMES, self.frames), ("window", self.frames, self.window)):
            if part < 1 or whole % part:
                raise ConfigError(f"{name} is {part}: {whole} frames must be a multiple of it")

    @property
    def shown(self) -> list[int]:
        """The frames of a clip that are shown."""
        return [(n + 1) * FRAMES // self.frames - 1 for n in range(self.frames)]

    def open(self) -> RigSource:
        """Return the source."""
        return RigSource(self)


class RigSource:
    """All items of a `RigData`, drawn once; a batch is built of them as a whole."""

    def __init__(self, data: RigData) -> None:
        self.data = data
        self.frames: dict[str, Tensor] = {}
        """Task -> (N, T, S, S) uint8."""
        self.answers: dict[str, Tensor] = {}
        """Task -> (N, Q) int64 words, `IGNORE` where nothing is asked."""
        self.asked: dict[str, Tensor] = {}
        """Task -> (N,) int64: the question whose answers are even, a place in `QUESTIONS`."""
        for task in data.tasks:
            made = items(task, data.split, data.seed, 0, data.size, questions=MOTION)
            words_NQ = _answers(made, task, data.shown[data.window - 1 :: data.window])
            frames_NTSS = made.frames_NTHW[:, data.shown if task == "clip" else [0]]
            if data.full < 1:
                seen_NSS, told_NQ = _quarters(data, task)
                frames_NTSS = np.where(seen_NSS[:, None] | (frames_NTSS == SQUARE), frames_NTSS, 0)
                words_NQ[:, :DIGITS] = np.where(told_NQ, words_NQ[:, :DIGITS], IGNORE)
            self.frames[task] = torch.from_numpy(np.ascontiguousarray(frames_NTSS))
            self.answers[task] = torch.from_numpy(words_NQ)
            self.asked[task] = torch.from_numpy(made.question_N)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Task -> items."""
        return dict.fromkeys(self.data.tasks, self.data.size)

    @property
    def weights(self) -> Mapping[str, float]:
        """Task -> share."""
        return self.data.tasks

    def fetch(self, draws: Sequence[Draw], random: torch.Generator) -> Row:
        """Return the draws as one packed sequence."""
        repeats = self.data.repeats
        if self.data.varied:
            repeats = int(torch.randint(1, repeats + 1, (), generator=random))
        frames = self.data.frames
        if self.data.cut:
            halvings = (frames // self.data.window).bit_length()
            frames >>= int(torch.randint(halvings, (), generator=random))
        return self.batch(draws, repeats, frames)

    def plan(
        self, tasks: tuple[str, ...], repeats: int | None = None, frames: int | None = None
    ) -> _Plan:
        """What batches of these tasks have in common, in this order."""
        d = self.data
        return _plan(tasks, repeats or d.repeats, frames or d.frames, d.window, d.tokens)

    def batch(self, draws: Sequence[Draw], repeats: int | None = None, frames: int | None = None) -> Row:
        """Return the draws as one packed sequence, with so many repeats of a page and frames of a clip (None: all)."""
        tasks, frames = tuple(task for task, _ in draws), frames or self.data.frames
        plan = self.plan(tasks, repeats, frames)
        index = {task: torch.tensor([i for t, i in draws if t == task]) for task in sorted(set(tasks))}
        labels_T = torch.full_like(plan.empty.ids_T, IGNORE)
        for task, own in index.items():
            rows_NQ = plan.rows_NQ[task]
            labels_T[rows_NQ] = self.answers[task][own, : rows_NQ.shape[1]]
        media = {}
        for task, name in (("still", "image"), ("clip", "video")):
            if task in index:
                grey_FSS = self.frames[task][index[task], :frames].flatten(0, 1)
                times_F = torch.arange(frames, dtype=torch.float32).repeat(len(index[task]))
                colour_F3SS = grey_FSS[:, None].expand(-1, 3, -1, -1)
                media[name] = MediaBatch(colour_F3SS, times_F if task == "clip" else None)
        return replace(
            plan.empty,
            labels_T=labels_T,
            weight_T=torch.where(labels_T == IGNORE, 0.0, plan.weight_T),
            media=media,
            spans=plan.spans,
        )


def _answers(made: Items, task: str, moments: Sequence[int]) -> np.ndarray:
    """(N, Q): the word that answers each question about each item: digits, then of clips the square at each moment.

    In its first frame the square has no direction, and it has not turned.
    """
    digits_NQ = made.digits_NRC.reshape(len(made), -1) + SAID + answers_of("digit").start
    if task == "still":
        return digits_NQ
    x_NT, y_NT = np.moveaxis(ways().place_WT2[made.way_N], -1, 0)
    step_NT2 = np.diff(np.stack([x_NT, y_NT], -1), axis=1)
    side = SIDE // CELLS // SPRITE
    going_NT = (step_NT2[:, :, None] == STEPS).all(-1).argmax(-1)  # from frame t to t + 1
    turned_NT = np.diff(going_NT, axis=1, prepend=going_NT[:, :1]) != 0
    facts = {
        "direction": np.pad(going_NT, ((0, 0), (1, 0))),
        "cell": CELLS * (y_NT // side) + x_NT // side,
        "turns": np.pad(turned_NT.cumsum(1), ((0, 0), (1, 0))),
    }
    told = [
        np.full(len(made), IGNORE) if t == 0 and kind != "cell" else SAID + answers_of(kind).start + facts[kind][:, t]
        for t in moments
        for kind in MOTION
    ]
    return np.concatenate([digits_NQ, np.stack(told, 1)], 1)


def _quarters(data: RigData, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels (N, S, S) and which cells (N, Q) of the pages are there."""
    random = np.random.Generator(np.random.PCG64(derive_seed(data.seed, "pvc", "quarters", task, data.split)))
    rank_N4 = random.random((data.size, 4)).argsort(1)
    some_N1 = random.integers(int(task == "still"), 4, (data.size, 1))
    count_N1 = np.where(random.random((data.size, 1)) < data.full, 4, some_N1)
    there_N22 = (rank_N4 < count_N1).reshape(-1, 2, 2)

    def spread(side: int) -> np.ndarray:
        return there_N22.repeat(side // 2, 1).repeat(side // 2, 2)

    return spread(SIDE), spread(round(DIGITS**0.5)).reshape(data.size, -1)


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What batches of one structure have in common: all but pixels and answers.

    Attributes:
        empty: the sequence without media and labels.
        weight_T: of the loss; a clip's digits together weigh as much as its questions about the square together.
        spans: as of the sequence.
        rows_NQ: task -> rows of the questions of its documents.
    """

    empty: Row
    weight_T: Tensor
    spans: tuple[Span, ...]
    rows_NQ: dict[str, Tensor]


@lru_cache(maxsize=64)
def _plan(tasks: tuple[str, ...], repeats: int, frames: int, window: int, tokens: int) -> _Plan:
    documents = {task: _document(task, repeats, frames, window, tokens) for task in set(tasks)}
    weight_W = np.ones(WORDS, np.float32)
    weight_W[ASKED + DIGITS : SAID] = np.array(SHARES) * DIGITS / (frames // window)
    ids_N = [documents[task][0] for task in tasks]
    length_N = np.array([len(ids) for ids in ids_N])
    start_N = length_N.cumsum() - length_N
    ids_T = np.concatenate(ids_N)
    doc_T = np.arange(len(tasks)).repeat(length_N)
    seen_T = np.array([IMAGE if task == "still" else VIDEO for task in tasks])[doc_T]
    rows_NQ: dict[str, list[np.ndarray]] = {task: [] for task in documents}
    spans: list[Span] = []
    items_of, groups = {"image": 0, "video": 0}, 0
    for task, start in zip(tasks, start_N.tolist(), strict=True):
        _, asked_Q, own = documents[task]
        rows_NQ[task].append(start + asked_Q)
        spans += [span.shifted(start, items_of[span.media], groups) for span in own]
        items_of[own[0].media] += len(own)
        groups += task == "clip"
    return _Plan(
        empty=Row(
            ids_T=torch.from_numpy(ids_T),
            kind_T=torch.from_numpy(np.where(ids_T == MEDIA, seen_T, TEXT).astype(np.int8)),
            doc_T=torch.from_numpy(doc_T.astype(np.int32)),
            pos_T=torch.from_numpy((np.arange(len(ids_T)) - start_N[doc_T]).astype(np.float32)),
        ),
        weight_T=torch.from_numpy(weight_W[ids_T]),
        spans=tuple(spans),
        rows_NQ={task: torch.from_numpy(np.stack(rows)) for task, rows in rows_NQ.items()},
    )


def _document(
    task: str, repeats: int, frames: int, window: int, tokens: int
) -> tuple[np.ndarray, np.ndarray, tuple[Span, ...]]:
    """One document of a task: its words, the rows of its questions in the order of the answers, its spans.

    Digits are asked behind everything, the square right behind the moment that is asked about.
    """
    digits, motion = range(ASKED, ASKED + DIGITS), range(ASKED + DIGITS, SAID)
    if task == "still":
        rows = repeats * tokens
        span = Span(media="image", start=0, length=rows, first=0, items=1, repeats=repeats)
        return np.array([MEDIA] * rows + [*digits]), rows + np.arange(DIGITS), (span,)
    words: list[int] = []
    asked: list[int] = []
    spans: list[Span] = []
    for t in range(frames):
        spans.append(Span(media="video", start=len(words), length=tokens, first=t, items=1, group=0))
        words += [MEDIA] * tokens
        if t % window == window - 1:
            asked += range(len(words), len(words) + len(motion))
            words += motion
    return np.array([*words, *digits]), np.array([*range(len(words), len(words) + DIGITS), *asked]), tuple(spans)


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

    Of pages: ``digits``. Of clips: ``detail`` (digits), ``direction``, ``cell`` and ``turns`` (each of the clips whose
    answers to it are even), ``motion`` (the mean of the three), ``both`` (the mean of detail and motion).

    Args:
        repeats: of pages; None: the data's.
    """
    size = source.sizes[task]
    right = []
    with torch.random.fork_rng(devices=[]):
        for low in range(0, size, batch):
            draws = [(task, n) for n in range(low, min(low + batch, size))]
            row = source.batch(draws, repeats)
            torch.manual_seed(derive_seed(source.data.seed, "noise", low))
            rows_NQ = source.plan((task,) * len(draws), repeats).rows_NQ[task]
            right.append(hits(model, row)[rows_NQ])
    right_NQ = torch.cat(right)
    told_NQ = source.answers[task] != IGNORE
    detail = float(right_NQ[:, :DIGITS].sum() / told_NQ[:, :DIGITS].sum())
    if task == "still":
        return {"digits": detail}
    out = {"detail": detail}
    for n, kind in enumerate(MOTION, DIGITS):
        last = n - DIGITS - len(MOTION)  # the last moment's questions are the last columns
        out[kind] = float(right_NQ[source.asked[task] == n, last].float().mean())
    motion = sum(out[kind] for kind in MOTION) / len(MOTION)
    return out | {"motion": motion, "both": (detail + motion) / 2}
