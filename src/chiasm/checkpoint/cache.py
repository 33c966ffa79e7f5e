"""Where files that are built once and used again are kept.

One folder per user, by the platform's custom; nothing in it is needed for a result, everything can be built again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["cache_dir"]

_ENVIRONMENT = "CHIASM_CACHE"


def cache_dir() -> Path:
    """Return the absolute path of Chiasm's cache folder; it is not created here.

    ``CHIASM_CACHE`` names the folder itself. Without it, ``chiasm`` in ``$XDG_CACHE_HOME`` or ``~/.cache`` on Linux,
    in ``~/Library/Caches`` on macOS, in ``%LOCALAPPDATA%`` on Windows. The variable only says where things are
    stored, never what they contain.
    """
    chosen = os.environ.get(_ENVIRONMENT, "").strip()
    if chosen:
        return Path(chosen).expanduser().absolute()
    return _platform_root() / "chiasm"


def _platform_root() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", "")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    # The XDG rule: a relative path there is to be ignored.
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return Path(xdg) if xdg and Path(xdg).is_absolute() else Path.home() / ".cache"
