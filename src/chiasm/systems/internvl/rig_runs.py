"""What the arms of InternVL's claims do: one function an experiment, from a ``Trial`` to its metrics.

Source: InternVL 2.5 fact sheet, section 7. All training data is of the train split; what is measured is of the trial's
own split (dev while tuning, test when confirming). Models and steps are equal between the arms of an experiment unless
its arms say otherwise.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from chiasm.data.mixture import derive_seed
from chiasm.data.sequence import IGNORE, IMAGE, MediaBatch, Span
from chiasm.data.sequence import Sequence as Row
from chiasm.lab.claim import Trial
from chiasm.lab.training import train_rig
from chiasm.media.pixels import normalize
from chiasm.model.causal import CausalVLM
from chiasm.systems.internvl.rig import (
    LOOPS,
    TILE,
    RigData,
    RigModel,
    RigSource,
    exact,
    repetition,
    rig_recipe,
    token_hits,
    write,
)

__all__ = [
    "compression",
    "cot",
    "jpeg_training",
    "loss_power",
    "packing_exact",
    "packing_speed",
    "probes",
    "progressive",
    "repetition_filter",
    "tiling",
]

DIGITS = "0123456789"


def _model(trial: Trial, **more: Any) -> RigModel:
    """The rig's model, smaller where the budget says so."""
    b = trial.budget
    sizes = {k: int(b[k]) for k in ("vision_width", "vision_layers", "width", "layers") if k in b}
    return RigModel(**{**sizes, **more})


def _train(
    trial: Trial,
    data: RigData,
    model: RigModel | None = None,
    steps: int | None = None,
    look: Callable[[CausalVLM], None] | None = None,
) -> CausalVLM:
    """Train; ``look`` sees the model after every ``look_every`` steps of the budget."""
    b = trial.budget
    recipe = rig_recipe(
        data,
        steps=int(b["steps"]) if steps is None else steps,
        batch=int(b["batch"]),
        seed=trial.seed,
        model=model or _model(trial),
    )
    return train_rig(recipe, every=int(b.get("look_every", 0)), look=look)[0]


def _train_in_stages(
    trial: Trial,
    first: RigData,
    second: RigData,
    *,
    panels: RigData | None = None,
    look: Callable[[CausalVLM], None] | None = None,
) -> CausalVLM:
    """Learn to see on ``first`` (``first_steps``, the same for all arms), then what the arm is about on ``second``.

    ``panels`` come before both, for ``panel_steps``. ``look`` sees the model during the last.
    """
    model, stages = _model(trial), [(first, int(trial.budget["first_steps"]))]
    if panels is not None:
        stages.insert(0, (panels, int(trial.budget.get("panel_steps", 1))))
    with tempfile.TemporaryDirectory(prefix="chiasm-rig-") as folder:
        path = f"{folder}/stage.safetensors"
        for data, steps in stages:
            state = _train(trial, data, model, steps).state_dict()
            save_file({n: t.contiguous() for n, t in state.items() if n in _own(state)}, path)
            model = _model(trial, start=path)
        return _train(trial, second, model, look=look)


def _own(state: Mapping[str, Tensor]) -> set[str]:
    """Names of a state without those that share the memory of an earlier one (tied words)."""
    seen: dict[int, str] = {}
    return {seen.setdefault(tensor.data_ptr(), name) for name, tensor in state.items()}


def _data(trial: Trial, tasks: Mapping[str, float], **more: Any) -> RigData:
    return RigData(**{"tasks": tasks, "seed": trial.seed, "size": int(trial.budget["pictures"]), **more})


def _held_out(trial: Trial, data: RigData, **more: Any) -> RigData:
    """The same kind of pictures from the trial's split, never augmented."""
    return replace(data, split=trial.split, augment="none", **more)


# --- packing ------------------------------------------------------------------------------------------------


