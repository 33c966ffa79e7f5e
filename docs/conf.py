"""Configuration of the documentation (Sphinx, MyST, furo); build it with ``make docs``."""

import chiasm

project = "Chiasm"
author = "The Chiasm authors"
copyright = "the Chiasm authors, Apache License 2.0"
version = release = chiasm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"Chiasm {release}"
html_show_sphinx = False
