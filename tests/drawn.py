"""What the tests with drawn numbers share: trees, draws, and one program per method.

Shapes are fixed and numbers are arguments, so that what is compiled once serves every
example. A failing example prints its draws, which are enough to repeat it.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import settings, strategies as st
from test_common import EVERY, WRAPPERS

import optax_vasso as ov

# 300 examples of each property by default, 10,000 with --hypothesis-profile=thorough.
EXAMPLES = 12 * settings().max_examples
IS_THOROUGH = EXAMPLES > 300
STEPS = 6


def examples(cases):
    """As many examples of a property, divided among its cases."""
    return settings(max_examples=math.ceil(EXAMPLES / len(cases)))


class Layer(NamedTuple):
    kernel: Any
    bias: Any


def tree(*dtypes):
    """Containers and shapes of all kinds, the leaves of these dtypes in turn."""
    turns = itertools.cycle(dtypes)

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(next(turns)))

    return {
        "layer": Layer(leaf(2, 3), None),
        "list": [leaf(3), (leaf(),), {}],
        "nothing": leaf(0, 2),
    }


TREES = {name: tree(name) for name in ("float32", "bfloat16", "float16", "complex64")}
TREES["mixed"] = tree("float32", "bfloat16", "complex64", "float16")
# Relative accuracy of what is rounded to the dtypes of a tree.
ROUNDING = {"float32": 1e-5, "complex64": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
ROUNDING["mixed"] = ROUNDING["bfloat16"]
# And the absolute one, of numbers below the range of float16.
STEP = {"float16": 1e-6, "mixed": 1e-6}


def on_trees(names, always=()):
    """Each name on every tree if thorough, else on one, the trees in turn.

    ``always`` names those that are on the float32 tree then.
    """
    if IS_THOROUGH:
        cases = list(itertools.product(names, TREES))
    else:
        turns = itertools.cycle(TREES)
        cases = [(n, "float32" if n in always else next(turns)) for n in names]
    return cases, pytest.mark.parametrize(("name", "on"), cases)


class Draw(NamedTuple):
    """How the numbers of a tree are made.

    Attributes:
      seed: of NumPy's generator.
      exponent: their scale, a power of ten.
      spread: over how many powers of ten they are spread.
      zeros: the share of them that are zero.
    """

    seed: int
    exponent: float = 0.0
    spread: float = 0.0
    zeros: float = 0.0

    def __call__(self, on, steps=None):
        """Numbers for a tree, one set or one for each step; NumPy's, in range.

        The range of float16 is narrow, so exponents are divided by ten there.
        """
        rng = np.random.default_rng(self.seed)
        narrow = 0.1 if on in ("float16", "mixed") else 1.0
        lead = () if steps is None else (steps,)

        def part(shape):
            powers = self.exponent + self.spread * rng.uniform(-0.5, 0.5, shape)
            chosen = rng.random(shape) >= self.zeros
            return chosen * rng.standard_normal(shape) * 10 ** (narrow * powers)

        def leaf(like):
            shape = lead + like.shape
            values = part(shape)
            info = jnp.finfo(like.dtype)
            most, least = float(info.max) / 64, 64 * float(info.smallest_normal)
            values = np.where(abs(values) < least, 0, np.clip(values, -most, most))
            if jnp.issubdtype(like.dtype, jnp.complexfloating):
                values = values + 1j * rng.permutation(values.ravel()).reshape(shape)
            return np.asarray(values).astype(like.dtype)

        return jax.tree.map(leaf, TREES[on])

    def length(self, on):
        """A positive number of the scale of the draw."""
        narrow = 0.1 if on in ("float16", "mixed") else 1.0
        return np.float32(10 ** (narrow * self.exponent))


SEEDS = st.integers(0, 2**32 - 1)
DRAWS = st.builds(
    Draw,
    SEEDS,
    exponent=st.floats(-20, 20),
    spread=st.sampled_from([0.0, 4.0, 40.0]),
    zeros=st.sampled_from([0.0, 0.5, 0.9]),
)
# Without what a multiplication by a power of two would move out of range.
MODERATE = st.builds(
    Draw,
    SEEDS,
    exponent=st.floats(-15, 15),
    spread=st.just(0.0),
    zeros=st.sampled_from([0.0, 0.5]),
)
POWERS = st.integers(-3, 3)
# In units of the parameters.
RADII = st.floats(2.0**-10, 1.0, width=32)
# Their radius is relative to the parameters already.
RESCALED = {"asam", "vasso_asam", "lagged_buffered"}


def radius_of(name, params, on, radius=1.0):
    """The radius of a method, given in units of the parameters of a draw."""
    return np.float32(radius) if name in RESCALED else radius * params.length(on)


class Trained(NamedTuple):
    """What a training leaves: everything that a user sees of it."""

    params: Any
    clean: Any
    updates: Any


def gradient(params, center, curvature):
    """Of a bowl around the center of a step."""
    return jax.tree.map(
        lambda x, c: (jnp.asarray(curvature, x.dtype) * (x - c)).astype(x.dtype),
        params,
        center,
    )


def optimizer_of(name, rate, rho):
    base = optax.sgd(rate, momentum=0.9)
    return base if name == "base" else EVERY[name](base, rho=rho)


def step_of(optimizer, curvature):
    """One step as a loop would write it: carry, center -> carry, updates."""

    def step(carry, center):
        params, state = carry

        def grad_fn(params):
            return gradient(params, center, curvature)

        updates, state = optimizer.update(
            grad_fn(params), state, params, grad_fn=grad_fn
        )
        return (optax.apply_updates(params, updates), state), updates

    return step


@functools.cache
def training(name):
    """``(params, centers, rho, rate, curvature) -> Trained``, compiled per tree."""

    @jax.jit
    def run(params, centers, rho, rate, curvature):
        optimizer = optimizer_of(name, rate, rho)
        carry = params, optimizer.init(params)
        (params, state), updates = jax.lax.scan(
            step_of(optimizer, curvature), carry, centers
        )
        return Trained(params, ov.eval_params(state, params), updates)

    # Of one type whatever was drawn: a Python float would be another program.
    return lambda params, centers, *numbers: jax.tree.map(
        np.asarray, run(params, centers, *map(np.float32, numbers))
    )


def wide(leaf):
    """A leaf as float64 or complex128."""
    leaf = np.asarray(leaf)
    return leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)


def assert_close(actual, expected, on, times=1.0):
    """Equal up to rounding to the dtypes, in units of the largest entry."""
    pairs = [
        (wide(a), wide(e))
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    ]
    largest = max(np.max(abs(e), initial=0.0) for _, e in pairs)
    for a, e in pairs:
        # Not NumPy's assertions, which take longer than the training.
        apart = np.max(abs(a - e), initial=0.0)
        assert apart <= times * (ROUNDING[on] * largest + STEP.get(on, 0)), (a, e)


def assert_same(actual, expected):
    """Equal to the bit, but for the sign of zero; what is no number is equal, too."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(wide(a), wide(e), equal_nan=True), (a, e)


