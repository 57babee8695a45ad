"""What the adversary did: each measure against NumPy, wherever a perturbation is."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from problems import flat, random_tree, run_chain

import optax_vasso as ov
from optax_vasso.metrics import Measure, Seen, track

SEEDS = st.integers(0, 1000)


def seen_of(seed):
    """Four trees of a step that have nothing to do with each other."""
    return Seen(*(random_tree(seed + i) for i in range(4)))


@functools.cache
def compiled(transform):
    def update(seen, state):
        return transform.update(
            seen.descent,
            state,
            seen.params,
            perturbation=seen.perturbation,
            clean_grads=seen.grads,
            ascended=jnp.ones((), bool),
            unknown="ignored",
        )

    return jax.jit(update)


def measured(transform, steps):
    """The metrics of a tracker that is given these steps."""
    state = transform.init(steps[0].params)
    for seen in steps:
        updates, state = compiled(transform)(seen, state)
        chex.assert_trees_all_equal(updates, seen.descent)
    return state.report.metrics


STABILITY = track(ov.metrics.stability)
EVERYTHING = track(
    ov.metrics.perturbation_norm, ov.metrics.grad_norm, ov.metrics.cosine
)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@given(seed=SEEDS)
def test_norms_and_cosine_are_numpys(seed):
    seen = seen_of(seed)
    metrics = measured(EVERYTHING, [seen])
    e, g = flat(seen.perturbation), flat(seen.grads)
    expected = {
        "perturbation_norm": np.linalg.norm(e),
        "grad_norm": np.linalg.norm(g),
        "cosine": cosine(e, g),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-4, abs=1e-6), name


@given(seed=SEEDS)
def test_stability_is_the_relative_move_of_the_adversary(seed):
    """‖ε_t − ε_{t−1}‖/‖ε_t‖, and 1 where there was none before."""
    steps = [seen_of(seed), seen_of(seed + 4)]
    first, second = (flat(seen.perturbation) for seen in steps)
    assert float(measured(STABILITY, steps[:1])["stability"]) == pytest.approx(1)
    move = np.linalg.norm(second - first) / np.linalg.norm(second)
    assert float(measured(STABILITY, steps)["stability"]) == pytest.approx(
        move, rel=1e-4
    )


def test_stability_is_zero_for_a_constant_adversary_and_two_for_a_flipped_one():
    seen = seen_of(0)
    flipped = seen._replace(perturbation=jax.tree.map(jnp.negative, seen.perturbation))
    assert float(measured(STABILITY, [seen, seen])["stability"]) == 0
    assert float(measured(STABILITY, [seen, flipped])["stability"]) == pytest.approx(2)


def test_complex_perturbations_count_by_their_modulus():
    trees = [random_tree(i, ["c8"]) for i in range(4)]
    whole = measured(
        track(ov.metrics.perturbation_norm, ov.metrics.cosine, ov.metrics.stability),
        [Seen(*trees), Seen(*trees[::-1])],
    )
    e, g = (np.concatenate([z.real, z.imag]) for z in map(flat, (trees[2], trees[1])))
    assert float(whole["perturbation_norm"]) == pytest.approx(
        np.linalg.norm(e), rel=1e-5
    )
    assert float(whole["cosine"]) == pytest.approx(cosine(e, g), abs=1e-5)
    before = flat(trees[1])
    assert float(whole["stability"]) == pytest.approx(
        np.linalg.norm(flat(trees[2]) - before) / np.linalg.norm(e), rel=1e-4
    )


@pytest.mark.parametrize("dtype", ["f4", "f2", jnp.bfloat16])
def test_arrival_is_what_rounding_leaves_of_the_perturbation(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(2000), dtype)
    e = jnp.asarray(3e-3 * rng.standard_normal(2000), dtype)
    metrics = measured(track(ov.metrics.arrival), [Seen(x, e, e, e)])
    moved = flat(x + e) - flat(x)
    assert float(metrics["arrival"]) == pytest.approx(cosine(moved, flat(e)), abs=1e-3)
    assert (float(metrics["arrival"]) > 0.999) == (dtype == "f4")


def test_a_running_mean_has_no_bias_at_its_start():
    steps = [seen_of(seed) for seed in range(4)]
    norms = [np.linalg.norm(flat(seen.grads)) for seen in steps]
    metrics = measured(track(ov.metrics.running_mean(ov.metrics.grad_norm, 0.8)), steps)
    weights = 0.8 ** np.arange(4)[::-1]
    expected = np.average(norms, weights=weights)
    assert float(metrics["mean_grad_norm"]) == pytest.approx(expected, rel=1e-5)


def test_a_running_mean_of_several_numbers_is_that_of_each():
    def both(seen):
        return jnp.stack([ov.metrics.grad_norm(seen), ov.metrics.cosine(seen)])

    transform = track(
        *map(ov.metrics.running_mean, (both, ov.metrics.grad_norm, ov.metrics.cosine))
    )
    state = transform.init(seen_of(0).params)
    for seed in range(3):
        _, after = compiled(transform)(seen_of(seed), state)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
        state = after
    found = state.report.metrics
    alone = [found["mean_grad_norm"], found["mean_cosine"]]
    np.testing.assert_allclose(found["mean_both"], alone, rtol=1e-6)


def test_a_running_mean_leaves_out_what_is_not_finite():
    """The first value, too: the mean is zero until there is one. None is forgotten."""
    mean = ov.metrics.running_mean(ov.metrics.grad_norm, 0.8)
    state, means = mean.init(None), []
    for norm in (jnp.nan, 1.0, jnp.inf, 3.0):
        value, state = mean.update(Seen(None, None, jnp.asarray(norm), None), state)
        means.append(float(value))
    expected = [0, 1, 1, (0.8 * 1 + 3) / 1.8]
    np.testing.assert_allclose(means, expected, rtol=1e-6)


def grad_fn(params):
    """Of two bowls with a saddle between them, so that gradients turn."""
    return jax.tree.map(lambda x: x * jnp.cosh(x), params)


def trained(optimizer, steps=3):
    """The points before each step, and the states after it."""

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(
            grad_fn(params), state, params, grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates), state

    params = jnp.asarray([1.0, -2.0, 0.5])
    state = optimizer.init(params)
    points, states = [], []
    for _ in range(steps):
        points.append(params)
        params, state = step(params, state)
        states.append(state)
    return points, states


def test_a_lagged_optimizer_is_measured_at_the_perturbation_of_its_gradient():
    """ε_{t−1}: none at the first step, and x_t as the parameters."""
    base = optax.chain(
        track(
            ov.metrics.perturbation_norm, ov.metrics.cosine, x=lambda seen: seen.params
        ),
        optax.sgd(0.1),
    )
    points, states = trained(ov.lagged_vasso(base, 0.3))
    metrics = [state.optimizer_state[0].report.metrics for state in states]
    assert float(metrics[0]["perturbation_norm"]) == float(metrics[0]["cosine"]) == 0
    for t in (1, 2):
        clean = ov.eval_params(states[t - 1], points[t])
        e, g = np.asarray(points[t] - clean), np.asarray(grad_fn(points[t]))
        assert float(metrics[t]["perturbation_norm"]) == pytest.approx(0.3, rel=1e-4)
        assert float(metrics[t]["cosine"]) == pytest.approx(cosine(e, g), abs=1e-4)
        np.testing.assert_allclose(metrics[t]["x"], clean, rtol=1e-6)


def test_what_is_not_perturbed_counts_nothing():
    """Masked leaves have None for a perturbation, and so do those without updates."""
    base = optax.chain(track(*DEFAULTS), optax.sgd(0.1))
    params = {"a": jnp.asarray([3.0, 4.0]), "b": jnp.ones(2)}
    for optimizer in (
        ov.sam(base, 0.5, mask={"a": True, "b": False}),
        ov.lagged_vasso(base, 0.5, mask={"a": True, "b": False}),
    ):
        state = optimizer.init(params)
        for _ in range(2):
            _, state = optimizer.update(
                params, state, params, grad_fn=lambda params: params
            )
        metrics = state.optimizer_state[0].report.metrics
        assert float(metrics["perturbation_norm"]) == pytest.approx(0.5)
        assert float(metrics["cosine"]) == pytest.approx(5 / 27**0.5, rel=1e-5)


DEFAULTS = (ov.metrics.perturbation_norm, ov.metrics.cosine)


def test_by_default_the_norm_and_the_cosine_are_measured():
    state = track().init(jnp.ones(2))
    assert set(state.report.metrics) == {measure.__name__ for measure in DEFAULTS}


def test_measures_of_ones_own_by_their_names():
    def largest(seen):
        return jnp.max(jnp.abs(seen.perturbation))

    counter = Measure(
        "steps", lambda params: jnp.zeros((), int), lambda seen, n: (n + 1, n + 1)
    )
    transform = track(largest, counter, halves=lambda seen: seen.grads / 2)
    seen = Seen(*(jnp.asarray([i, -3.0]) for i in range(4)))
    metrics = measured(transform, [seen, seen])
    assert set(metrics) == {"largest", "steps", "halves"}
    assert float(metrics["largest"]) == 3
    assert int(metrics["steps"]) == 2
    np.testing.assert_array_equal(metrics["halves"], [1.0, -1.5])


def test_every_k_steps_measures_on_those_and_keeps_the_numbers_in_between():
    steps = [seen_of(seed) for seed in range(5)]
    transform = track(ov.metrics.grad_norm, every=3)
    for count, index in ((1, 0), (2, 0), (3, 0), (4, 3), (5, 3)):
        expected = np.linalg.norm(flat(steps[index].grads))
        metrics = measured(transform, steps[:count])
        assert float(metrics["grad_norm"]) == pytest.approx(expected, rel=1e-5)


def test_tracking_changes_nothing():
    plain = optax.sgd(0.1, momentum=0.9)
    tracked = optax.chain(track(ov.metrics.cosine, ov.metrics.stability), plain)
    for recipe in (ov.vasso, ov.evasso, ov.lagged_vasso):
        expected, _ = trained(recipe(plain))
        actual, _ = trained(recipe(tracked))
        chex.assert_trees_all_equal(actual, expected)


def test_track_arrival_passes_everything_on():
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    optimizer = ov.metrics.track_arrival(ov.lagged_vasso(spy))
    params = jnp.ones(2)
    optimizer.update(params, optimizer.init(params), params, temperature=300)
    assert seen[0]["temperature"] == 300


def test_the_chain_is_what_is_measured():
    """The tracker sees what the ascent chain returns, whatever it is made of."""
    ascent = optax.chain(ov.friendly_noise(1.0, 0.6), ov.asam_perturb(0.4))
    base = optax.chain(track(e=lambda seen: seen.perturbation), optax.sgd(0.0))
    points, states = trained(ov.sharpness_aware(base, ascent))
    outputs, _ = run_chain(ascent, [grad_fn(x) for x in points], points[0])
    for state, expected in zip(states, outputs, strict=True):
        measured_there = state.optimizer_state[0].report.metrics["e"]
        np.testing.assert_allclose(measured_there, expected, rtol=1e-6)


def overshooting(optimizer, params):
    """The state after ten steps of a rate with which they cross the valley."""
    state = optimizer.init(params)
    for _ in range(10):
        updates, state = optimizer.update(params, state, params, grad_fn=lambda x: x)
        params = optax.apply_updates(params, updates)
    return state


OVERSHOOTING = optax.chain(
    ov.metrics.track(ov.metrics.running_mean(ov.metrics.cosine, 0.5)), optax.sgd(1.9)
)


def test_check_uphill_says_nothing_at_the_bound_itself():
    """As before the first step, when the cosine is zero."""
    base = optax.chain(
        ov.metrics.track(ov.metrics.running_mean(ov.metrics.cosine)), optax.sgd(0.1)
    )
    state = ov.lagged_vasso(base).init(jnp.ones(2))
    ov.metrics.check_uphill(state)
    ov.metrics.check_uphill(state, least=-1)
    with pytest.warns(RuntimeWarning, match=r"gradient is 0.00, below 1\."):
        ov.metrics.check_uphill(state, least=1)


def test_check_uphill_warns_where_the_mean_cosine_is_negative():
    """Steps that overshoot a valley from side to side: momentum_sam's sign is right."""
    params = jnp.array([1.0, 2.0])
    wrong = ov.single_step_sam(OVERSHOOTING, rho=0.01)
    right = ov.momentum_sam(OVERSHOOTING, rho=0.01, momentum=0.0)
    with pytest.warns(RuntimeWarning, match=r"downhill: .* momentum_sam perturbs"):
        ov.metrics.check_uphill(overshooting(wrong, params))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ov.metrics.check_uphill(overshooting(right, params))
    with pytest.raises(ValueError, match="mean_cosine, which is not in this state"):
        ov.metrics.check_uphill(ov.single_step_sam(optax.sgd(0.1)).init(jnp.ones(2)))


def test_check_uphill_finds_the_group_of_a_partition_that_leads_downhill():
    groups = {
        "wrong": ov.single_step_sam(OVERSHOOTING, rho=0.01),
        "right": ov.momentum_sam(OVERSHOOTING, rho=0.01, momentum=0.0),
    }
    state = overshooting(
        optax.partition(groups, ["wrong", "right"]), [jnp.array([1.0, 2.0])] * 2
    )
    with pytest.warns(RuntimeWarning, match="The perturbation points downhill"):
        ov.metrics.check_uphill(state)


def test_check_uphill_says_what_helps_at_two_gradients():
    """An optimizer in the ascent chain descends, unless its sign is turned."""
    ascent = optax.chain(optax.sgd(1.0), ov.sam_perturb(0.01))
    optimizer = ov.sharpness_aware(OVERSHOOTING, ascent)
    state = overshooting(optimizer, jnp.array([1.0, 2.0]))
    with pytest.warns(RuntimeWarning, match=r"put optax\.scale\(-1\.0\) after") as seen:
        ov.metrics.check_uphill(state)
    assert "lagged" not in str(seen[0].message)
