"""Statements about any numbers, drawn by hypothesis: for every part and every method.

By default 300 examples of each; ``--hypothesis-profile=thorough`` tries 10,000, and
every method on every tree.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import (
    ALIKE,
    DRAWS,
    METHODS,
    MODERATE,
    POWERS,
    RADII,
    ROUNDING,
    SEEDS,
    STEPS,
    Draw,
    assert_close,
    assert_finite,
    assert_same,
    examples,
    methods,
    on_trees,
    permuted,
    radius_of,
    times,
    training,
    wide,
)
from hypothesis import given, strategies as st
from test_common import ASCENTS

import optax_vasso as ov
from optax_vasso import gate

# Perturbations


def _trained(rho):
    """On the leaves of an optimizer that trains all."""
    is_trained = ov.ascent.trained_by(optax.sgd(0.1))
    return ov.ascent.masked_ascent(ov.sam_perturb(rho), is_trained)


CHAINS = ASCENTS | {
    "until": lambda rho: ov.sam_perturb(ov.ascent.until(STEPS, rho)),
    "trained": _trained,
}
BY_LEAF = {"per_layer", "masked"}  # what they do depends on where a leaf ends
CASES, ascents = on_trees(CHAINS)
WHOLE, whole_ascents = on_trees([name for name in CHAINS if name not in BY_LEAF])
WHOLE = [(name, on) for name, on in WHOLE if on != "mixed"]
whole_ascents = pytest.mark.parametrize(("name", "on"), WHOLE)


@functools.cache
def ascending(name):
    """``(grads, params, rho) -> perturbations`` of STEPS steps, compiled per tree."""

    @jax.jit
    def run(grads, params, rho):
        ascent = optax.with_extra_args_support(CHAINS[name](rho))

        def step(state, grads):
            perturbation, state = ascent.update(grads, state, params, value=1.0)
            return state, perturbation

        return jax.lax.scan(step, ascent.init(params), grads)[1]

    return lambda *numbers: jax.tree.map(np.asarray, run(*numbers))


def balls(name, perturbation, params, grads):
    """The parts that have a radius each, as vectors (ε, x, g)."""

    def rows(tree):
        return jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)

    leaves = [
        tuple(wide(leaf).ravel() for leaf in row)
        for row in zip(rows(perturbation), rows(params), rows(grads), strict=True)
        if row[0] is not None
    ]
    if name == "per_layer":
        return leaves
    return [tuple(map(np.concatenate, zip(*leaves, strict=True)))]


def metric(name, x, g):
    """The diagonal by which a perturbation is measured."""
    if name == "asam":
        return 1 / (abs(x) + 0.01)
    return np.sqrt(1 + abs(g) ** 2) if name == "fisher" else np.ones(x.shape)


def length(name, e):
    """The norm of a perturbation in its metric."""
    if name == "sam_inf":
        return np.max(abs(e), initial=0)
    largest = np.max(abs(e), initial=0) or 1.0
    return largest * np.linalg.norm(e / largest, 3 if name == "sam_p3" else 2)


def at(step, tree):
    return jax.tree.map(lambda leaf: leaf[step], tree)


@ascents
@examples(CASES)
@given(grads=DRAWS, params=MODERATE, rho=MODERATE)
def test_the_length_of_a_perturbation_is_the_radius(name, on, grads, params, rho):
    """In the norm of its ball; or zero, where there is no direction."""
    grads, params, radius = grads(on, STEPS), params(on), rho.length(on)
    found = ascending(name)(grads, params, radius)
    assert_finite(found)
    # Of an entry below the range of its dtype nothing is left.
    least = 1e-7 if on in ("float16", "mixed") else 2e-38
    for step in range(STEPS):
        for e, x, g in balls(name, at(step, found), params, at(step, grads)):
            is_zero = not g.any() and step == 0
            is_over = name == "until" and step == STEPS - 1
            expected = 0.0 if is_zero or is_over else radius
            by = metric(name, x, g)
            actual = length(name, by * e)
            tolerance = ROUNDING[on] * radius + least * np.linalg.norm(by)
            # Later the average may be zero although this gradient is not.
            assert abs(actual - expected) <= tolerance or (step and actual == 0)


@ascents
@examples(CASES)
@given(grads=MODERATE, params=MODERATE, power=POWERS)
def test_a_perturbation_is_blind_to_the_scale_of_the_loss(
    name, on, grads, params, power
):
    """But for Fisher's, whose information has the scale of the gradient."""
    if name == "fisher":
        return
    grads, params = grads(on, STEPS), params(on)
    found = ascending(name)(grads, params, np.float32(0.1))
    scaled = ascending(name)(times(2.0**power, grads), params, np.float32(0.1))
    assert_close(scaled, found, on)


