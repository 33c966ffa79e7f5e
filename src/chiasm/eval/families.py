"""Held-out accuracy per family of pictures, beside the controls that must be beaten.

What: ``evaluate_families`` asks a model the questions of each world's split (greedy, in batches), asks again about
blank and exchanged pictures, scores everything by exact match, and returns plain data for results.json with a
manifest for every score. Nothing here trains, tunes or chooses.

How many items and which: the first ``ITEMS[family]`` samples of the split with seed ``SEED`` (all worlds are in random
order), fixed before any model was evaluated.

Two controls cost little, because an answer depends on (picture, question) only and greedy decoding has no chance in
it: a blank picture is asked once for each distinct question, and a picture that was already asked the same question
keeps its answer when it is paired with another item (what is left is asked anew). Answers to the same pair can differ
in the last bits with the composition of the batch; a reused one is the one that was scored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from chiasm.checkpoint.adapters import count_by_part
from chiasm.data.layout import prompt_text
from chiasm.errors import DataError, UsageError
from chiasm.eval.controls import COUNTED, blank_like, derangement, fashion_linear, grey_level, majority
from chiasm.eval.metrics import PARSER_VERSION, compare, exact_match, score
from chiasm.eval.metrics.grounding import GROUNDING_VERSION, parse_box
from chiasm.eval.store import Store
from chiasm.media.boxes import format_box, iou
from chiasm.worlds import Sample, World, open_world
from chiasm.worlds.grounding import mean_box

if TYPE_CHECKING:
    from chiasm.model.chat import ChatModel, Reply

__all__ = [
    "BATCH",
    "CONTROLS",
    "FAMILIES",
    "ITEMS",
    "MAX_NEW_TOKENS",
    "OPTIONS",
    "SEED",
    "Answers",
    "describe",
    "evaluate_families",
    "open_family",
]

#: Items per family: 1,000 give an interval of at most ± 3.1 points. Fashion-MNIST's strongest control is near what a
#: small model can reach, so it gets twice as many. All together take about half an hour of CPU.
ITEMS = {"cifar10": 1000, "fashion": 2000, "words": 1000, "counting": 1000}
SEED = 0
MAX_NEW_TOKENS = 8
BOX_TOKENS = 48
"""A name and four numbers, most of whose digits are tokens of their own."""
BATCH = 16
#: In the order of the table; "pixels" exists for Fashion-MNIST only, "mean box" where boxes are asked for.
CONTROLS = ("majority", "mean box", "blank", "shuffled", "pixels")
#: Families whose answers are counts: "3" is "three" there.
NUMERIC = ("counting", "charts")
#: Families whose answers are boxes: right where the first one overlaps the true one by an IoU of at least 0.5.
BOXES = ("grounding",)
FAMILIES = ("cifar10", "fashion", "words", "counting", "clipart", "grounding", "charts")
"""What is asked, in the order of the card."""
OPTIONS: dict[str, dict[str, Any]] = {
    "clipart": {"names": 150},
    # Without an axis a value can only be guessed.
    "charts": {"pixels": 64, "questions": ("count", "highest", "lowest", "compare")},
}
"""How a family differs from its world's defaults here; chiasm-mini is trained on the same."""


def open_family(family: str, split: str) -> World:
    """The world of a family as it is asked here."""
    return open_world(family, split, **OPTIONS.get(family, {}))


Progress = Callable[[str, int, int], None]
"""Told (part, items done, items in all)."""


class Answers(Protocol):
    """What is evaluated: anything that answers conversations in order, as ``ChatModel.batch`` does."""

    def batch(self, conversations: Sequence[Any], **options: Any) -> list[Reply]:
        """Return one reply per conversation."""
        ...


@dataclass(frozen=True, slots=True)
class _Pairs:
    """(picture, question) pairs to be asked, and the answers once they are there."""

    images: list[np.ndarray]
    questions: list[str]


