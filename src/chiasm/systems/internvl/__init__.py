"""InternVL 2.5: InternViT, pixel unshuffle, a two-layer projector and a causal language model.

May import the rings below ``systems``; what a second system needs sinks into one of them.
"""
