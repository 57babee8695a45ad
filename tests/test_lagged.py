"""One gradient a step: the recursion, the point to evaluate, and the cost."""

import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import authors_problem, flat, random_tree

import optax_vasso as ov
from optax_vasso.steps.one_gradient import perturbation_of

CURVATURES = np.array([1.0, 3.0, 10.0])


def loss(params):
    return 0.5 * jnp.sum(jnp.asarray(CURVATURES, params.dtype) * params**2)


def run(optimizer, params, steps):
    """The points y_t of the loop, and what eval_params makes of them."""

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return params, state, ov.eval_params(state, params)

    state = optimizer.init(params)
    points, clean = [params], [ov.eval_params(state, params)]
    for _ in range(steps):
        params, state, point = step(params, state)
        points.append(params)
        clean.append(point)
    return points, clean


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("theta", [1.0, 0.3])
def test_lagged_follows_the_recursion_written_by_hand(buffered, theta, x64):
    """Momentum at x, the perturbation ρ d/‖d‖ of the last step's average at y."""
    rate, momentum, decay, rho = 0.05, 0.9, 0.01, 0.2
    base = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum))
    optimizer = (
        ov.lagged(base, optax.chain(ov.vasso_ema(theta), ov.sam_perturb(rho)))
        if buffered
        else ov.lagged_vasso(base, rho, theta=theta)
    )
    start = jnp.asarray([1.0, -1.0, 0.5])
    points, clean = run(optimizer, start, 20)
    x, epsilon, velocity, d = np.asarray(start), 0.0, 0.0, None
    for t in range(20):
        np.testing.assert_allclose(points[t], x + epsilon, rtol=0, atol=1e-12)
        np.testing.assert_allclose(clean[t], x, rtol=0, atol=1e-12)
        g = CURVATURES * (x + epsilon)
        d = g if d is None else (1 - theta) * d + theta * g
        velocity = momentum * velocity + g + decay * x
        x = x - rate * velocity
        epsilon = rho * d / np.linalg.norm(d)
    np.testing.assert_allclose(clean[20], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["f4", "f2", jnp.bfloat16])
def test_eval_params_are_the_clean_point_up_to_one_rounding(dtype):
    """y = x + ε rounds once, to half a unit of y; y − ε then rounds once more."""
    optimizer = ov.lagged_vasso(optax.sgd(0.05), rho=0.2)
    params = jnp.asarray([1.0, -1.0, 0.5], dtype)
    x = flat(params) - 0.05 * CURVATURES * flat(params)
    _, (_, clean) = run(optimizer, params, 1)
    assert clean.dtype == jnp.dtype(dtype)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(flat(clean), x, rtol=0, atol=2 * eps)


def test_the_first_gradient_is_clean_and_nothing_moves_before_it():
    params = jnp.asarray([1.0, -1.0, 0.5])
    state = ov.lagged_vasso(optax.sgd(0.1)).init(params)
    np.testing.assert_array_equal(ov.eval_params(state, params), params)
    assert not flat(perturbation_of(state)).any()


def test_one_buffer_more_than_the_base_optimizer():
    params = random_tree(0)
    base = optax.sgd(0.1, momentum=0.9)

    def floats(state):
        return sum(leaf.size for leaf in jax.tree.leaves(state))

    size = floats(params)
    extra = floats(ov.lagged_vasso(base).init(params)) - floats(base.init(params))
    assert size <= extra <= size + 4


def test_lagged_works_inside_other_transformations():
    """Its state is found, and the clean point recovered, anywhere in a chain."""
    params = jnp.asarray([1.0, -1.0, 0.5])
    chained = optax.chain(optax.identity(), ov.lagged_vasso(optax.sgd(0.1), rho=0.3))
    points, clean = run(chained, params, 3)
    _, expected = run(ov.lagged_vasso(optax.sgd(0.1), rho=0.3), params, 3)
    np.testing.assert_allclose(clean[-1], expected[-1], rtol=1e-6)
    assert np.linalg.norm(points[-1] - clean[-1]) == pytest.approx(0.3, rel=1e-4)


@pytest.mark.parametrize(
    "ascent",
    [
        ov.sam_perturb(0.2),
        optax.chain(ov.friendly_noise(1.0, 0.6), ov.sam_perturb(0.2)),
        optax.chain(ov.vasso_ema(0.4), ov.asam_perturb(0.2)),
        optax.chain(optax.ema(0.6), ov.sam_perturb(0.2)),
    ],
    ids=["sam", "friendly", "vasso + asam", "optax.ema"],
)
def test_any_ascent_chain_may_be_lagged(ascent):
    """The loop's point minus the clean one is the chain's last output."""
    params, base = jnp.asarray([1.0, -1.0, 0.5]), optax.sgd(0.05)
    optimizer = ov.lagged(base, ascent)
    points, clean = run(optimizer, params, 3)
    ascent_state, update = ascent.init(params), jax.jit(ascent.update)
    for t in range(3):
        gradient = jnp.asarray(CURVATURES, jnp.float32) * points[t]
        epsilon, ascent_state = update(gradient, ascent_state, clean[t])
        np.testing.assert_allclose(clean[t + 1], clean[t] - 0.05 * gradient, rtol=1e-5)
        np.testing.assert_allclose(
            points[t + 1] - clean[t + 1], epsilon, rtol=1e-4, atol=1e-6
        )