def assert_finite(tree):
    assert all(np.isfinite(wide(leaf)).all() for leaf in jax.tree.leaves(tree))


def times(factor, tree):
    return jax.tree.map(lambda leaf: (factor * wide(leaf)).astype(leaf.dtype), tree)


def permuted(seed, trees):
    """All entries of each tree in another order, across its leaves and containers.

    Leaves may have an axis of steps in front: one permutation serves all of them.
    """

    def shuffle(tree, like):
        leaves, structure = jax.tree.flatten(tree)
        shapes = [x.shape for x in jax.tree.leaves(like)]
        sizes = [math.prod(shape) for shape in shapes]
        lead = leaves[0].shape[: leaves[0].ndim - len(shapes[0])]
        flat = np.concatenate(
            [
                np.asarray(x).reshape((*lead, n))
                for x, n in zip(leaves, sizes, strict=True)
            ],
            axis=-1,
        )
        order = np.random.default_rng(seed).permutation(flat.shape[-1])
        parts = np.split(flat[..., order], np.cumsum(sizes)[:-1], axis=-1)
        return structure.unflatten(
            [x.reshape((*lead, *s)) for x, s in zip(parts, shapes, strict=True)]
        )

    return [shuffle(*pair) for pair in trees]


# The float32 tree serves comparisons of a wrapper with what it wraps, and of routes.
ALIKE = {name: same for name, (_, same) in WRAPPERS.items() if same}
# Of each kind of state one; with a gate, a wrapper, a radius of its own.
OF_ALL_KINDS = (
    "vasso",
    "friendly_sam",
    "looksam",
    "ae_sam",
    "held_rise",
    "lagged_vasso",
    "sampa",
    "skip_nonfinite",
)
# By default without the further compositions: compiling is most of the time.
METHODS, methods = on_trees(
    [name for name in EVERY if IS_THOROUGH or not name.startswith("vasso_")],
    always={*ALIKE, *OF_ALL_KINDS},
)
