"""chiasm doctor --verify: a row of docs/checkpoints.md for a checkpoint of a (mock) hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli.conftest import Run

from chiasm.cli import doctor
from mock_hub import MockHub, closed_port, point_at

ID = "OpenGVLab/InternVL2_5-tiny"


@pytest.fixture(scope="module")
def server() -> Iterator[MockHub]:
    with MockHub().running() as hub:
        yield hub


@pytest.fixture
def hub(server: MockHub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MockHub:
    server.reset()
    server.push_folder(ID, tiny)
    point_at(server.url, tmp_path / "cache", monkeypatch)
    return server


def test_a_checkpoint_that_loads_gets_a_row(hub: MockHub, run: Run) -> None:
    ran = run("doctor", "--verify", ID, "--device", "cpu")
    assert ran.code == 0, ran.err
    (row,) = ran.out.splitlines()
    cells = [cell.strip() for cell in row.replace("\\|", "/").strip("|").split("|")]
    assert cells[:2] == [f"`{ID}`", "qwen2"]
    assert cells[2].startswith(f"verified: {hub.repos[ID]['main'][:12]}, 20")
    assert "tensors" in cells[3]
    assert "float32 on cpu" in cells[3]
    found = json.loads(run("doctor", "--verify", f"{ID}@main", "--device", "cpu", "--json").out)
    assert found["verified"] is True
    assert found["commit"] == hub.repos[ID]["main"]
    assert found["checksums"] > 1
    assert 0 < found["tokens"] <= 32


def broken(hub: MockHub, tiny: Path, change) -> None:
    """Push the checkpoint with one weight file changed."""
    path = sorted(tiny.glob("*.safetensors"))[0]
    tensors = load_file(path)
    change(tensors)
    out = Path(hub.url.rpartition(":")[2] + ".safetensors")
    out = tiny.parent / out.name
    save_file(tensors, out, {"format": "pt"})
    hub.push_folder(ID, tiny, **{path.name: out.read_bytes()})
    out.unlink()


def test_one_that_does_not_gets_the_reason(hub: MockHub, tiny: Path, run: Run) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        tensors["something.else"] = tensors.pop(next(iter(tensors)))

    broken(hub, tiny, drop)
    ran = run("doctor", "--verify", ID, "--device", "cpu")
    assert ran.code == 1
    (row,) = ran.out.splitlines()
    assert row.startswith(f"| `{ID}` |  | unverified | {ID}: ")
    assert len(ran.err.splitlines()) == 1
    assert ran.err.startswith(f"error: {ID}: ")


def test_weights_that_are_not_numbers_are_not_verified(hub: MockHub, tiny: Path, run: Run) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.fill_(float("nan"))

    broken(hub, tiny, spoil)
    ran = run("doctor", "--verify", ID, "--device", "cpu", "--json")
    assert ran.code == 1
    assert "its logits are not finite" in json.loads(ran.out)["error"]


@pytest.mark.parametrize("links", [True, False])
def test_without_a_checksum_of_every_weight_file_it_is_not_verified(
    hub: MockHub, tiny: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Weights in git itself have no SHA-256 on the hub, and a cache without links does not keep it."""
    names = [path.name for path in tiny.glob("*.safetensors")]
    if links:
        monkeypatch.setattr("mock_hub._lfs", lambda name: name.endswith(".safetensors") and name != names[0])
    else:
        monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda _=None: False)
    ran = run("doctor", "--verify", ID, "--device", "cpu", "--json")
    assert ran.code == 1
    found = json.loads(ran.out)
    assert found["verified"] is False
    done = len(names) - 1 if links else 0
    assert f"only {done} of {len(names)} weight files could be compared with a SHA-256" in found["error"]
    assert "| unverified |" in run("doctor", "--verify", ID, "--device", "cpu").out


def test_the_dtype_is_what_the_remedy_says(hub: MockHub, run: Run) -> None:
    ran = run("doctor", "--verify", ID, "--device", "cpu", "--dtype", "bfloat16", "--json")
    assert json.loads(ran.out)["dtype"] == "bfloat16"
    hub.requests.clear()
    assert "dtype 'float8'" in run("doctor", "--verify", ID, "--dtype", "float8").error_line
    assert hub.requests == []
    assert run("doctor", "--dtype", "float32").code == 2


def test_without_a_hub_the_row_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    point_at(f"http://127.0.0.1:{closed_port()}", tmp_path, monkeypatch)
    ran = run("doctor", "--verify", ID)
    assert ran.code == 1
    assert "| unverified |" in ran.out
    assert "cannot be reached" in ran.out


def test_what_makes_no_sense_is_refused(run: Run, tmp_path: Path) -> None:
    assert "give the id of a model on a hub" in run("doctor", "--verify", "chiasm-mini").error_line
    assert run("doctor", "--verify", str(tmp_path)).code == 2
    assert run("doctor", "--verify", ID, "--fetch").code == 2
    assert run("doctor", "--device", "cpu").code == 2


def test_doctor_says_how_models_would_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("http://127.0.0.1:9", tmp_path, monkeypatch, offline=True)
    state = doctor._hub()
    assert state is not None
    assert (state["endpoint"], state["offline"], state["cache"]) == (
        "http://127.0.0.1:9",
        True,
        str(tmp_path),
    )
    assert "offline by HF_HUB_OFFLINE" in doctor._hub_line(state)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert doctor._hub() is None
    assert "pip install 'chiasm[hub]'" in doctor._hub_line(None)
