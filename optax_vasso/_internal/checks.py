"""Checks of hyperparameters and trees.

Each error names the argument, the value and the remedy. Schedules and traced arrays
have no value yet, so they pass.
"""

from __future__ import annotations

import functools
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
    if not callable(value):
        check_number(name, value, allowed, is_allowed)


def check_number(
    name: str,
    value: jax.typing.ArrayLike,
    allowed: str,
    is_allowed: Callable[[Any], bool],
) -> None:
    """:func:`check_hyperparameter` for an argument that cannot be a schedule.

    The number must also be allowed in the precision of the computation: in float32,
    1e-40 is zero, 1e39 is infinite and 1 − 1e-9 is one.
    """
    if callable(value):
        raise ValueError(
            f"{name} must be {allowed}, got the function {name_of(value)}: it takes no "
            "schedule, so pass a number."
        )
    if isinstance(value, optax.GradientTransformation):
        raise ValueError(
            f"{name} must be {allowed}, got an optimizer: the optimizer is the first "
            "argument."
        )
    if isinstance(value, jax.Array | np.ndarray):
        if value.shape != ():
            raise ValueError(
                f"{name} must be {allowed}, got an array of shape {value.shape}: pass "
                "one number, or map over several with jax.vmap."
            )
        if isinstance(value, jax.core.Tracer):
            return
        value = value.item()
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_real or not is_allowed(value):
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}.")
    dtype = jax.dtypes.canonicalize_dtype(float)
    with np.errstate(over="ignore", under="ignore"):
        computed = dtype.type(value)
    if abs(computed) < jnp.finfo(dtype).tiny:  # XLA flushes it to zero
        computed = dtype.type(0)
    if not is_allowed(computed):
        raise ValueError(
            f"{name} must be {allowed} in {dtype}, got {value!r}, which is {computed} "
            "there: pass a number that is in its range."
        )


def value_at(hyperparameter: Hyperparameter, count: jax.Array) -> jax.typing.ArrayLike:
    """The value of a number, an array or a schedule at a step.

    Raises a ValueError if a schedule returns anything but one number.
    """
    if not callable(hyperparameter):
        return hyperparameter
    value: Any = hyperparameter(count)
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    if (is_array and value.shape == ()) or isinstance(value, numbers.Real):
        return value
    found = f"an array of shape {value.shape}" if is_array else type(value).__name__
    raise ValueError(
        f"a schedule must return one number for a step, but {name_of(hyperparameter)} "
        f"returns {found}: pass a function of the step, such as "
        "optax.cosine_decay_schedule(0.1, 1000)."
    )


def name_of(function: Any) -> str:
    """The name of a function, also of one in :func:`functools.partial`."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def check_not_negative(name: str, value: Hyperparameter) -> None:
    """Raise a ValueError for a radius or weight that is not a finite number >= 0."""
    check_hyperparameter(
        name, value, "a finite number >= 0", lambda v: 0 <= v < float("inf")
    )


def check_integer(name: str, value: Any, low: int) -> None:
    """Raise a ValueError for a period or count that is not an integer >= ``low``.

    It may be traced, as arguments of :func:`optax.inject_hyperparams` are.
    """
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, jax.Array | np.ndarray) and value.ndim == 0:
        value = value.item()
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {shown(value)}.")
    if value >= 2**31:
        raise ValueError(
            f"{name} must be an integer < 2**31, as steps are, got {value!r}."
        )


def check_theta(theta: Hyperparameter) -> None:
    """Raise a ValueError for a weight of the newest gradient outside (0, 1]."""
    check_hyperparameter("theta", theta, "in (0, 1]", lambda v: 0 < v <= 1)


def check_accumulator_dtype(dtype: Any) -> None:
    """Raise a ValueError for what is neither a real float dtype nor None."""
    try:
        is_float = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except (TypeError, ValueError):
        is_float = False
    if not is_float:
        raise ValueError(
            f"accumulator_dtype must be a float dtype such as jnp.float32, got "
            f"{shown(dtype)}; complex leaves get its complex twin."
        )


def check_transformation(name: str, value: Any) -> None:
    """Raise a ValueError if ``value`` is no gradient transformation."""
    if callable(getattr(value, "init", None)) and callable(
        getattr(value, "update", None)
    ):
        return
    if callable(value):
        raise ValueError(
            f"{name} must be an optax.GradientTransformation, got the function "
            f"{name_of(value)}: call it, as in optax.sgd(0.1)."
        )
    raise ValueError(
        f"{name} must be an optax.GradientTransformation, got {shown(value)}: make "
        "one, as in optax.sgd(0.1)."
    )


def check_loss(value: jax.typing.ArrayLike) -> None:
    """Raise a ValueError for a loss per example."""
    if jnp.shape(value) != ():
        raise ValueError(
            f"value must be the scalar loss, got an array of shape {jnp.shape(value)}: "
            "average it over the batch."
        )


def check_state(state: Any, kind: type, where: str) -> None:
    """Raise a ValueError if ``state`` was not made by this transformation's init."""
    if not isinstance(state, kind):
        raise ValueError(
            f"state is a {type(state).__name__}, but {where} needs the "
            f"{kind.__name__} that its init returns: pass the state of this optimizer."
        )


