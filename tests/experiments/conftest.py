"""What the tests of the experiments share."""

import jax
import pytest


@pytest.fixture(autouse=True)
def as_users_write():
    """Flax's networks add biases to batches."""
    with jax.numpy_rank_promotion("allow"):
        yield
