"""Pictures and videos: safe opening, tile policy, frame sampling, boxes and their drawing.

No text and no models; beside ``text``, which it must not see. May import ``nn`` and ``chiasm.errors``.
"""
