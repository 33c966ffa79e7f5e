"""What a training step costs, on paper: memory by kind and at its peak, FLOPs, days.

Pure functions of configs and counts, as in `chiasm.model.cost`, whose conventions hold here too. The tests and
`benchmarks/plan_training.py` hold the peak against the storages that are alive in real steps.

What is kept for the backward pass follows the modules of this package, tensor by tensor:

- a norm keeps its input, and the normalised rows where its gain is trained; a linear layer keeps its input where it (or
  an adapter on it) is trained, and its weight; attention keeps q, k, v and its result, and never T² scores (the fused
  kernels keep one number a row and head);
- a part without anything trained in or below it keeps nothing; a frozen part above something trained passes gradients
  on and keeps what that needs, which is less than when it is trained;
- recomputed ("checkpointed") layers keep their input alone, and one layer at a time the rest;
- the loss keeps no logits: a chunk of rows x vocabulary exists at a time, beside the head's gradient in float32.

Autocast (`compute="bfloat16"`): trained weights and the residual stream are float32, linear layers compute in bfloat16
and keep bfloat16 copies of their weights and inputs. Frozen parts may be stored in bfloat16; then theirs is too.

The peak is the largest of a few moments, between which memory only grows or only shrinks: the loss, its backward, the
first and the last decoder layer of the backward pass, the word table's gradient, the encoder's first and last layer of
the backward pass, the optimiser.

Sharded over N devices (FSDP2), weights, gradients and optimiser state are divided by N; what is gathered is two units (a
layer in use, the next one on its way) and, while it is used, the word table or head. Not counted: allocator
fragmentation, communication buffers, the CUDA context.

Legend: T rows of a micro-batch, N tiles, S rows with a label, C width, I inner width, q/k widths of queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from chiasm.errors import ConfigError
from chiasm.model import cost
from chiasm.model.cost import BYTES, CHUNK
from chiasm.model.plan import Line

if TYPE_CHECKING:
    from chiasm.parts.language.config import LanguageConfig
    from chiasm.parts.vision.internvit import InternViTConfig

__all__ = [
    "Learns",
    "TrainJob",
    "flops_lines",
    "memory_lines",
    "moment_lines",
    "nominal_tokens",
    "parameter_lines",
    "step_seconds",
]

LOSS_CHUNK = 1024
"""Rows whose logits exist at the same time (`chiasm.nn.losses.cross_entropy`)."""
_STATES = 8
"""AdamW: two float32 moments of every trained number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learns:
    """Which parts are trained; `rank` > 0 puts adapters on every linear layer of the decoder instead of `layers`."""

    vision: bool = True
    projector: bool = True
    words: bool = True
    layers: bool = True
    head: bool = True
    rank: int = 0
    dropout: bool = False
    """Whether the adapters' inputs are dropped out, which keeps a mask."""

    def __post_init__(self) -> None:
        if self.layers and self.rank:
            raise ConfigError("a decoder is trained whole or by adapters, not both: set layers=False or rank=0")

    @property
    def enters(self) -> bool:
        """Whether the rows that the decoder reads need a gradient."""
        return self.vision or self.projector or self.words

    @property
    def passes(self) -> bool:
        """Whether gradients pass through the decoder."""
        return self.enters or self.layers or self.rank > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """One optimiser step.

    Attributes:
        language, vision, projector_inputs, tokens_per_tile, select_layer: the model; vision None for words alone.
        rows: T of one micro-batch. tiles: N that it shows. learned: S, rows with a label.
        documents: packed documents of a micro-batch (attention sees each alone).
        micro_batches: of a step, over all devices.
        learns: what is trained.
        compute: "float32", or "bfloat16" for autocast.
        frozen: dtype in which parts that are not trained are stored.
        drop_path: whether the encoder drops paths (which keeps one more tensor a branch).
        recompute_vision, recompute_language: activation checkpointing of the towers.
        gpus: devices; each computes micro_batches / gpus of a step, one after the other.
        shard: "full" divides weights, gradients and optimiser state by the devices, "none" copies them.
        foreach: the optimiser updates all tensors in one call, with a temporary as large as all of them (CUDA's
            default); else one after the other.
    """

    language: LanguageConfig
    vision: InternViTConfig | None = None
    projector_inputs: int = 0
    tokens_per_tile: int = 0
    select_layer: int = -1
    rows: int
    tiles: int = 0
    learned: int
    documents: int = 1
    micro_batches: int = 1
    learns: Learns
    compute: Literal["float32", "bfloat16"] = "float32"
    frozen: str = "float32"
    drop_path: bool = False
    recompute_vision: bool = False
    recompute_language: bool = False
    gpus: int = 1
    shard: Literal["full", "none"] = "none"
    foreach: bool = False

    def __post_init__(self) -> None:
        if min(self.rows, self.documents, self.micro_batches, self.gpus) < 1 or min(self.tiles, self.learned) < 0:
            raise ConfigError("a training step needs at least one row, document, micro-batch and device")
        if self.micro_batches % self.gpus:
            raise ConfigError(
                f"{self.micro_batches} micro-batches of a step do not divide among {self.gpus} devices: "
                f"take a divisor of {self.micro_batches}"
            )
        if self.tiles * self.tokens_per_tile > self.rows:
            raise ConfigError(
                f"{self.tiles} tiles of {self.tokens_per_tile} tokens are more than the {self.rows:,} rows: "
                "lower the tiles or raise the tokens of a pack"
            )
        if self.frozen not in BYTES:
            raise ConfigError(f"dtype {self.frozen!r} is not known: use {', '.join(BYTES)}")
        if self.vision is None and self.tiles:
            raise ConfigError("a language model alone is shown no tiles")

    # --- bytes of one number ---

    @property
    def narrow(self) -> int:
        """Of what linear layers compute."""
        return BYTES[self.compute]

    def stored(self, trained: bool) -> int:
        """Of a weight."""
        return 4 if trained else BYTES[self.frozen]

    @property
    def residual(self) -> int:
        """Of the rows that decoder layers add to: as the word table is stored."""
        return max(self.stored(self.learns.words), 2 if self.compute == "bfloat16" else 4)

    @property
    def vision_residual(self) -> int:
        """Of the tokens that encoder layers add to: as its weights are stored."""
        return self.stored(self.learns.vision)

    @property
    def depth(self) -> int:
        """Encoder layers that run."""
        return 0 if self.vision is None else self.select_layer % (1 + self.vision.layers)

    @property
    def tokens(self) -> int:
        """Encoder rows of all tiles."""
        return 0 if self.vision is None else self.tiles * (1 + self.vision.tokens)

    @property
    def seen(self) -> int:
        """Decoder rows that stand for tiles."""
        return self.tiles * self.tokens_per_tile

    @property
    def turns(self) -> int:
        """Micro-batches of a step on each device."""
        return self.micro_batches // self.gpus

    @property
    def divided(self) -> int:
        """By how much weights, gradients and states are divided."""
        return self.gpus if self.shard == "full" else 1

    def parts(self) -> dict[str, tuple[int, bool]]:
        """Part -> (parameters, trained)."""
        c, learns, out = self.language, self.learns, {}
        if self.vision is not None:
            out["vision"] = (cost.vision_parameters(self.vision), learns.vision)
            count = cost.projector_parameters(self.projector_inputs, c.hidden_size)
            out["projector"] = (count, learns.projector)
        counts = cost.language_parameters(c)
        out["words"] = (counts["words"], learns.words)
        out["layers"] = (counts["layers"], learns.layers)
        if counts["head"]:
            out["head"] = (counts["head"], learns.head)
        if learns.rank:
            out["adapters"] = (adapter_parameters(c, learns.rank), True)
        return out

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return sum(count for count, learns in self.parts().values() if learns)

    @property
    def table(self) -> int:
        """Numbers of the word table, and of the head."""
        return self.language.vocab_size * self.language.hidden_size

    @property
    def head_learns(self) -> bool:
        """Whether the output matrix has a gradient; a tied one is the word table."""
        return self.learns.words if self.language.tie_words else self.learns.head


