"""InternVL and its language models through OpenVINO: what `backend="openvino"` loads.

The graphs are those of `chiasm.model.openvino`; here they get the embedder of this system and the way that its models
are laid out, so that the result is a `ChatModel` like any other. Nothing of the checkpoint's weights is read where the
cache has the graphs already.
Legend: N tiles, K tokens of a tile, S tile side in pixels, C width of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from chiasm.data.layout import LayoutSpec
from chiasm.errors import ConfigError
from chiasm.media.pixels import normalize
from chiasm.media.tiles import TilePolicy
from chiasm.model.causal import CausalVLM
from chiasm.model.chat import ChatModel
from chiasm.model.openvino.check import VisionSide
from chiasm.model.openvino.export import Compiled, Options, open_compiled
from chiasm.model.openvino.parts import CompiledHead, CompiledModel, CompiledTrunk, FloatWords, run_graph
from chiasm.parts.embed import FeatureCache
from chiasm.parts.language.config import LanguageConfig
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.model import InternVLEmbedder, WordsOnly

__all__ = ["CompiledEmbedder", "compiled_chat", "compiled_model"]


class CompiledEmbedder(InternVLEmbedder):
    """Words from the table, rows of pictures from a compiled encoder, one tile at a time."""

    def __init__(self, words: FloatWords, compiled: object, policy: TilePolicy) -> None:
        nn.Module.__init__(self)  # none of the parts that a parent in PyTorch has
        self.words, self.policy = words, policy
        self.features: FeatureCache | None = None
        self._request = compiled.create_infer_request()  # type: ignore[attr-defined]

    def encode(self, tiles_N3SS: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 tiles -> (N, K, C) tokens."""
        return self.project(normalize(tiles_N3SS, self.policy, dtype=torch.float32))

    def project(self, pixels_N3SS: Tensor) -> Tensor:
        """(N, 3, S, S) normalised pixels -> (N, K, C) tokens."""
        seen = [run_graph(self._request, pixels=one.numpy()).copy() for one in pixels_N3SS.split(1)]
        return torch.cat([torch.from_numpy(one_1KC) for one_1KC in seen])


def vision_side(model: CausalVLM) -> VisionSide | None:
    """The encoder's side of a model; None for a language model alone."""
    embedder = model.embedder
    if not isinstance(embedder, InternVLEmbedder):
        return None
    return VisionSide(embedder.vision, embedder.compress, embedder.connect, embedder.select_layer)


def compiled_model(compiled: Compiled, config: InternVLConfig | LanguageConfig) -> CompiledModel:
    """The parts of an entry put together."""
    words = FloatWords(compiled.words_VC)
    if isinstance(config, LanguageConfig):
        embedder, language = WordsOnly(words), config
    elif compiled.vision is None:
        raise ConfigError(f"{compiled.folder} has no encoder: delete this folder and try again")
    else:
        embedder, language = CompiledEmbedder(words, compiled.vision, config.tiles), config.language
    return CompiledModel(
        embedder, CompiledTrunk(compiled.decoder, language.rope), CompiledHead(compiled.head)
    )


def compiled_chat(
    name: str,
    config: InternVLConfig | LanguageConfig,
    spec: LayoutSpec,
    *,
    sources: Sequence[Path],
    load: Callable[[str | None], ChatModel],
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    deterministic: bool = False,
) -> ChatModel:
    """A model that answers through OpenVINO.

    Args:
        config, spec: of the model, known before its weights are read. sources: the files of its weights.
        load: the PyTorch model in a dtype (None: as stored), for writing the graphs; called only if that is needed.
        dtype: see `chiasm.model.openvino.parts.settings`; "auto" is None.

    Raises:
        MissingExtraError, ConfigError, UsageError, CheckpointError: see `open_compiled`.
    """
    named = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    chosen = None if named == "auto" else named
    if chosen not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype {chosen} is not one that the openvino backend computes in: use float32")

    def make() -> tuple[CausalVLM, VisionSide | None]:
        model = load("float32" if chosen == "float32" else None).model
        return model, vision_side(model)

    compiled = open_compiled(name, sources, make, Options(dtype=chosen, quantize=quantize))
    model = compiled_model(compiled, config)
    model.quantized = quantize
    return ChatModel(model, spec, name=name, deterministic=deterministic)
