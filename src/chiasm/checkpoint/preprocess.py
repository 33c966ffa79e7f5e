"""How a checkpoint wants its pictures cut and normalised, read from and written to both public layouts.

Source: `config.json` and `preprocessor_config.json` of the released checkpoints (original: the tiling is in the
config, the file holds a CLIP-style resize that its users ignore but for mean and std); GotOcr2ImageProcessor and
InternVLProcessor of transformers (`-hf`: the tiling is in the file; releases since 5 nest it in
`processor_config.json`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from chiasm.checkpoint.config import InternVLPublicConfig
from chiasm.checkpoint.store import read_json
from chiasm.errors import CheckpointError
from chiasm.media.tiles import NORMALIZATIONS, Mode, TilePolicy

__all__ = ["IMAGE_PROCESSOR", "PROCESSOR", "VIDEO_PROCESSOR", "preprocessor_files", "read_tile_policy"]

IMAGE_PROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
VIDEO_PROCESSOR = "video_preprocessor_config.json"

_BICUBIC = 3
# What GotOcr2ImageProcessor takes for absent keys.
_HF_DEFAULTS: dict[str, Any] = {
    "size": {"height": 384, "width": 384},
    "image_mean": NORMALIZATIONS["clip"][0],
    "image_std": NORMALIZATIONS["clip"][1],
    "min_patches": 1,
    "max_patches": 12,
}
_NEEDED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": _BICUBIC}


def read_tile_policy(
    folder: str | Path,
    config: InternVLPublicConfig,
    layout: Literal["original", "hf", "hf-old"],
    *,
    mode: Mode = "chiasm",
) -> TilePolicy:
    """The tile policy of a checkpoint folder.

    A folder without processor files gets the encoder's image size and ImageNet's mean and std, which all releases
    have; its tile counts come from the config.

    Args:
        folder: the checkpoint.
        config: what its ``config.json`` says.
        layout: how it is laid out.
        mode: of the policy (EXIF rotation and budget of several images).

    Raises:
        CheckpointError: a file is malformed, or asks for a preprocessing that is not InternVL's.
        ConfigError: a value is out of range.
    """
    folder = Path(folder)
    size, low, high = config.image_size, config.min_dynamic_patch, config.max_dynamic_patch
    mean, std = NORMALIZATIONS["imagenet"]
    path, stored = _stored(folder)
    if stored and layout == "original":
        mean, std = stored.get("image_mean", mean), stored.get("image_std", std)
    elif stored:
        fields = {**_HF_DEFAULTS, **{key: value for key, value in stored.items() if value is not None}}
        for key, needed in _NEEDED.items():
            if fields.get(key, needed) != needed:
                raise CheckpointError(
                    f"{path}: {key} is {fields[key]!r}, InternVL's preprocessing has {needed!r}"
                )
        size = _side(fields["size"], path)
        low, high = fields["min_patches"], fields["max_patches"]
        mean, std = fields["image_mean"], fields["image_std"]
    for name, value in (("image_mean", mean), ("image_std", std)):
        if not isinstance(value, list | tuple) or not all(isinstance(part, int | float) for part in value):
            raise CheckpointError(f"{path}: {name} is {value!r}: three numbers are needed")
    return TilePolicy(
        image_size=size,
        min_tiles=low,
        max_tiles=high,
        thumbnail=config.use_thumbnail,
        dynamic=config.dynamic_image_size,
        pad2square=config.pad2square,
        mode=mode,
        mean=tuple(mean),  # type: ignore[arg-type]
        std=tuple(std),  # type: ignore[arg-type]
    )


def preprocessor_files(
    policy: TilePolicy, layout: Literal["original", "hf", "hf-old"], *, tokens_per_tile: int
) -> dict[str, dict[str, Any]]:
    """The processor files of a layout, by file name.

    Args:
        policy: what they shall say.
        layout: original (one file), or one of the `-hf` prefixes (three files).
        tokens_per_tile: context tokens of one tile.
    """
    shared = {
        "do_normalize": True,
        "do_resize": True,
        "image_mean": list(policy.mean),
        "image_std": list(policy.std),
        "resample": _BICUBIC,
    }
    if layout == "original":
        clip = {"crop_size": policy.image_size, "do_center_crop": True, "size": policy.image_size}
        return {IMAGE_PROCESSOR: {**shared, **clip, "feature_extractor_type": "CLIPFeatureExtractor"}}
    return {
        IMAGE_PROCESSOR: {
            **shared,
            "crop_to_patches": policy.dynamic,
            "do_convert_rgb": True,
            "do_rescale": True,
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "max_patches": policy.max_tiles,
            "min_patches": policy.min_tiles,
            "processor_class": "InternVLProcessor",
            "rescale_factor": 1 / 255,
            "size": {"height": policy.image_size, "width": policy.image_size},
        },
        VIDEO_PROCESSOR: {
            **shared,
            "do_convert_rgb": True,
            "do_rescale": True,
            "processor_class": "InternVLProcessor",
            "rescale_factor": 1 / 255,
            "size": {"height": policy.image_size, "width": policy.image_size},
            "video_processor_type": "InternVLVideoProcessor",
        },
        PROCESSOR: {"image_seq_length": tokens_per_tile, "processor_class": "InternVLProcessor"},
    }


def _stored(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The image processor's fields and the file they are in: nested ones go first, as in transformers."""
    path = folder / PROCESSOR
    if path.is_file():
        nested = read_json(path).get("image_processor")
        if isinstance(nested, dict):
            return path, nested
    path = folder / IMAGE_PROCESSOR
    return path, read_json(path) if path.is_file() else {}


def _side(size: Any, path: Path) -> int:
    side = size
    if isinstance(size, dict):
        sides = {size.get("height"), size.get("width")}
        side = sides.pop() if len(sides) == 1 else None
    if not isinstance(side, int):
        raise CheckpointError(f"{path}: size is {size!r}: tiles need one side for height and width")
    return side
