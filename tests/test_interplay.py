"""One test for each row of docs/optax-interplay.md: what holds with each transform."""

import contextlib
import functools
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_vasso as ov
from optax_vasso.ascent.smoothing import carried_ema
from optax_vasso.metrics import (
    cosine,
    perturbation_norm,
    running_mean,
    stability,
    track,
)
from optax_vasso.steps.one_gradient import perturbation_of

RHO, THETA, RATE = 0.1, 0.4, 0.05
# A few roundings of float64: the two sides are the same mathematics in another order.
RTOL = 1e-12


@pytest.fixture(autouse=True)
def double(x64):
    """Every statement here is one of equality, so it is checked in float64."""


def start():
    return {
        "embedding": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2),
        "norm": {"scale": jnp.array([1.0, 0.5]), "bias": jnp.array([0.1, -0.2])},
        "kernel": jnp.array([[0.3, -0.7], [1.2, 0.4]]),
    }


def loss(params, tilt=0.0):
    """A function of all leaves with mixed curvatures; ``tilt`` makes it a minibatch."""
    hidden = params["embedding"] @ params["kernel"]
    scaled = hidden * params["norm"]["scale"][None] + params["norm"]["bias"][None]
    return jnp.sum(jnp.cosh(scaled - 0.5)) + tilt * jnp.sum(params["kernel"])


# A program, since most steps here are taken operation by operation.
grad = jax.jit(jax.grad(loss))
TILTS = (0.3, -0.4, 0.1, 0.2)


def length(tree):
    return float(optax.tree.norm(tree))


def smooth(average, grads, theta=THETA):
    if average is None:
        return grads
    return jax.tree.map(lambda d, g: (1 - theta) * d + theta * g, average, grads)


def perturbed(params, direction, rho=RHO):
    scale = rho / optax.tree.norm(direction)
    return jax.tree.map(lambda x, d: x + scale * d, params, direction)


def descend(params, grads, rate=RATE):
    return jax.tree.map(lambda x, g: x - rate * g, params, grads)


def update(optimizer, params, state, tilt=0.0, grads=None, grad_fn=None):
    """The updates and state of one step on one minibatch."""
    grad_fn = grad_fn or functools.partial(grad, tilt=tilt)
    grads = grad_fn(params) if grads is None else grads
    return optimizer.update(grads, state, params, grad_fn=grad_fn)


def train(optimizer, params=None, tilts=TILTS):
    """Parameters after each step, and the last state."""
    params = start() if params is None else params
    state = optimizer.init(params)
    points = []
    for tilt in tilts:
        updates, state = update(optimizer, params, state, tilt)
        params = optax.apply_updates(params, updates)
        points.append(params)
    return points, state


def sgd_vasso():
    return ov.vasso(optax.sgd(RATE), RHO, theta=THETA)


@functools.cache
def vasso_by_hand(rho=lambda t: RHO, theta=lambda t: THETA):
    """The points x_t of VaSSO on SGD, and the directions d_t."""
    params, average, points, directions = start(), None, [], []
    for step, tilt in enumerate(TILTS):
        average = smooth(average, grad(params, tilt), theta(step))
        params = descend(params, grad(perturbed(params, average, rho(step)), tilt))
        points.append(params)
        directions.append(average)
    return points, directions


def ascent_of(ascent, grads=None, params=None):
    """The perturbation of a chain at its first step."""
    params = start() if params is None else params
    grads = grad(params) if grads is None else grads
    return ascent.update(grads, ascent.init(params), params)[0]


def label(params, groups):
    """The label of each leaf: the first of ``groups`` in its path, or "rest"."""

    def name(path, _):
        keys = jax.tree_util.keystr(path)
        return next((group for group in groups if group in keys), "rest")

    return jax.tree_util.tree_map_with_path(name, params)


def assert_close(actual, expected, rtol=RTOL):
    chex.assert_trees_all_close(actual, expected, rtol=rtol)


