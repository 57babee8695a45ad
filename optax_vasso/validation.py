"""Hyperparameters and trees that come in: what they are, and checks that say so.

Each check names the argument, the value and the remedy. Of hyperparameters only
Python and NumPy numbers are checked: a schedule has no value yet, and neither has an
array that may be traced.
"""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any
Hyperparameter = jax.typing.ArrayLike | Callable[[jax.Array], jax.typing.ArrayLike]


def check_hyperparameter(
    name: str, value: Hyperparameter, allowed: str, is_allowed: Callable[[Any], bool]
) -> None:
    """Raise a ValueError if ``value`` is a number for which ``is_allowed`` fails."""
    if callable(value) or isinstance(value, jax.Array):
        return
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real) or not is_allowed(value):
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")


def value_at(hyperparameter: Hyperparameter, count: jax.Array) -> jax.typing.ArrayLike:
    """The value of a number, an array or a schedule at a step."""
    return hyperparameter(count) if callable(hyperparameter) else hyperparameter


def check_not_negative(name: str, value: Hyperparameter) -> None:
    """A radius or a weight is a finite number that is not negative."""
    check_hyperparameter(
        name, value, "a finite number >= 0", lambda v: 0 <= v < float("inf")
    )


def check_integer(name: str, value: Hyperparameter, low: int) -> None:
    """A period or a count is an integer that is not below ``low``."""
    check_hyperparameter(
        name,
        value,
        f"an integer >= {low}",
        lambda v: v >= low and float(v).is_integer(),
    )


def check_theta(theta: Hyperparameter) -> None:
    """The weight of the newest gradient is in (0, 1]."""
    check_hyperparameter("theta", theta, "in (0, 1]", lambda v: 0 < v <= 1)


def check_params(params: PyTree) -> None:
    """Raise a ValueError for a tree that holds nothing to perturb.

    Masked nodes and ``None`` count as leaves that somebody left out on purpose, and
    the placeholder of :func:`optax.tree.map_params` is neither a container nor empty.
    """

    def left_out(node: Any) -> bool:
        return node is None or isinstance(node, optax.MaskedNode)

    leaves = jax.tree.leaves_with_path(params, is_leaf=left_out)
    if not leaves and isinstance(params, (dict, list, tuple)):
        raise ValueError(
            f"params has no leaves ({params!r}): pass init the parameters to train."
        )
    for path, leaf in leaves:
        if not left_out(leaf) and not jnp.issubdtype(
            jnp.result_type(leaf), jnp.inexact
        ):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has dtype "
                f"{jnp.result_type(leaf)}, which has no gradient: keep it out of the "
                "parameters, or out of this transformation with optax.partition."
            )


def check_structure(updates: PyTree, state_tree: PyTree, where: str) -> None:
    """Raise a ValueError if ``updates`` is not the tree that ``init`` saw.

    As everywhere in Optax, an update may be ``None`` where there was a parameter.
    """

    def compare(path: Any, update: Any, leaf: Any) -> None:
        if update is not None and jnp.shape(update) != jnp.shape(leaf):
            raise ValueError(
                f"updates{jax.tree_util.keystr(path)} has shape {jnp.shape(update)}, "
                f"but {where} was initialized with shape {jnp.shape(leaf)}: call init "
                "again after changing the parameters."
            )

    try:
        jax.tree.map(
            lambda update, _: None, updates, state_tree, is_leaf=lambda u: u is None
        )
    except ValueError as error:
        raise ValueError(
            f"updates has another tree structure than the parameters {where} was "
            f"initialized with ({_difference(updates, state_tree)}): call init again "
            "after changing the parameters."
        ) from error
    jax.tree_util.tree_map_with_path(
        compare, updates, state_tree, is_leaf=lambda u: u is None
    )


def broadcast_mask(mask: Any, params: PyTree) -> PyTree:
    """A boolean for each parameter, from what :func:`optax.masked` takes as a mask.

    Raises a ValueError if the mask is neither a tree like ``params`` nor a prefix.
    """
    tree = mask(params) if callable(mask) else True if mask is None else mask
    try:
        return jax.tree.map(
            lambda chosen, subtree: jax.tree.map(lambda _: bool(chosen), subtree),
            tree,
            params,
        )
    except ValueError as error:
        raise ValueError(
            "mask has another tree structure than params "
            f"({_difference(tree, params)}): pass a tree of booleans like the "
            "parameters, a prefix of one, or a function of them."
        ) from error


def require_params(params: PyTree, where: str) -> None:
    """Raise a ValueError if ``update`` was called without ``params``."""
    if params is None:
        raise ValueError(
            f"{where} needs params, got None: call update(grads, state, params)."
        )


def _difference(tree: PyTree, expected: PyTree) -> str:
    """In a few words, the first leaf that one tree has and the other has not."""
    found, wanted = (
        [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(t)]
        for t in (tree, expected)
    )
    missing = [path for path in wanted if path not in found]
    unknown = [path for path in found if path not in wanted]
    if missing:
        return f"nothing at {missing[0]}"
    if unknown:
        return f"an unknown leaf at {unknown[0]}"
    return "other containers"