def evaluate_families(
    model: Answers,
    families: Sequence[str],
    *,
    n: int | None = None,
    split: str = "test",
    batch: int = BATCH,
    about: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    opener: Callable[[str, str], World] = open_family,
    pixels: Callable[[str], tuple[list[str], dict[str, Any]]] | None = fashion_linear,
    report: Progress = lambda part, done, total: None,
) -> dict[str, dict[str, Any]]:
    """Evaluate families one after the other.

    Args:
        model: what answers.
        families: names of worlds.
        n: items of every family instead of ``ITEMS`` (the split's length at most).
        split: "test" or "dev".
        batch: conversations answered at once.
        about: facts of the model for the manifest, as from ``describe``.
        environment: versions, machine and git revision for the manifest; only ``versions`` decides about reuse.
        out: folder in which answers are kept (``eval.store``); None keeps nothing.
        opener: (family, split) -> world.
        pixels: split -> (answers of the raw-pixel control to Fashion-MNIST, facts of its fit); None leaves it out.
        report: is told about progress.

    Returns:
        family -> {"score", "controls": {name: {...}}, "beats_all_controls", "examples", "confusions", "manifest"}.

    Raises:
        UsageError: split "train", unknown numbers.
        DataError: an asset is missing, or fewer than two items.
    """
    if split not in ("dev", "test"):
        raise UsageError(f"evaluate dev or test, not {split!r}: a model has seen its training split")
    if batch < 1 or (n is not None and n < 2):
        raise UsageError(f"batch {batch} and n {n}: give a batch of at least 1 and at least 2 items")
    environment = dict(environment or {})
    store = Store(out, {name: environment[name] for name in ("git", "machine", "cpu") if name in environment})
    results = {}
    for family in families:
        world, train = opener(family, split), opener(family, "train")
        run = _Family(model, world, train, n, batch, store, report)
        run.identity["model"] = dict(about or {})
        run.identity["versions"] = environment.get("versions", {})
        results[family] = run.evaluate(pixels if family == "fashion" else None)
    return results


class _Family:
    """One family: its items, its identity, its answers under each condition."""

    def __init__(
        self,
        model: Answers,
        world: World,
        train: World,
        n: int | None,
        batch: int,
        store: Store,
        report: Progress,
    ) -> None:
        self.model, self.world, self.train, self.batch = model, world, train, batch
        self.store, self.report = store, report
        count = min(n if n is not None else ITEMS.get(world.family, 1000), len(world))
        if count < 2:
            raise DataError(f"world {world.family}/{world.split} has {count} item(s): evaluate at least two")
        self.items: list[Sample] = [world.sample(i) for i in range(count)]
        self.numbers, self.boxes = world.family in NUMERIC, world.family in BOXES
        self.tokens = BOX_TOKENS if self.boxes else MAX_NEW_TOKENS
        spec = getattr(model, "spec", None)
        self.identity: dict[str, Any] = {
            "family": world.family,
            "split": world.split,
            "n": count,
            "seed": SEED,
            "decoding": {"kind": "greedy", "max_new_tokens": self.tokens, "batch": batch},
            "parser": {"version": PARSER_VERSION, "numbers": self.numbers}
            | ({"boxes": "first box, IoU >= 0.5", "grounding": GROUNDING_VERSION} if self.boxes else {}),
            "prompt": None if spec is None else prompt_text(self.items[0].to_message(answered=False), spec),
            "data": {"world": world.manifest(), "hash": _hash_items(self.items)},
        }

    # --- the four conditions ---

    def evaluate(self, pixels: Callable[[str], tuple[list[str], dict[str, Any]]] | None) -> dict[str, Any]:
        """Ask, compare, and put everything into plain data."""
        answers, record = self._ask(
            "real", _Pairs([s.image for s in self.items], [s.question for s in self.items])
        )
        verdicts = self._verdicts(answers)
        ours = score(verdicts)
        controls: dict[str, tuple[list[str], dict[str, Any]]] = {
            **self._without_looking(len(answers)),
            "blank": self._blank(),
            "shuffled": self._shuffled(answers),
        }
        if pixels is not None:
            predicted, facts = pixels(self.world.split)
            controls["pixels"] = (predicted[: len(answers)], facts)
        compared = {}
        for name, (given, facts) in controls.items():
            compared[name] = compare(verdicts, self._verdicts(given)).to_dict() | {"facts": facts}
        wrong = Counter(
            (s.answer, a) for s, a, ok in zip(self.items, answers, verdicts, strict=True) if not ok
        )
        return {
            "question": Counter(s.question for s in self.items).most_common(1)[0][0],
            "score": ours.to_dict(),
            **({"mean_iou": float(self._overlaps(answers).mean())} if self.boxes else {}),
            "controls": compared,
            "beats_all_controls": all(c["beaten"] for c in compared.values()),
            "examples": [
                {"key": s.key, "question": s.question, "answer": s.answer, "given": a, "correct": bool(ok)}
                for s, a, ok in zip(self.items[:10], answers, verdicts, strict=False)
            ],
            "confusions": [
                {"answer": pair[0], "given": pair[1], "times": times} for pair, times in wrong.most_common(8)
            ],
            "pictures": {"train": len(self.train), self.world.split: len(self.world)},
            "manifest": self.identity | {"record": record},
        }

    def _without_looking(self, count: int) -> dict[str, tuple[list[str], dict[str, Any]]]:
        """One answer for all items, from the training split."""
        if self.boxes:
            box = mean_box(self.train, min(len(self.train), COUNTED))  # type: ignore[arg-type]
            answer = format_box("", box)
            return {"mean box": ([answer] * count, {"answer": answer, "counted": COUNTED})}
        most = majority(self.train)
        return {"majority": ([most.answer] * count, dataclasses.asdict(most))}

    def _overlaps(self, answers: Sequence[str]) -> np.ndarray:
        """(n,) IoU of the first box of each answer with the true one; 0 where an answer has no box."""
        found = []
        for given, item in zip(answers, self.items, strict=True):
            guess, truth = parse_box(given), parse_box(item.answer)
            found.append(0.0 if guess is None or truth is None else iou(guess, truth))
        return np.array(found)

    def _verdicts(self, answers: Sequence[str]) -> np.ndarray:
        if self.boxes:
            return self._overlaps(answers) >= 0.5
        return np.array(
            [
                exact_match(given, item.answer, numbers=self.numbers)
                for given, item in zip(answers, self.items, strict=True)
            ]
        )

    def _blank(self) -> tuple[list[str], dict[str, Any]]:
        """The same questions about one grey: asked once a question."""
        level = grey_level(self.train)
        questions = list(dict.fromkeys(s.question for s in self.items))
        picture = blank_like(self.items[0].image, level)
        answers, record = self._ask("blank", _Pairs([picture] * len(questions), questions), grey=level)
        known = dict(zip(questions, answers, strict=True))
        facts = {"grey": level, "asked": len(questions), "answers": known if len(known) <= 8 else None}
        return [known[s.question] for s in self.items], facts | {"record": record}

    def _shuffled(self, answers: list[str]) -> tuple[list[str], dict[str, Any]]:
        """Each question about the picture of another item; answers that are known already are reused."""
        order: list[int] = derangement(len(self.items), SEED).tolist()
        given: list[str | None] = [
            answers[other] if self.items[other].question == item.question else None
            for item, other in zip(self.items, order, strict=True)
        ]
        left = [i for i, answer in enumerate(given) if answer is None]
        pairs = _Pairs([self.items[order[i]].image for i in left], [self.items[i].question for i in left])
        record: dict[str, Any] = {"cpu_seconds": 0.0}
        if left:
            asked, record = self._ask("shuffled", pairs)
            for i, answer in zip(left, asked, strict=True):
                given[i] = answer
        facts = {"reused": len(given) - len(left), "asked": len(left), "record": record}
        return [answer or "" for answer in given], facts

    def _ask(self, condition: str, pairs: _Pairs, **more: Any) -> tuple[list[str], dict[str, Any]]:
        """Answers to pairs, from the store as far as it has them."""
        name = f"{self.world.family}-{self.world.split}-{condition}"

        def work(first: int, last: int) -> list[str]:
            messages = [_message(pairs.images[i], pairs.questions[i]) for i in range(first, last)]
            replies = self.model.batch(messages, temperature=0.0, max_new_tokens=self.tokens)
            return [reply.text for reply in replies]

        return self.store.run(
            name,
            self.identity | {"condition": condition, **more},
            len(pairs.questions),
            work,
            batch=self.batch,
            report=lambda done, total: self.report(name, done, total),
        )


