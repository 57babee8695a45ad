"""Small stand-ins for trainers that are not installed everywhere.

Each has the one habit of its original that matters to an optimizer. The tests against
the originals are in the other files of this folder, and are skipped without them. The
state that Levanter's wrapper splices, and those restored from checkpoints, are in
`test_evaluation_of_restored_states.py`.
"""

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain_loop
import pytest

import optax_vasso as ov

STEPS = 4
BASE = optax.sgd(plain_loop.RATE)
LAGGED = ov.lagged_vasso(BASE, plain_loop.RHO, theta=plain_loop.THETA)
VASSO = ov.vasso(BASE, plain_loop.RHO, theta=plain_loop.THETA)
RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.standard_normal((8, 3)), jnp.float32)
TARGETS = jnp.asarray(RNG.standard_normal(8), jnp.float32)
START = {"kernel": jnp.array([0.5, -1.0, 0.25]), "bias": jnp.float32(0.1)}


def loss(params):
    return jnp.mean((INPUTS @ params["kernel"] + params["bias"] - TARGETS) ** 2)


def gradient(params, step):
    return jax.grad(loss)(params)


# What a trainer passes to `update` beside gradients, state and parameters.
PASSES = {
    "Optimistix": lambda value, grads: {
        "value": value,
        "grad": grads,
        "value_fn": loss,
    },
    "Levanter": lambda value, grads: {"loss": value, "obj_fn": loss},
    "NumPyro": lambda value, grads: {"value": value},
    "Penzai, NetKet, JAXopt, GPJax, FlowJAX": lambda value, grads: {},
}


def train(optimizer, passes):
    params, state = START, optimizer.init(START)
    update = jax.jit(
        lambda grads, state, params, value: optimizer.update(
            grads, state, params, **passes(value, grads)
        )
    )
    for _ in range(STEPS):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = update(grads, state, params, value)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("stack", PASSES)
def test_one_gradient_per_step_runs_whatever_is_passed(stack):
    params, state = train(LAGGED, PASSES[stack])
    x, y = plain_loop.lagged(gradient, START, STEPS)
    plain_loop.assert_close(params, y)
    plain_loop.assert_close(ov.eval_params(state, params), x)


@pytest.mark.parametrize("stack", ["Optimistix", "Levanter"])
def test_two_gradients_run_where_a_loss_is_passed(stack):
    params, _ = train(VASSO, PASSES[stack])
    plain_loop.assert_close(params, plain_loop.vasso(gradient, START, STEPS))


@pytest.mark.parametrize("stack", [*PASSES][2:])
def test_elsewhere_the_error_names_what_fits(stack):
    with pytest.raises(ValueError, match="needs grad_fn, got None.*or use lagged"):
        train(VASSO, PASSES[stack])


def test_a_trainer_that_keeps_lists_of_variables():
    """Keras: parameters and state are flat lists, put together for each update."""
    params, structure = jax.tree.flatten(START)
    held, of_state = jax.tree.flatten(LAGGED.init(params))

    def listed(params, step):
        return jax.tree.leaves(gradient(structure.unflatten(params), step))

    x, y = plain_loop.lagged(listed, params, STEPS)
    for step in range(STEPS):
        updates, state = LAGGED.update(
            listed(params, step), of_state.unflatten(held), params
        )
        params = optax.apply_updates(params, updates)
        held = jax.tree.leaves(state)
    plain_loop.assert_close(params, y)
    plain_loop.assert_close(ov.eval_params(of_state.unflatten(held), params), x)


@pytest.mark.parametrize("optimizer", [LAGGED, VASSO])
def test_a_trainer_that_turns_closures_into_trees(optimizer):
    """Optimistix, so that a new learning rate compiles nothing new."""
    tree = eqxi.closure_to_pytree(optimizer)
    passes = PASSES["Optimistix"]
    plain_loop.assert_close(train(tree, passes)[0], train(optimizer, passes)[0])
