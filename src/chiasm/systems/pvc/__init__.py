"""PVC: one progressive compression for pictures and videos, on InternViT and a causal language model.

May import the rings below ``systems``; what a second system needs sinks into one of them.
"""
