"""What a result depends on, as plain data: the manifest without which two numbers cannot be compared.

What: ``Manifest``, ``first_difference``. Fields that matter for comparing (`MATTERS`) are checked; the rest
(versions of packages, machine) is recorded, because it explains small differences but does not make another experiment.

Two uses of one rule: *comparing models* leaves the field ``model`` free, *comparing prompts* the field ``prompt``,
and so on; whatever else differs is named and refused, first difference first.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from chiasm.errors import ConfigError, DataError

__all__ = ["MATTERS", "Manifest", "first_difference"]

#: Checked in this order: what is measured, on what, how it is read, how it is asked, of whom.
MATTERS = (
    "bench",
    "data",
    "metric",
    "parser",
    "prompt",
    "tiles",
    "frames",
    "video",
    "decoding",
    "seed",
    "model",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that a score depends on.

    Attributes:
        bench: name of the benchmark.
        data: {"hash", "items", "pictures"}; the hash covers questions, answers, options and the bytes of pictures.
        metric: {"name", "version", "mode"}.
        parser: {"version"} of answer extraction and parsing, and the mode.
        prompt: {"name", "version", "template"}.
        tiles: fields of the tile policy.
        frames: frames taken of a video; None for pictures.
        video: how videos are looked at: {"sampling", "formula", "tiles_per_frame", "tokens_per_tile",
            "frame_tags", "folder_fps", "clips", "subtitles"}; empty for pictures.
        decoding: {"kind", "max_new_tokens", and for sampling "temperature", "top_p", "votes"}.
        seed: of sampling.
        model: {"name", "weights" (a hash), "dtype", "template", "system", …}.
        versions: of packages; recorded, not compared.
        environment: machine, git revision; recorded, not compared.
    """

    bench: str
    data: Mapping[str, Any]
    metric: Mapping[str, Any]
    parser: Mapping[str, Any]
    prompt: Mapping[str, Any]
    tiles: Mapping[str, Any] = field(default_factory=dict)
    frames: int | None = None
    video: Mapping[str, Any] = field(default_factory=dict)
    decoding: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    model: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON holds it."""
        return json.loads(json.dumps(asdict(self)))

    def identity(self) -> dict[str, Any]:
        """What decides whether kept answers may be used again: all that matters, and the versions."""
        whole = self.to_dict()
        # What says nothing about videos is left out, so that answers about pictures that were kept before it was there
        # stay good.
        return {name: whole[name] for name in (*MATTERS, "versions") if name != "video" or whole[name]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "manifest") -> Manifest:
        """Read what `to_dict` wrote; unknown fields are left out, a missing one is a DataError."""
        known = {f.name for f in fields(cls)}
        missing = [name for name in ("bench", "data", "metric", "parser", "prompt") if name not in data]
        if missing:
            raise DataError(f"{where} has no {missing[0]!r}: it was not written by chiasm eval --bench")
        return cls(**{name: value for name, value in data.items() if name in known})


def first_difference(a: Manifest, b: Manifest, *, vary: Collection[str] = ("model",)) -> str | None:
    """Return "prompt.version: 1 and 2", the first thing that matters and differs, or None.

    Args:
        a: of one result.
        b: of the other.
        vary: fields that are compared on purpose; may name a part ("decoding.votes").

    Raises:
        ConfigError: `vary` names no field that matters.
    """
    unknown = [name for name in vary if name.partition(".")[0] not in MATTERS]
    if unknown:
        raise ConfigError(f"vary names {unknown[0]!r}: choose among {', '.join(MATTERS)}")
    left, right = a.to_dict(), b.to_dict()
    for name in MATTERS:
        found = _differs(left[name], right[name], name, frozenset(vary))
        if found:
            return found
    return None


def _differs(a: Any, b: Any, path: str, free: Collection[str]) -> str | None:
    if path in free or a == b:
        return None
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys((*a, *b)):
            found = _differs(a.get(name), b.get(name), f"{path}.{name}", free)
            if found:
                return found
        return None
    return f"{path}: {_short(a)} and {_short(b)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
