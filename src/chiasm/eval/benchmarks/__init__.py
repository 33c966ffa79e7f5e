"""Public benchmarks from local files: readers, the table of benches, the runner.

``items`` is what all readers return; ``records``, ``tables``, ``folders`` read the layouts; ``scoring`` grades;
``table`` says which bench is asked, parsed and scored how; ``run`` asks a model.
"""