# Parameters ------------------------------------------------------------------------------------------------------


def adapter_parameters(c: LanguageConfig, rank: int) -> int:
    """LoRA on every linear layer of the decoder, one adapter for each of q, k, v, out, gate, up, down: Σ r · (in + out)."""
    width, q, kv, inner = _widths(c)
    pairs = ((width, q), (width, kv), (width, kv), (q, width), (width, inner), (width, inner), (inner, width))
    return c.layers * rank * sum(a + b for a, b in pairs)


def parameter_lines(job: TrainJob) -> dict[str, Line]:
    """Parameters by part; the formula says whether they learn."""
    lines = {
        name: Line(count, "trained" if learns else f"frozen, stored in {job.frozen}")
        for name, (count, learns) in job.parts().items()
    }
    total = sum(line.value for line in lines.values())
    lines["total"] = Line(total, f"trained {job.trained:,}, frozen {int(total) - job.trained:,}")
    return lines


def _widths(c: LanguageConfig) -> tuple[int, int, int, int]:
    return c.hidden_size, c.heads * c.head_dim, c.kv_heads * c.head_dim, c.intermediate_size


# FLOPs -----------------------------------------------------------------------------------------------------------


def flops_lines(job: TrainJob) -> dict[str, Line]:
    """FLOPs of one optimiser step over all devices, by stage.

    A product that runs forward once runs backward once for its input where a gradient must pass and once more where its
    weight is trained. Attention has no weights: both of its inputs count where a gradient passes. Recomputed layers run
    forward again; that is a line of its own, for MFU does not count it.
    """
    c, learns, M = job.language, job.learns, job.micro_batches
    forward: dict[str, float] = {}
    lines: dict[str, Line] = {}

    def add(name: str, once: float, times: float, how: str) -> None:
        forward[name] = once
        lines[name] = Line(M * once * times, f"{_times(M)}{how} · {times:g}")

    if job.vision is not None and job.tiles:
        v = job.vision
        once = cost.vision_flops(v, job.tiles, select_layer=job.select_layer)
        add("vision encoder", once, 3 if learns.vision else 1, f"tiles {job.tiles} · {once / job.tiles:.4g}")
        once = cost.projector_flops(job.projector_inputs, c.hidden_size, job.seen)
        times = 1 + learns.projector + learns.vision
        add("projector", once, times, f"visual tokens {job.seen:,} · {once / job.seen:.4g}")
    width, q, kv, inner = _widths(c)
    matrices = c.layers * job.rows * 2 * (width * (q + 2 * kv) + q * width + 3 * width * inner)
    length = job.rows / job.documents
    scores = c.layers * 4 * q * job.rows * (length + 1) / 2
    add(
        "decoder: linear layers",
        matrices,
        1 + learns.passes + learns.layers,
        f"layers {c.layers} · rows {job.rows:,} · 2 · {matrices // (2 * c.layers * job.rows):,}",
    )
    add(
        "decoder: attention",
        scores,
        1 + 2 * learns.passes,
        f"layers {c.layers} · 4 · {q} · rows {job.rows:,} · ({length:,.0f} + 1) / 2",
    )
    if learns.rank:
        once = 2 * job.rows * adapter_parameters(c, learns.rank)
        add("adapters", once, 3, f"rows {job.rows:,} · 2 · {adapter_parameters(c, learns.rank):,}")
    once = cost.head_flops(c, job.learned)
    add(
        "head",
        once,
        1 + learns.passes + job.head_learns,
        f"learned rows {job.learned:,} · 2 · {width} · {c.vocab_size:,}",
    )
    model = sum(line.value for line in lines.values())
    lines["model"] = Line(model, "the sum: forward, and backward where something learns")
    again = 0.0
    if job.recompute_vision and learns.vision:
        again += forward.get("vision encoder", 0.0)
    if job.recompute_language and learns.passes:
        again += forward["decoder: linear layers"] + forward["decoder: attention"] + forward.get("adapters", 0.0)
    if again:
        lines["recomputed"] = Line(M * again, f"{_times(M)}once more forward {again:.4g}")
    lines["total"] = Line(model + M * again, "what is computed")
    return lines


