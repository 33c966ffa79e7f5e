"""The linter of data sets: `run` is the pass, `sample` what is known of a row, the others are rules by subject.

``rules`` for the row and its length, ``text``, ``media``, ``boxes``; ``sets`` for what only a whole set shows.
"""

from chiasm.data.lint.run import (
    Finding,
    LintOptions,
    Report,
    Source,
    all_rules,
    collect,
    lint,
    open_sources,
    scan,
)

__all__ = [
    "Finding",
    "LintOptions",
    "Report",
    "Source",
    "all_rules",
    "collect",
    "lint",
    "open_sources",
    "scan",
]
