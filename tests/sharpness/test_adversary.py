"""The adversary: friends, foes, and the variance that VaSSO suppresses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_vasso import sam_perturb, sharpness, track_stability, vasso_ema

RHO = 0.1


def pull(params, batch):
    """½‖x − c‖², averaged over the targets c in the batch."""
    return 0.5 * jnp.mean(jnp.sum((params[None] - batch) ** 2, axis=-1))


def test_an_adversary_is_a_friend_to_the_batch_that_pulls_the_other_way(float64):
    """x = 0; this batch pulls to the right, the others to right, left and up."""
    params = jnp.zeros(2)
    this = jnp.array([[1.0, 0.0]])
    others = [jnp.array([[2.0, 0.0]]), jnp.array([[-1.0, 0.0]]), jnp.array([[0.0, 1]])]
    perturbation = sharpness.ascent_sharpness(pull, params, this, RHO).perturbation
    found = sharpness.friendliness(pull, params, perturbation, others)
    np.testing.assert_allclose(found.cosines, [1, -1, 0], atol=1e-15)
    # ½(c + ρ)² − ½c² along the axis, ½ρ² across it.
    half = RHO**2 / 2
    np.testing.assert_allclose(
        found.rises, [2 * RHO + half, -RHO + half, half], rtol=1e-12
    )
    assert found.lowered == pytest.approx(1 / 3)
    assert found.misaligned == pytest.approx(2 / 3)


def test_cosines_of_sam_are_those_between_gradients(network):
    batches = sharpness.split_batches(network.data, 12)
    gradients = [jax.grad(network.loss_fn)(network.params, b) for b in batches]
    perturbation = sharpness.ascent_sharpness(
        network.loss_fn, network.params, batches[0], RHO
    ).perturbation
    found = sharpness.friendliness(
        network.loss_fn, network.params, perturbation, batches
    )
    expected = [
        optax.tree.vdot(gradients[0], g)
        / (optax.tree.norm(gradients[0]) * optax.tree.norm(g))
        for g in gradients
    ]
    np.testing.assert_allclose(found.cosines, expected, rtol=1e-10)
    assert found.rises[0] > 0


def test_the_squared_error_of_the_full_gradient_is_zero(network):
    batches = sharpness.split_batches(network.data, 16)
    gradient = jax.grad(network.loss_fn)(network.params, network.data)
    args = network.loss_fn, network.params
    assert sharpness.squared_error(*args, gradient, batches) < 1e-28
    doubled = optax.tree.scale(2, gradient)
    assert sharpness.squared_error(*args, doubled, batches) == pytest.approx(
        optax.tree.norm(gradient, squared=True)
    )


@pytest.mark.parametrize("theta", [0.1, 0.2, 0.4, 0.9])
def test_at_a_fixed_point_the_mean_squared_error_of_the_slope_is_vassos(float64, theta):
    """σ²θ/(2 − θ): 1,000 coordinates and 1,000 steps know it to 1%, asked is 5%."""
    params, noise_level, steps = jnp.zeros(1000), 3.0, 1000
    variance = noise_level**2 * params.size
    # The gradient at x = 0 is minus the mean of the targets, which is minus one.
    targets = jnp.ones((1, 1000))
    ascent = optax.chain(
        sharpness.track(
            vasso_ema(theta), lambda d, x: sharpness.squared_error(pull, x, d, targets)
        ),
        sam_perturb(RHO),
    )

    def step(state, key):
        noise = noise_level * jax.random.normal(key, params.shape)
        _, state = ascent.update(-1 + noise, state, params)
        return state, optax.tree.get(state, "measured")

    keys = jax.random.split(jax.random.key(0), steps)
    _, errors = jax.jit(lambda: jax.lax.scan(step, ascent.init(params), keys))()
    # The average starts at one gradient and forgets it as (1 − θ)^t.
    settled = errors[100:].mean()
    assert settled == pytest.approx(variance * theta / (2 - theta), rel=0.05)
    assert errors[0] == pytest.approx(variance, rel=0.2)


def test_the_perturbation_of_vasso_moves_less_than_that_of_sam(float64):
    """At a fixed point, with noise ten times the gradient, in units of ρ."""
    params = jnp.zeros(1000)

    def moves(theta):
        ascent = track_stability(optax.chain(vasso_ema(theta), sam_perturb(RHO)))

        def step(state, key):
            noise = 10 * jax.random.normal(key, params.shape)
            _, state = ascent.update(1 + noise, state, params)
            return state, optax.tree.get(state, "stability")

        keys = jax.random.split(jax.random.key(0), 200)
        return jax.lax.scan(step, ascent.init(params), keys)[1][50:].mean()

    # Two successive d have the cosine 1 − θ where noise is all: √(2θ).
    assert moves(1.0) == pytest.approx(2**0.5, rel=0.01)
    assert moves(0.4) == pytest.approx(0.8**0.5, rel=0.02)


def test_tracking_changes_nothing_and_measures_every_so_often(float64):
    params = jnp.arange(3.0)
    inner = sam_perturb(RHO)
    tracked = sharpness.track(inner, lambda e, x: {"first": e[0] + x[0]}, every=2)
    state, inner_state = tracked.init(params), inner.init(params)
    measured = []
    for scale in (1.0, 2.0, -1.0, -2.0):
        gradient = jnp.array([scale, 2.0, 0.0])
        output, state = tracked.update(gradient, state, params)
        expected, inner_state = inner.update(gradient, inner_state, params)
        np.testing.assert_array_equal(output, expected)
        measured.append((optax.tree.get(state, "first"), expected[0]))
    kept, outputs = zip(*measured, strict=True)
    assert kept == (outputs[0], outputs[0], outputs[2], outputs[2])


def test_friendliness_runs_inside_of_a_compiled_training_loop(network):
    batches = sharpness.split_batches(network.data, 12)
    ascent = sharpness.track(
        sam_perturb(RHO),
        lambda e, x: sharpness.friendliness(network.loss_fn, x, e, batches[1:]),
    )
    gradient = jax.grad(network.loss_fn)(network.params, batches[0])
    perturbation, state = jax.jit(ascent.update)(
        gradient, ascent.init(network.params), network.params
    )
    outside = sharpness.friendliness(
        network.loss_fn, network.params, perturbation, batches[1:]
    )
    np.testing.assert_allclose(state.measured.rises, outside.rises, rtol=1e-10)


def test_bad_input_is_refused():
    params = jnp.zeros(2)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        sharpness.track(sam_perturb(RHO), lambda e, x: e, every=0)
    tracked = sharpness.track(sam_perturb(RHO), lambda e, x: jnp.sum(e))
    with pytest.raises(ValueError, match="track needs params"):
        tracked.update(params, tracked.init(params))
    for measure in (sharpness.friendliness, sharpness.squared_error):
        with pytest.raises(ValueError, match="no batches"):
            measure(pull, params, params, [])
        with pytest.raises(ValueError, match="NaN"):
            measure(pull, params * jnp.nan, params, jnp.ones((1, 2)))
        with pytest.raises(ValueError, match=r"array of shape \(2,\)"):
            measure(lambda p, batch: p, params, params, None)