def test_chain_in_the_ascent():
    """Smooth, then scale: VaSSO; any Optax filter may stand in the average's place."""
    assert_close(train(sgd_vasso())[0], vasso_by_hand()[0])
    traced = optax.chain(optax.trace(0.0), ov.sam_perturb(RHO))
    assert_close(ascent_of(traced), ascent_of(ov.sam_perturb(RHO)))


def test_chain_after_sharpness_aware():
    """What follows sees the perturbed gradient, just as inside."""
    inside = ov.sam(optax.chain(optax.trace(0.9), optax.scale(-RATE)), RHO)
    outside = optax.chain(
        ov.sam(optax.identity(), RHO), optax.trace(0.9), optax.scale(-RATE)
    )
    chex.assert_trees_all_equal(train(inside)[0], train(outside)[0])


def test_masked_passes_gradients_on_as_perturbations():
    """Whence the recipe: what is masked out has to be set to zero besides."""
    params = start()
    norms = jax.tree.map(lambda name: name == "norm", label(params, ["norm"]))
    others = jax.tree.map(lambda chosen: not chosen, norms)
    grads = grad(params)
    trap = ascent_of(optax.masked(ov.sam_perturb(RHO), norms))
    chex.assert_trees_all_equal(trap["kernel"], grads["kernel"])

    chain = optax.chain(
        optax.masked(ov.sam_perturb(RHO), norms),
        optax.masked(optax.set_to_zero(), others),
    )
    epsilon = ascent_of(chain)
    zeros = optax.tree.zeros_like(params)
    scale = RHO / length(grads["norm"])
    assert_close(
        epsilon, zeros | {"norm": jax.tree.map(lambda g: scale * g, grads["norm"])}
    )


def test_masked_in_the_base_optimizer():
    """Weight decay of the kernel alone, of x_t."""
    decay = optax.masked(
        optax.add_decayed_weights(0.1), lambda p: label_is(p, "kernel")
    )
    plain, _ = update_once(ov.sam(optax.sgd(RATE), RHO))
    decayed, _ = update_once(ov.sam(optax.chain(decay, optax.sgd(RATE)), RHO))
    expected = plain | {"kernel": plain["kernel"] - RATE * 0.1 * start()["kernel"]}
    assert_close(decayed, expected)


def label_is(params, group):
    return jax.tree.map(lambda name: name == group, label(params, [group]))


def update_once(optimizer, params=None):
    params = start() if params is None else params
    return update(optimizer, params, optimizer.init(params))


@pytest.mark.parametrize(
    ("group", "transforms"),
    [
        ("norm", lambda chain: {"norm": chain, "rest": optax.set_to_zero()}),
        ("embedding", lambda chain: {"embedding": optax.set_to_zero(), "rest": chain}),
    ],
    ids=["only the normalization layers", "all but the embeddings"],
)
def test_partition_in_the_ascent(group, transforms):
    """The ball is that of the chosen leaves; every leaf descends."""
    chain = optax.chain(ov.vasso_ema(THETA), ov.sam_perturb(RHO))
    ascent = optax.partition(transforms(chain), lambda p: label(p, [group]))
    points, state = train(ov.sharpness_aware(optax.sgd(RATE), ascent))

    chosen = jax.tree.map(
        lambda name: float((name == group) == (group == "norm")),
        label(start(), [group]),
    )
    params, average = start(), None
    for tilt, point in zip(TILTS, points, strict=True):
        average = smooth(average, grad(params, tilt))
        direction = jax.tree.map(jnp.multiply, chosen, average)
        params = descend(params, grad(perturbed(params, direction), tilt))
        assert_close(point, params)
    # Only what is perturbed is averaged.
    buffers = jax.tree.leaves(optax.tree.get(state, "ema"))
    assert len(buffers) == sum(jax.tree.leaves(chosen))


