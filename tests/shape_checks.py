"""The run-time type checker that the import hook of conftest.py puts on annotated functions."""

from beartype import BeartypeConf, beartype

# The numeric tower: an int is welcome where a float is asked for, as type checkers have it.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
