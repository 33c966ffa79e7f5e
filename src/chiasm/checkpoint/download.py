"""A checkpoint of a model hub as a folder: what is needed and nothing that can run.

The transfer and the cache are `huggingface_hub`'s (extra `hub`): its cache is shared with other programs, a broken
connection is taken up where it broke, complete files are never fetched again, and `HF_ENDPOINT`, `HF_HUB_CACHE`,
`HF_HUB_OFFLINE` and `HF_TOKEN` mean what they mean there. What is asked for is decided here: first the small files of
the repository's top folder (`*.json`, `*.txt`, `tokenizer.model`), then the safetensors that the index names. Python
files and pickles are never fetched; a repository that has only those is refused.

Without a network the library takes whatever is in the cache, also what another program has fetched in part. So the
names of a commit's small files are noted in Chiasm's own cache when the hub is asked, and compared ever after.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from chiasm.checkpoint.cache import cache_dir
from chiasm.checkpoint.store import CONFIG, INDEX, MAX_HEADER_BYTES, SINGLE, read_json
from chiasm.errors import CheckpointError, ChiasmError, MissingExtraError

__all__ = ["SMALL", "Fetched", "check_sums", "fetch"]

SMALL = ("*.json", "*.txt", "tokenizer.model")
"""What is fetched beside the weights; only from the top folder."""

_log = logging.getLogger("chiasm.checkpoint")
_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_ATTEMPTS = 4
_BREAKS = frozenset(
    {
        *("RemoteProtocolError", "ReadError", "ReadTimeout", "ChunkedEncodingError", "IncompleteRead"),
        *("ProtocolError", "ConnectionResetError"),
    }
)
_TRANSPORTS = frozenset({"requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "ssl", "hf_xet"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A checkpoint that is on this machine.

    Attributes:
        repo: its id on the hub.
        commit: full hash of the revision.
        folder: where its files are; weights are links into the hub's cache.
        weights: names of the weight files.
    """

    repo: str
    commit: str
    folder: Path
    weights: tuple[str, ...]


def fetch(repo: str, revision: str | None = None, *, stream: TextIO | None = None) -> Fetched:
    """Make sure that a checkpoint of the hub is on this machine, whole.

    Args:
        repo: ``OWNER/NAME``.
        revision: a branch, a tag or a commit; None for the repository's default branch.
        stream: where progress is drawn, if that is a terminal; None for stderr.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        CheckpointError: there is no such repository or revision, access is refused, the hub cannot be reached and the
            cache does not have it, a file arrives damaged, or there are no safetensors. One line each, with the remedy.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError(
            f"there is no folder {repo}, and to download it huggingface_hub is needed, which is not installed: "
            "run pip install 'chiasm[hub]'"
        ) from error
    del huggingface_hub
    asked = revision or "main"
    folder = _snapshot(repo, asked, SMALL, None)
    _check_small(folder, repo, asked)
    weights = _weights(folder, repo)
    # A commit's files never change: what is there is not asked about again (without a network, some versions of the
    # library would try for half a minute first).
    missing = [name for name in weights if not (folder / name).is_file()]
    if missing:
        with _drawn(repo, stream or sys.stderr) as bar:
            folder = _snapshot(repo, folder.name, weights, bar, asked=asked)
        missing = [name for name in weights if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(_why_missing(repo, folder.name, missing))
    for name in weights:
        _check_size(folder / name, repo)
    return Fetched(repo=repo, commit=folder.name, folder=folder, weights=weights)


def _check_small(folder: Path, repo: str, asked: str) -> None:
    """CheckpointError unless the small files are all there, or, where nobody knows which there are, the needed ones."""
    from huggingface_hub import constants

    names = _small_names(repo, folder.name)
    if names is not None and CONFIG not in names:
        raise CheckpointError(f"{repo} has no {CONFIG}: it is not a model in a layout of transformers")
    missing = [name for name in names or (CONFIG,) if not (folder / name).is_file()]
    if names is None and not missing and read_json(folder / CONFIG).get("model_type") != "chiasm-mini":
        missing = [] if any((folder / name).is_file() for name in _TOKENIZERS) else ["a tokenizer"]
    if missing:
        raise CheckpointError(
            f"{repo} at {asked} is not complete in the cache {constants.HF_HUB_CACHE} (it lacks {missing[0]}): run it "
            "once with a network"
        )
    if names is None:
        _log.warning(
            "%s: the hub cannot be asked whether its files in the cache are complete; run it once with a network",
            repo,
        )


def _small_names(repo: str, commit: str) -> list[str] | None:
    """Names of a commit's small files, as noted earlier or else by the hub; None where neither says."""
    from huggingface_hub import HfApi, constants

    note = cache_dir() / "hub" / repo.replace("/", "--") / f"{commit}.json"
    with contextlib.suppress(OSError, ValueError):
        noted = json.loads(note.read_text(encoding="utf-8"))
        if isinstance(noted, list) and all(isinstance(name, str) for name in noted):
            return noted
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        with _quiet():
            files = [file.rfilename for file in HfApi().model_info(repo, revision=commit).siblings or ()]
    except Exception:  # not reachable, which was no obstacle so far
        return None
    small = [name for name in files if "/" not in name and any(fnmatch.fnmatchcase(name, p) for p in SMALL)]
    with contextlib.suppress(OSError):  # without a note, it is asked again
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, encoding="utf-8", delete=False) as out:
            json.dump(sorted(small), out)
        os.replace(out.name, note)
    return small


