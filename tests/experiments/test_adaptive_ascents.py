"""θ that follows the innovations, ρ that follows the angle."""

import functools

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from problems import flat, random_tree, run_chain

import optax_vasso as ov
from experiments.harness import adaptive_ascents
from optax_vasso._internal.trees import collect_metrics

pytestmark = pytest.mark.usefixtures("strict")


@functools.cache
def compiled(make, *options):
    return jax.jit(lambda steps, *numbers: run_chain(make(*numbers, *options), steps))


def projected_vasso(r, theta):
    return adaptive_ascents.projected_perturb(
        r, ov.vasso_ema(theta), most=1.5, weight=0.5
    )


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
    outputs, state = compiled(adaptive_ascents.self_tuned_ema)(
        steps, start, floor, speed
    )
    expected = list(by_hand(steps, start, floor, speed, 0.05))
    for output, (_, d, _) in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(flat(output), d, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        state.report.metrics["theta"], expected[-1][0], rtol=1e-4
    )


@given(seed=st.integers(0, 1000), theta=st.floats(0.05, 0.9))
def test_without_speed_it_is_vasso(seed, theta):
    steps = gradients(seed)
    tuned, _ = compiled(adaptive_ascents.self_tuned_ema)(steps, theta, 0.01, 0.0)
    plain, _ = compiled(ov.vasso_ema)(steps, theta)
    chex.assert_trees_all_close(tuned, plain, rtol=1e-4, atol=1e-6)


# From below and from above; the ends of the range are the hardest.
@pytest.mark.parametrize(
    ("ratio", "start"),
    [
        (0.003, 0.5),
        cases.exhaustive(0.03, 0.05),
        cases.exhaustive(0.3, 0.8),
        (3.0, 0.1),
    ],
)
def test_on_a_random_walk_in_noise_theta_is_the_gain_of_the_kalman_filter(ratio, start):
    """Whatever the ratio of the variances of the walk's step and of the noise."""
    smooth = adaptive_ascents.self_tuned_ema(start, floor=0.005)

    def step(carry, key):
        walk, state = carry
        steps, noise = jax.random.normal(key, (2, 2000))
        walk = walk + np.float32(ratio**0.5) * steps
        _, state = smooth.update(walk + noise, state)
        return (walk, state), state.report.metrics["theta"]

    keys = jax.random.split(jax.random.key(0), 4000)
    carry = jnp.zeros(2000), smooth.init(jnp.zeros(2000))
    _, theta = jax.jit(functools.partial(jax.lax.scan, step))(carry, keys)
    # The positive root of K² = ratio (1 − K), the steady state of the Riccati equation.
    gain = (np.sqrt(ratio**2 + 4 * ratio) - ratio) / 2
    np.testing.assert_allclose(np.mean(theta[3000:]), gain, rtol=0.05)


def test_at_a_fixed_point_the_horizon_grows_by_half_the_speed_per_step():
    speed, steps = 0.2, 200
    smooth = adaptive_ascents.self_tuned_ema(0.2, floor=0.001, speed=speed)
    noise = jax.random.normal(jax.random.key(0), (steps, 20_000))
    state, theta = jax.jit(
        lambda: jax.lax.scan(
            lambda s, g: (smooth.update(g, s)[1],) * 2, smooth.init(noise[0]), noise
        )
    )()
    horizon = 1 / theta.report.metrics["theta"]
    grown = (horizon[-1] - horizon[steps // 2]) / (steps - 1 - steps // 2)
    np.testing.assert_allclose(grown, speed / 2, rtol=0.1)
    assert state.report.metrics["theta"] == theta.report.metrics["theta"][-1]


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
    np.testing.assert_allclose(state.report.metrics["rho"], rho, rtol=1e-4)


def test_without_smoothing_the_projected_radius_is_that_of_sam():
    steps = gradients(0)
    projected, _ = run_chain(
        adaptive_ascents.projected_perturb(0.1, optax.identity()), steps
    )
    plain, _ = run_chain(ov.sam_perturb(0.1), steps)
    chex.assert_trees_all_close(projected, plain, rtol=1e-6)


@pytest.mark.parametrize("theta", [0.05, 0.2, 0.7])
def test_in_pure_noise_the_length_along_the_gradient_is_r(theta):
    ascent = adaptive_ascents.projected_perturb(0.3, ov.vasso_ema(theta))
    noise = jax.random.normal(jax.random.key(0), (400, 10_000))

    @jax.jit
    def along():
        def step(state, g):
            e, state = ascent.update(g, state)
            return state, (
                jnp.vdot(e, g) / jnp.linalg.norm(g),
                state.report.metrics["rho"],
            )

        return jax.lax.scan(step, ascent.init(noise[0]), noise)[1]

    rise, rho = (value[200:].mean() for value in along())
    np.testing.assert_allclose(rise, 0.3, rtol=0.02)
    np.testing.assert_allclose(rho, 0.3 / np.sqrt(theta * (2 - theta)), rtol=0.02)


def test_each_layer_may_have_a_gain_and_a_radius_of_its_own():
    ascent = ov.ascent.per_layer(
        adaptive_ascents.projected_perturb(0.1, adaptive_ascents.self_tuned_ema(0.5))
    )
    params = {"noisy": jnp.zeros(2), "calm": jnp.zeros(2)}
    state = ascent.init(params)
    for sign in (1.0, -1.0, 1.0, -1.0):
        grads = {"noisy": jnp.full(2, sign), "calm": jnp.ones(2)}
        perturbation, state = ascent.update(grads, state, params)
    theta = state.smoothing_state.report.metrics["theta"]
    assert theta["noisy"] < theta["calm"] == 0.5
    lengths = jax.tree.map(jnp.linalg.norm, perturbation)
    assert lengths["noisy"] > lengths["calm"]
    metrics = collect_metrics(state)
    assert metrics["theta/noisy"] == theta["noisy"]
    assert set(metrics) == {
        f"{name}/{layer}" for name in ("theta", "rho") for layer in params
    }