def packing_exact(trial: Trial) -> dict[str, float]:
    """Packed against one by one: largest difference of a logit, relative difference of the whole gradient.

    The arm ``positions`` packs as if documents were told apart by restarting position numbers alone.
    """
    data = RigData(tasks={"long": 1, "read": 1}, seed=trial.seed, split=trial.split, max_tiles=2)
    source = RigSource(data)
    count = int(trial.budget["count"])
    documents = [source.row(task, i) for i in range(count) for task in data.tasks]
    torch.manual_seed(derive_seed(trial.seed, "packing"))
    model = _model(trial).build().eval()
    with (
        torch.no_grad()
    ):  # at the first weights attention is nearly uniform and whatever leaks is averaged away
        for parameter in model.trunk.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    packed = Row.pack(documents)
    if trial.arm.settings["isolated"] is False:
        packed = replace(packed, doc_T=torch.zeros_like(packed.doc_T))
    together, apart = _gradients(model, [packed]), _gradients(model, documents)
    difference = torch.cat([(a - b).flatten() for a, b in zip(together, apart, strict=True)]).norm()
    size = torch.cat([b.flatten() for b in apart]).norm()
    with torch.no_grad():
        one = torch.cat([model.head.logits(model.hidden(d)) for d in documents])  # type: ignore[operator]
        many = model.head.logits(model.hidden(packed))  # type: ignore[operator]
    return {"gradient": float(difference / size), "logit": float((one - many).abs().max())}


def _gradients(model: CausalVLM, rows: list[Row]) -> list[Tensor]:
    """Gradient of the weighted sum of losses over the weight of all of them."""
    model.zero_grad(set_to_none=True)
    weight = 0.0
    for row in rows:
        part = model.loss(row).parts["text"]
        part.total.backward()
        weight += float(part.weight)
    return [p.grad / weight for p in model.parameters() if p.grad is not None]


def packing_speed(trial: Trial) -> dict[str, float]:
    """Useful tokens a second of CPU time, forward and backward, over the same ragged documents.

    ``padded``: batches in the order of arrival, every document filled up to the longest of its batch, as a plain loop
    does. ``packed``: best fit into packs of ``pack`` rows over a buffer of 20, nothing filled up.
    """
    b = trial.budget
    random = np.random.Generator(np.random.PCG64(derive_seed(trial.seed, "speed", trial.split)))
    lengths = np.clip(
        random.lognormal(np.log(float(b["median"])), 0.9, int(b["count"])), 32, float(b["longest"])
    )
    documents = [_ragged(random, int(n)) for n in lengths]
    torch.manual_seed(derive_seed(trial.seed, "speed"))
    model = _model(trial).build().train()
    if trial.arm.settings["packed"]:
        batches = [Row.pack(group) for group in _best_fit(documents, int(b["pack"]))]
    else:
        size = int(b["batch"])
        groups = [documents[i : i + size] for i in range(0, len(documents), size)]
        batches = [Row.pack([_filled(d, max(map(len, group))) for d in group]) for group in groups]
    _gradients(model, batches[:1])  # the first pass allocates and compiles kernels
    loss = weight = 0.0
    began = time.process_time()
    for batch in batches:
        part = model.loss(batch).parts["text"]
        part.total.backward()
        loss, weight = loss + float(part.total.detach()), weight + float(part.weight)
    seconds = time.process_time() - began
    useful = sum(map(len, documents))
    rows = sum(map(len, batches))
    return {"tokens_per_second": useful / seconds, "fill": useful / rows, "loss": loss / weight}


