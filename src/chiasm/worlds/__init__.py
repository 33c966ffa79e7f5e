"""Procedural worlds with exact ground truth, written in the layouts of public data sets.

May import ``data`` and the rings below it; never a model.
"""
