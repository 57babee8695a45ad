"""vasso_ema, with and without a buffer, and friendly_noise are the papers' formulas."""

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

pytestmark = pytest.mark.usefixtures("strict")
DTYPES = st.sampled_from(["f2", "f4", jnp.bfloat16])


@functools.cache
def compiled(make, *options):
    """The outputs and the last state of ``make(*numbers, *options)``, as a program."""
    return jax.jit(lambda steps, *numbers: run_chain(make(*numbers, *options), steps))


def gradients(seed, dtype="f4", steps=5):
    return [random_tree(seed + t, [dtype, "f4"]) for t in range(steps)]


@given(seed=st.integers(0, 1000), dtype=DTYPES)
def test_theta_one_is_the_identity(seed, dtype):
    steps = gradients(seed, dtype)
    outputs, _ = compiled(ov.vasso_ema, 1.0)(steps)
    for output, gradient in zip(outputs, steps, strict=True):
        chex.assert_trees_all_equal(output, gradient)
        chex.assert_trees_all_equal_dtypes(output, gradient)


@given(seed=st.integers(0, 1000), theta=st.floats(0.01, 1))
def test_vasso_ema_is_the_recursion_from_the_first_gradient(seed, theta):
    steps = gradients(seed)
    outputs, state = compiled(ov.vasso_ema)(steps, theta)
    d = flat(steps[0])
    np.testing.assert_array_equal(flat(outputs[0]), d)
    for output, gradient in zip(outputs[1:], steps[1:], strict=True):
        d = (1 - theta) * d + theta * flat(gradient)
        np.testing.assert_allclose(flat(output), d, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(flat(state.ema), flat(outputs[-1]))
    assert int(state.step) == len(steps)


@given(
    seed=st.integers(0, 1000),
    sigma=st.floats(0, 2),
    lmbda=st.floats(0, 0.99),
)
def test_friendly_noise_is_the_recursion_of_the_authors_code(seed, sigma, lmbda):
    steps = gradients(seed)
    outputs, _ = compiled(ov.friendly_noise)(steps, sigma, lmbda)
    np.testing.assert_array_equal(flat(outputs[0]), flat(steps[0]))
    m = flat(steps[0])
    for output, gradient in zip(outputs[1:], steps[1:], strict=True):
        g = flat(gradient)
        np.testing.assert_allclose(flat(output), g - sigma * m, rtol=1e-4, atol=1e-5)
        m = lmbda * m + (1 - lmbda) * g


def test_at_sigma_one_the_papers_direction_is_that_of_the_authors_code():
    """g − m_t = λ (g − m_{t−1}): the two write the same perturbation."""
    lmbda, steps = 0.6, gradients(3)
    ours, _ = compiled(ov.friendly_noise)(steps, 1.0, lmbda)
    m = flat(steps[0])
    for output, gradient in zip(ours[1:], steps[1:], strict=True):
        g = flat(gradient)
        m = lmbda * m + (1 - lmbda) * g
        np.testing.assert_allclose(lmbda * flat(output), g - m, rtol=1e-3, atol=1e-6)


@given(seed=st.integers(0, 1000), dtype=DTYPES)
def test_sigma_zero_is_sam(seed, dtype):
    steps = gradients(seed, dtype)
    outputs, _ = compiled(ov.friendly_noise, 0.0, 0.6)(steps)
    chex.assert_trees_all_equal(outputs, steps)


@pytest.mark.parametrize(
    "make",
    [
        lambda accumulator_dtype: ov.vasso_ema(
            0.5, accumulator_dtype=accumulator_dtype
        ),
        lambda accumulator_dtype: ov.friendly_noise(
            1.0, 0.5, accumulator_dtype=accumulator_dtype
        ),
    ],
    ids=["vasso_ema", "friendly_noise"],
)
def test_accumulator_dtype_sets_the_state_and_not_the_output(make):
    steps = gradients(0, "f2")
    outputs, state = compiled(make, jnp.float32)(steps)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.ema)} == {jnp.dtype("f4")}
    chex.assert_trees_all_equal_dtypes(outputs[-1], steps[-1])
    _, state = compiled(make, None)(steps)
    chex.assert_trees_all_equal_dtypes(state.ema, steps[0])


def test_a_wide_accumulator_keeps_what_bfloat16_loses():
    """0.1 · 2⁻⁷ is below bfloat16's resolution at 1, not below float32's."""
    rises = [[jnp.asarray([1 + t / 128], jnp.bfloat16)] for t in range(2)]
    means = {}
    for dtype in (None, jnp.float32):
        _, state = run_chain(ov.vasso_ema(0.1, accumulator_dtype=dtype), rises)
        means[dtype] = float(state.ema[0][0])
    assert means[None] == 1.0
    assert means[jnp.float32] == pytest.approx(1.00078125, rel=1e-6)


def test_a_theta_of_few_bits_is_computed_with_in_float32():
    """1 − 0.001 is 1 in bfloat16."""
    theta = jnp.asarray(0.001, jnp.bfloat16)
    outputs, _ = run_chain(ov.vasso_ema(theta), [[jnp.ones(2)], [jnp.zeros(2)]])
    np.testing.assert_allclose(outputs[1][0], 1 - float(theta), rtol=1e-6)


