"""The rig of the miniature experiments: a small InternVL from the real parts, trained by the real trainer.

What: ``RigModel`` (its description), ``RigData`` (pictures of `rig_worlds` laid out and tiled once, then packed),
trained by `chiasm.lab.training`; what is measured afterwards: ``exact`` answers, ``token_hits`` in long answers,
``write`` (sampled texts).
Source: InternVL 2.5 fact sheet, section 7: character tokenizer, tiles of 28 pixels in 16 patches of 7, of which
unshuffle makes 4 tokens; decoder of width 128 with 4 layers.

Everything is a function of the recipe: the arms of an experiment that share a seed share their first weights and, where
their data is the same, its order.

Shape legend: N tiles, S side of a tile, T rows of a packed batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor, nn

from chiasm.checkpoint.vocab import SPECIAL_TOKENS
from chiasm.data.layout import LayoutSpec, layout
from chiasm.data.mixture import Draw, derive_seed
from chiasm.data.sequence import IGNORE, MediaBatch
from chiasm.data.sequence import Sequence as Row
from chiasm.media.tiles import TilePolicy
from chiasm.model.causal import CausalVLM
from chiasm.model.generate import Decoding
from chiasm.nn.sampling import Sampling
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.model import build_internvl
from chiasm.systems.internvl.rig_worlds import Item, item, jpeg
from chiasm.text.templates import get_template
from chiasm.text.tokenizer import Tokenizer
from chiasm.train.recipe import Group, Optim, Recipe, Schedule
from chiasm.train.sft import FinetuneObjective, answer_hits

__all__ = [
    "LOOPS",
    "TILE",
    "RigData",
    "RigModel",
    "RigSource",
    "exact",
    "repetition",
    "rig_recipe",
    "token_hits",
    "tokenizer",
    "write",
]

TILE, PATCH = 28, 7
LOOPS = 0.4
"""Repetition above which an answer counts as a loop."""
CHARACTERS = "\n 0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-=*.,:;?!#()"
ROLES = ("user", "assistant")


@cache
def tokenizer() -> Tokenizer:
    """One token a character; the roles of the template are one token each."""
    backend = Backend(models.WordLevel({c: n for n, c in enumerate(CHARACTERS)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    backend.decoder = decoders.Fuse()  # type: ignore[assignment]
    made = Tokenizer(backend)
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", *ROLES, *SPECIAL_TOKENS])
    return made


class PooledTokens(nn.Module):
    """Four patches become one token of the encoder's width: their mean, or the first of them (the rest dropped).

    Stands where `Unshuffle` stands, for the comparison at equal tokens; the projector reads a quarter of the width.
    """

    def __init__(self, how: Literal["mean", "drop"]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x_NPC: Tensor) -> Tensor:
        """(N, P, C) patches, row-major on a square -> (N, P / 4, C)."""
        N, P, C = x_NPC.shape
        side = math.isqrt(P)
        x = x_NPC.reshape(N, side // 2, 2, side // 2, 2, C)
        x = x.mean((2, 4)) if self.how == "mean" else x[:, :, 0, :, 0]
        return x.reshape(N, P // 4, C)


@dataclass(frozen=True, slots=True, kw_only=True)
class RigModel:
    """A small InternVL; fresh weights come from the global generator, as the trainer wants it.

    Attributes:
        vision_width, vision_layers, width, layers: sizes of encoder and decoder; heads are 32 wide.
        compress: unshuffle (the paper's), mean or drop (equal tokens), none (every patch is a token).
        start: a safetensors file with first weights of some of the model, by their native names.
    """

    vision_width: int = 96
    vision_layers: int = 3
    width: int = 128
    layers: int = 4
    compress: Literal["unshuffle", "mean", "drop", "none"] = "unshuffle"
    start: str = ""

    @property
    def config(self) -> InternVLConfig:
        """The system's own configuration."""
        return InternVLConfig(
            vision=InternViTConfig(
                hidden_size=self.vision_width,
                intermediate_size=4 * self.vision_width,
                layers=self.vision_layers,
                heads=max(1, self.vision_width // 32),
                patch_size=PATCH,
                image_size=TILE,
                layer_scale_init=1.0,
            ),
            language=LanguageConfig(
                family="llama",
                vocab_size=tokenizer().vocab_size,
                hidden_size=self.width,
                intermediate_size=3 * self.width,
                layers=self.layers,
                heads=max(1, self.width // 32),
                kv_heads=max(1, self.width // 32),
                head_dim=min(32, self.width),
                tie_words=True,
            ),
            tiles=TilePolicy(image_size=TILE),
            downsample=1.0 if self.compress == "none" else 0.5,
            template="internvl2_5",
            system="",
        )

    @property
    def tokens_per_tile(self) -> int:
        """4, or 16 without a compressor."""
        return self.config.tokens_per_tile

    def build(self) -> CausalVLM:
        """Return the model."""
        config = self.config
        model = build_internvl(config, generator=torch.Generator().manual_seed(torch.initial_seed()))
        if self.compress in ("mean", "drop"):
            from chiasm.parts.connect.projector import Projector

            model.embedder.compress = PooledTokens(self.compress)
            model.embedder.connect = Projector(config.vision.hidden_size, config.language.hidden_size)
        if self.start:
            model.load_state_dict(load_file(self.start), strict=False)
        return model


@dataclass(frozen=True, slots=True, kw_only=True)
class RigData:
    """Pictures of `rig_worlds` as documents.

    Attributes:
        tasks: task -> share of the draws.
        split, seed: of the pictures.
        size: pictures of each task.
        max_tiles, thumbnail: the tile policy.
        detail: side in pixels to which a picture is first shrunk and then enlarged again; 0 leaves it as it is.
        power: p of the loss weights.
        augment: random JPEG of 75 to 100 while training: never, of each tile (the release), of the whole picture.
        quality: a fixed JPEG quality of every picture; 0 for none.
        filtered: leave out samples whose answers loop (`repetition` above ``LOOPS``).
        tokens_per_tile: of the model that will read them.
    """

    tasks: Mapping[str, float]
    split: str = "train"
    seed: int = 0
    size: int = 1000
    max_tiles: int = 1
    thumbnail: bool = False
    detail: int = 0
    power: float = 0.5
    augment: Literal["none", "tile", "image"] = "none"
    quality: int = 0
    filtered: bool = False
    tokens_per_tile: int = 4

    def open(self) -> RigSource:
        """Return the source."""
        return RigSource(self)

    @property
    def spec(self) -> LayoutSpec:
        """How conversations become rows."""
        return LayoutSpec(
            tokenizer=tokenizer(),
            template=get_template("internvl2_5"),
            tiles=TilePolicy(image_size=TILE, max_tiles=self.max_tiles, thumbnail=self.thumbnail),
            tokens_per_tile=self.tokens_per_tile,
            system="",
            loss_power=self.power,
        )


class RigSource:
    """Documents by (task, index), each made once and kept; a batch is one packed Sequence."""

    def __init__(self, data: RigData) -> None:
        self.data, self.spec = data, data.spec
        self._rows: dict[Draw, Row] = {}
        self._items: dict[Draw, Item] = {}
        self._kept = {task: range(data.size) for task in data.tasks} if not data.filtered else self._filter()

    def _filter(self) -> dict[str, Sequence[int]]:
        """Task -> the samples that pass."""
        return {
            task: [i for i in range(self.data.size) if repetition(self.item(task, i).answer) <= LOOPS]
            for task in self.data.tasks
        }

    @property
    def sizes(self) -> Mapping[str, int]:
        """Task -> pictures."""
        return {task: len(kept) for task, kept in self._kept.items()}

    @property
    def weights(self) -> Mapping[str, float]:
        """Task -> share, of what is left of it."""
        return {t: share * len(self._kept[t]) / self.data.size for t, share in self.data.tasks.items()}

    def item(self, task: str, index: int) -> Item:
        """Return the picture with its question and answer, after what the data does to all pictures."""
        found = self._items.get((task, index))
        if found is not None:
            return found
        made = item(task, self.data.split, self.data.seed, index)
        image = made.image
        if self.data.detail:
            shrunk = [max(1, n * self.data.detail // max(image.size)) for n in image.size]
            image = image.resize((shrunk[0], shrunk[1]), Image.Resampling.BICUBIC)
            image = image.resize(made.image.size, Image.Resampling.BICUBIC)
        if self.data.quality:
            image = jpeg(image, self.data.quality)
        made = replace(made, image=image)
        if self.data.augment == "image":  # they are needed again; otherwise their tiles are, which rows hold
            self._items[task, index] = made
        return made

    def row(self, task: str, index: int) -> Row:
        """Return the document with labels."""
        index = self._kept[task][index]
        found = self._rows.get((task, index))
        if found is None:
            found = layout(_messages(self.item(task, index), True), self.spec, train=True)
            self._rows[task, index] = found
        return found

    def fetch(self, draws: Sequence[Draw], random: torch.Generator) -> Row:
        """Return the draws as one packed sequence, compressed anew where the data says so."""
        rows = [self.row(task, index) for task, index in draws]
        if self.data.augment != "none":
            rows = [self._augmented(row, draw, random) for row, draw in zip(rows, draws, strict=True)]
        return Row.pack(rows)

    def _augmented(self, row: Row, draw: Draw, random: torch.Generator) -> Row:
        if self.data.augment == "tile":
            tiles_N3SS = row.media["image"].data
            qualities = torch.randint(75, 101, (len(tiles_N3SS),), generator=random).tolist()
            done = [_jpeg_tile(tile, q) for tile, q in zip(tiles_N3SS, qualities, strict=True)]
            return replace(row, media={"image": MediaBatch(torch.stack(done))})
        quality = int(torch.randint(75, 101, (), generator=random))
        image = jpeg(self.item(draw[0], self._kept[draw[0]][draw[1]]).image, quality)
        return replace(row, media={"image": MediaBatch(self.spec.tiles.tile(image))})


def repetition(text: str, n: int = 10) -> float:
    """Return the share of a text's n-grams (of characters) that had occurred in it before: near 1 for loops."""
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _jpeg_tile(tile_3SS: Tensor, quality: int) -> Tensor:
    pixels = jpeg(Image.fromarray(tile_3SS.permute(1, 2, 0).numpy()), quality)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def _messages(item: Item, answered: bool) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": item.image}, {"type": "text", "text": item.question}]
    answer = [{"role": "assistant", "content": item.answer}]
    return [{"role": "user", "content": content}, *(answer if answered else [])]


# --- training -----------------------------------------------------------------------------------------------


def rig_recipe(
    data: RigData, *, steps: int, batch: int, seed: int, model: RigModel | None = None, lr: float = 1e-3
) -> Recipe:
    """Return the run: Muon for the layers' matrices, AdamW for the rest, short warm-up, cosine to zero."""
    return Recipe(
        name="rig",
        model=model or RigModel(),
        objective=FinetuneObjective(),
        data=data,
        steps=steps,
        batch=batch,
        optim=Optim(
            lr=lr,
            weight_decay=0.02,
            beta2=0.98,
            groups=(Group(pattern="*layers.*", optimizer="muon", lr_scale=8.0),),
        ),
        schedule=Schedule(warmup=max(1, min(100, steps // 10))),
        seed=seed,
        save_every=steps,
        log_every=max(1, steps // 20),
    )


# --- what is measured ---------------------------------------------------------------------------------------


@torch.inference_mode()
def exact(model: CausalVLM, data: RigData, task: str, *, count: int, batch: int = 100) -> float:
    """Return the share of the first ``count`` items that greedy decoding answers exactly."""
    source = RigSource(data)
    hits = [
        answer_hits(model, Row.pack([source.row(task, i) for i in range(low, min(low + batch, count))]))
        for low in range(0, count, batch)
    ]
    return float(torch.cat(hits).float().mean())


@torch.inference_mode()
def token_hits(
    model: CausalVLM, data: RigData, task: str, *, count: int, only: str, batch: int = 100
) -> float:
    """Return the share of answer characters among ``only`` that are the likeliest after the true ones before them."""
    source = RigSource(data)
    wanted = torch.tensor(tokenizer().encode(only))
    right = total = 0
    for low in range(0, count, batch):
        row = Row.pack([source.row(task, i) for i in range(low, min(low + batch, count))])
        assert row.labels_T is not None
        counted = ((row.labels_T != IGNORE) & torch.isin(row.labels_T, wanted)).nonzero().flatten()
        guess = model.head.logits(model.hidden(row)[counted]).argmax(-1)  # type: ignore[operator]
        right += int((guess == row.labels_T[counted]).sum())
        total += len(counted)
    return right / max(total, 1)


@torch.inference_mode()
def write(
    model: CausalVLM,
    data: RigData,
    task: str,
    *,
    count: int,
    samples: int = 1,
    temperature: float = 0.0,
    limit: int = 64,
    seed: int = 0,
    batch: int = 128,
) -> tuple[list[list[str]], float]:
    """Let the model write ``samples`` answers to each of the first ``count`` items.

    Returns:
        the texts by item, and the mean number of tokens of one answer (its stop token included).
    """
    source, spec = RigSource(data), data.spec
    stop = spec.template.stop_ids(tokenizer())
    jobs = [(i, s) for i in range(count) for s in range(samples)]
    prompts = {i: layout(_messages(source.item(task, i), False), spec) for i in range(count)}
    texts: list[list[str]] = [[] for _ in range(count)]
    tokens = 0
    for low in range(0, len(jobs), batch):
        part = jobs[low : low + batch]
        decoding = Decoding(
            model,
            [prompts[i] for i, _ in part],
            sampling=[
                Sampling(temperature=temperature, seed=derive_seed(seed, "write", i, s)) for i, s in part
            ],
            limit=limit,
            stop_ids=stop,
        )
        written: list[list[int]] = [[] for _ in part]
        while events := decoding.step():
            for event in events:
                tokens += 1
                if event.id is not None and event.id not in stop:
                    written[event.doc].append(event.id)
        for (i, _), ids in zip(part, written, strict=True):
            texts[i].append(tokenizer().decode(ids))
    return texts, tokens / len(jobs)