def _ragged(random: np.random.Generator, length: int) -> Row:
    """A document of random characters, half of them learned, with up to four random tiles in front."""
    tiles = int(random.choice([0, 1, 2, 4]))
    ids = torch.from_numpy(random.integers(0, 60, length))
    kind_T, spans, media = torch.zeros(length, dtype=torch.int8), (), {}
    if tiles:
        kind_T[1 : 1 + 4 * tiles] = IMAGE
        spans = (Span(media="image", start=1, length=4 * tiles, first=0, items=tiles),)
        pixels = random.integers(0, 256, (tiles, 3, TILE, TILE), dtype=np.uint8)
        media = {"image": MediaBatch(torch.from_numpy(pixels))}
    labels_T = torch.full((length,), IGNORE)
    labels_T[length // 2 : -1] = ids[length // 2 + 1 :]
    text = Row.of_text(ids.tolist())
    return replace(text, kind_T=kind_T, labels_T=labels_T, spans=spans, media=media)


def _filled(row: Row, length: int) -> Row:
    """The document with rows behind it that mean nothing, up to ``length``."""
    more = length - len(row)
    assert row.labels_T is not None
    return replace(
        row,
        ids_T=F.pad(row.ids_T, (0, more)),
        kind_T=F.pad(row.kind_T, (0, more)),
        doc_T=F.pad(row.doc_T, (0, more)),
        pos_T=torch.arange(length, dtype=row.pos_T.dtype),
        labels_T=F.pad(row.labels_T, (0, more), value=IGNORE),
    )


def _best_fit(documents: list[Row], limit: int, buffer: int = 20) -> list[list[Row]]:
    """Each document goes into the open pack that it fills best; the fullest is closed when too many are open."""
    opened: list[list[Row]] = []
    closed: list[list[Row]] = []
    for document in documents:
        room = [(limit - sum(map(len, pack)) - len(document), n) for n, pack in enumerate(opened)]
        fitting = [(left, n) for left, n in room if left >= 0]
        if fitting:
            opened[min(fitting)[1]].append(document)
        else:
            opened.append([document])
        if len(opened) > buffer:
            opened.sort(key=lambda pack: sum(map(len, pack)))
            closed.append(opened.pop())
    return closed + opened


# --- recipe items -------------------------------------------------------------------------------------------


def loss_power(trial: Trial) -> dict[str, float]:
    """A mixture of one-token and about sixty-token answers, learned with weights x^-p.

    At the end all arms can do both; what differs is when. So accuracy is averaged over looks during training.
    """
    data = _data(trial, {"short": 1, "long": 1}, power=float(trial.arm.settings["power"]))
    held, count = _held_out(trial, data), int(trial.budget["count"])
    short: list[float] = []
    long: list[float] = []

    def look(model: CausalVLM) -> None:
        short.append(exact(model, held, "short", count=count))
        long.append(token_hits(model, held, "long", count=count, only=DIGITS))

    _train_in_stages(trial, _data(trial, {"scan": 1}), data, look=look)
    return {
        "short": float(np.mean(short)),
        "long": float(np.mean(long)),
        "short_end": short[-1],
        "long_end": long[-1],
    }


def tiling(trial: Trial) -> dict[str, float]:
    """Small digits and the colour of the page, from one tile, from four, with and without thumbnail."""
    s = trial.arm.settings
    data = _data(
        trial,
        {"code": 2, "colour": 1},
        max_tiles=int(s["tiles"]),
        thumbnail=bool(s["thumbnail"]),
        detail=int(s["detail"]),
    )
    panels = replace(data, tasks={"panel": 2, "panel_colour": 1}, detail=0, max_tiles=1)
    clean = replace(data, tasks={"code_clean": 2, "colour_clean": 1}, detail=0)
    model = _train_in_stages(trial, clean, data, panels=panels)
    held, count = _held_out(trial, data), int(trial.budget["count"])
    return {
        "text": token_hits(model, held, "code", count=count, only=DIGITS),
        "colour": exact(model, held, "colour", count=count),
        "visual_tokens": float(sum(s.length for s in RigSource(held).row("code", 0).spans)),
    }


def jpeg_training(trial: Trial) -> dict[str, float]:
    """Faint digits, trained with or without random JPEG, read at falling qualities."""
    augment: Any = trial.arm.settings["augment"]
    data = _data(trial, {"faint": 1}, max_tiles=2, augment=augment)
    model = _train_in_stages(trial, replace(data, augment="none"), data)
    count = int(trial.budget["count"])
    scores = {"clean": token_hits(model, _held_out(trial, data), "faint", count=count, only=DIGITS)}
    for quality in (100, 75, 50, 30):
        held = _held_out(trial, data, quality=quality)
        scores[f"q{quality}"] = token_hits(model, held, "faint", count=count, only=DIGITS)
    return scores


def cot(trial: Trial) -> dict[str, float]:
    """The sum modulo 5 of eight digits in a picture: at once, step by step, and by vote of sampled steps."""
    task = str(trial.arm.settings["task"])
    data = _data(trial, {"read_small": 1, task: 2})
    model = _train_in_stages(trial, _data(trial, {"read_small": 1}), data)
    held, count, limit = _held_out(trial, data), int(trial.budget["count"]), int(trial.budget["limit"])
    scores = {"read": token_hits(model, held, "read_small", count=count, only=DIGITS)}
    if task == "sum":
        return scores | {"greedy": exact(model, held, task, count=count), "tokens": 2.0}
    truth = [RigSource(held).item(task, i).facts[0] for i in range(count)]
    texts, tokens = write(model, held, task, count=count, limit=limit)
    scores |= {"greedy": _share(map(_final, (t[0] for t in texts)), truth), "tokens": tokens}
    texts, tokens = write(
        model,
        held,
        task,
        count=count,
        samples=16,
        temperature=0.4,
        limit=limit,
        seed=derive_seed(trial.seed, trial.split),
    )
    answers = [[_final(text) for text in row] for row in texts]
    scores["vote1"] = sum(a == t for row, t in zip(answers, truth, strict=True) for a in row) / (16 * count)
    for k in (4, 16):
        scores[f"vote{k}"] = _share((_vote(row[:k]) for row in answers), truth)
    return scores | {"tokens16": 16 * tokens}


def _final(text: str) -> str:
    """The answer at the end of a chain of thought; "" where there is none."""
    return text.rpartition("Answer: ")[2].strip() if "Answer: " in text else ""


def _vote(answers: list[str]) -> str:
    """The most frequent answer that is one; of equally frequent ones the first."""
    counts = Counter(a for a in answers if a)
    return counts.most_common(1)[0][0] if counts else ""


def _share(found: Any, truth: list[str]) -> float:
    return sum(a == b for a, b in zip(found, truth, strict=True)) / len(truth)


def compression(trial: Trial) -> dict[str, float]:
    """Four patches made one token by unshuffling, averaging or dropping; or every patch a token."""
    how: Any = trial.arm.settings["compress"]
    model = _model(trial, compress=how)
    data = _data(trial, {"read": 1}, tokens_per_tile=model.tokens_per_tile)
    trained = _train(trial, data, model)
    held = _held_out(trial, data)
    hits = token_hits(trained, held, "read", count=int(trial.budget["count"]), only=DIGITS)
    return {"text": hits, "visual_tokens": float(model.tokens_per_tile)}


def repetition_filter(trial: Trial) -> dict[str, float]:
    """Long answers of which some loop: learned as they are, filtered, or clean from the start."""
    share, s = float(trial.budget["loops"]), trial.arm.settings
    tasks = {"long": 1 - share, "long_loop": share} if s["loops"] else {"long": 1.0}
    data = _data(trial, tasks, filtered=bool(s["filtered"]))
    model = _train(trial, data)
    held, count = _held_out(trial, data, tasks={"long": 1.0}, filtered=False), int(trial.budget["count"])
    texts, _ = write(
        model,
        held,
        "long",
        count=count,
        temperature=1.0,
        limit=160,
        seed=derive_seed(trial.seed, trial.split),
    )
    return {
        "loops": sum(repetition(row[0]) > LOOPS for row in texts) / count,
        "long": token_hits(model, held, "long", count=count, only=DIGITS),
    }


def progressive(trial: Trial) -> dict[str, float]:
    """An encoder from scratch under the large language model, or trained under a small one first, at half the compute.

    Compute is counted as 6 x parameters x rows, encoder and decoder apart, as the paper's own figures are.
    """
    b, large = trial.budget, _model(trial)
    small = replace(large, width=large.width // 2, layers=max(1, large.layers // 4))
    data = _data(trial, {"read": 1})
    whole = int(b["steps"]) * _cost(large)
    if trial.arm.settings["from"] == "scratch":
        model, spent = _train(trial, data, large), whole
    else:
        first = max(1, round(0.25 * whole / _cost(small)))
        second = max(1, int(b["steps"]) // 4)
        spent = first * _cost(small) + second * _cost(large)
        with tempfile.TemporaryDirectory(prefix="chiasm-rig-") as folder:
            path = f"{folder}/vision.safetensors"
            state = _train(trial, data, small, first).state_dict()
            save_file({n: t.contiguous() for n, t in state.items() if n.startswith("embedder.vision.")}, path)
            model = _train(trial, data, replace(large, start=path), second)
    held = _held_out(trial, data)
    hits = token_hits(model, held, "read", count=int(b["count"]), only=DIGITS)
    return {"text": hits, "compute": spent / whole}


def _cost(model: RigModel) -> float:
    """Compute of one sample of one tile and about 24 rows, up to a constant factor."""
    c = model.config
    encoder = c.vision.layers * 12 * c.vision.hidden_size**2
    decoder = c.language.layers * (4 + 9) * c.language.hidden_size**2
    return float(encoder * (1 + c.vision.tokens) + decoder * 24)


def probes(trial: Trial) -> dict[str, float]:
    """A linear and an attention-pool probe on an encoder trained to classify, before or after next-token training."""
    b, spec = trial.budget, _model(trial)
    torch.manual_seed(derive_seed(trial.seed, "probe"))
    vision = spec.build().embedder.vision  # type: ignore[union-attr]
    glyphs = RigData(tasks={"glyph": 1}, seed=trial.seed)
    tiles, labels = _pictures(glyphs, int(b["probe_pictures"]))
    head = nn.Linear(spec.vision_width, 10)
    _fit(
        [vision, head],
        lambda n: head(_features(vision, tiles[n]).mean(1)),
        labels,
        int(b["probe_steps"]),
        trial.seed,
    )
    if trial.arm.settings["trained"]:
        with tempfile.TemporaryDirectory(prefix="chiasm-rig-") as folder:
            path = f"{folder}/vision.safetensors"
            state = {f"embedder.vision.{n}": t.contiguous() for n, t in vision.state_dict().items()}  # type: ignore[union-attr]
            save_file(state, path)
            model = _train(trial, _data(trial, {"long": 1}), replace(spec, start=path))
        vision = model.embedder.vision
    held, truth = _pictures(_held_out(trial, glyphs), int(b["count"]))
    with torch.no_grad():
        seen, unseen = _features(vision, tiles), _features(vision, held)
    scores = {}
    for name, probe in (("linear", _Linear(spec.vision_width)), ("attention", _Attention(spec.vision_width))):
        _fit([probe], lambda n, probe=probe: probe(seen[n]), labels, int(b["probe_steps"]), trial.seed)
        with torch.no_grad():
            scores[name] = float((probe(unseen).argmax(-1) == truth).float().mean())
    return scores | {"gap": scores["attention"] - scores["linear"]}


class _Linear(nn.Module):
    """Mean of the patches, normalised, then one linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 10)

    def forward(self, x_NPC: Tensor) -> Tensor:
        return self.out(self.norm(x_NPC.mean(1)))


class _Attention(nn.Module):
    """One learned query attends to the patches, then one linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 10)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.attend = nn.MultiheadAttention(width, max(1, width // 32), batch_first=True)

    def forward(self, x_NPC: Tensor) -> Tensor:
        x_NPC = self.norm(x_NPC)
        pooled, _ = self.attend(self.query.expand(len(x_NPC), -1, -1), x_NPC, x_NPC, need_weights=False)
        return self.out(pooled[:, 0])


def _pictures(data: RigData, count: int) -> tuple[Tensor, Tensor]:
    """(N, 3, S, S) tiles and the digit of each."""
    source = RigSource(data)
    tiles = torch.cat([source.row("glyph", i).media["image"].data for i in range(count)])
    truth = [int(RigSource(data).item("glyph", i).answer) for i in range(count)]
    return tiles, torch.tensor(truth)


def _features(vision: Any, tiles_N3SS: Tensor) -> Tensor:
    """Patches without the class token."""
    return vision(normalize(tiles_N3SS, RigData(tasks={"glyph": 1}).spec.tiles))[:, 1:]


def _fit(modules: list[Any], logits: Any, labels: Tensor, steps: int, seed: int) -> None:
    """AdamW on the cross-entropy of ``logits(indices)``, batches of 64."""
    random = torch.Generator().manual_seed(derive_seed(seed, "probe", "order"))
    optimizer = torch.optim.AdamW([p for m in modules for p in m.parameters()], lr=2e-3, weight_decay=0.01)
    for step in range(steps):
        chosen = torch.randint(len(labels), (64,), generator=random)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (steps - step) / (0.5 * steps))
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits(chosen), labels[chosen]).backward()
        optimizer.step()