@ascents
@examples(CASES)
@given(grads=DRAWS, params=MODERATE)
def test_the_opposite_gradients_have_the_opposite_perturbation(name, on, grads, params):
    grads, params = grads(on, STEPS), params(on)
    found = ascending(name)(grads, params, np.float32(0.1))
    assert_same(
        ascending(name)(times(-1, grads), params, np.float32(0.1)), times(-1, found)
    )


@whole_ascents
@examples(WHOLE)
@given(grads=MODERATE, params=MODERATE, seed=SEEDS)
def test_a_perturbation_does_not_know_where_an_entry_stands(
    name, on, grads, params, seed
):
    grads, params = grads(on, STEPS), params(on)
    found = ascending(name)(grads, params, np.float32(0.1))
    moved = permuted(seed, [(grads, params), (params, params)])
    (expected,) = permuted(seed, [(found, params)])
    assert_close(ascending(name)(*moved, np.float32(0.1)), expected, on)


def split(tree, axis):
    """Every leaf that has entries along an axis as two leaves."""
    return jax.tree.map(
        lambda leaf: (
            {"first": leaf.take([0], axis), "rest": np.delete(leaf, 0, axis)}
            if leaf.ndim > axis and leaf.shape[axis]
            else leaf
        ),
        tree,
    )


@whole_ascents
@examples(WHOLE)
@given(grads=DRAWS, params=MODERATE)
def test_splitting_a_leaf_changes_no_perturbation(name, on, grads, params):
    grads, params = grads(on, STEPS), params(on)
    found = ascending(name)(grads, params, np.float32(0.1))
    parts = ascending(name)(split(grads, 1), split(params, 0), np.float32(0.1))
    assert_close(parts, split(found, 1), on)


@ascents
@examples(CASES)
@given(params=DRAWS, rho=MODERATE)
def test_without_a_gradient_nothing_is_perturbed(name, on, params, rho):
    grads, params = times(0, Draw(0)(on, STEPS)), params(on)
    found = ascending(name)(grads, params, rho.length(on))
    assert_same(found, times(0, found))


# Gates

LENGTHS = 40
DRAWN_LENGTHS = st.builds(
    lambda seed, scale: (
        np.exp(np.random.default_rng(seed).normal(size=LENGTHS)) * scale
    ),
    SEEDS,
    st.floats(-20, 20).map(lambda exponent: 10**exponent),
)
GATES = {
    "every": lambda k, n, c, d: gate.every(k),
    "from_step": lambda k, n, c, d: gate.from_step(n),
    "bernoulli": lambda k, n, c, d: gate.bernoulli(d),
    "adaptive": lambda k, n, c, d: gate.adaptive(c, d),
    "all": lambda k, n, c, d: gate.all_of(gate.every(k), gate.adaptive(c, d)),
    "any": lambda k, n, c, d: gate.any_of(gate.every(k), gate.adaptive(c, d)),
}
HYPERPARAMETERS = st.tuples(
    st.integers(1, 9),
    st.integers(0, LENGTHS),
    st.floats(-2, 2),
    st.floats(0.125, 0.875),
)


@functools.cache
def answering(name):
    """``(lengths, *hyperparameters) -> answers`` to gradients of these lengths."""

    @jax.jit
    def run(lengths, *hyperparameters):
        made = GATES[name](*hyperparameters)

        def step(state, newest):
            ascend, state = made.update(state, grads=[newest])
            return state, ascend

        return jax.lax.scan(step, made.init(), lengths)[1]

    return lambda lengths, hyperparameters: np.asarray(
        run(np.asarray(lengths, np.float32), *hyperparameters)
    )


@examples([0])
@given(lengths=DRAWN_LENGTHS, drawn=HYPERPARAMETERS)
def test_gates_joined_answer_as_their_parts_do(lengths, drawn):
    k, n, *_ = drawn
    steps = np.arange(LENGTHS)
    every, adaptive = (
        answering(name)(lengths, drawn) for name in ("every", "adaptive")
    )
    np.testing.assert_array_equal(every, steps % k == 0)
    np.testing.assert_array_equal(answering("from_step")(lengths, drawn), steps >= n)
    np.testing.assert_array_equal(answering("all")(lengths, drawn), every & adaptive)
    np.testing.assert_array_equal(answering("any")(lengths, drawn), every | adaptive)


@examples([0])
@given(lengths=DRAWN_LENGTHS, drawn=HYPERPARAMETERS, power=st.integers(-40, 40))
def test_an_adaptive_gate_is_blind_to_the_scale_of_the_loss(lengths, drawn, power):
    scaled = answering("adaptive")(lengths * 2.0**power, drawn)
    np.testing.assert_array_equal(scaled, answering("adaptive")(lengths, drawn))


