"""From parameters to an optimiser: what is trained, which of it decays, and its state as plain tensors.

What: ``trainable`` (freeze patterns), ``make_optimizer`` (AdamW with groups), ``optimizer_tensors`` and
``load_optimizer_tensors`` (state by parameter name, so that checkpoints need no pickle and survive a reordering).
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from chiasm.errors import CheckpointError, ConfigError
from chiasm.train.recipe import Optim

__all__ = ["load_optimizer_tensors", "make_optimizer", "named_parameters", "optimizer_tensors", "trainable"]


def named_parameters(model: nn.Module, objective: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of both: the model's under their own names, the objective's under ``objective.``."""
    names = dict(model.named_parameters())
    return names | {f"objective.{name}": p for name, p in objective.named_parameters()}


def trainable(model: nn.Module, objective: nn.Module, optim: Optim) -> dict[str, nn.Parameter]:
    """Freeze what ``optim.freeze`` matches and return the parameters that are left, by name.

    Parameters that do not require a gradient already (the base of a LoRA layer) stay frozen.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    everything = named_parameters(model, objective)
    for pattern in (*optim.freeze, *(g.pattern for g in optim.groups)):
        if not any(fnmatchcase(name, pattern) for name in everything):
            some = ", ".join(list(everything)[:3])
            raise ConfigError(f"pattern {pattern!r} matches no parameter; names look like {some}")
    for name, parameter in everything.items():
        if any(fnmatchcase(name, pattern) for pattern in optim.freeze):
            parameter.requires_grad_(False)
    left = {name: p for name, p in everything.items() if p.requires_grad}
    if not left:
        raise ConfigError("every parameter is frozen: loosen optim.freeze")
    return left


def make_optimizer(parameters: Mapping[str, nn.Parameter], optim: Optim) -> torch.optim.AdamW:
    """Return AdamW over the parameters.

    Each group carries ``scale``, its factor on the scheduled learning rate, and ``names``, its parameters' names.
    """
    buckets: dict[tuple[float, float], list[str]] = {}
    for name, parameter in parameters.items():
        group = next((g for g in optim.groups if fnmatchcase(name, g.pattern)), None)
        decay = 0.0 if sum(size > 1 for size in parameter.shape) <= 1 else optim.weight_decay
        if group is not None and group.weight_decay is not None:
            decay = group.weight_decay
        buckets.setdefault((group.lr_scale if group else 1.0, decay), []).append(name)
    groups = [
        {"params": [parameters[n] for n in names], "weight_decay": decay, "scale": scale, "names": names}
        for (scale, decay), names in buckets.items()
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as ``{parameter name}/{field}`` -> tensor."""
    out = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                out[f"{name}/{key}"] = torch.as_tensor(value)
    return out


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what ``optimizer_tensors`` returned, to the bit.

    Raises:
        CheckpointError: the parameters are not those of the saved state, or a shape differs.
    """
    by_name = {n: p for g in optimizer.param_groups for n, p in zip(g["names"], g["params"], strict=True)}
    saved: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        saved.setdefault(name, {})[field] = value
    if saved.keys() - by_name.keys():
        extra = sorted(saved.keys() - by_name.keys())[0]
        raise CheckpointError(
            f"optimiser state for {extra!r}, which this recipe does not train: resume its own recipe"
        )
    for name, fields in saved.items():
        parameter = by_name[name]
        for field, value in fields.items():
            if value.dim() and value.shape != parameter.shape:
                raise CheckpointError(
                    f"optimiser state {name}/{field} is {tuple(value.shape)}, its parameter {tuple(parameter.shape)}"
                )
        # AdamW keeps its step count as a float tensor on the CPU; moments live beside their parameter.
        optimizer.state[parameter] = {
            field: value.clone() if field == "step" else value.to(parameter.device)
            for field, value in fields.items()
        }
