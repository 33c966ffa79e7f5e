"""Text: tokenizers, chat templates, label masks, answer parsing.

No pixels and no models; beside ``media``, which it must not see. May import ``nn`` and ``chiasm.errors``.
"""
