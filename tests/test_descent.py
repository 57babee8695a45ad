"""GSAM, LookSAM and weighted SAM: directions made of both gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from problems import flat, random_tree

import optax_vasso as ov
from optax_vasso import gate

pytestmark = pytest.mark.usefixtures("strict")
SEEDS = st.integers(0, 1000)


@functools.cache
def compiled(make):
    """The update of ``make(number)`` for a traced number, as one program."""

    @jax.jit
    def update(number, perturbed, state, clean, ascended):
        return make(number).update(
            perturbed, state, clean, clean_grads=clean, ascended=ascended
        )

    return update


def descend(make, number, perturbed, clean, ascended=True, state=None):
    state = make(number).init(clean) if state is None else state
    return compiled(make)(number, perturbed, state, clean, jnp.asarray(ascended))


@given(seed=SEEDS, alpha=st.floats(0, 2))
def test_gsam_is_the_formula(seed, alpha):
    p, c = random_tree(seed), random_tree(seed + 1)
    direction, _ = descend(ov.descent.gsam_descent, alpha, p, c)
    unit = flat(p) / np.linalg.norm(flat(p))
    expected = flat(p) - alpha * (flat(c) - flat(c) @ unit * unit)
    np.testing.assert_allclose(flat(direction), expected, rtol=1e-3, atol=1e-5)


@given(seed=SEEDS)
def test_gsam_keeps_the_component_along_the_perturbed_gradient(seed):
    p, c = random_tree(seed), random_tree(seed + 1)
    direction, _ = descend(ov.descent.gsam_descent, 0.7, p, c)
    assert flat(direction) @ flat(p) == pytest.approx(flat(p) @ flat(p), rel=1e-4)


def test_weighted_descent_between_float16_gradients_far_apart():
    """Their difference is out of range, the result is not."""
    p, c = ([jnp.asarray([g], jnp.float16)] for g in (4e4, -4e4))
    direction, _ = descend(ov.descent.weighted_descent, 0.2, p, c)
    np.testing.assert_allclose(direction[0], [-2e4], rtol=1e-3)


def test_decoupled_sharpness_leaves_frozen_weights_where_they_are():
    """Their gradient at x + ε is another one, although they are not perturbed."""
    base = optax.chain(
        optax.sgd(0.1, momentum=0.9), optax.freeze({"a": False, "b": True})
    )
    optimizer = ov.wsam(base, 0.5, learning_rate=0.1)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    grad_fn = jax.grad(lambda p: jnp.sum(jnp.sin(p["a"] * p["b"])))
    updates, _ = optimizer.update(
        grad_fn(params), optimizer.init(params), params, grad_fn=grad_fn
    )
    assert np.all(updates["a"] != 0)
    np.testing.assert_array_equal(updates["b"], 0)


@given(seed=SEEDS, gamma=st.floats(0, 0.95))
def test_weighted_descent_is_the_formula(seed, gamma):
    p, c = random_tree(seed), random_tree(seed + 1)
    direction, _ = descend(ov.descent.weighted_descent, gamma, p, c)
    expected = flat(c) + gamma / (1 - gamma) * (flat(p) - flat(c))
    np.testing.assert_allclose(flat(direction), expected, rtol=1e-3, atol=1e-4)


@given(seed=SEEDS)
def test_limits_that_are_sam_and_plain_training(seed):
    p, c = random_tree(seed), random_tree(seed + 1)
    np.testing.assert_array_equal(
        flat(descend(ov.descent.gsam_descent, 0.0, p, c)[0]), flat(p)
    )
    half, _ = descend(ov.descent.weighted_descent, 0.5, p, c)
    np.testing.assert_allclose(flat(half), flat(p), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(
        flat(descend(ov.descent.weighted_descent, 0.0, p, c)[0]), flat(c)
    )


@given(seed=SEEDS, alpha=st.floats(0, 2))
def test_looksam_stores_the_orthogonal_component_and_reuses_it(seed, alpha):
    p, c, later = (random_tree(seed + i) for i in range(3))
    make = ov.descent.looksam_descent
    first, state = descend(make, alpha, p, c)
    np.testing.assert_array_equal(flat(first), flat(p))
    unit = flat(c) / np.linalg.norm(flat(c))
    v = flat(p) - flat(p) @ unit * unit
    np.testing.assert_allclose(flat(state.orthogonal), v, rtol=1e-3, atol=1e-5)
    second, state = descend(make, alpha, later, later, False, state)
    rescaled = alpha * np.linalg.norm(flat(later)) / np.linalg.norm(v) * v
    np.testing.assert_allclose(
        flat(second), flat(later) + rescaled, rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(flat(state.orthogonal), v, rtol=1e-3, atol=1e-5)


@given(seed=SEEDS, exponent=st.integers(-9, 9))
def test_looksam_reuses_nothing_where_both_gradients_were_equal(seed, exponent):
    """As at a radius of zero: what rounding leaves of a component has no direction.

    However much smaller or larger later gradients are.
    """
    g, make = random_tree(seed), ov.descent.looksam_descent
    _, state = descend(make, 0.7, g, g)
    later = random_tree(seed + 1, scale=10.0**exponent)
    direction, _ = descend(make, 0.7, later, later, ascended=False, state=state)
    np.testing.assert_allclose(flat(direction), flat(later), rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [ov.descent.gsam_descent, ov.descent.weighted_descent, ov.descent.looksam_descent],
)
def test_a_step_that_did_not_ascend_passes_the_gradient_on(make):
    """LookSAM's store is empty before the first ascent."""
    g = random_tree(0)
    direction, _ = descend(make, 0.7, g, g, ascended=False)
    np.testing.assert_allclose(flat(direction), flat(g), rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [ov.descent.gsam_descent, ov.descent.weighted_descent, ov.descent.looksam_descent],
)
def test_zero_gradients_stay_finite(make):
    zero = jax.tree.map(jnp.zeros_like, random_tree(0))
    direction, state = descend(make, 0.7, zero, zero)
    assert not flat(direction).any()
    direction, _ = descend(make, 0.7, zero, zero, False, state)
    assert not flat(direction).any()


