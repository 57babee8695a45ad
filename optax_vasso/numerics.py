"""Norms and projections of trees that neither overflow nor divide by zero.

Every function accumulates in float32, or in the widest dtype of the tree where that
is wider, after dividing by the largest magnitude: the square of a float16 entry of
300 or of a float32 entry of 1e30 is never formed. Complex leaves count by their
modulus, as in :func:`optax.tree.norm`. ``None`` leaves and masked nodes hold nothing
and count nothing. Subnormal numbers count as zero where XLA flushes them to zero.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def accumulation_dtype(*trees: PyTree) -> jnp.dtype:
    """The real dtype in which norms of these trees are summed: float32 or wider."""
    dtypes = (jnp.real(leaf).dtype for leaf in jax.tree.leaves(trees))
    # NumPy's promotion: that of JAX refuses float32 with float64 where it is strict.
    return functools.reduce(np.promote_types, dtypes, jnp.dtype(jnp.float32))


def widen(leaf: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Cast a leaf to the real ``dtype``, or to its complex twin if it is complex."""
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return leaf.astype(jnp.promote_types(dtype, jnp.complex64))
    return leaf.astype(dtype)


def widen_tree(tree: PyTree) -> PyTree:
    """Cast every leaf to the accumulation dtype of the tree, or its complex twin."""
    dtype = accumulation_dtype(tree)
    return jax.tree.map(lambda leaf: widen(leaf, dtype), tree)


def map_updates(function: Callable[..., Any], updates: PyTree, *rest: PyTree) -> PyTree:
    """Map over the updates that are there: an update may be None, as in Optax."""
    return jax.tree.map(
        lambda leaf, *others: None if leaf is None else function(leaf, *others),
        updates,
        *rest,
        is_leaf=lambda leaf: leaf is None,
    )


def cast_like(tree: PyTree, target: PyTree) -> PyTree:
    """Cast each leaf of ``tree`` to the dtype of the same leaf of ``target``."""
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, target)


def max_abs(tree: PyTree) -> jax.Array:
    """The largest magnitude in the tree, a scalar; 0 for a tree without leaves."""
    dtype = accumulation_dtype(tree)
    largest = [
        jnp.max(jnp.abs(widen(leaf, dtype)), initial=0.0)
        for leaf in jax.tree.leaves(tree)
    ]
    return functools.reduce(jnp.maximum, largest, jnp.zeros((), dtype))


def scale_to_one(tree: PyTree) -> tuple[PyTree, jax.Array]:
    """Multiply a tree by the power of two that brings its largest magnitude near one.

    A power of two, because that multiplication is exact and because its reciprocal
    never leaves the range: XLA divides by multiplying with the reciprocal, which for
    a divisor near the top of the range is subnormal and flushed to zero.

    Returns:
      The scaled tree in the accumulation dtype, its largest magnitude in [1/2, 4] or,
      for a zero tree, 0; and the scalar that it was multiplied by.
    """
    dtype = accumulation_dtype(tree)
    _, exponent = jnp.frexp(max_abs(tree))
    limit = jnp.finfo(dtype).maxexp - 2
    factor = jnp.ldexp(jnp.ones((), dtype), -jnp.clip(exponent, -limit, limit))
    return jax.tree.map(lambda leaf: leaf * factor, widen_tree(tree)), factor


def power_sum(tree: PyTree, q: float) -> jax.Array:
    """The sum of abs(leaf)**q over all entries, a scalar; no guard for overflow."""
    if q == 2:
        return dot(tree, tree)
    sums = [jnp.sum(jnp.abs(leaf) ** q) for leaf in jax.tree.leaves(tree)]
    return functools.reduce(jnp.add, sums, jnp.zeros((), accumulation_dtype(tree)))


def norm(tree: PyTree, p: float = 2.0) -> jax.Array:
    """The p-norm of all entries of a tree.

    Args:
      tree: a tree of float or complex arrays.
      p: the order, 1 <= p <= infinity.

    Returns:
      A scalar in the accumulation dtype; finite whenever the norm itself is.
    """
    if p == math.inf:
        return max_abs(tree)
    scaled, factor = scale_to_one(tree)
    return power_sum(scaled, p) ** (1 / p) / factor


def normalize(tree: PyTree) -> PyTree:
    """The tree divided by its 2-norm, in the accumulation dtype; zero stays zero."""
    scaled, _ = scale_to_one(tree)
    divisor = _nonzero(jnp.sqrt(power_sum(scaled, 2)))
    return jax.tree.map(lambda leaf: leaf / divisor, scaled)


def dual_direction(tree: PyTree, p: float) -> PyTree:
    """The maximizer u of ⟨tree, u⟩ under ‖u‖_p ≤ 1, for 1 < p <= infinity.

    u = sign(d) abs(d)^{q−1} / (‖d‖_q^q)^{1/p} with 1/p + 1/q = 1; zero stays zero.
    """
    q = 1.0 if p == math.inf else p / (p - 1)
    scaled, _ = scale_to_one(tree)
    divisor = _nonzero(power_sum(scaled, q) ** (1 / p))
    return jax.tree.map(lambda d: jnp.sign(d) * jnp.abs(d) ** (q - 1) / divisor, scaled)


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """The real inner product of two trees, a scalar; no guard for overflow."""
    dtype = accumulation_dtype(a, b)
    products = jax.tree.map(
        # Not jnp.vdot: it flattens, which would gather a sharded leaf.
        lambda x, y: jnp.sum(jnp.real(jnp.conj(widen(x, dtype)) * widen(y, dtype))),
        a,
        b,
    )
    return functools.reduce(jnp.add, jax.tree.leaves(products), jnp.zeros((), dtype))


def cosine(a: PyTree, b: PyTree) -> jax.Array:
    """The cosine of the angle between two trees, a scalar; 0 if either is zero."""
    a, _ = scale_to_one(a)
    b, _ = scale_to_one(b)
    lengths = jnp.sqrt(power_sum(a, 2)) * jnp.sqrt(power_sum(b, 2))
    return dot(a, b) / _nonzero(lengths)


def orthogonal_to(a: PyTree, b: PyTree) -> PyTree:
    """The component of ``a`` orthogonal to ``b``, leafwise in the dtypes of ``a``.

    a − ⟨a, b̂⟩ b̂ with b̂ the unit tree along ``b``; ``a`` itself if ``b`` is zero.
    """
    unit = normalize(b)
    scaled, factor = scale_to_one(a)
    length = dot(scaled, unit)
    rest = jax.tree.map(lambda x, u: (x - length * u) / factor, scaled, unit)
    return cast_like(rest, a)


def _nonzero(scalar: jax.Array) -> jax.Array:
    """A divisor that turns 0/0 into 0: one in place of zero."""
    return jnp.where(scalar == 0, 1, scalar)
