"""Flax: the functions of the page, on models with dropout and batch statistics.

Whole trajectories are in `test_loops.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pages
import plain_loop
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optax_vasso as ov

# Tested every time in the environment of the trainers, by .ci/run.
pytestmark = pytest.mark.exhaustive

BASE = optax.sgd(0.1)
RNG = np.random.default_rng(0)
X, Y = (
    jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in ((16, 3), (16, 1))
)


@pytest.fixture
def page():
    return pages.names_of("docs/trainers/flax.md")


def network(page):
    return page["Network"](nnx.Rngs(0))


def parts(model):
    return jax.tree.map(jnp.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param))), (
        jnp.asarray(model.norm.mean[...]),
        jnp.asarray(model.norm.var[...]),
    )


def test_two_gradients_with_one_dropout_mask_and_one_update_of_the_statistics(page):
    """At radius zero they are one gradient, if nothing is drawn or counted twice."""
    results = []
    for train, tx in (
        (page["two_gradients"], ov.sam(BASE, rho=0.0)),
        (page["one_gradient"], BASE),
    ):
        model = network(page)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for _ in range(3):
            train(model, optimizer, X, Y)
        results.append(parts(model))
    plain_loop.assert_close(*results)


def test_the_second_gradient_is_that_of_sam(page):
    model = network(page)
    optimizer = nnx.Optimizer(model, ov.sam(BASE, rho=0.3), wrt=nnx.Param)
    graph, params, rest = nnx.split(nnx.clone(model), nnx.Param, ...)

    @jax.jit
    def gradient(params):
        return jax.grad(
            lambda p: page["loss"](nnx.merge(graph, p, rest, copy=True), X, Y)
        )(params)

    g = gradient(params)
    e = optax.tree.scale(0.3 / optax.tree.norm(g), g)
    expected = optax.tree.add_scale(params, -0.1, gradient(optax.tree.add(params, e)))
    page["two_gradients"](model, optimizer, X, Y)
    plain_loop.assert_close(nnx.state(model, nnx.Param), expected)


def test_a_frozen_part_costs_nothing_and_stays(page):
    model = network(page)
    before, _ = parts(model)
    head = page["head"]
    optimizer = nnx.Optimizer(model, ov.lagged_vasso(BASE, rho=0.3), wrt=head)
    for _ in range(2):
        grads = nnx.grad(page["loss"], argnums=nnx.DiffState(0, head))(model, X, Y)
        optimizer.update(model, grads)
    after, _ = parts(model)
    for name in ("features", "norm"):
        plain_loop.assert_close(after[name], before[name], rtol=0, atol=0)
    perturbed = nnx.state(model, head)
    clean = ov.eval_params(optimizer.opt_state, perturbed)
    distance = optax.tree.norm(optax.tree.sub(perturbed, clean))
    assert distance == pytest.approx(0.3, rel=1e-4)
    held = sum(x.size for x in jax.tree.leaves(nnx.state(optimizer)["opt_state"]))
    # ε and the average, and a few scalars; not the features.
    assert held < 3 * 9 + 10


def test_the_evaluated_model_has_the_parameters_and_statistics_of_x(page):
    model = network(page)
    optimizer = nnx.Optimizer(model, ov.lagged_vasso(BASE, rho=0.5), wrt=nnx.Param)
    for _ in range(3):
        page["one_gradient"](model, optimizer, X, Y)
    before = parts(model)
    batches = [X[:8], X[8:]]
    evaluated = page["evaluation_model"](model, optimizer, batches)
    params, statistics = parts(evaluated)
    clean = ov.eval_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    plain_loop.assert_close(params, nnx.to_pure_dict(clean))
    features = params["features"]
    hidden = [b @ features["kernel"] + features["bias"][None] for b in batches]
    mean = sum(h.mean(0) for h in hidden) / 2
    variance = sum(h.var(0) for h in hidden) / 2
    plain_loop.assert_close(statistics, (mean, variance))
    # Training goes on from where it was.
    plain_loop.assert_close(parts(model), before, rtol=0, atol=0)
    assert evaluated.norm.use_running_average
    assert not model.norm.use_running_average


def test_linen_with_two_gradients_written_out(page):
    start = {"kernel": jnp.ones((3, 1)), "bias": jnp.zeros(1)}

    def gradient(params, step=None):
        return jax.grad(
            lambda p: jnp.mean((X @ p["kernel"] + p["bias"][None] - Y) ** 2)
        )(params)

    state = TrainState.create(
        apply_fn=None,
        params=start,
        tx=ov.vasso(BASE, plain_loop.RHO, theta=plain_loop.THETA),
    )
    for _ in range(3):
        state = page["apply_two_gradients"](state, gradient)
    plain_loop.assert_close(state.params, plain_loop.vasso(gradient, start, 3))
    assert state.step == 3
