"""A perturbation in proportion to what the model has learned."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import random_tree, run_chain

import optax_vasso as ov

pytestmark = pytest.mark.usefixtures("strict")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("recipe", [ov.auto_vasso, ov.auto_lagged_vasso])
def test_averages_may_be_wider_than_the_parameters(recipe, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), random_tree(0))
    optimizer = recipe(optax.sgd(0.1), ceiling=2.0, accumulator_dtype=jnp.float32)
    state = optimizer.init(params)
    updates, after = optimizer.update(
        params, state, params, grad_fn=lambda x: x, value=1.0
    )
    chex.assert_trees_all_equal_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert jnp.dtype("float32") in {
        leaf.dtype for leaf in jax.tree.leaves(after.ascent_state) if leaf.ndim
    }


@pytest.mark.parametrize("recipe", [ov.auto_vasso, ov.auto_lagged_vasso])
def test_the_train_step_reports_how_much_the_automatic_methods_perturb(recipe):
    optimizer = recipe(optax.sgd(0.1), ceiling=4.0)
    step = ov.make_train_step(lambda params, batch: jnp.sum(params**2), optimizer)
    for start, share in ((1.3, 0.0), (1.1, (4 - 3 * 1.1**2) / 0.6), (1.0, 1.0)):
        state = ov.init_train_state(jnp.full(3, start), optimizer)
        _, metrics = step(state, None)
        np.testing.assert_allclose(metrics["guard"], share, rtol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "wrap"),
    [(ov.auto_vasso, ov.sharpness_aware), (ov.auto_lagged_vasso, ov.lagged)],
)
def test_automatic_methods_are_their_parts(recipe, wrap):
    ascent = ov.ascent.collapse_guard(
        optax.chain(ov.vasso_ema(0.3), ov.sam_perturb(0.1)),
        2.0,
        margin=0.15,
        patience=0,
    )
    optimizers = (
        recipe(optax.sgd(0.1), 0.1, ceiling=2.0, theta=0.3),
        wrap(optax.sgd(0.1), ascent),
    )
    found = []
    for optimizer in optimizers:
        step = ov.make_train_step(lambda x, batch: jnp.sum(x**2) / 2, optimizer)
        state = ov.init_train_state(jnp.array([1.0, -0.5, 1.2]), optimizer)
        for _ in range(3):
            state, _ = step(state, None)
        found.append(state.params)
    chex.assert_trees_all_equal(*found)


def guarded(ceiling=2.0, margin=0.5, patience=2, weight=0.5):
    return ov.ascent.collapse_guard(
        ov.sam_perturb(1.0), ceiling, margin=margin, patience=patience, weight=weight
    )


def lengths_under_guard(losses, **options):
    """Length of the perturbation at each loss, and the state."""
    grads, ascent = jnp.array([3.0, 4.0]), guarded(**options)
    state, lengths = ascent.init(grads), []
    for loss in losses:
        perturbation, state = ascent.update(grads, state, value=jnp.asarray(loss))
        lengths.append(float(jnp.linalg.norm(perturbation)))
        np.testing.assert_allclose(
            state.report.metrics["guard"], lengths[-1], rtol=1e-6
        )
    return lengths, state


def test_without_patience_the_guard_is_the_distance_of_the_loss_from_its_ceiling():
    losses = (2.5, 1.9, 1.0, 1.0, 0.1, 3.0)
    lengths, _ = lengths_under_guard(losses, patience=0)
    average, expected = losses[0], []
    for loss in losses:
        average = (average + loss) / 2 if expected else loss
        expected.append(np.clip((2.0 - average) / (0.5 * 2.0), 0, 1))
    np.testing.assert_allclose(lengths, expected, rtol=1e-5)
    assert 0 < min(filter(None, lengths)) < max(lengths) == 1


def test_the_guard_closes_after_its_patience_and_opens_once_something_is_learned():
    # The margin begins at 1, the ceiling is 2.
    lengths, _ = lengths_under_guard((2.5, 2.0, 1.5, 0.5, 1.5, 1.5, 1.5), weight=1.0)
    np.testing.assert_allclose(lengths, [1, 0, 0.5, 1, 1, 0.5, 0.5], rtol=1e-6)


def test_patience_is_counted_anew_once_something_is_learned():
    lengths, state = lengths_under_guard((2, 0, 2, 0, 2, 2, 2), weight=1.0, patience=3)
    np.testing.assert_allclose(lengths, [1, 1, 1, 1, 1, 1, 0], rtol=1e-6)
    assert state.waited == 3


def test_at_the_margin_itself_nothing_has_been_learned():
    """It begins at 1; a patience of four steps ends with the fourth."""
    lengths, _ = lengths_under_guard((1, 1, 1, 2), weight=1.0, patience=4)
    np.testing.assert_allclose(lengths, [1, 1, 1, 0], atol=1e-6)


def test_a_loss_above_ten_ceilings_counts_as_ten():
    _, state = lengths_under_guard((1.0, 1e4))
    np.testing.assert_allclose(state.loss, (1.0 + 10 * 2.0) / 2, rtol=1e-6)


@pytest.mark.parametrize("broken", [jnp.inf, jnp.nan])
def test_one_loss_that_is_not_finite_does_not_close_the_guard_for_good(broken):
    _, state = lengths_under_guard((broken, 0.5, 0.5, broken, 0.5))
    assert jnp.isfinite(state.loss)
    assert state.report.metrics["guard"] == 1


def test_a_training_that_learns_at_once_is_not_changed_by_the_guard():
    steps = [random_tree(t) for t in range(6)]
    plain, _ = run_chain(ov.sam_perturb(1.0), steps)
    ascent = guarded(patience=5, weight=1.0)
    state = ascent.init(steps[0])
    for i, (gradient, expected) in enumerate(zip(steps, plain, strict=True)):
        loss = jnp.asarray(2.5 if i < 4 else 0.5)
        actual, state = ascent.update(gradient, state, value=loss)
        chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize("wrap", [ov.sharpness_aware, ov.lagged])
def test_the_train_step_passes_the_loss_to_the_guard(wrap):
    optimizer = wrap(optax.sgd(0.1), guarded(patience=0))
    step = ov.make_train_step(lambda x, batch: jnp.sum(x**2) / 2, optimizer)
    state = ov.init_train_state(jnp.ones(3), optimizer)
    _, metrics = step(state, None)
    assert metrics["guard"] == 0.5


def test_a_guard_without_the_loss_says_how_to_pass_it():
    with pytest.raises(ValueError, match=r"^collapse_guard needs .*value=loss\)\.$"):
        guarded().update(jnp.ones(2), guarded().init(jnp.ones(2)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_guarded_ascent_changes_no_type(dtype):
    params = {"w": jnp.ones(3, dtype), "frozen": None}
    state = guarded().init(params)
    perturbation, after = jax.eval_shape(
        guarded().update, params, state, value=jnp.asarray(1.0, "float32")
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(perturbation, params)


@pytest.mark.parametrize(
    ("recipe", "most"), [(ov.auto_vasso, 2.01), (ov.auto_lagged_vasso, 1.01)]
)
def test_a_step_costs_two_gradients_or_one(recipe, most):
    """By XLA's count of operations, at 1,024 examples per step."""
    params = [jnp.ones((128, 128)) for _ in range(2)]
    inputs = jnp.ones((1024, 128))
    optimizer = recipe(optax.sgd(0.1, momentum=0.9), ceiling=2.0)

    def loss(params):
        h = inputs
        for kernel in params:
            h = jnp.tanh(h @ kernel)
        return jnp.mean(h)

    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        return optimizer.update(
            grads, state, params, grad_fn=jax.grad(loss), value=value
        )

    def operations(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    gradient = operations(jax.value_and_grad(loss), params)
    taken = operations(step, params, optimizer.init(params)) / gradient
    assert most - 1 < taken < most