def step_seconds(job: TrainJob, flops: float, share: float) -> float:
    """Time of a step: all that is computed / (devices · FLOP/s of one · share of them that is reached)."""
    return flops_lines(job)["total"].value / (job.gpus * flops * share)


def nominal_tokens(steps: int, batch: int, context: int) -> float:
    """Slots of a run in the unit of the InternVL 2.5 report: steps · packs · rows of a pack / 2^20, in millions.

    Its "44B tokens" are 5,500 · 512 · 16,384 / 2^20 · 10^6: padding included, and counted in units of 2^20.
    """
    return steps * batch * context / 2**20 * 1e6


# Kept for the backward pass --------------------------------------------------------------------------------------


def _decoder_kept(job: TrainJob) -> tuple[float, str]:
    """Bytes a row that one decoder layer keeps beside its own input, and how."""
    c, learns = job.language, job.learns
    if not learns.passes:
        return 0.0, "nothing"
    width, q, kv, inner = _widths(c)
    wide, e = job.residual, job.narrow
    inputs = learns.layers or learns.rank > 0
    # Between the two halves the residual; q, k turned; qkv, of which v is a part; the result and a number a head.
    kept = wide * width + e * (q + kv) + e * (q + 2 * kv) + e * q + 4 * c.heads
    if job.documents > 1:
        kept += e * q * inputs  # documents are attended one by one and joined
    kept += e * (2 * inner + inner)  # gate|up, silu(gate)
    how = f"{wide}·{width} + {e}·({q}+{kv}) + {e}·({q}+2·{kv}) + {e}·{q} + 4·{c.heads} + {e}·3·{inner}"
    if inputs:  # both norms' results, and the product
        kept += e * (2 * width + inner)
        how += f" + {e}·(2·{width} + {inner})"
    if learns.layers:  # both norms' normalised rows
        kept += wide * 2 * width
        how += f" + {wide}·2·{width}"
    if learns.rank:
        low = 4 * 7 * learns.rank
        kept += low
        how += f" + 4·7·{learns.rank}"
        if learns.dropout:
            # What the mask left over stands for the input; the mask is bytes on CUDA, floats on a CPU.
            kept += (1 if job.foreach else 4) * (2 * width + q + inner)
            how += f" + masks {(1 if job.foreach else 4)}·{2 * width + q + inner}"
    if c.qk_norm and learns.layers:
        kept += e * (q + kv)
        how += f" + {e}·({q}+{kv})"
    return kept, how


