"""Strict types everywhere, and the fixtures that several files share."""

import jax
import pytest
from hypothesis import settings

# A float64 that meets a float32 unasked is a bug here, as is a silent broadcast of a
# vector against a matrix.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the first example slow, whatever the test does; the same examples
# every time make a failure repeatable.
settings.register_profile("suite", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("suite")


@pytest.fixture
def x64():
    """Compute in float64 for one test."""
    with jax.enable_x64(True):
        yield
