"""No silent broadcasts anywhere, and the fixtures that several files share."""

import jax
import pytest
from hypothesis import settings

# A vector that meets a matrix unasked is a bug here.
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


@pytest.fixture
def strict():
    """Forbid implicit promotion between dtypes: for tests that run our code alone.

    Not everywhere, since Optax's own Adam relies on promotion.
    """
    with jax.numpy_dtype_promotion("strict"):
        yield
