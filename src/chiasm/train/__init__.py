"""Training: recipes and stages, the one trainer, schedules, the resumable run folder.

May import ``eval`` and the rings below it.
"""
