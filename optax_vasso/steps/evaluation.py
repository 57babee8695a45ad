"""The parameters to evaluate: without the perturbation that a state holds."""

from __future__ import annotations

from typing import Any

import jax
import optax
import optax.contrib

from optax_vasso._internal import paths
from optax_vasso.steps.one_gradient import (
    LaggedState,
    perturbation_of,
    read_state,
    unperturbed,
)
from optax_vasso.steps.two_gradients import SharpnessAwareState

PyTree = Any

# The fields of Optax's states, by which restored states of other optimizers are known.
_KNOWN_FIELDS = [
    frozenset(kind._fields)
    for module in (optax, optax.contrib)
    for name, kind in vars(module).items()
    if name.endswith("State") and getattr(kind, "_fields", ())
] + [frozenset(SharpnessAwareState._fields)]
# The names under which train states hold an optimizer state.
_HOLDERS = ("opt_state", "optimizer_state")


def eval_params(state: optax.OptState, params: PyTree) -> PyTree:
    """The parameters to evaluate, export and keep: those without a perturbation.

    Args:
      state: the state of any optimizer, with that of :func:`optax_vasso.lagged`
        anywhere in it: in a chain, in :func:`optax.partition`, :func:`optax.masked`,
        :class:`optax.MultiSteps`, in a train state, in containers and wrappers of other
        libraries. It may have been restored from a checkpoint as nested dictionaries
        and lists.
      params: the parameters of the training loop that belong to the state, in any
        containers that keep the names of the leaves.

    Returns:
      x_t, like ``params``: the point from which the base optimizer steps, up to one
      rounding. The parameters themselves if the optimizer is not lagged.

    Raises:
      ValueError: if ``state`` holds no optimizer state (``None``, an empty tuple, a
        tree of parameters, the optimizer itself); if the parameters do not belong to
        the state, or the two are swapped; if the state has several perturbations for
        one parameter.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso import eval_params, lagged, sam_perturb
      >>> params = jnp.array([3.0, 4.0])
      >>> optimizer = lagged(optax.sgd(0.1), sam_perturb(rho=0.5))
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params, state.direction)
      [3. 4.] [0.3 0.4]
      >>> print(eval_params(state, params))
      [2.7 3.6]
    """
    _check_order(state, params)
    read = [read_state(below) for _, below in paths.nodes(state)]
    found = [lagged_state for lagged_state in read if lagged_state is not None]
    if not found:
        _check_told(state, params)
        return params
    leaves = jax.tree.leaves(params)
    structure: Any = jax.tree.structure(params)
    perturbations: list[Any] = [None] * len(leaves)
    for lagged_state in found:
        for i, leaf in enumerate(_matched(lagged_state, params)):
            if leaf is None:
                continue
            if perturbations[i] is not None:
                raise ValueError(
                    "state has several perturbations for one parameter: pass the one "
                    "optimizer state that belongs to params, not a tree of several."
                )
            perturbations[i] = leaf
    return structure.unflatten(map(unperturbed, leaves, perturbations))


def _matched(state: LaggedState, params: PyTree) -> list[Any]:
    """The perturbation of every parameter, ``None`` where there is none."""
    try:
        return paths.match(perturbation_of(state), params)
    except paths.PathError as error:
        raise ValueError(
            "params has another tree structure or other shapes than the parameters of "
            f"this optimizer state ({error}): pass the parameters that the "
            "optimizer was made for, with NNX those of its wrt, as in "
            "nnx.state(model, nnx.LoRAParam), and the state of the same training loop."
        ) from error


def _check_order(state: PyTree, params: PyTree) -> None:
    """Raise a ValueError for a state as params, or an optimizer as state."""
    if any(_is_state_of_optax(node, below) for node, below in paths.nodes(params)):
        raise ValueError(
            "params contains the state of an optimizer: pass the state first, as in "
            "eval_params(state, params)."
        )
    if callable(getattr(state, "init", None)) and callable(
        getattr(state, "update", None)
    ):
        raise ValueError(
            "state is an optimizer: pass the state that its init and update return, as "
            "in eval_params(state, params)."
        )


def _check_told(state: PyTree, params: PyTree) -> None:
    """Raise a ValueError unless there is an optimizer state in the tree."""
    structure: Any = jax.tree.structure(params)
    is_params = jax.tree.structure(state) == structure and bool(jax.tree.leaves(state))
    if not is_params and any(
        _is_named_tuple(node) or _has_known_fields(below)
        for node, below in paths.nodes(state)
    ):
        return
    what = "the parameters" if is_params else f"a {type(state).__name__}"
    raise ValueError(
        f"state is {what}, which holds no optimizer state: pass what the "
        "optimizer's init and update return, or restore it from the checkpoint with "
        "optimizer.init(params) as the target."
    )


def _is_state_of_optax(node: Any, below: dict[str, Any]) -> bool:
    return read_state(below) is not None or (
        _is_named_tuple(node)
        and type(node).__name__.endswith("State")
        and type(node).__module__.startswith(("optax.", "optax_vasso."))
    )


def _is_named_tuple(node: Any) -> bool:
    return (
        isinstance(node, tuple)
        and hasattr(node, "_fields")
        and not isinstance(node, optax.MaskedNode | optax.GradientTransformation)
    )


def _has_known_fields(below: dict[str, Any]) -> bool:
    """Whether a node has the fields of a state: several, as one may be a parameter."""
    names = below.keys()
    return any(name in names for name in _HOLDERS) or any(
        fields == names or (len(fields) > 1 and fields <= names)
        for fields in _KNOWN_FIELDS
    )