def test_the_noise_of_float16_gradients_does_not_overflow():
    """6e4 + 6e4 is above 65,504, where it ends; the perturbation is as long as ever."""
    steps = [[jnp.asarray([g, 0.0, g / 4], jnp.float16)] for g in (6e4, -6e4)]
    noise, _ = compiled(ov.friendly_noise)(steps, 1.0, 0.0)
    np.testing.assert_array_equal(noise[-1][0], [-65504, 0, -3e4])
    epsilon, _ = run_chain(
        optax.chain(ov.friendly_noise(1.0, 0.0), ov.sam_perturb(5.0)), steps
    )
    assert np.linalg.norm(flat(epsilon[-1])) == pytest.approx(5, rel=1e-3)


def test_an_infinite_gradient_stays_infinite_in_the_noise():
    steps = [[jnp.asarray([g, 1.0], jnp.float16)] for g in (1.0, np.inf)]
    noise, _ = compiled(ov.friendly_noise)(steps, 1.0, 0.0)
    np.testing.assert_array_equal(noise[-1][0], [np.inf, 0])


def test_float16_gradients_average_without_overflow():
    steps = [[jnp.full(4, 6e4, jnp.float16)] for _ in range(3)]
    outputs, _ = run_chain(ov.vasso_ema(0.3), steps)
    np.testing.assert_allclose(flat(outputs[-1]), 6e4, rtol=1e-3)


def test_theta_may_be_a_schedule_of_the_step():
    steps = gradients(0)

    def schedule(step):
        return jnp.where(step < 2, 1.0, 0.5)

    outputs, _ = compiled(ov.vasso_ema, schedule)(steps)
    chex.assert_trees_all_equal(outputs[1], steps[1])
    expected = 0.5 * flat(steps[1]) + 0.5 * flat(steps[2])
    np.testing.assert_allclose(flat(outputs[2]), expected, rtol=1e-5)


def test_theta_may_be_traced():
    steps = gradients(0)
    traced = compiled(ov.vasso_ema)
    for theta in (0.2, 0.9):
        expected = compiled(ov.vasso_ema, theta)(steps)[0][-1]
        actual = traced(steps, theta)[0][-1]
        np.testing.assert_allclose(flat(actual), flat(expected), rtol=1e-5)


@pytest.mark.parametrize(
    "transform",
    [ov.vasso_ema(0.5), ov.friendly_noise(1.0, 0.5)],
    ids=["vasso_ema", "friendly_noise"],
)
def test_a_missing_update_passes_and_leaves_the_average_alone(transform):
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    state = transform.init(params)
    _, state = transform.update(params, state)
    output, new_state = transform.update({"a": jnp.zeros(2), "b": None}, state)
    assert output["b"] is None
    chex.assert_trees_all_equal(new_state.ema["b"], state.ema["b"])
    assert float(new_state.ema["a"][0]) == 0.5


@pytest.mark.parametrize("theta", [0.1, 0.5, 1.0])
def test_the_carried_average_is_the_buffered_one(theta, x64):
    """Inside lagged the state has the direction of d_{t−1}, and a scalar its length."""
    trees = [random_tree(t, ["f8"]) for t in range(8)]
    steps = jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
    params = random_tree(100, ["f8"])
    final = []
    buffered = optax.chain(ov.vasso_ema(theta), ov.sam_perturb(0.3))
    for optimizer in (
        ov.lagged(optax.sgd(0.1), buffered),
        ov.lagged_vasso(optax.sgd(0.1), 0.3, theta=theta),
    ):

        @jax.jit
        def train(point, steps, optimizer=optimizer):
            def step(carry, gradient):
                point, state = carry
                updates, state = optimizer.update(gradient, state, point)
                return (optax.apply_updates(point, updates), state), None

            return jax.lax.scan(step, (point, optimizer.init(point)), steps)[0][0]

        final.append(flat(train(params, steps)))
    np.testing.assert_allclose(*final, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("buffered", [True, False])
def test_the_average_goes_on_where_there_is_no_perturbation(buffered):
    """With ρ = 0 it takes gradients in as with any other ρ."""
    warmup = optax.join_schedules(
        [optax.constant_schedule(0.0), optax.constant_schedule(0.1)], [2]
    )
    optimizer = ov.lagged_vasso(optax.sgd(0.0), warmup, theta=0.2)
    if buffered:
        ascent = optax.chain(ov.vasso_ema(0.2), ov.sam_perturb(warmup))
        optimizer = ov.lagged(optax.sgd(0.0), ascent)
    params = jnp.zeros(2)
    state = optimizer.init(params)
    for gradient in ([1.0, 0.0], [1.0, 0.0], [0.0, 2.0]):
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
    average = np.array([0.8, 0.4])
    expected = 0.1 * average / np.linalg.norm(average)
    np.testing.assert_allclose(params, expected, rtol=1e-6)


def test_a_first_gradient_of_weight_zero_is_left_out_of_the_average():
    """As a schedule may have it: the gradient is all noise then."""
    noise = ov.friendly_noise(1.0, lambda step: 1.0)
    grads = jnp.array([3.0, 4.0])
    direction, state = noise.update(grads, noise.init(grads))
    np.testing.assert_array_equal(direction, grads)
    np.testing.assert_array_equal(state.ema, [0, 0])
