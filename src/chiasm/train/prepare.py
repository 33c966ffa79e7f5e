"""From a built model to one that is ready to train: what a recipe switches on it, before anything is frozen or sharded.

What: ``prepare`` (DropPath, recomputed activations, LoRA, compilation, in this order). The parts are found by what they
are (an ``InternViT``, a ``Decoder``), so a model that lacks one refuses only what asks for it.
Source: InternVL 2.5 (arXiv 2412.05271, table 3) for DropPath; its fine-tuning scripts for LoRA.
"""

from __future__ import annotations

import shutil

import torch
from torch import nn

from chiasm.data.mixture import derive_seed
from chiasm.errors import ConfigError, UsageError
from chiasm.nn.block import Block
from chiasm.nn.lora import apply_lora, fused_splits
from chiasm.nn.vit import DropPath, drop_path_rates
from chiasm.parts.embed import FeatureCache
from chiasm.parts.language.decoder import Decoder
from chiasm.parts.vision.internvit import InternViT
from chiasm.train.recipe import Lora, Recipe

__all__ = ["decoder_of", "keep_features", "prepare", "require_compiler", "vision_of"]


def vision_of(model: nn.Module) -> InternViT:
    """Return the model's encoder; ConfigError where it has none."""
    found = next((module for module in model.modules() if isinstance(module, InternViT)), None)
    if found is None:
        raise ConfigError(
            f"{type(model).__name__} has no InternViT: leave the recipe's vision switches alone"
        )
    return found


def decoder_of(model: nn.Module) -> Decoder:
    """Return the model's decoder; ConfigError where it has none."""
    found = next((module for module in model.modules() if isinstance(module, Decoder)), None)
    if found is None:
        raise ConfigError(
            f"{type(model).__name__} has no decoder: leave the recipe's language switches alone"
        )
    return found


def prepare(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Change the model in place as the recipe says, and return it; new weights depend on the recipe's seed only.

    Raises:
        ConfigError: the recipe switches something of a part that the model lacks, a LoRA pattern matches nothing, or
            parts in other dtypes than float32 meet without autocast.
    """
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    if recipe.compute == "float32" and len(kinds) > 1:
        raise ConfigError(
            f"{recipe.name}: parameters are {' and '.join(kinds)}, which only autocast brings together: "
            "--set compute=bfloat16, or load all parts as float32 (--set model.vision_dtype=float32, "
            "--set model.language_dtype=float32)"
        )
    if recipe.drop_path is not None:
        layers = [
            [m for m in layer.modules() if isinstance(m, DropPath)] for layer in vision_of(model).layers
        ]
        for drops, rate in zip(layers, drop_path_rates(recipe.drop_path, len(layers)), strict=True):
            for drop in drops:
                drop.rate = rate
    if recipe.checkpointing in ("vision", "all"):
        vision_of(model).checkpoint = True
    if recipe.checkpointing in ("language", "all"):
        decoder_of(model).checkpointing = True
    if recipe.lora.rank or recipe.vision_lora.rank:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(recipe.seed, "lora"))
            if recipe.lora.rank:
                adapt(decoder_of(model), recipe.lora)
                for name, parameter in model.named_parameters():
                    if name in ("embedder.words.weight", "head.weight"):
                        parameter.requires_grad_(False)
            if recipe.vision_lora.rank:
                adapt(vision_of(model), recipe.vision_lora)
    if recipe.compile:
        compile_layers(model)
    return model


def adapt(part: nn.Module, lora: Lora) -> list[str]:
    """Freeze a part, put adapters on its linear layers, one for each split of a fused one, and return their paths."""
    part.requires_grad_(False)
    return apply_lora(
        part, lora.targets or ("*",), lora.rank, lora.strength, lora.dropout, splits=fused_splits(part)
    )


def compile_layers(model: nn.Module) -> None:
    """Compile, on first use, what computes rows without looking at documents: encoder layers and feed-forwards.

    Attention over packed documents takes their lengths as Python integers, each set of which would be compiled anew.
    """
    for module in model.modules():
        if isinstance(module, InternViT):
            for layer in module.layers:
                layer.compile(dynamic=True)
        elif isinstance(module, Block):
            module.ffn.compile(dynamic=True)


def require_compiler(device: torch.device) -> None:
    """Raise UsageError unless torch.compile can work for this device."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UsageError("compile=true needs triton on a GPU: install it, or set compile=false") from None
    elif not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise UsageError("compile=true needs a C++ compiler on the path: install g++, or set compile=false")


def keep_features(model: nn.Module, recipe: Recipe, *, processes: int = 1) -> None:
    """Give the embedder of a model whose encoder is frozen a memory of `recipe.keep_features` mebibytes, if set.

    Called when it is known what is trained.

    Raises:
        ConfigError: the encoder is trained or drops paths, so that what it saw once is not what it would see again;
            the model has no such memory; or processes share the encoder's layers.
    """
    if not recipe.keep_features:
        return
    hint = "leave recipe.keep_features at 0"
    embedder = next((module for module in model.modules() if hasattr(module, "kept")), None)
    if embedder is None:
        raise ConfigError(f"{type(model).__name__} keeps no features: {hint}")
    if processes > 1:
        raise ConfigError(
            f"{processes} processes share the encoder's layers and must run them in step: {hint}"
        )
    vision = vision_of(model)
    if any(p.requires_grad for p in vision.parameters()):
        raise ConfigError(f"the encoder is trained, so its features change: freeze it, or {hint}")
    if any(drop.rate for drop in vision.modules() if isinstance(drop, DropPath)):
        raise ConfigError(
            "a frozen encoder that drops paths sees another picture each time: --set drop_path=0"
        )
    embedder.kept = FeatureCache(recipe.keep_features << 20)  # type: ignore[assignment]
