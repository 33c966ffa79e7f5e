"""Recipes: overrides parsed by declared type, plain data, schedules."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

import pytest
from tests.train.tiny_run import tiny

from chiasm.errors import ConfigError, UsageError
from chiasm.train.recipe import Group, Optim, Schedule, apply_overrides, difference, resolved


@dataclass(frozen=True, slots=True, kw_only=True)
class Odd:
    size: tuple[int, int] = (1, 2)
    names: tuple[str, ...] = ()
    shares: dict[str, float] = field(default_factory=lambda: {"a": 1.0})
    mode: Literal["x", "y"] = "x"
    maybe: int | None = None
    flag: bool = False
    text: str = ""


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("optim.clip=none", "optim.clip", None),
        ("optim.clip=2", "optim.clip", 2.0),
        ("steps=7", "steps", 7),
        ("schedule.kind=linear", "schedule.kind", "linear"),
        ("compute=bfloat16", "compute", "bfloat16"),
        ('optim.freeze=["a.*", "b"]', "optim.freeze", ("a.*", "b")),
        ("model.width=9", "model.width", 9),
        (" name = a=b ", "name", "a=b"),
    ],
)
def test_overrides_are_typed(setting, path, value):
    node = apply_overrides(tiny(), [setting])
    for name in path.split("."):
        node = getattr(node, name)
    assert node == value
    assert type(node) is type(value)


@pytest.mark.parametrize(
    ("setting", "field_name", "value"),
    [
        ("size=[3, 4]", "size", (3, 4)),
        ('names=["u", "v"]', "names", ("u", "v")),
        ("shares.a=0.25", "shares", {"a": 0.25}),
        ("shares.b=2", "shares", {"a": 1.0, "b": 2.0}),
        ('shares={"c": 3}', "shares", {"c": 3.0}),
        ("mode=y", "mode", "y"),
        ("maybe=3", "maybe", 3),
        ("flag=true", "flag", True),
        ("text=", "text", ""),
    ],
)
def test_compound_overrides(setting, field_name, value):
    assert getattr(apply_overrides(Odd(), [setting]), field_name) == value


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("optim.lr=fast", ["optim.lr", "float", "'fast'"]),
        ("steps=1.5", ["steps", "int"]),
        ("optim.rate=1", ["optim.rate", "'rate'", "lr"]),
        ("schedule.kind=wave", ["schedule.kind", "cosine, linear, constant"]),
        ("optim=1", ["optim", "Optim", "optim.lr"]),
        ("steps.x=1", ["steps.x", "int"]),
        ("steps", ["="]),
        ("optim.clip=big", ["optim.clip", "float | None"]),
        ("optim.freeze=x", ["optim.freeze", "tuple"]),
        ("optim.groups=[]", None),
    ],
)
def test_wrong_overrides_name_field_and_type(setting, words):
    if words is None:
        assert apply_overrides(tiny(), [setting]).optim.groups == ()
        return
    with pytest.raises(UsageError) as caught:
        apply_overrides(tiny(), [setting])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "setting", ["steps=0", "optim.lr=-1", "schedule.final=2", "accumulate=4", "optim.clip=0", "optim.beta1=1"]
)
def test_values_out_of_range_are_refused(setting):
    with pytest.raises(ConfigError):
        apply_overrides(tiny(), [setting])


def test_resolved_is_json_and_difference_names_paths():
    a, b = resolved(tiny()), resolved(apply_overrides(tiny(), ["optim.lr=0.5", "model.width=9"]))
    assert json.loads(json.dumps(a)) == a
    assert a["model"]["type"].endswith(":TinySpec")
    assert difference(a, a) == []
    assert difference(a, b) == ["model.width: 8 -> 9", "optim.lr: 0.03 -> 0.5"]


def test_resolved_refuses_live_objects():
    with pytest.raises(ConfigError):
        resolved({"x": object()})


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny().steps = 3  # type: ignore[misc]


def test_schedules():
    cosine = Schedule(warmup=4, final=0.1)
    factors = [cosine.factor(step, 20) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[-1] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert Schedule(kind="constant").factor(99, 100) == 1.0
    line = Schedule(kind="linear")
    assert [line.factor(s, 5) for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert Schedule(warmup=3).factor(0, 1) == pytest.approx(1 / 3)


def test_groups_and_optim_validate():
    with pytest.raises(ConfigError):
        Group(pattern="")
    with pytest.raises(ConfigError):
        Optim(weight_decay=-1)
    with pytest.raises(ConfigError):
        Group(pattern="*", weight_decay=-0.1)


def test_settings_are_checked_together():
    one = apply_overrides(tiny(), ["batch=6", "accumulate=3"])
    other = apply_overrides(tiny(), ["accumulate=3", "batch=6"])
    assert one == other
    assert (one.batch, one.accumulate) == (6, 3)
    with pytest.raises(ConfigError, match="multiple"):
        apply_overrides(tiny(), ["batch=6", "accumulate=4"])