def test_partition_in_the_base_optimizer():
    """Two optimizers, one ball; a descent inside needs its extra arguments masked."""
    groups = {"kernel": optax.sgd(0.3), "rest": optax.sgd(RATE)}
    optimizer = ov.sam(optax.partition(groups, lambda p: label(p, ["kernel"])), RHO)
    updates, _ = update_once(optimizer)
    direction = grad(start())
    descent = grad(perturbed(start(), direction))
    expected = jax.tree.map(lambda g: -RATE * g, descent)
    assert_close(updates, expected | {"kernel": -0.3 * descent["kernel"]})

    gsam = {
        "kernel": optax.chain(ov.descent.gsam_descent(0.3), optax.sgd(RATE)),
        "rest": optax.sgd(RATE),
    }
    partition = functools.partial(optax.partition, gsam, label(start(), ["kernel"]))
    with pytest.raises(ValueError, match="mask_compatible_extra_args"):
        update_once(ov.sam(partition(), RHO))
    updates, _ = update_once(ov.sam(partition(mask_compatible_extra_args=True), RHO))
    clean, unit = direction["kernel"], descent["kernel"] / length(descent["kernel"])
    orthogonal = clean - jnp.sum(clean * unit) * unit
    assert_close(
        updates["kernel"], -RATE * (descent["kernel"] - 0.3 * orthogonal), rtol=1e-10
    )


@pytest.mark.parametrize(
    "recipe", [ov.sam, ov.vasso, functools.partial(ov.sampa, learning_rate=RATE)]
)
@pytest.mark.parametrize("around", ["partition", "masked"])
def test_partition_and_masked_cannot_stand_around_two_gradients(recipe, around):
    """The loss cannot be computed from some of the parameters."""
    optimizer = recipe(optax.sgd(RATE), 0.1)
    if around == "partition":
        groups = {"norm": optimizer, "rest": optax.sgd(RATE)}
        optimizer = optax.partition(groups, lambda p: label(p, ["norm"]))
    else:
        optimizer = optax.masked(optimizer, lambda p: label_is(p, "norm"))
    with pytest.raises(ValueError, match="choose the perturbed leaves by mask="):
        update_once(optimizer)


def test_partition_in_a_lagged_ascent():
    """The carried average reads an extra argument, which has to be masked too."""

    def make(average, **options):
        groups = {"norm": average, "rest": optax.set_to_zero()}
        ascent = optax.partition(groups, label(start(), ["norm"]), **options)
        return ov.lagged(optax.sgd(RATE), ascent, rho=RHO)

    # In JAX's words, which depend on its version.
    with pytest.raises(ValueError, match="tree structure|Expected named tuple"):
        update_once(make(carried_ema(THETA)))
    carried = make(carried_ema(THETA), mask_compatible_extra_args=True)
    points, state = train(carried)
    assert_close(points, train(make(ov.vasso_ema(THETA)))[0], rtol=1e-10)
    epsilon = jax.tree.map(jnp.subtract, points[-1], ov.eval_params(state, points[-1]))
    assert length(epsilon["norm"]) == pytest.approx(RHO)
    assert length(epsilon) == pytest.approx(RHO)


def test_per_layer():
    """Every leaf has a ball of its own."""
    epsilon = ascent_of(ov.ascent.per_layer(ov.sam_perturb(RHO)))
    expected = jax.tree.map(lambda g: RHO * g / optax.tree.norm(g), grad(start()))
    assert_close(epsilon, expected)


@pytest.mark.parametrize(
    "optimizer",
    [optax.contrib.muon(1.0), optax.adam(1.0), optax.sgd(1.0)],
    ids=["muon", "adam", "sgd"],
)
def test_contrib_muon_and_other_optimizers_are_filters_with_the_opposite_sign(
    optimizer,
):
    """Their updates descend: a perturbation along them lowers the loss, as track says.

    With optax.scale(-1.0) behind, the cosine with the gradient is the opposite.
    """
    cosines = []
    for sign in (1.0, -1.0):
        chain = optax.chain(optimizer, optax.scale(sign), ov.sam_perturb(RHO))
        base = optax.chain(track(running_mean(cosine)), optax.sgd(RATE))
        _, state = update_once(ov.sharpness_aware(base, chain))
        cosines.append(float(optax.tree.get(state, "mean_cosine")))
        with pytest.warns(RuntimeWarning) if sign > 0 else contextlib.nullcontext():
            ov.metrics.check_uphill(state)
    assert cosines[0] < -0.5
    assert cosines[1] == pytest.approx(-cosines[0], rel=1e-6)


