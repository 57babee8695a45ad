"""Norms and projections of trees that neither overflow nor divide by zero.

Sums are taken in float32, or in the widest dtype of the tree where that is wider.
Complex leaves count by their modulus, as in :func:`optax.tree.norm`. ``None`` leaves
and masked nodes count nothing. Subnormal numbers count as zero where XLA flushes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
_WIDE = (jnp.float64, jnp.complex128)


def accumulation_dtype(*trees: PyTree) -> jnp.dtype:
    """The real dtype in which norms of these trees are summed: float32 or wider."""
    wide = any(jnp.result_type(x) in _WIDE for x in jax.tree.leaves(trees))
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def widen(leaf: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Cast a leaf to the real ``dtype``, or to its complex twin if it is complex."""
    return jnp.asarray(leaf, complex_twin(dtype) if jnp.iscomplexobj(leaf) else dtype)


def complex_twin(dtype: jnp.dtype) -> jnp.dtype:
    """The complex dtype whose parts have at least the precision of a real one."""
    return jnp.dtype(jnp.complex128 if dtype == jnp.float64 else jnp.complex64)


def widen_tree(tree: PyTree) -> PyTree:
    """Cast every leaf to the accumulation dtype of the tree, or its complex twin."""
    dtype = accumulation_dtype(tree)
    return jax.tree.map(lambda leaf: widen(leaf, dtype), tree)


def state_scalar(value: jax.typing.ArrayLike = 0.0) -> jax.Array:
    """A float scalar for a new state, in its own buffer, since states are donated."""
    return jnp.array(value, jax.dtypes.canonicalize_dtype(float))


