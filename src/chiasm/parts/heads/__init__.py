"""Heads: hidden states to text, codes or masks, each with its loss and its generation step.

May import ``nn`` and the other rings below ``parts``.
"""
