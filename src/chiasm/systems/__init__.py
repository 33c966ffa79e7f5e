"""Published systems, one folder a paper, each readable next to it.

A system may import every ring below (up to ``train``, ``engine`` and ``lab``), never the private code of a
sibling.
"""
