"""Checkpoints: lazy sharded reading, writing, adapters between public layouts, GGUF.

May import ``parts`` and the rings below it.
"""
