"""Checkpoint folders: read sharded safetensors lazily, write them atomically, one shard at a time.

A folder holds `config.json` and either `model.safetensors` or `model.safetensors.index.json` with its shards, the
convention of the public model hubs. Reading maps the files: a tensor costs no memory until its pages are touched,
and those pages belong to the file (the system takes them back when it needs them). Writing builds a folder beside
the target and renames it, so that a target either exists whole or not at all. Pickled weights are never read:
unpickling runs code.

The safetensors format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the bytes of the tensors. Reading goes through the `safetensors` package; writing is done here, because its
`save_file` refuses views of one tensor (rows of a fused matrix), which is what a layout conversion writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chiasm.errors import CheckpointError

__all__ = [
    "CONFIG",
    "INDEX",
    "SINGLE",
    "CheckpointReader",
    "Written",
    "new_folder",
    "read_json",
    "write_checkpoint",
    "write_safetensors",
]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

MAX_HEADER_BYTES = 100_000_000
"""Longest JSON header that is read; a real one takes some hundred bytes a tensor."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in the file ``path``.

    Raises:
        CheckpointError: the file cannot be read, is not UTF-8, is not JSON (file and line are named), or holds
            something else than an object.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text (byte {error.start}): download it again") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno}): correct that line"
        ) from None
    except (RecursionError, ValueError):  # nested beyond the parser, or a number of thousands of digits
        raise CheckpointError(f"{path} is not a sensible JSON file: download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}:1: a JSON object was expected, found {type(value).__name__}")
    return value