def test_inject_hyperparams_around_a_recipe():
    """ρ and θ, set between steps, are those of the next step; nothing is recompiled."""
    base = optax.chain(track(perturbation_norm), optax.sgd(RATE))
    optimizer = optax.inject_hyperparams(ov.vasso)(base, RHO, theta=THETA)

    @jax.jit
    def step(params, state, tilt):
        updates, state = update(optimizer, params, state, tilt)
        return optax.apply_updates(params, updates), state

    radii, weights = [RHO, 0.3, 0.02, 0.0], [THETA, 0.9, 0.1, 1.0]
    params, state = start(), optimizer.init(start())
    expected, _ = vasso_by_hand(radii.__getitem__, weights.__getitem__)
    for i, tilt in enumerate(TILTS):
        for key, value in (("rho", radii[i]), ("theta", weights[i])):
            state.hyperparams[key] = jnp.asarray(value)
        params, state = step(params, state, tilt)
        assert_close(params, expected[i], rtol=1e-10)
        norm = optax.tree.get(state, "perturbation_norm")
        assert float(norm) == pytest.approx(radii[i])
    assert step._cache_size() == 1


def test_inject_hyperparams_inside_the_ascent():
    """Only the perturbation is injected; optax.tree.set finds its radius."""
    perturb = optax.inject_hyperparams(ov.sam_perturb)(RHO)
    optimizer = ov.sharpness_aware(
        optax.chain(track(perturbation_norm), optax.sgd(RATE)),
        optax.chain(ov.vasso_ema(THETA), perturb),
    )
    params, state = start(), optimizer.init(start())
    for radius in (RHO, 0.25):
        state = optax.tree.set(state, rho=jnp.asarray(radius))
        _, state = update(optimizer, params, state)
        norm = optax.tree.get(state, "perturbation_norm")
        assert float(norm) == pytest.approx(radius)


def test_schedules_are_read_at_the_step():
    """ρ and θ as functions of t: the first step is 0."""
    rho = optax.linear_schedule(0.2, 0.05, 3)
    theta = optax.linear_schedule(1.0, 0.1, 3)
    points, _ = train(ov.vasso(optax.sgd(RATE), rho, theta=theta))
    # Of a step in int32, a schedule computes its value in float32, even under x64.
    expected, _ = vasso_by_hand(
        lambda step: rho(jnp.int32(step)), lambda step: theta(jnp.int32(step))
    )
    assert_close(points, expected, rtol=1e-10)


