"""One rule for spikes: what averages over steps survives an extreme or non-finite one.

Every optimizer takes the same steps twice, once with three bad ones among them: a
gradient of 1e30, an infinite one and a NaN. What the bad steps do to the parameters is
kept out of the test, by a clip around the optimizer, or of a lagged one inside it, as
:func:`optax.apply_if_finite` or :func:`optax.zero_nans` would. Once the averages have
forgotten, nothing of it is left: parameters, states and metrics are those of the run
without the bad steps.
"""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_common import ASCENTS, COMPOSED, EVERY

import optax_vasso as ov
from optax_vasso import gate
from optax_vasso.metrics import cosine, grad_norm, running_mean, track

RATE = 0.1
START = {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "bias": jnp.ones(2)}
# An average forgets 1e30 after 69 times its horizon 1/(1 − decay), the running mean of
# cosines, which is bounded, after ten.
BEFORE, AFTER = 200, 1500
SPIKES = (1e30, np.inf, np.nan)


# Were all the same, LookSAM would have nothing but roundings to store.
CURVATURES = jax.tree.map(
    lambda x: jnp.linspace(0.5, 2.0, x.size).reshape(x.shape), START
)


def kept_out(updates, params=None):
    del params
    return jax.tree.map(lambda u: jnp.clip(jnp.nan_to_num(u), -1, 1), updates)


CLIP = optax.stateless(kept_out)
SGD = optax.sgd(RATE)


def around(make):
    return lambda: optax.chain(make(SGD), CLIP)


def inside(make):
    return lambda: make(optax.chain(CLIP, SGD))


def is_lagged(make):
    """Whether the loop's parameters are perturbed, and no update may be clipped."""
    state = make(SGD).init(START)
    nodes = jax.tree.leaves(
        state, is_leaf=lambda n: isinstance(n, ov.steps.LaggedState)
    )
    return any(isinstance(node, ov.steps.LaggedState) for node in nodes)


def gated(opened):
    return lambda optimizer: ov.sharpness_aware(
        optimizer, ASCENTS["vasso"](0.1), gate=opened
    )


TRACKED = optax.chain(track(running_mean(grad_norm, 0.9), cosine), SGD)
OPTIMIZERS = {
    **{
        name: (inside if is_lagged(make) else around)(make)
        for name, make in EVERY.items()
    },
    **{
        f"lagged {name}": inside(lambda o, make=make: ov.lagged(o, make(0.1)))
        for name, make in ASCENTS.items()
    },
    "a gate of gates": around(
        gated(gate.any_of(gate.all_of(gate.adaptive(), gate.every(2)), gate.every(3)))
    ),
    "a running mean of norms": lambda: optax.chain(ov.vasso(TRACKED), CLIP),
    "metrics now and then": lambda: optax.chain(
        ov.vasso(optax.chain(track(cosine, ov.metrics.stability, every=7), SGD)), CLIP
    ),
}


def run(optimizer, spikes, bad_entries):
    """The last parameters and state. Gradients are those of a bowl, with noise."""
    rng = np.random.default_rng(0)
    steps = BEFORE + len(SPIKES) + AFTER
    noise = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=(steps, *x.shape)), x.dtype), START
    )
    factors = jnp.ones(steps).at[BEFORE : BEFORE + len(SPIKES)].set(spikes)

    def step(carry, at):
        params, state = carry
        noise, factor = at

        def grad_fn(x):
            clean = jax.tree.map(lambda x, n, h: h * x + 0.3 * n, x, noise, CURVATURES)
            value = 1.75 + 0.01 * optax.tree.sum(clean)
            spoiled = jax.tree.map(
                lambda g, bad: jnp.where(bad, factor * g, g), clean, bad_entries
            )
            return value * factor, spoiled

        value, grads = grad_fn(params)
        updates, state = optimizer.update(
            grads, state, params, grad_fn=grad_fn, value=value
        )
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (START, optimizer.init(START)), (noise, factors))[0]


EVERYWHERE = jax.tree.map(lambda x: jnp.ones(x.shape, bool), START)
ONE_ENTRY = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), START) | {
    "bias": jnp.array([True, False])
}


def check(optimizer, rtol=1e-3):
    program = jax.jit(functools.partial(run, optimizer))
    expected = program(jnp.ones(len(SPIKES)), EVERYWHERE)
    for bad_entries in (EVERYWHERE, ONE_ENTRY):
        found = program(jnp.asarray(SPIKES), bad_entries)
        for (path, leaf), other in zip(
            jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
        ):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                np.testing.assert_allclose(
                    np.asarray(leaf, float),
                    np.asarray(other, float),
                    rtol=rtol,
                    atol=rtol,
                    err_msg=jax.tree_util.keystr(path),
                )


@pytest.mark.parametrize("name", cases.every(OPTIMIZERS, OPTIMIZERS.keys() - COMPOSED))
def test_three_bad_steps_are_forgotten(name):
    # A held rise keeps log ρ, a sum over all steps: a few bad ones move it a little,
    # and nothing but a wanted rise, which this bowl hardly has, moves it back.
    check(OPTIMIZERS[name](), rtol=0.1 if name == "held_rise" else 1e-3)


FEW_BITS = {
    "vasso": around(functools.partial(ov.vasso, accumulator_dtype=jnp.float16)),
    "friendly": around(
        functools.partial(ov.friendly_sam, accumulator_dtype=jnp.float16)
    ),
    "lagged": inside(
        lambda optimizer: ov.lagged(
            optimizer,
            optax.chain(
                ov.vasso_ema(0.4, accumulator_dtype=jnp.float16), ov.sam_perturb(0.1)
            ),
        )
    ),
}


@pytest.mark.parametrize("name", FEW_BITS)
def test_what_leaves_the_range_of_an_average_of_few_bits_is_left_out(name):
    check(FEW_BITS[name](), rtol=1e-2)


@pytest.mark.parametrize("name", ["vasso", "friendly_sam", "lagged_vasso", "sampa"])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_first_step_that_is_not_finite_is_forgotten_too(name, bad):
    make = (inside if is_lagged(EVERY[name]) else around)(EVERY[name])
    optimizer = make()
    state, params = optimizer.init(START), START

    def grad_fn(x):
        return jax.tree.map(jnp.multiply, CURVATURES, x)

    for factor in (bad, 1.0, 1.0):
        grads = jax.tree.map(lambda g, f=factor: f * g, grad_fn(params))
        updates, state = optimizer.update(grads, state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))
    assert optax.tree.norm(params) < optax.tree.norm(START)
