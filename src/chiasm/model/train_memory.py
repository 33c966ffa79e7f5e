"""The memory of a training step, on paper: what is kept for the backward pass, and the moment at which most is alive.

Formulas for a `chiasm.model.train_cost.TrainJob`, held by the tests and by `benchmarks/plan_training.py` against the
storages that are alive in real steps. What is kept follows the modules of this package, tensor by tensor:

- a norm keeps its input, and the normalised rows where its gain is trained; a linear layer keeps its input where it (or
  an adapter on it) is trained, and its weight; attention keeps q, k, v and its result, and never T² scores (the fused
  kernels keep one number a row and head);
- a part without anything trained in or below it keeps nothing; a frozen part above something trained passes gradients
  on and keeps what that needs, which is less than when it is trained;
- recomputed ("checkpointed") layers keep their input alone, and one layer at a time the rest;
- the loss keeps no logits: a chunk of rows x vocabulary exists at a time, beside the head's gradient in float32.

Autocast (`compute="bfloat16"`): trained weights and the residual stream are float32, linear layers compute in bfloat16
and keep bfloat16 copies of their weights and inputs. Frozen parts may be stored in bfloat16; then theirs is too. The
formulas are those of CUDA's fused norms and attention; on a CPU some steps in bfloat16 keep up to a third more (copies
in norms, and T² scores in the encoder).

The peak is the largest of a few moments, between which memory only grows or only shrinks: the loss, its backward, the
last and the first decoder layer in the backward pass, the word table's gradient, the encoder's last and first layer in
the backward pass, the optimiser.

Sharded over N devices (FSDP2), weights, gradients and optimiser state are divided by N; gathered, in the dtype of
computation, are words, head and projector throughout, two layers (one in use, the next on its way) and one layer's
gradients. The residual stream is then of that dtype too. Not counted: fragmentation, communication buffers, the CUDA
context, the copy of the trained weights that a checkpoint is written from.

Legend: T rows of a micro-batch, N tiles, S rows with a label, C width, I inner width, q/k widths of queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from chiasm.model import cost
from chiasm.model.plan import Line
from chiasm.model.train_cost import TrainJob, over, widths

__all__ = ["memory_lines", "moment_lines"]

LOSS_CHUNK = 1024
"""Rows whose logits exist at the same time (`chiasm.nn.losses.cross_entropy`)."""
STATES = 8
"""AdamW: two float32 moments of every trained number."""


# Kept for the backward pass --------------------------------------------------------------------------------------


def _decoder_kept(job: TrainJob) -> tuple[float, str]:
    """Bytes a row that one decoder layer keeps beside its own input, and how."""
    c, learns = job.language, job.learns
    if not learns.passes:
        return 0.0, "nothing"
    width, q, kv, inner = widths(c)
    wide, e = job.residual, job.narrow
    # Between the two halves the residual; q, k turned; qkv, of which v is a part; the result and a number a head.
    kept = wide * width + e * (q + kv) + e * (q + 2 * kv) + e * q + 4 * c.heads
    if job.documents > 1 and learns.keeps("out"):
        kept += e * q  # documents are attended one by one and joined
    kept += e * (2 * inner + inner)  # gate|up, silu(gate)
    how = f"{wide}·{width} + {e}·({q}+{kv}) + {e}·({q}+2·{kv}) + {e}·{q} + 4·{c.heads} + {e}·3·{inner}"
    # Both norms' results and the product are inputs of linear layers.
    inputs = width * (learns.keeps("qkv") + learns.keeps("gate_up")) + inner * learns.keeps("down")
    if inputs:
        kept += e * inputs
        how += f" + {e}·{inputs}"
    if learns.layers:  # both norms' normalised rows
        kept += wide * 2 * width
        how += f" + {wide}·2·{width}"
    if learns.rank:
        pieces = {"qkv": 3, "out": 1, "gate_up": 2, "down": 1}
        low = sum(pieces[name] for name in learns.adapted)
        kept += 4 * low * learns.rank
        how += f" + 4·{low}·{learns.rank}"
        if learns.dropout:
            # What the mask left over stands for the input; the mask is bytes on CUDA, floats on a CPU.
            masks = inputs + q * learns.keeps("out")
            kept += (1 if job.foreach else 4) * masks
            how += f" + masks {1 if job.foreach else 4}·{masks}"
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
    formula = (
        f"tokens {job.tokens:,} · layers {job.depth} · {each:,.0f} + pixels {_pixels(job):,} · {job.narrow}"
    )
    together = job.tokens * job.together / job.tiles  # so many are encoded in one call
    return _Tower(job.tokens * job.depth * each + job.narrow * _pixels(job), together * kept, formula)


def _casts(job: TrainJob) -> dict[str, float]:
    """bfloat16 copies of float32 matrices that linear layers keep, by tower; sharded ones are gathered so."""
    if job.compute == "float32" or job.sharded:
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
        lines[f"weights: {name}"] = Line(count * size / n, f"parameters {count:,} · bytes {size}{over(n)}")
    lines["gradients"] = Line(4 * job.trained / n, f"trained {job.trained:,} · bytes 4{over(n)}")
    lines["optimiser"] = Line(
        STATES * job.trained / n, f"trained {job.trained:,} · two moments of 4{over(n)}"
    )
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
    """Whole weights in use, and their gradients before they are summed up over the devices."""
    if not job.sharded:
        return 0.0, ""
    c, v, e, parts = job.language, job.vision, job.narrow, job.parts()
    # All that is in no layer is one unit, which stays from the first use of the step to its last.
    root = {name: parts[name] for name in ("projector", "words", "head") if name in parts}
    layer = max(parts["layers"][0] / c.layers, parts["vision"][0] / v.layers if v is not None else 0)
    held = sum(count for count, _ in root.values())
    learned = sum(count for count, learns in root.values() if learns)
    how = f"bytes {e} · (words, head and projector {held:,} + their gradients {learned:,} + 3 layers {layer:,.0f})"
    return e * (held + learned + 3 * layer), how


def _loss_bytes(job: TrainJob) -> float:
    """Alive while the loss is formed: its rows, their gradient, the head's gradient, a chunk of logits."""
    c, e = job.language, job.narrow
    chunk = min(LOSS_CHUNK, job.learned) * c.vocab_size * (4 if e == 4 else 6)
    # With a head in another dtype than float32 the chunk's share of its gradient is a matrix of its own.
    head = 4 * job.table * job.head_learns
    rows = job.learned * c.hidden_size * (_head_bytes(job) * (1 + job.learns.passes))
    return rows + head + chunk