def test_a_schedule_under_a_gate_counts_every_step():
    """The averages and the schedules go on while the gate is closed."""
    rho = optax.linear_schedule(0.4, 0.1, 3)
    optimizer = ov.sharpness_aware(
        optax.chain(track(perturbation_norm), optax.sgd(RATE)),
        ov.sam_perturb(rho),
        gate=ov.gate.every(2),
    )
    params, state, norms = start(), optimizer.init(start()), []
    for _ in range(3):
        _, state = update(optimizer, params, state)
        norms.append(float(optax.tree.get(state, "perturbation_norm")))
    np.testing.assert_allclose(norms, [0.4, 0.0, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [sgd_vasso, lambda: ov.lagged_vasso(optax.sgd(RATE), RHO, theta=THETA)],
    ids=["vasso", "lagged_vasso"],
)
def test_multi_steps(make):
    """k minibatches to a step, grad_fn of them all: the step of their mean."""
    optimizer = optax.MultiSteps(make(), 2, accumulator_dtype=jnp.float64)
    pairs = [TILTS[:2], TILTS[2:]]
    params, state = start(), optimizer.init(start())
    expected, _ = train(make(), tilts=[sum(pair) / 2 for pair in pairs])

    @jax.jit
    def mini_step(params, state, tilt, mean_tilt):
        both = functools.partial(grad, tilt=mean_tilt)
        grads = grad(params, tilt)
        updates, state = update(optimizer, params, state, grads=grads, grad_fn=both)
        return optax.apply_updates(params, updates), state

    for pair, point in zip(pairs, expected, strict=True):
        for tilt in pair:
            params, state = mini_step(params, state, tilt, sum(pair) / 2)
        assert_close(params, point, rtol=1e-10)


def test_multi_steps_evaluates_grad_fn_on_every_mini_step():
    """It updates its inner optimizer each time, and throws away all but the last."""
    calls = []

    def grad_fn(params):
        jax.debug.callback(lambda: calls.append(1), ordered=True)
        return grad(params)

    optimizer = optax.MultiSteps(ov.sam(optax.sgd(RATE), RHO), 3)
    params, state = start(), optimizer.init(start())
    step = jax.jit(
        lambda params, state: optimizer.update(
            grad(params), state, params, grad_fn=grad_fn
        )
    )
    for _ in range(3):
        _, state = step(params, state)
    jax.effects_barrier()
    assert len(calls) == 3


def test_apply_if_finite_around_guards_the_averages():
    """A step whose clean gradient is not finite leaves no trace."""
    optimizer = optax.apply_if_finite(sgd_vasso(), 5)
    params, state = start(), optimizer.init(start())
    updates, state = update(optimizer, params, state, TILTS[0])
    params = optax.apply_updates(params, updates)
    broken = optax.tree.full_like(params, jnp.nan)
    updates, rejected = update(optimizer, params, state, grads=broken)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))
    chex.assert_trees_all_equal(rejected.inner_state, state.inner_state)


def test_apply_if_finite_inside_guards_the_perturbed_gradient():
    """Around, only the clean gradient is looked at; inside, only the perturbed one."""
    params = start()

    def broken(params):
        return optax.tree.full_like(params, jnp.nan)

    def one_step(optimizer, grads, grad_fn):
        state = optimizer.init(params)
        return update(optimizer, params, state, grads=grads, grad_fn=grad_fn)

    around = optax.apply_if_finite(sgd_vasso(), 5)
    inside = ov.vasso(optax.apply_if_finite(optax.sgd(RATE), 5), RHO, theta=THETA)
    assert np.isnan(length(one_step(around, grad(params), broken)[0]))
    assert length(one_step(inside, grad(params), broken)[0]) == 0
    _, state = one_step(inside, broken(params), grad)
    assert length(optax.tree.get(state, "ema")) == 0  # what is not finite is left out


def test_clip_by_global_norm_before_bounds_the_clean_gradient():
    """Which SAM's direction does not depend on, and VaSSO's average does."""
    bound = 0.5 * length(grad(start()))
    clip = optax.clip_by_global_norm(bound)
    for make in (ov.sam, ov.asam):
        clipped, _ = update_once(optax.chain(clip, make(optax.sgd(RATE))))
        assert_close(clipped, update_once(make(optax.sgd(RATE)))[0])
    _, state = update_once(optax.chain(clip, sgd_vasso()))
    assert length(optax.tree.get(state, "ema")) == pytest.approx(bound)


def test_clip_by_global_norm_inside_bounds_the_descent():
    descent = grad(perturbed(start(), grad(start())))
    bound = 0.5 * length(descent)
    optimizer = ov.sam(
        optax.chain(optax.clip_by_global_norm(bound), optax.sgd(1.0)), RHO
    )
    expected = jax.tree.map(lambda g: -0.5 * g, descent)
    assert_close(update_once(optimizer)[0], expected)


