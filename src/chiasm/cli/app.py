"""``chiasm``: the verbs put together, and what a failure looks like.

stdout carries the result and nothing else. A failure is one line on stderr and an exit status: 1 it could not be
done, 2 the command is wrong, 130 interrupted. ``--debug`` anywhere shows the traceback behind the line.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from chiasm import __version__
from chiasm.cli.chat import chat_command
from chiasm.cli.convert import convert_command
from chiasm.cli.data import data_app
from chiasm.cli.demo import demo_command
from chiasm.cli.doctor import doctor_command
from chiasm.cli.evaluate import eval_command
from chiasm.cli.listing import list_command
from chiasm.cli.parity import parity_command
from chiasm.cli.plan import plan_command
from chiasm.cli.reproduce import reproduce_command
from chiasm.cli.show import show_command
from chiasm.cli.terminal import fail, notes_to_stderr
from chiasm.cli.train import train_command
from chiasm.errors import ChiasmError

__all__ = ["app", "main"]

# Plain help: with markup, typer loads rich, which alone takes longer than everything else here.
app = typer.Typer(
    name="chiasm",
    help="Ask questions about pictures; train and examine the models that answer them.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a failure; may stand after the verb too.")
    ] = False,
) -> None:
    if version:
        print(f"chiasm {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


app.command("chat")(chat_command)
app.command("demo")(demo_command)
app.command("doctor")(doctor_command)
app.command("list")(list_command)
app.command("show")(show_command)
app.command("plan")(plan_command)
app.command("convert")(convert_command)
app.command("parity")(parity_command)
app.command("train")(train_command)
app.command("eval")(eval_command)
app.command("reproduce")(reproduce_command)
app.add_typer(data_app, name="data")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own); returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = _take_debug(words)
    notes_to_stderr()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an answer may hold what an old code page cannot
            stream.reconfigure(errors="backslashreplace")
    try:
        status = typer.main.get_command(app).main(args=words, prog_name="chiasm", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_pipe()
        return 1
    except (KeyboardInterrupt, typer.Abort):
        print(file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(error, debug)
    return status if isinstance(status, int) else 0


def _take_debug(words: list[str]) -> bool:
    """Remove ``--debug`` from wherever it stands (before a ``--``)."""
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--debug"]
    found = len(kept) < end
    words[:end] = kept
    return found


def _report(error: Exception, debug: bool) -> int:
    """Print the line of an error; returns the exit status."""
    if isinstance(error, ChiasmError):
        fail(str(error))
        return error.exit_code
    # The parser's own errors; by what they can do, since typer keeps them in another place in each of its versions.
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "chiasm"
        said = error.format_message().rstrip(".").replace(": Value error, ", ": ")  # type: ignore[attr-defined]
        fail(f"{said}: see {path} --help")  # type: ignore[attr-defined]
        return int(getattr(error, "exit_code", 2))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        fail("out of memory: choose a smaller model, --dtype bfloat16 or fewer tiles")
        return 1
    hint = "" if debug else " (this is a bug; --debug shows where)"
    fail(f"{type(error).__name__}: {error}{hint}")
    return 1


def _leave_pipe() -> None:
    """Make the interpreter's last flush of a closed pipe silent."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
