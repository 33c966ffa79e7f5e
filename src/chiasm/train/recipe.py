"""Recipe: one frozen tree that says everything about a training run.

What: the dataclasses ``Recipe``, ``Optim``, ``Group``, ``Schedule``, ``Lora``, ``Guard``; ``apply_overrides`` for the
command line's ``--set optim.lr=1e-4``; ``resolved``, the plain dict that is saved with every run.

A recipe holds *descriptions* (frozen dataclasses with a ``build`` or ``open`` method), never modules or tensors, so
that it can be shown, changed and compared before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, Union

from chiasm.errors import ConfigError, UsageError

if typing.TYPE_CHECKING:
    from torch import nn

    from chiasm.train.data import Source
    from chiasm.train.objective import Objective

__all__ = [
    "DataSpec",
    "Group",
    "Guard",
    "Lora",
    "ModelSpec",
    "ObjectiveSpec",
    "Optim",
    "Recipe",
    "Schedule",
    "apply_overrides",
    "did_you_mean",
    "difference",
    "resolved",
]


Tree = TypeVar("Tree")
WRITERS = ("tensorboard", "wandb", "trackio")


class ModelSpec(Protocol):
    """Describes a model: a frozen dataclass whose ``build`` makes it, drawing new weights from the global generator."""

    def build(self) -> nn.Module:
        """Return the model on the CPU."""
        ...


class ObjectiveSpec(Protocol):
    """Describes an objective."""

    def build(self, model: nn.Module, source: Source) -> Objective:
        """Return the objective; it may own parameters (heads), which are trained with the model's."""
        ...


