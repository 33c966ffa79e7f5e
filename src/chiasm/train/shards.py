"""Checkpoints written by several processes, and read by any other number of them.

What: ``write`` (each process its own part, through ``torch.distributed.checkpoint``), ``sizes`` and ``read`` (into
whatever tensors the reader has: whole ones, or its parts). The files are safetensors, so no pickle is read; a
checkpoint of one process is a special case that the same reader understands.

A folder of them holds ``shard-00001-….safetensors`` and so on. Several machines need a file system that they share.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiasm.errors import CheckpointError

__all__ = ["read", "read_whole", "sizes", "write"]


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors; every process calls this with the same names. Whole tensors are written once.

    Raises:
        OSError: a process could not write its part; raised in all of them.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    try:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(dict(tensors), storage_writer=writer)  # pyright: ignore[reportPrivateImportUsage]
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        raise OSError(f"process {rank}: {first}") from error


def sizes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of each whole tensor in the folder's safetensors files."""
    metadata = _reader(folder).read_metadata().state_dict_metadata
    return {name: (tuple(m.size), m.properties.dtype) for name, m in metadata.items()}  # type: ignore[union-attr]


def read(folder: Path, into: dict[str, Tensor], *, together: bool) -> None:
    """Fill the tensors, whole or parts of divided ones, from the files, which may hold more.

    Args:
        folder: of safetensors files.
        into: name -> tensor of the stored shape and dtype.
        together: all processes are doing this; False: this one reads on its own, whole tensors only.

    Raises:
        CheckpointError: a name is missing, or a file is damaged.
    """
    import torch.distributed.checkpoint as dcp

    missing = sorted(into.keys() - sizes(folder).keys())
    if missing:
        raise CheckpointError(
            f"{folder} lacks {missing[0]!r}: delete the checkpoint to resume from the one before"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader = _reader(folder)
        dcp.load(into, storage_reader=reader, no_dist=not together)  # pyright: ignore[reportPrivateImportUsage]


def read_whole(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of the folder, whole; for one process."""
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in sizes(folder).items()}
    read(folder, tensors, together=False)
    return tensors


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder))
