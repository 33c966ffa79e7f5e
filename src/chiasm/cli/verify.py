"""``chiasm doctor --verify ID``: does a released checkpoint really load? The answer is a row of docs/checkpoints.md.

Verified means: downloaded at a stated commit, every weight file has the hub's SHA-256, every tensor is mapped, the
model's logits are finite and it wrote an answer about a picture of the package. Whether the answer is a good one is for
the reader: it is in the row.
"""

from __future__ import annotations

import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from chiasm.cli.terminal import one_line, waiting
from chiasm.errors import ChiasmError, UsageError

__all__ = ["PROMPT", "row", "verify"]

PROMPT = "What is in this picture?"
_PICTURE = ("assets", "demo", "cat.jpg")
_LONGEST = 32


def verify(name: str, *, device: str | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Try a checkpoint of a hub; the findings as plain data, with the error under ``error`` where it failed.

    Args:
        name: ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.
        device: where it runs; None for the first GPU where there is one.
        dtype: what it computes in; None for what is stored.

    Raises:
        UsageError: the name is no id of a hub.
        ConfigError: the dtype is not known.
    """
    from chiasm.hub import hub_id
    from chiasm.systems.internvl.load import resolve_dtype

    resolve_dtype(dtype)  # before gigabytes are fetched
    remote = hub_id(name)
    if remote is None:
        raise UsageError(
            f"--verify {name}: give the id of a model on a hub, OWNER/NAME or OWNER/NAME@REVISION"
        )
    repo, revision = remote
    found: dict[str, Any] = {"id": repo, "verified": False, "date": _today(), "commit": None, "family": None}
    try:
        found |= _tried(repo, revision, device, dtype)
    except ChiasmError as error:
        said = one_line(str(error))
        return found | {"error": said if repo in said else f"{repo}: {said}"}
    return found | {"verified": True}


def _tried(repo: str, revision: str | None, device: str | None, dtype: str | None) -> dict[str, Any]:
    """What is known of a checkpoint that passes; ChiasmError where it does not."""
    import torch

    from chiasm.checkpoint.adapters import open_checkpoint
    from chiasm.checkpoint.download import check_sums, fetch
    from chiasm.errors import CheckpointError
    from chiasm.hub import load

    fetched = fetch(repo, revision)
    with waiting(f"checking {repo}"):
        sums, files = check_sums(fetched), len(fetched.weights)
        if sums != files:
            raise CheckpointError(
                f"{repo}: only {sums} of {files} weight files could be compared with a SHA-256 of the hub (the cache "
                "has no links, or the files are not in LFS): set HF_HUB_CACHE to a disk with links, or choose another"
            )
        opened = open_checkpoint(fetched.folder)
        with opened.reader:
            opened.adapter.check(opened.reader)
            tensors = len(opened.reader)
        model = load(fetched.folder, device=device, dtype=dtype)
        pictures = [] if opened.public is None else [_picture()]
        content = [{"type": "image", "image": str(picture)} for picture in pictures]
        inputs = model.inputs([{"role": "user", "content": [*content, {"type": "text", "text": PROMPT}]}])
        if not bool(torch.isfinite(model.logits(inputs, positions=[len(inputs.token_ids) - 1])).all()):
            raise CheckpointError(f"{repo}: its logits are not finite: try --dtype float32, or report it")
        reply = model.chat(PROMPT, pictures, max_new_tokens=_LONGEST, temperature=0.0)
    parameter = next(model.model.parameters())
    return {
        "commit": fetched.commit,
        "family": opened.language.family,
        "tensors": tensors,
        "checksums": sums,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "tokens": len(reply.token_ids),
        "answer": reply.text,
    }


def row(found: dict[str, Any]) -> str:
    """The row of docs/checkpoints.md: id, language model, status, remarks."""
    if not found["verified"]:
        status, remarks = "unverified", _cell(found["error"])
    else:
        status = f"verified: {found['commit'][:12]}, {found['date']}"
        remarks = _cell(
            f"{found['tensors']} tensors, {found['checksums']} checksums, {found['dtype']} on {found['device']}; "
            f"{PROMPT!r} of {_PICTURE[-1]}: {found['answer']!r}"
        )
    return f"| `{found['id']}` | {found['family'] or ''} | {status} | {remarks} |"


def _cell(text: str) -> str:
    return one_line(text).replace("|", "\\|")


def _picture() -> Path:
    return Path(str(resources.files("chiasm").joinpath(*_PICTURE)))


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()