def _vision_kept(job: TrainJob) -> float:
    """Bytes a token that one encoder layer keeps beside its own input."""
    v = job.vision
    if v is None or not job.learns.vision:
        return 0.0
    wide, e, width, inner = job.vision_residual, job.narrow, v.hidden_size, v.intermediate_size
    kept = wide * width  # between the halves
    kept += e * (2 * width + 3 * width + width + 2 * width + 2 * inner)  # h, qkv, result, branches, fc1, GELU
    kept += 4 * v.heads
    if v.norm == "rms_norm":
        kept += wide * 2 * width
    if v.qk_norm:
        kept += e * 4 * width
    return kept


def _projector_kept(job: TrainJob) -> float:
    """Bytes that the projector keeps."""
    learns, c = job.learns, job.language
    if not (learns.projector or learns.vision) or not job.tiles:
        return 0.0
    wide, e = job.stored(learns.projector), job.narrow
    kept = wide * job.projector_inputs + e * c.hidden_size  # the norm's input; before the GELU
    if learns.projector:
        kept += e * job.projector_inputs + e * c.hidden_size
    return job.seen * kept


def _pixels(job: TrainJob) -> int:
    v = job.vision
    if v is None:
        return 0
    side = v.image_size
    return job.tiles * v.channels * side * side


