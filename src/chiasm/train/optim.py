"""From parameters to optimisers: what is trained, which of it decays, and its state as plain tensors.

What: ``trainable`` (train and freeze patterns), ``depth_factors`` (layer-wise learning rates), ``make_optimizers``
(AdamW and Muon, by groups), ``optimizer_tensors`` and ``load_optimizer_tensors`` (state by parameter name, so that
checkpoints need no pickle and survive a reordering).
Source: layer-wise decay as in BEiT (arXiv 2106.08254), which the encoder's public fine-tunings follow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.errors import CheckpointError, ConfigError
from chiasm.train.recipe import Optim

__all__ = [
    "depth_factors",
    "load_optimizer_tensors",
    "make_optimizers",
    "named_parameters",
    "optimizer_tensors",
    "trainable",
]

# What an encoder has beside its layers and below them is named; what else there may be counts as above all layers.
_VISION = re.compile(r"(?:.*\.)?vision\.(?:layers\.(?P<layer>\d+)\.|(?=(?:class|patch|position)_embedding))")
_LANGUAGE = re.compile(r"trunk\.layers\.(?P<layer>\d+)\.|(?P<words>embedder\.words\.)")


def named_parameters(model: nn.Module, objective: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of both: the model's under their own names, the objective's under ``objective.``."""
    names = dict(model.named_parameters())
    return names | {f"objective.{name}": p for name, p in objective.named_parameters()}


def trainable(model: nn.Module, objective: nn.Module, optim: Optim) -> dict[str, nn.Parameter]:
    """Freeze what ``optim.train`` does not match or ``optim.freeze`` does; return the other parameters, by name.

    Parameters that do not require a gradient already (the base of a LoRA layer) stay frozen. LoRA matrices need no
    match of ``optim.train``. A parameter that has two names (words that are the output matrix too) is meant by either,
    and listed under the first.

    Raises:
        ConfigError: a pattern matches nothing, nothing is left to train, or what is left is stored in bfloat16, whose
            8 bits would lose most updates.
    """
    everything = named_parameters(model, objective)
    names: dict[nn.Parameter, list[str]] = {parameter: [name] for name, parameter in everything.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in names[parameter]:
            names[parameter].append(name)

    def matches(parameter: nn.Parameter, patterns: Iterable[str]) -> bool:
        return any(fnmatchcase(name, pattern) for name in names[parameter] for pattern in patterns)

    unknown = [p for p in (*optim.train, *optim.freeze) if not any(matches(one, (p,)) for one in names)]
    unknown += [
        g.pattern for g in optim.groups if not any(fnmatchcase(name, g.pattern) for name in everything)
    ]
    if unknown:
        some = ", ".join(list(everything)[:3])
        raise ConfigError(f"pattern {unknown[0]!r} matches no parameter; names look like {some}")
    for name, parameter in everything.items():
        chosen = not optim.train or matches(parameter, optim.train)
        chosen = chosen or name.endswith((".lora_A", ".lora_B"))
        if not chosen or matches(parameter, optim.freeze):
            parameter.requires_grad_(False)
    left = {name: p for name, p in everything.items() if p.requires_grad}
    if not left:
        raise ConfigError("every parameter is frozen: loosen optim.freeze or optim.train")
    for name, parameter in left.items():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f"{name} would be trained in {str(parameter.dtype).removeprefix('torch.')}, whose few bits lose most "
                "updates: load its part as float32 (--set model.vision_dtype=float32, --set "
                "model.language_dtype=float32) or freeze it"
            )
    return left


