"""Different routes to the same training, with drawn numbers: all arrive at one place.

Compiled or not, in a scan or a loop, interrupted or not, moved or updated, a recipe or
its composition. Batches and devices are in ``scale/test_drawn_devices.py``.
"""

import functools
import math

import jax
import numpy as np
import optax
import pytest
from drawn import (
    DRAWS,
    EXAMPLES,
    IS_THOROUGH,
    MODERATE,
    OF_ALL_KINDS,
    RADII,
    SEEDS,
    STEPS,
    Draw,
    assert_close,
    assert_same,
    examples,
    gradient,
    optimizer_of,
    radius_of,
    step_of,
    training,
)
from flax import serialization
from hypothesis import given, settings, strategies as st
from test_common import EVERY

import optax_vasso as ov
from optax_vasso import descent, gate

ON = "float32"
NAMES = tuple(EVERY) if IS_THOROUGH else OF_ALL_KINDS
names = pytest.mark.parametrize("name", NAMES)
NUMBERS = st.tuples(RADII, st.floats(0, 0.5, width=32), st.floats(0.5, 2)).map(
    lambda numbers: tuple(map(np.float32, numbers))
)


@functools.cache
def first(name):
    """``(params, rho) -> state`` of the optimizer, compiled."""
    return jax.jit(lambda params, rho: optimizer_of(name, 0.1, rho).init(params))


@functools.cache
def one_step(name):
    """``(carry, center, rho, rate, curvature) -> carry, updates``, compiled."""

    @jax.jit
    def run(carry, center, rho, rate, curvature):
        return step_of(optimizer_of(name, rate, rho), curvature)(carry, center)

    return run


def loop(step, carry, centers, numbers, steps=range(STEPS)):
    for i in steps:
        center = jax.tree.map(lambda leaf, i=i: leaf[i], centers)
        carry, _ = step(carry, center, *numbers)
    return carry


def start(name, draw, seed, numbers):
    params, centers = draw(ON), draw._replace(seed=seed)(ON, STEPS)
    rho, *others = numbers
    return params, centers, (radius_of(name, draw, ON, rho), *others)


def arrived(carry):
    params, state = carry
    return params, ov.eval_params(state, params)


@names
@examples(NAMES)
@given(draw=DRAWS, seed=SEEDS, numbers=NUMBERS)
def test_a_loop_is_a_scan(name, draw, seed, numbers):
    params, centers, numbers = start(name, draw, seed, numbers)
    scanned = training(name)(params, centers, *numbers)
    carry = loop(
        one_step(name), (params, first(name)(params, numbers[0])), centers, numbers
    )
    assert_close(arrived(carry), (scanned.params, scanned.clean), ON, times=10)


@names
@examples(NAMES)
@given(draw=DRAWS, seed=SEEDS, numbers=NUMBERS, at=st.integers(0, STEPS))
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(
    name, draw, seed, numbers, at
):
    """To the bit, through Flax's bytes."""
    params, centers, numbers = start(name, draw, seed, numbers)
    fresh = params, first(name)(params, numbers[0])
    whole = loop(one_step(name), fresh, centers, numbers)
    half = loop(one_step(name), fresh, centers, numbers, range(at))
    restored = serialization.from_bytes(fresh, serialization.to_bytes(half))
    resumed = loop(one_step(name), restored, centers, numbers, range(at, STEPS))
    assert_same(resumed, whole)
    assert_same(arrived(resumed), arrived(whole))


# Without jit a step takes a tenth of a second, and its operations are compiled.
WITHOUT_JIT = NAMES if IS_THOROUGH else ("lagged_vasso",)


@pytest.mark.parametrize("name", WITHOUT_JIT)
@settings(max_examples=math.ceil(EXAMPLES / 20 / len(WITHOUT_JIT)))
@given(draw=DRAWS, seed=SEEDS, numbers=NUMBERS)
def test_a_step_is_the_same_without_jit(name, draw, seed, numbers):
    params, centers, numbers = start(name, draw, seed, numbers)
    fresh = params, first(name)(params, numbers[0])
    compiled = loop(one_step(name), fresh, centers, numbers, range(2))
    with jax.disable_jit():
        plain = loop(one_step(name), fresh, centers, numbers, range(2))
    assert_close(arrived(plain), arrived(compiled), ON, times=10)


MOVED = [name for name in NAMES if hasattr(optimizer_of(name, 0.1, 0.1), "move")]


@functools.cache
def one_move(name):
    @jax.jit
    def run(carry, center, rho, rate, curvature):
        params, state = carry
        optimizer = optimizer_of(name, rate, rho)
        grads = gradient(params, center, curvature)
        extra = {"grad_fn": lambda x: gradient(x, center, curvature), "value": 0.5}
        return optimizer.move(grads, state, params, **extra), ()

    return run