@dataclass(frozen=True, slots=True)
class _Tower:
    """What a stack of layers keeps: all of it, and one layer's own while it is recomputed or read backward."""

    all: float
    one: float
    formula: str


def _decoder_tower(job: TrainJob) -> _Tower:
    c, wide = job.language, job.residual
    kept, how = _decoder_kept(job)
    entry = wide * c.hidden_size if job.learns.passes else 0
    if job.recompute_language:
        total = job.rows * c.layers * entry
        formula = f"rows {job.rows:,} · layers {c.layers} · {wide}·{c.hidden_size} (recomputed)"
    else:
        total = job.rows * c.layers * (entry + kept)
        formula = f"rows {job.rows:,} · layers {c.layers} · ({wide}·{c.hidden_size} + {how})"
    return _Tower(total, job.rows * kept, formula if total else "nothing learns in or below it")


def _vision_tower(job: TrainJob) -> _Tower:
    v = job.vision
    if v is None or not job.tiles or not job.learns.vision:
        return _Tower(0.0, 0.0, "nothing learns in it")
    kept, entry = _vision_kept(job), job.vision_residual * v.hidden_size
    each = entry if job.recompute_vision else entry + kept
    formula = f"tokens {job.tokens:,} · layers {job.depth} · {each:,.0f} + pixels {_pixels(job):,} · {job.narrow}"
    together = job.tokens * min(CHUNK, job.tiles) / job.tiles  # so many are encoded in one call
    return _Tower(job.tokens * job.depth * each + job.narrow * _pixels(job), together * kept, formula)


def _casts(job: TrainJob) -> dict[str, float]:
    """bfloat16 copies of float32 matrices that autocast's linear layers keep, by tower; sharded ones are gathered so."""
    if job.compute == "float32" or job.shard == "full" and job.gpus > 1:
        return {"vision": 0.0, "layers": 0.0}
    parts, learns = job.parts(), job.learns
    vision = parts.get("vision", (0, False))[0] + parts.get("projector", (0, False))[0]
    return {
        "vision": 2.0 * vision * (learns.vision and not job.recompute_vision),
        "layers": 2.0
        * parts["layers"][0]
        * (learns.passes and not job.recompute_language and job.stored(learns.layers) == 4),
    }


# Memory ----------------------------------------------------------------------------------------------------------


def memory_lines(job: TrainJob) -> dict[str, Line]:
    """Bytes on one device by kind, and the largest moment (`moment_lines`) as the last line."""
    n, lines = job.divided, {}
    parts = job.parts()
    for name, (count, learns) in parts.items():
        size = job.stored(learns)
        lines[f"weights: {name}"] = Line(count * size / n, f"parameters {count:,} · bytes {size}{_over(n)}")
    lines["gradients"] = Line(4 * job.trained / n, f"trained {job.trained:,} · bytes 4{_over(n)}")
    lines["optimiser"] = Line(_STATES * job.trained / n, f"trained {job.trained:,} · two moments of 4{_over(n)}")
    gathered, how = _gathered(job)
    if gathered:
        lines["gathered"] = Line(gathered, how)
    vision, decoder = _vision_tower(job), _decoder_tower(job)
    if job.tiles:
        lines["kept: vision encoder"] = Line(vision.all, vision.formula)
        lines["kept: projector"] = Line(_projector_kept(job), f"visual tokens {job.seen:,} · by what learns")
    lines["kept: decoder"] = Line(decoder.all, decoder.formula)
    casts = sum(_casts(job).values())
    if casts:
        lines["kept: bfloat16 weights"] = Line(casts, "float32 matrices that linear layers cast · 2")
    lines["loss"] = Line(_loss_bytes(job), _loss_formula(job))
    moments = moment_lines(job)
    worst = max(moments, key=lambda name: moments[name].value)
    lines["peak"] = Line(moments[worst].value, f"{worst}: {moments[worst].formula}")
    return lines


