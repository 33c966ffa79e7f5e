"""Where files that are built once and used again are kept.

One folder per user, by the platform's custom; nothing in it is needed for a result, everything can be built again.
What is built there appears by one rename, so it is complete or absent, and one process at a time builds it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from chiasm.errors import CheckpointError

__all__ = ["cache_dir", "locked", "publish", "sweep", "sync", "sync_folder"]

_ENVIRONMENT = "CHIASM_CACHE"
_STALE_SECONDS = 3600.0


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


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold an advisory lock, where the system has one, so that two processes do not do the same work."""
    try:
        import fcntl
    except ImportError:  # Windows: the rename alone decides
        yield
        return
    with file.open("a+b") as handle:
        # Some network file systems refuse locks; then both processes convert and the first rename wins.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def publish(work: Path, folder: Path, complete: Callable[[Path], bool]) -> None:
    """Rename ``work`` to ``folder``; a complete folder of another process stays, a damaged one makes way."""
    for _ in range(2):
        try:
            os.rename(work, folder)
        except OSError:
            if complete(folder):
                return
            if not folder.exists():
                raise
            aside = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.tmp-")
            os.rename(folder, Path(aside) / "damaged")
            shutil.rmtree(aside, ignore_errors=True)
        else:
            sync_folder(folder.parent)
            return
    raise CheckpointError(f"{folder}: cannot be replaced: delete this folder and try again")


def sweep(folder: Path) -> None:
    """Remove what an interrupted build left behind, unless it may still be running."""
    for left in folder.parent.glob(f".{folder.name}.tmp-*"):
        with contextlib.suppress(OSError):
            newest = max((f.stat().st_mtime for f in [left, *left.iterdir()]), default=0.0)
            if time.time() - newest > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def sync(handle: IO[bytes]) -> None:
    """Wait until what was written is on the disk."""
    handle.flush()
    os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """The same for the names in a folder."""
    if os.name != "posix":  # other systems cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
