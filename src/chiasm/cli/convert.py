"""``chiasm convert SRC DST --to …``: a checkpoint in another public layout, a part of it, or a run as a bundle.

``--to original|hf|hf-old`` translates an InternVL checkpoint and may change it on the way (language model, vocabulary,
tile size). ``--for SERVER`` chooses the layout that a server reads and refuses what it could not serve. ``--to pvc``
makes a PVC of an InternVL, or reads the released one. ``--to gguf`` writes llama.cpp's files. ``--to
vision|projector|language`` writes that part alone. ``--to bundle`` takes the run folder of ``internvl/mini_sft`` and
writes what `chiasm.load` reads as a chiasm-mini: config and bfloat16 weights. A run that began with a checkpoint
(``internvl/sft``, the stages) is written in the layouts of whole models, adapters merged.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from chiasm.cli.serving import ServerName, note_serving
from chiasm.cli.terminal import note, waiting
from chiasm.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from chiasm.checkpoint.convert import ConvertReport

__all__ = ["convert_command"]


class Layout(StrEnum):
    """The layouts that can be written."""

    ORIGINAL = "original"
    HF = "hf"
    HF_OLD = "hf-old"
    VISION = "vision"
    PROJECTOR = "projector"
    LANGUAGE = "language"
    GGUF = "gguf"
    PVC = "pvc"
    BUNDLE = "bundle"


class PositionOrder(StrEnum):
    """Where the class token's position stands in an mmproj file."""

    CLASS_LAST = "class-last"
    CLASS_FIRST = "class-first"


class MatrixType(StrEnum):
    """Element types of the matrices in a GGUF file."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"


_PARTS: dict[Layout, Literal["vision", "projector", "language"]] = {
    Layout.VISION: "vision",
    Layout.PROJECTOR: "projector",
    Layout.LANGUAGE: "language",
}


def convert_command(
    src: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="Checkpoint folder in any layout, or a training run.", show_default=False
        ),
    ],
    dst: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to write; whole or not at all.", show_default=False)
    ],
    to: Annotated[
        Layout | None,
        typer.Option(
            "--to",
            help="original (remote code), hf (transformers), hf-old (the names of the files on model hubs); gguf "
            "(llama.cpp); pvc (progressive compression, ready for training); vision, projector or language (that part "
            "alone); or bundle (of a run).",
            show_default=False,
        ),
    ] = None,
    servers: Annotated[
        list[ServerName] | None,
        typer.Option(
            "--for",
            metavar="SERVER",
            help="vllm, sglang or lmdeploy (repeatable): write the layout that it reads, or refuse what it cannot.",
        ),
    ] = None,
    dtype: Annotated[
        MatrixType | None,
        typer.Option(metavar="TYPE", help="Of --to gguf: f32, f16, bf16 or q8_0; default: each as stored."),
    ] = None,
    position_rows: Annotated[
        PositionOrder | None,
        typer.Option(
            metavar="ORDER",
            help="Of --to gguf: class-last (default; llama.cpp up to v0.5.0 computes right with it) or class-first (as "
            "its converter writes: releases whose graph is fixed, other programs).",
        ),
    ] = None,
    language: Annotated[
        Path | None,
        typer.Option(
            "--language",
            metavar="FOLDER",
            help="Put this language model in the place of SRC's; a projector of another width is drawn anew.",
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", metavar="NAME", help="Chat template to note in the config.")
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab-size", metavar="ROWS", help="Cut or grow the vocabulary to this many rows."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size", metavar="PIXELS", help="Side of a tile: positions are resampled to its grid."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Of --to pvc (repeatable): tokens=64, repeats=4, temporal.layers=6, temporal.time=seconds, …",
        ),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Of --to pvc from the released PVC: JSON, its names of tensors -> ours ('' leaves one out).",
        ),
    ] = None,
    accept_guesses: Annotated[
        bool,
        typer.Option("--accept-guesses", help="Likewise: take the guesses of the report for true."),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn anew.")] = 0,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace DST if it is a checkpoint, or GGUF files of this command."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Write an InternVL checkpoint in another public layout.

    Weights stay the same, bit by bit, but where an option below changes them; config, tokenizer and processor files
    are translated. LoRA adapters that the release's training has saved are merged.
    """
    changes = {
        "language": language,
        "template": template,
        "vocab_size": vocab_size,
        "image_size": image_size,
    }
    if servers:
        to = _layout_for(to, servers)
    if to is None:
        raise UsageError("say what to write: --to LAYOUT, or --for SERVER")
    if dtype is not None and to is not Layout.GGUF:
        raise UsageError("--dtype belongs to --to gguf: the other layouts keep the weights as they are")
    if position_rows is not None and to is not Layout.GGUF:
        raise UsageError("--position-rows belongs to --to gguf: it is an order of llama.cpp's files")
    if (settings or names or accept_guesses) and to is not Layout.PVC:
        raise UsageError("--set, --names and --accept-guesses belong to --to pvc")
    if to in (Layout.BUNDLE, Layout.GGUF, Layout.PVC, *_PARTS):
        if to is Layout.PVC:
            del changes["template"]
        if to is Layout.GGUF:
            del changes["template"]  # the one change that a GGUF file has a place for
        given = next((name for name, value in changes.items() if value is not None), None)
        if given is not None:
            option = "--" + given.replace("_", "-")
            raise UsageError(f"{option} changes a whole model: use it with --to original, hf or hf-old")
    if to is Layout.PVC:
        _to_pvc(
            src,
            dst,
            tuple(settings or ()),
            names=names,
            accept_guesses=accept_guesses,
            template=template,
            seed=seed,
            force=force,
            as_json=as_json,
        )
        return
    if to is Layout.BUNDLE:
        report = _bundle(src, dst, force=force)
        print(
            json.dumps(report)
            if as_json
            else f"{dst}: {report['bytes'] / 1e6:.1f} MB after {report['step']} steps"
        )
        return
    from chiasm.checkpoint.convert import convert, convert_part
    from chiasm.hub import model_type

    if model_type(src) == "pvc_internvl":
        raise UsageError(
            f"{src} is a PVC, whose temporal layers no other layout can hold: it cannot be written as {to.value}"
        )
    if model_type(src) == "chiasm-mini":
        raise UsageError(
            f"{src} is a bundle of chiasm-mini (encoder, projector, adapters; no language model): it cannot be "
            f"written as {to.value}"
        )
    run = (src / "run.json").is_file()
    if run:
        _check_run(src, to, changes)
    with waiting(f"converting {src}"):
        if run:
            from chiasm.systems.internvl.nodes import export_run

            report = export_run(src, dst, to.value, force=force, verify=_verifier(servers or []))  # type: ignore[arg-type]
        elif to in _PARTS:
            report = convert_part(src, dst, _PARTS[to], force=force)
        elif to is Layout.GGUF:
            from chiasm.checkpoint.to_gguf import convert_to_gguf

            report = convert_to_gguf(
                src,
                dst,
                dtype=dtype,
                template=template,
                position_rows=(position_rows or PositionOrder.CLASS_LAST).value,
                force=force,
            )
        else:
            report = convert(
                src,
                dst,
                to.value,  # type: ignore[arg-type]
                force=force,
                seed=seed,
                verify=_verifier(servers or []),
                **changes,  # type: ignore[arg-type]
            )
    _tell(report, as_json=as_json)
    if as_json:
        return
    for server in servers or ():
        note_serving(dst, server.value)


