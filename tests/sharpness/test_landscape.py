"""Landscapes: the loss on lines and planes is the loss at their points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_vasso import sharpness


def test_the_ends_of_the_line_between_two_solutions_are_the_solutions(network):
    start = network.params
    end = jax.tree.map(lambda leaf: 0.5 * leaf + 0.1, start)
    batches = sharpness.split_batches(network.data, 16)
    line = sharpness.between(network.loss_fn, start, end, batches)
    assert (line.steps[0], line.steps[-1], line.steps.size) == (-1, 2, 61)
    losses = {round(float(a), 4): loss for a, loss in zip(*line, strict=True)}
    assert losses[0] == pytest.approx(network.loss_fn(start, network.data))
    assert losses[1] == pytest.approx(network.loss_fn(end, network.data))
    middle = jax.tree.map(lambda a, b: (a + b) / 2, start, end)
    assert losses[0.5] == pytest.approx(network.loss_fn(middle, network.data))


def test_along_an_eigenvector_the_loss_is_a_parabola_of_its_eigenvalue(quadratic):
    loss_fn, _, values = quadratic
    params = {"a": jnp.zeros(3), "b": jnp.zeros(5)}
    pairs = sharpness.largest_eigenpairs(
        sharpness.hessian(loss_fn, params, None), params, k=2
    )
    steps = jnp.linspace(-1, 1, 9)
    for i in range(2):
        direction = jax.tree.map(lambda leaf, i=i: leaf[i], pairs.vectors)
        line = sharpness.along(loss_fn, params, direction, None, steps)
        np.testing.assert_allclose(line.losses, values[i] * steps**2 / 2, atol=1e-12)


def test_rows_of_a_plane_are_y_and_columns_are_x(float64):
    def loss_fn(params, batch):
        del batch
        return params[0] + 10 * params[1] ** 2

    plane = sharpness.on_plane(
        loss_fn,
        jnp.zeros(2),
        jnp.array([1.0, 0.0]),
        jnp.array([0.0, 1.0]),
        None,
        jnp.array([0.0, 1.0, 2.0]),
        jnp.array([0.0, 1.0]),
    )
    np.testing.assert_allclose(plane.losses, [[0, 1, 2], [10, 11, 12]])


def test_filters_of_a_random_direction_are_as_long_as_those_of_the_parameters():
    """A filter of a kernel (height, width, in, out) feeds one output channel."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "conv": jax.random.normal(keys[0], (3, 3, 2, 5))
        * jnp.arange(5.0).reshape(1, 1, 1, 5),
        "dense": jax.random.normal(keys[1], (6, 4)),
        "bias": jnp.ones(4),
        "temperature": jnp.ones(()),
    }
    direction = sharpness.filter_normalized(jax.random.key(1), params)
    for name, axes in (("conv", (0, 1, 2)), ("dense", (0,))):
        np.testing.assert_allclose(
            jnp.sqrt(jnp.sum(direction[name] ** 2, axes)),
            jnp.sqrt(jnp.sum(params[name] ** 2, axes)),
            rtol=1e-5,
        )
    assert not direction["bias"].any()
    assert not direction["temperature"].any()
    other = sharpness.filter_normalized(jax.random.key(2), params)
    assert not jnp.allclose(direction["dense"], other["dense"])


def test_bad_input_is_refused(network):
    args = network.loss_fn, network.params
    zeros = jax.tree.map(jnp.zeros_like, network.params)
    with pytest.raises(ValueError, match=r"steps must be a vector, got the shape \(\)"):
        sharpness.along(*args, zeros, network.data, 0.5)
    with pytest.raises(ValueError, match="no batches"):
        sharpness.along(*args, zeros, [], [0.0])
    with pytest.raises(ValueError, match="NaN"):
        sharpness.between(
            *args, jax.tree.map(lambda x: x * jnp.nan, zeros), network.data
        )
    with pytest.raises(ValueError, match=r"array of shape \(60, 3\)"):
        sharpness.along(
            network.model_fn, network.params, zeros, network.data, [0.0, 1.0]
        )
