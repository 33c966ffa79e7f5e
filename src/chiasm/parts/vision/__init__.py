"""Encoders: normalised pixels to visual features.

May import ``nn`` and the other rings below ``parts``.
"""
