"""Errors that a user can act on.

Every failure that Chiasm foresees is a ``ChiasmError`` whose message is one line: what went wrong, where, and
what to do about it. The command line prints that line to stderr and leaves with ``exit_code``; any other
exception is a bug.

This module is below every ring and imports nothing of the package.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "CheckpointError",
    "ChiasmError",
    "ConfigError",
    "ContextOverflowError",
    "DataError",
    "ImageError",
    "MissingExtraError",
    "NumericsError",
    "ServiceError",
    "TemplateError",
    "UsageError",
    "missing_extra",
]


class ChiasmError(Exception):
    """Base of all foreseen failures: ``str(error)`` is one line, ``exit_code`` the process's exit status."""

    exit_code: ClassVar[int] = 1


class UsageError(ChiasmError):
    """The command or the call was put together wrongly (unknown option, contradicting arguments)."""

    exit_code: ClassVar[int] = 2


class ImageError(ChiasmError):
    """A picture or video cannot be opened or used: truncated, not an image, too large, zero-sized."""


class CheckpointError(ChiasmError):
    """A checkpoint is incomplete or does not fit the model: missing shard, wrong shape, unmapped key."""


class ConfigError(ChiasmError):
    """A configuration value is out of range or contradicts another one."""


class TemplateError(ChiasmError):
    """A conversation does not fit its chat template: unknown template, image tags without images."""


class DataError(ChiasmError):
    """A training or evaluation record is malformed."""


class ContextOverflowError(ChiasmError):
    """The sequence is longer than the model's context window."""


class NumericsError(ChiasmError):
    """What was computed is not a number: the range of a dtype was passed."""


class ServiceError(ChiasmError):
    """A server that was asked over the network is not there, refuses, or does not answer as it should."""


class MissingExtraError(ChiasmError):
    """An optional package is needed and not installed; the message names the extra that brings it."""


def missing_extra(package: str, extra: str) -> MissingExtraError:
    """Return the error for an absent optional package; raise it ``from`` the ``ImportError``.

    Args:
        package: the package that failed to import, as its users call it (``"av"``).
        extra: the extra of this project that installs it (``"video"``).
    """
    return MissingExtraError(f"{package} is not installed: run pip install 'chiasm[{extra}]'")