@examples([0])
@given(lengths=DRAWN_LENGTHS, drawn=HYPERPARAMETERS, more=st.floats(0, 1))
def test_what_opens_a_strict_gate_opens_a_lax_one(lengths, drawn, more):
    k, n, threshold, probability = drawn
    for name, lax in {
        "adaptive": (k, n, threshold - more, probability),
        "bernoulli": (k, n, threshold, probability + more * (1 - probability)),
    }.items():
        opened = answering(name)(lengths, drawn)
        assert (answering(name)(lengths, lax) >= opened).all()


# Descents

DESCENTS = {
    "gsam": ov.descent.gsam_descent,
    "weighted": ov.descent.weighted_descent,
    "looksam": ov.descent.looksam_descent,
    "decoupled": lambda gamma: ov.descent.decoupled_descent(
        optax.sgd(0.25), learning_rate=0.25, gamma=gamma
    ),
}
DIRECTED, descents = on_trees(DESCENTS)


@functools.cache
def descending(name):
    """Two steps, the second without an ascent: the directions, compiled per tree."""

    @jax.jit
    def run(perturbed, clean, weight):
        descent = DESCENTS[name](weight)
        first, state = descent.update(
            perturbed, descent.init(clean), clean, clean_grads=clean, ascended=True
        )
        second, _ = descent.update(
            clean, state, clean, clean_grads=clean, ascended=jnp.zeros((), bool)
        )
        return first, second

    return lambda *numbers: jax.tree.map(np.asarray, run(*numbers))


@descents
@examples(DIRECTED)
@given(perturbed=DRAWS, seed=SEEDS, weight=st.floats(0, 0.75))
def test_a_descent_of_finite_gradients_is_finite(name, on, perturbed, seed, weight):
    clean = perturbed._replace(seed=seed)(on)
    assert_finite(descending(name)(perturbed(on), clean, np.float32(weight)))


@descents
@examples(DIRECTED)
@given(perturbed=MODERATE, seed=SEEDS, weight=st.floats(0, 0.75), power=POWERS)
def test_a_descent_has_the_scale_of_the_gradients(
    name, on, perturbed, seed, weight, power
):
    perturbed, clean = perturbed(on), perturbed._replace(seed=seed)(on)
    found = descending(name)(perturbed, clean, np.float32(weight))
    scaled = descending(name)(
        times(2.0**power, perturbed), times(2.0**power, clean), np.float32(weight)
    )
    assert_close(scaled, times(2.0**power, found), on)


@descents
@examples(DIRECTED)
@given(perturbed=DRAWS, weight=st.floats(0, 0.75))
def test_where_both_gradients_are_equal_a_descent_takes_them(
    name, on, perturbed, weight
):
    grads = perturbed(on)
    first, second = descending(name)(grads, grads, np.float32(weight))
    expected = times(-0.25, grads) if name == "decoupled" else grads
    assert_close((first, second), (expected, expected), on)


# Methods: trainings on bowls whose centers move

RATES = st.floats(0.0, 0.5, width=32)
CURVATURES = st.floats(0.125, 2.0, width=32)


@methods
@examples(METHODS)
@given(params=DRAWS, seed=SEEDS, rho=RADII, rate=RATES, curvature=CURVATURES)
def test_a_training_on_finite_gradients_is_finite_and_repeatable(
    name, on, params, seed, rho, rate, curvature
):
    centers = params._replace(seed=seed)(on, STEPS)
    radius = radius_of(name, params, on, rho)
    arguments = params(on), centers, radius, rate, curvature
    found = training(name)(*arguments)
    assert_finite(found)
    assert_same(training(name)(*arguments), found)


# sampa extrapolates with a learning rate of its own, whatever the radius is.
BASED = [case for case in METHODS if case[0] != "sampa"]


@pytest.mark.parametrize(("name", "on"), BASED)
@examples(BASED)
@given(params=DRAWS, seed=SEEDS, rate=RATES, curvature=CURVATURES)
def test_with_a_radius_of_zero_a_method_is_its_base_optimizer(
    name, on, params, seed, rate, curvature
):
    params, centers = params(on), params._replace(seed=seed)(on, STEPS)
    arguments = params, centers, 0.0, rate, curvature
    found, base = training(name)(*arguments), training("base")(*arguments)
    # Of few bits the base rounds in every step, and one gradient per step does not.
    assert_close(found.clean, base.clean, on, times=2)
    # Of few bits the parameters are what rounding made of them, and clean the nearest.
    assert_close(found.params, found.clean, on)


