"""Random JPEG: equal to Pillow one tile at a time, decided by the generator alone."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.errors import ConfigError
from chiasm.media.jpeg import jpeg_tiles


def tiles(count=5, side=24):
    return torch.randint(0, 256, (count, 3, side, side), generator=seeded(9), dtype=torch.uint8)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def slowly(tile_3SS, quality):
    """One tile through Pillow and a file in memory."""
    file = io.BytesIO()
    Image.fromarray(np.stack([plane.numpy() for plane in tile_3SS], -1)).save(
        file, format="JPEG", quality=quality
    )
    return torch.from_numpy(
        np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB")).copy()
    ).permute(2, 0, 1)


@pytest.mark.parametrize("per", ["tile", "image"])
def test_equal_to_one_tile_at_a_time(per):
    given = tiles()
    before = given.clone()
    got = jpeg_tiles(given, seeded(3), per=per)
    draws = torch.randint(75, 101, (5 if per == "tile" else 1,), generator=seeded(3)).tolist()
    qualities = draws if per == "tile" else draws * 5
    torch.testing.assert_close(
        got, torch.stack([slowly(t, q) for t, q in zip(given, qualities, strict=True)])
    )
    assert torch.equal(given, before)
    assert got.is_contiguous()
    assert torch.equal(got, jpeg_tiles(given, seeded(3), per=per))
    assert not torch.equal(got, jpeg_tiles(given, seeded(4), per=per))


def test_one_quality_a_tile_or_one_an_image():
    same = tiles(1).expand(12, 3, 24, 24)
    assert len(jpeg_tiles(same, seeded(0), per="tile").unique(dim=0)) > 4
    assert len(jpeg_tiles(same, seeded(0), per="image").unique(dim=0)) == 1


def test_both_ends_of_the_range_are_drawn_evenly():
    flat = torch.zeros(4000, 3, 1, 1, dtype=torch.uint8)
    draws = torch.randint(75, 101, (4000,), generator=seeded(0))
    counts = torch.bincount(draws - 75, minlength=26)
    assert counts.min() > 100  # expected 154, standard deviation 12
    assert torch.equal(jpeg_tiles(flat, seeded(0)), flat)
    fixed = jpeg_tiles(tiles(), seeded(0), low=80, high=80)
    torch.testing.assert_close(fixed, torch.stack([slowly(t, 80) for t in tiles()]))


def test_no_tiles_draw_nothing():
    random = seeded(0)
    assert jpeg_tiles(tiles(0), random).shape == (0, 3, 24, 24)
    assert torch.equal(random.get_state(), seeded(0).get_state())


@pytest.mark.parametrize(
    "change",
    [
        {"low": 0},
        {"low": 90, "high": 80},
        {"high": 101},
        {"per": "row"},
        {"tiles_N3SS": torch.zeros(1, 3, 2, 2)},
    ],
)
def test_refusals(change):
    with pytest.raises(ConfigError):
        jpeg_tiles(**{"tiles_N3SS": tiles(), "generator": seeded(0), **change})
