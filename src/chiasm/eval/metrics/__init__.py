"""Metrics and answer parsers, one small module a kind.

What: pure functions of strings and numbers; nothing here opens a file or asks a model. The names of ``exact`` (short
answers of our own worlds, comparison with controls) stand here too; all else is imported from its module.

Modes. Where a released script has a defect, ``mode="chiasm"`` (default) corrects it and ``mode="original"`` keeps what
the script does, for numbers that must be comparable; docs/evaluation.md lists the differences. A result's manifest says
which mode was used. No mode guesses: what cannot be parsed is None and counted.
"""

from chiasm.eval.metrics.exact import (
    PARSER_VERSION,
    Comparison,
    Score,
    compare,
    exact_match,
    normalise,
    score,
)

__all__ = [
    "PARSER_VERSION",
    "Comparison",
    "Score",
    "compare",
    "exact_match",
    "normalise",
    "score",
]
