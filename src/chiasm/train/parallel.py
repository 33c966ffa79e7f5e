"""Several processes: who they are, how they talk, how a model is divided among them.

What: ``World`` (this process among all; alone it costs nothing), ``join`` (what torchrun says), ``shard`` (FSDP2),
the sum of replicated gradients, the norm of divided ones.
Source: PyTorch's own engine (``torch.distributed``, ``fully_shard``); design of this package for what is exact.

Each process computes the parts p of a step with p % size == rank. Gradients are *summed* over processes, never
averaged, and divided by the weight of the whole step, so the number of processes changes the order of additions and
nothing else.

Layers (whatever stands in an ``nn.ModuleList``) are divided one by one, all else with the root. So the processes of a
step must walk through the same layers equally often: a module that would not, such as an encoder where a micro-batch
has no pictures, has an attribute ``lockstep`` that asks it to. An objective's own parameters are replicated, because
its heads need not all be used in every micro-batch.

Talk that is not about gradients (weights of losses, metrics, errors) goes as Python objects over a CPU group.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from chiasm.errors import ConfigError, UsageError

if TYPE_CHECKING:  # FSDP takes most of a second to import: only where it is used
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "World",
    "add_replicated",
    "clip_by",
    "gathered",
    "is_divided",
    "join",
    "leave",
    "shard",
    "total_norm",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among ``size``; the default is to be alone."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    control: Any = None
    """Group for objects, on the CPU."""

    @property
    def main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank; every process must call it. Values are plain data."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def tell(self, value: Any) -> Any:
        """Return the first process's value."""
        return self.share(value if self.main else None)[0]

    def parts(self, count: int) -> range:
        """Return the numbers of this process's parts out of ``count``."""
        return range(self.rank, count, self.size)


def join(device: str | torch.device = "cpu") -> World:
    """Enter the group that torchrun has started this process for; alone where there is none.

    Args:
        device: ``cpu`` or ``cuda``; on several GPUs each process takes its own.

    Raises:
        UsageError: there is no such device, or torchrun has started more processes on this machine than it has GPUs.
    """
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UsageError(f"no device {device!r}: give cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("no GPU that PyTorch can use: give --device cpu, or install a CUDA build of PyTorch")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return World(device=device)
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"torchrun started process {local} of this machine, which has {torch.cuda.device_count()} GPUs: "
                "give --nproc-per-node at most that many"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        control = dist.new_group(backend="gloo")
    else:
        dist.init_process_group("gloo")
        control = None
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (size,))
    return World(rank=rank, size=size, device=device, mesh=mesh, control=control)


def leave(world: World) -> None:
    """Leave the group."""
    if world.size > 1:
        dist.destroy_process_group()


def shard(model: nn.Module, world: World, *, bfloat16: bool = False) -> None:
    """Divide the model's parameters among the processes, in place; the model must be the same in each.

    Args:
        model: on the world's device.
        world: more than one process.
        bfloat16: gather parameters in bfloat16 (the parameters themselves and sums of gradients stay float32).

    Raises:
        ConfigError: a parameter has no axis that could be divided.
    """
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise ConfigError(
                f"{name} is a single number, which cannot be divided among processes: give it an axis"
            )
    policy = (
        MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        if bfloat16
        else MixedPrecisionPolicy()
    )
    # Inner lists first: a divided module leaves its parameters out of the one around it.
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for layers in reversed(lists):
        for layer in layers:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=world.mesh, mp_policy=policy)
    fully_shard(model, mesh=world.mesh, mp_policy=policy)
    if hasattr(model, "loss"):
        register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sums, whatever the back end: gloo can neither average nor pre-multiply.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        if hasattr(module, "lockstep"):
            module.lockstep = True  # type: ignore[assignment]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Have the root's own parameters whole for a while, so that a divided model's methods can be called one by one."""
    if not any(is_divided(parameter) for parameter in model.parameters()):
        yield
        return
    model.unshard()  # type: ignore[operator]  # of FSDPModule, which `shard` made it
    try:
        yield
    finally:
        model.reshard()  # type: ignore[operator]


def is_divided(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "full_tensor")  # a DTensor


def add_replicated(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Sum the gradients of whole parameters over all processes; one that none has used keeps no gradient."""
    whole = [p for p in parameters if not is_divided(p)]
    if world.size == 1 or not whole:
        return
    used = torch.tensor([p.grad is not None for p in whole], dtype=torch.float32, device=world.device)
    dist.all_reduce(used)
    for parameter, count in zip(whole, used.tolist(), strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients together, divided or not, as a plain tensor."""
    divided, whole = _apart(gradients)
    if not divided:
        return torch.nn.utils.get_total_norm(whole)
    norm = torch.nn.utils.get_total_norm(divided)
    norm = norm.full_tensor() if is_divided(norm) else norm  # type: ignore[attr-defined]
    return torch.hypot(norm, torch.nn.utils.get_total_norm(whole).to(norm)) if whole else norm


def clip_by(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale the gradients so that their norm, now ``norm``, is at most ``limit``."""
    for group in _apart([p for p in parameters if p.grad is not None]):
        if group:
            torch.nn.utils.clip_grads_with_norm_(group, limit, norm)


def _apart(tensors: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """(Divided, whole): PyTorch's fused loops take one kind at a time."""
    divided: list[Any] = []
    whole: list[Any] = []
    for tensor in tensors:
        (divided if is_divided(tensor) else whole).append(tensor)
    return divided, whole