def _gathered(job: TrainJob) -> tuple[float, str]:
    if job.divided == 1:
        return 0.0, ""
    c, e = job.language, job.narrow
    unit = cost.language_parameters(c)["layers"] / c.layers
    return 2 * e * unit + e * job.table, f"bytes {e} · (2 · layer {unit:,.0f} + table {job.table:,})"


def _loss_bytes(job: TrainJob) -> float:
    """Alive while the loss is formed: its rows, their gradient, the head's gradient, a chunk of logits."""
    c, e = job.language, job.narrow
    chunk = min(LOSS_CHUNK, job.learned) * c.vocab_size * (4 if e == 4 else 6)
    # With a head in another dtype than float32 the chunk's share of its gradient is a matrix of its own.
    head = 4 * job.table * job.head_learns
    rows = job.learned * c.hidden_size * (_head_bytes(job) * (1 + job.learns.passes))
    return rows + head + chunk


def _head_bytes(job: TrainJob) -> int:
    return job.stored(job.head_learns)


def _loss_formula(job: TrainJob) -> str:
    c = job.language
    rows = min(LOSS_CHUNK, job.learned)
    how = f"chunk {rows:,} · words {c.vocab_size:,} · {4 if job.narrow == 4 else 6}"
    if job.head_learns:
        how += f" + 4 · head {job.table:,}"
    return how + f" + learned rows {job.learned:,} · {c.hidden_size} · {_head_bytes(job)} · {1 + job.learns.passes}"


