"""The examples' modules, imported as the scripts beside them import them."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(autouse=True)
def as_users_write():
    """The examples add biases to batches, as their readers would."""
    with jax.numpy_rank_promotion("allow"):
        yield
