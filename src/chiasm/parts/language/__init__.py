"""Language families: short builders that compose the one decoder block into published models.

May import ``nn`` and the other rings below ``parts``.
"""
