"""InternVLPublicConfig: what a released `config.json` says, in one spelling for both public layouts.

Source: the configuration classes of `InternVLChatModel` (InternVL 2.5, arXiv 2412.05271) and of transformers'
`InternVLForConditionalGeneration`, with their defaults for absent keys. The neutral spelling is the original's.

Nothing of a file is lost. Keys that mean nothing here are kept verbatim, and what a layout has no word for travels
under one key of its file: `original_config` in a `-hf` file, `hf_config` in an original one. Readers of either
layout skip that key; converting back takes it up again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chiasm.checkpoint.hf import (
    HF_VISION_CONSTANTS,
    rope_keys_of_4,
    vision_from_hf,
    vision_to_hf,
)
from chiasm.checkpoint.language import LANGUAGE_DEFAULTS
from chiasm.checkpoint.original import AUTO_MAP, TOP_DEFAULTS, complete_vision
from chiasm.checkpoint.store import CONFIG, read_json
from chiasm.errors import CheckpointError, ConfigError
from chiasm.parts.language.config import FAMILIES, LanguageConfig, refuse_unsupported
from chiasm.parts.vision.internvit import InternViTConfig

__all__ = ["InternVLPublicConfig", "is_internvl", "language_from_public", "read_config"]

_HF_TOP = (
    "architectures",
    "model_type",
    "text_config",
    "vision_config",
    "image_token_id",
    "image_seq_length",
    "downsample_ratio",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "projector_hidden_act",
    "tie_word_embeddings",
    "torch_dtype",
    "dtype",
    "original_config",
)
_ORIGINAL_TOP = (
    "architectures",
    "model_type",
    "llm_config",
    "vision_config",
    "tie_word_embeddings",
    "torch_dtype",
    "dtype",
    "hf_config",
    *TOP_DEFAULTS,
)
_HF_TEMPLATE = "internvl-hf"
"""The chat format of `-hf` checkpoints: that of InternVL 2.5 without a system message."""

# What a value must be, by key: files are written by people too, and a wrong type shall be an answer, not a crash.
_VISION_KINDS = {
    "hidden_size": "a positive integer",
    "intermediate_size": "a positive integer",
    "num_hidden_layers": "a positive integer",
    "num_attention_heads": "a positive integer",
    "num_channels": "a positive integer",
    "patch_size": "a positive integer",
    "image_size": "a positive integer",
    "layer_norm_eps": "a number",
    "initializer_factor": "a number",
    "drop_path_rate": "a number",
    "qkv_bias": "true or false",
    "qk_normalization": "true or false",
    "norm_type": "a string",
    "hidden_act": "a string",
}
_LANGUAGE_KINDS = {
    "vocab_size": "a positive integer",
    "hidden_size": "a positive integer",
    "intermediate_size": "a positive integer",
    "num_hidden_layers": "a positive integer",
    "num_attention_heads": "a positive integer",
    "num_key_value_heads": "a positive integer",
    "head_dim": "a positive integer",
    "max_position_embeddings": "a positive integer",
    "original_max_position_embeddings": "a positive integer",
    "rms_norm_eps": "a number",
    "rope_theta": "a number",
    "rope_scaling": "an object",
    "rope_parameters": "an object",
    "attention_bias": "true or false",
    "tie_word_embeddings": "true or false",
    "model_type": "a string",
}
_TOP_KINDS = {
    "downsample_ratio": "a number",
    "ps_version": "a string",
    "force_image_size": "a positive integer",
    "dynamic_image_size": "true or false",
    "use_thumbnail": "true or false",
    "min_dynamic_patch": "a positive integer",
    "max_dynamic_patch": "a positive integer",
    "pad2square": "true or false",
    "template": "a string",
    "system_message": "a string",
    "image_token_id": "a whole number",
    "dtype": "a string",
}
_SECTIONS = ("vision_config", "llm_config", "text_config")
_ROPE_KINDS = {"rope_theta": "a number", "rope_type": "a string", "type": "a string"}
_ROPE_NUMBERS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# What the `-hf` layouts call a Llama: the same function under other names (InternLM2's rows in another order).
_SPELT_AS_LLAMA = ("internlm2", "internlm3")
# Of an original llm_config, what text_config shares with it; the rest is kept aside when writing `-hf`, because
# transformers 5 reads some old keys as orders (auto_map, attention implementations, generation settings).
_SHARED_LANGUAGE_KEYS = frozenset(
    (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "use_cache",
        "tie_word_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "attention_bias",
        "attention_dropout",
        "mlp_bias",
        "pretraining_tp",
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
        "layer_types",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
)


def is_internvl(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` describes an InternVL model, in either layout."""
    kind = config.get("model_type")
    return kind in ("internvl_chat", "internvl") or (kind is None and "vision_config" in config)


