"""The lab: claims that are fixed before they are tested, the statistics of their verdicts, their runner and reports.

May import ``train`` and the rings below it.
"""