# These have an absolute scale: the Fisher information's, or a learning rate.
ABSOLUTE = {"fisher_sam", "vasso_fisher", "wsam", "sampa"}
RELATIVE = [case for case in METHODS if case[0] not in ABSOLUTE]


@pytest.mark.parametrize(("name", "on"), RELATIVE)
@examples(RELATIVE)
@given(params=MODERATE, seed=SEEDS, rate=RATES, power=POWERS)
def test_a_training_is_blind_to_the_scale_of_the_loss(
    name, on, params, seed, rate, power
):
    """Twice the loss at half the learning rate is the same training."""
    radius = radius_of(name, params, on)
    params, centers = params(on), params._replace(seed=seed)(on, STEPS)
    found = training(name)(params, centers, radius, rate, 1.0)
    scaled = training(name)(params, centers, radius, rate / 2.0**power, 2.0**power)
    assert_close(scaled, found, on)


@methods
@examples(METHODS)
@given(params=DRAWS, seed=SEEDS, rho=RADII, rate=RATES)
def test_a_mirrored_training_is_the_mirror_of_the_training(
    name, on, params, seed, rho, rate
):
    radius = radius_of(name, params, on, rho)
    params, centers = params(on), params._replace(seed=seed)(on, STEPS)
    found = training(name)(params, centers, radius, rate, 1.0)
    mirrored = training(name)(times(-1, params), times(-1, centers), radius, rate, 1.0)
    assert_same(mirrored, times(-1, found))


@methods
@examples(METHODS)
@given(params=DRAWS, rho=RADII, rate=RATES)
def test_at_the_minimum_a_training_stays(name, on, params, rho, rate):
    radius = radius_of(name, params, on, rho)
    params = params(on)
    centers = jax.tree.map(lambda leaf: np.stack([leaf] * STEPS), params)
    found = training(name)(params, centers, radius, rate, 1.0)
    assert_same((found.params, found.clean), (params, params))


UNIFORM = [
    (name, on)
    for name, on in METHODS
    if on != "mixed" and name.split("_lagged")[0] not in BY_LEAF
    # What it stores is the difference of two near gradients, and that amplifies what
    # the order of a sum does to the last bits.
    if name != "looksam"
]


@pytest.mark.parametrize(("name", "on"), UNIFORM)
@examples(UNIFORM)
@given(params=MODERATE, seed=SEEDS, order=SEEDS, rate=RATES)
def test_a_training_does_not_know_where_an_entry_stands(
    name, on, params, seed, order, rate
):
    radius = radius_of(name, params, on)
    params, centers = params(on), params._replace(seed=seed)(on, STEPS)
    found = training(name)(params, centers, radius, rate, 1.0)
    moved = permuted(order, [(params, params), (centers, params)])
    expected = permuted(order, [(found.params, params), (found.clean, params)])
    again = training(name)(*moved, radius, rate, 1.0)
    assert_close([again.params, again.clean], expected, on, times=10)


WRAPPED = [case for case in METHODS if case[0] in ALIKE]


@pytest.mark.parametrize(("name", "on"), WRAPPED)
@examples(WRAPPED)
@given(params=DRAWS, seed=SEEDS, rho=RADII, rate=RATES)
def test_a_wrapper_changes_no_number(name, on, params, seed, rho, rate):
    """But in_float32, where there are numbers of fewer bits."""
    if name.startswith("in_float32") and on not in ("float32", "complex64"):
        return
    radius = radius_of(name, params, on, rho)
    params, centers = params(on), params._replace(seed=seed)(on, STEPS)
    arguments = params, centers, radius, rate, 1.0
    assert_close(training(name)(*arguments), training(ALIKE[name])(*arguments), on)


SKIPPING = [case for case in METHODS if case[0].startswith("skip_nonfinite")]


@pytest.mark.parametrize(("name", "on"), SKIPPING)
@examples(SKIPPING)
@given(
    params=DRAWS,
    seed=SEEDS,
    step=st.integers(0, STEPS - 1),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_a_skipped_step_is_as_if_it_had_not_been(name, on, params, seed, step, bad):
    radius = radius_of(name, params, on)
    params, centers = params(on), params._replace(seed=seed)(on, STEPS)
    # The bad batch among the others, and last, where the steps before have the others.
    centers["layer"].kernel[step, 0, 0] = bad
    order = [*range(step), *range(step + 1, STEPS), step]
    last = jax.tree.map(lambda leaf: leaf[order], centers)
    found, expected = (
        training(name)(params, c, radius, 0.1, 1.0) for c in (centers, last)
    )
    assert_same(jax.tree.map(lambda u: u[order], found.updates), expected.updates)
    assert_same((found.params, found.clean), (expected.params, expected.clean))
    skipped = at(STEPS - 1, expected.updates)
    assert_same(skipped, times(0, skipped))
