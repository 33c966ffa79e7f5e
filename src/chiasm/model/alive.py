"""LiveBytes: bytes of the tensors that are alive while code runs, and the most there ever were.

It sees every operation that PyTorch dispatches, forward and backward, and follows the storages of their results until
they are freed; views and results written in place are no new storages. On any device, the CPU included, where PyTorch
keeps no such count. What kernels allocate for themselves (workspaces) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """A context in which storages are counted.

    Args:
        given: tensors that exist before (parameters, buffers, a batch): counted from the start.

    Attributes:
        now: bytes alive. peak: the most since the beginning or the last `restart`.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        for tensor in given:
            self._meet(tensor)

    def restart(self) -> None:
        """Measure the peak anew from what is alive now."""
        self.peak = self.now

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if not size or key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        self._known.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        there = {
            x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in there:
                self._meet(x)
        return out