def has_few_bits(leaf: jax.Array) -> bool:
    """Whether a leaf is a float of fewer than 32 bits, in which ε may vanish."""
    dtype = jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def round_to(wide: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Round to a dtype of fewer bits even where XLA would keep excess precision."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(wide, info.nexp, info.nmant)


def map_updates(function: Callable[..., Any], updates: PyTree, *rest: PyTree) -> PyTree:
    """Map over updates, some of which may be None, as in Optax."""
    return jax.tree.map(
        lambda leaf, *others: None if leaf is None else function(leaf, *others),
        updates,
        *rest,
        is_leaf=lambda leaf: leaf is None,
    )


def finite_or(newest: jax.Array, old: jax.Array) -> jax.Array:
    """Replace entries that are not finite in the dtype of ``old`` by those of ``old``.

    A non-finite entry would stay in an average for ever. Unlike a verdict on the whole
    tree, a selection of entries is fused into what reads them.
    """
    fits = jnp.isfinite(newest.astype(old.dtype))
    return jnp.where(fits, newest, old.astype(newest.dtype))


def cast_updates(updates: PyTree, like: PyTree) -> PyTree:
    """Each update in the dtype of that of ``like``; None where either is None."""
    return map_updates(
        lambda u, x: None if x is None else jnp.asarray(u, jnp.result_type(x)),
        updates,
        like,
    )


def cast_like(tree: PyTree, target: PyTree) -> PyTree:
    """Cast leaves to the dtypes of ``target``, whose leaves also replace None."""
    return jax.tree.map(
        lambda leaf, like: like if leaf is None else leaf.astype(like.dtype),
        tree,
        target,
        is_leaf=lambda leaf: leaf is None,
    )


def norm(tree: PyTree, p: float = 2.0) -> jax.Array:
    """The p-norm of all entries of a tree.

    Args:
      tree: a tree of float or complex arrays.
      p: the order, 1 <= p <= infinity.

    Returns:
      A scalar in the accumulation dtype; finite whenever the norm itself is, and with
      a derivative of zero at zero.
    """
    if p == math.inf:
        return _largest(tree)
    if p == 2:
        root, factor = _scaled_norm(tree)
        return root / factor
    # The largest entry is one, so the power sum is neither infinite nor zero.
    total = _power_sum(scale_to_one(tree), p)
    return jax.lax.stop_gradient(_largest(tree)) * _power(total, 1 / p)


def normalize(tree: PyTree, length: jax.typing.ArrayLike = 1.0) -> PyTree:
    """The tree at another 2-norm, in the accumulation dtype; zero stays zero."""
    root, factor = _scaled_norm(tree)
    return _unit(tree, root, factor, length)


def normalize_beside(tree: PyTree, beside: PyTree) -> tuple[PyTree, jax.Array, PyTree]:
    """The unit tree, the norm, and ``beside``, computed before the norm.

    XLA would compute ``beside`` where it is used and keep its inputs until then.
    Passing it through the loop of the norm makes XLA keep the result instead.
    """
    root, factor, beside = _scaled_norm_beside(tree, beside)
    norm = jnp.minimum(root / factor, jnp.finfo(root.dtype).max)
    return _unit(tree, root, factor), norm, beside


def scale_to_one(tree: PyTree) -> PyTree:
    """The tree divided by its largest abs(entry), which counts as a constant."""
    # Divide twice by its root, whose inverse is in range. The scalar ends in a division
    # because XLA computes one once: it would repeat a selection or a product, and the
    # whole reduction before it, in the program of every leaf.
    inverse = 1 / jnp.sqrt(_nonzero(jax.lax.stop_gradient(_largest(tree))))
    return jax.tree.map(lambda leaf: leaf * inverse * inverse, widen_tree(tree))


def dual_direction(
    tree: PyTree, p: jax.typing.ArrayLike, length: jax.typing.ArrayLike = 1.0
) -> PyTree:
    """The maximizer u of ⟨tree, u⟩ under ‖u‖_p ≤ length, for 1 < p <= infinity.

    u = length · sign(d) abs(d)^{q−1} / (‖d‖_q^q)^{1/p} with 1/p + 1/q = 1; zero stays
    zero.
    """
    q: Any
    if isinstance(p, jax.Array):  # as optax.inject_hyperparams passes it
        q = jnp.where(jnp.isinf(p), 1, p / (p - 1))
    elif p == 2:
        return normalize(tree, length)
    else:
        q = 1.0 if p == math.inf else p / (p - 1)
    relative = scale_to_one(tree)
    scale = length / _nonzero(_power(_power_sum(relative, q), 1 / p))
    return jax.tree.map(
        lambda d: jnp.sign(d) * _power(jnp.abs(d), q - 1) * scale, relative
    )


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """The real inner product of two trees, a scalar; no guard for overflow."""
    dtype = accumulation_dtype(a, b)

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = widen(x, dtype), widen(y, dtype)
        if jnp.iscomplexobj(x) or jnp.iscomplexobj(y):
            return jnp.sum(jnp.real(jnp.conj(x) * y))
        # Not jnp.vdot: it flattens, which would gather a sharded leaf.
        return jnp.sum(x * y)

    return _over_leaves(jnp.sum, product, a, b)


def cosine(a: PyTree, b: PyTree) -> jax.Array:
    """The cosine of the angle between two trees, a scalar; 0 if either is zero."""
    # Scaled by a power of two that is usually one; unit trees would be copies.
    (root_a, factor_a), (root_b, factor_b) = _scaled_norm(a), _scaled_norm(b)
    inner = dot(_scaled(a, factor_a), _scaled(b, factor_b))
    return jnp.clip(inner / _nonzero(root_a) / _nonzero(root_b), -1, 1)


def orthogonal_to(a: PyTree, b: PyTree) -> PyTree:
    """The component of ``a`` orthogonal to ``b``, leafwise in the dtypes of ``a``.

    a − ⟨a, b̂⟩ b̂ with b̂ the unit tree along ``b``; ``a`` itself if ``b`` is zero.
    """
    return without(a, b, overlap(a, b))


def overlap(a: PyTree, b: PyTree) -> tuple[jax.Array, ...]:
    """Scalars for :func:`without`, whose product is ⟨a, b⟩/‖b‖²."""
    dtype = accumulation_dtype(a, b)
    (_, factor_a), (root, factor_b) = _scaled_norm(a), _scaled_norm(b)
    factor_a, factor_b, root = (s.astype(dtype) for s in (factor_a, factor_b, root))

    product = _scaled_dot(a, b, factor_a, factor_b)
    inverse = 1 / _nonzero(root)
    return factor_b, inverse, product * inverse / factor_a


def without(a: PyTree, b: PyTree, scalars: tuple[jax.Array, ...]) -> PyTree:
    """``a`` without its component along ``b``, leafwise in the dtypes of ``a``."""
    dtype = scalars[0].dtype

    def rest(x: jax.Array, y: jax.Array) -> jax.Array:
        y = widen(y, dtype)
        # In turn, since their product may be out of range.
        for scalar in scalars:
            y = y * scalar
        return (widen(x, dtype) - y).astype(x.dtype)

    return jax.tree.map(rest, a, b)


def add_scaled(tree: PyTree, weight: jax.typing.ArrayLike, other: PyTree) -> PyTree:
    """Compute tree + weight · other in float32 or wider; dtypes are those of tree."""
    dtype = accumulation_dtype(tree, other)
    return map_updates(
        lambda x, y: (
            widen(x, dtype) + jnp.asarray(weight, dtype) * widen(y, dtype)
        ).astype(x.dtype),
        tree,
        other,
    )


def difference(a: PyTree, b: PyTree) -> PyTree:
    """The tree a − b in float32 or wider, since it may leave the range of float16."""
    return map_updates(jnp.subtract, *map(widen_tree, (a, b)))


@jax.custom_jvp
def _scaled_dot(
    a: PyTree, b: PyTree, factor_a: jax.Array, factor_b: jax.Array
) -> jax.Array:
    """⟨factor_a · a, factor_b · b⟩, in a second pass if a factor is not one.

    XLA would store scaled trees in the first pass.
    """

    def in_one_pass() -> jax.Array:
        return dot(_scaled(a, factor_a), _scaled(b, factor_b))

    def in_a_loop() -> jax.Array:
        _, product = jax.lax.while_loop(
            lambda carry: carry[0],
            lambda carry: (jnp.zeros_like(carry[0]), in_one_pass()),
            ((factor_a != 1) | (factor_b != 1), dot(a, b)),
        )
        return product

    return _without_waiting(in_one_pass, in_a_loop)


@_scaled_dot.defjvp
def _scaled_dot_jvp(primals: Any, tangents: Any) -> Any:
    """The factors count as constants."""
    a, b, factor_a, factor_b = primals
    da, db, *_ = tangents
    slope = dot(_scaled(da, factor_a), _scaled(b, factor_b)) + dot(
        _scaled(a, factor_a), _scaled(db, factor_b)
    )
    product = _scaled_dot(*primals)
    return product, slope.astype(product.dtype)


def _over_leaves(
    reduction: Callable[[jax.Array], jax.Array],
    function: Callable[..., jax.Array],
    tree: PyTree,
    *rest: PyTree,
) -> jax.Array:
    """Stack one scalar per leaf into a vector and reduce it.

    XLA compiles a chain of scalar operations, one per leaf, in more than linear time,
    and does not merge its collectives.
    """
    scalars = jax.tree.leaves(
        jax.tree.map(
            lambda *leaves: (
                None if any(x is None for x in leaves) else function(*leaves)
            ),
            tree,
            *rest,
            is_leaf=lambda leaf: leaf is None,
        )
    )
    if not scalars:
        return jnp.zeros((), accumulation_dtype(tree, *rest))
    return reduction(jnp.stack(scalars))


def _scaled_norm(tree: PyTree) -> tuple[jax.Array, jax.Array]:
    """(‖factor · tree‖₂, factor); a power of two keeps the sum of squares in range."""
    root, factor, _ = _scaled_norm_beside(tree, ())
    return root, factor


def _without_waiting(
    on_gpu: Callable[..., Any], elsewhere: Callable[..., Any], *args: Any
) -> Any:
    """Choose one of two equivalent computations by the platform it is lowered for.

    In a loop of unknown length the host of a GPU waits for the device before each
    round. There, more arithmetic on data that is read anyway costs nothing; elsewhere
    a second pass, which is rarely needed, costs less.
    """
    return jax.lax.platform_dependent(
        *args, cuda=on_gpu, rocm=on_gpu, default=elsewhere
    )


@jax.custom_jvp
def _rescaled_norm(tree: PyTree, beside: PyTree) -> tuple[jax.Array, jax.Array, PyTree]:
    """:func:`_scaled_norm` and a tree that passes through its loop.

    The factor is one unless the sum of squares leaves the range in which it is exact;
    then a second pass uses another factor. The first pass, without a factor so that XLA
    can fuse it with what computes the tree, stands before the loop, which runs once or
    not at all. Unlike a branch, a loop is skipped under :func:`jax.vmap` too.
    """
    dtype = accumulation_dtype(tree)
    info = jnp.finfo(dtype)
    # A smaller sum may consist of entries whose squares vanish.
    smallest = 2.0 ** (info.minexp + 66)
    # The square of ``up`` is finite: XLA forms it where a leaf is constant, and zero
    # times it has to be zero.
    up, down = 2.0 ** (info.maxexp // 2 - 1), 2.0 ** (-2 * info.maxexp // 3)
    one = jnp.ones((), dtype)

    def square_sum(
        factor: jax.Array | None = None, *, is_known: bool = False
    ) -> jax.Array:
        def of_leaf(leaf: jax.Array) -> jax.Array:
            parts = [leaf.real, leaf.imag] if jnp.iscomplexobj(leaf) else [leaf]
            if is_known:
                # XLA would move the factor out of the square, where both overflow.
                parts = [jnp.clip(part, -info.max, info.max) for part in parts]
            first, *rest = (part * part for part in parts)
            return jnp.sum(sum(rest, first))

        scaled = widen_tree(tree) if factor is None else _scaled(tree, factor)
        return _over_leaves(jnp.sum, of_leaf, scaled)

    total = square_sum()
    is_large = total > float(info.max)
    again = is_large | (total < smallest)
    factor = jnp.where(again, jnp.where(is_large, one * down, one * up), one)

    def in_a_loop(beside: PyTree, total: jax.Array) -> tuple[PyTree, jax.Array]:
        beside, _, total = jax.lax.while_loop(
            lambda carry: carry[1],
            lambda carry: (
                # JAX moves out of a loop what it leaves unchanged.
                jax.lax.optimization_barrier(carry[0]),
                # Typed as the predicate, which may vary under shard_map.
                jnp.zeros_like(carry[1]),
                square_sum(factor),
            ),
            (beside, again, total),
        )
        return beside, total

    def in_one_pass(beside: PyTree, total: jax.Array) -> tuple[PyTree, jax.Array]:
        less, more = (square_sum(f * one, is_known=True) for f in (down, up))
        scaled = jnp.where(is_large, less, more)
        return jax.lax.optimization_barrier((beside, jnp.where(again, scaled, total)))

    beside, total = _without_waiting(in_one_pass, in_a_loop, beside, total)
    return jnp.sqrt(total), factor, beside


@_rescaled_norm.defjvp
def _rescaled_norm_jvp(primals: Any, tangents: Any) -> Any:
    """d‖f x‖ = f ⟨x/‖x‖, dx⟩, and 0 at x = 0; the factor counts as a constant."""
    (tree, beside), (tangent, beside_tangent) = primals, tangents
    root, factor, beside = _rescaled_norm(tree, beside)
    slope = factor * dot(_unit(tree, root, factor), tangent)
    return (root, factor, beside), (
        slope.astype(root.dtype),
        jnp.zeros_like(factor),
        beside_tangent,
    )


# Outside of jit a loop would be compiled anew at every call; inlined it is no call.
_scaled_norm_beside = jax.jit(_rescaled_norm, inline=True)


def _unit(
    tree: PyTree,
    root: jax.Array,
    factor: jax.Array,
    length: jax.typing.ArrayLike = 1.0,
) -> PyTree:
    """The tree at a length, given its norm as :func:`_scaled_norm` returns it."""
    # Zero for a zero tree, so that derivatives there are zero and not huge. A division
    # comes last, as in scale_to_one.
    scale = jnp.where(root == 0, 0, jnp.asarray(length, root.dtype)) / _nonzero(root)
    # In turn, since their product may be out of range.
    return jax.tree.map(lambda leaf: leaf * factor * scale, widen_tree(tree))


def _scaled(tree: PyTree, factor: jax.Array) -> PyTree:
    # A factor of its own for each leaf: what XLA sees that leaves share, it stores, and
    # at the size of a leaf.
    factors = jax.lax.optimization_barrier(jax.tree.map(lambda _: factor, tree))
    return jax.tree.map(jnp.multiply, widen_tree(tree), factors)


def _nonzero(scalar: jax.Array) -> jax.Array:
    """One in place of zero: a divisor that turns 0/0 into 0."""
    return jnp.where(scalar == 0, 1, scalar)


def _largest(tree: PyTree) -> jax.Array:
    """The largest abs(entry)."""
    dtype = accumulation_dtype(tree)
    return _over_leaves(
        jnp.max, lambda leaf: jnp.max(abs(widen(leaf, dtype)), initial=0.0), tree
    )


def _power_sum(tree: PyTree, q: jax.typing.ArrayLike) -> jax.Array:
    """The sum of abs(leaf)**q over all entries; no guard for overflow."""
    return _over_leaves(jnp.sum, lambda leaf: jnp.sum(_power(jnp.abs(leaf), q)), tree)


def _power(base: jax.Array, exponent: jax.typing.ArrayLike) -> jax.Array:
    """A power of a base >= 0; at zero, the value and its derivative are zero."""
    exponent = jnp.asarray(exponent, base.dtype)
    return jnp.where(base == 0, 0, _nonzero(base) ** exponent)
