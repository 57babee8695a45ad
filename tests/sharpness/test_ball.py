"""Sharpness in a ball: closed forms on quadratics, and the order of the three kinds."""

import math

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_vasso import sharpness

RHO = 0.1


def bowl(params, batch):
    """½ Σ λ_i x_i² with the eigenvalues as the batch."""
    return 0.5 * jnp.sum(batch[0] * params**2)


@pytest.fixture
def origin(x64):
    return {"a": jnp.zeros(3), "b": jnp.zeros(5)}


@pytest.fixture
def point(x64):
    return {"a": jnp.arange(3.0), "b": jnp.linspace(-1, 1, 5)}


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


# --- closed forms on a quadratic ---------------------------------------------------


def test_at_a_minimum_the_worst_direction_is_the_top_eigenvector(quadratic, origin):
    loss_fn, matrix, _ = quadratic
    found = sharpness.worst_sharpness(loss_fn, origin, None, RHO)
    assert found.rise == pytest.approx(0.5 * RHO**2 * 5, rel=0.01)
    top = np.linalg.eigh(matrix)[1][:, -1]
    assert abs(flat(found.perturbation) @ top) == pytest.approx(RHO, rel=0.01)


def test_the_worst_direction_has_positive_curvature_beside_a_larger_negative(x64):
    """Power iteration on the gradient would end in the direction of −5."""
    eigenvalues = jnp.array([[1.0, -5.0, 0.5]])
    found = sharpness.worst_sharpness(bowl, jnp.zeros(3), eigenvalues, RHO)
    assert found.rise == pytest.approx(0.5 * RHO**2, rel=0.01)


def test_the_average_is_the_trace_over_the_dimension(quadratic, origin, point):
    """ρ² trace/(2n), at a minimum and elsewhere: the gradient has mean zero."""
    loss_fn, _, values = quadratic
    expected = RHO**2 * values.sum() / (2 * 8)
    for params in (origin, point):
        found = [
            sharpness.average_sharpness(
                loss_fn, params, None, RHO, num_samples=64, key=jax.random.key(seed)
            )
            for seed in range(20)
        ]
        means, errors = np.array(found).T
        assert errors.max() < 0.2 * expected
        # Of 20 estimates, 2 or more are off by 2.5 of their errors in 1 of 40 runs.
        assert np.sum(abs(means - expected) > 2.5 * errors) <= 1
        assert means.mean() == pytest.approx(expected, abs=3 * errors.mean() / 20**0.5)


def test_the_ascent_direction_has_its_closed_form(quadratic, point):
    """f(x + ρĝ) − f(x) = ρ‖g‖ + ½ρ² ĝᵀHĝ, but for rounding."""
    loss_fn, matrix, _ = quadratic
    gradient = matrix @ flat(point)
    length = np.linalg.norm(gradient)
    unit = gradient / length
    found = sharpness.ascent_sharpness(loss_fn, point, None, RHO)
    expected = RHO * length + 0.5 * RHO**2 * unit @ matrix @ unit
    np.testing.assert_allclose(found.rise, expected, rtol=1e-13)
    np.testing.assert_allclose(flat(found.perturbation), RHO * unit, atol=1e-15)
    loss = 0.5 * flat(point) @ matrix @ flat(point)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-15)


def test_the_ascent_direction_of_a_zero_gradient_is_zero(quadratic, origin):
    found = sharpness.ascent_sharpness(quadratic[0], origin, None, RHO)
    assert found.rise == 0
    assert not flat(found.perturbation).any()


def test_in_a_box_the_worst_point_of_a_convex_bowl_is_a_corner(x64):
    """Σ ½λ_i(abs(x_i) + ρt_i)² is the largest of all, for each scale t."""
    eigenvalues = np.array([[1.0, 2.0, 3.0]])
    params = np.array([0.5, -1.0, 2.0])
    for scale in (np.ones(3), np.abs(params)):
        found = sharpness.worst_sharpness(
            bowl, params, eigenvalues, RHO, p=math.inf, scale=scale
        )
        corner = np.abs(params) + RHO * scale
        expected = 0.5 * np.sum(eigenvalues[0] * (corner**2 - params**2))
        np.testing.assert_allclose(found.rise, expected, rtol=1e-12)