def test_alpha_may_be_a_schedule():
    p, c = random_tree(0), random_tree(1)

    def scheduled(alpha):
        return ov.descent.gsam_descent(lambda step: jnp.where(step == 0, 0.0, alpha))

    first, state = descend(scheduled, 0.5, p, c)
    np.testing.assert_array_equal(flat(first), flat(p))
    second, _ = descend(scheduled, 0.5, p, c, True, state)
    expected, _ = descend(ov.descent.gsam_descent, 0.5, p, c)
    np.testing.assert_allclose(flat(second), flat(expected), rtol=1e-6)


def test_looksam_composes_with_vasso_and_a_base_optimizer():
    """Off the gate it descends on g_c plus the stored component, with momentum."""
    optimizer = ov.sharpness_aware(
        optax.chain(ov.descent.looksam_descent(0.7), optax.sgd(0.02, momentum=0.5)),
        optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(0.3)),
        gate=gate.every(2),
    )
    curvatures = jnp.asarray([1.0, 10.0])

    def loss(x):
        return 0.5 * jnp.sum(curvatures * x**2)

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(
            jax.grad(loss)(x), state, x, grad_fn=jax.grad(loss)
        )
        x = optax.apply_updates(x, updates)
        return (x, state), (state.report.metrics["ascended"], loss(x))

    x = jnp.asarray([2.0, 1.0])
    carry = x, optimizer.init(x)
    _, (ascended, losses) = jax.jit(lambda carry: jax.lax.scan(step, carry, length=40))(
        carry
    )
    np.testing.assert_array_equal(ascended, np.arange(40) % 2 == 0)
    assert losses[-1] < 0.1 * float(loss(x))


def test_the_optimizer_of_a_decoupled_descent_is_given_all_arguments():
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    base = optax.GradientTransformationExtraArgs(lambda params: (), update)
    descent = ov.descent.decoupled_descent(base, learning_rate=0.1, gamma=0.5)
    p, c = random_tree(0), random_tree(1)
    descent.update(p, descent.init(c), c, clean_grads=c, ascended=True, temperature=300)
    assert seen[0]["clean_grads"] is c
    assert seen[0]["ascended"]
    assert seen[0]["temperature"] == 300
