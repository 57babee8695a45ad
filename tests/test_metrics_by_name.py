"""What the adversary did: measures in the base optimizer."""

import jax.numpy as jnp
import optax
import pytest

import optax_vasso as ov
from optax_vasso.metrics import perturbation_norm, running_mean, stability


@pytest.mark.parametrize(
    "name", ["perturbation_norm", "stability", "mean_perturbation_norm"]
)
def test_a_metric_is_found_by_its_name(name):
    """What a measure remembers must not answer to the name of what it measured."""
    tracked = ov.metrics.track(
        perturbation_norm, stability, running_mean(perturbation_norm)
    )
    optimizer = ov.vasso(optax.chain(tracked, optax.sgd(0.1)), rho=0.5)
    params = jnp.array([3.0, 4.0])
    _, state = optimizer.update(
        params, optimizer.init(params), params, grad_fn=lambda x: x
    )
    expected = 1.0 if name == "stability" else 0.5
    assert jnp.isclose(optax.tree.get(state, name), expected)
