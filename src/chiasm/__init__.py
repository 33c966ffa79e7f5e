"""Chiasm: where vision and language cross.

``chiasm.load(path_or_id)`` returns a model that answers questions about pictures; ``Reply`` is what it
answers and ``ModelInputs`` what it reads. Names are resolved on first use, so ``import chiasm`` is cheap and
loads no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from chiasm.errors import ChiasmError

if TYPE_CHECKING:
    from chiasm.hub import load
    from chiasm.model.chat import ModelInputs, Reply

__version__ = "0.1.0"

__all__ = ["ChiasmError", "ModelInputs", "Reply", "__version__", "load"]

# Public name -> module that defines it; strings, so that neither PyTorch nor the rings load on import.
_HOMES = {
    "load": "chiasm.hub",
    "Reply": "chiasm.model.chat",
    "ModelInputs": "chiasm.model.chat",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'chiasm' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
