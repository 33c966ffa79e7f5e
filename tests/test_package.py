"""The top-level package: errors, lazy names, shape annotations with and without jaxtyping."""

import subprocess
import sys

import numpy as np
import pytest

import chiasm
from chiasm import errors


def test_errors_carry_an_exit_code_and_one_line():
    for name in errors.__all__:
        kind = getattr(errors, name)
        if isinstance(kind, type):
            assert issubclass(kind, chiasm.ChiasmError)
            assert kind.exit_code == (2 if kind is errors.UsageError else 1)
            assert str(kind("what, where: remedy")) == "what, where: remedy"


def test_missing_extra_names_the_command():
    error = errors.missing_extra("av", "video")
    assert isinstance(error, errors.MissingExtraError)
    assert str(error) == "av is not installed: run pip install 'chiasm[video]'"


def test_public_names_are_listed_and_unknown_ones_refused():
    assert set(chiasm.__all__) <= set(dir(chiasm))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        chiasm.nonsense  # noqa: B018


@pytest.mark.parametrize("name", chiasm.__all__)
def test_public_names_resolve(name):
    assert getattr(chiasm, name) is getattr(chiasm, name)


def test_shapes_are_checked_where_jaxtyping_is_installed():
    from chiasm.shapes import Float

    assert isinstance(np.zeros((2, 3)), Float[np.ndarray, "T D"])
    assert not isinstance(np.zeros(2), Float[np.ndarray, "T D"])


def test_shapes_mean_the_array_type_without_jaxtyping():
    code = (
        "import sys; sys.modules['jaxtyping'] = None\n"
        "from chiasm import shapes\n"
        "assert all(getattr(shapes, name)[int, 'T D'] is int for name in shapes.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
