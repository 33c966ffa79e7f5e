"""``chiasm parity MODEL --against URL``: does a running server compute what the model does?

Exit status 0: nothing differs. 1: something does (named in the last lines), or the server cannot be asked.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chiasm.cli.chat import load_model
from chiasm.cli.terminal import note, paint, plain_text, waiting
from chiasm.errors import UsageError

if TYPE_CHECKING:
    from chiasm.eval.parity import CaseResult, Comparison

__all__ = ["parity_command"]

_KEY = "OPENAI_API_KEY"


def parity_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A name of chiasm list, a folder, or OWNER/NAME of a model hub.",
            show_default=False,
        ),
    ],
    against: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="An OpenAI-compatible server: http://HOST:PORT.",
            show_default=False,
        ),
    ],
    served_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The model's name there; needed where the server has several."),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Ask about this picture too (repeatable)."),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(help="Largest difference of log-probabilities (nats) that counts as equal."),
    ] = 0.1,
    top: Annotated[int, typer.Option(help="How many of the likeliest first tokens are compared.")] = 20,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answers that are compared.")] = 16,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer of the server.")] = 120.0,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help=f"Sent to the server; default: {_KEY} of the environment, over https or to this machine only.",
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Chat template of the model here, see chiasm list.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message of the model here; '' for none.")
    ] = None,
    max_tiles: Annotated[
        int | None, typer.Option(help="Most tiles that the model here cuts pictures into.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="float32, bfloat16, float16; default: as stored.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps; default: a GPU if there is one."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as one JSON object.")] = False,
) -> None:
    """Compare a model with a server that serves it.

    Six conversations (text; a square, a wide, a tall and a small picture; two pictures) are given to both: prompt
    tokens, tiles, the log-probabilities of the first token and short greedy answers must agree. Each difference is
    named by its likeliest cause. Exit status 0 if nothing differs, else 1.
    """
    from chiasm.eval.endpoint import Endpoint

    endpoint = Endpoint(against, key=api_key, timeout=timeout)
    ambient = os.environ.get(_KEY) or None
    if api_key is None and ambient is not None:
        if endpoint.private:
            endpoint = Endpoint(against, key=ambient, timeout=timeout)
        else:
            note(
                f"{_KEY} is not sent over plain http to another machine, where it could be read on the way: give "
                "--api-key if it is meant for this server"
            )
    if top < 1 or max_new_tokens < 1 or not tolerance >= 0:
        raise UsageError("--top and --max-new-tokens must be at least 1, --tolerance at least 0")
    with waiting(f"asking {against}"):
        served = endpoint.choose(served_name)  # before a model is loaded for minutes
    loaded = load_model(
        model, {}, template=template, system=system, max_tiles=max_tiles, dtype=dtype, device=device
    )
    from chiasm.eval.parity import compare
    from chiasm.eval.parity_cases import of_files, standard_cases

    spec = loaded.spec
    sees = all(spec.tokenizer.token_to_id(token) is not None for token in spec.image_tokens)
    if image and not sees:
        raise UsageError(f"{model} reads no pictures: leave --image out")
    cases = [*standard_cases(spec.tiles.image_size, pictures=sees), *of_files(image or [])]
    with waiting(f"asking {against} and {model}"):
        found = compare(
            loaded,
            endpoint,
            cases,
            served=served,
            top=top,
            tolerance=tolerance,
            max_new_tokens=max_new_tokens,
        )
    if as_json:
        print(json.dumps(found.to_dict(), ensure_ascii=False, allow_nan=False))
    else:
        _print(found)
    if not found.equal:
        raise typer.Exit(1)


_HEAD = ("case", "tokens", "tiles", "top token", "shared", "largest", "mean", "answer")


def _print(found: Comparison) -> None:
    """The table, then the verdict; numbers are the model's, and the server's behind a slash where they differ."""
    rows = [_HEAD, *(_row(case) for case in found.cases)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(_HEAD))]
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    for remark in found.remarks:
        note(plain_text(remark))
    for case in found.cases:
        if not case.same_answer:
            print(f"{case.name}: model {_quoted(case.answer)}, server {_quoted(case.server_answer)}")
    for difference in found.differences:
        print(f"{paint('differs', 'red')}: {plain_text(difference)}")
    if found.equal:
        served = plain_text(found.served)
        print(f"{paint('equal', 'green')}: {served} at {found.server} within {found.tolerance:g}")


def _row(case: CaseResult) -> tuple[str, ...]:
    def both(ours: int, theirs: int | None) -> str:
        if theirs is None:
            return f"{ours}/?"
        return str(ours) if ours == theirs else f"{ours}/{theirs}"

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2g}"

    top = "-" if case.same_top is None else "same" if case.same_top else "another"
    return (
        case.name,
        both(case.tokens, case.server_tokens),
        both(case.tiles, case.server_tiles),
        top,
        str(case.shared),
        number(case.largest),
        number(case.mean),
        case.parting,
    )


def _quoted(text: str) -> str:
    one = " ".join(plain_text(text).split())
    return repr(one if len(one) <= 60 else one[:60] + "…")
