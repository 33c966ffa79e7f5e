"""The documentation: generated pages are current, and the build has no warnings."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def cli_reference():
    spec = importlib.util.spec_from_file_location("cli_reference", DOCS / "cli_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_of_an_application(cli_reference):
    app = typer.Typer(help="The top.")

    @app.command()
    def look(
        pictures: Annotated[list[str], typer.Argument(help="Files | addresses.")],
        question: Annotated[str | None, typer.Argument()] = None,
        tiles: Annotated[int, typer.Option("--max-tiles", "-t", help="How many.")] = 12,
        stream: Annotated[bool, typer.Option("--stream/--no-stream", help="As it comes.")] = False,
    ) -> None:
        """Look at pictures.

        Twice.
        """

    @app.command(hidden=True)
    def secret() -> None:
        """Not shown."""

    page = cli_reference.render(app, "see")
    assert "## see\n\nThe top.\n" in page
    assert "### see look\n\nLook at pictures.\n\nTwice.\n" in page
    assert "| `PICTURES...` | Files \\| addresses. |" in page
    assert "| `[QUESTION]` |  |" in page
    assert "| `--max-tiles`, `-t` VALUE | How many. Default: `12`. |" in page
    assert "| `--stream`, `--no-stream` | As it comes. |" in page
    assert "secret" not in page


def test_cli_page_is_current(cli_reference):
    from chiasm.cli.app import app

    message = "run: python docs/cli_reference.py"
    assert cli_reference.PAGE.read_text(encoding="utf-8") == cli_reference.render(app), message


@pytest.mark.slow
def test_documentation_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx", reason="needs the docs extra")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        str(DOCS),
        str(tmp_path),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_tables_of_recipes_are_current():
    spec = importlib.util.spec_from_file_location("recipes_reference", DOCS / "recipes_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.PAGE.read_text(encoding="utf-8")
    assert module.render(page) == page, "run: python docs/recipes_reference.py"
