"""InternViT, the vision encoder of InternVL: 300M (LayerNorm) and 6B (RMSNorm, QK-norm) in one configuration.

Source: InternVL 1.5 (arXiv 2404.16821) and 2.5 (arXiv 2412.05271, section 2 and Table 1). A plain pre-norm
vision transformer with a class token, learned positions that are resampled for other image sizes, LayerScale,
DropPath, and **no final norm**: what leaves the last layer is what the projector reads. Differs from the
release in how a model that is trained from scratch starts: positions and weights have deviation 0.02, where
the released class draws positions with deviation 1. Loaded weights are not concerned.

Shape legend: N images, H x W pixels, P patches of an image, T = 1 + P tokens (class token first), C width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from chiasm.errors import ConfigError
from chiasm.nn.vit import (
    VitAttention,
    VitBlock,
    VitMLP,
    drop_path_rates,
    init_vit,
    resize_positions,
    vit_norm,
)
from chiasm.shapes import Float

__all__ = [
    "VISION_DEFAULTS",
    "InternViT",
    "InternViTConfig",
    "Layout",
    "internvit_6b",
    "internvit_300m",
    "internvit_mini",
    "resize_positions",
]

Layout = Literal["original", "hf"]

VISION_DEFAULTS: dict[Layout, dict[str, Any]] = {
    "original": {
        "hidden_size": 3200,
        "intermediate_size": 12_800,
        "num_hidden_layers": 48,
        "num_attention_heads": 25,
        "num_channels": 3,
        "patch_size": 14,
        "image_size": 224,
        "hidden_act": "gelu",
        "norm_type": "rms_norm",
        "layer_norm_eps": 1e-6,
        "qkv_bias": False,
        "qk_normalization": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "initializer_factor": 0.1,
    },
    "hf": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_channels": 3,
        "patch_size": 14,
        "image_size": 448,
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "attention_bias": False,
        "use_qk_norm": False,
        "hidden_dropout_prob": 0.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_scale_init_value": 0.1,
    },
}
"""What the public configuration classes (InternVisionConfig, InternVLVisionConfig) take for absent keys.

