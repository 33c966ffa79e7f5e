"""Initial values of a small encoder: whitened patches, sine-cosine positions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chiasm.errors import ConfigError
from chiasm.train.vision_init import sincos_positions_, whiten_patches_


def pictures():
    smooth = F.interpolate(torch.randn(60, 3, 5, 5), size=(32, 32), mode="bicubic")
    return 2 + smooth + 0.1 * torch.randn(60, 3, 32, 32)


def test_whitened_patches_have_no_mean_and_no_correlation():
    projection, pixels = nn.Conv2d(3, 48, 4, stride=4), pictures()
    whiten_patches_(projection, pixels, damping=0.0, scale=0.5)
    out = projection(pixels).flatten(2).transpose(1, 2).reshape(-1, 48)
    torch.testing.assert_close(out.mean(0), torch.zeros(48), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.T @ out / len(out), 0.25 * torch.eye(48), atol=1e-2, rtol=0)


def test_damping_keeps_noise_small_and_fewer_outputs_are_the_strong_axes():
    pixels = pictures()
    wide, narrow = nn.Conv2d(3, 48, 4, stride=4), nn.Conv2d(3, 8, 4, stride=4)
    whiten_patches_(wide, pixels, damping=0.1)
    whiten_patches_(narrow, pixels, damping=0.1)
    torch.testing.assert_close(wide.weight[:8], narrow.weight)
    spread = wide(pixels).flatten(2).std((0, 2))
    assert spread[0] > 0.45
    assert spread[-1] < 0.25
    with pytest.raises(ConfigError):
        whiten_patches_(nn.Conv2d(3, 49, 4, stride=4), pixels)


def test_positions_tell_rows_and_columns_apart():
    positions = torch.zeros(1, 17, 16)
    sincos_positions_(positions, 4)
    grid = positions[0, 1:].view(4, 4, 16)
    assert not positions[0, 0].any()
    assert torch.equal(grid[2, 0, :8], grid[2, 3, :8])
    assert torch.equal(grid[0, 2, 8:], grid[3, 2, 8:])
    assert len({tuple(row.tolist()) for row in positions[0]}) == 17
    with pytest.raises(ConfigError):
        sincos_positions_(torch.zeros(1, 17, 18), 4)
    with pytest.raises(ConfigError):
        sincos_positions_(torch.zeros(1, 10, 16), 4)
