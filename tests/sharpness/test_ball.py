"""Sharpness in a ball: closed forms on quadratics, and the order of the three kinds."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_vasso import sharpness

RHO = 0.1


def bowl(params, batch):
    """½ Σ λ_i (x_i − shift)² with the eigenvalues as the batch."""
    return 0.5 * jnp.sum(batch[0] * params**2)


@pytest.fixture
def origin(float64):
    return {"a": jnp.zeros(3), "b": jnp.zeros(5)}


@pytest.fixture
def point(float64):
    return {"a": jnp.arange(3.0), "b": jnp.linspace(-1, 1, 5)}


def flat(tree):
    return np.concatenate([tree["a"], tree["b"]])


# --- closed forms on a quadratic ---------------------------------------------------


def test_at_a_minimum_the_worst_direction_is_the_top_eigenvector(quadratic, origin):
    loss_fn, matrix, _ = quadratic
    found = sharpness.worst_sharpness(loss_fn, origin, None, RHO)
    assert found.rise == pytest.approx(0.5 * RHO**2 * 5, rel=0.01)
    top = np.linalg.eigh(matrix)[1][:, -1]
    assert abs(flat(found.perturbation) @ top) == pytest.approx(RHO, rel=0.01)


def test_the_worst_direction_has_positive_curvature_beside_a_larger_negative(float64):
    """Power iteration on the gradient would end in the direction of −5."""
    eigenvalues = jnp.array([[1.0, -5.0, 0.5, -3.0]])
    found = sharpness.worst_sharpness(bowl, jnp.zeros(4), eigenvalues, RHO)
    assert found.rise == pytest.approx(0.5 * RHO**2, rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_the_average_is_the_trace_over_the_dimension(quadratic, origin, point, seed):
    """ρ² trace/(2n), at a minimum and elsewhere: the gradient has mean zero."""
    loss_fn, _, values = quadratic
    expected = RHO**2 * values.sum() / (2 * 8)
    for params in (origin, point):
        found = sharpness.average_sharpness(
            loss_fn, params, None, RHO, num_samples=64, key=jax.random.key(seed)
        )
        # Five seeds at two points: within 2.5 standard errors with probability 0.9.
        assert abs(found.mean - expected) <= 2.5 * found.standard_error
        assert found.standard_error < 0.2 * expected


def test_the_ascent_direction_has_its_closed_form(quadratic, point):
    """f(x + ρĝ) − f(x) = ρ‖g‖ + ½ρ² ĝᵀHĝ, but for rounding."""
    loss_fn, matrix, _ = quadratic
    gradient = matrix @ flat(point)
    length = jnp.linalg.norm(gradient)
    unit = gradient / length
    found = sharpness.ascent_sharpness(loss_fn, point, None, RHO)
    expected = RHO * length + 0.5 * RHO**2 * unit @ matrix @ unit
    np.testing.assert_allclose(found.rise, expected, rtol=1e-13)
    np.testing.assert_allclose(flat(found.perturbation), RHO * unit, atol=1e-15)
    np.testing.assert_allclose(found.loss, loss_fn(point, None), rtol=1e-15)


def test_the_ascent_direction_of_a_zero_gradient_is_zero(quadratic, origin):
    found = sharpness.ascent_sharpness(quadratic[0], origin, None, RHO)
    assert found.rise == 0
    assert not flat(found.perturbation).any()


def test_in_a_box_the_worst_point_of_a_convex_bowl_is_a_corner(float64):
    """Σ ½λ_i(abs(x_i) + ρt_i)² is the largest of all, for each scale t."""
    eigenvalues = jnp.array([[1.0, 2.0, 3.0]])
    params = jnp.array([0.5, -1.0, 2.0])
    for scale in (jnp.ones(3), jnp.abs(params)):
        found = sharpness.worst_sharpness(
            bowl, params, eigenvalues, RHO, p=math.inf, scale=scale
        )
        corner = jnp.abs(params) + RHO * scale
        expected = 0.5 * jnp.sum(eigenvalues[0] * (corner**2 - params**2))
        np.testing.assert_allclose(found.rise, expected, rtol=1e-12)


def test_the_ascent_step_in_a_box_is_the_sign_of_the_gradient(float64):
    params = jnp.array([0.5, -1.0, 0.0])
    found = sharpness.ascent_sharpness(
        bowl, params, jnp.ones((1, 3)), RHO, p=math.inf, scale=jnp.array([1.0, 3.0, 1])
    )
    np.testing.assert_allclose(found.perturbation, [RHO, -3 * RHO, 0], rtol=1e-15)


def test_keskars_number_is_a_percentage_in_the_box_of_abs_x_plus_one(float64):
    params = jnp.array([0.5, -1.0])
    found = sharpness.keskar_sharpness(bowl, params, jnp.array([[1.0, 2.0]]), 1e-3)
    loss = 0.5 * (0.25 + 2)
    highest = 0.5 * (0.5 + 1.5e-3) ** 2 + (1 + 2e-3) ** 2
    assert found == pytest.approx(100 * (highest - loss) / (1 + loss), rel=1e-10)


# --- what holds on any loss --------------------------------------------------------


@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("adaptive", [False, True])
def test_worst_is_at_least_ascent_and_average_and_stays_in_the_ball(
    network, p, adaptive
):
    scale = sharpness.adaptive_scale(network.params) if adaptive else None
    args = network.loss_fn, network.params, network.data, 0.2
    worst = sharpness.worst_sharpness(*args, p=p, scale=scale, num_steps=20)
    ascent = sharpness.ascent_sharpness(*args, p=p, scale=scale)
    average = sharpness.average_sharpness(*args, p=p, scale=scale)
    assert worst.rise >= ascent.rise > average.mean + 3 * average.standard_error
    ones = jax.tree.map(jnp.ones_like, network.params)
    units = jax.tree.map(jnp.divide, worst.perturbation, scale or ones)
    entries = np.concatenate([np.nan_to_num(u).ravel() for u in jax.tree.leaves(units)])
    assert np.linalg.norm(entries, p) <= 0.2 * (1 + 1e-12)


def test_adaptive_sharpness_does_not_change_when_layers_are_scaled_against_each_other(
    float64,
):
    """x₁ x₂ is the same function of the data for (s x₁, x₂/s); plain is not."""

    def loss_fn(params, batch):
        return jnp.mean((batch[:, 0] @ params["first"] @ params["second"] - 1) ** 2)

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "first": jax.random.normal(keys[0], (3, 4)),
        "second": jax.random.normal(keys[1], (4,)),
    }
    scaled = {"first": 10 * params["first"], "second": params["second"] / 10}
    batch = jax.random.normal(keys[2], (6, 1, 3))

    def rise(params, scale):
        return sharpness.ascent_sharpness(loss_fn, params, batch, RHO, scale=scale).rise

    plain, plain_scaled = rise(params, None), rise(scaled, None)
    assert abs(plain_scaled / plain - 1) > 0.5
    np.testing.assert_allclose(
        rise(params, sharpness.adaptive_scale(params)),
        rise(scaled, sharpness.adaptive_scale(scaled)),
        rtol=1e-12,
    )


def test_m_sharpness_grows_as_m_falls(network):
    values = [
        sharpness.m_sharpness(
            network.loss_fn,
            network.params,
            sharpness.split_batches(network.data, m),
            RHO,
        ).mean
        for m in (60, 15, 3)
    ]
    whole = sharpness.ascent_sharpness(
        network.loss_fn, network.params, network.data, RHO
    )
    np.testing.assert_allclose(values[0], whole.rise, rtol=1e-12)
    assert values[0] < values[1] < values[2]


def test_m_sharpness_is_the_mean_of_the_batches_by_their_examples(network):
    batches = sharpness.split_batches(network.data, 25)
    found = sharpness.m_sharpness(network.loss_fn, network.params, batches, RHO)
    alone = [
        sharpness.ascent_sharpness(network.loss_fn, network.params, batch, RHO).rise
        for batch in batches
    ]
    np.testing.assert_allclose(found.rises, alone, rtol=1e-12)
    assert found.mean == pytest.approx(np.average(alone, weights=[25, 25, 10]))


def test_the_worst_direction_is_the_same_in_batches_and_at_once(network):
    found = [
        sharpness.worst_sharpness(
            network.loss_fn, network.params, data, RHO, num_steps=3
        ).rise
        for data in (sharpness.split_batches(network.data, 16), network.data)
    ]
    np.testing.assert_allclose(*found, rtol=1e-12)


# --- bad input ---------------------------------------------------------------------


MEASURES = [
    sharpness.ascent_sharpness,
    sharpness.worst_sharpness,
    sharpness.average_sharpness,
    sharpness.m_sharpness,
]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("rho", [0, -0.1, math.nan, math.inf])
def test_a_radius_that_is_not_positive_is_refused(measure, rho):
    with pytest.raises(ValueError, match=f"rho must be positive and finite, got {rho}"):
        measure(bowl, jnp.ones(2), jnp.ones((1, 2)), rho)


@pytest.mark.parametrize("measure", MEASURES)
def test_another_norm_is_refused(measure):
    with pytest.raises(ValueError, match="p must be 2 or infinity, got 1"):
        measure(bowl, jnp.ones(2), jnp.ones((1, 2)), RHO, p=1)


@pytest.mark.parametrize("measure", MEASURES)
def test_bad_losses_parameters_and_data_are_refused(measure):
    good = jnp.ones(2)
    with pytest.raises(ValueError, match=r"array of shape \(2,\)"):
        measure(lambda p, batch: p, good, None, RHO)
    with pytest.raises(ValueError, match="NaN or infinite"):
        measure(bowl, good * jnp.nan, jnp.ones((1, 2)), RHO)
    with pytest.raises(ValueError, match="no batches"):
        measure(bowl, good, [], RHO)


def test_counts_below_their_minimum_are_refused():
    args = bowl, jnp.ones(2), jnp.ones((1, 2)), RHO
    with pytest.raises(ValueError, match="num_samples must be at least 2, got 1"):
        sharpness.average_sharpness(*args, num_samples=1)
    with pytest.raises(ValueError, match="num_restarts must be at least 1, got 0"):
        sharpness.worst_sharpness(*args, num_restarts=0)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        sharpness.worst_sharpness(*args, num_steps=0)


def test_data_is_cut_into_batches_in_order():
    data = {"x": np.arange(5), "y": np.arange(10).reshape(5, 2)}
    batches = sharpness.split_batches(data, 2)
    assert [batch["x"].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        sharpness.split_batches(data, 0)
    with pytest.raises(ValueError, match=r"differ in length: \[2, 5\]"):
        sharpness.split_batches((np.ones(5), np.ones(2)), 2)