The original's are the shape of InternViT-6B-224px. Saved sub-configs may leave out what equals them.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class InternViTConfig:
    """Shape of an InternViT; the defaults are those of InternViT-300M-448px.

    Attributes:
        hidden_size: width C of a token.
        intermediate_size: width inside the MLP.
        layers: number of blocks.
        heads: attention heads; divides ``hidden_size``.
        patch_size: side of a square patch, pixels.
        image_size: side of the square tile that the positions are learned for, pixels; whole patches.
        channels: channels of the image.
        norm: ``"layer_norm"`` (300M) or ``"rms_norm"`` (6B).
        norm_eps: eps of all norms.
        qkv_bias: bias on the fused q, k, v projection.
        qk_norm: RMSNorm of queries and keys over the full width.
        drop_path: rate at the last block while training (0 at the first, linear between).
        layer_scale_init: initial LayerScale gain.
        act: activation of the MLP; only ``"gelu"`` (exact) exists.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    layers: int = 24
    heads: int = 16
    patch_size: int = 14
    image_size: int = 448
    channels: int = 3
    norm: str = "layer_norm"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    drop_path: float = 0.0
    layer_scale_init: float = 0.1
    act: str = "gelu"

    def __post_init__(self) -> None:
        sizes = "hidden_size intermediate_size layers heads patch_size image_size channels"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ConfigError(f"InternViT {name} is {getattr(self, name)}: it must be at least 1")
        if self.hidden_size % self.heads:
            raise ConfigError(
                f"InternViT hidden_size {self.hidden_size} is no multiple of heads {self.heads}: change one"
            )
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"InternViT image_size {self.image_size} is not a multiple of patch_size {self.patch_size}: "
                f"use {self.image_size // self.patch_size * self.patch_size or self.patch_size}"
            )
        if self.norm not in ("layer_norm", "rms_norm"):
            raise ConfigError(f"InternViT norm {self.norm!r} is unknown: use 'layer_norm' or 'rms_norm'")
        if self.act != "gelu":
            raise ConfigError(f"InternViT act {self.act!r} is not supported: use 'gelu'")
        if not 0.0 <= self.drop_path < 1.0:
            raise ConfigError(f"InternViT drop_path {self.drop_path} is outside [0, 1): use for instance 0.1")

    @property
    def grid(self) -> int:
        """Patches along one side of a native tile."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Patches of a native tile (the class token is not counted)."""
        return self.grid * self.grid

    @classmethod
    def from_public(cls, vision_config: Mapping[str, Any], layout: Layout = "original") -> InternViTConfig:
        """Read a released ``vision_config``; keys that do not shape the encoder are ignored.

        Absent keys take the value that the public configuration class gives them (the 6B-224px shape in the
        original layout, the 300M shape in the hf layout).

        Args:
            vision_config: the dictionary under ``vision_config`` in ``config.json``.
            layout: ``"original"`` (remote-code InternVLChatModel) or ``"hf"`` (transformers).

        Raises:
            ConfigError: the layout is unknown, or the encoder described is not one that this class builds.
        """
        if layout not in VISION_DEFAULTS:
            raise ConfigError(f"unknown layout {layout!r}: use 'original' or 'hf'")
        given = {key: value for key, value in vision_config.items() if value is not None}
        facts = VISION_DEFAULTS[layout] | given
        if layout == "original":
            return cls(
                hidden_size=facts["hidden_size"],
                intermediate_size=facts["intermediate_size"],
                layers=facts["num_hidden_layers"],
                heads=facts["num_attention_heads"],
                patch_size=facts["patch_size"],
                image_size=facts["image_size"],
                channels=facts["num_channels"],
                norm=facts["norm_type"],
                norm_eps=facts["layer_norm_eps"],
                qkv_bias=facts["qkv_bias"],
                qk_norm=facts["qk_normalization"],
                drop_path=facts.get("drop_path_rate", 0.0),
                layer_scale_init=facts["initializer_factor"],
                act=facts["hidden_act"],
            )
        if not facts.get("use_absolute_position_embeddings", True):
            raise ConfigError("vision_config has no absolute positions: InternViT needs them")
        if not facts.get("use_mean_pooling", True):
            raise ConfigError("vision_config has a final norm (use_mean_pooling=false): InternViT has none")
        return cls(
            hidden_size=facts["hidden_size"],
            intermediate_size=facts["intermediate_size"],
            layers=facts["num_hidden_layers"],
            heads=facts["num_attention_heads"],
            patch_size=_side(facts["patch_size"], "patch_size"),
            image_size=_side(facts["image_size"], "image_size"),
            channels=facts["num_channels"],
            norm=facts["norm_type"],
            norm_eps=facts["layer_norm_eps"],
            qkv_bias=facts["attention_bias"],
            qk_norm=facts["use_qk_norm"],
            layer_scale_init=facts["layer_scale_init_value"],
            act=facts["hidden_act"],
        )

    def to_public(self, layout: Layout = "original") -> dict[str, Any]:
        """Return the ``vision_config`` of a released layout; the hf layout has no place for ``drop_path``.

        Raises:
            ConfigError: the layout is unknown.
        """
        shared = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_channels": self.channels,
            "hidden_act": self.act,
            "norm_type": self.norm,
            "layer_norm_eps": self.norm_eps,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
        }
        if layout == "original":
            return {
                "architectures": ["InternVisionModel"],
                "model_type": "intern_vit_6b",  # the released 300M says so too
                **shared,
                "patch_size": self.patch_size,
                "image_size": self.image_size,
                "qkv_bias": self.qkv_bias,
                "qk_normalization": self.qk_norm,
                "dropout": 0.0,
                "drop_path_rate": self.drop_path,
                "initializer_factor": self.layer_scale_init,
                "use_flash_attn": True,
            }
        if layout == "hf":
            return {
                "architectures": ["InternVLVisionModel"],
                "model_type": "internvl_vision",
                **shared,
                "patch_size": [self.patch_size, self.patch_size],
                "image_size": [self.image_size, self.image_size],
                "attention_bias": self.qkv_bias,
                "use_qk_norm": self.qk_norm,
                "layer_scale_init_value": self.layer_scale_init,
                "hidden_dropout_prob": 0.0,
                "projection_dropout": 0.0,
                "use_absolute_position_embeddings": True,
                "use_mask_token": False,
                "use_mean_pooling": True,
            }
        raise ConfigError(f"unknown layout {layout!r}: use 'original' or 'hf'")


def _side(value: int | Sequence[int], name: str) -> int:
    """Return one side of a square given as an int or as a pair of equal ints."""
    if isinstance(value, int):
        return value
    if len(value) != 2 or value[0] != value[1]:
        raise ConfigError(f"vision_config {name} {list(value)} is not square: InternViT needs equal sides")
    return value[0]


def internvit_300m() -> InternViTConfig:
    """InternViT-300M-448px (and its V2.5): 304,012,288 parameters."""
    return InternViTConfig()


def internvit_6b() -> InternViTConfig:
    """InternViT-6B-448px V1.2 to V2.5, the 45 layers that are released: 5,536,496,000 parameters."""
    return InternViTConfig(
        hidden_size=3200,
        intermediate_size=12800,
        layers=45,
        heads=25,
        norm="rms_norm",
        qkv_bias=False,
        qk_norm=True,
    )


