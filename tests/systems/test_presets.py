"""Presets: parameters on the meta device against the figures that the papers and model cards state."""

from __future__ import annotations

import pytest
import torch

from chiasm.checkpoint.config import language_from_public
from chiasm.errors import ConfigError
from chiasm.systems.internvl.model import build_internvl
from chiasm.systems.internvl.presets import PRESETS, parameters, preset

# Billions, as stated: 2.5 in Table 2 of its paper, 1B to 4B of 2.0 in that of Mini-InternVL, 3.5 on its model cards.
STATED = {
    "InternVL2-1B": 0.9,
    "InternVL2-2B": 2.2,
    "InternVL2-4B": 4.2,
    "InternVL2_5-1B": 0.9,
    "InternVL2_5-2B": 2.2,
    "InternVL2_5-4B": 3.7,
    "InternVL2_5-8B": 8.1,
    "InternVL2_5-26B": 25.5,
    "InternVL2_5-38B": 38.4,
    "InternVL2_5-78B": 78.4,
    "InternVL3_5-1B": 1.1,
    "InternVL3_5-2B": 2.3,
    "InternVL3_5-4B": 4.7,
    "InternVL3_5-8B": 8.5,
    "InternVL3_5-14B": 15.1,
    "InternVL3_5-38B": 38.4,
}
LANGUAGE = {  # of 3.5, likewise
    "InternVL3_5-1B": 0.8,
    "InternVL3_5-2B": 2.0,
    "InternVL3_5-4B": 4.4,
    "InternVL3_5-8B": 8.2,
    "InternVL3_5-14B": 14.8,
    "InternVL3_5-38B": 32.8,
}
PROJECTOR = {  # millions
    "InternVL2_5-1B": 4.5,
    "InternVL2_5-2B": 12.6,
    "InternVL2_5-4B": 12.6,
    "InternVL2_5-8B": 33.6,
    "InternVL2_5-26B": 116,
    "InternVL2_5-38B": 92,
    "InternVL2_5-78B": 172,
}


@pytest.mark.parametrize("name", PRESETS)
def test_counts_on_the_meta_device(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = build_internvl(config)
    total = sum(p.numel() for p in model.parameters())
    counts = parameters(config)
    assert sum(counts.values()) == total
    # The encoders are stated to the last parameter.
    assert counts["vision"] == (304_012_288 if config.vision.layers == 24 else 5_536_496_000)


@pytest.mark.parametrize("name", STATED)
def test_stated_totals(name: str) -> None:
    """To the digit that is stated; 0.1 % where that digit allows it."""
    total = sum(parameters(preset(name)).values()) / 1e9
    # The 4B model has 4.147e9, which its paper calls 4.2.
    assert abs(total - STATED[name]) <= (0.054 if name == "InternVL2-4B" else 0.0501)
    if name in ("InternVL2_5-26B", "InternVL2_5-38B", "InternVL2_5-78B"):
        assert total == pytest.approx(STATED[name], rel=1e-3)


def test_stated_parts() -> None:
    for name, millions in PROJECTOR.items():
        tolerance = 0.05 if isinstance(millions, float) else 0.5
        assert abs(parameters(preset(name))["projector"] / 1e6 - millions) <= tolerance
    for name, billions in LANGUAGE.items():
        assert abs(parameters(preset(name))["language"] / 1e9 - billions) <= 0.0501


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole(name: str) -> None:
    config = preset(name)
    assert config.tokens_per_tile == 256
    assert config.unshuffle == "v2"
    assert language_from_public(config.language.to_public()) == config.language
    assert PRESETS[name].language


def test_an_unknown_preset_names_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"there are .*InternVL2_5-8B") as caught:
        preset("InternVL2.5-8B")
    assert "\n" not in str(caught.value)
