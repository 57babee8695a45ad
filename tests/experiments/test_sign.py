"""The sign of a lagged perturbation may follow the slope of the last one."""

import jax.numpy as jnp
import numpy as np
import optax

import optax_vasso as ov
from experiments.sign import follow_the_slope


def test_the_sign_turns_where_the_last_direction_has_led_downhill():
    ascent = follow_the_slope(ov.sam_perturb(0.1), decay=0.0)
    optimizer = ov.lagged(optax.sgd(0.0), ascent)
    params = jnp.zeros(2)
    state, seen = optimizer.init(params), []
    for slope in (1.0, 1.0, -1.0, 1.0):
        grads = slope * jnp.array([3.0, 4.0])
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params[0])
    # The third and the fourth gradient are opposite to the direction before them.
    np.testing.assert_allclose(seen, [0.06, 0.06, 0.06, -0.06], atol=1e-7)