def internvit_mini() -> InternViTConfig:
    """The encoder of the bundled model: 64 patches of 8 x 8 pixels per 64 x 64 tile, 2,721,216 parameters.

    LayerScale starts at 1, which lets so shallow a model learn from scratch at full speed.
    """
    return InternViTConfig(
        hidden_size=192,
        intermediate_size=768,
        layers=6,
        heads=3,
        patch_size=8,
        image_size=64,
        layer_scale_init=1.0,
    )


class InternViT(nn.Module):
    """The encoder: normalised pixels in, one feature per patch and one for the class token out.

    Parameters are drawn from the global generator of torch: seed it, or load weights.

    Args:
        config: the shape.

    Attributes:
        checkpoint: recompute every block in the backward pass instead of keeping activations (default False);
            an argument of the same name overrides it for one call.
    """

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint = False
        width, eps = config.hidden_size, config.norm_eps
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embedding = nn.Conv2d(config.channels, width, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + config.tokens, width))
        self.layers = nn.ModuleList(
            VitBlock(
                vit_norm(config.norm, width, eps),
                VitAttention(
                    width, config.heads, qkv_bias=config.qkv_bias, qk_norm=config.qk_norm, norm_eps=eps
                ),
                vit_norm(config.norm, width, eps),
                VitMLP(width, config.intermediate_size),
                width=width,
                layer_scale=config.layer_scale_init,
                drop_path=rate,
            )
            for rate in drop_path_rates(config.drop_path, config.layers)
        )
        nn.init.normal_(self.class_embedding, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.02)
        init_vit([self])

    def forward(
        self, pixels_N3HW: Float[Tensor, "N C H W"], select_layer: int = -1, *, checkpoint: bool | None = None
    ) -> Float[Tensor, "N T D"]:
        """Encode images.

        Args:
            pixels_N3HW: (N, channels, H, W) normalised pixels of any floating dtype (cast to that of the
                weights); H and W whole patches, positions are resampled where they are not the native size.
            select_layer: which hidden state to return, counted in a list of ``1 + layers`` states that
                begins with the embedding: -1 the last layer, -2 the one before it. Later layers are not run.
            checkpoint: recompute blocks in the backward pass; ``None`` takes the attribute.

        Returns:
            (N, 1 + P, C), class token first, then patches row-major; no final norm.

        Raises:
            ConfigError: H or W is not a multiple of the patch size, or ``select_layer`` is out of range.
        """
        return self.hidden_states(pixels_N3HW, (select_layer,), checkpoint=checkpoint)[0]

    def hidden_states(
        self, pixels_N3HW: Tensor, select_layers: Sequence[int], *, checkpoint: bool | None = None
    ) -> tuple[Tensor, ...]:
        """Return several hidden states of one pass, in the order asked for (as a distillation loss needs).

        Those of a float16 encoder are float32, whose range they may need. Arguments, result shape and errors are those
        of `forward`.
        """
        depths = [self._depth(select) for select in select_layers]
        keep = torch.is_grad_enabled() and (self.checkpoint if checkpoint is None else checkpoint)
        x_NTC = self.embed(pixels_N3HW)
        if x_NTC.dtype == torch.float16:
            x_NTC = x_NTC.float()  # what the layers add to may pass float16's 65,504
        kept = {0: x_NTC}
        for depth, layer in enumerate(self.layers[: max(depths)], start=1):
            x_NTC = recompute(layer, x_NTC, use_reentrant=False) if keep else layer(x_NTC)
            if depth in depths:
                kept[depth] = x_NTC
        return tuple(kept[depth] for depth in depths)

    def embed(self, pixels_N3HW: Tensor) -> Tensor:
        """Return the input of the first layer: patches projected, class token prepended, positions added."""
        side = self.config.patch_size
        height, width = pixels_N3HW.shape[-2:]
        if height % side or width % side or not height or not width:
            raise ConfigError(
                f"an image of {height}x{width} pixels is not made of whole patches of {side}: resize it"
            )
        patches_NCRQ = self.patch_embedding(pixels_N3HW.to(self.patch_embedding.weight.dtype))
        patches_NPC = patches_NCRQ.flatten(2).transpose(1, 2)
        class_N1C = self.class_embedding.expand(patches_NPC.shape[0], -1, -1)
        native = (self.config.grid, self.config.grid)
        position_1TC = resize_positions(self.position_embedding, native, (height // side, width // side))
        # Under autocast the patches are narrower than the parameters: the residual stream takes the wider dtype.
        return torch.cat([class_N1C, patches_NPC], dim=1) + position_1TC

    def _depth(self, select_layer: int) -> int:
        states = 1 + len(self.layers)
        if not -states <= select_layer < states:
            raise ConfigError(
                f"select_layer {select_layer} is out of range: there are {states} hidden states"
            )
        return select_layer % states
