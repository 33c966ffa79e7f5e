"""Models: capability protocols, the multimodal causal LM, caches, the one generation loop, chat.

May import ``checkpoint`` and the rings below it.
"""
