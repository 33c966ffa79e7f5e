"""Compressors: many visual tokens to few.

May import ``nn`` and the other rings below ``parts``.
"""
