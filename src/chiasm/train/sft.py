"""Supervised fine-tuning of a multimodal model on question-answer worlds.

What: ``ChatSource`` (samples of worlds laid out as conversations and packed into one Sequence), ``Finetune`` (the
objective: next-token loss on the answers) and ``FinetuneObjective`` (its description).
Source: InternVL 2.5, stages 1.5 and 2: loss on assistant tokens only, weighted per sample as the layout says.

Pictures of worlds already have the size of one tile, so only their text is laid out by ``data.layout``, once for
each (question, answer); the pixels are put beside it afterwards. ``slow_document`` is the long way round.

Shape legend: N pictures, S side of a tile, T rows of a packed batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from chiasm.data.layout import LayoutSpec, layout
from chiasm.data.mixture import Draw
from chiasm.data.sequence import IGNORE, MediaBatch
from chiasm.data.sequence import Sequence as Row
from chiasm.errors import ConfigError
from chiasm.model.causal import CausalVLM
from chiasm.nn.losses import token_weights
from chiasm.text.tokenizer import Tokenizer
from chiasm.train.augment import augment, mirror
from chiasm.train.data import Source
from chiasm.train.objective import Loss, Objective
from chiasm.worlds.world import Sample, World

LOGITS = 1024
"""Rows whose logits exist at once while answers are scored."""

__all__ = [
    "ChatSource",
    "DevSource",
    "Finetune",
    "FinetuneObjective",
    "answer_hits",
    "slow_document",
    "spell_answer",
]


def slow_document(sample: Sample, spec: LayoutSpec) -> Row:
    """Return the document of one sample by the plain way: the whole conversation through ``layout``."""
    return layout(sample.to_message(), spec, train=True)


def spell_answer(row: Row, tokenizer: Tokenizer, power: float) -> Row:
    """Return a one-answer document whose answer is written with one token a character.

    The text stays the same, only its division into tokens changes: a word that was never an answer can then be
    written with tokens that were.

    Args:
        row: one training document of `layout`, its answer behind all media.
        tokenizer: the layout's.
        power: of the layout's loss weights (`LayoutSpec.loss_power`).

    Raises:
        ConfigError: there is not exactly one answer, or the tokenizer lacks one of its characters.
    """
    learned = [] if row.labels_T is None else (row.labels_T != IGNORE).nonzero().flatten().tolist()
    if not learned or learned != list(range(learned[0], learned[-1] + 1)):
        raise ConfigError("only a document with exactly one answer can be spelled")
    first, stop = learned[0] + 1, learned[-1] + 1  # of the answer; its last label is the stop token
    text = tokenizer.decode(row.ids_T[first:stop].tolist())
    letters = [tokenizer.encode(character) for character in text]
    for character, ids in zip(text, letters, strict=True):
        if len(ids) != 1:
            raise ConfigError(
                f"the tokenizer has no single token for {character!r}: it cannot spell {text!r}"
            )
    spelled = tokenizer.decode([i for (i,) in letters])
    if spelled != text:
        raise ConfigError(
            f"spelled letter by letter, {text!r} reads {spelled!r}: this tokenizer cannot spell it"
        )
    ids_T = torch.cat(
        [row.ids_T[:first], torch.tensor([i for (i,) in letters], dtype=torch.int64), row.ids_T[stop:]]
    )
    labels_T = torch.full_like(ids_T, IGNORE)
    end = first + len(letters)
    labels_T[first - 1 : end] = ids_T[first : end + 1]
    more = len(ids_T) - len(row)
    kind_T = torch.cat([row.kind_T[:stop], row.kind_T[stop - 1 : stop].expand(more), row.kind_T[stop:]])
    doc_T = torch.zeros(len(ids_T), dtype=row.doc_T.dtype)
    return replace(
        row,
        ids_T=ids_T,
        kind_T=kind_T,
        doc_T=doc_T,
        pos_T=torch.arange(len(ids_T), dtype=row.pos_T.dtype),
        labels_T=labels_T,
        weight_T=token_weights(labels_T, doc_T, power),
    )


class ChatSource:
    """Worlds as training conversations.

    Args:
        worlds: family -> training world.
        dev: family -> dev world; never the test split.
        weights: family -> share of draws.
        spec: layout of the model that will read them.
        mirrored: families whose pictures may be mirrored.
        warped: families whose pictures may be shifted and zoomed.
        spelled: families whose answers are learned letter by letter (``spell_answer``).
        jitter: False leaves pictures as they are, whatever the two above say.
        dev_size: dev samples per family.

    Raises:
        ConfigError: the layout would cut a picture into tiles.
    """

    def __init__(
        self,
        worlds: Mapping[str, World],
        dev: Mapping[str, World],
        weights: Mapping[str, float],
        spec: LayoutSpec,
        *,
        mirrored: Sequence[str] = (),
        warped: Sequence[str] = (),
        spelled: Sequence[str] = (),
        jitter: bool = True,
        dev_size: int = 100,
    ) -> None:
        if spec.tiles.dynamic or spec.tiles.pad2square:
            raise ConfigError("a ChatSource shows one tile a picture: use TilePolicy(dynamic=False)")
        self.worlds, self._dev, self._weights, self.spec = worlds, dev, weights, spec
        self.mirrored, self.warped, self.jitter, self.dev_size = mirrored, warped, jitter, dev_size
        self.spelled = spelled
        self._texts: dict[tuple[str, str, str], Row] = {}

    @property
    def sizes(self) -> Mapping[str, int]:
        """Family -> number of training samples."""
        return {name: len(world) for name, world in self.worlds.items()}

    @property
    def weights(self) -> Mapping[str, float]:
        """Family -> share."""
        return self._weights

    def fetch(self, draws: Sequence[Draw], random: torch.Generator) -> Row:
        """Return the draws as one packed sequence, pictures augmented."""
        samples = [self.worlds[family].sample(index) for family, index in draws]
        images_NSS3 = torch.from_numpy(np.stack([sample.image for sample in samples]))
        if self.jitter:
            may_flip = torch.tensor([family in self.mirrored for family, _ in draws])
            flipped = may_flip & (torch.rand(len(draws), generator=random) < 0.5)
            warped = torch.tensor([family in self.warped for family, _ in draws])
            images_NSS3 = augment(mirror(images_NSS3, flipped), warped, random)
        return Row.pack([self.document(s, image) for s, image in zip(samples, images_NSS3, strict=True)])

    def document(self, sample: Sample, image_SS3: Tensor | None = None) -> Row:
        """Return one sample as a document, with its own picture or ``image_SS3`` (uint8) in its place."""
        if sample.image.shape[0] != self.spec.tiles.image_size:
            return self._spelled(sample.family, slow_document(sample, self.spec))
        key = (sample.family, sample.question, sample.answer)
        if key not in self._texts:
            blank = replace(sample, image=np.zeros_like(sample.image))
            row = self._spelled(sample.family, slow_document(blank, self.spec))
            # The blank picture's content hash must not stand for other pictures.
            self._texts[key] = replace(row, spans=tuple(replace(span, key="") for span in row.spans))
        image_SS3 = (
            torch.tensor(sample.image) if image_SS3 is None else image_SS3
        )  # PIL's arrays are read-only
        tile_13SS = image_SS3.permute(2, 0, 1)[None].contiguous()
        return replace(self._texts[key], media={"image": MediaBatch(tile_13SS)})

    def _spelled(self, family: str, row: Row) -> Row:
        if family not in self.spelled:
            return row
        return spell_answer(row, self.spec.tokenizer, self.spec.loss_power)

    @property
    def dev_families(self) -> tuple[str, ...]:
        """Families that are drawn, in the order in which their dev samples are scored."""
        return tuple(sorted(family for family, weight in self.weights.items() if weight > 0))

    def dev(self, family: str) -> list[Row]:
        """Return the first dev samples of a family as documents, unaugmented."""
        world = self._dev[family]
        return [self.document(world.sample(index)) for index in range(min(self.dev_size, len(world)))]


def answer_hits(model: CausalVLM, row: Row) -> Tensor:
    """Return (docs,) bool: would greedy decoding give exactly the labelled answer of each document?

    One forward pass suffices: greedy decoding reproduces an answer if and only if, with the answer itself as
    context, every labelled token (its stop token included) is the most probable one.
    """
    row = row.to(model.device)
    if row.labels_T is None:
        raise ConfigError("answer_hits needs labels: lay the sequence out with train=True")
    rows = (row.labels_T != IGNORE).nonzero().flatten()
    hidden_SC = model.hidden(row)[rows]
    guess = torch.cat([model.head.logits(part).argmax(-1) for part in hidden_SC.split(LOGITS)])  # type: ignore[operator]
    wrong = row.doc_T[rows][guess != row.labels_T[rows]].long()
    hits = torch.ones(row.docs, dtype=torch.bool, device=row.ids_T.device)
    hits[wrong] = False
    return hits


class DevSource(Protocol):
    """What a source needs so that `Finetune` can score its dev split.

    With ``dev_losses`` (true) each family's mean loss is a score too.
    """

    @property
    def dev_families(self) -> tuple[str, ...]:
        """Names of the sets to score; () where there are none."""
        ...

    def dev(self, family: str) -> Iterable[Row]:
        """Return the documents of one set, laid out for training, always the same."""
        ...


class Finetune(Objective):
    """Next-token loss on answers; dev scores are exact answers under greedy decoding, by family of the source.

    Args:
        dev_batch: documents that are scored at once, at most.
        dev_tokens: their rows together, at most (one document may have more).
    """

    def __init__(self, dev_batch: int, dev_tokens: int = 8192) -> None:
        super().__init__()
        self.dev_batch, self.dev_tokens = dev_batch, dev_tokens

    def loss(self, model: nn.Module, batch: Row) -> Loss:
        """Return the model's own loss of a packed sequence.

        Where it has several parts it comes with them, and with their mean for a trainer that does not know their
        denominators ahead: micro-batches are then averaged equally.
        """
        if not isinstance(model, CausalVLM):
            raise ConfigError(f"Finetune needs a CausalVLM, got {type(model).__name__}")
        parts = model.loss(batch).parts
        metrics = {f"{name}/loss": (p.total.detach(), p.weight.detach()) for name, p in parts.items()}
        if len(parts) == 1:
            (part,) = parts.values()
            return Loss(total=part.scale * part.total, weight=part.weight, metrics=dict(metrics))
        mean = torch.stack([part.scale * part.mean for part in parts.values()]).sum()
        return Loss(total=mean, weight=1.0, metrics=dict(metrics), parts=parts)

    def denominators(self, model: nn.Module, batch: Row) -> dict[str, float] | None:
        """Return what the model's head says (``head.denominators(sequence)``), None where it has nothing to say."""
        known = getattr(getattr(model, "head", None), "denominators", None)
        return None if known is None else {name: float(weight) for name, weight in known(batch).items()}

    def document_losses(self, model: nn.Module, batch: Row) -> Tensor | None:
        """Return the mean loss of every document."""
        return model.document_losses(batch) if isinstance(model, CausalVLM) else None

    def evaluate(self, model: nn.Module, source: Source) -> dict[str, float]:
        """Return the share of exact answers by family of the dev split, and ``family/loss`` where the source asks.

        Raises:
            ConfigError: the model is no CausalVLM, or the source has no dev split (set ``eval_every`` to 0).
        """
        if not isinstance(model, CausalVLM) or not hasattr(source, "dev_families"):
            raise ConfigError("Finetune scores a CausalVLM on a source with a dev split: set eval_every to 0")
        own = cast("DevSource", source)
        scores = {}
        for family in own.dev_families:
            hits, losses = [], []
            for pack in self._packs(own.dev(family)):
                hits.append(answer_hits(model, pack))
                if getattr(source, "dev_losses", False):
                    losses.append(model.document_losses(pack))
            if hits:
                scores[family] = float(torch.cat(hits).float().mean())
            if losses:
                scores[f"{family}/loss"] = float(torch.cat(losses).mean())
        return scores

    def _packs(self, documents: Iterable[Row]) -> Iterator[Row]:
        """The documents in order, some at a time."""
        group: list[Row] = []
        for document in documents:
            full = len(group) == self.dev_batch or sum(map(len, group)) + len(document) > self.dev_tokens
            if group and full:
                yield Row.pack(group)
                group = []
            group.append(document)
        if group:
            yield Row.pack(group)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneObjective:
    """Describes ``Finetune``; ``dev_batch`` documents are scored at once."""

    dev_batch: int = 25

    def build(self, model: nn.Module, source: Source) -> Finetune:
        """Return the objective."""
        return Finetune(self.dev_batch)
