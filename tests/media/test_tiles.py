"""The oracles here are written out from the paper's rules, apart from the code under test."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

from chiasm.errors import ChiasmError, ConfigError, ImageError
from chiasm.media.pixels import normalize
from chiasm.media.tiles import NORMALIZATIONS, TilePolicy, closest_grid, grids, pad2square

SIZES = st.integers(1, 6000)
# Sizes whose aspect ties with several grids exactly, around the areas where the tie rule turns.
TIES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 900)).map(
    lambda t: (t[0] * t[2], t[1] * t[2])
)
ANY_SIZE = st.one_of(st.tuples(SIZES, SIZES), TIES)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def two_passes(image: Image.Image, width: int, height: int) -> Image.Image:
    """Pillow's filter, one axis after the other in the order of the fast mode (newer Pillow has the same order)."""
    columns_first = image.height - height > 2 * max(0, image.width - width)
    between = (image.width, height) if columns_first else (width, image.height)
    return image.resize(between, Image.Resampling.BICUBIC).resize((width, height), Image.Resampling.BICUBIC)


def official_grid(width: int, height: int, low: int, high: int, side: int) -> tuple[int, int]:
    """The published algorithm taken literally: a set of grids, sorted by area, scanned with its tie rule."""
    every = {
        (i, j)
        for n in range(low, high + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if low <= i * j <= high
    }
    best, least = (1, 1), float("inf")
    for i, j in sorted(every, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - i / j)
        if difference < least:
            best, least = (i, j), difference
        elif difference == least and width * height > 0.5 * side * side * i * j:
            best = (i, j)
    return best


def official_tiles(image: Image.Image, low: int, high: int, side: int) -> list[Image.Image]:
    columns, rows = official_grid(*image.size, low, high, side)
    whole = image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    tiles = []
    for n in range(columns * rows):
        left, top = (n % columns) * side, (n // columns) * side
        tiles.append(whole.crop((left, top, left + side, top + side)))
    if len(tiles) != 1:
        tiles.append(image.resize((side, side), Image.Resampling.BICUBIC))
    return tiles


def official_pixels(tiles: list[Image.Image], mean: tuple, std: tuple) -> torch.Tensor:
    """ToTensor and Normalize, written out in float32."""
    pixels = []
    for tile in tiles:
        x_3SS = torch.from_numpy(np.array(tile)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        pixels.append(x_3SS.sub(torch.tensor(mean).view(3, 1, 1)).div(torch.tensor(std).view(3, 1, 1)))
    return torch.stack(pixels)


@pytest.mark.parametrize(("limit", "count"), [(6, 14), (12, 35), (24, 84), (40, 158)])
def test_grid_set_sizes(limit: int, count: int) -> None:
    assert len(grids(1, limit)) == len(set(grids(1, limit))) == count


@pytest.mark.parametrize(
    ("size", "limit", "grid"),
    [
        ((800, 600), 6, (3, 2)),
        ((800, 600), 12, (4, 3)),
        ((1280, 720), 6, (2, 1)),
        ((1280, 720), 12, (4, 2)),
        ((1280, 720), 40, (7, 4)),
        ((500, 1000), 1, (1, 1)),
        ((500, 1000), 6, (1, 2)),
        ((500, 1000), 12, (1, 2)),
        ((500, 1000), 40, (1, 2)),
        ((896, 1792), 12, (2, 4)),
        ((1000, 1000), 6, (2, 2)),
        ((1000, 1000), 12, (3, 3)),
        ((5000, 100), 12, (12, 1)),
        ((2688, 896), 6, (3, 1)),
        ((2688, 896), 12, (6, 2)),
        ((224, 224), 12, (1, 1)),
    ],
)
@pytest.mark.parametrize("mode", ["chiasm", "original", "hf"])
def test_golden_grids(size: tuple[int, int], limit: int, grid: tuple[int, int], mode: str) -> None:
    policy = TilePolicy(max_tiles=limit, mode=mode)
    assert policy.grid(*size) == grid
    assert policy.count(*size) == grid[0] * grid[1] + (grid != (1, 1))


@given(ANY_SIZE, st.integers(1, 40), st.integers(0, 40), st.sampled_from([56, 224, 448]))
@settings(max_examples=150)
def test_grid_equals_the_official_algorithm(size: tuple[int, int], low: int, more: int, side: int) -> None:
    assert closest_grid(*size, low, low + more, side) == official_grid(*size, low, low + more, side)


@given(ANY_SIZE, st.integers(1, 12), st.integers(0, 28), st.booleans())
def test_grid_properties(size: tuple[int, int], low: int, more: int, thumbnail: bool) -> None:
    policy = TilePolicy(min_tiles=low, max_tiles=low + more, thumbnail=thumbnail)
    columns, rows = policy.grid(*size)
    tiles = columns * rows
    assert low <= tiles <= low + more
    assert policy.count(*size) == tiles + (1 if thumbnail and tiles > 1 else 0)
    aspect = size[0] / size[1]
    assert all(abs(aspect - columns / rows) <= abs(aspect - i / j) for i, j in grids(low, low + more))


@given(st.integers(1, 64), st.integers(1, 200))
def test_budget(limit: int, images: int) -> None:
    assert TilePolicy(max_tiles=limit).budget(images) == max(1, limit // images)
    assert TilePolicy(max_tiles=limit, mode="original").budget(images) == max(1, limit // images)
    assert TilePolicy(max_tiles=limit, mode="hf").budget(images) == limit


def test_counts_share_the_budget() -> None:
    sizes = [(1000, 1000), (800, 600)]
    assert TilePolicy().counts(sizes) == [5, 7]
    assert TilePolicy(mode="hf").counts(sizes) == [10, 13]
    # A budget below min_tiles leaves no grid: one tile, as in the source.
    assert TilePolicy(min_tiles=4).counts([(900, 300)] * 6) == [1] * 6


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 12), st.sampled_from(["exact", "fast"]))
@settings(max_examples=60)
def test_tiles_put_together_are_the_resized_picture(width: int, height: int, limit: int, resize: str) -> None:
    side = 28
    image = noise(width, height)
    policy = TilePolicy(image_size=side, max_tiles=limit, resize=resize)
    tiles_N3SS = policy.tile(image)
    columns, rows = policy.grid(width, height)
    assert tiles_N3SS.dtype == torch.uint8
    assert tiles_N3SS.is_contiguous()
    assert tiles_N3SS.shape == (policy.count(width, height), 3, side, side)
    assert torch.equal(tiles_N3SS, policy.tile(image))
    whole = torch.cat(
        [torch.cat(list(tiles_N3SS[r * columns : (r + 1) * columns]), dim=2) for r in range(rows)], dim=1
    )
    size = (columns * side, rows * side)
    resized = image.resize(size, Image.Resampling.BICUBIC) if resize == "exact" else two_passes(image, *size)
    expected = np.array(resized)
    difference = (whole.permute(1, 2, 0).short() - torch.from_numpy(expected).short()).abs()
    assert difference.max() <= (0 if resize == "exact" else 2)


ORACLE_SIZES = [
    *[
        (800, 600),
        (600, 800),
        (1280, 720),
        (500, 1000),
        (224, 224),
        (448, 448),
        (449, 447),
        (896, 1792),
        (1, 1),
    ],
    *[
        (3, 3),
        (3, 700),
        (700, 3),
        (1, 40),
        (40, 1),
        (5000, 100),
        (100, 1500),
        (333, 777),
        (1001, 999),
        (62, 61),
    ],
]


LIMITS = [(1, 12, 28), (2, 5, 14), (1, 1, 28)]


@pytest.mark.parametrize(
    ("mode", "normalize_type"), [("original", "imagenet"), ("original", "clip"), ("chiasm", "siglip")]
)
def test_exact_original_is_bit_identical(mode: str, normalize_type: str) -> None:
    for size in ORACLE_SIZES:
        for low, high, side in LIMITS:
            image = noise(*size)
            policy = TilePolicy(
                image_size=side, min_tiles=low, max_tiles=high, mode=mode, normalize_type=normalize_type
            )
            tiles = official_tiles(image, low, high, side)
            got = policy.tile(image)
            assert torch.equal(
                got, torch.stack([torch.from_numpy(np.array(t)).permute(2, 0, 1) for t in tiles])
            )
            assert torch.equal(
                normalize(got, policy), official_pixels(tiles, *NORMALIZATIONS[normalize_type])
            )


def test_exact_original_is_bit_identical_at_full_size() -> None:
    image = noise(1000, 700)
    policy = TilePolicy(mode="original")
    expected = official_pixels(official_tiles(image, 1, 12, 448), *NORMALIZATIONS["imagenet"])
    assert torch.equal(normalize(policy.tile(image), policy), expected)


def hf_processor(policy: TilePolicy):
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    return GotOcr2ImageProcessorPil(
        size={"height": policy.image_size, "width": policy.image_size},
        image_mean=list(policy.mean),
        image_std=list(policy.std),
        crop_to_patches=policy.dynamic,
        min_patches=policy.min_tiles,
        max_patches=policy.max_tiles,
    )


@pytest.mark.parametrize(
    ("normalize_type", "dynamic"), [("imagenet", True), ("clip", True), ("siglip", False)]
)
def test_exact_hf_is_bit_identical_to_transformers(dynamic: bool, normalize_type: str) -> None:
    for low, high, side in LIMITS:
        policy = TilePolicy(
            image_size=side,
            min_tiles=low,
            max_tiles=high,
            dynamic=dynamic,
            mode="hf",
            normalize_type=normalize_type,
        )
        processor = hf_processor(policy)
        for size in ORACLE_SIZES:
            image = noise(*size)
            got = policy.tile(image)
            # Equal floats mean equal uint8 tiles: a value's 256 normalised forms all differ.
            expected = processor(images=[image], return_tensors="pt")["pixel_values"]
            assert torch.equal(normalize(got, policy), expected)
            assert policy.count(*size) == len(expected)
            assert policy.count(*size) == processor.get_number_of_image_patches(size[1], size[0])


@pytest.mark.parametrize("size", [(800, 600), (1280, 720)])
def test_exact_hf_is_bit_identical_at_full_size(size: tuple[int, int]) -> None:
    policy = TilePolicy(mode="hf", max_tiles=6)
    raw = hf_processor(policy)
    raw.do_rescale = raw.do_normalize = False
    image = noise(*size)
    tiles = policy.tile(image)
    assert torch.equal(tiles, torch.as_tensor(raw(images=[image], return_tensors="pt")["pixel_values"]))
    expected = hf_processor(policy)(images=[image], return_tensors="pt")["pixel_values"]
    assert torch.equal(normalize(tiles, policy), expected)


def test_hf_takes_several_images_and_transparency_as_transformers_does() -> None:
    rng = np.random.default_rng(1)
    images = [
        noise(300, 100),
        Image.fromarray(rng.integers(0, 256, (90, 200, 4), dtype=np.uint8)),
        noise(64, 64).convert("L"),
        noise(80, 120).convert("P"),
        Image.fromarray(rng.integers(0, 256, (90, 50, 4), dtype=np.uint8)).convert("LA"),
    ]
    policy = TilePolicy(image_size=28, mode="hf")
    expected = hf_processor(policy)(images=images, return_tensors="pt")
    got = torch.cat([policy.tile(image, policy.budget(len(images))) for image in images])
    assert torch.equal(normalize(got, policy), expected["pixel_values"])


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 10), st.integers(0, 30))
def test_hf_counts_equal_transformers(width: int, height: int, low: int, more: int) -> None:
    policy = TilePolicy(min_tiles=low, max_tiles=low + more, mode="hf")
    assert policy.count(width, height) == hf_processor(policy).get_number_of_image_patches(height, width)


@pytest.mark.parametrize("preset", sorted(NORMALIZATIONS))
def test_both_sources_give_the_same_float_for_every_value(preset: str) -> None:
    mean, std = NORMALIZATIONS[preset]
    values = np.arange(256, dtype=np.uint8)
    scaled = (values.astype(np.float64) * (1 / 255)).astype(np.float32)
    hf = (scaled[:, None] - np.array(mean, np.float32)) / np.array(std, np.float32)
    tile = torch.from_numpy(values.reshape(1, 1, 16, 16)).expand(1, 3, 16, 16)
    ours = normalize(tile, TilePolicy(mean=mean, std=std))
    assert torch.equal(ours[0].flatten(1).T, torch.from_numpy(hf))


@pytest.mark.parametrize("size", [(1920, 1280), (640, 640), (200, 1600), (1600, 200), (120, 90)])
@pytest.mark.parametrize("grain", [1, 12])
def test_fast_is_within_two_grey_levels(size: tuple[int, int], grain: int) -> None:
    coarse = noise(max(1, size[0] // grain), max(1, size[1] // grain))
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    policy = TilePolicy(max_tiles=6, resize="fast")
    columns, rows = policy.grid(*size)
    thumbnails = [two_passes(image, 448, 448)] if columns * rows > 1 else []
    whole = two_passes(image, columns * 448, rows * 448)
    corners = [(column * 448, row * 448) for row in range(rows) for column in range(columns)]
    exact = [whole.crop((x, y, x + 448, y + 448)) for x, y in corners] + thumbnails
    expected = torch.stack([torch.from_numpy(np.array(tile)).permute(2, 0, 1) for tile in exact])
    difference = (expected.short() - policy.tile(image).short()).abs()
    assert difference.max() <= 2
    assert difference.float().mean() < 0.02


def test_pad2square() -> None:
    padded = pad2square(noise(5, 2), (1, 2, 3))
    assert padded.size == (5, 5)
    pixels = np.asarray(padded)
    assert (pixels[0] == (1, 2, 3)).all()
    assert (pixels[3:] == (1, 2, 3)).all()
    assert (pixels[1:3] == np.asarray(noise(5, 2))).all()
    assert pad2square(noise(2, 5), (0, 0, 0)).size == (5, 5)
    square = noise(4, 4)
    assert pad2square(square, (0, 0, 0)) is square


def test_pad2square_in_a_policy_needs_one_tile() -> None:
    image = noise(60, 20)
    policy = TilePolicy(image_size=28, dynamic=False, pad2square=True)
    assert policy.mean_colour == (123, 116, 103)
    tile = policy.tile(image)
    expected = pad2square(image, (123, 116, 103)).resize((28, 28), Image.Resampling.BICUBIC)
    assert torch.equal(tile[0], torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    # The source pads after cutting, where tiles are square already.
    dynamic = dataclasses.replace(policy, dynamic=True)
    assert torch.equal(dynamic.tile(image), dataclasses.replace(dynamic, pad2square=False).tile(image))


def test_orientation_belongs_to_the_mode() -> None:
    assert [TilePolicy(mode=mode).orient for mode in ("chiasm", "original", "hf")] == [True, False, False]


def test_presets_and_round_trip() -> None:
    policy = TilePolicy(normalize_type="clip", max_tiles=6)
    assert (policy.mean, policy.std) == NORMALIZATIONS["clip"]
    assert dataclasses.replace(policy, normalize_type="siglip").mean == (0.5, 0.5, 0.5)
    assert dataclasses.replace(policy, max_tiles=3).mean == policy.mean
    assert TilePolicy(**dataclasses.asdict(policy)) == policy
    assert hash(TilePolicy(mean=[0.1, 0.2, 0.3])) == hash(TilePolicy(mean=(0.1, 0.2, 0.3)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 0},
        {"max_tiles": 0},
        {"max_tiles": 2.5},
        {"min_tiles": 5, "max_tiles": 4},
        {"mode": "HF"},
        {"resize": "slow"},
        {"mode": "hf", "thumbnail": False},
        {"mode": "hf", "pad2square": True},
        {"mean": (0.1, 0.2)},
        {"std": (0.1, 0.2, 0.0)},
        {"normalize_type": "inception"},
    ],
)
def test_wrong_settings_are_refused_with_one_line(wrong: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        TilePolicy(**wrong)
    assert "\n" not in str(caught.value)


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(ImageError):
        TilePolicy().grid(0, 5)
    with pytest.raises(ConfigError):
        TilePolicy().budget(0)
    for tiles in (torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ChiasmError):
            normalize(tiles, TilePolicy())


def test_normalize_dtype_and_nothing() -> None:
    policy = TilePolicy()
    tiles = policy.tile(noise(448, 448))
    half = normalize(tiles, policy, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, normalize(tiles, policy).to(torch.bfloat16))
    assert normalize(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), policy).shape == (0, 3, 8, 8)


@pytest.mark.gpu
def test_normalize_is_bit_identical_on_a_gpu() -> None:
    tiles = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    for preset in NORMALIZATIONS:
        policy = TilePolicy(normalize_type=preset)
        assert torch.equal(normalize(tiles, policy, device="cuda").cpu(), normalize(tiles, policy))