def _message(image: np.ndarray, question: str) -> list[dict[str, Any]]:
    sample = Sample(image=image, question=question, answer="", family="", key="")
    return sample.to_message(answered=False)


def _hash_items(items: Sequence[Sample]) -> str:
    """Hash of pictures, questions and answers as they were used: a changed font or resize filter shows here."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(json.dumps([item.key, item.question, item.answer, item.image.shape]).encode())
        digest.update(np.ascontiguousarray(item.image).data)
    return digest.hexdigest()


# --- the model in a manifest ----------------------------------------------------------------------------------


def describe(model: ChatModel) -> dict[str, Any]:
    """Return what identifies a chat model: name, weights, template, tile policy, precision.

    ``weights`` is a hash over every tensor that answers, the language model's included, in the precision used.
    """
    import torch

    from chiasm.nn.quant import RoundedLinear

    spec = model.spec
    digest = hashlib.blake2b(digest_size=16)
    held = [*model.model.named_parameters(remove_duplicate=False), *model.model.named_buffers()]
    for name, tensor in sorted(held):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw.numpy().data)
    for name, module in sorted(model.model.named_modules()):  # rounded weights are in no state dict
        if isinstance(module, RoundedLinear):
            digest.update(f"{name} {module.checksum}".encode())
    first = next(model.model.parameters())
    return {
        "name": model.name,
        "weights": digest.hexdigest(),
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": first.device.type,
        **({"quantize": model.model.quantized} if model.model.quantized else {}),
        "template": spec.template.name,
        "system": spec.system if spec.system is not None else spec.template.system,
        "tiles": dataclasses.asdict(spec.tiles),
        "tokens_per_tile": spec.tokens_per_tile,
        **({"repeats": spec.repeats} if spec.repeats > 1 else {}),
        **model.facts,
        "parameters": count_by_part((name, p.numel()) for name, p in model.model.named_parameters()),
    }
