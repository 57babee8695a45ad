"""The parameters that an optimizer trains, found by tracing it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal

from optax_vasso._internal.checks import check_transformation
from optax_vasso._internal.trees import find_states

PyTree = Any


def trained_by(
    optimizer: optax.GradientTransformation,
) -> Callable[[PyTree], PyTree]:
    """A mask of the parameters that an optimizer trains, without those it freezes.

    The recipes perturb these leaves unless they are given a ``mask``: perturbing frozen
    weights wastes a part of the radius and needs their gradient. In a chain of your
    own, pass it to :func:`optax_vasso.ascent.masked_ascent`::

        ascent = masked_ascent(sam_perturb(rho), trained_by(optimizer))

    A leaf counts as frozen if its first update depends neither on the gradients nor on
    the parameters, as with :func:`optax.set_to_zero` in :func:`optax.partition`,
    :func:`optax.freeze` and :func:`optax.transforms.selective_transform`. If this
    cannot be determined, because of a branch or a zero learning rate, the leaf counts
    as trained. If the optimizer freezes everything, the mask chooses every leaf.

    Args:
      optimizer: any Optax optimizer.

    Returns:
      A function of the parameters that returns a tree of booleans like them. It needs
      only their shapes.

    Raises:
      ValueError: if optimizer is no transformation.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso.ascent import trained_by
      >>> optimizer = optax.chain(
      ...     optax.adam(1e-3), optax.freeze({"adapter": False, "frozen": True})
      ... )
      >>> trained_by(optimizer)({"adapter": jnp.ones(2), "frozen": jnp.ones(3)})
      {'adapter': True, 'frozen': False}
    """
    check_transformation("optimizer", optimizer)

    # Cached, since outside of jit every step asks for the mask.
    @functools.lru_cache(maxsize=4)
    def read(structure: Any, shapes: tuple[tuple[Any, Any], ...]) -> PyTree:
        params = structure.unflatten(jax.ShapeDtypeStruct(*leaf) for leaf in shapes)
        return structure.unflatten(_moves(optimizer, params))

    def mask(params: PyTree) -> PyTree:
        # An unfiltered model has functions among its leaves, which nothing trains.
        arrays = jax.tree.map(lambda x: None if callable(x) else x, params)
        leaves, structure = jax.tree.flatten(arrays)
        shapes = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        trained = iter(jax.tree.leaves(read(structure, shapes)))
        return jax.tree.map(lambda x: False if callable(x) else next(trained), params)

    return mask


def _moves(optimizer: optax.GradientTransformation, params: PyTree) -> list[bool]:
    """Whether the first update of each leaf depends on a gradient or a parameter."""
    everything = [True] * len(jax.tree.leaves(params))
    # Optax freezes by masking: without a masked state there is nothing to trace.
    state = jax.eval_shape(optimizer.init, params)
    if not find_states(state, optax.MaskedState):
        return everything

    def first_update(grads: PyTree, params: PyTree) -> PyTree:
        return optimizer.update(grads, optimizer.init(params), params)[0]

    try:
        program = jax.make_jaxpr(first_update)(params, params).jaxpr
    except Exception:  # it may need arguments that only the training loop has
        return everything
    depends = set(program.invars)
    for equation in program.eqns:
        if any(v in depends for v in equation.invars if not isinstance(v, Literal)):
            depends.update(equation.outvars)
    moves = [not isinstance(v, Literal) and v in depends for v in program.outvars]
    return moves if any(moves) else everything
