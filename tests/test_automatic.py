"""θ that follows the innovations, ρ that follows the angle or the loss."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from problems import flat, random_tree, run_chain

import optax_vasso as ov
from optax_vasso.states import collect_metrics

pytestmark = pytest.mark.usefixtures("strict")


@functools.cache
def compiled(make, *options):
    return jax.jit(lambda steps, *numbers: run_chain(make(*numbers, *options), steps))


def projected_vasso(r, theta):
    return ov.projected_perturb(r, ov.vasso_ema(theta), most=1.5, weight=0.5)


def gradients(seed, steps=6):
    return [random_tree(seed + t) for t in range(steps)]


def cosine(a, b):
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return 0.0 if lengths == 0 else float(a @ b / lengths)


def by_hand(steps, start, floor, speed, weight):
    """θ, d and the average cosine of each step, as the docstrings have them."""
    d, theta, average = flat(steps[0]), start, 1.0
    last = np.zeros_like(d)
    yield 1.0, d, average
    for gradient in steps[1:]:
        g = flat(gradient)
        e = g - d
        logit = np.log(theta / (1 - theta)) + speed * cosine(e, last)
        theta = np.clip(1 / (1 + np.exp(-logit)), floor, 1 - floor)
        d, last = (1 - theta) * d + theta * g, e
        average += weight * (cosine(d, g) - average)
        yield theta, d, average


@given(
    seed=st.integers(0, 1000),
    start=st.floats(0.05, 0.9),
    floor=st.floats(0.01, 0.4),
    speed=st.floats(0, 2),
)
def test_the_self_tuned_average_is_the_recursion(seed, start, floor, speed):
    steps = gradients(seed)
    outputs, state = compiled(ov.self_tuned_ema)(steps, start, floor, speed)
    expected = list(by_hand(steps, start, floor, speed, 0.05))
    for output, (_, d, _) in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(flat(output), d, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(state.metrics["theta"], expected[-1][0], rtol=1e-4)


@given(seed=st.integers(0, 1000), theta=st.floats(0.05, 0.9))
def test_without_speed_it_is_vasso(seed, theta):
    steps = gradients(seed)
    tuned, _ = compiled(ov.self_tuned_ema)(steps, theta, 0.01, 0.0)
    plain, _ = compiled(ov.vasso_ema)(steps, theta)
    chex.assert_trees_all_close(tuned, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "start"), [(0.003, 0.5), (0.03, 0.05), (0.3, 0.8), (3.0, 0.1)]
)
def test_on_a_random_walk_in_noise_theta_is_the_gain_of_the_kalman_filter(ratio, start):
    """Whatever the ratio of the variances of the walk's step and of the noise."""
    smooth = ov.self_tuned_ema(start, floor=0.005)

    def step(carry, key):
        walk, state = carry
        steps, noise = jax.random.normal(key, (2, 2000))
        walk = walk + np.float32(ratio**0.5) * steps
        _, state = smooth.update(walk + noise, state)
        return (walk, state), state.metrics["theta"]

    keys = jax.random.split(jax.random.key(0), 4000)
    carry = jnp.zeros(2000), smooth.init(jnp.zeros(2000))
    _, theta = jax.jit(functools.partial(jax.lax.scan, step))(carry, keys)
    # The positive root of K² = ratio (1 − K), the steady state of the Riccati equation.
    gain = (np.sqrt(ratio**2 + 4 * ratio) - ratio) / 2
    np.testing.assert_allclose(np.mean(theta[3000:]), gain, rtol=0.05)


