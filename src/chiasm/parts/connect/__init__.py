"""Connectors: visual features to the width of the language model.

May import ``nn`` and the other rings below ``parts``.
"""