def test_clip_by_global_norm_after_bounds_the_step():
    plain, _ = update_once(ov.sam(optax.sgd(RATE), RHO))
    bound = 0.25 * length(plain)
    optimizer = optax.chain(
        ov.sam(optax.sgd(RATE), RHO), optax.clip_by_global_norm(bound)
    )
    assert_close(update_once(optimizer)[0], jax.tree.map(lambda u: 0.25 * u, plain))


def test_clip_by_global_norm_after_lagged_breaks_the_perturbation():
    """Its updates carry ε_t − ε_{t−1}, which must arrive whole: clip inside instead."""
    base = optax.sgd(RATE)
    clip = optax.clip_by_global_norm(1e-3)
    points, state = train(optax.chain(ov.lagged_vasso(base, RHO, theta=THETA), clip))
    moved = jax.tree.map(jnp.subtract, points[0], train(optax.chain(base, clip))[0][0])
    assert length(moved) < 0.1 * RHO
    assert length(perturbation_of(state[0])) == pytest.approx(RHO)


@pytest.mark.parametrize("make", [ov.sam, ov.lagged_vasso])
def test_add_decayed_weights_sees_the_clean_point(make):
    """−η (g + λ x_t): with λ and without, the second step differs by −η λ x_t."""
    decayed = make(optax.chain(optax.add_decayed_weights(0.1), optax.sgd(RATE)), RHO)
    params, state = start(), decayed.init(start())
    updates, state = update(decayed, params, state)
    params = optax.apply_updates(params, updates)
    plain = make(optax.sgd(RATE), RHO)
    # The states differ in nothing but the empty state of the decay.
    plain_state = state._replace(optimizer_state=plain.init(params).optimizer_state)
    x = ov.eval_params(state, params)
    difference = jax.tree.map(
        jnp.subtract,
        update(decayed, params, state)[0],
        update(plain, params, plain_state)[0],
    )
    assert_close(difference, jax.tree.map(lambda x: -RATE * 0.1 * x, x), rtol=1e-9)


def test_add_decayed_weights_before_tilts_the_ascent_and_decays_nothing():
    optimizer = optax.chain(
        optax.add_decayed_weights(0.1), ov.sam(optax.sgd(RATE), RHO)
    )
    params = start()
    tilted = jax.tree.map(lambda g, x: g + 0.1 * x, grad(params), params)
    descent = grad(perturbed(params, tilted))
    expected = jax.tree.map(lambda g: -RATE * g, descent)
    assert_close(update_once(optimizer)[0], expected)


@pytest.mark.parametrize("order", ["inside", "around"])
def test_schedule_free(order):
    """z descends on the perturbed gradient at y; x is the average of z."""
    if order == "inside":
        optimizer = ov.sam(optax.contrib.schedule_free(optax.sgd(RATE), RATE), RHO)
    else:
        optimizer = optax.contrib.schedule_free(ov.sam(optax.sgd(RATE), RHO), RATE)
    points, state = train(optimizer)
    inner = state.optimizer_state if order == "inside" else state

    x = y = z = start()
    for count, (tilt, point) in enumerate(zip(TILTS, points, strict=True), 1):
        z = descend(z, grad(perturbed(y, grad(y, tilt)), tilt))
        x = jax.tree.map(lambda x, z, c=count: x + (z - x) / c, x, z)
        y = jax.tree.map(lambda x, z: 0.9 * x + 0.1 * z, x, z)
        assert_close(point, y, rtol=1e-10)
    assert_close(
        optax.contrib.schedule_free_eval_params(inner, points[-1]), x, rtol=1e-10
    )


