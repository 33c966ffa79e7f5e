"""Data: the message, its on-disk formats, the layout (message to Sequence), packing and loading.

Token counts are known here, before any model runs. May import ``text``, ``media``, ``nn`` and
``chiasm.errors``.
"""