def depth_factors(names: Iterable[str], optim: Optim) -> dict[str, float]:
    """Return the factor of each parameter's learning rate by its depth; 1 where ``optim`` decays nothing.

    With L layers and decay d, layer i of 0 … L - 1 has d ** (L - i), what lies below the layers (patch and position
    embedding, word table) d ** (L + 1), and all else 1.

    Args:
        names: of *all* parameters of the model, also frozen ones, so that L is known.
        optim: its ``vision_decay`` and ``language_decay``.
    """
    names = list(names)
    out = dict.fromkeys(names, 1.0)
    for decay, pattern in ((optim.vision_decay, _VISION), (optim.language_decay, _LANGUAGE)):
        if decay == 1.0:
            continue
        found = {name: match for name in names if (match := pattern.match(name))}
        depth = {name: -1 if m["layer"] is None else int(m["layer"]) for name, m in found.items()}
        layers = 1 + max(depth.values(), default=-1)
        out |= {name: decay ** (layers - layer) for name, layer in depth.items()}
    return out


def make_optimizers(
    parameters: Mapping[str, nn.Parameter], optim: Optim, everything: Iterable[str] = ()
) -> list[torch.optim.Optimizer]:
    """Return AdamW and, where groups ask for it, Muon over the parameters.

    ``everything`` are the names of all parameters, for ``depth_factors``; by default those of ``parameters``.
    Each of their groups carries ``scale``, its factor on the scheduled learning rate, and ``names``, its parameters'
    names. Muon's update is scaled to AdamW's typical size, so that one learning rate serves both.
    """
    buckets: dict[tuple[str, float, float], list[str]] = {}
    factors = depth_factors(list(everything) or parameters, optim)
    for name, parameter in parameters.items():
        group = next((g for g in optim.groups if fnmatchcase(name, g.pattern)), None)
        decay = 0.0 if sum(size > 1 for size in parameter.shape) <= 1 else optim.weight_decay
        if group is not None and group.weight_decay is not None:
            decay = group.weight_decay
        kind = "muon" if group is not None and group.optimizer == "muon" and parameter.dim() == 2 else "adamw"
        scale = (group.lr_scale if group else 1.0) * factors[name]
        buckets.setdefault((kind, scale, decay), []).append(name)
    groups: dict[str, list[dict[str, Any]]] = {}
    for (kind, scale, decay), names in buckets.items():
        group = {
            "params": [parameters[n] for n in names],
            "weight_decay": decay,
            "scale": scale,
            "names": names,
        }
        groups.setdefault(kind, []).append(group)
    out: list[torch.optim.Optimizer] = []
    if "adamw" in groups:
        betas = (optim.beta1, optim.beta2)
        out.append(torch.optim.AdamW(groups["adamw"], lr=optim.lr, betas=betas, eps=optim.eps))
    if "muon" in groups:
        out.append(
            torch.optim.Muon(groups["muon"], lr=optim.lr, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        )
    return out


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the optimisers' state as ``{parameter name}/{field}`` -> tensor."""
    out = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                for key, value in optimizer.state.get(parameter, {}).items():
                    out[f"{name}/{key}"] = torch.as_tensor(value)
    return out


def load_optimizer_tensors(
    optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Restore what ``optimizer_tensors`` returned, to the bit.

    Raises:
        CheckpointError: the parameters are not those of the saved state, or a shape differs.
    """
    owners = {
        name: (optimizer, parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    saved: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        saved.setdefault(name, {})[field] = value
    if saved.keys() - owners.keys():
        extra = sorted(saved.keys() - owners.keys())[0]
        raise CheckpointError(
            f"optimiser state for {extra!r}, which this recipe does not train: resume its own recipe"
        )
    for name, fields in saved.items():
        optimizer, parameter = owners[name]
        for field, value in fields.items():
            if value.dim() and value.shape != parameter.shape:
                raise CheckpointError(
                    f"optimiser state {name}/{field} is {tuple(value.shape)}, its parameter {tuple(parameter.shape)}"
                )
        # AdamW keeps its step count as a float tensor on the CPU; all else lives beside its parameter.
        optimizer.state[parameter] = {
            field: value.clone() if field == "step" else value.to(parameter.device)
            for field, value in fields.items()
        }
