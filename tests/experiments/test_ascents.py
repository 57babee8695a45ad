"""A radius along the gradient is that of SAM without smoothing, and r in noise."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import random_tree, run_chain

import optax_vasso as ov
from experiments.harness.ascents import projected_perturb


def test_without_smoothing_the_projected_radius_is_that_of_sam():
    steps = [random_tree(seed) for seed in range(4)]
    projected, _ = run_chain(projected_perturb(0.1, optax.identity()), steps)
    plain, _ = run_chain(ov.sam_perturb(0.1), steps)
    chex.assert_trees_all_close(projected, plain, rtol=1e-5)


@pytest.mark.parametrize("theta", [0.05, 0.7])
def test_in_pure_noise_the_length_along_the_gradient_is_r(theta):
    ascent = projected_perturb(0.3, ov.vasso_ema(theta))
    noise = jax.random.normal(jax.random.key(0), (400, 10_000))

    @jax.jit
    def lengths():
        def step(state, g):
            e, state = ascent.update(g, state)
            along = jnp.vdot(e, g) / jnp.linalg.norm(g)
            return state, (along, jnp.linalg.norm(e))

        return jax.lax.scan(step, ascent.init(noise[0]), noise)[1]

    along, rho = (value[200:].mean() for value in lengths())
    np.testing.assert_allclose(along, 0.3, rtol=0.02)
    np.testing.assert_allclose(rho, 0.3 / np.sqrt(theta * (2 - theta)), rtol=0.02)
