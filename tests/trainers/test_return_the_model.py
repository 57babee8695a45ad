"""Libraries that return the model and drop the state of the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pages
import plain_loop
import pytest

import optax_vasso as ov

pytestmark = pytest.mark.usefixtures("foreign")
STEPS = 5
MATRIX = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)), jnp.float32)


def loss(params):
    return jnp.mean((MATRIX @ params - 1.0) ** 2)


def until(rho=plain_loop.RHO):
    return ov.ascent.until(STEPS, rho)


def fit(params, optimizer, steps=STEPS):
    """The plainest loop that returns only the model."""

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    carry, _ = jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)
    return carry[0]


def test_a_radius_that_ends_at_zero_returns_the_clean_point():
    x, y = plain_loop.lagged(lambda x, _: jax.grad(loss)(x), jnp.zeros(3), STEPS)
    base = optax.sgd(plain_loop.RATE)
    plain_loop.assert_close(
        fit(jnp.zeros(3), ov.lagged_vasso(base, until(), theta=plain_loop.THETA)), x
    )
    plain_loop.assert_close(
        fit(
            jnp.zeros(3), ov.lagged_vasso(base, plain_loop.RHO, theta=plain_loop.THETA)
        ),
        y,
    )


# At learning rate zero x_t does not move: a loop that returns it returns the start.
STILL = optax.sgd(0.0)


def flowjax_fit(optimizer):
    train = pages.require("flowjax.train")
    start = {"params": jnp.zeros(3), "name": "a model"}
    trained, _ = train.fit_to_key_based_loss(
        jax.random.key(0),
        start,
        loss_fn=lambda params, static, key: loss(params["params"]),
        steps=STEPS,
        optimizer=optimizer,
        show_progress=False,
    )
    return start, trained


def flowjax_fit_to_data(optimizer):
    train = pages.require("flowjax.train")
    start = {"params": jnp.zeros(3)}
    trained, _ = train.fit_to_data(
        jax.random.key(0),
        start,
        jnp.ones((11, 1)),
        loss_fn=lambda params, static, part, key: loss(params["params"] * part[0]),
        optimizer=optimizer,
        max_epochs=STEPS,
        max_patience=STEPS,
        batch_size=10,  # of the ten examples that are left after one for validation
        return_best=False,
        show_progress=False,
    )
    return start, trained


def gpjax_fit(optimizer):
    gpjax = pages.require("gpjax")
    x = jnp.linspace(0.0, 1.0, 12).reshape(-1, 1)
    prior = gpjax.gps.Prior(
        mean_function=gpjax.mean_functions.Constant(), kernel=gpjax.kernels.RBF()
    )
    start = prior * gpjax.likelihoods.Gaussian()
    trained, _ = gpjax.fit(
        model=start,
        objective=lambda p, d: -gpjax.objectives.conjugate_mll(p, d),
        train_data=gpjax.Dataset(X=x, y=jnp.sin(6.0 * x)),
        optim=optimizer,
        num_iters=STEPS,
        verbose=False,
    )
    return start, trained


def distance(start, trained):
    numbers = [
        [np.asarray(leaf, float) for leaf in jax.tree.leaves(tree) if is_float(leaf)]
        for tree in (start, trained)
    ]
    return np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(*numbers, strict=True)))


def is_float(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


@pytest.mark.parametrize("train", [flowjax_fit, flowjax_fit_to_data, gpjax_fit])
def test_what_the_library_returns_is_the_clean_point(train):
    assert distance(*train(ov.lagged_vasso(STILL, until()))) < 1e-6
    assert distance(*train(ov.lagged_vasso(STILL, plain_loop.RHO))) == pytest.approx(
        plain_loop.RHO, rel=1e-4
    )


@pytest.mark.parametrize("train", [flowjax_fit, flowjax_fit_to_data, gpjax_fit])
def test_two_gradients_say_what_they_need(train):
    with pytest.raises(ValueError, match="needs grad_fn, got None.*or use lagged"):
        train(ov.vasso(STILL))
