"""Tiny stand-ins for the downloaded archives, and an empty assets folder for every test."""

import base64
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chiasm.worlds.assets import CIFAR_MEMBER, FASHION_FOLDER
from chiasm.worlds.cifar10 import ANSWERS


@pytest.fixture(autouse=True)
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "assets"
    monkeypatch.setenv("CHIASM_DATA", str(folder))
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_deb(path: Path, files: dict[str, bytes], *, compression: str = "xz") -> None:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode=f"w:{compression}") as tar:
        for name, data in files.items():
            add(tar, f"./{name}", data)
    out = b"!<arch>\n"
    for name, data in (
        ("debian-binary", b"2.0\n"),
        ("control.tar", b"odd"),
        (f"data.tar.{compression}", body.getvalue()),
    ):
        out += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
            + data
            + b"\n" * (len(data) % 2)
        )
    path.write_bytes(out)


@pytest.fixture
def deb_writer() -> Callable[..., None]:
    return write_deb


def write_bigbench(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    names = list(ANSWERS)
    examples = []
    for image, label in zip(images, labels, strict=True):
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        scores = {name: float(k == label) for k, name in enumerate(names)}
        examples.append({"input": base64.b64encode(png.getvalue()).decode(), "target_scores": scores})
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "bigbench-1.0.0/README.md", b"text")
        add(tar, f"bigbench-1.0.0/{CIFAR_MEMBER}", json.dumps({"examples": examples}).encode())


def idx(values: np.ndarray) -> bytes:
    sizes = b"".join(int(size).to_bytes(4, "big") for size in values.shape)
    return gzip.compress(bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes())


@pytest.fixture
def pictures() -> dict[str, np.ndarray]:
    """100 random stand-ins for CIFAR-10 (10 a class) and 40 + 20 for Fashion-MNIST."""
    rng = np.random.default_rng(5)
    return {
        "cifar": rng.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8),
        "cifar_labels": rng.permutation(np.repeat(np.arange(10), 10)),
        "train": rng.integers(0, 256, (40, 28, 28), dtype=np.uint8),
        "train_labels": np.tile(np.arange(10), 4),
        "test": rng.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        "test_labels": np.tile(np.arange(10), 2),
    }


@pytest.fixture
def downloads(tmp_path: Path, pictures: dict[str, np.ndarray]) -> Path:
    """A folder with the archives as a user would have downloaded them."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    write_bigbench(folder / "bigbench-1.0.0.tar.gz", pictures["cifar"], pictures["cifar_labels"])
    files = {
        f"{FASHION_FOLDER}/train-images-idx3-ubyte.gz": idx(pictures["train"]),
        f"{FASHION_FOLDER}/train-labels-idx1-ubyte.gz": idx(pictures["train_labels"]),
        f"{FASHION_FOLDER}/t10k-images-idx3-ubyte.gz": idx(pictures["test"]),
        f"{FASHION_FOLDER}/t10k-labels-idx1-ubyte.gz": idx(pictures["test_labels"]),
        "usr/share/doc/dataset-fashion-mnist/copyright": b"MIT",
    }
    write_deb(folder / "dataset-fashion-mnist_0.0_all.deb", files)
    return folder
