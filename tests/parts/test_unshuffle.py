"""Pixel unshuffle: slow twin, transformers, v1 against v2, shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import ConfigError
from chiasm.parts.compress.unshuffle import Unshuffle, pixel_unshuffle, pixel_unshuffle_reference


@given(
    images=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    channels=st.integers(1, 5),
    factor=st.integers(1, 4),
    version=st.sampled_from(["v1", "v2"]),
)
def test_equals_the_loop(
    images: int, rows: int, columns: int, channels: int, factor: int, version: str
) -> None:
    grid = (rows * factor, columns * factor)
    x = torch.randn(images, grid[0] * grid[1], channels)
    out = pixel_unshuffle(x, 1 / factor, version, grid)
    assert out.shape == (images, rows * columns, channels * factor**2)
    assert torch.equal(out, pixel_unshuffle_reference(x, 1 / factor, version, grid))
    assert torch.equal(out.flatten().sort().values, x.flatten().sort().values)  # a permutation


@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_v2_equals_transformers(ratio: float) -> None:
    from transformers import InternVLModel

    x = torch.randn(3, 8, 8, 6)
    expected = InternVLModel.pixel_shuffle(None, x, scale_factor=ratio).flatten(1, 2)  # type: ignore[arg-type]
    assert torch.equal(pixel_unshuffle(x.flatten(1, 2), ratio, "v2"), expected)


@given(rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_v1_is_v2_with_the_output_grid_transposed(rows: int, columns: int) -> None:
    x, grid = torch.randn(2, 4 * rows * columns, 3), (2 * rows, 2 * columns)
    v1, v2 = (pixel_unshuffle(x, 0.5, version, grid) for version in ("v1", "v2"))
    assert torch.equal(v1.reshape(2, columns, rows, 12), v2.reshape(2, rows, columns, 12).transpose(1, 2))


def test_v2_by_hand() -> None:
    #  0  1 |  2  3        the first token holds 0 1 4 5, its neighbours left to right
    #  4  5 |  6  7
    x = torch.arange(8.0)[None, :, None]
    assert pixel_unshuffle(x, grid=(2, 4)).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]]]


def test_ratio_one_changes_nothing() -> None:
    x = torch.randn(2, 9, 4)
    assert torch.equal(pixel_unshuffle(x, 1.0), x)


def test_module_counts_tokens_and_width() -> None:
    unshuffle = Unshuffle()
    assert (unshuffle.tokens(1024), unshuffle.width(1024)) == (256, 4096)
    assert unshuffle(torch.randn(2, 16, 8)).shape == (2, 4, 32)
    assert not list(unshuffle.parameters())
    with pytest.raises(ConfigError, match="1025 patches"):
        unshuffle.tokens(1025)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 0.3, 2.0, float("nan")])
def test_refuses_ratios(ratio: float) -> None:
    with pytest.raises(ConfigError, match="not 1 over a whole number"):
        Unshuffle(ratio)


def test_refuses_unknown_versions() -> None:
    with pytest.raises(ConfigError, match="use 'v2'"):
        Unshuffle(version="v3")


@pytest.mark.parametrize(
    ("patches", "grid", "message"),
    [
        (17, None, r"pass grid=\(rows, columns\)"),
        (17, (4, 4), "drop the class token"),
        (9, None, "no multiple of 2"),
        (8, (8, 1), "no multiple of 2"),
    ],
)
def test_refuses_grids(patches: int, grid: tuple[int, int] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pixel_unshuffle(torch.randn(1, patches, 2), grid=grid)