@pytest.mark.parametrize("name", MOVED)
@examples(MOVED)
@given(draw=MODERATE, seed=SEEDS, numbers=NUMBERS)
def test_to_move_parameters_is_to_update_them(name, draw, seed, numbers):
    params, centers, numbers = start(name, draw, seed, numbers)
    fresh = params, first(name)(params, numbers[0])
    moved = loop(one_move(name), fresh, centers, numbers)
    updated = loop(one_step(name), fresh, centers, numbers)
    assert_close(arrived(moved), arrived(updated), ON, times=10)


def vasso_chain(rho, theta):
    return optax.chain(ov.vasso_ema(theta), ov.sam_perturb(rho))


def momentum_chain(rho, momentum):
    """Minus the average of the momentum, whose weights are those of no fixed theta."""
    return optax.chain(optax.trace(momentum), optax.scale(-1.0), ov.sam_perturb(rho))


# What the documentation says that a recipe is made of, with a drawn number beside ρ.
COMPOSITIONS = {
    "sam": (
        lambda base, rho, h: ov.sam(base, rho),
        lambda base, rho, h: ov.sharpness_aware(base, ov.sam_perturb(rho)),
    ),
    "vasso": (
        lambda base, rho, h: ov.vasso(base, rho, theta=h),
        lambda base, rho, h: ov.sharpness_aware(base, vasso_chain(rho, h)),
    ),
    "evasso": (
        lambda base, rho, h: ov.evasso(base, rho, theta=h, probability=h),
        lambda base, rho, h: ov.sharpness_aware(
            base, vasso_chain(rho, h), gate=gate.bernoulli(h)
        ),
    ),
    "friendly_sam": (
        lambda base, rho, h: ov.friendly_sam(base, rho, sigma=h, lmbda=h),
        lambda base, rho, h: ov.sharpness_aware(
            base, optax.chain(ov.friendly_noise(h, h), ov.sam_perturb(rho))
        ),
    ),
    "gsam": (
        lambda base, rho, h: ov.gsam(base, rho, alpha=h),
        lambda base, rho, h: ov.sharpness_aware(
            optax.chain(descent.gsam_descent(h), base), ov.sam_perturb(rho)
        ),
    ),
    "looksam": (
        lambda base, rho, h: ov.looksam(base, rho, alpha=h, k=3),
        lambda base, rho, h: ov.sharpness_aware(
            optax.chain(descent.looksam_descent(h), base),
            ov.sam_perturb(rho),
            gate=gate.every(3),
        ),
    ),
    "ae_sam": (
        lambda base, rho, h: ov.ae_sam(base, rho, decay=h),
        lambda base, rho, h: ov.sharpness_aware(
            base, ov.sam_perturb(rho), gate=gate.adaptive(0.0, h)
        ),
    ),
    "lagged_vasso": (
        lambda base, rho, h: ov.lagged_vasso(base, rho, theta=h),
        lambda base, rho, h: ov.lagged(base, vasso_chain(rho, h)),
    ),
    "momentum_sam": (
        lambda base, rho, h: ov.momentum_sam(base, rho, momentum=h),
        lambda base, rho, h: ov.lagged(base, momentum_chain(rho, h)),
    ),
}


# These make the same of the same numbers with less memory.
BUFFERLESS = {"lagged_vasso", "momentum_sam"}


def composed(name, part):
    """The training of a recipe, or of its composition, with a hyperparameter."""

    def run(params, centers, rho, rate, h):
        optimizer = COMPOSITIONS[name][part](optax.sgd(rate, momentum=0.9), rho, h)
        update = functools.partial(optimizer.update, value=0.5)
        optimizer = optax.GradientTransformationExtraArgs(optimizer.init, update)
        carry = params, optimizer.init(params)
        (params, state), _ = jax.lax.scan(step_of(optimizer, 1.0), carry, centers)
        return arrived((params, state))

    return run


@functools.cache
def compiled(name, part):
    return jax.jit(composed(name, part))


@pytest.mark.parametrize("name", [n for n in COMPOSITIONS if n not in BUFFERLESS])
def test_a_recipe_is_the_program_of_its_composition(name):
    """And so it is the same for all numbers."""
    params, centers = Draw(0)(ON), Draw(0)(ON, STEPS)
    numbers = params, centers, *map(np.float32, (0.1, 0.1, 0.4))
    recipe, composition = (
        str(jax.make_jaxpr(composed(name, part))(*numbers)) for part in (0, 1)
    )
    assert recipe == composition


@pytest.mark.parametrize("name", sorted(BUFFERLESS))
@examples(BUFFERLESS)
@given(draw=DRAWS, seed=SEEDS, numbers=NUMBERS, h=st.floats(0.0625, 0.9375))
def test_a_recipe_is_its_composition(name, draw, seed, numbers, h):
    params, centers, (rho, rate, _) = start(name, draw, seed, numbers)
    recipe, composition = (
        compiled(name, part)(params, centers, rho, rate, np.float32(h))
        for part in (0, 1)
    )
    assert_close(composition, recipe, ON, times=10)