class DataSpec(Protocol):
    """Describes a training set."""

    def open(self) -> Source:
        """Return the source; raise DataError with a remedy when its files are missing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parameters whose name matches ``pattern`` (fnmatch; the first matching group wins) differ from the rest."""

    pattern: str
    lr_scale: float = 1.0
    weight_decay: float | None = None
    """None: as ``Optim.weight_decay``, with its rule for 1-D parameters."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon (matrices only; others of the group stay with AdamW): momentum, orthogonalised, at AdamW's update size."""

    def __post_init__(self) -> None:
        _require(bool(self.pattern), "group.pattern is empty: give an fnmatch pattern such as 'vision.*'")
        _require(self.lr_scale >= 0, f"group.lr_scale must be >= 0, got {self.lr_scale}")
        _require(
            self.weight_decay is None or self.weight_decay >= 0,
            f"group.weight_decay must be >= 0 or none, got {self.weight_decay}",
        )
        _require(
            self.optimizer in ("adamw", "muon"),
            f"group.optimizer must be adamw or muon, got {self.optimizer!r}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim:
    """AdamW, and Muon where a group asks for it.

    Parameters with at most one axis longer than 1 (biases, norms, scales, tokens) are never decayed.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip: float | None = 1.0
    """Maximum L2 norm of the whole gradient; None leaves it as it is."""
    train: tuple[str, ...] = ()
    """fnmatch patterns of the only parameters that are trained (``train.freeze`` has those of the paper's stages); ():
    all. The matrices of LoRA adapters are trained in any case."""
    freeze: tuple[str, ...] = ()
    """fnmatch patterns of parameter names that are not trained (heads of the objective: ``objective.*``)."""
    groups: tuple[Group, ...] = ()
    vision_decay: float = 1.0
    """Factor on the learning rate from one layer of the encoder to the one below it; what is above all layers has 1."""
    language_decay: float = 1.0
    """The same for the decoder's layers; the word table counts as the one below them."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optim.lr must be > 0, got {self.lr}")
        _require(
            0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "optim.beta1 and optim.beta2 must lie in [0, 1)"
        )
        _require(self.eps >= 0, f"optim.eps must be >= 0, got {self.eps}")
        _require(self.weight_decay >= 0, f"optim.weight_decay must be >= 0, got {self.weight_decay}")
        _require(self.clip is None or self.clip > 0, f"optim.clip must be > 0 or none, got {self.clip}")
        for name in ("vision_decay", "language_decay"):
            _require(
                0 < getattr(self, name) <= 1, f"optim.{name} must lie in (0, 1], got {getattr(self, name)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Learning-rate factor over the steps: linear warm-up from 0, then a constant, a line or half a cosine."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int = 0
    """Steps."""
    warmup_ratio: float = 0.0
    """Warm-up as a share of all steps, rounded up, in the place of ``warmup``."""
    final: float = 0.0
    """Factor at the last step, as a share of the peak (cosine, linear)."""

    def __post_init__(self) -> None:
        kinds = ("cosine", "linear", "constant")
        _require(self.kind in kinds, f"schedule.kind must be one of {', '.join(kinds)}, got {self.kind!r}")
        _require(self.warmup >= 0, f"schedule.warmup must be >= 0, got {self.warmup}")
        _require(0 <= self.final <= 1, f"schedule.final must lie in [0, 1], got {self.final}")
        _require(
            0 <= self.warmup_ratio < 1, f"schedule.warmup_ratio must lie in [0, 1), got {self.warmup_ratio}"
        )
        _require(
            not (self.warmup and self.warmup_ratio),
            "schedule has both warmup and warmup_ratio: give one of them",
        )

    def factor(self, step: int, steps: int) -> float:
        """Return the factor for step ``step`` of 0 … steps - 1."""
        warmup = self.warmup or math.ceil(self.warmup_ratio * steps)
        if step < warmup:
            return (step + 1) / warmup
        if self.kind == "constant":
            return 1.0
        share = (step - warmup) / max(1, steps - 1 - warmup)
        share = min(max(share, 0.0), 1.0)
        down = 0.5 * (1 + math.cos(math.pi * share)) if self.kind == "cosine" else 1 - share
        return self.final + (1 - self.final) * down


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Low-rank adapters on the linear layers of one part of the model, all else of which is then frozen.

    Source: InternVL 2.5's fine-tuning scripts: alpha twice the rank, dropout 0.05, every linear layer.
    """

    rank: int = 0
    """0: no adapters."""
    alpha: float | None = None
    """The adapters' product counts alpha / rank times; None: twice the rank."""
    dropout: float = 0.05
    targets: tuple[str, ...] = ()
    """fnmatch patterns of layers by their path within the part (``layers.*.attn.qkv``); (): every linear layer."""

    def __post_init__(self) -> None:
        _require(self.rank >= 0, f"lora.rank must be >= 0, got {self.rank}")
        _require(self.alpha is None or self.alpha > 0, f"lora.alpha must be > 0 or none, got {self.alpha}")
        _require(0 <= self.dropout < 1, f"lora.dropout must lie in [0, 1), got {self.dropout}")

    @property
    def strength(self) -> float:
        """Alpha."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What happens when the loss or the gradient is not a number, or the loss leaps."""

    policy: Literal["stop", "skip", "off"] = "stop"
    """stop: end the run, naming the samples; skip: leave the step out, log its samples, go on; off: do not look."""
    spike: float | None = None
    """A loss above the running median by this many (robust) standard deviations is a leap; None: only NaN and Inf."""
    window: int = 64
    """Accepted steps that median and deviation are taken over; before half of them are there, nothing is a leap."""
    max_skips: int = 10
    """Skipped steps in a row after which the run ends all the same."""

    def __post_init__(self) -> None:
        policies = ("stop", "skip", "off")
        _require(
            self.policy in policies, f"guard.policy must be one of {', '.join(policies)}, got {self.policy!r}"
        )
        _require(self.spike is None or self.spike > 0, f"guard.spike must be > 0 or none, got {self.spike}")
        _require(self.window >= 4, f"guard.window must be >= 4, got {self.window}")
        _require(self.max_skips >= 1, f"guard.max_skips must be >= 1, got {self.max_skips}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything about one run. Same recipe, same machine, same versions: same loss curve, to the bit."""

    name: str
    model: ModelSpec
    objective: ObjectiveSpec
    data: DataSpec
    steps: int
    batch: int
    """Samples of one optimiser step, all micro-batches together."""
    accumulate: int = 1
    """Micro-batches of one step; the gradient equals that of the undivided batch."""
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    compute: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast; the trained weights stay float32."""
    checkpointing: Literal["none", "vision", "language", "all"] = "none"
    """Whose layers are computed again in the backward pass, in the place of keeping their activations; same result."""
    compile: bool = False
    """Compile the encoder's layers and the decoder's feed-forwards; needs a compiler, and changes the last bits."""
    drop_path: float | None = None
    """Stochastic depth of the encoder: the last layer's rate (the first one's is 0); None leaves the model's own."""
    keep_features: int = 0
    """Mebibytes of memory for what a frozen encoder saw: a picture that comes again is not encoded again. 0: none."""
    lora: Lora = field(default_factory=Lora)
    """Adapters on the decoder; they freeze word table and output matrix too."""
    vision_lora: Lora = field(default_factory=Lora)
    """Adapters on the encoder."""
    guard: Guard = field(default_factory=Guard)
    writers: tuple[str, ...] = ()
    """Where metrics go beside ``metrics.jsonl``: tensorboard, wandb, trackio."""
    seed: int = 0
    log_every: int = 1
    eval_every: int = 0
    """Steps between evaluations on the dev split (and one after the last step); 0: never."""
    save_every: int = 500
    keep_last: int = 2
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for good; 0: none but the last."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "save_every", "keep_last"):
            _require(getattr(self, name) >= 1, f"recipe.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("eval_every", "keep_every", "seed", "keep_features"):
            _require(getattr(self, name) >= 0, f"recipe.{name} must be >= 0, got {getattr(self, name)}")
        _require(
            self.batch % self.accumulate == 0,
            f"recipe.batch ({self.batch}) must be a multiple of recipe.accumulate ({self.accumulate})",
        )
        _require(
            self.compute in ("float32", "bfloat16"),
            f"recipe.compute must be float32 or bfloat16, got {self.compute!r}",
        )
        choices = ("none", "vision", "language", "all")
        _require(
            self.checkpointing in choices,
            f"recipe.checkpointing must be one of {', '.join(choices)}, got {self.checkpointing!r}",
        )
        _require(
            self.drop_path is None or 0 <= self.drop_path < 1,
            f"recipe.drop_path must lie in [0, 1) or be none, got {self.drop_path}",
        )
        for name in self.writers:
            _require(name in WRITERS, f"recipe.writers: no writer {name!r}; there are {', '.join(WRITERS)}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for the nearest known word, "" where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


# --- the tree as plain data -----------------------------------------------------------------------------------


def resolved(value: Any) -> Any:
    """Return the tree as JSON-compatible data; each dataclass names its type under ``"type"``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        head = {"type": f"{type(value).__module__}:{type(value).__qualname__}"}
        return head | {f.name: resolved(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): resolved(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [resolved(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"a recipe may hold only plain data and frozen dataclasses, found {type(value).__name__}"
    )


def difference(a: Any, b: Any, path: str = "") -> list[str]:
    """Return the paths at which two resolved trees differ, as ``path: a -> b``."""
    if isinstance(a, dict) and isinstance(b, dict):
        names = sorted(a.keys() | b.keys())
        return [line for n in names for line in difference(a.get(n), b.get(n), f"{path}.{n}" if path else n)]
    return [] if a == b else [f"{path}: {json.dumps(a)} -> {json.dumps(b)}"]


# --- overrides ------------------------------------------------------------------------------------------------


def apply_overrides(recipe: Tree, overrides: Iterable[str]) -> Tree:
    """Return the tree with ``path=value`` settings applied, each parsed as the type its field declares.

    Their order makes no difference but between two settings of one field: the tree is checked when all are applied.
    Values: numbers, ``true``/``false``, ``none`` where allowed, plain strings; tuples and dicts as JSON.

    Raises:
        UsageError: no ``=``, an unknown field (the message lists the fields there), a value of the wrong type (the
            message names field and type).
        ConfigError: the new value is out of the range its dataclass allows.
    """
    settings: list[_Setting] = []
    for item in overrides:
        path, sign, text = item.partition("=")
        if not sign or not path.strip():
            raise UsageError(f"--set {item!r} has no '=': write it as path=value, for example optim.lr=1e-4")
        settings.append((path.strip().split("."), text.strip(), path.strip()))
    return _set(recipe, settings) if settings else recipe


_Setting = tuple[Sequence[str], str, str]
"""What is left of a path below a node, the value's text, and the whole path."""


def _set(node: Any, settings: Sequence[_Setting]) -> Any:
    if isinstance(node, Mapping):
        # A dict field is open: its keys are data (family names), its values are of the type of a present value.
        kind = type(next(iter(node.values()), ""))
        return {**node, **{".".join(path): _parse(text, kind, full) for path, text, full in settings}}
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        raise UsageError(f"--set {settings[0][2]}: {type(node).__name__} has no fields below it")
    names = [f.name for f in dataclasses.fields(node)]
    values: dict[str, Any] = {}
    below: dict[str, list[_Setting]] = {}
    for path, text, full in settings:
        if path[0] not in names:
            raise UsageError(
                f"--set {full}: {type(node).__name__} has no field {path[0]!r}{did_you_mean(path[0], names)}; "
                f"it has {', '.join(names)}"
            )
        if len(path) > 1:
            below.setdefault(path[0], []).append((path[1:], text, full))
            continue
        current = getattr(node, path[0])
        if dataclasses.is_dataclass(current):
            inner = ", ".join(f"{full}.{f.name}" for f in dataclasses.fields(current))
            raise UsageError(
                f"--set {full}: this is a {type(current).__name__}; set one of its fields: {inner}"
            )
        values[path[0]] = _parse(text, _field_type(node, path[0]), full)
    for name, deeper in below.items():
        values[name] = _set(values.get(name, getattr(node, name)), deeper)
    return dataclasses.replace(node, **values)


def _field_type(node: Any, name: str) -> Any:
    hints = typing.get_type_hints(type(node), localns={n: Any for n in ("Source", "Objective")})
    return hints[name]


def _parse(text: str, kind: Any, full: str) -> Any:
    """Read ``text`` as a value of type ``kind`` (int, float, bool, str, Path, Literal, unions, tuple, dict)."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if type(None) in arguments and text.lower() in ("none", "null"):
            return None
        for option in (a for a in arguments if a is not type(None)):
            try:
                return _parse(text, option, full)
            except UsageError:
                continue
        raise _wrong(full, kind, text)
    if origin is Literal:
        for choice in arguments:
            if str(choice) == text:
                return choice
        raise UsageError(f"--set {full}: must be one of {', '.join(map(str, arguments))}, got {text!r}")
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise _wrong(full, kind, text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise _wrong(full, kind, text) from None
    if kind in (str, Path):
        return kind(text)
    if origin in (tuple, list, dict, Mapping) or kind in (tuple, list, dict):
        return _parse_compound(text, kind, origin or kind, arguments, full)
    raise UsageError(
        f"--set {full}: a {_name(kind)} cannot be set from the command line; change the recipe function"
    )


def _parse_compound(text: str, kind: Any, origin: Any, arguments: tuple[Any, ...], full: str) -> Any:
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        raise _wrong(full, kind, text) from None
    if origin in (dict, Mapping) or origin is dict:
        if not isinstance(data, dict):
            raise _wrong(full, kind, text)
        return {k: _parse(_text(v), arguments[1], full) if arguments else v for k, v in data.items()}
    if not isinstance(data, list):
        raise _wrong(full, kind, text)
    if not arguments:
        return origin(data)
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(data) != len(arguments):
            raise _wrong(full, kind, text)
        return tuple(_parse(_text(v), a, full) for v, a in zip(data, arguments, strict=True))
    return origin(_parse(_text(v), arguments[0], full) for v in data)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _name(kind: Any) -> str:
    return (
        kind.__name__
        if isinstance(kind, type) and not typing.get_args(kind)
        else str(kind).replace("typing.", "")
    )


def _wrong(full: str, kind: Any, text: str) -> UsageError:
    return UsageError(f"--set {full}: expected {_name(kind)}, got {text!r}")
