"""One and two gradients per step, written out: what every trainer has to follow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

RATE, RHO, THETA = 0.1, 0.2, 0.4


def lagged(gradient, x, steps, *, rate=RATE, rho=RHO):
    """(x, y) after some steps of lagged VaSSO; ``gradient(y, step)``."""
    e, average = optax.tree.zeros_like(x), None
    for step in range(steps):
        g = gradient(optax.tree.add(x, e), step)
        average = g if average is None else smoothed(average, g)
        x = optax.tree.add_scale(x, -rate, g)
        e = optax.tree.scale(rho / optax.tree.norm(average), average)
    return x, optax.tree.add(x, e)


def vasso(gradient, x, steps, *, rate=RATE, rho=RHO):
    """x after some steps of VaSSO."""
    average = None
    for step in range(steps):
        g = gradient(x, step)
        average = g if average is None else smoothed(average, g)
        e = optax.tree.scale(rho / optax.tree.norm(average), average)
        x = optax.tree.add_scale(x, -rate, gradient(optax.tree.add(x, e), step))
    return x


def smoothed(average, g):
    return jax.tree.map(lambda d, g: (1 - THETA) * d + THETA * g, average, g)


def assert_close(actual, expected, rtol=1e-4, atol=1e-6):
    """Float32 in another order of summation, after a few steps."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(jnp.asarray(a), b, rtol=rtol, atol=atol)
