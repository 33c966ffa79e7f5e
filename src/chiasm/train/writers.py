"""Metrics for other programs: TensorBoard, Weights & Biases, trackio.

What: ``open_writers``. Each writer gets the rows that ``metrics.jsonl`` gets, numbers only, under their names
(``loss``, ``eval/…``). The file stays the truth: what is resumed, compared and plotted is read from it.

The packages are extras, found when a recipe names them. On a resumed run a writer that can continues its own record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from chiasm.errors import missing_extra

__all__ = ["Writer", "numbers", "open_writers"]


class Writer(Protocol):
    """Where rows of metrics go."""

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of one step."""
        ...

    def close(self) -> None:
        """Write what is held back."""
        ...


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of metrics without its step; those of an evaluation as ``eval/name``."""
    out: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            out |= {f"{name}/{inner}": v for inner, v in numbers(value).items()}
        elif name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            out[name] = float(value)
    return out


def open_writers(
    names: Iterable[str], folder: Path, config: Mapping[str, Any], *, first: int
) -> list[Writer]:
    """Return the writers of a run.

    Args:
        names: of ``tensorboard``, ``wandb``, ``trackio``.
        folder: of the run; its name is the run's name.
        config: the resolved recipe.
        first: the step that is written next; what a writer holds of later ones is of an interrupted run.

    Raises:
        MissingExtraError: a package is not installed.
    """
    return [_WRITERS[name](folder, config, first) for name in names]


class _TensorBoard:
    def __init__(self, folder: Path, config: Mapping[str, Any], first: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing_extra("tensorboard", "tensorboard") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first if first > 1 else None)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, config: Mapping[str, Any], first: int) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise missing_extra("wandb", "wandb") from error
        self._run = wandb.init(
            project="chiasm",
            id=folder.name,
            name=folder.name,
            dir=str(folder),
            config=dict(config),
            resume="allow",
        )

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, folder: Path, config: Mapping[str, Any], first: int) -> None:
        try:
            import trackio  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise missing_extra("trackio", "trackio") from error
        self._run = trackio.init(project="chiasm", name=folder.name, config=dict(config), resume="allow")

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_WRITERS: dict[str, Callable[[Path, Mapping[str, Any], int], Writer]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
