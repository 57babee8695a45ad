"""One gradient a step inside training loops that know nothing of it.

Each loop is written as its framework's own guide writes it. The parameters that it
keeps are y_t = x_t + ε_{t−1}, and have to follow

    g_t = ∇f_t(y_t),  d_t = (1 − θ) d_{t−1} + θ g_t,  ε_t = ρ d_t/‖d_t‖,
    x_{t+1} = x_t − η g_t,  y_{t+1} = x_{t+1} + ε_t

as NumPy computes it in float64.
"""

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optax_vasso as ov

RATE, RHO, THETA, STEPS = 0.1, 0.2, 0.4, 4
RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((STEPS, 8, 3)).astype(np.float32)
TARGETS = RNG.standard_normal((STEPS, 8, 1)).astype(np.float32)
KERNEL = np.array([[0.5], [-1.0], [0.25]], np.float32)
BIAS = np.array([0.1], np.float32)
# Float32 against float64 after four steps.
RTOL, ATOL = 1e-4, 1e-6


def squared_error(predictions, targets):
    return jnp.mean((predictions - targets) ** 2)


def by_hand_gradient(point, batch):
    """Of the mean squared error of x·k + b, for point = (k_1, k_2, k_3, b)."""
    inputs = np.concatenate([INPUTS[batch], np.ones((8, 1))], axis=1)
    residual = inputs @ point[:, None] - TARGETS[batch]
    return 2 / 8 * (inputs.T @ residual)[:, 0]


def by_hand(gradient_at=by_hand_gradient, steps=STEPS):
    """The points (x_t, y_t) after each step."""
    x = np.concatenate([KERNEL[:, 0], BIAS]).astype(np.float64)
    epsilon, average, points = np.zeros(4), None, []
    for step in range(steps):
        gradient = gradient_at(x + epsilon, step)
        average = (
            gradient if average is None else (1 - THETA) * average + THETA * gradient
        )
        x = x - RATE * gradient
        epsilon = RHO * average / np.linalg.norm(average)
        points.append((x, x + epsilon))
    return points


def by_hand_vasso():
    """Two gradients a step: the points x_t."""
    x = np.concatenate([KERNEL[:, 0], BIAS]).astype(np.float64)
    average, points = None, []
    for step in range(STEPS):
        clean = by_hand_gradient(x, step)
        average = clean if average is None else (1 - THETA) * average + THETA * clean
        epsilon = RHO * average / np.linalg.norm(average)
        x = x - RATE * by_hand_gradient(x + epsilon, step)
        points.append(x)
    return points


def flat(kernel, bias):
    return np.concatenate([np.ravel(kernel), np.ravel(bias)])


def assert_follows(trained, evaluated, expected):
    """``trained`` are the loop's parameters, ``evaluated`` those to keep."""
    x, y = expected
    np.testing.assert_allclose(trained, y, rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(evaluated, x, rtol=RTOL, atol=ATOL)
    assert np.linalg.norm(trained - evaluated) == pytest.approx(RHO, rel=1e-5)


def lagged():
    return ov.lagged_vasso(optax.sgd(RATE), RHO, theta=THETA)


def vasso():
    return ov.vasso(optax.sgd(RATE), RHO, theta=THETA)


def linen_state(tx):
    return TrainState.create(
        apply_fn=linen.Dense(1).apply,
        params={"kernel": jnp.asarray(KERNEL), "bias": jnp.asarray(BIAS)},
        tx=tx,
    )


def test_flax_linen_apply_gradients():
    @jax.jit
    def train_step(state, inputs, targets):
        def loss_fn(params):
            return squared_error(state.apply_fn({"params": params}, inputs), targets)

        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))

    state = linen_state(lagged())
    for batch, expected in enumerate(by_hand()):
        state = train_step(state, INPUTS[batch], TARGETS[batch])
        evaluated = ov.eval_params(state.opt_state, state.params)
        assert_follows(
            flat(state.params["kernel"], state.params["bias"]),
            flat(evaluated["kernel"], evaluated["bias"]),
            expected,
        )


