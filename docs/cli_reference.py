"""Write docs/cli.md from the command line itself: ``python docs/cli_reference.py``.

The page is committed, so that it can be read without a build; a test fails when it is out of date.
"""

import inspect
from pathlib import Path

import typer

PAGE = Path(__file__).with_name("cli.md")
INTRODUCTION = """\
The result goes to stdout, everything else to stderr. Exit status: 0 done; 1 failed, with one line that says what,
where and the remedy; 2 the command itself is wrong; 130 interrupted. `--help` works after every verb.

% Written by docs/cli_reference.py: change the help texts, not this page.
"""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default(parameter) -> str:
    value = getattr(parameter.default, "value", parameter.default)  # an enum's value
    if value is None or value is False or value in ((), [], "") or callable(value):
        return ""
    return f" Default: `{value}`."


def _entry(parameter) -> str:
    """One row of a command's table: how the parameter is written, and what it means.

    Reads only what a parameter has had in every version of typer, so that the page depends on Chiasm alone.
    """
    if parameter.param_type_name == "argument" and " " in (parameter.metavar or ""):
        written = f"`{parameter.metavar}`"  # several words, brackets and all
    elif parameter.param_type_name == "argument":
        word = (parameter.metavar or parameter.name).strip("[]<>.").replace("_", "-").upper()
        word += "..." if parameter.nargs == -1 else ""
        written = f"`{word}`" if parameter.required else f"`[{word}]`"
    else:
        written = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
        written += "" if parameter.is_flag else f" {parameter.metavar or 'VALUE'}"
    return f"| {written} | {_cell(parameter.help or '')}{_default(parameter)} |"


def _section(command, path: str, level: int, parent=None) -> list[str]:
    context = command.make_context(path.split()[-1], [], parent=parent, resilient_parsing=True)
    lines = [f"{'#' * level} {path}", "", inspect.cleandoc(command.help or "").replace("\f", "").strip(), ""]
    rows = [
        _entry(parameter)
        for parameter in command.params
        if not getattr(parameter, "hidden", False)
        and parameter.name not in ("help", "install_completion", "show_completion")
    ]
    if rows:
        lines += ["| argument or option | meaning |", "|---|---|", *rows, ""]
    for name in getattr(command, "list_commands", lambda _: [])(context):
        child = command.get_command(context, name)
        if child is not None and not child.hidden:
            lines += _section(child, f"{path} {name}", level + 1, context)
    return lines


def render(app: typer.Typer, name: str = "chiasm") -> str:
    """Return the reference page of an application as Markdown."""
    top, *rest = "\n".join(_section(typer.main.get_command(app), name, 2)).partition("\n")
    body = "".join(rest).strip("\n")
    return f"# Command line\n\n{INTRODUCTION}\n{top}\n\n{body}\n".replace("\n\n\n", "\n\n")


if __name__ == "__main__":
    from chiasm.cli.app import app

    PAGE.write_text(render(app), encoding="utf-8")
