"""Mapped axes over which a value varies, that is, differs between devices.

Inside :func:`jax.shard_map` the type of a value says over which axes it *varies*, and
over which it is *invariant*. Under :func:`jax.vmap`, :func:`jax.pmap` and
``check_vma=False`` every value counts as invariant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_vasso._internal import numerics

PyTree = Any
AxisName = str | tuple[str, ...]


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """A name or a tuple of names as a tuple."""
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def varying_axes(tree: PyTree) -> frozenset[str]:
    """The axes over which a leaf of the tree varies."""
    return frozenset[str]().union(*(_axes(leaf) for leaf in jax.tree.leaves(tree)))


def tracked_axes(axis_name: AxisName) -> frozenset[str]:
    """The axes on which JAX tracks what varies."""
    return varying_axes([jax.lax.axis_index(name) for name in axis_names(axis_name)])


def vary(tree: PyTree, axes: frozenset[str]) -> PyTree:
    """The tree, typed as varying over the axes."""
    return jax.tree.map(lambda leaf: _vary(leaf, axes), tree) if axes else tree


def vary_like(tree: PyTree, like: PyTree) -> PyTree:
    """The tree, each leaf typed as varying over the axes of that of ``like``.

    So a state keeps its types even where a constant has replaced a value.
    """
    # Optax's states may hold None where an update was None.
    return numerics.map_updates(
        lambda leaf, other: _vary(leaf, _axes(other)), tree, like
    )


def zeros_like(shape: jax.ShapeDtypeStruct, dtype: Any = None) -> jax.Array:
    """Zeros of a type that :func:`jax.eval_shape` has found.

    :func:`jax.numpy.zeros_like` fails on a mesh with both mapped and other axes, since
    the type has no mesh.
    """
    plain = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shape.sharding)
    return _vary(jnp.zeros_like(plain, dtype), _type_axes(shape))


def disagreement(
    value: jax.Array | bool, params: PyTree, axis_name: AxisName | None = None
) -> tuple[str, ...]:
    """The axes over which devices must agree on a decision about their parameters.

    These are the named axes, and those over which the value varies but the parameters,
    if given, do not.
    """
    named = () if axis_name is None else axis_names(axis_name)
    found = frozenset() if params is None else _axes(value) - varying_axes(params)
    return (*named, *sorted(found.difference(named)))


def cond(
    predicate: jax.Array | bool,
    true_fn: Callable[[], PyTree],
    false_fn: Callable[[], PyTree],
) -> PyTree:
    """:func:`jax.lax.cond` whose branches may vary over different axes.

    JAX requires equal types of the branches, and does not consider that the result
    varies over the axes of the predicate too.
    """
    if not _is_any_axis_tracked():
        return jax.lax.cond(predicate, true_fn, false_fn)
    chosen = _axes(predicate)
    axes = [
        chosen.union(*map(_type_axes, types))
        for types in zip(
            *(jax.make_jaxpr(branch)().out_avals for branch in (true_fn, false_fn)),
            strict=True,
        )
    ]

    def widened(branch: Callable[[], PyTree]) -> PyTree:
        leaves, structure = jax.tree.flatten(branch())
        return jax.tree.unflatten(structure, map(_vary, leaves, axes))

    return jax.lax.cond(
        predicate,
        functools.partial(widened, true_fn),
        functools.partial(widened, false_fn),
    )


def _is_any_axis_tracked() -> bool:
    manual: tuple[str, ...] = jax.sharding.get_abstract_mesh().manual_axes
    return bool(tracked_axes(manual))


def _axes(leaf: Any) -> frozenset[str]:
    # A model that nobody filtered has functions among its leaves.
    return frozenset() if callable(leaf) else _type_axes(jax.typeof(leaf))


def _type_axes(kind: Any) -> frozenset[str]:
    # JAX has renamed the attribute, and pvary to pcast.
    axes = getattr(kind, "vma", None)
    if axes is None:
        axes = getattr(getattr(kind, "manual_axis_type", None), "varying", None)
    return axes or frozenset()


def _vary(leaf: Any, axes: frozenset[str]) -> Any:
    missing = tuple(sorted(axes - _axes(leaf)))
    if not missing:
        return leaf
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(leaf, missing, to="varying")
    return jax.lax.pvary(leaf, missing)  # type: ignore[attr-defined]