class CheckpointReader:
    """The tensors of a checkpoint folder, each read when it is asked for.

    ``model.safetensors`` is taken where it exists, else the index; the index alone decides which tensors there are.
    Shards are opened on first use and stay open until `close` (the reader is also a context manager).

    Args:
        folder: the checkpoint folder.

    Raises:
        CheckpointError: there is no such folder, it holds no safetensors (pickled weights are refused), the index is
            malformed or names a file outside the folder, or a shard is missing (it is named with what it holds).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            kind = "is a file, not a folder" if self.folder.exists() else "does not exist"
            raise CheckpointError(f"checkpoint {self.folder} {kind}: give the folder that holds {CONFIG}")
        self._open: dict[str, Any] = {}
        self._config: dict[str, Any] | None = None
        if (self.folder / SINGLE).exists():
            self._shard_of = dict.fromkeys(self._handle(SINGLE).keys(), SINGLE)
        elif (self.folder / INDEX).exists():
            self._shard_of = self._read_index()
        else:
            raise CheckpointError(self._nothing_found())

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __contains__(self, key: object) -> bool:
        return key in self._shard_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)

    @property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``; CheckpointError where it is missing or malformed."""
        if self._config is None:
            path = self.folder / CONFIG
            if not path.is_file():
                raise CheckpointError(
                    f"{self.folder} has no {CONFIG}: weights without it cannot be read, copy it from the release"
                )
            self._config = read_json(path)
        return self._config

    def keys(self) -> list[str]:
        """Names of all tensors, in the order of the file or the index."""
        return list(self._shard_of)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading its data."""
        return tuple(self._slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """Element type of a tensor, without reading its data."""
        code = str(self._slice(key).get_dtype())
        if code not in _DTYPES:
            raise CheckpointError(f"tensor {key} of {self.folder} has the element type {code}: not supported")
        return _DTYPES[code]

    def nbytes(self, key: str) -> int:
        """Size of a tensor in bytes."""
        return math.prod(self.shape(key)) * self.dtype(key).itemsize

    def tensor(self, key: str) -> Tensor:
        """The tensor as a view of the mapped file: do not write to it, and copy what is to outlive the file."""
        shard = self._shard(key)
        try:
            return self._handle(shard).get_tensor(key)
        except (SafetensorError, RuntimeError, OSError) as error:
            raise CheckpointError(
                f"cannot read {key} from {self.folder / shard}: {_first_line(error)}"
            ) from error

    def close(self) -> None:
        """Give the open shards back; tensors already handed out keep their file mapped."""
        self._open.clear()

    def _shard(self, key: str) -> str:
        try:
            return self._shard_of[key]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no tensor {key}") from None

    def _slice(self, key: str) -> Any:
        shard = self._shard(key)
        try:
            return self._handle(shard).get_slice(key)
        except SafetensorError:
            raise CheckpointError(
                f"{self.folder / shard} lacks the tensor {key} that {INDEX} promises: download it again"
            ) from None

    def _handle(self, shard: str) -> Any:
        handle = self._open.get(shard)
        if handle is None:
            path = self.folder / shard
            _check_header(path)
            try:
                # Kept open on purpose: safe_open maps the file, and its tensors are views of that mapping.
                handle = safe_open(str(path), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is truncated or damaged ({_first_line(error)}): download it again"
                ) from None
            self._open[shard] = handle
        return handle

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        table = read_json(path).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise CheckpointError(f"{path} has no weight_map: download it again")
        held: dict[str, list[str]] = {}
        for key, shard in table.items():
            if not isinstance(shard, str) or not _is_plain_name(shard):
                raise CheckpointError(
                    f"{path} places {key} in {shard!r}: a shard must be a .safetensors file in the same folder"
                )
            held.setdefault(shard, []).append(key)
        for shard, keys in held.items():
            if not (self.folder / shard).is_file():
                names = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
                raise CheckpointError(
                    f"shard {shard} is missing from {self.folder}: it holds {len(keys)} tensors ({names}); "
                    "download it again"
                )
        return table

    def _nothing_found(self) -> str:
        try:
            names = sorted(entry.name for entry in self.folder.iterdir())
        except OSError as error:
            return f"cannot list {self.folder}: {error.strerror or error}"
        pickles = [name for name in names if name.endswith(_PICKLES)]
        if pickles:
            return (
                f"{self.folder} has only pickled weights ({pickles[0]}), which can run code when read: "
                "save them as safetensors first (transformers: save_pretrained)"
            )
        others = [name for name in names if name.endswith(".safetensors")]
        if others:
            return (
                f"{self.folder} has {others[0]} but neither {SINGLE} nor {INDEX}: rename a single file to {SINGLE}, "
                "or fetch the index of a sharded one"
            )
        return f"{self.folder} has neither {SINGLE} nor {INDEX}: it is not a checkpoint folder"


def _is_plain_name(shard: str) -> bool:
    """Whether ``shard`` is a bare safetensors file name (links inside the folder are fine: hub caches use them)."""
    return shard.endswith(".safetensors") and PurePath(shard).name == shard and not set(shard) & set("\\/:\0")


def _check_header(path: Path) -> None:
    """Refuse what cannot be safetensors before anything is mapped or allocated by its header's word."""
    try:
        with path.open("rb") as file:
            size, start = os.fstat(file.fileno()).st_size, file.read(24)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not weights: run git lfs pull in that folder")
    if size < 8:
        raise CheckpointError(f"{path} has {size} bytes, too few for safetensors: download it again")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} announces a header of {length} bytes (at most {MAX_HEADER_BYTES} are read): "
            "it is damaged or not safetensors"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path} is truncated: its header needs {8 + length} bytes, the file has {size}; download it again"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def write_safetensors(
    path: str | Path, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> int:
    """Write named tensors to one safetensors file, atomically; views of one storage are fine.

    No second copy of the data is made (tensors of other devices and non-contiguous ones are copied one by one).

    Args:
        path: the file; replaced if it exists.
        tensors: names and tensors; held until all are written.
        metadata: strings for the header; ``format`` is set to ``"pt"``, which readers of the hub formats ask for.

    Returns:
        Size of the file in bytes.

    Raises:
        CheckpointError: a name occurs twice or is reserved, an element type has no safetensors code, or the file
            cannot be written.
    """
    path = Path(path)
    # Wide elements first: every tensor then starts at a multiple of its element size, as readers in place need.
    ordered = sorted(tensors, key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {**(metadata or {}), "format": "pt"}}
    end = 0
    for name, tensor in ordered:
        if name in header:
            raise CheckpointError(f"tensor name {name} occurs twice or is reserved: rename one")
        if tensor.dtype not in _CODES:
            raise CheckpointError(
                f"tensor {name} has dtype {tensor.dtype}, which safetensors cannot hold: cast it"
            )
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for _, tensor in ordered:
                flat = tensor.detach().to("cpu").contiguous().reshape(-1)
                if flat.numel():
                    file.write(flat.view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return 8 + len(text) + end


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What `write_checkpoint` wrote: the folder, its weight files in order, tensors and their bytes."""

    folder: Path
    shards: tuple[str, ...]
    tensors: int
    bytes: int


def write_checkpoint(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    *,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
    files: Mapping[str, str | bytes | Path] | None = None,
    force: bool = False,
    verify: Callable[[Path], None] | None = None,
) -> Written:
    """Write a checkpoint folder; it appears whole or not at all.

    Everything is written to a hidden folder beside the target, which is then renamed. ``tensors`` is consumed as a
    stream: what is held at any time are the tensors of one shard.

    Args:
        folder: the target; an existing empty folder is used, any other is refused without ``force``.
        tensors: names and tensors, in the order in which shards are filled.
        config: content of ``config.json``.
        max_shard_bytes: a shard is closed before it would grow beyond this (a larger tensor gets its own).
        metadata: strings for the header of every shard.
        files: further files by name: text, bytes, or a path to copy from.
        force: replace an existing checkpoint folder. A folder that is not a checkpoint is never replaced.
        verify: called with the folder when all is in it and before it is renamed; what it raises undoes everything.

    Raises:
        CheckpointError: the target exists, or a tensor or file cannot be written.
    """
    if max_shard_bytes <= 0:
        raise CheckpointError(f"max_shard_bytes is {max_shard_bytes}: it must be positive")
    with new_folder(folder, force=force, owned=_is_checkpoint) as (temporary, target):
        written = _write_shards(temporary, target, tensors, max_shard_bytes, metadata)
        (temporary / CONFIG).write_text(_json(config), encoding="utf-8")
        for name, content in (files or {}).items():
            _write_file(temporary / name, content)
        if verify is not None:
            verify(temporary)
    return written


@contextlib.contextmanager
def new_folder(
    folder: str | Path, *, force: bool, owned: Callable[[Path], bool]
) -> Iterator[tuple[Path, Path]]:
    """A hidden folder to write to, which becomes ``folder`` when the block ends and vanishes when it fails.

    Args:
        folder: the target; an existing empty folder is used, any other is refused without ``force``.
        force: replace an existing folder, if it is ``owned``.
        owned: whether a folder is of the kind that is written, so that it may be replaced.

    Yields:
        The folder to write to, and the target's full path.

    Raises:
        CheckpointError: the target exists, or it cannot be written.
    """
    target = Path(folder).resolve()
    _check_target(target, force, owned)
    temporary = _sibling(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary, target
        _move_into_place(temporary, target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shards(
    temporary: Path,
    target: Path,
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int,
    metadata: Mapping[str, str] | None,
) -> Written:
    shard_of: dict[str, int] = {}
    total = shards = 0
    for shards, batch in enumerate(_batches(tensors, max_shard_bytes), start=1):
        total += sum(tensor.numel() * tensor.element_size() for _, tensor in batch)
        names = [name for name, _ in batch]
        twice = next((name for name in names if name in shard_of), None)
        if twice is not None:
            raise CheckpointError(f"tensor name {twice} occurs twice: rename one")
        shard_of |= dict.fromkeys(names, shards)
        write_safetensors(temporary / _numbered(shards), batch, metadata)
        batch.clear()  # before the next shard is gathered: one shard in memory, not two
    if not shards:
        raise CheckpointError(f"nothing to write to {target}: there are no tensors")
    if shards == 1:
        files = (SINGLE,)
    else:
        files = tuple(f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1))
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: files[i - 1] for name, i in sorted(shard_of.items())},
        }
        (temporary / INDEX).write_text(_json(index), encoding="utf-8")
    for i, name in enumerate(files, start=1):
        (temporary / _numbered(i)).rename(temporary / name)
    return Written(folder=target, shards=files, tensors=len(shard_of), bytes=total)


def _batches(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    batch: list[tuple[str, Tensor]] = []
    held = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if batch and held + size > max_bytes:
            yield batch
            batch, held = [], 0
        batch.append((name, tensor))
        held += size
        del tensor  # else this frame would hold one tensor of the next shard
    if batch:
        yield batch


def _numbered(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write_file(path: Path, content: str | bytes | Path) -> None:
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def _is_checkpoint(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def _check_target(target: Path, force: bool, owned: Callable[[Path], bool]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file: choose another name for the checkpoint folder")
    if not any(target.iterdir()):
        return
    if not force:
        raise CheckpointError(
            f"{target} exists and is not empty: choose another folder, or force to replace it"
        )
    # Forcing replaces a checkpoint; it must never empty a home folder that was named by mistake.
    if not owned(target) or any(entry.is_dir() for entry in target.iterdir()):
        raise CheckpointError(
            f"{target} is not a checkpoint folder, so it is not replaced: choose another folder"
        )


def _move_into_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    old = _sibling(target)
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
