"""``chiasm list``: what has a name here. Quick: reads sources instead of importing PyTorch."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Annotated

import typer

from chiasm.cli.terminal import paint
from chiasm.cli.train import RECIPE_HOMES
from chiasm.errors import UsageError

__all__ = ["SECTIONS", "entries", "list_command"]

RECIPE_TABLES = {"internvl": "chiasm.systems.internvl.table"}
"""System -> module whose ``RECIPES`` names recipes that are made of its table."""
SECTIONS = ("models", "recipes", "templates", "systems", "sizes")


def list_command(
    section: Annotated[
        str | None,
        typer.Argument(
            metavar="SECTION",
            help="models, recipes, templates, systems or sizes (of released models); all by default.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, section -> name -> meaning.")
    ] = False,
) -> None:
    """List models, recipes, chat templates, systems and sizes."""
    if section is not None and section not in SECTIONS:
        raise UsageError(f"unknown section {section!r}: list one of {', '.join(SECTIONS)}")
    found = {name: entries(name) for name in ([section] if section else SECTIONS)}
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    width = max((len(name) for names in found.values() for name in names), default=0)
    for n, (title, names) in enumerate(found.items()):
        print(("\n" if n else "") + paint(title, "bold"))
        for name, meaning in names.items():
            print(f"  {name:{width}}  {meaning}".rstrip())


def entries(section: str) -> dict[str, str]:
    """Name -> one line of meaning, in the order in which they are defined."""
    if section == "models":
        from chiasm.hub import MODELS

        return {name: model.summary for name, model in MODELS.items()}
    if section == "templates":
        from chiasm.text.templates import TEMPLATES

        return {name: f"ends an answer with {template.stop}" for name, template in TEMPLATES.items()}
    if section == "recipes":
        return {
            f"{system}/{name}": meaning
            for system, home in RECIPE_HOMES.items()
            for name, meaning in (_public_functions(_source_of(home)) | _tabled(system)).items()
        }
    if section == "sizes":
        return _presets(_source_of("chiasm.systems.internvl.presets"))
    folder = _source_of("chiasm.systems").parent
    return {path.parent.name: _first_line(path) for path in sorted(folder.glob("*/__init__.py"))}


def _tabled(system: str) -> dict[str, str]:
    """Recipes that a system makes of a table, which imports no PyTorch."""
    home = RECIPE_TABLES.get(system)
    return {} if home is None else importlib.import_module(home).RECIPES


def _source_of(module: str) -> Path:
    """The source file of a module of this package, found without importing PyTorch."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UsageError(f"{module} is missing from this installation: install chiasm again")
    return Path(spec.origin)


def _public_functions(file: Path) -> dict[str, str]:
    """Functions in a module's ``__all__`` with the first sentence of their docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    listed: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
            listed = [str(name) for name in ast.literal_eval(node.value)]
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {name: _sentence(ast.get_docstring(functions[name])) for name in listed if name in functions}


def _presets(file: Path) -> dict[str, str]:
    """Names of the released sizes with the language models that they were made from."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "PRESETS":
            assert isinstance(node.value, ast.Dict)
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return {ast.literal_eval(k): ast.literal_eval(v.args[3]) for k, v in pairs}  # type: ignore[union-attr, arg-type]
    raise UsageError(f"{file} has no PRESETS: install chiasm again")


def _first_line(file: Path) -> str:
    return _sentence(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))))


def _sentence(docstring: str | None) -> str:
    lines = (docstring or "").split("\n\n", 1)[0].split()
    return " ".join(lines).rstrip(".")