def test_schedule_free_inside_lagged():
    """Two companions in turn: first y from the perturbed point, then x from y."""
    optimizer = ov.lagged_vasso(
        optax.contrib.schedule_free(optax.sgd(RATE), RATE), RHO, theta=THETA
    )
    points, state = train(optimizer)
    x = y = z = start()
    epsilon, average = optax.tree.zeros_like(x), None
    for count, tilt in enumerate(TILTS, 1):
        gradient = grad(optax.apply_updates(y, epsilon), tilt)
        average = smooth(average, gradient)
        z = descend(z, gradient)
        x = jax.tree.map(lambda x, z, c=count: x + (z - x) / c, x, z)
        y = jax.tree.map(lambda x, z: 0.9 * x + 0.1 * z, x, z)
        epsilon = optax.tree.sub(perturbed(y, average), y)
    found = ov.eval_params(state, points[-1])
    assert_close(found, y, rtol=1e-10)
    evaluated = optax.contrib.schedule_free_eval_params(state.optimizer_state, found)
    assert_close(evaluated, x, rtol=1e-10)


def test_lookahead_with_two_gradients():
    """It takes no extra arguments: bind grad_fn, of the fast parameters, before."""
    fast = sgd_vasso()

    def bound(grad_fn):
        return optax.GradientTransformation(
            fast.init, functools.partial(fast.update, grad_fn=grad_fn)
        )

    params = optax.LookaheadParams.init_synced(start())
    state = optax.lookahead(fast, 2, 0.5).init(params)
    slow, average = start(), None
    x = slow
    for step, tilt in enumerate(TILTS):
        grad_fn = functools.partial(grad, tilt=tilt)
        updates, state = optax.lookahead(bound(grad_fn), 2, 0.5).update(
            grad_fn(params.fast), state, params
        )
        params = optax.apply_updates(params, updates)
        average = smooth(average, grad(x, tilt))
        x = descend(x, grad(perturbed(x, average), tilt))
        if step % 2:
            slow = x = jax.tree.map(lambda s, x: s + 0.5 * (x - s), slow, x)
        assert_close(params, optax.LookaheadParams(fast=x, slow=slow), rtol=1e-10)
    with pytest.raises(TypeError, match="grad_fn"):
        optax.lookahead(fast, 2, 0.5).update(x, state, params, grad_fn=grad)


def test_lookahead_around_lagged_averages_perturbed_points():
    """Slow parameters are those of y_t, within ρ of the average of x_t."""
    optimizer = optax.lookahead(
        ov.lagged_vasso(optax.sgd(RATE), RHO, theta=THETA), 1, 0.5
    )
    params = optax.LookaheadParams.init_synced(start())
    state = optimizer.init(params)
    grads = grad(params.fast)
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    y = perturbed(descend(start(), grads), grads)
    midpoint = jax.tree.map(lambda a, b: (a + b) / 2, start(), y)
    assert_close(params, optax.LookaheadParams(midpoint, midpoint))


def test_tree_map_params_finds_the_averages():
    """A specification for each parameter becomes one for each of its buffers."""
    optimizer = ov.vasso(optax.sgd(RATE, momentum=0.9), RHO, theta=THETA)
    state = optimizer.init(start())
    names = label(start(), ["norm", "kernel", "embedding"])
    specs = optax.tree.map_params(
        optimizer,
        lambda _, name: name,
        state,
        names,
        transform_non_params=lambda _: "replicated",
    )
    assert optax.tree.get(specs, "ema") == names
    assert optax.tree.get(specs, "trace") == names
    assert set(jax.tree.leaves((specs.report.metrics, specs.ascent_state[1]))) == {
        "replicated"
    }


def test_tree_get_finds_what_the_adversary_knows():
    base = optax.chain(track(perturbation_norm, stability), optax.sgd(RATE))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1e9), ov.vasso(base, RHO, theta=THETA)
    )
    _, state = train(optimizer)
    directions = vasso_by_hand()[1]
    assert_close(optax.tree.get(state, "ema"), directions[-1], rtol=1e-10)
    assert float(optax.tree.get(state, "perturbation_norm")) == pytest.approx(RHO)
    unit, before = (
        optax.tree.scale(1 / length(direction), direction)
        for direction in (directions[-1], directions[-2])
    )
    moved = length(optax.tree.sub(unit, before))
    assert float(optax.tree.get(state, "stability")) == pytest.approx(moved)


