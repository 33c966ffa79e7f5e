"""Files of samples: where row i lies in each kind of file, and what kind of row it is.

One small module a kind of file (``lines``, ``array``, ``parquet``, ``shards``), one for the kinds of rows (``rows``).
No file is ever read whole: an index says where each row lies, and a row is read when it is asked for.
"""