def _tell(report: ConvertReport, *, as_json: bool) -> None:
    """Print what a conversion did."""
    if as_json:
        print(json.dumps(report.to_dict(), ensure_ascii=False))
        return
    files = f", {len(report.files)} other file(s)" if report.files else ""
    print(
        f"{report.folder}: {report.tensors} tensors, {report.bytes / 1e6:,.1f} MB in {len(report.shards)} file(s)"
        f"{files}; {report.source} -> {report.target}"
    )
    for line in report.notes:
        note(line)


def _to_pvc(
    src: Path,
    dst: Path,
    settings: tuple[str, ...],
    *,
    names: Path | None,
    accept_guesses: bool,
    template: str | None,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """An InternVL made a PVC, a run of one written, or the released PVC discovered: its report goes to stderr."""
    from chiasm.checkpoint.store import read_json
    from chiasm.hub import model_type
    from chiasm.systems.pvc.convert import MODEL_TYPE, PVCOptions, is_release, retrofit
    from chiasm.systems.pvc.discover import convert_release, discover, options_of
    from chiasm.train.recipe import apply_overrides

    released = model_type(src) == MODEL_TYPE
    if released and not is_release(read_json(src / "config.json")):
        raise UsageError(f"{src} is a PVC folder of Chiasm already")
    if not released:
        if names or accept_guesses:
            raise UsageError(f"--names and --accept-guesses are for the released PVC, and {src} is none")
        if (src / "run.json").is_file():
            if settings or template:
                raise UsageError(
                    f"{src} is a run: what it trained cannot be set (--set, --template) any more"
                )
            from chiasm.systems.pvc.nodes import export_run

            with waiting(f"converting {src}"):
                report = export_run(src, dst, force=force)
        else:
            options = apply_overrides(PVCOptions(seed=seed), settings)
            with waiting(f"converting {src}"):
                report = retrofit(src, dst, options, template=template, force=force)
        _tell(report, as_json=as_json)
        return
    if template is not None:
        raise UsageError("--template does not go with a released PVC, whose config names its own")
    said = {} if names is None else read_json(names)
    if not all(isinstance(value, str) for value in said.values()):
        raise UsageError(f"{names}: every value must be a name, or '' to leave a tensor out")
    chosen: PVCOptions | None = None
    found = discover(src, names=said)
    if settings:
        chosen = apply_overrides(PVCOptions() if found.config is None else options_of(found.config), settings)
        found = discover(src, chosen, names=said)
    for line in found.lines():
        note(line)
    with waiting(f"converting {src}"):
        report = convert_release(src, dst, chosen, names=said, accept_guesses=accept_guesses, force=force)
    _tell(report, as_json=as_json)


def _check_run(src: Path, to: Layout, changes: dict[str, Any]) -> None:
    """UsageError for what a run cannot be written as in one go."""
    from chiasm.train.run import RunFolder

    given = next((name for name, value in changes.items() if value is not None), None)
    if str(RunFolder.open(src).info["recipe"]["model"].get("type")).startswith("chiasm.systems.pvc."):
        raise UsageError(f"{src} is a run of a PVC, which no other layout can hold: write it with --to pvc")
    if to not in (Layout.ORIGINAL, Layout.HF, Layout.HF_OLD):
        raise UsageError(
            f"{src} is a run: write it with --to original, hf or hf-old first, and convert that folder to {to.value}"
        )
    if given is not None:
        raise UsageError(
            f"--{given.replace('_', '-')} changes a checkpoint: write the run {src} first, then change that folder"
        )


def _layout_for(to: Layout | None, servers: list[ServerName]) -> Layout:
    """The layout that all of the servers read; UsageError where another kind of thing is to be written."""
    from chiasm.checkpoint.serving import layout_for

    if to is None:
        return Layout(layout_for(tuple(server.value for server in servers)))
    if to not in (Layout.ORIGINAL, Layout.HF, Layout.HF_OLD):
        raise UsageError(f"--for chooses a layout of the whole model: it does not go with --to {to.value}")
    return to


def _verifier(servers: list[ServerName]) -> Callable[[Path], None]:
    """Refuses a folder that one of the servers could not serve."""

    def verify(made: Path) -> None:
        from chiasm.checkpoint.serving import RELEASES, check_serving

        for server in servers:
            together = tuple(one.value for one in servers)
            found = check_serving(made, server.value, together)  # type: ignore[arg-type]
            wrong = found.of("refused", "missing")
            if wrong:
                raise CheckpointError(
                    f"nothing was written, for {server.value} {RELEASES[server.value]} could not serve it: {wrong[0]}"
                )

    return verify


def _bundle(src: Path, dst: Path, *, force: bool) -> dict[str, Any]:
    """The last checkpoint of a mini_sft run as a chiasm-mini; returns its report."""
    from chiasm.cli.train import find_recipe
    from chiasm.systems.internvl.mini import save_bundle
    from chiasm.systems.internvl.recipes import MiniModel
    from chiasm.train.recipe import apply_overrides, difference, resolved
    from chiasm.train.run import RunFolder

    run = RunFolder.open(src)
    info = run.info
    model = apply_overrides(find_recipe(info["reference"])(), info["overrides"]).model
    if not isinstance(model, MiniModel):
        raise UsageError(f"{src} is a run of {info['reference']}: a bundle is made from internvl/mini_sft")
    # The weights are those of the model that was trained; a recipe or default that has changed since would describe
    # another. Data and optimiser are not compared: they leave no trace in what is written.
    changed = difference(info["recipe"].get("model"), resolved(model), "model")
    if changed:
        raise UsageError(
            f"{src} trained another model than its recipe now describes ({changed[0]}): train it again"
        )
    if dst.exists() and not force:
        raise UsageError(f"{dst} exists: choose another folder, or --force to replace it")
    checkpoint = run.load()
    size = save_bundle(
        checkpoint.weights, model.config, dst, {"run": run.path.name, "step": checkpoint.step}, force=force
    )
    return {"folder": str(dst), "bytes": size, "step": checkpoint.step, "run": str(src)}