def contrib_sam(chain, **options):
    """contrib.sam subtracts what its adversary returns; ours is to be added."""
    adversary = optax.chain(chain, optax.scale(-1.0))
    return optax.contrib.sam(
        optax.sgd(RATE, momentum=0.9), adversary, reset_state=False, **options
    )


@pytest.mark.parametrize(
    "chain",
    [
        ov.sam_perturb(RHO),
        optax.chain(ov.vasso_ema(THETA), ov.sam_perturb(RHO)),
        optax.chain(ov.friendly_noise(1.0, 0.6), ov.sam_perturb(RHO)),
        ov.asam_perturb(RHO),
    ],
    ids=["sam", "vasso", "friendly_sam", "asam"],
)
def test_contrib_sam_with_our_chain_is_our_method(chain):
    """In opaque mode to the last bit."""
    theirs, ours = (
        contrib_sam(chain, opaque_mode=True),
        ov.sharpness_aware(optax.sgd(RATE, momentum=0.9), chain),
    )
    params, state = start(), theirs.init(start())
    for tilt, expected in zip(TILTS, train(ours)[0], strict=True):
        updates, state = theirs.update(
            grad(params, tilt),
            state,
            params,
            grad_fn=lambda params, _, tilt=tilt: grad(params, tilt),
        )
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_equal(params, expected)


def test_contrib_sam_in_transparent_mode():
    """Two calls a step, the loop's parameters perturbed after the first."""
    chain = optax.chain(ov.vasso_ema(THETA), ov.sam_perturb(RHO))
    optimizer = contrib_sam(chain)
    ours = ov.sharpness_aware(optax.sgd(RATE, momentum=0.9), chain)
    params, state = start(), optimizer.init(start())
    for tilt, expected in zip(TILTS, train(ours)[0], strict=True):
        for _ in range(2):
            updates, state = optimizer.update(grad(params, tilt), state, params)
            params = optax.apply_updates(params, updates)
        assert_close(params, expected, rtol=1e-10)


def test_contrib_sam_that_resets_its_adversary_forgets_the_average():
    """reset_state is True by default: then every step is the first, that is, SAM."""
    chain = optax.chain(ov.vasso_ema(THETA), ov.sam_perturb(RHO), optax.scale(-1.0))
    optimizer = optax.contrib.sam(optax.sgd(RATE), chain, opaque_mode=True)
    params, state = start(), optimizer.init(start())
    for tilt, expected in zip(
        TILTS, train(ov.sam(optax.sgd(RATE), RHO))[0], strict=True
    ):
        updates, state = optimizer.update(
            grad(params, tilt),
            state,
            params,
            grad_fn=lambda params, _, tilt=tilt: grad(params, tilt),
        )
        params = optax.apply_updates(params, updates)
        assert_close(params, expected)


def test_every_test_here_has_a_row_in_the_table():
    """And every transformation in the first column of the table has a test."""
    page = (Path(__file__).parents[1] / "docs" / "optax-interplay.md").read_text()
    cells = re.findall(r"^\| `?([\w.]+)`?[^|]*\|", page, re.MULTILINE)
    # As the tests spell them: `tree.get` is tree_get, `MultiSteps` is multi_steps.
    rows = [
        re.sub(r"\B(?=[A-Z])|\.", "_", cell).lower().rstrip("s")
        for cell in cells
        if cell != "transformation"
    ]
    here = {name for name in globals() if name.startswith("test_")}
    here -= {"test_every_test_here_has_a_row_in_the_table"}
    assert len(rows) > 10
    for row in rows:
        short = row.removeprefix("contrib_")
        assert any(row in name or short in name for name in here), row
    for name in here:
        assert any(row.removeprefix("contrib_") in name for row in rows), name