def test_without_a_gradient_a_perturbation_stays_whatever_becomes_of_the_radius():
    """And a radius of zero in between leaves numbers in the state."""
    radii = jnp.array([0.3, 0.1, 0.0, 0.2])
    optimizer = ov.lagged(
        optax.sgd(0.1), ov.vasso_ema(0.4), rho=lambda step: radii[step]
    )
    params = {"a": jnp.ones(2), "b": jnp.array([3.0, 4.0])}
    some = {"a": jnp.ones(2), "b": None}
    _, state = optimizer.update(params, optimizer.init(params), params)
    first = perturbation_of(state)["b"]
    _, state = optimizer.update(some, state, params)
    np.testing.assert_allclose(perturbation_of(state)["b"], first, rtol=1e-6)
    for _ in range(2):
        _, state = optimizer.update(some, state, params)
    assert np.isfinite(flat(state.direction)).all()


def test_lagged_lowers_the_loss_of_a_network():
    params, batches, network_loss = authors_problem()
    optimizer = ov.lagged_vasso(optax.sgd(0.1, momentum=0.9), rho=0.05)

    def step(carry, indices):
        params, state = carry
        grads = jax.grad(network_loss)(params, indices)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params):
        carry = params, optimizer.init(params)
        (point, state), _ = jax.lax.scan(step, carry, jnp.tile(batches, (5, 1)))
        everything = jnp.arange(48)
        after = network_loss(ov.eval_params(state, point), everything)
        return network_loss(params, everything), after

    before, after = train(params)
    assert after < 0.7 * before


def test_a_grad_fn_goes_to_the_ascent_chain_alone_and_everything_else_to_both():
    """So that a loop for two gradients runs as it is."""
    seen = {"optimizer": [], "ascent": []}

    def spy(name):
        def update(updates, state, params=None, **extra_args):
            seen[name].append(extra_args)
            return updates, state

        return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)

    ascent = optax.chain(spy("ascent"), ov.sam_perturb(0.1))
    optimizer, params = ov.lagged(spy("optimizer"), ascent), jnp.ones(3)
    state = optimizer.init(params)
    seen["ascent"].clear()  # what init has traced
    plain, _ = optimizer.update(params, state, params, temperature=300)
    given, _ = optimizer.update(
        params, state, params, temperature=300, grad_fn=lambda params: 1 / 0
    )
    np.testing.assert_array_equal(plain, given)
    for calls in seen.values():
        assert [call["temperature"] for call in calls] == [300] * 2
    assert not any("grad_fn" in call for call in seen["optimizer"])
    assert [callable(call["grad_fn"]) for call in seen["ascent"]] == [False, True]


FLOATS = ("f4", "f2", jnp.bfloat16)


@pytest.mark.parametrize(
    ("dtypes", "rho"),
    # Of each pair of dtypes one form, and of each form all dtypes.
    cases.in_turn(itertools.product(FLOATS, FLOATS), [0.2, None]),
)
def test_without_steps_the_clean_point_stays(dtypes, rho):
    """At learning rate 0, however few bits gradients and parameters have.

    Each step rounds ε and y in float32, by at most 2⁻²⁴ of a length below 2.
    """
    dtype, bits = dtypes
    ascent = optax.identity() if rho else ov.sam_perturb(0.2)
    optimizer = ov.lagged(optax.sgd(0.0), ascent, rho=rho)
    start, steps = jnp.asarray([1.0, -1.0, 0.5], dtype), 500

    def step(carry, key):
        params, state = carry
        grads = jax.random.normal(key, params.shape).astype(bits)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates.dtype == dtype

    keys = jax.random.split(jax.random.key(0), steps)
    carry = start, optimizer.init(start)
    (params, state), kept = jax.jit(lambda c: jax.lax.scan(step, c, keys))(carry)
    assert kept.all()
    epsilon = perturbation_of(state)
    clean = params.astype("f4") - epsilon
    np.testing.assert_allclose(clean, start, rtol=0, atol=2 * steps * 2.0**-24)
    np.testing.assert_allclose(np.linalg.norm(epsilon), 0.2, atol=0.02)


@pytest.mark.parametrize("recipe", [ov.lagged_vasso, ov.momentum_sam])
@pytest.mark.parametrize("dtype", ["f2", jnp.bfloat16])
def test_parameters_of_few_bits_need_no_option(recipe, dtype):
    """x_t follows its float32 trajectory to the precision of the gradients."""
    clean = []
    for kind in (dtype, "f4"):
        optimizer = recipe(optax.sgd(0.01), rho=0.2)
        start = jnp.asarray([1.0, -1.0, 0.5], kind)
        points, evaluated = run(optimizer, start, 20)
        assert points[-1].dtype == start.dtype
        clean.append(flat(evaluated[-1]))
    assert np.linalg.norm(clean[1] - flat(start)) > 0.1
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(*clean, rtol=0, atol=8 * eps)


@pytest.mark.parametrize("dtype", ["f4", jnp.bfloat16])
def test_make_train_step_moves_the_parameters_by_the_updates(dtype):
    """move is update, with the updates added."""
    optimizer = ov.lagged_vasso(optax.sgd(0.05, momentum=0.9), rho=0.2)
    start = jnp.asarray([1.0, -1.0, 0.5], dtype)
    points, _ = run(optimizer, start, 5)
    step = ov.make_train_step(lambda params, batch: loss(params), optimizer)
    state = ov.init_train_state(start, optimizer)
    for point in points[1:]:
        state, _ = step(state, ())
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(flat(state.params), flat(point), atol=2 * eps)


def test_many_states_side_by_side_have_perturbations_of_their_own():
    """Stacked by vmap, and evaluated outside of it."""
    optimizer = ov.lagged_vasso(optax.sgd(0.0), rho=0.1)
    params = jnp.arange(1.0, 7.0).reshape(2, 3)
    state = jax.vmap(optimizer.init)(params)
    updates, state = jax.vmap(optimizer.update)(params, state, params)
    clean = ov.eval_params(state, optax.apply_updates(params, updates))
    np.testing.assert_allclose(clean, params, rtol=1e-6)
