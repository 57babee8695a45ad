"""Checks of the arguments of measures.

Each raises a ValueError that names the argument, the value and the remedy in one
sentence. Traced values pass.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial, keystr, tree_leaves_with_path

from optax_vasso._internal import checks
from optax_vasso._internal.checks import shown
from optax_vasso.sharpness import programs

PyTree = Any


def check_positive(name: str, value: Any) -> None:
    """Refuse a radius or width that is not a positive finite number."""
    checks.check_number(
        name, value, "a positive finite number", lambda v: 0 < v < math.inf
    )


def count(name: str, value: Any, low: int) -> int:
    """A number of samples, steps or products, as an integer."""
    checks.check_integer(name, value, low)
    return int(value)


def key_or_default(key: Any) -> jax.Array:
    """The random key that was passed, or ``jax.random.key(0)`` for None."""
    if key is None:
        return jax.random.key(0)
    is_raw = _is_array(key) and key.dtype == jnp.uint32 and key.ndim == 1
    if is_raw or (_is_array(key) and checks.is_key(key) and key.ndim == 0):
        return key
    raise ValueError(
        f"key must be one random key, as jax.random.key(0) makes it, got {shown(key)}."
    )


def as_partial(name: str, function: Any) -> Partial:
    """A function as a tree whose leaves are the arrays that a Partial binds.

    Raises:
      ValueError: for what is not a function, and for a Partial that binds anything but
        arrays and numbers.
    """
    if not callable(function):
        raise ValueError(
            f"{name} must be a function, got {shown(function)}: check the order of the"
            " arguments."
        )
    if not isinstance(function, Partial):
        return Partial(function)
    for path, leaf in tree_leaves_with_path(function):
        if not _is_array(leaf) and not isinstance(leaf, bool | int | float | complex):
            raise ValueError(
                f"{name} binds {shown(leaf)} at {keystr(path)}: bind arrays alone with"
                " jax.tree_util.Partial, and close over everything else."
            )
    return function


def check_float_params(name: str, params: PyTree) -> None:
    """Refuse parameters on which nothing can be measured.

    Raises:
      ValueError: if there are none, a leaf is not float32 or float64 (half precision
        rounds perturbations away), or a known value is infinite or NaN.
    """
    leaves = {f"{name}{keystr(path)}": x for path, x in tree_leaves_with_path(params)}
    if not leaves:
        raise ValueError(f"{name} holds no arrays: pass the parameters to measure at.")
    for path, leaf in leaves.items():
        if not _is_array(leaf):
            raise ValueError(
                f"{path} has type {type(leaf).__name__} and is no array: pass {name} as"
                " a tree of float32 or float64 arrays."
            )
        if leaf.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"{path} has dtype {leaf.dtype}: sharpness is measured in float32 or"
                " float64, so cast half precision up, and bind what is not trained to"
                " the loss with jax.tree_util.Partial."
            )
    _check_entries(
        leaves, jnp.isfinite, "NaN or infinite: measure where all are finite"
    )


def check_like(name: str, tree: PyTree, params: PyTree) -> None:
    """Refuse a direction, a perturbation or a scale that is not like the parameters."""
    structure: Any = jax.tree.structure(params)
    if jax.tree.structure(tree) != structure:
        raise ValueError(
            f"{name} has another tree structure than params"
            f" ({checks.tree_difference(tree, params)}): pass a tree like params."
        )
    leaves = zip(tree_leaves_with_path(tree), jax.tree.leaves(params), strict=True)
    for (path, leaf), like in leaves:
        if jnp.shape(leaf) != jnp.shape(like) or jnp.iscomplexobj(leaf):
            kind = "complex " if jnp.iscomplexobj(leaf) else ""
            raise ValueError(
                f"{name}{keystr(path)} has the {kind}shape {jnp.shape(leaf)}, but"
                f" params{keystr(path)} has {jnp.shape(like)} and is real: pass a tree"
                " like params."
            )


def check_scale(scale: PyTree, params: PyTree) -> None:
    """Refuse scales of a ball that are negative or not like the parameters."""
    check_like("scale", scale, params)
    leaves = {f"scale{keystr(path)}": x for path, x in tree_leaves_with_path(scale)}
    what = "negative, NaN or infinite: pass scales >= 0, as the magnitudes of params"
    _check_entries(leaves, _is_scale, what)


def check_batch(name: str, batch: PyTree) -> None:
    """Refuse what is not a tree of arrays with the same number of rows, one or more."""
    if isinstance(batch, list):
        raise ValueError(
            f"{name} is a list, which may be one batch or several: pass one batch as a"
            " tuple, a dictionary or an array, and several as"
            " sharpness.stack_batches(...)."
        )
    leaves = {f"{name}{keystr(path)}": x for path, x in tree_leaves_with_path(batch)}
    if not leaves:
        raise ValueError(
            f"{name} holds no arrays: pass at least one, or None as the data of a loss"
            " that takes none."
        )
    for path, leaf in leaves.items():
        if not _is_array(leaf):
            raise ValueError(
                f"{path} has type {type(leaf).__name__} and is no array: pass one batch"
                " as a tuple or a dictionary of arrays with one row per example, and"
                " several as sharpness.stack_batches(...)."
            )
    # The first array with an axis says how many rows there are.
    first = next((path for path, leaf in leaves.items() if leaf.shape), "")
    rows = leaves[first].shape[0] if first else None
    for path, leaf in leaves.items():
        if not leaf.shape or leaf.shape[0] != rows:
            other = f", but {first} has {rows} rows" if first else ""
            raise ValueError(
                f"{path} has shape {leaf.shape}{other}: every array of a batch has one"
                " row per example; bind what is not per example to the loss with"
                " jax.tree_util.Partial."
            )
    if rows == 0:
        raise ValueError(
            f"{first} has shape {leaves[first].shape}, no examples: pass at least one."
        )


def check_loss(loss: Partial, params: PyTree, batch: PyTree) -> None:
    """Refuse a loss that is not one real number of parameters and a batch."""
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):  # some callables in C have none
        signature = None
    if signature is not None:
        try:
            signature.bind(params, batch)
        except TypeError as error:
            raise ValueError(
                f"loss_fn must be called as loss_fn(params, batch), but {error}: write"
                " one that takes these two, and bind the rest with"
                " jax.tree_util.Partial."
            ) from None
    weak, functions = programs.weakened((loss, params, batch))
    # A jitted call is traced once, whatever values the Partials bind.
    call = programs.kept_with(functions).setdefault(
        check_loss, jax.jit(lambda loss, *args: loss(*args))
    )
    value = jax.eval_shape(call, *weak)
    if not isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(
            "loss_fn must return the loss alone, a scalar, but returned"
            f" a {type(value).__name__}: leave auxiliary outputs out."
        )
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            "loss_fn must return a real scalar, the mean over the batch, but"
            f" returned an array of shape {value.shape} and dtype {value.dtype}."
        )


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_scale(entries: jax.Array) -> jax.Array:
    return jnp.isfinite(entries) & (entries >= 0)


def _check_entries(leaves: dict[str, Any], is_allowed: Any, what: str) -> None:
    """Raise a ValueError for a leaf, other than a tracer, with an entry not allowed."""
    known = {k: v for k, v in leaves.items() if not isinstance(v, jax.core.Tracer)}
    with jax.ensure_compile_time_eval():
        for path, flag in _are_allowed(is_allowed, known).items():
            if not flag:
                raise ValueError(f"{path} has entries that are {what}.")


@functools.partial(jax.jit, static_argnums=0)
def _are_allowed(is_allowed: Any, leaves: dict[str, Any]) -> dict[str, jax.Array]:
    return {name: is_allowed(leaf).all() for name, leaf in leaves.items()}
