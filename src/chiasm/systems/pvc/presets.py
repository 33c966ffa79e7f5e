"""The sizes of InternVL 2 that PVC begins with, for counting and planning before any checkpoint is there.

Source: InternVL 2 (the releases of July 2024) and PVC's model card (InternViT-300M and InternLM2.5-7B-Chat make the
8B). What loads a checkpoint reads its `config.json` and needs none of this. Not held against a released file where this
was written: the padding rows of the 1B's word table.
"""

from __future__ import annotations

from chiasm.errors import ConfigError
from chiasm.media.tiles import TilePolicy
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import internvit_300m
from chiasm.systems.pvc.config import PVCConfig, downsample_for
from chiasm.systems.pvc.convert import PVCOptions

__all__ = ["PRESETS", "preset"]


def _internlm2(layers: int, width: int, heads: int, inner: int) -> LanguageConfig:
    return LanguageConfig(
        family="internlm2",
        vocab_size=92_553,
        hidden_size=width,
        intermediate_size=inner,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=width // heads,
        rope_theta=1e6,
        rope_scaling={"type": "dynamic", "factor": 2.0},
        norm_eps=1e-5,
    )


PRESETS: dict[str, tuple[LanguageConfig, str]] = {
    "InternVL2-1B": (
        LanguageConfig(
            family="qwen2",
            vocab_size=151_655,
            hidden_size=896,
            intermediate_size=4864,
            layers=24,
            heads=14,
            kv_heads=2,
            head_dim=64,
            rope_theta=1e6,
            qkv_bias=True,
        ),
        "Hermes-2",
    ),
    "InternVL2-2B": (_internlm2(24, 2048, 16, 8192), "internlm2-chat"),
    "InternVL2-8B": (_internlm2(32, 4096, 32, 14_336), "internlm2-chat"),
}
"""Name of an InternVL 2 -> its language model and template; the encoder of all is InternViT-300M."""


def preset(name: str, options: PVCOptions | None = None) -> PVCConfig:
    """A PVC made of a released InternVL 2.

    Raises:
        ConfigError: no such name.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}: there are {', '.join(PRESETS)}")
    language, template = PRESETS[name]
    chosen = options or PVCOptions()
    return PVCConfig(
        vision=internvit_300m(),
        language=language,
        temporal=chosen.temporal,
        tiles=TilePolicy(max_tiles=12),
        repeats=chosen.repeats,
        video_repeats=chosen.video_repeats,
        repeat_order=chosen.repeat_order,  # type: ignore[arg-type]
        frame_tiles=chosen.frame_tiles,
        views=chosen.views,
        downsample=downsample_for(chosen.tokens, internvit_300m()),
        template=template,
    )
