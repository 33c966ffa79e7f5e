"""Write a checkpoint as llama.cpp reads it: `model-….gguf`, and `mmproj-….gguf` where it has eyes.

Source: `llamacpp.py` (language), `mmproj.py` (encoder and projector), `chiasm.text.gguf_words` (tokenizer). Weights are
read tensor by tensor from the mapped files. What was written is opened again, and its config and tensor names compared
with the source's, before the folder appears.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from chiasm.checkpoint.mmproj import mmproj_metadata, mmproj_notes, mmproj_tensors
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


def convert_to_gguf(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    template: str | None = None,
    force: bool = False,
) -> ConvertReport:
    """Write the checkpoint in ``src`` as GGUF files in the folder ``dst``.

    Args:
        src: an InternVL checkpoint folder of any layout, or a language model alone.
        dst: the folder to write; it appears whole or not at all.
        dtype: element type of the matrices, "f32", "f16", "bf16" or "q8_0"; None for what is stored, which loses
            nothing. Vectors and norms are F32 always.
        template: name of the chat template to write; None for the checkpoint's own.
        force: replace ``dst`` if it holds GGUF files and nothing else.

    Raises:
        UsageError: an unknown dtype, or ``dst`` is ``src``, holds it or lies in it.
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
        wanted = _wanted(opened, dtype)
        files, notes = _files(opened, wanted, template)
        with new_folder(dst, force=force, owned=_holds_gguf) as (made, target):
            for name, (metadata, tensors) in files.items():
                write_gguf(made / name, metadata, tensors)
            _look_again(made / f"model-{wanted.lower()}.gguf", opened)
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


def _wanted(opened: OpenedCheckpoint, dtype: str | None) -> str:
    if dtype is not None:
        return dtype.upper()
    (words,) = opened.adapter.spell("embedder.words.weight")
    return _STORED.get(opened.reader.dtype(words), "F32")


def _files(
    opened: OpenedCheckpoint, wanted: str, template: str | None
) -> tuple[dict[str, tuple[dict[str, Any], list[GGUFTensor]]], tuple[str, ...]]:
    """Metadata and tensors by file name, and what is to be said; whatever can be refused is refused here."""
    language, folder = opened.language, opened.reader.folder
    read = _reader(opened)
    notes = list(language_notes(language))
    if isinstance(opened.reader, MergedReader):
        notes.append(f"LoRA adapters of {opened.reader.merged} weights were merged")
    shared = {
        "general.file_type": FILE_TYPES[wanted],
        "general.quantization_version": _QUANTISATION_VERSION,
    }
    public, stated = opened.public, template
    if public is not None:
        stated = template or public.template or "internvl2_5"
    words = _words(folder, language.vocab_size, stated, public.system_message if public else None)
    metadata = language_metadata(language) | {"general.type": "model"} | shared | words
    files = {f"model-{wanted.lower()}.gguf": (metadata, language_tensors(language, wanted, read))}
    if public is not None and opened.vision is not None and opened.layout != "text":
        public = completed(opened, public, None)
        policy = replace(read_tile_policy(folder, public, opened.layout), image_size=public.image_size)
        keys = mmproj_metadata(public, opened.vision, language, policy) | shared
        keys["general.name"] = folder.resolve().name
        tensors = mmproj_tensors(opened.vision, language, public.downsample_ratio, wanted, read)
        files[f"mmproj-{wanted.lower()}.gguf"] = (keys, tensors)
        notes += mmproj_notes(policy)
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
    source = to_jinja(found, system=system)
    name = folder.resolve().name
    return tokenizer_to_gguf(tokenizer, rows, name=name, end=end, begin=found.bos, chat_template=source)


def _holds_gguf(folder: Path) -> bool:
    return all(entry.suffix == ".gguf" for entry in folder.iterdir())


def _look_again(path: Path, opened: OpenedCheckpoint) -> None:
    """Open what was written; CheckpointError where it does not describe the source's decoder."""
    with GGUFFile(path) as file:
        found, _ = read_language(file)
    own = opened.language
    # What the file does not say, or says by tensors (see `llamacpp`).
    silent = {"family": own.family, "rope_scaling": own.rope_scaling, "norm_eps": own.norm_eps}
    silent |= {"rope_theta": own.rope_theta, "tie_words": own.tie_words}
    if replace(found, **silent) != own:  # type: ignore[arg-type]
        raise CheckpointError(f"{path} does not read back as {own}: this is a bug, please report it")