def test_flax_linen_with_two_gradients():
    """apply_gradients passes no grad_fn on: its three lines are written out."""

    @jax.jit
    def train_step(state, inputs, targets):
        def loss_fn(params):
            return squared_error(state.apply_fn({"params": params}, inputs), targets)

        grad_fn = jax.grad(loss_fn)
        updates, opt_state = state.tx.update(
            grad_fn(state.params), state.opt_state, state.params, grad_fn=grad_fn
        )
        return state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
        )

    state = linen_state(vasso())
    for batch, expected in enumerate(by_hand_vasso()):
        state = train_step(state, INPUTS[batch], TARGETS[batch])
        np.testing.assert_allclose(
            flat(state.params["kernel"], state.params["bias"]),
            expected,
            rtol=RTOL,
            atol=ATOL,
        )


def test_apply_gradients_says_what_two_gradients_need():
    state = linen_state(vasso())
    # Flax sets a keyword that it does not know in the train state, and passes it on
    # to nobody.
    for given in ({}, {"grad_fn": jax.grad(sum)}):
        with pytest.raises((ValueError, TypeError), match="grad_fn"):
            state.apply_gradients(grads=state.params, **given)


def nnx_model():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    model.kernel[...] = jnp.asarray(KERNEL)
    model.bias[...] = jnp.asarray(BIAS)
    return model


def test_flax_nnx_optimizer_update():
    @nnx.jit
    def train_step(model, optimizer, inputs, targets):
        def loss_fn(model):
            return squared_error(model(inputs), targets)

        optimizer.update(model, nnx.grad(loss_fn)(model))

    model = nnx_model()
    optimizer = nnx.Optimizer(model, lagged(), wrt=nnx.Param)
    for batch, expected in enumerate(by_hand()):
        train_step(model, optimizer, INPUTS[batch], TARGETS[batch])
        evaluated = ov.eval_params(optimizer.opt_state, nnx.state(model, nnx.Param))
        assert_follows(
            flat(model.kernel[...], model.bias[...]),
            flat(evaluated["kernel"][...], evaluated["bias"][...]),
            expected,
        )


def test_flax_nnx_with_two_gradients():
    """nnx.Optimizer.update passes keywords on; grad_fn gets the model's arrays."""

    @nnx.jit
    def train_step(model, optimizer, inputs, targets):
        def loss_fn(model):
            return squared_error(model(inputs), targets)

        graph, params = nnx.split(model, nnx.Param)

        def grad_fn(arrays):
            perturbed = nnx.merge(graph, nnx.clone(params))
            nnx.update(perturbed, arrays)
            return nnx.to_pure_dict(nnx.grad(loss_fn)(perturbed))

        optimizer.update(model, nnx.grad(loss_fn)(model), grad_fn=grad_fn)

    model = nnx_model()
    optimizer = nnx.Optimizer(model, vasso(), wrt=nnx.Param)
    for batch, expected in enumerate(by_hand_vasso()):
        train_step(model, optimizer, INPUTS[batch], TARGETS[batch])
        np.testing.assert_allclose(
            flat(model.kernel[...], model.bias[...]), expected, rtol=RTOL, atol=ATOL
        )


def test_equinox_filter_jit():
    optimizer = lagged()

    @eqx.filter_jit
    def train_step(model, state, inputs, targets):
        @eqx.filter_grad
        def grad_fn(model):
            return squared_error(jax.vmap(model)(inputs), targets)

        updates, state = optimizer.update(
            grad_fn(model), state, eqx.filter(model, eqx.is_inexact_array)
        )
        return eqx.apply_updates(model, updates), state

    model = eqx.nn.Linear(3, 1, key=jax.random.key(0))
    model = eqx.tree_at(
        lambda linear: (linear.weight, linear.bias),
        model,
        (jnp.asarray(KERNEL.T), jnp.asarray(BIAS)),
    )
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    for batch, expected in enumerate(by_hand()):
        model, state = train_step(model, state, INPUTS[batch], TARGETS[batch])
        evaluated = ov.eval_params(state, eqx.filter(model, eqx.is_inexact_array))
        assert_follows(
            flat(model.weight, model.bias),
            flat(evaluated.weight, evaluated.bias),
            expected,
        )