def _weights(folder: Path, repo: str) -> tuple[str, ...]:
    """Names of the weight files, by the index where there is one."""
    if not (folder / INDEX).is_file():
        return (SINGLE,)
    table = read_json(folder / INDEX).get("weight_map")
    names = sorted(set(table.values())) if isinstance(table, dict) and _are_names(table.values()) else []
    if not names:
        raise CheckpointError(f"{repo}: its {INDEX} names no safetensors of its own folder: choose another")
    return tuple(names)


def _are_names(values: Any) -> bool:
    """Whether all are plain safetensors file names; in patterns, brackets would mean something else."""
    return all(
        isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\*?[]:\0")
        for name in values
    )


def _snapshot(
    repo: str, revision: str, patterns: tuple[str, ...], bar: type | None, *, asked: str | None = None
) -> Path:
    """The snapshot's folder with the files of these patterns; its name is the commit."""
    from huggingface_hub import snapshot_download

    for attempt in range(_ATTEMPTS):
        try:
            with _quiet():
                return Path(
                    snapshot_download(
                        repo,
                        revision=revision,
                        allow_patterns=list(patterns),
                        ignore_patterns=["*/*", "*.py", *(f"*{ending}" for ending in _PICKLES)],
                        tqdm_class=bar or _silent(),
                    )
                )
        except Exception as error:
            # Some versions of the library take a broken transfer up by themselves, others only when called again.
            if _broke(error) and attempt < _ATTEMPTS - 1:
                time.sleep(attempt)
                continue
            failure = _explained(error, repo, asked or revision)
            if failure is None:
                raise
            raise failure from error
    raise AssertionError("the last attempt returns or raises")


def _broke(error: BaseException) -> bool:
    """Whether a transfer that had begun was cut off."""
    return any(type(link).__name__ in _BREAKS for link in _chain(error))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own log lines and bars: what fails is said once, by us."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    log = logging.getLogger("huggingface_hub")
    level, off = log.level, are_progress_bars_disabled()
    log.setLevel(logging.CRITICAL)
    try:
        if not off:
            disable_progress_bars()
        yield
    finally:
        log.setLevel(level)
        if not off:
            enable_progress_bars()


# --- what went wrong -------------------------------------------------------------------------------------------------


def _explained(error: Exception, repo: str, revision: str) -> ChiasmError | None:
    """The one line for a failed transfer; None for what nobody foresaw."""
    from huggingface_hub import constants, errors

    host = constants.ENDPOINT
    login = "log in with hf auth login, or set HF_TOKEN"
    chain = list(_chain(error))

    def found(*kinds: type[BaseException]) -> Any:
        return next((link for link in chain if isinstance(link, kinds)), None)

    answers = (getattr(getattr(link, "response", None), "status_code", None) for link in chain)
    status = next((answer for answer in answers if answer is not None), None)
    if found(errors.GatedRepoError):
        text = f"{repo} is gated: accept its terms at {host}/{repo}, then {login}"
    elif found(errors.RevisionNotFoundError):
        text = f"{repo} has no revision {revision!r} at {host}: give one of its branches, tags or commits"
    elif found(errors.RepositoryNotFoundError):
        text = (
            f"there is no folder {repo}, and no model of that name at {host}: correct the name "
            f"(or, if it is private, {login})"
        )
    elif status in (401, 403):
        text = f"{repo}: {host} refuses access ({status}): {login}"
    elif status is not None:
        text = f"{repo}: {host} answered {status}: try again later"
    elif found(errors.HFValidationError):
        text = f"{repo} is not a possible name of a model at {host}: give OWNER/NAME, or a folder"
    elif constants.HF_HUB_OFFLINE or found(errors.OfflineModeIsEnabled):
        text = (
            f"{repo} at {revision} is not complete in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: "
            "run it once with a network"
        )
    elif any("Consistency check failed" in str(link) for link in chain):
        text = f"{repo}: a file arrived truncated from {host}: run it again (complete files are kept)"
    elif any(isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT) for link in chain):
        text = f"{repo}: no room left in {constants.HF_HUB_CACHE}: free some, or set HF_HUB_CACHE"
    elif found(PermissionError):
        text = f"{repo}: the cache {constants.HF_HUB_CACHE} cannot be written: set HF_HUB_CACHE to another folder"
    elif _broke(error):
        text = f"{repo}: the connection to {host} broke several times: run it again (complete files are kept)"
    elif found(ConnectionError, TimeoutError, errors.LocalEntryNotFoundError) or any(
        type(link).__module__.partition(".")[0] in _TRANSPORTS for link in chain
    ):
        text = (
            f"{repo} at {revision} is not complete in the cache, and {host} cannot be reached: check the network and "
            "run it again, or set HF_ENDPOINT to a mirror"
        )
    else:
        return None
    return CheckpointError(text)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what caused it, outermost first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _why_missing(repo: str, commit: str, missing: list[str]) -> str:
    """Why a snapshot came without its weights."""
    from huggingface_hub import HfApi, constants

    try:
        with _quiet():
            files = [file.rfilename for file in HfApi().model_info(repo, revision=commit).siblings or ()]
    except Exception:  # not reachable: what is known without it is said
        return (
            f"{repo}: {missing[0]} is not in the cache {constants.HF_HUB_CACHE}: run it once with a network"
        )
    pickles = sorted(name for name in files if name.endswith(_PICKLES))
    there = [name for name in files if name.endswith(".safetensors")]
    if there and missing != [SINGLE]:
        return (
            f"{repo} lacks {missing[0]}, which its index names: tell its authors, or choose another revision"
        )
    if there:
        return (
            f"{repo} has {there[0]} but neither {SINGLE} nor {INDEX}: it is not a checkpoint of transformers"
        )
    if pickles:
        return (
            f"{repo} has only pickled weights ({pickles[0]}), which can run code when read: "
            "choose a repository or revision with safetensors"
        )
    return f"{repo} has no weights: choose another repository or revision"


