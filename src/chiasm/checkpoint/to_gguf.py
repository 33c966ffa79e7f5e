"""Write a checkpoint as llama.cpp reads it: `model-….gguf`, and `mmproj-….gguf` where it has eyes.

Source: `llamacpp.py` (language), `mmproj.py` (encoder and projector), `chiasm.text.gguf_words` (tokenizer). Weights are
read tensor by tensor from the mapped files. What was written is opened again before the folder appears: names, shapes
and element types of both files are compared with the plan, and the decoder's config with the source's (its rotary
tables are tensors of their own, and their values are not).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chiasm.checkpoint.adapters import Entry, OpenedCheckpoint, open_checkpoint
from chiasm.checkpoint.convert import ConvertReport, completed
from chiasm.checkpoint.edit import check_apart
from chiasm.checkpoint.gguf import GGUFFile
from chiasm.checkpoint.gguf_write import GGUFTensor, write_gguf
from chiasm.checkpoint.llamacpp import (
    FILE_TYPES,
    language_metadata,
    language_notes,
    language_tensors,
    read_language,
)
from chiasm.checkpoint.lora import MergedReader
from chiasm.checkpoint.mmproj import PositionRows, mmproj_metadata, mmproj_notes, mmproj_tensors
from chiasm.checkpoint.preprocess import read_tile_policy
from chiasm.checkpoint.store import new_folder
from chiasm.errors import CheckpointError, UsageError
from chiasm.text.gguf_words import tokenizer_to_gguf
from chiasm.text.jinja import to_jinja
from chiasm.text.templates import get_template
from chiasm.text.tokenizer import Tokenizer

__all__ = ["convert_to_gguf"]

_QUANTISATION_VERSION = (
    2  # of ggml's block formats; written whether there are blocks or not, as its converter does
)
_STORED = {torch.bfloat16: "BF16", torch.float16: "F16"}
_MARK = "chiasm.converted"  # what says that a file was written here and may be replaced
_OWN_NAMES = frozenset(f"{half}-{kind.lower()}.gguf" for half in ("model", "mmproj") for kind in FILE_TYPES)


def convert_to_gguf(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    template: str | None = None,
    position_rows: PositionRows = "class-last",
    force: bool = False,
) -> ConvertReport:
    """Write the checkpoint in ``src`` as GGUF files in the folder ``dst``.

    Args:
        src: an InternVL checkpoint folder of any layout, or a language model alone.
        dst: the folder to write; it appears whole or not at all.
        dtype: element type of the matrices, "f32", "f16", "bf16" or "q8_0"; None for what each is stored in, which
            loses nothing. Vectors and norms are F32 always.
        template: name of the chat template to write; None for the checkpoint's own.
        position_rows: where the class token's position stands, "class-last" for llama.cpp up to v0.5.0, "class-first"
            as its converter writes it (see `mmproj`).
        force: replace ``dst`` if it holds files that this function has written and nothing else.

    Raises:
        UsageError: an unknown dtype or order of position rows, or ``dst`` is ``src``, holds it or lies in it.
        CheckpointError: ``src`` cannot be read, llama.cpp has no graph or tokenizer for it, or ``dst`` cannot be
            written.
        TemplateError: the template is unknown.
    """
    src, dst = Path(src), Path(dst)
    if dtype is not None and dtype.upper() not in FILE_TYPES:
        raise UsageError(f"unknown element type {dtype!r}: use one of {', '.join(FILE_TYPES).lower()}")
    check_apart(src, dst)
    opened = open_checkpoint(src)
    with opened.reader:
        opened.adapter.check(opened.reader)
        files, notes = _files(opened, dtype, template, position_rows)
        with new_folder(dst, force=force, owned=_is_own) as (made, target):
            for name, (metadata, tensors) in files.items():
                write_gguf(made / name, metadata, tensors, shown=target / name)
                _look_again(made / name, target / name, opened, tensors)
    return ConvertReport(
        source=opened.layout,
        target="gguf",
        folder=str(target),
        tensors=sum(len(tensors) for _, tensors in files.values()),
        bytes=sum(tensor.nbytes for _, tensors in files.values() for tensor in tensors),
        shards=tuple(files),
        files=(),
        notes=notes,
    )


def _kinds(opened: OpenedCheckpoint, dtype: str | None) -> tuple[Callable[[Entry], str], str]:
    """Element type of each native tensor where it is a matrix, and that of the most values, which names the files."""
    if dtype is not None:
        return (lambda entry: dtype.upper()), dtype.upper()

    def stored(entry: Entry) -> str:
        names = opened.adapter.spell(entry.native)
        kind = functools.reduce(torch.promote_types, map(opened.reader.dtype, names))
        if kind == torch.float64:
            raise CheckpointError(
                f"{opened.reader.folder}: {names[0]} is stored in float64, which would lose digits in a GGUF file: "
                "say what is wanted by --dtype"
            )
        return _STORED.get(kind, "F32")

    sizes: Counter[str] = Counter()
    for entry in opened.adapter.plan:
        if len(entry.shape) > 1:
            sizes[stored(entry)] += math.prod(entry.shape)
    return stored, max(sizes, key=lambda kind: sizes[kind])


def _files(
    opened: OpenedCheckpoint, dtype: str | None, template: str | None, position_rows: PositionRows
) -> tuple[dict[str, tuple[dict[str, Any], list[GGUFTensor]]], tuple[str, ...]]:
    """Metadata and tensors by file name, and what is to be said; whatever can be refused is refused here."""
    language, folder = opened.language, opened.reader.folder
    read, (kind_of, most) = _reader(opened), _kinds(opened, dtype)
    notes = list(language_notes(language))
    if isinstance(opened.reader, MergedReader):
        notes.append(f"LoRA adapters of {opened.reader.merged} weights were merged")
    shared = {
        "general.file_type": FILE_TYPES[most],
        "general.quantization_version": _QUANTISATION_VERSION,
        _MARK: True,
    }
    public, stated = opened.public, template
    if public is not None:
        stated = template or public.template or "internvl2_5"
    words = _words(folder, language.vocab_size, stated, public.system_message if public else None)
    if stated is not None and "tokenizer.chat_template" not in words:
        notes.append(
            f"the chat template {stated!r} has no Jinja form, so none was written and llama.cpp falls back to one of "
            "its own: name one that has by --template"
        )
    metadata = language_metadata(language) | {"general.type": "model"} | shared | words
    files = {f"model-{most.lower()}.gguf": (metadata, language_tensors(language, kind_of, read))}
    if public is not None and opened.vision is not None and opened.layout != "text":
        public = completed(opened, public, None)
        policy = replace(read_tile_policy(folder, public, opened.layout), image_size=public.image_size)
        keys = mmproj_metadata(public, opened.vision, language, policy, position_rows) | shared
        keys["general.name"] = folder.resolve().name
        tensors = mmproj_tensors(
            opened.vision, language, public.downsample_ratio, kind_of, read, position_rows
        )
        files[f"mmproj-{most.lower()}.gguf"] = (keys, tensors)
        notes += mmproj_notes(policy, position_rows)
    return files, tuple(notes)


def _reader(opened: OpenedCheckpoint) -> Callable[[Entry], Tensor]:
    return lambda entry: opened.adapter.read(opened.reader, entry)


def _words(folder: Path, rows: int, stated: str | None, system: str | None) -> dict[str, Any]:
    """The tokenizer's metadata, with the chat template and the token that ends an answer."""
    tokenizer = Tokenizer.from_file(folder)
    if stated is None:
        return tokenizer_to_gguf(tokenizer, rows, name=folder.resolve().name)
    found = get_template(stated)
    end = tokenizer.token_to_id(found.stop)
    if end is None:
        raise CheckpointError(
            f"{folder}: the chat template {stated!r} ends answers with {found.stop!r}, which is no token of this "
            "tokenizer: name the template that the model was trained with"
        )
    # A picture reaches the template as a text, the marker that the server puts in its place.
    # Without a form of its own none is written: the language model's would be a template that was not trained with.
    source = to_jinja(found, system=system) or ""
    name = folder.resolve().name
    return tokenizer_to_gguf(tokenizer, rows, name=name, end=end, begin=found.bos, chat_template=source)