def check_known(value: Any, where: str) -> None:
    """Raise a ValueError for a value of a state that is being traced."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"state is being traced and has no values yet: call {where} outside of "
            "jax.jit, on what the step returned."
        )


def check_params(params: PyTree) -> None:
    """Raise a ValueError for a tree without leaves or with an integer leaf."""
    check_leaves(params)
    check_inexact(params)


def check_leaves(params: PyTree) -> None:
    """Raise a ValueError for a tree without leaves, or with a function for a leaf.

    Masked nodes and ``None`` count as leaves left out on purpose, and the placeholder
    of :func:`optax.tree.map_params` is neither a container nor empty.
    """
    leaves = jax.tree.leaves_with_path(params, is_leaf=is_left_out)
    if not leaves and isinstance(params, (dict, list, tuple)):
        raise ValueError(
            f"params has no leaves ({params!r}): pass init the parameters to train."
        )
    for path, leaf in leaves:
        if isinstance(leaf, str | bytes):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is text, {leaf!r}: pass init the "
                "parameters alone."
            )
        if callable(leaf):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is a function: pass init the "
                "parameters alone, as equinox.filter(model, equinox.is_inexact_array) "
                "returns them."
            )


def check_inexact(perturbed: PyTree) -> None:
    """Raise a ValueError for an integer among the parameters that are perturbed."""
    for path, leaf in jax.tree.leaves_with_path(perturbed):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has dtype {dtype}, which has no "
                "gradient: leave it out by mask=, or keep it out of the parameters, in "
                "the model state or the closure of the loss."
            )


def is_left_out(node: Any) -> bool:
    """Whether a node is None or a masked node, a leaf left out on purpose."""
    return node is None or isinstance(node, optax.MaskedNode)


def check_structure(updates: PyTree, state_tree: PyTree, where: str) -> None:
    """Raise a ValueError if ``updates`` is not the tree that ``init`` saw.

    As in Optax, an update may be ``None``.
    """

    def compare(path: Any, update: Any, leaf: Any) -> None:
        if is_left_out(update) or is_left_out(leaf):
            return
        if callable(update) and callable(leaf):
            return  # of a model whose functions are among its leaves
        if callable(update) or not jax.tree_util.all_leaves([leaf]):
            what = f"the function {name_of(update)}" if callable(update) else "an array"
            raise ValueError(
                f"updates{jax.tree_util.keystr(path)} is {what}, and no gradient for "
                f"the parameters {where} was initialized with: pass what "
                "jax.grad(loss)(params) returns."
            )
        if jnp.shape(update) != jnp.shape(leaf):
            raise ValueError(
                f"updates{jax.tree_util.keystr(path)} has shape {jnp.shape(update)}, "
                f"but {where} was initialized with shape {jnp.shape(leaf)}: "
                "change the clean parameters and begin with them, as in "
                "init(eval_params(state, params))."
            )

    try:
        jax.tree.map(
            lambda update, _: None, updates, state_tree, is_leaf=lambda u: u is None
        )
    except ValueError as error:
        raise ValueError(
            f"updates has another tree structure than the parameters {where} was "
            f"initialized with ({tree_difference(updates, state_tree)}): change the "
            "clean parameters and begin with them, as in "
            "init(eval_params(state, params))."
        ) from error
    jax.tree_util.tree_map_with_path(
        compare, updates, state_tree, is_leaf=lambda u: u is None
    )


def broadcast_mask(mask: Any, params: PyTree, name: str = "mask") -> PyTree:
    """A boolean for each parameter, from a mask in any form of :func:`optax.masked`.

    Raises a ValueError if the mask is neither a tree like ``params`` nor a prefix.
    """
    if not jax.tree.leaves(params):
        return params  # nothing to choose from, or the placeholder of map_params
    tree = mask(params) if _is_function(mask) else True if mask is None else mask
    for path, chosen in jax.tree.leaves_with_path(tree):
        if not isinstance(chosen, bool | np.bool_):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} must be True or False, got "
                f"{shown(chosen)}: pass a tree of booleans like the parameters, a "
                "prefix of one, or a function of them."
            )
    try:
        return jax.tree.map(
            lambda chosen, subtree: jax.tree.map(lambda _: bool(chosen), subtree),
            tree,
            params,
        )
    except ValueError as error:
        raise ValueError(
            f"{name} has another tree structure than params "
            f"({tree_difference(tree, params)}): pass a tree of booleans like the "
            "parameters, a prefix of one, or a function of them."
        ) from error


def check_mask(mask: Any, params: PyTree, name: str = "mask") -> None:
    """:func:`broadcast_mask` at ``init``; a ValueError if the mask chooses nothing."""
    chosen = jax.tree.leaves(broadcast_mask(mask, params, name))
    if jax.tree.leaves(params) and not any(chosen):
        raise ValueError(
            f"{name} is False for every one of the {len(chosen)} parameters: look at "
            "their paths with jax.tree.leaves_with_path(params), or leave it out to "
            "choose all."
        )


def _is_function(value: Any) -> bool:
    """Whether a value is a function, and not a tree of booleans that can be called.

    Equinox's modules, and Optimistix's functions with a closure, are callable trees.
    """
    leaves = jax.tree.leaves(value)
    is_mask = leaves and all(isinstance(leaf, bool | np.bool_) for leaf in leaves)
    return callable(value) and not is_mask


def require_params(params: PyTree, where: str) -> None:
    """Raise a ValueError if ``update`` was called without ``params``."""
    if params is None:
        raise ValueError(
            f"{where} needs params, got None: call update(grads, state, params)."
        )


def check_update(state: Any, kind: type, params: PyTree, where: str) -> None:
    """:func:`require_params` and :func:`check_state`."""
    require_params(params, where)
    check_state(state, kind, where)


def shown(value: Any) -> str:
    """A value in an error: numbers and names as they are, of all else the kind."""
    if isinstance(value, numbers.Number | str | None):
        return repr(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    return f"a {type(value).__name__}"


def tree_difference(tree: PyTree, expected: PyTree) -> str:
    """In a few words, the first leaf in which one tree differs from the other."""
    found, wanted = (
        {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(t)}
        for t in (tree, expected)
    )
    for path in wanted:
        if path not in found:
            return f"nothing at {path}"
    for path in found:
        if path not in wanted:
            return f"an unknown leaf at {path}"
    structure: Any = jax.tree.structure(expected)
    if jax.tree.structure(tree) != structure:
        return "other containers"
    return "other shapes"


def is_key(leaf: Any) -> bool:
    """Whether an array holds typed random keys."""
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
