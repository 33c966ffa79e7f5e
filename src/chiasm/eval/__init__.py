"""Evaluation: metrics with their intervals, answer parsers, benchmark runners.

May import ``model`` and the rings below it.
"""