def _is_own(folder: Path) -> bool:
    """Whether all files of a folder were written here; CheckpointError that names one that was not."""
    for entry in sorted(folder.iterdir()):
        marked = False
        if entry.name in _OWN_NAMES and entry.is_file():
            try:
                with GGUFFile(entry) as file:
                    marked = file.metadata.get(_MARK) is True
            except CheckpointError:
                pass
        if not marked:
            raise CheckpointError(
                f"{entry} was not written by chiasm convert --to gguf, so {folder} is not replaced: choose another "
                "folder"
            )
    return True


def _look_again(path: Path, shown: Path, opened: OpenedCheckpoint, planned: list[GGUFTensor]) -> None:
    """Open what was written; CheckpointError where it is not what was planned, or not the source's decoder."""
    with GGUFFile(path) as file:
        same = {(t.name, t.shape, t.type) for t in planned} == {
            (t.name, t.shape, t.type) for t in file.tensors.values()
        }
        if same and not path.name.startswith("model-"):
            return
        found, _ = read_language(file)
    own = opened.language
    # What the file does not say, or says by tensors (see `llamacpp`); its numbers are float32.
    silent = {"family": own.family, "rope_scaling": own.rope_scaling, "tie_words": own.tie_words}
    for name in ("norm_eps", "rope_theta"):
        if np.float32(getattr(found, name)) == np.float32(getattr(own, name)):
            silent[name] = getattr(own, name)
    if not same or replace(found, **silent) != own:  # type: ignore[arg-type]
        raise CheckpointError(f"{shown} does not read back as {own}: this is a bug, please report it")
