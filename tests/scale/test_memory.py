"""Peak memory by XLA's own analysis, in copies of the parameters.

A perceptron of many weights and few examples; `benchmarks/step_cost.py` has
transformers.
"""

import jax.numpy as jnp
import optax
import pytest

import optax_vasso as ov

LAYERS, WIDTH = 12, 128
BASE = optax.sgd(0.1, momentum=0.9)


def loss_fn(params, batch):
    x = batch
    for layer in range(LAYERS):
        x = jnp.tanh(x @ params[f"layer{layer:02d}"])
    return jnp.mean(x**2)


def peak(optimizer):
    params = {f"layer{i:02d}": jnp.ones((WIDTH, WIDTH)) for i in range(LAYERS)}
    state = ov.init_train_state(params, optimizer)
    step = ov.make_train_step(loss_fn, optimizer)
    m = step.lower(state, jnp.ones((4, WIDTH))).compile().memory_analysis()
    total = (
        m.temp_size_in_bytes
        + m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
    )
    return total / sum(leaf.nbytes for leaf in params.values())


@pytest.fixture(scope="module")
def sgd():
    return peak(BASE)


@pytest.mark.parametrize(
    ("recipe", "copies"),
    [
        # The perturbed copy.
        (ov.sam, 1.1),
        # The perturbed copy and the average.
        (ov.vasso, 2.1),
    ],
)
def test_peak_memory_above_sgd_in_copies_of_the_parameters(sgd, recipe, copies):
    assert peak(recipe(BASE)) <= sgd + copies
