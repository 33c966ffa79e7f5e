"""A conversation planned on paper: memory, FLOPs and time, line by line, each with the formula that gave it.

`chiasm.model.cost` has the formulas; here they are filled in for one job in the order in which it runs: tiles are
encoded picture by picture and frame by frame (as `ChatModel` does, which remembers each), projected, the prompts of all
conversations are read as one row, then every step writes a token for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chiasm.errors import ConfigError
from chiasm.model import cost
from chiasm.model.cost import Machine

if TYPE_CHECKING:
    from chiasm.parts.language.config import LanguageConfig
    from chiasm.parts.vision.internvit import InternViTConfig

__all__ = ["Job", "Line", "flops_lines", "memory_lines", "time_lines"]


@dataclass(frozen=True, slots=True)
class Line:
    """A figure and how it comes about, names and numbers in one."""

    value: float
    formula: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`batch` like conversations with a model, each about pictures and frames of its own.

    Attributes:
        language: the decoder. vision: the encoder; None for a language model alone, which has none of what follows.
        projector_inputs: width after unshuffling. tokens_per_tile: rows of a tile. select_layer: encoder layer read.
        pictures: tiles of each picture of a conversation. frames: tiles of all frames of all its videos.
        seen: rows of the language model that stand for them; None: tokens_per_tile each.
        prompt: tokens of a conversation. new: tokens of its answer.
        batch: conversations at once.
        dtype: of weights, activations and cache.
        used: leading rows of the output matrix that make logits; None for all.
    """

    language: LanguageConfig
    vision: InternViTConfig | None = None
    projector_inputs: int = 0
    tokens_per_tile: int = 0
    select_layer: int = -1
    pictures: tuple[int, ...] = ()
    frames: int = 0
    seen: int | None = None
    prompt: int
    new: int
    batch: int = 1
    dtype: str = "bfloat16"
    used: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in cost.BYTES:
            raise ConfigError(f"dtype {self.dtype!r} is not known: use {', '.join(cost.BYTES)}")
        if min(self.prompt, self.new, self.batch) < 1:
            raise ConfigError("a job needs a prompt, an answer and a batch of at least 1")
        if self.vision is None and self.tiles:
            raise ConfigError("a language model alone is shown no tiles")

    @property
    def element(self) -> int:
        """Bytes of a number."""
        return cost.BYTES[self.dtype]

    @property
    def tiles(self) -> int:
        """Tiles of pictures and frames of one conversation."""
        return sum(self.pictures) + self.frames

    @property
    def together(self) -> int:
        """Most tiles encoded in one call."""
        return min(cost.CHUNK, max((*self.pictures, 1 if self.frames else 0), default=0))

    @property
    def calls(self) -> int:
        """Calls of the encoder, all conversations."""
        return self.batch * (sum(-(-n // cost.CHUNK) for n in self.pictures) + self.frames)

    @property
    def rows(self) -> int:
        """Rows of the language model that are seen instead of read, one conversation."""
        return self.tiles * self.tokens_per_tile if self.seen is None else self.seen

    @property
    def logit_rows(self) -> int:
        """Rows of the output matrix that are computed."""
        return self.language.vocab_size if self.used is None else self.used

    def parameters(self) -> dict[str, int]:
        """Parameters by part."""
        c, found = self.language, {}
        if self.vision is not None:
            found["vision"] = cost.vision_parameters(self.vision)
            found["projector"] = cost.projector_parameters(self.projector_inputs, c.hidden_size)
        parts = cost.language_parameters(c)
        return found | {f"language {part}": count for part, count in parts.items() if count}


def memory_lines(job: Job) -> dict[str, Line]:
    """Bytes: weights by part, cache at the end of the answer, activations at their peaks, logits; the sum last."""
    c, e, B = job.language, job.element, job.batch
    lines = {
        f"weights: {part}": Line(count * e, f"parameters {count:,} · bytes {e}")
        for part, count in job.parameters().items()
    }
    rows = cost.cache_rows(job.prompt, job.new)
    lines["KV cache"] = Line(
        cost.cache_bytes(c, rows, B, element=e),
        f"2 · layers {c.layers} · KV heads {c.kv_heads} · head width {c.head_dim} · rows allocated {rows:,}"
        f"{_times(B, 'batch')} · bytes {e}",
    )
    vision = 0
    if job.vision is not None and job.tiles:
        v, n = job.vision, job.together
        features = B * job.rows * c.hidden_size * e
        lines["features kept"] = Line(
            features,
            f"visual tokens {job.rows:,} · width {c.hidden_size}{_times(B, 'batch')} · bytes {e}",
        )
        vision = cost.vision_activations(v, n, element=e)
        inner = f"4 · {v.hidden_size} + 2 · {v.intermediate_size}"
        lines["activations: vision, peak"] = Line(
            vision,
            f"tiles at once {n} · tokens {1 + v.tokens} · max({inner}, {10 if v.qk_norm else 8} · {v.hidden_size}) "
            f"· bytes {e}",
        )
    language = cost.language_activations(c, B * job.prompt, element=e)
    lines["activations: prefill, peak"] = Line(
        language,
        f"prompt {job.prompt:,}{_times(B, 'batch')} · (4 · {c.hidden_size} + 4 · {c.intermediate_size}) · bytes {e}",
    )
    lines["logits"] = Line(
        B * job.logit_rows * (e + (4 if e < 4 else 0)),
        f"rows {B} · words {job.logit_rows:,} · bytes {f'({e} + 4)' if e < 4 else e}",
    )
    idle = min(vision, language)
    total = sum(line.value for line in lines.values()) - idle
    lines["total"] = Line(
        total, "the sum, of the two activations the larger" if vision else "the sum of all lines"
    )
    return lines


def flops_lines(job: Job) -> dict[str, Line]:
    """FLOPs of the whole batch by stage; causal attention counts the visible pairs. The sum last."""
    c, B, lines = job.language, job.batch, {}
    if job.vision is not None and job.tiles:
        v, rows = job.vision, 1 + job.vision.tokens
        depth = job.select_layer % (1 + v.layers)
        lines["vision encoder"] = Line(
            B * cost.vision_flops(v, job.tiles, select_layer=job.select_layer),
            f"tiles {B * job.tiles} · (2·{v.tokens}·{v.hidden_size}·{v.channels}·{v.patch_size}² + layers {depth} · "
            f"(8·{rows}·{v.hidden_size}² + 4·{rows}·{v.hidden_size}·{v.intermediate_size} + "
            f"4·{rows}²·{v.hidden_size}))",
        )
        lines["projector"] = Line(
            cost.projector_flops(job.projector_inputs, c.hidden_size, B * job.rows),
            f"visual tokens {B * job.rows:,} · 2 · ({job.projector_inputs}·{c.hidden_size} + {c.hidden_size}²)",
        )
    width, q, kv = c.hidden_size, c.heads * c.head_dim, c.kv_heads * c.head_dim
    matrices = width * (q + 2 * kv) + q * width + 3 * width * c.intermediate_size
    head = f"2 · {width} · words {job.logit_rows:,}"
    lines["prefill"] = Line(
        B * (cost.language_flops(c, job.prompt) + cost.head_flops(c, used=job.used)),
        f"{_first(B)}(layers {c.layers} · (T·2·{matrices:,} + 4·{q}·T·(T+1)/2) + {head}), T = {job.prompt:,}",
    )
    lines["decode"] = Line(
        B * cost.decode_flops(c, job.prompt, job.new, used=job.used),
        f"{_first(B)}(layers {c.layers} · (n·2·{matrices:,} + 4·{q}·(n·{job.prompt} + n·(n+1)/2)) + n · {head}), "
        f"n = {job.new - 1:,} steps",
    )
    lines["total"] = Line(sum(line.value for line in lines.values()), "the sum")
    return lines


def time_lines(job: Job, machine: Machine) -> dict[str, Line]:
    """Seconds by stage, then to the first token and in all."""
    c, e, B = job.language, job.element, job.batch
    flops, parameters = flops_lines(job), job.parameters()
    row = cost.cache_bytes(c, 1, B, element=e)
    matrix = e * (parameters["language layers"] + job.logit_rows * c.hidden_size)
    steps = job.new - 1
    read = {
        "vision encoder": job.calls * e * parameters.get("vision", 0),
        "projector": job.calls * e * parameters.get("projector", 0),
        "prefill": matrix + row * job.prompt,
        "decode": steps * matrix + row * (steps * job.prompt + steps * (steps + 1) // 2),
    }
    lines = {}
    for stage in [name for name in flops if name != "total"]:
        compute, moved = machine.seconds(flops[stage].value, 0), machine.seconds(0, read[stage])
        lines[stage] = Line(
            max(compute, moved),
            f"max({flops[stage].value:.3g} FLOP / ({machine.flops:.3g} · {machine.flops_share:g}), "
            f"{read[stage]:.3g} B / ({machine.bandwidth:.3g} · {machine.bandwidth_share:g})): "
            f"{'computing' if compute >= moved else 'reading weights and cache'}",
        )
    total = sum(line.value for line in lines.values())
    lines["first token after"] = Line(total - lines["decode"].value, "all but decode")
    lines["total"] = Line(total, "the sum")
    return lines


def _times(count: int, name: str) -> str:
    return f" · {name} {count}" if count > 1 else ""


def _first(count: int) -> str:
    return f"batch {count} · " if count > 1 else ""
