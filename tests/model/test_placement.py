"""A model cut into runs of layers: the cut against all others, and rows that move from device to device."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cli.conftest import write_internvl
from tests.contracts import internvl

import chiasm
from chiasm import hub
from chiasm.data.sequence import Sequence
from chiasm.errors import ConfigError
from chiasm.model.placement import Placement, cut, place
from chiasm.model.quantize import Quantization
from chiasm.systems.internvl.load import has_bfloat16, load_folder
from chiasm.systems.internvl.model import build_internvl

CPU, META = torch.device("cpu"), torch.device("meta")


def fullest(layers: list[int], first: int, last: int, room: list[int], where: tuple[int, ...]) -> float:
    loads = [0] * len(room)
    loads[0] += first
    loads[-1] += last
    for size, device in zip(layers, where, strict=True):
        loads[device] += size
    return max(load / free for load, free in zip(loads, room, strict=True))


@given(
    layers=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    first=st.integers(0, 20),
    last=st.integers(0, 20),
    room=st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
@settings(max_examples=150)
def test_no_other_cut_is_better(layers: list[int], first: int, last: int, room: list[int]) -> None:
    found = tuple(cut(layers, first, last, room))
    assert found == tuple(sorted(found))
    ways = itertools.combinations_with_replacement(range(len(room)), len(layers))
    best = min(fullest(layers, first, last, room, where) for where in ways)
    assert fullest(layers, first, last, room, found) == pytest.approx(best)


def test_a_full_first_device_gets_fewer_layers() -> None:
    assert cut([10] * 8, 40, 0, [100, 100]) == [0, 0, 1, 1, 1, 1, 1, 1]
    assert cut([10] * 6, 0, 0, [100, 50]) == [0, 0, 0, 0, 1, 1]
    assert cut([10] * 3, 500, 0, [100, 100]) == [1, 1, 1]


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_its_place(tied: bool) -> None:
    config = replace(internvl.CONFIG, language=replace(internvl.CONFIG.language, layers=4, tie_words=tied))
    model = build_internvl(config)
    where = Placement(model, (CPU, META), torch.float32)
    place(model, where)
    assert model.trunk.devices == where.of_layer
    assert set(where.of_layer) == {CPU, META}
    assert where.of_layer[-1] == where("trunk.norm.weight") == META
    assert where("trunk.layers.0.attn.qkv.weight") == where("embedder.vision.class_embedding") == CPU
    assert where("embedder.words.weight") == CPU
    assert where("head.weight") == (CPU if tied else META)


def test_rows_move_with_the_layers() -> None:
    """The second device computes nothing but checks, as any device does, that all it is given lies on it."""
    config = replace(internvl.CONFIG, language=replace(internvl.CONFIG.language, layers=4, tie_words=False))
    model = build_internvl(config).requires_grad_(False)
    where = Placement(model, (CPU, META), torch.float32)
    place(model, where)
    layers = model.trunk.layers
    for layer, device in zip(layers, where.of_layer, strict=True):
        layer.to(device)
    model.trunk.norm.to(META)
    model.head.to(META)
    assert [next(layer.parameters()).device for layer in layers] == list(model.trunk.devices)
    assert model.device == CPU
    rows = Sequence.of_text(torch.arange(5))
    cache = model.new_cache()
    for _ in range(2):  # with and without a past
        hidden = model.hidden(rows, cache)
        assert hidden.shape == (5, layers[0].norm1.weight.shape[0])
        assert hidden.device == META
    assert model.head.logits(hidden).shape[0] == 5


@pytest.mark.parametrize("of_layer", [(CPU,) * 4, (META,) * 4, (CPU, CPU, META, META)])
def test_a_device_may_have_no_layer(of_layer: tuple[torch.device, ...]) -> None:
    """A big encoder may fill the first device, a big head the last."""
    config = replace(internvl.CONFIG, language=replace(internvl.CONFIG.language, layers=4, tie_words=False))
    model = build_internvl(config).requires_grad_(False)
    model.trunk.devices = of_layer
    for layer, device in zip(model.trunk.layers, of_layer, strict=True):
        layer.to(device)
    model.trunk.norm.to(META)
    model.head.to(META)
    assert model.device == CPU  # where sequences go: the word table's
    hidden = model.hidden(Sequence.of_text(torch.arange(5)), model.new_cache())
    assert hidden.device == META
    assert model.head.logits(hidden).shape[0] == 5


def test_rounded_weights_count_as_what_they_take() -> None:
    config = replace(internvl.CONFIG, language=replace(internvl.CONFIG.language, layers=4))
    model = build_internvl(config)
    embedder = sum(p.numel() for p in model.embedder.parameters()) * 8
    trunk = sum(p.numel() for p in model.trunk.parameters()) * 8
    room = [embedder + 1, trunk // 2]
    with pytest.raises(ConfigError, match="do not fit"):
        Placement(model, (CPU, META), torch.float64, room=room)
    Placement(
        model, (CPU, META), torch.float64, room=room, weight_bytes=Quantization.parse("int4").weight_bytes
    )


def test_a_checkpoint_is_loaded_to_several(tmp_path) -> None:
    folder = write_internvl(tmp_path / "m")
    model = load_folder(folder, device=(CPU, META)).model
    where = Placement(model, (CPU, META), torch.float32)
    assert model.trunk.devices == where.of_layer
    assert {name: p.device for name, p in model.named_parameters()} == {
        name: where(name) for name, _ in model.named_parameters()
    }
    assert load_folder(folder, device=(CPU,)).model.trunk.devices is None


def test_what_does_not_fit_is_said() -> None:
    model = build_internvl(internvl.CONFIG)
    with pytest.raises(ConfigError, match=r"GiB do not fit on cpu, meta: .* name more devices") as caught:
        Placement(model, (CPU, META), torch.float32, room=[100, 100])
    assert "\n" not in str(caught.value)
    Placement(model, (CPU, META), torch.float32, room=[1 << 30, 100 << 10])


def test_devices_are_read_from_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub._devices("cpu") == hub._devices(["cpu"]) == CPU
    with monkeypatch.context() as patch:
        patch.setattr(hub, "_device", torch.device)
        assert hub._devices("cpu, meta") == (CPU, META)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert hub._devices("auto") == CPU
    assert hub.one_device(["cpu"]) == CPU
    with monkeypatch.context() as patch:
        patch.setattr(hub, "_device", torch.device)
        assert hub.one_device("cpu,meta") == CPU
    with pytest.raises(ConfigError, match="device 0 is not known"):
        hub._devices(0)  # type: ignore[arg-type]
    for wrong in ("cpu,cpu", []):
        with pytest.raises(ConfigError, match="each once"):
            hub._devices(wrong)
    with pytest.raises(ConfigError, match="'gpu' is not known"):
        chiasm.load("chiasm-mini", device="cpu,gpu")


def test_gpus_without_bfloat16_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_bfloat16(CPU)
    for capability, able in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert has_bfloat16(torch.device("cuda:0")) is able
