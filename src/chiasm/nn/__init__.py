"""Tensors in, tensors out: attention, blocks, norms, RoPE, LoRA, losses, sampling.

The lowest ring: no files, no configuration objects, no network. May import ``chiasm.errors`` only.
"""
