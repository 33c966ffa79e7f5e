"""Written once into the cache folder, used ever after: the graphs of a model, their word table and what was checked.

An entry is a folder `openvino-<name>-<key>` with `decoder`, `head`, `vision` (each .xml and .bin), `words.safetensors`
and `entry.json`. The key is a hash of whose weights they are (names, sizes, times of change and both ends of the
files), of the options, and of the versions of OpenVINO and of what is written here, and the CPU that the check ran on:
whatever changes, an entry that does not fit is not found and another one is made. An entry that is damaged is
rebuilt. Nothing is ever served that `chiasm.model.openvino.check` has not passed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chiasm.checkpoint.cache import cache_dir, locked, publish, sweep, sync, sync_folder
from chiasm.checkpoint.store import write_safetensors
from chiasm.errors import CheckpointError, ConfigError, UsageError
from chiasm.model.causal import CausalVLM
from chiasm.model.openvino.check import Agreement, VisionSide, agreement
from chiasm.model.openvino.graphs import Writer, decoder_graph, head_graph, vision_graph
from chiasm.model.openvino.parts import compile_graph
from chiasm.model.openvino.weights import core, openvino, schemes
from chiasm.parts.language.decoder import Decoder

__all__ = ["Compiled", "Options", "Written", "open_compiled", "sources_of", "write_graphs"]

_log = logging.getLogger("chiasm.openvino")
_FORMAT = 1  # raise it when graphs or files are written differently
_RECORD = "entry.json"
_WORDS = "words.safetensors"
_ENDS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user chooses: `dtype` as of `chiasm.model.openvino.parts.settings`, `quantize` as of `chiasm.load`."""

    dtype: str | None = None
    quantize: str | None = None


@dataclass(frozen=True, slots=True)
class Compiled:
    """An entry, ready to answer: compiled graphs (`vision` only where there is an encoder) and the words (V, C)."""

    decoder: Any
    head: Any
    vision: Any | None
    words_VC: Tensor
    folder: Path
    agreement: Agreement


@dataclass(frozen=True, slots=True)
class Written:
    """A model as graphs that are not compiled yet, by name."""

    graphs: dict[str, Any]
    vision: VisionSide | None


def sources_of(*folders: Path) -> list[Path]:
    """The files of checkpoint folders that say what a model computes."""
    return sorted(
        file
        for folder in folders
        for file in folder.iterdir()
        if file.suffix in (".json", ".safetensors") and file.is_file()
    )


def open_compiled(
    name: str,
    sources: Sequence[Path],
    make: Callable[[], tuple[CausalVLM, VisionSide | None]],
    options: Options,
) -> Compiled:
    """The compiled graphs of a model, from the cache or written into it.

    Args:
        name: of the model, shown and part of the folder's name.
        sources: files that its weights come from.
        make: loads the PyTorch model and what is its vision side; called only where the cache has nothing to use.

    Raises:
        MissingExtraError: openvino is not installed.
        UsageError: words in `quantize` that this backend does not have.
        ConfigError: the model has parts that the graphs have no words for, or they disagree with it.
        CheckpointError: the cache folder cannot be written.
    """
    openvino()
    schemes(options.quantize)
    folder = cache_dir() / f"openvino-{_plain(name)}-{_key(sources, options)}"
    found = _opened(folder, options)
    if found is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f".{folder.name}.lock"):
            found = _opened(folder, options)  # another process may have been faster
            if found is None:
                _build(name, folder, make, options)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be written ({error.strerror or error}): free some space or name another folder in "
            "CHIASM_CACHE"
        ) from error
    found = found or _opened(folder, options)
    if found is None:
        raise CheckpointError(
            f"{folder}: what was just written cannot be read: delete this folder and try again"
        )
    return found


def write_graphs(
    model: CausalVLM,
    vision: VisionSide | None,
    options: Options,
    *,
    written: Callable[[], None] = lambda: None,
) -> Written:
    """The model as graphs; `written` is called after each layer."""
    language, encoder = schemes(options.quantize)
    exact = options.dtype == "float32"
    if not isinstance(model.trunk, Decoder):
        raise ConfigError(
            f"the openvino backend knows no trunk {type(model.trunk).__name__}: leave backend= out"
        )
    write = Writer(language, exact=exact, written=written)
    graphs = {
        "decoder": decoder_graph(write, model.trunk),
        "head": head_graph(write, model.head.weight[: model.head.used]),  # type: ignore[index, misc]
    }
    if encoder is not None and vision is None:
        raise UsageError(f"quantize {options.quantize}: this model has no vision encoder to round")
    if vision is not None:
        write = Writer(encoder, exact=exact, written=written)
        graphs["vision"] = vision_graph(
            write, vision.vision, vision.compress, vision.connect, select_layer=vision.select_layer
        )
    return Written(graphs, vision)


