"""What the tests of the measures share: double precision and a small network."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.flatten_util import ravel_pytree


@pytest.fixture
def float64():
    """Run the test in double precision, and leave the setting as it was."""
    with jax.enable_x64(True):
        yield


class Network(NamedTuple):
    """A network, its data and its dense Hessian."""

    model_fn: object
    output_loss_fn: object
    loss_fn: object
    params: dict
    data: tuple
    dense_hessian: jax.Array


def model_fn(params, batch):
    hidden = jnp.tanh(batch[0] @ params["hidden"] + params["bias"][None])
    return hidden @ params["out"] + params["shift"][None]


def output_loss_fn(logits, batch):
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probabilities, batch[1][:, None], 1))


def loss_fn(params, batch):
    return output_loss_fn(model_fn(params, batch), batch)


@functools.cache
def make_network():
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "hidden": jax.random.normal(keys[0], (8, 12)) / 8**0.5,
        "bias": 0.1 * jax.random.normal(keys[1], (12,)),
        "out": jax.random.normal(keys[2], (12, 3)) / 12**0.5,
        "shift": jnp.zeros(3),
    }
    images = jax.random.normal(keys[3], (60, 8))
    labels = jax.random.randint(keys[4], (60,), 0, 3)
    flat, unravel = ravel_pytree(params)
    data = (images, labels)
    dense = jax.jit(jax.hessian(lambda x: loss_fn(unravel(x), data)))(flat)
    return Network(model_fn, output_loss_fn, loss_fn, params, data, dense)


@pytest.fixture
def network(float64):
    """A tanh network of 147 parameters with 60 examples in three classes."""
    return make_network()


@pytest.fixture
def quadratic(float64):
    """½ xᵀHx with the eigenvalues 5, 4, 1, ½, 0.1, 0, 0 and −1 in a rotated basis."""
    values = jnp.array([5.0, 4.0, 1.0, 0.5, 0.1, 0.0, 0.0, -1.0])
    basis, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(3), (8, 8)))
    matrix = (basis * values[None]) @ basis.T

    def loss_fn(params, batch):
        del batch
        x = jnp.concatenate([params["a"], params["b"]])
        return 0.5 * x @ matrix @ x

    return loss_fn, matrix, values