def moment_lines(job: TrainJob) -> dict[str, Line]:
    """Bytes alive at the moments of which one is the peak; the parts of each sum are named in its formula."""
    c, learns, parts, n = job.language, job.learns, job.parts(), job.divided
    width, _, _, inner = _widths(c)
    T, e, wide = job.rows, job.narrow, job.residual
    weights = sum(count * job.stored(trained) for count, trained in parts.values()) / n
    states = _STATES * job.trained / n
    base = weights + states + _gathered(job)[0] + _pixels(job)
    g = 4 / n  # bytes of a gradient
    all_gradients = g * job.trained
    earlier = all_gradients if job.turns > 1 else 0.0
    vision, decoder, casts = _vision_tower(job), _decoder_tower(job), _casts(job)
    projector = _projector_kept(job)
    below = vision.all + projector + casts["vision"]
    layers = decoder.all + casts["layers"]
    final = T * width * wide * (learns.passes + learns.layers)  # the final norm's input and normalised rows
    head_gradient = g * job.table * job.head_learns
    layer_gradients = g * sum(parts[p][0] for p in ("layers", "adapters") if p in parts and parts[p][1])
    word_gradient = g * job.table * learns.words
    said = {
        "weights": weights,
        "optimiser": states,
        "gathered": _gathered(job)[0],
        "tiles": float(_pixels(job)),
    }
    out: dict[str, Line] = {}

    def moment(name: str, **more: float) -> None:
        terms = {**said, **more}
        how = " + ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in terms.items() if value)
        out[name] = Line(base + sum(more.values()), how)

    kept = below + layers
    if job.tiles and not learns.vision and job.vision is not None:
        together = min(CHUNK, job.tiles)
        moment(
            "encoding",
            gradients=earlier,
            activations=cost.vision_activations(job.vision, together, element=job.vision_residual)
            + together * 4 * _pixels(job) / job.tiles,
        )
    moment(
        "loss",
        gradients=earlier,
        kept=kept + final + T * width * wide,
        loss=_loss_bytes(job),
    )
    if learns.passes:
        rows = job.learned * width * _head_bytes(job)
        moment(
            "loss, backward",
            gradients=earlier,
            kept=kept + final,
            loss=2 * rows + 2 * 4 * job.table * job.head_learns + T * width * wide,
        )
        again = decoder.one if job.recompute_language else 0.0
        layer = parts["layers"][0] / c.layers
        own = 4 * max(width * inner, 0) * learns.layers
        # Down the SwiGLU: the gradients of its rows, of the product, of silu(gate) and up, less the product.
        freed = learns.layers or learns.rank > 0  # only then was the product kept
        moving = T * (wide * width + (3 - freed) * e * inner) + own
        late = T * (wide * width + e * width) + (4 * 3 * width * inner) * learns.layers
        moment(
            "backward, last layer",
            gradients=max(earlier, head_gradient * (not c.tie_words) + (4 * job.table * job.head_learns) * c.tie_words),
            kept=kept,
            recomputed=again,
            moving=max(moving, late),
        )
        done = layer_gradients + head_gradient
        one = decoder.one if not job.recompute_language else 0.0
        entry = T * width * wide
        left = below + (one if not job.recompute_language else 0.0) + entry
        if learns.layers or learns.rank or learns.words:
            moment(
                "backward, first layer",
                gradients=max(earlier, done - g * layer * learns.layers * 0.5),
                kept=left,
                recomputed=again,
                moving=max(moving, late),
            )
        if learns.words:
            held = 2 if c.tie_words else 0
            moment(
                "backward, words",
                gradients=max(earlier, done),
                kept=below,
                moving=T * width * wide + (1 + held) * word_gradient - (head_gradient if c.tie_words else 0),
            )
        if learns.vision and job.vision is not None and job.tiles:
            v = job.vision
            language = layer_gradients + head_gradient + word_gradient * (not c.tie_words)
            n_gradients = g * parts["projector"][0] * learns.projector
            together = job.tokens * min(CHUNK, job.tiles) / job.tiles
            swap = together * (2 * job.vision_residual * v.hidden_size + e * v.intermediate_size)
            first = vision.one if job.recompute_vision else 0.0
            moment(
                "backward, encoder's last layer",
                gradients=max(earlier, language + n_gradients),
                kept=vision.all + casts["vision"],
                recomputed=first,
                moving=swap,
            )
            moment(
                "backward, encoder's first layer",
                gradients=all_gradients,
                kept=vision.one + job.narrow * _pixels(job),
                moving=swap,
            )
    largest = max((_largest(job)), default=0)
    extra = 4 * job.trained / n if job.foreach else 2 * 4 * largest / n
    moment("optimiser", gradients=all_gradients, moving=extra)
    return out


def _largest(job: TrainJob) -> list[int]:
    """Numbers of the largest trained tensors."""
    c, learns, out = job.language, job.learns, []
    width, q, kv, inner = _widths(c)
    if learns.words or job.head_learns:
        out.append(job.table)
    if learns.layers:
        out.append(max(2 * inner * width, (q + 2 * kv) * width))
    if learns.rank:
        out.append(learns.rank * 2 * max(inner, width))
    if learns.projector and job.tiles:
        out.append(job.projector_inputs * width)
    if learns.vision and job.vision is not None:
        out.append(max(job.vision.intermediate_size, 3 * job.vision.hidden_size) * job.vision.hidden_size)
    return out


def _times(count: int) -> str:
    return f"micro-batches {count:,} · " if count > 1 else ""


def _over(count: int) -> str:
    return f" / {count}" if count > 1 else ""


def _short(value: float) -> str:
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}B"
    return f"{value:.0f} B"
