"""Which layers of a model get rounded weights, and the names by which users ask for it.

``"int8"``, ``"int4"`` (groups of 64) or ``"int4-128"``, ``"w8a8"`` for the language model; ``"vision-w8a8"`` for the
encoder; both joined by ``+``. What each means for the arithmetic is said in `chiasm.nn.quant`; what it costs and gains,
measured, in docs/speed.md. Norms, embeddings, positions, the projector and the word table are never rounded: they are
small, or looked up.

The head is part of the language model, and its largest matrix. Where it shares the word table, the table stays as it is
and the head gets a rounded copy. Beside int4 layers the head has int8 weights: it has the last word, and nothing after
it averages its errors out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from chiasm.errors import UsageError
from chiasm.model.causal import CausalVLM
from chiasm.nn.quant import GELU_FLOOR, Int4Linear, Int8Linear
from chiasm.nn.vit import VitAttention, VitMLP
from chiasm.parts.heads.text import TextHead

__all__ = ["QUANTIZE", "Quantization", "Rounding", "quantize_model"]

QUANTIZE = ("int8", "int4", "int4-32", "int4-64", "int4-128", "int4-256", "w8a8", "vision-w8a8")
"""The words of a `Quantization`, joined by +."""

Make = Callable[[nn.Linear], nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What is rounded.

    Attributes:
        language: "int8" or "int4" (weights only), "w8a8" (activations too), or None.
        vision: "w8a8" or None. Weights alone would not make an encoder faster: it has hundreds of rows at once.
        group: inputs that share a scale with int4.
    """

    language: Literal["int8", "int4", "w8a8"] | None = None
    vision: Literal["w8a8"] | None = None
    group: int = 64

    def __post_init__(self) -> None:
        if self.group not in (32, 64, 128, 256):
            raise UsageError(f"int4 weights come in groups of 32, 64, 128 or 256, not {self.group}")

    @classmethod
    def parse(cls, text: str) -> Quantization:
        """Read ``"int4-128+vision-w8a8"`` and the like.

        Raises:
            UsageError: an unknown word, or two for the same part.
        """
        if not isinstance(text, str):
            raise UsageError(f"quantize {text!r} is not known: join some of {', '.join(QUANTIZE)} with +")
        fields: dict[str, object] = {}
        for word in text.lower().split("+"):
            if word not in QUANTIZE:
                raise UsageError(f"quantize {text!r} is not known: join some of {', '.join(QUANTIZE)} with +")
            part = "vision" if word == "vision-w8a8" else "language"
            if part in fields:
                raise UsageError(f"quantize {text!r} names the {part} part twice: choose one")
            kind, _, group = word.removeprefix("vision-").partition("-")
            fields[part] = kind
            if group:
                fields["group"] = int(group)
        return cls(**fields)  # type: ignore[arg-type]

    @property
    def weight_bytes(self) -> float | None:
        """Bytes of a number in the language model's layers, scales included; None where they are not rounded."""
        if self.language == "int4":
            return 0.5 + 4 / self.group
        return 1.0 if self.language else None

    def __str__(self) -> str:
        language = f"int4-{self.group}" if self.language == "int4" else self.language
        return "+".join(word for word in (language, self.vision and f"vision-{self.vision}") if word)


class Rounding:
    """The rounding of one model: given its layers one by one, while they are loaded or afterwards.

    Args:
        model: to be changed in place; it may still be on the meta device.
        how: what is rounded.

    Raises:
        UsageError: nothing is asked for, the model has no encoder that could be rounded, or is rounded already.
    """

    def __init__(self, model: CausalVLM, how: Quantization) -> None:
        if model.quantized:
            raise UsageError(f"quantize {how}: the weights are rounded already ({model.quantized})")
        if not str(how):
            raise UsageError(f"quantize names nothing to round: join some of {', '.join(QUANTIZE)} with +")
        self._model, self._how = model, how
        self._make = dict(_layers(model, how))
        if how.vision and not any(isinstance(m, VitAttention) for m in model.embedder.modules()):
            raise UsageError(f"quantize {how}: this model has no vision encoder to round")

    def layer(self, path: str, module: nn.Module) -> None:
        """Replace this layer, all of whose weights have been loaded, if it is to be rounded."""
        make = self._make.pop(path, None)
        if make is not None and isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(self._model.get_submodule(parent), name, make(module))

    def finish(self) -> None:
        """Replace what is left, and the head."""
        for path in list(self._make):
            self.layer(path, self._model.get_submodule(path))
        if self._how.vision:
            for module in self._model.embedder.modules():
                if isinstance(module, VitAttention):
                    module.by_head = True
            remembered = getattr(self._model.embedder, "features", None)
            if remembered is not None:
                remembered.clear()  # what the encoder said before it was rounded
        head = self._model.head
        if self._how.language and isinstance(head, TextHead):
            rows = head.weight[: head.used].detach()
            linear = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(rows, requires_grad=False)
            bits: Literal[8, 16] = 8 if self._how.language == "w8a8" else 16
            head.rounded = Int8Linear(linear, bits=bits)
            words = getattr(self._model.embedder, "words", None)
            if head.weight is not getattr(words, "weight", None):
                head.weight = None  # type: ignore[assignment] # it has served; `loss` has no use of a rounded head
        self._model.quantized = str(self._how)


def quantize_model(model: CausalVLM, how: Quantization | str) -> CausalVLM:
    """Round the weights of a loaded model, in place, for inference only; returns it.

    Raises:
        UsageError: `how` is not known, or the model lacks the part it names.
    """
    rounding = Rounding(model, Quantization.parse(how) if isinstance(how, str) else how)
    rounding.finish()
    return model


def _language(how: Quantization) -> Make:
    if how.language == "int4":
        return lambda linear: Int4Linear(linear, group=how.group)
    bits: Literal[8, 16] = 16 if how.language == "int8" else 8
    return lambda linear: Int8Linear(linear, bits=bits)


def _layers(model: CausalVLM, how: Quantization) -> Iterator[tuple[str, Make]]:
    """Paths of the layers to be rounded, with what makes their successors."""
    if how.language:
        for path, module in model.trunk.named_modules():
            if isinstance(module, nn.Linear):
                yield f"trunk.{path}", _language(how)
    if how.vision:
        for path, module in model.embedder.named_modules():
            if isinstance(module, VitAttention):
                yield f"embedder.{path}.qkv", _eight
                yield f"embedder.{path}.proj", _eight
            elif isinstance(module, VitMLP):
                yield f"embedder.{path}.fc1", _eight
                yield f"embedder.{path}.fc2", _after_gelu


def _eight(linear: nn.Linear) -> nn.Module:
    return Int8Linear(linear, bits=8)


def _after_gelu(linear: nn.Linear) -> nn.Module:
    return Int8Linear(linear, bits=8, floor=GELU_FLOOR)
