"""chiasm.load: names, folders, devices and what is said when there is no such thing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import write_internvl

import chiasm
from chiasm import hub
from chiasm.errors import CheckpointError, ConfigError, MissingExtraError, TemplateError, UsageError
from chiasm.model.chat import ChatModel, Chats


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_internvl(tmp_path_factory.mktemp("models") / "tiny")


def test_load_is_the_public_one() -> None:
    assert chiasm.load is hub.load
    assert hub.names() == ("chiasm-mini", "smollm2")


def test_a_folder_is_loaded_with_its_options(tiny: Path) -> None:
    model = hub.load(tiny, dtype="bfloat16", device="cpu", deterministic=True, max_tiles=2, template="chatml")
    assert isinstance(model, ChatModel)
    assert isinstance(model, Chats)
    assert model.name == "tiny"
    assert model.deterministic
    assert model.spec.tiles.max_tiles == 2
    assert model.spec.template.name == "chatml"
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    assert hub.load(str(tiny)).spec.template.name == "internvl2_5"


def test_options_left_at_none_are_not_given(tiny: Path) -> None:
    assert hub.load(tiny, template=None, max_tiles=None, system=None).spec.tiles.max_tiles == 6


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "chiasm-mni",
            "unknown model 'chiasm-mni' (did you mean chiasm-mini?): known are chiasm-mini, smollm2",
        ),
        ("zzz", "unknown model 'zzz': known are chiasm-mini, smollm2; or give a folder"),
        ("./nowhere", "there is no folder ./nowhere"),
        (Path("nowhere"), "there is no folder nowhere"),
        (Path("smollm2"), "there is no folder smollm2"),
    ],
)
def test_unknown_names_get_one_helpful_line(name: str | Path, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        hub.load(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_an_id_of_a_hub(tiny: Path) -> None:
    assert hub.hub_id("OpenGVLab/InternVL2_5-1B") == ("OpenGVLab/InternVL2_5-1B", None)
    assert hub.hub_id("OpenGVLab/InternVL2_5-1B", "v1") == ("OpenGVLab/InternVL2_5-1B", "v1")
    assert hub.hub_id("OpenGVLab/InternVL2_5-1B@refs/pr/2") == ("OpenGVLab/InternVL2_5-1B", "refs/pr/2")
    assert hub.hub_id("a/b@v1", "v1") == ("a/b", "v1")
    for other in ("chiasm-mini", "./a/b", "a/b/c", "/a/b", "a\\b", "a/b@", "a/b@v 1", str(tiny), Path("a/b")):
        assert hub.hub_id(other) is None
    with pytest.raises(UsageError, match="contradict each other"):
        hub.hub_id("a/b@v1", "v2")


def test_only_models_of_a_hub_have_revisions(tiny: Path) -> None:
    for name in ("chiasm-mini", "smollm2", tiny, str(tiny)):
        with pytest.raises(UsageError, match="has no revisions: only models of a hub do"):
            hub.load(name, revision="main")


def test_without_a_network_an_unknown_id_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="OpenGVLab/InternVL2_5-1B at main is not complete") as caught:
        hub.load("OpenGVLab/InternVL2_5-1B")
    assert "\n" not in str(caught.value)


def test_the_missing_extra_names_model_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"OpenGVLab/InternVL2_5-1B.*pip install 'chiasm\[hub\]'"):
        hub.load("OpenGVLab/InternVL2_5-1B")


def test_options_are_checked_before_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="option 'tiles' is not known"):
        hub.load("a/b", tiles=3)
    with pytest.raises(ConfigError, match="dtype 'float8'"):
        hub.load("a/b", dtype="float8")


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a" * 300, "/" + "a" * 300])
def test_names_that_no_folder_can_have_are_one_line(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder|unknown model") as caught:
        hub.load(name)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        hub.load(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError):
        hub.load(tmp_path)


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "meta", "xpu", "cpu:x"])
def test_devices_that_are_not_there_are_refused(tiny: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=r"is not (known|available here): use cpu") as caught:
        hub.load(tiny, device=device)
    assert "\n" not in str(caught.value)


def test_wrong_settings_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("not even JSON")
    with pytest.raises(ConfigError, match="dtype 'float8'"):
        hub.load(tmp_path, dtype="float8")
    with pytest.raises(TemplateError, match="unknown chat template 'vicuna'"):
        hub.load(tmp_path, template="vicuna")


def test_unknown_options_are_refused(tiny: Path) -> None:
    with pytest.raises(UsageError, match="option 'tiles' is not known: use one of"):
        hub.load(tiny, tiles=3)
    with pytest.raises(UsageError, match="option 'image_size' is not known"):
        hub.load(tiny, image_size=56)
    for name, option in (("chiasm-mini", "min_tiles"), ("chiasm-mini", "mode"), ("smollm2", "max_tiles")):
        with pytest.raises(UsageError, match=f"option '{option}' is not known for this model"):
            hub.load(name, **{option: 3})  # type: ignore[arg-type]


def test_the_bundled_model_takes_any_limit_of_tiles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[dict] = []
    monkeypatch.setattr(
        "chiasm.systems.internvl.mini.load_mini", lambda folder, **given: calls.append(given) or "model"
    )
    for count in (1, None):
        assert hub.load("chiasm-mini", max_tiles=count) == "model"
    assert caplog.messages == []
    assert hub.load("chiasm-mini", max_tiles=12) == "model"
    assert caplog.messages == ["this model takes every picture as one tile: max_tiles 12 changes nothing"]
    assert all("max_tiles" not in given for given in calls)
    for count in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="max_tiles must be a whole number of at least 1"):
            hub.load("chiasm-mini", max_tiles=count)
    assert len(calls) == 3


def test_a_bundle_is_told_by_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chiasm-mini"}))
    with pytest.raises(CheckpointError, match="not that of a whole chiasm-mini bundle"):
        hub.load(tmp_path)


def test_the_hub_alone_loads_no_torch() -> None:
    code = "import sys, chiasm.hub; chiasm.hub.names(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