def test_at_a_fixed_point_the_horizon_grows_by_half_the_speed_per_step():
    speed, steps = 0.2, 200
    smooth = ov.self_tuned_ema(0.2, floor=0.001, speed=speed)
    noise = jax.random.normal(jax.random.key(0), (steps, 20_000))
    state, theta = jax.jit(
        lambda: jax.lax.scan(
            lambda s, g: (smooth.update(g, s)[1],) * 2, smooth.init(noise[0]), noise
        )
    )()
    horizon = 1 / theta.metrics["theta"]
    grown = (horizon[-1] - horizon[steps // 2]) / (steps - 1 - steps // 2)
    np.testing.assert_allclose(grown, speed / 2, rtol=0.1)
    assert state.metrics["theta"] == theta.metrics["theta"][-1]


@given(
    seed=st.integers(0, 1000),
    r=st.floats(0.01, 1),
    theta=st.floats(0.05, 0.9),
)
def test_the_projected_radius_is_the_recursion(seed, r, theta):
    steps = gradients(seed)
    outputs, state = compiled(projected_vasso)(steps, r, theta)
    expected = list(by_hand(steps, theta, 0.001, 0.0, 0.5))
    for output, (_, d, average) in zip(outputs, expected, strict=True):
        rho = r / np.clip(average, 1 / 1.5, 1)
        np.testing.assert_allclose(
            flat(output), rho * d / np.linalg.norm(d), rtol=1e-3, atol=1e-5
        )
    np.testing.assert_allclose(state.metrics["rho"], rho, rtol=1e-4)


def test_without_smoothing_the_projected_radius_is_that_of_sam():
    steps = gradients(0)
    projected, _ = run_chain(ov.projected_perturb(0.1, optax.identity()), steps)
    plain, _ = run_chain(ov.sam_perturb(0.1), steps)
    chex.assert_trees_all_close(projected, plain, rtol=1e-6)


@pytest.mark.parametrize("theta", [0.05, 0.2, 0.7])
def test_in_pure_noise_the_length_along_the_gradient_is_r(theta):
    ascent = ov.projected_perturb(0.3, ov.vasso_ema(theta))
    noise = jax.random.normal(jax.random.key(0), (400, 10_000))

    @jax.jit
    def along():
        def step(state, g):
            e, state = ascent.update(g, state)
            return state, (jnp.vdot(e, g) / jnp.linalg.norm(g), state.metrics["rho"])

        return jax.lax.scan(step, ascent.init(noise[0]), noise)[1]

    rise, rho = (value[200:].mean() for value in along())
    np.testing.assert_allclose(rise, 0.3, rtol=0.02)
    np.testing.assert_allclose(rho, 0.3 / np.sqrt(theta * (2 - theta)), rtol=0.02)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("recipe", [ov.auto_vasso, ov.auto_lagged_vasso])
def test_averages_may_be_wider_than_the_parameters(recipe, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), random_tree(0))
    optimizer = recipe(optax.sgd(0.1), 2.0, accumulator_dtype=jnp.float32)
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
    ascent = ov.collapse_guard(
        optax.chain(ov.vasso_ema(0.3), ov.sam_perturb(0.1)),
        2.0,
        margin=0.15,
        patience=0,
    )
    optimizers = recipe(optax.sgd(0.1), 2.0, 0.1, 0.3), wrap(optax.sgd(0.1), ascent)
    found = []
    for optimizer in optimizers:
        step = ov.make_train_step(lambda x, batch: jnp.sum(x**2) / 2, optimizer)
        state = ov.init_train_state(jnp.array([1.0, -0.5, 1.2]), optimizer)
        for _ in range(3):
            state, _ = step(state, None)
        found.append(state.params)
    chex.assert_trees_all_equal(*found)


def test_each_layer_may_have_a_gain_and_a_radius_of_its_own():
    ascent = ov.per_layer(ov.projected_perturb(0.1, ov.self_tuned_ema(0.5)))
    params = {"noisy": jnp.zeros(2), "calm": jnp.zeros(2)}
    state = ascent.init(params)
    for sign in (1.0, -1.0, 1.0, -1.0):
        grads = {"noisy": jnp.full(2, sign), "calm": jnp.ones(2)}
        perturbation, state = ascent.update(grads, state, params)
    theta = state.smoothing_state.metrics["theta"]
    assert theta["noisy"] < theta["calm"] == 0.5
    lengths = jax.tree.map(jnp.linalg.norm, perturbation)
    assert lengths["noisy"] > lengths["calm"]
    metrics = collect_metrics(state)
    assert metrics["theta/noisy"] == theta["noisy"]
    assert set(metrics) == {
        f"{name}/{layer}" for name in ("theta", "rho") for layer in params
    }


def guarded(ceiling=2.0, margin=0.5, patience=2, weight=0.5):
    return ov.collapse_guard(
        ov.sam_perturb(1.0), ceiling, margin=margin, patience=patience, weight=weight
    )


def lengths_under_guard(losses, **options):
    """Length of the perturbation at each loss, and the state."""
    grads, ascent = jnp.array([3.0, 4.0]), guarded(**options)
    state, lengths = ascent.init(grads), []
    for loss in losses:
        perturbation, state = ascent.update(grads, state, value=jnp.asarray(loss))
        lengths.append(float(jnp.linalg.norm(perturbation)))
        np.testing.assert_allclose(state.metrics["guard"], lengths[-1], rtol=1e-6)
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


@pytest.mark.parametrize("broken", [jnp.inf, jnp.nan])
def test_one_loss_that_is_not_finite_does_not_close_the_guard_for_good(broken):
    _, state = lengths_under_guard((broken, 0.5, 0.5, broken, 0.5))
    assert jnp.isfinite(state.loss)
    assert state.metrics["guard"] == 1


def test_a_training_that_learns_at_once_is_not_changed_by_the_guard():
    steps = gradients(0)
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
