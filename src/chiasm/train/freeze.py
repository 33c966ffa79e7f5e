"""Which parameters a stage trains: patterns for ``Optim.train``.

Source: InternVL 2.5 (arXiv 2412.05271, section 3 and table 3): stage 1 warms the projector up, stage 1.5 adds the
encoder, stage 2 trains everything. ``trained`` composes them, and the partial unfreezing of the fine-tuning scripts.

Names are those of an InternVL model of this package: ``embedder.vision``, ``embedder.connect``, ``embedder.words``,
``trunk``, ``head``.
"""

from __future__ import annotations

from chiasm.errors import ConfigError

__all__ = ["CONNECT", "LANGUAGE", "VISION", "stage_1", "stage_1_5", "stage_2", "trained"]

VISION = ("embedder.vision.*",)
CONNECT = ("embedder.connect.*",)
LANGUAGE = ("embedder.words.*", "trunk.*")
"""Word table and decoder. Where words are tied the table is the output matrix too; else that is ``head.weight``."""


def stage_1() -> tuple[str, ...]:
    """Return the projector alone."""
    return CONNECT


def stage_1_5() -> tuple[str, ...]:
    """Return encoder and projector."""
    return (*VISION, *CONNECT)


def stage_2() -> tuple[str, ...]:
    """Return everything."""
    return ("*",)


def trained(
    *,
    vision: bool = False,
    connect: bool = True,
    language: bool = False,
    vit_layers: int = 0,
    vit_depth: int | None = None,
    lm_head: bool = False,
    tied: bool = False,
) -> tuple[str, ...]:
    """Return the patterns of some parts of a model.

    Args:
        vision: the whole encoder.
        connect: the projector.
        language: word table, decoder and output matrix.
        vit_layers: the last so many layers of an encoder that is frozen otherwise.
        vit_depth: its number of layers; needed with ``vit_layers``.
        lm_head: the output matrix of a language model that is frozen otherwise.
        tied: the output matrix is the word table.

    Raises:
        ConfigError: nothing is left to train, or ``vit_layers`` does not fit ``vit_depth``.
    """
    if vit_layers and (vit_depth is None or not 1 <= vit_layers <= vit_depth):
        raise ConfigError(f"vit_layers={vit_layers} of vit_depth={vit_depth}: give 1 to vit_depth layers")
    out: list[str] = []
    if vision:
        out += VISION
    elif vit_layers and vit_depth is not None:
        out += [f"embedder.vision.layers.{layer}.*" for layer in range(vit_depth - vit_layers, vit_depth)]
    if connect:
        out += CONNECT
    if language:
        out += LANGUAGE
    if (language or lm_head) and not tied:
        out.append("head.weight")
    elif lm_head and not language:
        out.append("embedder.words.weight")
    if not out:
        raise ConfigError("no part of the model is trained: choose at least one")
    return tuple(out)
