"""The picture of what each repeat adds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.errors import UsageError
from chiasm.systems.pvc import recipes
from chiasm.systems.pvc.changes import change_maps, draw_changes
from chiasm.systems.pvc.load import PVCChat
from chiasm.systems.pvc.plan import shots_of


@pytest.fixture
def chat() -> PVCChat:
    torch.manual_seed(0)
    return PVCChat(recipes.DebugPVC().build(), recipes.DebugData().layout(), name="debug")


def test_maps_are_the_changes_of_the_rows(chat) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    assert not change_maps(chat, picture, 4).any()  # fresh: all repeats are equal
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in chat.model.embedder.named_parameters():
            if any(word in name for word in ("gate", "modulation", "own")):
                parameter.normal_(0, 0.5, generator=generator)
    maps = change_maps(chat, picture)
    assert maps.shape == (1, 2, 2)
    sequence = chat.inputs([{"role": "user", "content": [{"type": "image", "image": picture}]}]).sequence
    tokens = chat.model.embedder.encode(shots_of(sequence, chat.config), sequence).detach()
    expected = (tokens[1] - tokens[0]).norm(dim=-1) / tokens[1].norm(dim=-1)
    np.testing.assert_allclose(maps[0].ravel(), expected.numpy(), rtol=1e-4)
    sheet = draw_changes(picture, maps, side=32)
    assert sheet.size == (64, 48)
    with pytest.raises(UsageError, match=r"1 repeat\(s\) cannot differ"):
        change_maps(chat, picture, 1)


def test_what_changes_most_is_reddest() -> None:
    maps = np.array([[[0.0, 1.0], [0.0, 0.0]]], dtype=np.float32)
    sheet = np.asarray(draw_changes(Image.new("RGB", (8, 8), (100, 100, 100)), maps, side=16)).astype(int)
    half = sheet[16:, 16:]
    assert (half[2, 12, 0] - half[2, 12, 2]) > 150
    assert half[12, 2].tolist() == [100, 100, 100]
