"""SAM at a minimum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_vasso import sam


def test_sam_bounces_along_the_top_eigenvector_at_its_amplitude(x64):
    """x → x − ηλ(x + ρ sign x) maps ηλρ/(2 − ηλ) to its negative."""
    eigenvalues = jnp.array([4.0, 2.0, 1.0, 0.1])

    @jax.jit
    def last_steps(eta, rho):
        optimizer = sam(optax.sgd(eta), rho)

        def grad_fn(x):
            return eigenvalues * x

        def step(carry, _):
            x, state = carry
            updates, state = optimizer.update(grad_fn(x), state, x, grad_fn=grad_fn)
            x = optax.apply_updates(x, updates)
            return (x, state), x

        start = jnp.array([0.7, -1.0, 0.3, 1.5])
        path = jax.lax.scan(step, (start, optimizer.init(start)), length=5000)[1]
        return path[-10:]

    for eta, rho in ((0.1, 0.1), (0.3, 0.05)):
        path = np.asarray(last_steps(eta, rho))
        expected = eta * 4 * rho / (2 - eta * 4)
        np.testing.assert_allclose(np.abs(path[:, 0]), expected, rtol=1e-4)
        assert (np.sign(path[:-1, 0]) == -np.sign(path[1:, 0])).all()
        assert np.abs(path[:, 1:]).max() < 1e-4 * expected
