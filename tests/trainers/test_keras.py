"""Keras on JAX: the classes of the page, in `fit`."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pages
import plain_loop
import pytest

import optax_vasso as ov

keras = pages.require("keras")
pytestmark = pytest.mark.usefixtures("foreign")
RNG = np.random.default_rng(0)
X = RNG.standard_normal((32, 3)).astype(np.float32)
Y = RNG.standard_normal((32, 1)).astype(np.float32)
BATCHES = 4


@pytest.fixture
def page(foreign):
    return pages.names_of("docs/trainers/keras.md")


def linear(model=None, dropout=0.0):
    inputs = keras.Input((3,))
    hidden = keras.layers.Dropout(dropout, seed=0)(inputs)
    outputs = keras.layers.Dense(1, kernel_initializer=keras.initializers.Ones())(
        hidden
    )
    return (model or keras.Model)(inputs, outputs)


def weights(model):
    return [jnp.array(v.value) for v in model.trainable_variables]


def gradient(params, step):
    def loss(params):
        kernel, bias = params
        part = slice(8 * step, 8 * step + 8)
        return jnp.mean((X[part] @ kernel + bias - Y[part]) ** 2)

    return jax.grad(loss)(params)


def fit(page, model, optimizer, **kwargs):
    model.compile(page["Optax"](optimizer), loss="mse")
    return model.fit(X, Y, batch_size=8, shuffle=False, verbose=0, **kwargs)


BASE = optax.sgd(plain_loop.RATE)
HYPERPARAMETERS = {"rho": plain_loop.RHO, "theta": plain_loop.THETA}


def test_one_gradient(page):
    model = linear()
    start = weights(model)
    fit(page, model, ov.lagged_vasso(BASE, **HYPERPARAMETERS))
    x, y = plain_loop.lagged(gradient, start, BATCHES)
    plain_loop.assert_close(weights(model), y)
    with page["clean_weights"](model):
        plain_loop.assert_close(weights(model), x)
    plain_loop.assert_close(weights(model), y)


def test_two_gradients(page):
    model = linear(page["TwoGradients"])
    start = weights(model)
    fit(page, model, ov.vasso(BASE, **HYPERPARAMETERS))
    plain_loop.assert_close(weights(model), plain_loop.vasso(gradient, start, BATCHES))


def test_fit_without_the_train_step_says_what_two_gradients_need(page):
    with pytest.raises(ValueError, match="needs grad_fn"):
        fit(page, linear(), ov.vasso(BASE))


def test_both_gradients_have_the_same_dropout_mask(page):
    """A radius of zero is plain training only if the two masks agree."""
    results = []
    for model, optimizer in (
        (page["TwoGradients"], ov.sam(BASE, rho=0.0)),
        (None, BASE),
    ):
        network = linear(model, dropout=0.5)
        fit(page, network, optimizer)
        results.append(weights(network))
    plain_loop.assert_close(*results)


def test_validation_during_fit_is_at_the_clean_point(page):
    model = linear()
    history = fit(
        page,
        model,
        ov.lagged_vasso(BASE, rho=1.0),
        validation_data=(X, Y),
        callbacks=[page["EvaluateClean"]()],
    )
    validated = history.history["val_loss"][-1]
    with page["clean_weights"](model):
        assert model.evaluate(X, Y, verbose=0) == pytest.approx(validated)
    assert model.evaluate(X, Y, verbose=0) > validated


def test_a_saved_run_goes_on_as_if_it_had_not_stopped(page, tmp_path):
    whole, stopped, resumed = linear(), linear(), linear()
    optimizer = ov.lagged_vasso(BASE, **HYPERPARAMETERS)
    fit(page, whole, optimizer, epochs=2)
    fit(page, stopped, optimizer)
    stopped.save_weights(tmp_path / "run.weights.h5")
    resumed.compile(page["Optax"](optimizer), loss="mse")
    resumed.optimizer.build(resumed.trainable_variables)
    resumed.load_weights(tmp_path / "run.weights.h5")
    for before, after in zip(
        stopped.optimizer.variables, resumed.optimizer.variables, strict=True
    ):
        after.assign(before)
    resumed.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    plain_loop.assert_close(weights(resumed), weights(whole))
