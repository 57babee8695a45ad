"""Two gradients a step: what reaches the base optimizer, where, and what is kept."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import flat, random_tree, run_chain

import optax_vasso as ov


def quadratic(curvature=1.0):
    """½ c ‖x‖², whose gradient at x is c x."""

    def loss(params):
        squares = [jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)]
        return 0.5 * curvature * sum(squares)

    return loss


def recorder():
    """A base optimizer that returns zero and keeps what it was given."""
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append((updates, params, extra_args))
        return jax.tree.map(jnp.zeros_like, updates), state

    init = lambda params: optax.EmptyState()  # noqa: E731
    return optax.GradientTransformationExtraArgs(init, update), seen


def one_update(optimizer, params, grad_fn, **extra_args):
    state = optimizer.init(params)
    return optimizer.update(
        jax.grad(quadratic())(params), state, params, grad_fn=grad_fn, **extra_args
    )


def test_the_base_optimizer_gets_the_perturbed_gradient_at_the_clean_point():
    params, grad_fn = random_tree(0), jax.grad(quadratic())
    base, seen = recorder()
    one_update(ov.sam(base, rho=0.5), params, grad_fn, label="passed on")
    (updates, point, extra_args) = seen[0]
    x = flat(params)
    np.testing.assert_allclose(
        flat(updates), x + 0.5 * x / np.linalg.norm(x), rtol=1e-5
    )
    np.testing.assert_array_equal(flat(point), x)
    np.testing.assert_array_equal(flat(extra_args["clean_grads"]), x)
    assert bool(extra_args["ascended"])
    assert extra_args["label"] == "passed on"


def test_weight_decay_sees_the_clean_point():
    params, grad_fn = random_tree(0), jax.grad(quadratic())
    base = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1.0))
    updates, _ = one_update(ov.sam(base, rho=0.5), params, grad_fn)
    x = flat(params)
    perturbed = x + 0.5 * x / np.linalg.norm(x)
    np.testing.assert_allclose(flat(updates), -(perturbed + 0.1 * x), rtol=1e-5)


def test_rho_zero_is_the_base_optimizer():
    params, grad_fn = random_tree(0), jax.grad(quadratic(3.0))
    base = optax.adam(0.1)
    finals = []
    for optimizer in (ov.sam(base, rho=0.0), base):

        @jax.jit
        def step(params, state, optimizer=optimizer):
            updates, state = optimizer.update(
                grad_fn(params), state, params, grad_fn=grad_fn
            )
            return optax.apply_updates(params, updates), state

        point, state = params, optimizer.init(params)
        for _ in range(5):
            point, state = step(point, state)
        finals.append(flat(point))
    np.testing.assert_array_equal(*finals)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_several_ascent_steps_stay_in_the_ball_and_follow_the_path(k, x64):
    """k parts of length ρ/k, each along the gradient where the others have led."""
    curvatures = jnp.asarray([1.0, 10.0, 100.0])
    grad_fn = jax.grad(lambda x: 0.5 * jnp.sum(curvatures * x**2))
    x = jnp.asarray([1.0, -1.0, 0.5])
    points = []

    def recording_grad_fn(params):
        points.append(np.asarray(params))
        return grad_fn(params)

    optimizer = ov.sharpness_aware(optax.sgd(0.1), ov.sam_perturb(0.3), ascent_steps=k)
    state = optimizer.init(x)
    optimizer.update(grad_fn(x), state, x, grad_fn=recording_grad_fn)
    expected = np.asarray(x)
    for point in points:
        g = np.asarray(curvatures) * expected
        expected = expected + 0.3 / k * g / np.linalg.norm(g)
        np.testing.assert_allclose(point, expected, rtol=1e-12)
    assert len(points) == k
    assert np.linalg.norm(points[-1] - np.asarray(x)) <= 0.3 * (1 + 1e-12)


def test_a_step_that_stays_tells_of_the_first_part_of_its_perturbation():
    """Where several ascents would have led nobody has asked."""
    seen = []

    def update(updates, state, params=None, *, perturbation, **extra_args):
        seen.append(perturbation)
        return updates, state

    base = optax.GradientTransformationExtraArgs(lambda params: (), update)
    optimizer = ov.sharpness_aware(
        base, ov.sam_perturb(0.4), ascent_steps=2, gate=ov.gate.from_step(1)
    )
    x = jnp.asarray([3.0, 4.0])
    optimizer.update(x, optimizer.init(x), x, grad_fn=lambda x: x)
    np.testing.assert_allclose(seen[0], [0.12, 0.16], rtol=1e-6)


def test_averages_advance_once_a_step_whatever_the_number_of_ascent_steps():
    grad_fn = jax.grad(quadratic())
    params = random_tree(0)
    ascent = optax.chain(ov.vasso_ema(0.3), ov.sam_perturb(0.1))
    states = []
    for k in (1, 4):
        optimizer = ov.sharpness_aware(optax.sgd(0.1), ascent, ascent_steps=k)
        state = optimizer.init(params)
        _, state = optimizer.update(grad_fn(params), state, params, grad_fn=grad_fn)
        states.append(optax.tree.get(state, "ema"))
        assert int(state.ascent_state[0].step) == 1
    np.testing.assert_array_equal(flat(states[0]), flat(states[1]))


def test_the_metrics_are_what_costs_nothing():
    params, loss = random_tree(0), quadratic()
    ascent = optax.chain(ov.vasso_ema(0.3), ov.sam_perturb(0.2))
    optimizer = ov.sharpness_aware(optax.sgd(0.1), ascent)
    state = optimizer.init(params)
    assert not bool(state.report.metrics["ascended"])
    gradients = [random_tree(1), random_tree(2)]
    for gradient in gradients:
        _, state = optimizer.update(
            gradient, state, params, grad_fn=jax.value_and_grad(loss)
        )
    (_, epsilon), _ = run_chain(ascent, gradients)
    assert set(state.report.metrics) == {"ascended", "perturbed_loss"}
    assert bool(state.report.metrics["ascended"])
    expected = float(loss(optax.apply_updates(params, epsilon)))
    assert float(state.report.metrics["perturbed_loss"]) == pytest.approx(
        expected, rel=1e-5
    )


def test_a_value_fn_will_do_in_place_of_a_grad_fn():
    """As a line search takes it, with the arguments that it asks for by name."""
    params = random_tree(0)
    expected, state = one_update(
        ov.sam(optax.sgd(0.1)), params, jax.value_and_grad(quadratic(3.0))
    )
    updates, other = one_update(
        ov.sam(optax.sgd(0.1)),
        params,
        None,
        value_fn=lambda params, curvature: quadratic(curvature)(params),
        curvature=3.0,
    )
    chex.assert_trees_all_equal((updates, other), (expected, state))


def test_a_grad_fn_with_or_without_values_gives_the_same_update():
    """Also where the parameters are themselves a pair, like (value, gradients)."""
    params = (jnp.asarray(2.0), (jnp.asarray(1.0), jnp.asarray([3.0])))
    loss = quadratic()
    plain, state = one_update(ov.sam(optax.sgd(0.1)), params, jax.grad(loss))
    assert float(state.report.metrics["perturbed_loss"]) == 0
    valued, state = one_update(ov.sam(optax.sgd(0.1)), params, jax.value_and_grad(loss))
    np.testing.assert_array_equal(flat(plain), flat(valued))
    assert float(state.report.metrics["perturbed_loss"]) > 0


def test_low_precision_parameters_keep_their_dtype():
    params = random_tree(0, ["f2", jnp.bfloat16])
    grad_fn = jax.grad(quadratic())
    updates, _ = one_update(ov.vasso(optax.sgd(0.1)), params, grad_fn)
    chex.assert_trees_all_equal_dtypes(updates, params)
    assert np.isfinite(flat(updates)).all()


def test_the_step_can_be_differentiated():
    """As hyperparameter gradients and meta-learning need."""
    params = {"w": jnp.asarray([1.0, -2.0])}
    loss = quadratic()

    def after(rho):
        optimizer = ov.sam(optax.sgd(0.1), rho)
        updates, _ = one_update(optimizer, params, jax.grad(loss))
        return loss(optax.apply_updates(params, updates))

    slope = (after(0.5 + 1e-2) - after(0.5 - 1e-2)) / 2e-2
    assert float(jax.grad(after)(0.5)) == pytest.approx(float(slope), rel=1e-2)
