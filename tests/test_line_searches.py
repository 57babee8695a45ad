"""Optimizers of Optax that ask for the loss, or for a function of the parameters."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import optax_vasso as ov

CURVATURES = jnp.asarray([1.0, 3.0, 10.0])
START = jnp.asarray([1.0, -1.0, 0.5])
OPTIMIZERS = {
    "polyak_sgd": lambda: optax.polyak_sgd(max_learning_rate=0.1),
    "momo": lambda: contrib.momo(learning_rate=0.1),
    "momo_adam": lambda: contrib.momo_adam(learning_rate=0.05),
    "reduce_on_plateau": lambda: optax.chain(
        optax.sgd(0.05), contrib.reduce_on_plateau(patience=2)
    ),
    # The default search takes ten times as long to compile; it is used below.
    "lbfgs": lambda: optax.lbfgs(
        linesearch=optax.scale_by_backtracking_linesearch(max_backtracking_steps=9)
    ),
    "sophia": lambda: contrib.sophia(learning_rate=0.05),
}
METHODS = {
    "sam": lambda base: ov.sam(base, rho=0.01),
    "vasso": lambda base: ov.vasso(base, rho=0.01),
    "lagged_vasso": lambda base: ov.lagged_vasso(base, rho=0.01),
    "alone": lambda base: base,
}


def loss(params, batch=1.0):
    return batch * jnp.sum(CURVATURES * params**2) / 2


@pytest.mark.parametrize(("name", "method"), cases.in_turn(OPTIMIZERS, METHODS))
def test_make_train_step_takes_optimizers_that_want_the_loss(name, method):
    optimizer = METHODS[method](OPTIMIZERS[name]())
    state = ov.init_train_state(START, optimizer)
    step = ov.make_train_step(loss, optimizer)
    for _ in range(8):
        state, metrics = step(state, jnp.asarray(1.0))
    assert np.isfinite(metrics["loss"])
    assert loss(ov.eval_params(state.opt_state, state.params)) < 0.8 * loss(START)


def steps_by_hand(arguments, method, base=None, steps=6):
    optimizer = method(base or OPTIMIZERS["lbfgs"](), rho=0.01)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(
            grads, state, params, **arguments(params, value, grads)
        )
        return optax.apply_updates(params, updates), state

    params, state = START, optimizer.init(START)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def search(params, value, grads):
    return {"value": value, "grad": grads, "value_fn": loss, "batch": jnp.asarray(1.0)}


def test_a_line_search_by_hand_takes_value_fn_in_place_of_grad_fn():
    """``value_fn`` has an argument of its own, as Optax's line searches allow."""
    params, state = steps_by_hand(search, ov.vasso)
    expected, _ = steps_by_hand(
        lambda *given: {**search(*given), "grad_fn": jax.value_and_grad(loss)}, ov.vasso
    )
    np.testing.assert_allclose(params, expected, rtol=1e-5, atol=1e-7)
    assert loss(params) < 0.01 * loss(START)
    assert bool(state.report.metrics["ascended"])
    assert float(state.report.metrics["perturbed_loss"]) > 0


@pytest.mark.parametrize("method", [ov.vasso, ov.lagged_vasso])
def test_the_default_line_search_by_hand(method):
    params, state = steps_by_hand(search, method, optax.lbfgs())
    assert loss(ov.eval_params(state, params)) < 0.01 * loss(START)


def test_value_fn_alone_will_do_for_a_two_gradient_optimizer():
    optimizer = ov.sam(optax.sgd(0.1), rho=0.5)
    grads = jax.grad(loss)(START)
    by_value, state = optimizer.update(
        grads, optimizer.init(START), START, value_fn=loss
    )
    by_grad, _ = optimizer.update(
        grads, optimizer.init(START), START, grad_fn=jax.grad(loss)
    )
    np.testing.assert_allclose(by_value, by_grad, rtol=1e-6)
    point = START + 0.5 * grads / jnp.linalg.norm(grads)
    assert float(state.report.metrics["perturbed_loss"]) == pytest.approx(
        float(loss(point)), rel=1e-6
    )


def test_the_loss_that_a_train_step_passes_is_a_function_of_the_parameters():
    def elsewhere(updates, state, params=None, *, value_fn, **extra_args):
        return jnp.full_like(updates, value_fn(params + 1.0)), state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: (), elsewhere)
    step = ov.make_train_step(loss, optimizer)
    start = ov.init_train_state(jnp.zeros(3), optimizer)
    state, _ = step(start, jnp.asarray(1.0))
    np.testing.assert_array_equal(state.params, np.full(3, 7.0))