def _check_size(path: Path, repo: str) -> None:
    """CheckpointError where a weight file is shorter or longer than its own header says."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 8 + length <= min(size, MAX_HEADER_BYTES) else {}
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = bool(header) and 8 + length + max(ends, default=0) == size
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"{repo}: {path.name} in the cache is truncated or damaged ({size} bytes): "
            f"delete {path.resolve()} and {path}, then run it again"
        )


def check_sums(fetched: Fetched) -> int:
    """Compare the weights with the hub's SHA-256, which names them in its cache; return how many were compared.

    Raises:
        CheckpointError: one differs.
    """
    compared = 0
    for name in fetched.weights:
        blob = (fetched.folder / name).resolve()
        if len(blob.name) != 64 or set(blob.name) - set("0123456789abcdef"):
            continue  # a cache without links, or a file that is small enough to be in git itself
        with blob.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != blob.name:
            raise CheckpointError(
                f"{fetched.repo}: {name} does not have the SHA-256 of the hub: delete {blob} and run it again"
            )
        compared += 1
    return compared


# --- progress --------------------------------------------------------------------------------------------------------


def _silent() -> type:
    """A bar that is never drawn."""
    from tqdm.auto import tqdm

    class Silent(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **given: Any) -> None:
            given.pop("name", None)
            super().__init__(*args, **{**given, "disable": True})

    return Silent


@contextlib.contextmanager
def _drawn(repo: str, stream: TextIO) -> Iterator[type]:
    """A class of bars for the library, all of them drawn as one line on a terminal, and not at all elsewhere.

    The library's versions differ in what they count: bytes of all files (since 1.0, some twice), or files.
    """
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        yield _silent()
        return
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from tqdm.auto import tqdm

    stream.write("\r\x1b[K")  # whatever is said to be waited for
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    console = Console(file=stream, force_terminal=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as shown:
        task = shown.add_task(repo, total=None, amount="")
        bars: list[Any] = []

        class Drawn(tqdm):  # type: ignore[misc]
            def __init__(self, *args: Any, **given: Any) -> None:
                given.pop("name", None)
                super().__init__(*args, **{**given, "disable": False, "gui": True})
                bars.append(self)

            def display(self, *_: Any, **__: Any) -> None:
                counted = [bar for bar in bars if bar.unit == "B" and bar.total] or bars
                furthest = max(counted, key=lambda bar: bar.n, default=None)
                if furthest is None:
                    return
                done, total, of_bytes = furthest.n, furthest.total, furthest.unit == "B"
                said = [decimal(int(n)) if of_bytes else f"{int(n)}" for n in (done, total or 0)]
                amount = f"{said[0]} of {said[1]}{'' if of_bytes else ' files'}"
                shown.update(task, completed=done, total=total, amount=amount)

            def close(self) -> None:
                if not self.disable:
                    self.display()
                super().close()

            def clear(self, *_: Any, **__: Any) -> None:
                """Nothing of its own is on the screen."""

        yield Drawn