def test_the_ascent_step_in_a_box_is_the_sign_of_the_gradient(x64):
    found = sharpness.ascent_sharpness(
        bowl,
        np.array([0.5, -1.0, 0.0]),
        np.ones((1, 3)),
        RHO,
        p=math.inf,
        scale=np.array([1.0, 3.0, 1.0]),
    )
    np.testing.assert_allclose(found.perturbation, [RHO, -3 * RHO, 0], rtol=1e-15)


def test_keskars_number_is_a_percentage_in_the_box_of_abs_x_plus_one(x64):
    params = np.array([0.5, -1.0, 0.0])
    found = sharpness.keskar_sharpness(bowl, params, np.array([[1.0, 2.0, 0.0]]), 1e-3)
    loss = 0.5 * (0.25 + 2)
    highest = 0.5 * (0.5 + 1.5e-3) ** 2 + (1 + 2e-3) ** 2
    assert found == pytest.approx(100 * (highest - loss) / (1 + loss), rel=1e-10)


# --- what holds on any loss --------------------------------------------------------


@pytest.mark.parametrize(("adaptive", "p"), cases.in_turn([False, True], [2, math.inf]))
def test_worst_is_at_least_ascent_and_average_and_stays_in_the_ball(
    network, p, adaptive
):
    scale = jax.tree.map(np.abs, network.params) if adaptive else None
    args = network.loss_fn, network.params, network.data, 0.2
    worst = sharpness.worst_sharpness(*args, p=p, scale=scale, num_steps=20)
    ascent = sharpness.ascent_sharpness(*args, p=p, scale=scale)
    average = sharpness.average_sharpness(*args, p=p, scale=scale)
    assert worst.rise >= ascent.rise > average.mean + 3 * average.standard_error
    entries = flat(worst.perturbation) / (flat(scale) if adaptive else 1)
    assert np.linalg.norm(entries, p) <= 0.2 * (1 + 1e-12)


def test_adaptive_sharpness_does_not_change_when_layers_are_scaled_against_each_other(
    x64,
):
    """x₁ x₂ is the same function of the data for (s x₁, x₂/s); plain is not."""

    def loss_fn(params, batch):
        return jnp.mean((batch @ params["first"] @ params["second"] - 1) ** 2)

    random = np.random.default_rng(0)
    params = {"first": random.normal(size=(3, 4)), "second": random.normal(size=4)}
    scaled = {"first": 10 * params["first"], "second": params["second"] / 10}
    batch = random.normal(size=(6, 3))

    def rise(params, scale):
        return sharpness.ascent_sharpness(loss_fn, params, batch, RHO, scale=scale).rise

    plain, plain_scaled = rise(params, None), rise(scaled, None)
    assert abs(plain_scaled / plain - 1) > 0.5
    np.testing.assert_allclose(
        rise(params, jax.tree.map(np.abs, params)),
        rise(scaled, jax.tree.map(np.abs, scaled)),
        rtol=1e-12,
    )


def test_m_sharpness_is_the_mean_of_the_batches_and_grows_as_m_falls(network):
    args = network.loss_fn, network.params
    whole = sharpness.ascent_sharpness(*args, network.data, RHO)
    means = [whole.rise]
    for m in (10, 3):
        batches = sharpness.split_batches(network.data, m)
        found = sharpness.m_sharpness(*args, batches, RHO)
        if m == 10:
            alone = [sharpness.ascent_sharpness(*args, b, RHO).rise for b in batches]
            np.testing.assert_allclose(found.rises, alone, rtol=1e-12)
        sizes = [len(batch[1]) for batch in batches]
        mean = np.average(found.rises, weights=sizes)
        np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
        means.append(found.mean)
    assert means[0] < means[1] < means[2]