@dataclass(frozen=True, kw_only=True, slots=True)
class InternVLPublicConfig:
    """The facts of an InternVL ``config.json``.

    Attributes:
        vision: vision config in the original's spelling, every shaping key present.
        llm: language config as transformers spells it, verbatim.
        downsample_ratio: side of the token grid over side of the patch grid.
        ps_version: pixel unshuffle, ``"v1"`` (rows and columns swapped) or ``"v2"``.
        select_layer: hidden state of the encoder that is read.
        force_image_size: side of a tile in pixels; None means that of the encoder.
        dynamic_image_size: cut images into tiles.
        use_thumbnail: add the whole image as one more tile when there are several.
        min_dynamic_patch: fewest tiles of an image.
        max_dynamic_patch: most tiles of an image.
        pad2square: pad an image to a square before resizing.
        template: name of the chat template.
        system_message: replaces the template's own.
        tie_words: what the file says about sharing word table and output matrix; the tensors decide (an original
            checkpoint is untied whenever it holds an output matrix).
        image_token_id: id of ``<IMG_CONTEXT>``; only the `-hf` layout writes it down.
        dtype: element type of the weights by its name (``"bfloat16"``).
        original_extras: keys that only the original layout has (nested: vision_config, llm_config).
        hf_extras: keys that only the `-hf` layout has (nested: vision_config, text_config).
    """

    vision: dict[str, Any]
    llm: dict[str, Any]
    downsample_ratio: float = 0.5
    ps_version: str = "v1"
    select_layer: int = -1
    force_image_size: int | None = None
    dynamic_image_size: bool = False
    use_thumbnail: bool = False
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 6
    pad2square: bool = False
    template: str | None = None
    system_message: str | None = None
    tie_words: bool = False
    image_token_id: int | None = None
    dtype: str | None = None
    original_extras: dict[str, Any] = field(default_factory=dict)
    hf_extras: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_kinds("vision_config", self.vision, _VISION_KINDS)
        _check_kinds("vision_config", self.original_extras.get("vision_config", {}), _VISION_KINDS)
        _check_language(self.llm)
        _check_kinds("config", {key: getattr(self, key) for key in _TOP_KINDS}, _TOP_KINDS)
        if not 0 < self.downsample_ratio <= 1:
            raise ConfigError(
                f"downsample_ratio is {self.downsample_ratio!r}: it must be in (0, 1], 0.5 in all releases"
            )
        if self.ps_version not in ("v1", "v2"):
            raise ConfigError(f"ps_version is {self.ps_version!r}: it must be 'v1' or 'v2'")
        if not isinstance(self.select_layer, int):
            raise ConfigError(
                f"the encoder layer to read is {self.select_layer!r}: one integer is supported, -1 in all releases"
            )
        if self.min_dynamic_patch > self.max_dynamic_patch:
            raise ConfigError(
                f"min_dynamic_patch {self.min_dynamic_patch} is above max_dynamic_patch {self.max_dynamic_patch}"
            )

    @property
    def image_size(self) -> int:
        """Side of a tile in pixels."""
        return self.force_image_size or self.vision["image_size"]

    @property
    def tokens_per_tile(self) -> int:
        """Context tokens that one tile takes in the text."""
        side = self.image_size // self.vision["patch_size"]
        return int(side * side * self.downsample_ratio**2)

    def vision_config(self) -> InternViTConfig:
        """The encoder's own configuration; ConfigError where it is not an InternViT."""
        extras = self.original_extras.get("vision_config", {})
        stated = {key: value for key, value in extras.items() if value is not None}
        return InternViTConfig.from_public({**stated, **self.vision}, "original")

    def language_config(self, *, tie_words: bool | None = None) -> LanguageConfig:
        """The decoder's own configuration; ConfigError where its family is not supported.

        Args:
            tie_words: overrides what the file says, for callers that have looked at the tensors.
        """
        # Keys that one layout alone has were set aside, but some would change the function.
        for aside in (self.original_extras.get("llm_config"), self.hf_extras.get("text_config")):
            refuse_unsupported({**(aside or {}), **self.llm})
        return language_from_public(self.llm, tie_words=self.tie_words if tie_words is None else tie_words)

    def with_llm(self, config: Mapping[str, Any], **changes: Any) -> InternVLPublicConfig:
        """The same eyes with another language model, of which ``config`` is the whole ``config.json``."""
        llm, aside = _split_language(copy.deepcopy({**config, **changes}))
        original, hf = copy.deepcopy(self.original_extras), copy.deepcopy(self.hf_extras)
        hf.pop("text_config", None)
        return replace(self, llm=llm, original_extras={**original, "llm_config": aside}, hf_extras=hf)

    @classmethod
    def from_original(cls, config: Mapping[str, Any]) -> InternVLPublicConfig:
        """From the ``config.json`` of an `InternVLChatModel`.

        Raises:
            ConfigError: a section is missing or a value is out of range.
        """
        config = copy.deepcopy(dict(config))
        vision, vision_extras = complete_vision(_section(config, "vision_config"))
        llm, llm_extras = _split_language(_section(config, "llm_config"))
        extras = {key: value for key, value in config.items() if key not in _ORIGINAL_TOP}
        kept = {"vision_config": vision_extras, "llm_config": llm_extras}
        hf_extras = _nested(config, "hf_config")
        return cls(
            vision=vision,
            llm=llm,
            tie_words=bool(config.get("tie_word_embeddings") or llm.get("tie_word_embeddings")),
            image_token_id=hf_extras.pop("image_token_id", None),
            dtype=config.get("torch_dtype") or config.get("dtype"),
            original_extras={**extras, **{key: value for key, value in kept.items() if value}},
            hf_extras=hf_extras,
            **{key: _or(config.get(key), default) for key, default in TOP_DEFAULTS.items()},
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> InternVLPublicConfig:
        """From the ``config.json`` of an `InternVLForConditionalGeneration`, of any transformers release.

        Facts that this layout leaves to its processor (tiling) take that processor's defaults unless the file
        carries an ``original_config``.

        Raises:
            ConfigError: a section is missing, or the file asks for what InternVL does not do.
        """
        config = copy.deepcopy(dict(config))
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy != "default":
            raise ConfigError(
                f"vision_feature_select_strategy {strategy!r} keeps the class token: only 'default' is supported"
            )
        act = config.get("projector_hidden_act", "gelu")
        if act != "gelu":
            raise ConfigError(
                f"projector_hidden_act {act!r} is not supported: InternVL's projector uses 'gelu'"
            )
        section = _section(config, "vision_config")
        for key, expected in HF_VISION_CONSTANTS.items():
            if section.get(key, expected) != expected and key != "projection_dropout":
                raise ConfigError(f"vision_config {key} is {section[key]!r}: an InternViT has {expected!r}")
        vision, vision_extras = vision_from_hf(section)
        text = _section(config, "text_config")
        llm, text_extras = _split_language(text)
        named = text_extras.get("architectures")
        if "architectures" in text_extras and (
            named == _architectures(llm["model_type"]) or not _is_list_of_names(named)
        ):
            del text_extras["architectures"]  # `to_hf` writes it again
        extras = {key: value for key, value in config.items() if key not in _HF_TOP}
        kept = {"vision_config": vision_extras, "text_config": text_extras}
        extras |= {key: value for key, value in kept.items() if value}
        original = _nested(config, "original_config")
        llm["model_type"] = _before_conversion(llm["model_type"], text_extras, original.get("llm_config"))
        top = {**TOP_DEFAULTS, "ps_version": "v2", "dynamic_image_size": True, "use_thumbnail": True}
        top |= {"max_dynamic_patch": 12, "template": _HF_TEMPLATE}
        top = {key: _or(original.pop(key, None), default) for key, default in top.items()}
        top["downsample_ratio"] = _or(config.get("downsample_ratio"), 0.5)
        top["select_layer"] = _or(config.get("vision_feature_layer"), -1)
        # The top-level flag is what transformers obeys; its class default is true.
        tie = config.get("tie_word_embeddings", llm.get("tie_word_embeddings", True))
        return cls(
            vision=vision,
            llm=llm,
            tie_words=bool(tie),
            image_token_id=config.get("image_token_id"),
            dtype=next(
                (d for d in (config, text) for d in (d.get("dtype"), d.get("torch_dtype")) if d), None
            ),
            original_extras=original,
            hf_extras=extras,
            **top,
        )

    def to_original(self) -> dict[str, Any]:
        """The ``config.json`` of an `InternVLChatModel`; it is untied, whatever the source was."""
        top = {key: getattr(self, key) for key in TOP_DEFAULTS}
        top["force_image_size"] = self.image_size  # LMDeploy divides by it, absent or not
        if self.template == _HF_TEMPLATE:  # the remote code knows the same turns under its own name
            top |= {"template": "internvl2_5", "system_message": self.system_message or ""}
        extras = copy.deepcopy(self.original_extras)
        vision_extras = extras.pop("vision_config", {"architectures": ["InternVisionModel"]})
        llm_extras = extras.pop("llm_config", {})
        llm = rope_keys_of_4(copy.deepcopy(self.llm))
        if not _is_list_of_names(llm_extras.get("architectures")):
            llm_extras["architectures"] = _architectures(llm["model_type"])
        if llm.get("model_type") in _SPELT_AS_LLAMA:
            llm_extras.setdefault("bias", False)  # the remote class takes true where the key is absent
        out: dict[str, Any] = {
            "architectures": ["InternVLChatModel"],
            "model_type": "internvl_chat",
            "auto_map": AUTO_MAP,
            **top,
            "tie_word_embeddings": False,
            "torch_dtype": self.dtype,
            **extras,
            "llm_config": {**llm_extras, **llm, "tie_word_embeddings": False},
            "vision_config": {"model_type": "intern_vit_6b", **self.vision, **vision_extras},
        }
        hf_extras = copy.deepcopy(self.hf_extras)
        if self.image_token_id is not None:
            hf_extras["image_token_id"] = self.image_token_id
        if hf_extras:
            out["hf_config"] = hf_extras
        return _without_none(out, ("template", "system_message", "torch_dtype"))

    def to_hf(self, *, old: bool = False) -> dict[str, Any]:
        """The ``config.json`` of an `InternVLForConditionalGeneration`.

        Args:
            old: spell dtype and rotary keys as transformers before 5 reads them.

        Raises:
            ConfigError: the layout cannot express the model (v1 unshuffle), or ``image_token_id`` is not known.
        """
        if self.ps_version != "v2":
            raise ConfigError(
                "ps_version is 'v1': the -hf layout knows only v2 and would read the image tokens transposed"
            )
        if self.image_token_id is None:
            raise ConfigError("the -hf layout needs the id of <IMG_CONTEXT>: give image_token_id")
        extras = copy.deepcopy(self.hf_extras)
        vision = vision_to_hf(copy.deepcopy(self.vision), extras.pop("vision_config", {}))
        text_extras = extras.pop("text_config", {})
        llm, kind = copy.deepcopy(self.llm), str(self.llm.get("model_type"))
        original_extras = copy.deepcopy(self.original_extras)
        if kind == "phi3":
            raise ConfigError(
                "model_type is 'phi3': the -hf layout has no port of InternVL on Phi-3, only the original layout does"
            )
        if kind in _SPELT_AS_LLAMA:
            stated = {key: value for key, value in llm.items() if value is not None}
            llm = {**LANGUAGE_DEFAULTS[kind], **llm, **stated, "model_type": "llama"}
            original_extras.setdefault("llm_config", {})["model_type"] = kind
        if old:
            llm = rope_keys_of_4(llm)
        original = {key: getattr(self, key) for key in TOP_DEFAULTS}
        for key in ("downsample_ratio", "select_layer"):  # the layout has words for these
            del original[key]
        return _without_none(
            {
                "architectures": ["InternVLForConditionalGeneration"],
                "model_type": "internvl",
                "image_token_id": self.image_token_id,
                "image_seq_length": self.tokens_per_tile,
                "downsample_ratio": self.downsample_ratio,
                "vision_feature_layer": self.select_layer,
                "vision_feature_select_strategy": "default",
                "projector_hidden_act": "gelu",
                "tie_word_embeddings": self.tie_words,
                "torch_dtype" if old else "dtype": self.dtype,
                **extras,
                # Servers choose the decoder's class by the architecture, which transformers can do without.
                "text_config": {
                    "architectures": _architectures(llm["model_type"]),
                    **llm,
                    **text_extras,
                    "tie_word_embeddings": self.tie_words,
                },
                "vision_config": vision,
                "original_config": {**original, **original_extras},
            },
            ("torch_dtype", "dtype"),
        )


def language_from_public(config: Mapping[str, Any], *, tie_words: bool | None = None) -> LanguageConfig:
    """LanguageConfig from a transformers-style dict, class defaults of its family filled in.

    Args:
        config: a language model's ``config.json``, or the language section of a larger one.
        tie_words: overrides the config's own flag.

    Raises:
        ConfigError: the family or a setting is not supported, or a value is out of range.
    """
    _check_language(config)
    kind = config.get("model_type") or _model_type(config.get("architectures"))
    config = {**config, "model_type": kind}
    filled = LANGUAGE_DEFAULTS.get(str(kind), {}) | {k: v for k, v in config.items() if v is not None}
    if tie_words is not None:
        filled["tie_word_embeddings"] = tie_words
    return LanguageConfig.from_public(filled)


def read_config(folder: str | Path) -> InternVLPublicConfig:
    """Read the ``config.json`` of an InternVL checkpoint folder, in either layout.

    Raises:
        CheckpointError: the file is missing or malformed, or describes another kind of model.
        ConfigError: it asks for what InternVL does not do.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}: give the folder of a checkpoint")
    config = read_json(path)
    if not is_internvl(config):
        raise CheckpointError(
            f"{path} describes {config.get('model_type')!r}, not an InternVL model (internvl_chat or internvl)"
        )
    if "llm_config" in config or config.get("model_type") == "internvl_chat":
        return InternVLPublicConfig.from_original(config)
    return InternVLPublicConfig.from_hf(config)


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    if not isinstance(section, dict):
        raise ConfigError(
            f"the config has no {name} section: it is not the config.json of a whole InternVL model"
        )
    return section


def _split_language(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the keys that both layouts share, with a ``model_type``; the rest)."""
    shared = {key: value for key, value in config.items() if key in _SHARED_LANGUAGE_KEYS}
    rest = {key: value for key, value in config.items() if key not in _SHARED_LANGUAGE_KEYS}
    shared.setdefault("model_type", _model_type(rest.get("architectures")))
    return shared, rest


def _nested(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the other layout left, with sections that are objects."""
    nested = config.get(name) or {}
    sections = [nested, *(nested.get(key, {}) for key in _SECTIONS)] if isinstance(nested, dict) else [nested]
    if not all(isinstance(section, dict) for section in sections):
        raise ConfigError(f"the config's {name} is not what a conversion writes: delete that key")
    return nested


def _check_kinds(name: str, section: Any, kinds: Mapping[str, str]) -> None:
    """Raise ConfigError for a value of the wrong type; absent and null ones are others' business."""
    if not isinstance(section, Mapping):
        raise ConfigError(f"{name} is {section!r}: an object is needed")
    for key, kind in kinds.items():
        value = section.get(key)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        fits = {
            "a positive integer": number and isinstance(value, int) and 0 < value < 1 << 31,
            "a whole number": number and isinstance(value, int),
            "a number": number,
            "true or false": isinstance(value, bool),
            "a string": isinstance(value, str),
            "an object": isinstance(value, Mapping),
        }[kind]
        if not fits:
            raise ConfigError(f"{name} {key} is {value!r}: {kind} is needed")


def _check_language(config: Mapping[str, Any]) -> None:
    _check_kinds("language config", config, _LANGUAGE_KINDS)
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        kind = rope.get("rope_type") or rope.get("type")
        for number in _ROPE_NUMBERS.get(kind, ()) if isinstance(kind, str) else ():
            _check_kinds(f"language config {key}", rope, {number: "a number"})
            if rope.get(number) is None:
                raise ConfigError(f"language config {key} of type {kind!r} lacks {number!r}")
        _check_kinds(f"language config {key}", rope, _ROPE_KINDS)


def _before_conversion(kind: Any, text: Mapping[str, Any], original: dict[str, Any] | None) -> Any:
    """The ``model_type`` that a `-hf` Llama had in the original layout: what a conversion noted, or still names.

    What it noted is taken out of ``original``.
    """
    noted = (original or {}).pop("model_type", None)
    named = _model_type(text.get("architectures"))
    for found in (noted, named):
        if kind == "llama" and found in _SPELT_AS_LLAMA and named in (None, found):
            return found
    return kind


def _architectures(kind: Any) -> list[str]:
    """What `architectures` of a language config says for a ``model_type``; empty for one that is not known."""
    return [architecture for architecture, known in FAMILIES.values() if known == kind]


def _is_list_of_names(value: Any) -> bool:
    """Whether `architectures` is what servers read: a text alone is none of it."""
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _or(value: Any, default: Any) -> Any:
    """Null means absent, as in the configuration classes."""
    return default if value is None else value


def _model_type(architectures: Any) -> str | None:
    """The ``model_type`` of an architecture; one that is not supported stands for itself, to be named as such."""
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    known = next((kind for architecture, kind in FAMILIES.values() if architecture == first), None)
    return known or (None if first is None else str(first))


def _without_none(config: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not (key in keys and value is None)}