def _head_bytes(job: TrainJob) -> int:
    return job.narrow if job.sharded else job.stored(job.head_learns)


def _loss_formula(job: TrainJob) -> str:
    c = job.language
    rows = min(LOSS_CHUNK, job.learned)
    how = f"chunk {rows:,} · words {c.vocab_size:,} · {4 if job.narrow == 4 else 6}"
    if job.head_learns:
        how += f" + 4 · head {job.table:,}"
    return (
        how
        + f" + learned rows {job.learned:,} · {c.hidden_size} · {_head_bytes(job)} · {1 + job.learns.passes}"
    )


def moment_lines(job: TrainJob) -> dict[str, Line]:
    """Bytes alive at the moments of which one is the peak; the parts of each sum are named in its formula."""
    c, learns, parts, n = job.language, job.learns, job.parts(), job.divided
    width, _, _, inner = widths(c)
    T, e, wide = job.rows, job.narrow, job.residual
    weights = sum(count * job.stored(trained) for count, trained in parts.values()) / n
    states = STATES * job.trained / n
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
        together = job.together
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
        moving = T * (wide * width + (3 - learns.keeps("down")) * e * inner) + own
        late = T * (wide * width + e * width) + (4 * 3 * width * inner) * learns.layers
        moment(
            "backward, last layer",
            gradients=max(
                earlier, head_gradient * (not c.tie_words) + (4 * job.table * job.head_learns) * c.tie_words
            ),
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
            together = job.tokens * job.together / job.tiles
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
    width, q, kv, inner = widths(c)
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


def _short(value: float) -> str:
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}B"
    return f"{value:.0f} B"