def _build(
    name: str,
    folder: Path,
    make: Callable[[], tuple[CausalVLM, VisionSide | None]],
    options: Options,
) -> None:
    """Load, write, check, save, and only then rename into place."""
    begin = time.perf_counter()
    sweep(folder)
    with _shown(f"{name}: reading the weights") as show:
        model, vision = make()
        layers = len(model.trunk.layers)  # type: ignore[arg-type]
        layers += 0 if vision is None else len(vision.vision.layers)
        show(f"{name}: writing OpenVINO graphs", layers)
        made = write_graphs(model, vision, options, written=show)
        show(f"{name}: comparing them with the model", None)
        found = agreement(model, made.graphs, vision, schemes(options.quantize), options.dtype)
        found.demand(name, schemes(options.quantize)[0])
        show(f"{name}: saving them", None)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.tmp-"))
        try:
            _save(work, name, model, made, found, options)
            publish(work, folder, lambda path: _record(path) is not None)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    _log.warning(
        "%s: OpenVINO graphs written once in %.0f s and kept in %s; they differ from the model by %.1e of the spread "
        "of its results, with rounding by %.1e",
        name,
        time.perf_counter() - begin,
        folder,
        found.graph,
        found.served,
    )


def _save(work: Path, name: str, model: CausalVLM, made: Written, found: Agreement, options: Options) -> None:
    ov = openvino()
    for part, graph in made.graphs.items():
        ov.serialize(graph, work / f"{part}.xml", work / f"{part}.bin")
    words: Tensor = model.embedder.words.weight  # type: ignore[union-attr, assignment]
    write_safetensors(work / _WORDS, [("words", words.detach())])
    files = {
        file.name: {"size": file.stat().st_size, "sha256": _small_sha256(file)} for file in work.iterdir()
    }
    record = {"model": name, "options": asdict(options), "agreement": asdict(found), "files": files}
    record["versions"] = {"openvino": ov.__version__, "torch": torch.__version__}
    (work / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for file in work.iterdir():
        with file.open("rb+") as handle:
            sync(handle)
    work.chmod(0o755)  # mkdtemp makes it private; a shared cache may be read by others
    sync_folder(work)


def _opened(folder: Path, options: Options) -> Compiled | None:
    """A complete entry, compiled; None where there is none or it cannot be used."""
    record = _record(folder)
    if record is None:
        return None
    try:
        compiled = {
            part: compile_graph(folder / f"{part}.xml", options.dtype)
            for part in ("decoder", "head", "vision")
            if f"{part}.xml" in record["files"]
        }
        with safe_open(folder / _WORDS, framework="pt") as file:
            words_VC = file.get_tensor("words")
        found = Agreement(**record["agreement"])
        return Compiled(
            compiled["decoder"], compiled["head"], compiled.get("vision"), words_VC, folder, found
        )
    except (RuntimeError, OSError, SafetensorError, KeyError, TypeError) as error:
        _log.warning("%s cannot be used (%s): it is written again", folder, str(error).splitlines()[0][:200])
        with contextlib.suppress(OSError):
            (folder / _RECORD).unlink()  # so that it counts as damaged, and makes way
        return None


def _record(folder: Path) -> dict[str, Any] | None:
    """The record of a complete entry: every file in its size, small ones compared by hash; else None."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        for name, facts in record["files"].items():
            file = folder / name
            if file.stat().st_size != facts["size"] or _small_sha256(file) != facts["sha256"]:
                return None
        return record if {"decoder.xml", "head.xml", _WORDS} <= record["files"].keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _key(sources: Sequence[Path], options: Options) -> str:
    """What an entry belongs to, as 16 hexadecimal digits."""
    ov = openvino()
    digest = hashlib.sha256()
    cpu = core().get_property("CPU", "FULL_DEVICE_NAME")
    for fact in (_FORMAT, ov.__version__, cpu, options.dtype, options.quantize):
        digest.update(f"{fact}\0".encode())
    for file in sources:
        try:
            state = file.stat()
            digest.update(f"{file.name}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
            with file.open("rb") as handle:
                digest.update(handle.read(_ENDS))
                handle.seek(max(0, state.st_size - _ENDS))
                digest.update(handle.read(_ENDS))
        except OSError as error:
            raise CheckpointError(
                f"{file}: cannot be read ({error.strerror}): check its permissions"
            ) from error
    return digest.hexdigest()[:16]


def _small_sha256(file: Path) -> str | None:
    """Hash of a graph's text; None for weights, which are too large to be hashed at every start."""
    if file.suffix != ".xml":
        return None
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _plain(name: str) -> str:
    """The name as part of a folder's name."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:60] or "model"


class _Show:
    """Progress: called with a text and a number of steps, a new task begins; without, a step of it is done."""

    def __call__(self, text: str | None = None, steps: int | None = None) -> None:
        """Nothing is drawn where nobody looks."""


@contextlib.contextmanager
def _shown(text: str) -> Iterator[_Show]:
    """One line on a terminal, wiped when all is done; nothing elsewhere."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield _Show()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    sys.stderr.write("\r\x1b[K")  # whatever is said to be waited for
    console = Console(file=sys.stderr, force_terminal=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=None)

        class Drawn(_Show):
            def __call__(self, text: str | None = None, steps: int | None = None) -> None:
                if text is None:
                    bar.advance(task)
                else:
                    bar.reset(task, description=text, total=steps)

        yield Drawn()
