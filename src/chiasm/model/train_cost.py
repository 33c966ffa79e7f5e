"""What a training step costs, on paper: the step itself, its parameters, FLOPs and time.

Pure functions of configs and counts, as in `chiasm.model.cost`, whose conventions hold here too; memory is in
`chiasm.model.train_memory`. The tests hold FLOPs against torch's `FlopCounterMode`, forward and backward.

Legend: T rows of a micro-batch, N tiles, S rows with a label.
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
    "adapter_parameters",
    "flops_lines",
    "nominal_tokens",
    "over",
    "parameter_lines",
    "step_seconds",
    "times",
    "widths",
]

LINEAR = frozenset({"qkv", "out", "gate_up", "down"})
"""Linear layers of a decoder block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learns:
    """Which parts are trained; `rank` > 0 puts adapters on linear layers of the decoder in the place of `layers`."""

    vision: bool = True
    projector: bool = True
    words: bool = True
    layers: bool = True
    head: bool = True
    rank: int = 0
    adapted: frozenset[str] = LINEAR
    """Which linear layers of a block have an adapter."""
    dropout: bool = False
    """Whether the adapters' inputs are dropped out, which keeps a mask."""

    def __post_init__(self) -> None:
        if not self.adapted <= LINEAR:
            raise ConfigError(
                f"adapted names {sorted(self.adapted)}: a block has {', '.join(sorted(LINEAR))}"
            )
        if self.layers and self.rank:
            raise ConfigError(
                "a decoder is trained whole or by adapters, not both: set layers=False or rank=0"
            )

    def keeps(self, linear: str) -> bool:
        """Whether the input of a linear layer of the decoder is kept."""
        return self.layers or (self.rank > 0 and linear in self.adapted)

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
    recompute_vision: bool = False
    recompute_language: bool = False
    gpus: int = 1
    shard: Literal["full", "none"] = "none"
    foreach: bool = False

    def __post_init__(self) -> None:
        if (
            min(self.rows, self.documents, self.micro_batches, self.gpus) < 1
            or min(self.tiles, self.learned) < 0
        ):
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
        return self.narrow if self.sharded else max(self.stored(self.learns.words), self.narrow)

    @property
    def vision_residual(self) -> int:
        """Of the tokens that encoder layers add to: as its weights are stored."""
        return self.narrow if self.sharded else self.stored(self.learns.vision)

    @property
    def sharded(self) -> bool:
        """Whether weights are divided among devices, and gathered as `compute` says."""
        return self.shard == "full" and self.gpus > 1

    @property
    def together(self) -> int:
        """Tiles that are encoded in one call; sharded encoders take all, for processes must call them equally often."""
        return self.tiles if self.sharded else min(CHUNK, self.tiles)

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
        return self.gpus if self.sharded else 1

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
            out["adapters"] = (adapter_parameters(c, learns.rank, learns.adapted), True)
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


def adapter_parameters(c: LanguageConfig, rank: int, adapted: frozenset[str] = LINEAR) -> int:
    """LoRA on linear layers of the decoder, one adapter for each of q, k, v, out, gate, up, down: Σ r · (in + out)."""
    width, q, kv, inner = widths(c)
    pairs = {
        "qkv": ((width, q), (width, kv), (width, kv)),
        "out": ((q, width),),
        "gate_up": ((width, inner), (width, inner)),
        "down": ((inner, width),),
    }
    return c.layers * rank * sum(a + b for name in adapted for a, b in pairs[name])


def parameter_lines(job: TrainJob) -> dict[str, Line]:
    """Parameters by part; the formula says whether they learn."""
    lines = {
        name: Line(count, "trained" if learns else f"frozen, stored in {job.frozen}")
        for name, (count, learns) in job.parts().items()
    }
    total = sum(line.value for line in lines.values())
    lines["total"] = Line(total, f"trained {job.trained:,}, frozen {int(total) - job.trained:,}")
    return lines


def widths(c: LanguageConfig) -> tuple[int, int, int, int]:
    """Widths of rows, queries, keys and inner rows."""
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

    def add(name: str, once: float, passes: float, how: str) -> None:
        forward[name] = once
        lines[name] = Line(M * once * passes, f"{times(M)}{how} · {passes:g}")

    if job.vision is not None and job.tiles:
        v = job.vision
        once = cost.vision_flops(v, job.tiles, select_layer=job.select_layer)
        add("vision encoder", once, 3 if learns.vision else 1, f"tiles {job.tiles} · {once / job.tiles:.4g}")
        once = cost.projector_flops(job.projector_inputs, c.hidden_size, job.seen)
        passes = 1 + (learns.projector or learns.vision) + learns.projector
        add("projector", once, passes, f"visual tokens {job.seen:,} · {once / job.seen:.4g}")
    width, q, kv, inner = widths(c)
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
        count = adapter_parameters(c, learns.rank, learns.adapted)
        add("adapters", 2 * job.rows * count, 3, f"rows {job.rows:,} · 2 · {count:,}")
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
        again += (
            forward["decoder: linear layers"] + forward["decoder: attention"] + forward.get("adapters", 0.0)
        )
    if again:
        lines["recomputed"] = Line(M * again, f"{times(M)}once more forward {again:.4g}")
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


def times(count: int) -> str:
    """How micro-batches begin a formula."""
    return f"micro-batches {count:,} · " if count > 1 else ""


def over(count: int) -> str:
    """How a division ends a formula."""
    return f" / {count}" if count > 1 else ""
