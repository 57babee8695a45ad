"""A bad batch changes nothing but the counters."""

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest

import optax_vasso as ov
from optax_vasso._internal.trees import clear_metrics, find_states
from optax_vasso.wrappers import SkipState

PARAMS = {"w": jnp.asarray([0.5, -1.0, 2.0]), "b": jnp.asarray(0.1)}
GOOD = jnp.asarray([[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]])
RECIPES = {
    "sgd": lambda base: base,
    "vasso": ov.vasso,
    "friendly": ov.friendly_sam,
    "lagged": ov.lagged_vasso,
    "looksam": lambda base: ov.looksam(base, k=2),
}


def loss_fn(params, batch, model_state):
    residual = batch @ params["w"] + params["b"]
    return jnp.mean(residual**2), model_state + jnp.mean(batch)


def fresh(recipe, **kwargs):
    optimizer = ov.wrappers.skip_nonfinite(RECIPES[recipe](optax.adam(0.1)), **kwargs)
    state = ov.init_train_state(PARAMS, optimizer, model_state=jnp.zeros(()))
    return ov.make_train_step(loss_fn, optimizer), state


def arrays(state):
    """Everything that training depends on."""
    (found,) = find_states(state.opt_state, SkipState)
    kept = (state.params, state.model_state, clear_metrics(found.optimizer_state))
    return [np.asarray(x) for x in jax.tree.leaves(kept)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bad_batch_changes_neither_parameters_nor_any_average(recipe):
    step, state = fresh(recipe)
    for _ in range(3):
        state, metrics = step(state, GOOD)
    assert bool(metrics["finite"])
    before = arrays(state)
    for count, bad in enumerate((np.nan, np.inf, 1e38), start=1):
        state, metrics = step(state, GOOD.at[0, 0].set(bad))
        for old, new in zip(before, arrays(state), strict=True):
            np.testing.assert_array_equal(old, new)
        assert not bool(metrics["finite"])
        assert int(metrics["skipped"]) == count
    assert int(state.step) == 6
    # Training goes on as if the bad batches had not been.
    state, metrics = step(state, GOOD)
    assert bool(metrics["finite"])
    _, clean = fresh(recipe)
    for _ in range(4):
        clean, _ = step(clean, GOOD)
    for a, b in zip(arrays(state), arrays(clean), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("recipe", ["sgd", "vasso"])
def test_accumulated_batches_are_not_skipped_batches(recipe):
    """While they are accumulated the optimizer is not asked; the model is."""
    optimizer = optax.MultiSteps(
        ov.wrappers.skip_nonfinite(RECIPES[recipe](optax.adam(0.1))),
        every_k_schedule=2,
        should_skip_update_fn=optax.skip_not_finite,  # else it would keep the NaN
    )
    step = ov.make_train_step(loss_fn, optimizer)
    state = ov.init_train_state(PARAMS, optimizer, model_state=jnp.zeros(()))
    bad = GOOD.at[0, 0].set(jnp.nan)
    found = []
    for batch in (GOOD, GOOD, bad, GOOD, GOOD, GOOD):
        state, metrics = step(state, batch)
        found.append(bool(metrics["finite"]))
        assert int(metrics["skipped"]) == 0
    assert found == [True, True, False, True, True, True]
    np.testing.assert_allclose(state.model_state, 5 * jnp.mean(GOOD), rtol=1e-6)


def test_a_step_skipped_inside_an_optimizer_is_reported():
    """Though loss and gradients are finite."""
    optimizer = optax.chain(ov.wrappers.skip_nonfinite(optax.scale(jnp.inf)))
    state = ov.init_train_state(PARAMS, optimizer, model_state=jnp.zeros(()))
    state, metrics = ov.make_train_step(loss_fn, optimizer)(state, GOOD)
    assert not bool(metrics["finite"])
    assert int(metrics["skipped"]) == 1
    assert state.model_state == 0


def test_a_perturbed_pass_that_overflows_is_skipped_too():
    def cliff(params, batch):
        loss = jnp.sum(params["w"] * batch)
        return jnp.where(loss > 1.0, jnp.inf, loss)

    optimizer = ov.wrappers.skip_nonfinite(ov.vasso(optax.sgd(0.1), rho=10.0))
    state = ov.init_train_state({"w": jnp.zeros(2)}, optimizer)
    state, metrics = ov.make_train_step(cliff, optimizer)(state, jnp.ones(2))
    assert np.isfinite(metrics["loss"])
    assert not bool(metrics["finite"])
    np.testing.assert_array_equal(state.params["w"], 0)


def test_consecutive_bad_batches_stop_with_an_error():
    step, state = fresh("vasso")
    bad = GOOD * jnp.nan
    for batch in (bad, bad, GOOD, bad, bad):
        state, _ = step(state, batch)
        ov.wrappers.check_finite(state, max_consecutive=2)
    state, _ = step(state, bad)
    ov.wrappers.check_finite(state)
    with pytest.raises(FloatingPointError, match=r"last 3 batches.*2 allowed.*\(5 sin"):
        ov.wrappers.check_finite(state, max_consecutive=2)


def test_both_passes_share_a_loss_scale_and_an_overflow_lowers_it():
    """Weights in float32, the loss computed in float16."""
    scales = []

    def half(params, batch):
        w = params["w"].astype(jnp.float16)
        return jnp.mean((batch.astype(jnp.float16) @ w) ** 2)

    class Recorder(jmp.DynamicLossScale):
        def scale(self, tree):
            scales.append(self.loss_scale)
            return super().scale(tree)

    jax.tree_util.register_pytree_node(
        Recorder, Recorder.tree_flatten, Recorder.tree_unflatten
    )
    optimizer = ov.wrappers.skip_nonfinite(
        ov.vasso(optax.sgd(0.01)), loss_scale=Recorder(jnp.float32(2.0**18))
    )
    state = ov.init_train_state({"w": jnp.asarray([0.5, -1.0, 2.0])}, optimizer)
    step = ov.make_train_step(half, optimizer)
    kept = np.asarray(state.params["w"])
    state, metrics = step(state, GOOD)
    # The two passes were traced with the same array.
    assert len(scales) == 2
    assert scales[0] is scales[1]
    assert not bool(metrics["finite"])
    np.testing.assert_array_equal(state.params["w"], kept)
    losses = []
    for _ in range(30):
        state, metrics = step(state, GOOD)
        losses.append(float(metrics["loss"]))
    assert float(metrics["loss_scale"]) < 2.0**18
    assert int(metrics["skipped"]) < 12
    assert losses[-1] < 0.1 * losses[0]


def test_a_loss_scale_does_not_change_what_is_learned():
    """With no overflow, the trajectory is that without a scale: powers of two."""
    plain, state = fresh("vasso")
    scaled, other = fresh("vasso", loss_scale=jmp.StaticLossScale(jnp.float32(1024)))
    for _ in range(5):
        state, a = plain(state, GOOD)
        other, b = scaled(other, GOOD)
    for x, y in zip(arrays(state), arrays(other), strict=True):
        # A scale moves values past XLA's fused multiply-adds, hence a few roundings.
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)


def test_the_model_state_of_a_skipped_step_stays_and_of_any_other_is_new():
    def loss_fn(params, batch, model_state):
        return jnp.sum(params * batch), model_state + 1

    optimizer = ov.wrappers.skip_nonfinite(optax.sgd(0.1))
    step = ov.make_train_step(loss_fn, optimizer)
    state = ov.init_train_state(jnp.ones(2), optimizer, model_state=jnp.zeros(()))
    counts = []
    for factor in (1.0, jnp.nan, 1.0):
        state, _ = step(state, jnp.full(2, factor))
        counts.append(int(state.model_state))
    assert counts == [1, 1, 2]


def test_donating_a_state_leaves_the_loss_scale_of_the_caller_alive():
    scale = jmp.DynamicLossScale(jnp.float32(1024))
    optimizer = ov.wrappers.skip_nonfinite(optax.sgd(0.1), loss_scale=scale)
    params = jnp.ones(2)
    step = jax.jit(optimizer.update, donate_argnums=1)
    step(params, optimizer.init(params), params)
    assert not scale.loss_scale.is_deleted()
