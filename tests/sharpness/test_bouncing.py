"""SAM at a minimum, and the two examples' command lines."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_vasso import sam

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(("eta", "rho"), [(0.1, 0.1), (0.3, 0.05)])
def test_sam_bounces_along_the_top_eigenvector_at_its_amplitude(float64, eta, rho):
    """x → x − ηλ(x + ρ sign x) maps ηλρ/(2 − ηλ) to its negative."""
    eigenvalues = jnp.array([4.0, 2.0, 1.0, 0.1])
    optimizer = sam(optax.sgd(eta), rho)

    def grad_fn(x):
        return eigenvalues * x

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(grad_fn(x), state, x, grad_fn=grad_fn)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    start = jnp.array([0.7, -1.0, 0.3, 1.5])
    _, path = jax.lax.scan(step, (start, optimizer.init(start)), length=5000)
    expected = eta * 4 * rho / (2 - eta * 4)
    np.testing.assert_allclose(jnp.abs(path[-10:, 0]), expected, rtol=1e-4)
    assert (jnp.sign(path[-10:-1, 0]) == -jnp.sign(path[-9:, 0])).all()
    assert jnp.abs(path[-10:, 1:]).max() < 1e-4 * expected


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("flatness.py", ("--noise", "2"), "must be a number from 0 to 1, got '2'"),
        ("bouncing.py", ("--eta", "0.5"), "must be from 0.001 to 0.495, got '0.5'"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_two(
    program, arguments, message, tmp_path
):
    finished = subprocess.run(
        [sys.executable, EXAMPLES / program, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 2
    assert message in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