@pytest.mark.parametrize("make", [lagged, vasso])
def test_equinox_frozen_layers_stay_where_they_are(make):
    """A filter that leaves the bias out gives it no gradient, that is, None."""
    optimizer = make()
    model = eqx.nn.Linear(3, 1, key=jax.random.key(0))
    trained = eqx.tree_at(lambda linear: linear.bias, model, replace=False)
    trained = jax.tree.map(lambda leaf: leaf is not False, trained)

    @eqx.filter_jit
    def train_step(model, state):
        static = eqx.filter(model, trained, inverse=True)

        @eqx.filter_grad
        def filtered(dynamic):
            linear = eqx.combine(dynamic, static)
            return squared_error(jax.vmap(linear)(INPUTS[0]), TARGETS[0])

        def grad_fn(params):
            return filtered(eqx.filter(params, trained))

        updates, state = optimizer.update(grad_fn(model), state, model, grad_fn=grad_fn)
        return eqx.apply_updates(model, updates), state

    bias, weight = np.asarray(model.bias), np.asarray(model.weight)
    state = optimizer.init(model)
    for _ in range(2):
        model, state = train_step(model, state)
    np.testing.assert_array_equal(model.bias, bias)
    assert np.all(np.asarray(model.weight) != weight)


def test_haiku_transformed():
    network = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(1)(x)))
    optimizer = lagged()

    @jax.jit
    def train_step(params, state, inputs, targets):
        grads = jax.grad(
            lambda params: squared_error(network.apply(params, inputs), targets)
        )(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = network.init(jax.random.key(0), INPUTS[0])
    params["linear"] = {"w": jnp.asarray(KERNEL), "b": jnp.asarray(BIAS)}
    state = optimizer.init(params)
    for batch, expected in enumerate(by_hand()):
        params, state = train_step(params, state, INPUTS[batch], TARGETS[batch])
        evaluated = ov.eval_params(state, params)
        assert_follows(
            flat(params["linear"]["w"], params["linear"]["b"]),
            flat(evaluated["linear"]["w"], evaluated["linear"]["b"]),
            expected,
        )


def test_multi_steps_keeps_the_point_while_it_accumulates():
    """Two minibatches to a step: both gradients at the same y_t, x_t at any time."""
    optimizer = optax.MultiSteps(lagged(), 2)

    @jax.jit
    def train_step(params, state, inputs, targets):
        def loss_fn(params):
            return squared_error(
                inputs @ params["kernel"] + params["bias"][None], targets
            )

        updates, state = optimizer.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    def mean_of_two(point, step):
        pair = (by_hand_gradient(point, 2 * step + half) for half in (0, 1))
        return sum(pair) / 2

    params = {"kernel": jnp.asarray(KERNEL), "bias": jnp.asarray(BIAS)}
    state = optimizer.init(params)
    for step, expected in enumerate(by_hand(mean_of_two, STEPS // 2)):
        for half in (0, 1):
            before = params
            params, state = train_step(
                params, state, INPUTS[2 * step + half], TARGETS[2 * step + half]
            )
            if half == 0:
                assert jax.tree.all(jax.tree.map(jnp.array_equal, before, params))
        evaluated = ov.eval_params(state, params)
        assert_follows(
            flat(params["kernel"], params["bias"]),
            flat(evaluated["kernel"], evaluated["bias"]),
            expected,
        )