def test_m_sharpness_of_one_batch_is_that_of_the_ascent_direction(quadratic, point):
    loss_fn = quadratic[0]
    np.testing.assert_allclose(
        sharpness.m_sharpness(loss_fn, point, None, RHO).mean,
        sharpness.ascent_sharpness(loss_fn, point, None, RHO).rise,
        rtol=1e-12,
    )


def test_the_worst_direction_is_the_same_in_batches_and_at_once(network):
    found = [
        sharpness.worst_sharpness(
            network.loss_fn, network.params, data, 0.2, num_steps=20
        ).rise
        for data in (sharpness.split_batches(network.data, 10), network.data)
    ]
    np.testing.assert_allclose(*found, rtol=1e-12)


# --- bad input ---------------------------------------------------------------------


ARGS = bowl, np.ones(2, np.float32), np.ones((1, 2), np.float32)
MEASURES = [
    sharpness.ascent_sharpness,
    sharpness.worst_sharpness,
    sharpness.average_sharpness,
    sharpness.m_sharpness,
]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("rho", [0, -0.1, math.nan, math.inf, "0.1", None])
def test_a_radius_that_is_not_positive_is_refused(measure, rho):
    message = f"rho must be a positive finite number, got {rho!r}"
    with pytest.raises(ValueError, match=message):
        measure(*ARGS, rho)


def test_a_radius_that_is_an_array_is_checked_where_its_value_is_known():
    with pytest.raises(ValueError, match=r"rho must be .*, got -1.0"):
        sharpness.ascent_sharpness(*ARGS, jnp.float32(-1))
    with pytest.raises(ValueError, match=r"rho must be .*, got an array of shape \(2,"):
        sharpness.ascent_sharpness(*ARGS, jnp.ones(2))
    with pytest.raises(ValueError, match="rho must be .*, got the function <lambda>"):
        sharpness.ascent_sharpness(*ARGS, lambda step: 0.1)
    rises = jax.jit(lambda rho: sharpness.ascent_sharpness(*ARGS, rho).rise)
    assert rises(0.1) == pytest.approx(sharpness.ascent_sharpness(*ARGS, 0.1).rise)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("p", [1, "2", np.ones(2)])
def test_another_norm_is_refused(measure, p):
    with pytest.raises(ValueError, match="p must be 2 or infinity, got"):
        measure(*ARGS, RHO, p=p)


@pytest.mark.parametrize("measure", MEASURES)
def test_bad_losses_parameters_data_and_scales_are_refused(measure):
    loss_fn, params, data = ARGS
    with pytest.raises(ValueError, match=r"array of shape \(2,\)"):
        measure(lambda p, batch: p, params, None, RHO)
    with pytest.raises(ValueError, match="NaN or infinite"):
        measure(loss_fn, params * np.nan, data, RHO)
    with pytest.raises(ValueError, match="data is a list"):
        measure(loss_fn, params, [data], RHO)
    with pytest.raises(ValueError, match="scale has entries that are negative"):
        measure(loss_fn, params, data, RHO, scale=-params)


@pytest.mark.parametrize("epsilon", [0, "1e-3"])
def test_a_box_of_no_size_is_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon must be a positive finite number"):
        sharpness.keskar_sharpness(*ARGS, epsilon)


@pytest.mark.parametrize("value", [0, 1.5, "3"])
def test_what_is_no_count_is_refused(value):
    with pytest.raises(ValueError, match="num_samples must be an integer >= 2, got"):
        sharpness.average_sharpness(*ARGS, RHO, num_samples=value)
    with pytest.raises(ValueError, match="num_restarts must be an integer >= 1, got"):
        sharpness.worst_sharpness(*ARGS, RHO, num_restarts=value)
    with pytest.raises(ValueError, match="num_steps must be an integer >= 1, got"):
        sharpness.keskar_sharpness(*ARGS, num_steps=value)
    with pytest.raises(ValueError, match="num_restarts must be an integer >= 1, got"):
        sharpness.keskar_sharpness(*ARGS, num_restarts=value)
