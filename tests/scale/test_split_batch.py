"""Split batches: the ascent on a share of the examples, the descent on all others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_vasso as ov
from optax_vasso.train import microbatched, split_batch


def squares(params, batch):
    return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)


def problem(examples=32):
    rng = np.random.default_rng(0)
    batch = {
        "x": jnp.asarray(rng.normal(size=(examples, 4))),
        "y": jnp.asarray(rng.normal(size=examples)),
    }
    return jnp.asarray(rng.normal(size=4)), batch


def one_step(params, batch, loss_fn=squares, rho=0.2, **makers):
    optimizer = ov.sam(optax.sgd(0.1), rho)
    step = ov.make_train_step(loss_fn, optimizer, **makers)
    return step(ov.init_train_state(params, optimizer), batch)


def written_out(params, batch, ascends, loss_fn=squares, rho=0.2):
    @jax.jit
    def step(params, batch):
        ascent, descent = (
            jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch)
            for rows in (ascends, ~ascends)
        )
        loss, g = jax.value_and_grad(loss_fn)(params, ascent)
        moved = params + rho * g / jnp.linalg.norm(g)
        return params - 0.1 * jax.grad(loss_fn)(moved, descent), loss

    return step(params, batch)


def every(n, examples):
    return np.arange(examples) % n == 0


@pytest.mark.parametrize(
    ("share", "ascends"),
    [
        (1 / 8, every(8, 32)),
        (0.25, every(4, 32)),
        (1 / 32, every(32, 32)),
        (3 / 8, np.isin(np.arange(32) % 8, [0, 1, 2])),
    ],
)
def test_a_split_step_is_written_out(x64, share, ascends):
    params, batch = problem()
    state, metrics = one_step(params, batch, **split_batch(share))
    expected, loss = written_out(params, batch, ascends)
    np.testing.assert_allclose(state.params, expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-14)


@pytest.mark.parametrize("examples", [2, 3, 7, 12, 50, 51, 127])
@pytest.mark.parametrize("share", [1 / 8, 1 / 3, 0.9])
def test_every_example_is_in_exactly_one_part_and_the_share_is_the_nearest(
    examples, share
):
    def seen(params, model_state, batch, key):
        return jnp.sum(params * batch), (model_state, batch)

    @jax.jit
    def parts(batch):
        makers = split_batch(share)
        inputs = ov.train.Inputs(1.0, (), batch)
        (_, (_, ascent)), _ = makers["ascent_gradient"](seen)(inputs)
        (_, (_, descent)), _ = makers["gradient"](seen)(inputs)
        return ascent, descent

    batch = np.arange(examples, dtype=np.float32)
    ascent, descent = parts(batch)
    assert sorted([*ascent.tolist(), *descent.tolist()]) == batch.tolist()
    assert len(ascent) == np.clip(round(share * examples), 1, examples - 1)


def test_the_ascent_of_an_indivisible_batch_is_spread_evenly():
    def seen(params, model_state, batch, key):
        return jnp.sum(params * batch), (model_state, batch)

    ascent = split_batch(1 / 8)["ascent_gradient"](seen)
    (_, (_, examples)), _ = ascent(ov.train.Inputs(1.0, (), jnp.arange(50.0)))
    assert examples.tolist() == [0, 8, 16, 25, 33, 41]


def test_weights_of_examples_are_split_with_them(x64):
    params, batch = problem()
    batch["weight"] = jnp.asarray(np.random.default_rng(1).random(32))

    def weighted(params, batch):
        squared = (batch["x"] @ params - batch["y"]) ** 2
        return jnp.sum(batch["weight"] * squared) / jnp.sum(batch["weight"])

    state, _ = one_step(params, batch, weighted, **split_batch())
    expected, _ = written_out(params, batch, every(8, 32), weighted)
    np.testing.assert_allclose(state.params, expected, rtol=0, atol=1e-14)


def test_seven_microbatches_of_the_descent_are_as_large_as_the_ascent(x64):
    params, batch = problem(64)
    state, _ = one_step(params, batch, **split_batch())
    sizes = []

    def watched(params, batch):
        sizes.append(len(batch["y"]))
        return squares(params, batch)

    parts, _ = one_step(params, batch, watched, **split_batch(gradient=microbatched(7)))
    np.testing.assert_allclose(parts.params, state.params, rtol=0, atol=1e-14)
    assert set(sizes) == {8}


def test_the_ascent_has_a_gradient_maker_of_its_own(x64):
    params, batch = problem(64)
    state, _ = one_step(params, batch, **split_batch())
    parts, _ = one_step(params, batch, **split_batch(ascent_gradient=microbatched(4)))
    np.testing.assert_allclose(parts.params, state.params, rtol=0, atol=1e-14)


def test_without_a_radius_a_split_step_is_a_step_on_the_rest(x64):
    params, batch = problem()
    state, metrics = one_step(params, batch, rho=0.0, **split_batch())
    rest = jax.tree.map(lambda leaf: leaf[~every(8, 32)], batch)
    expected = params - 0.1 * jax.grad(squares)(params, rest)
    np.testing.assert_allclose(state.params, expected, rtol=0, atol=1e-14)
    # The perturbed loss is that of the descent's examples.
    np.testing.assert_allclose(metrics["perturbed_loss"], squares(params, rest))


@pytest.mark.parametrize("share", [1 / 8, 1 / 4, 1 / 2])
def test_a_split_step_costs_one_gradient_of_the_batch(share):
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=(64, 64)) * 0.1) for _ in range(3)]
    batch = jnp.ones((1024, 64))

    def loss_fn(params, batch):
        x = batch
        for weights in params:
            x = jnp.tanh(x @ weights)
        return jnp.mean((x - batch) ** 2)

    def flops(optimizer, **makers):
        step = ov.make_train_step(loss_fn, optimizer, **makers)
        state = ov.init_train_state(params, optimizer)
        return step.lower(state, batch).compile().cost_analysis()["flops"]

    base = optax.sgd(0.1, momentum=0.9)
    split = flops(ov.sam(base, 0.5), **split_batch(share))
    assert split <= 1.02 * flops(base)


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1, float("nan"), "1/8", None])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ValueError, match="share must be"):
        split_batch(share)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": jnp.ones((8, 4)), "y": jnp.ones(())}, r"batch\['y'\] is a scalar"),
        ({"x": jnp.ones((8, 4)), "y": jnp.ones(4)}, r"batch\['y'\] has 4 examples.* 8"),
        ({"x": jnp.ones((1, 4)), "y": jnp.ones(1)}, "at least two examples, got 1"),
        ({}, "no arrays"),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused_in_a_sentence(batch, message):
    with pytest.raises(ValueError, match=message):
        one_step(jnp.ones(4), batch, **split_batch())


def test_a_number_in_a_batch_outside_of_jit_is_refused_too():
    """There it is no array yet."""
    grad_fn = split_batch()["gradient"](squares)
    batch = {"x": np.ones((8, 4)), "y": 1.0}
    with pytest.raises(ValueError, match=r"batch\['y'\] is a scalar"):
        grad_fn(ov.train.Inputs(jnp.ones(4), (), batch))


def test_losses_of_different_examples_are_not_subtracted():
    _, metrics = one_step(*problem(), **split_batch())
    assert metrics.keys() == {"loss", "ascended", "perturbed_loss"}
