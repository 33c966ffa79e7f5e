"""Configuration of the documentation (Sphinx, MyST, furo); build it with ``make docs``."""

import re

import chiasm

project = "Chiasm"
author = "The Chiasm authors"
copyright = "the Chiasm authors, Apache License 2.0"
version = release = chiasm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"Chiasm {release}"
html_show_sphinx = False

CODE = re.compile(r"(``.+?``)", re.DOTALL)
SINGLE_TICKS = re.compile(r"(?<![`:\w])`((?:[^`\n]|\n(?!\s*\n))+)`(?![`_\w])")


def plain_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Read a docstring as prose with code in backticks, one or two, and not as reStructuredText."""
    text = SINGLE_TICKS.sub(r"``\1``", "\n".join(lines))
    pieces = CODE.split(text)
    pieces[::2] = [re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", piece) for piece in pieces[::2]]
    lines[:] = "".join(pieces).split("\n")


def setup(app) -> None:
    # Before napoleon (500), which writes reStructuredText of its own.
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)
