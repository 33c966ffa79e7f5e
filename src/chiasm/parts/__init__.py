"""Parts of a multimodal model: encoders, compressors, connectors, language families, heads.

Each file holds one part, its config and its token count. May import ``worlds`` and the rings below it.
"""
