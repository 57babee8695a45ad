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

PyTree = Any
_WIDE = (jnp.float64, jnp.complex128)


def accumulation_dtype(*trees: PyTree) -> jnp.dtype:
    """The real dtype in which norms of these trees are summed: float32 or wider."""
    wide = any(leaf.dtype in _WIDE for leaf in jax.tree.leaves(trees))
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def widen(leaf: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Cast a leaf to the real ``dtype``, or to its complex twin if it is complex."""
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return leaf.astype(jnp.complex128 if dtype == jnp.float64 else jnp.complex64)
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


def fill_none(tree: PyTree, target: PyTree) -> PyTree:
    """:func:`cast_like`, and the leaf of ``target`` where that of ``tree`` is None."""
    return jax.tree.map(
        lambda leaf, like: like if leaf is None else leaf.astype(like.dtype),
        tree,
        target,
        is_leaf=lambda leaf: leaf is None,
    )


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

    Returns:
      The scaled tree in the accumulation dtype, its largest magnitude in [1, 4) or,
      for a zero tree, 0; and the scalar that it was multiplied by.
    """
    factor = _factor_to_one(max_abs(tree))
    return jax.tree.map(lambda leaf: leaf * factor, widen_tree(tree)), factor


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
    total, factor = _scaled_power_sum(tree, p)
    return total ** (1 / p) / factor


def normalize(tree: PyTree) -> PyTree:
    """The tree divided by its 2-norm, in the accumulation dtype; zero stays zero."""
    total, factor = _scaled_power_sum(tree, 2)
    inverse = 1 / _nonzero(jnp.sqrt(total))
    # One after the other: their product may be out of range.
    return jax.tree.map(lambda leaf: leaf * factor * inverse, widen_tree(tree))


def dual_direction(tree: PyTree, p: float) -> PyTree:
    """The maximizer u of ⟨tree, u⟩ under ‖u‖_p ≤ 1, for 1 < p <= infinity.

    u = sign(d) abs(d)^{q−1} / (‖d‖_q^q)^{1/p} with 1/p + 1/q = 1; zero stays zero.
    """
    q = 1.0 if p == math.inf else p / (p - 1)
    total, factor = _scaled_power_sum(tree, q)
    inverse = 1 / _nonzero(total ** (1 / p))
    return jax.tree.map(
        lambda d: jnp.sign(d) * (jnp.abs(d) * factor) ** (q - 1) * inverse,
        widen_tree(tree),
    )


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
    return dot(normalize(a), normalize(b))


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


def _factor_to_one(magnitude: jax.Array) -> jax.Array:
    """The power of two that brings a magnitude near one.

    A power of two, because that multiplication is exact and because its reciprocal
    never leaves the range: XLA divides by multiplying with the reciprocal, which for
    a divisor near the top of the range is subnormal and flushed to zero.
    """
    dtype = magnitude.dtype
    integers = jnp.int64 if dtype == jnp.float64 else jnp.int32
    # Infinity is the number whose exponent bits are all set, and no others.
    exponent_bits = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, dtype), integers)
    bits = jax.lax.bitcast_convert_type(magnitude, integers) & exponent_bits
    power = jax.lax.bitcast_convert_type(bits, dtype)
    largest = 2.0 ** (jnp.finfo(dtype).maxexp - 2)
    return 1 / jnp.clip(power, 1 / largest, largest)


def _scaled_power_sum(tree: PyTree, q: float) -> tuple[jax.Array, jax.Array]:
    """The sum of abs(factor · leaf)**q over all entries, and that factor.

    Each leaf is summed with a factor of its own: its sum need not wait for the largest
    magnitude of the tree, and a backward pass no second copy of the gradient.
    """
    dtype = accumulation_dtype(tree)
    leaves = jax.tree.leaves(widen_tree(tree))
    largest = [max_abs(leaf) for leaf in leaves]
    zero = jnp.zeros((), dtype)
    factor = _factor_to_one(functools.reduce(jnp.maximum, largest, zero))
    total = zero
    for leaf, magnitude in zip(leaves, largest, strict=True):
        own = _factor_to_one(magnitude)
        scaled = leaf * own
        part = dot(scaled, scaled) if q == 2 else jnp.sum(jnp.abs(scaled) ** q)
        total += part * (factor / own) ** q
    return total, factor
