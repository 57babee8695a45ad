"""Apply an ascent chain to a part of the parameters, or to each layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import checks, trees

PyTree = Any
Mask = PyTree | Callable[[PyTree], PyTree]


def masked_ascent(
    ascent: optax.GradientTransformation, mask: Mask | None
) -> optax.GradientTransformationExtraArgs:
    """Perturb only a part of the parameters, such as LoRA adapters.

    The chain sees only the chosen leaves: its norm and its averages cover no others.
    :func:`optax.masked`, in contrast, would return the gradient of the others as their
    perturbation.

    Args:
      ascent: any ascent chain.
      mask: a tree of booleans, a prefix of one, or a function of the parameters that
        returns one, as in :func:`optax.masked`; ``None`` chooses every leaf.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` whose output is ``None`` where
      the mask is ``False``; ``update`` needs ``params``.

    Raises:
      ValueError: if ascent is no transformation; at ``init`` and ``update``, if the
        mask has another structure than the parameters or a leaf that is no boolean, or
        chooses none of them.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_vasso import sam_perturb
      >>> from optax_vasso.ascent import masked_ascent
      >>> grads = {"adapter": jnp.array([3.0, 4.0]), "frozen": jnp.ones(2)}
      >>> ascent = masked_ascent(
      ...     sam_perturb(rho=0.1), {"adapter": True, "frozen": False}
      ... )
      >>> perturbation, _ = ascent.update(grads, ascent.init(grads), grads)
      >>> print(perturbation["adapter"], perturbation["frozen"])
      [0.06 0.08] None
    """
    checks.check_transformation("ascent", ascent)
    ascent = optax.with_extra_args_support(ascent)
    if mask is None:
        return ascent

    def selection(params: PyTree) -> Callable[[PyTree, Any], PyTree]:
        """(tree, otherwise) -> the tree, with the other where the mask is False."""
        mask_of_leaves = checks.broadcast_mask(mask, params)

        def select(tree: PyTree, otherwise: Any) -> PyTree:
            return jax.tree.map(
                # An unfiltered model has functions among its leaves: keep them.
                lambda chosen, x, node: node if chosen or callable(x) else otherwise,
                mask_of_leaves,
                params,
                tree,
            )

        return select

    def init_fn(params: PyTree) -> optax.OptState:
        checks.check_leaves(params)
        checks.check_mask(mask, params)
        return ascent.init(selection(params)(params, optax.MaskedNode()))

    def update_fn(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree = None,
        **extra_args: Any,
    ) -> tuple[PyTree, optax.OptState]:
        checks.require_params(params, "masked_ascent")
        select, hidden = selection(params), optax.MaskedNode()
        if extra_args.get("direction") is not None:
            extra_args["direction"] = select(extra_args["direction"], hidden)
        perturbation, state = ascent.update(
            select(updates, hidden),
            state,
            select(params, hidden),
            **extra_args,
        )
        return select(perturbation, None), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def per_layer(
    ascent: optax.GradientTransformation, *, stacked: Mask = False
) -> optax.GradientTransformationExtraArgs:
    """Run an ascent chain on each leaf separately.

    ``per_layer(sam_perturb(rho))`` gives each leaf a perturbation of norm ρ, where
    ``sam_perturb(rho)`` gives one to the tree. If layers are stacked for
    :func:`jax.lax.scan`, a leaf holds all of them; ``stacked`` names such leaves.

    Args:
      ascent: any ascent chain. Its extra arguments are passed on, with ``direction``
        split by leaf.
      stacked: leaves whose first axis counts layers, each of which is then treated
        separately: a tree of booleans, a prefix of one, or a function of the parameters
        that returns one; by default none.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` whose state is that of ``ascent``
      with a tree like the parameters in place of each leaf, one entry per layer.

    Raises:
      ValueError: if ascent is no transformation; at ``init``, if it is
        :func:`optax_vasso.ascent.hold_rise`; at ``init`` and ``update``, if stacked has
        another structure than the parameters or chooses a scalar; at ``update``, if
        ``params`` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_vasso import sam_perturb
      >>> from optax_vasso.ascent import per_layer
      >>> grads = {"bias": jnp.array([2.0]), "kernel": jnp.array([3.0, 4.0])}
      >>> ascent = per_layer(sam_perturb(rho=0.1))
      >>> perturbation, _ = ascent.update(grads, ascent.init(grads), grads)
      >>> print(perturbation["bias"], perturbation["kernel"])
      [0.1] [0.06 0.08]

      Two layers in one leaf:

      >>> grads = jnp.array([[3.0, 4.0], [0.0, 2.0]])
      >>> ascent = per_layer(sam_perturb(rho=0.1), stacked=True)
      >>> print(ascent.update(grads, ascent.init(grads), grads)[0])
      [[0.06 0.08]
       [0.   0.1 ]]

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022, section 4.3.
    """
    checks.check_transformation("ascent", ascent)
    ascent = optax.with_extra_args_support(ascent)

    # optax.tree.map_params finds buffers where init puts params, so the state is one of
    # the chain with trees in it, not a tree of states.
    def joined(states: list[PyTree], params: PyTree) -> PyTree:
        layers: Any = jax.tree.structure(params)
        inner: Any = jax.tree.structure(states[0])
        columns = zip(*map(inner.flatten_up_to, states), strict=True)
        return inner.unflatten([layers.unflatten(column) for column in columns])

    def init_fn(params: PyTree) -> PyTree:
        checks.check_params(params)
        leaves = jax.tree.leaves(params)
        if not leaves:
            return ascent.init(params)
        are_stacked = _are_stacked(stacked, params)
        states = [
            (jax.vmap(ascent.init) if is_stacked else ascent.init)(leaf)
            for leaf, is_stacked in zip(leaves, are_stacked, strict=True)
        ]
        if trees.follows_loss(states):
            raise ValueError(
                "ascent tunes one radius by the loss of the whole model, not of a "
                "layer: put hold_rise around per_layer."
            )
        return joined(states, params)

    def update_fn(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        checks.require_params(params, "per_layer")
        layers: Any = jax.tree.structure(params)
        leaves = jax.tree.leaves(params)
        if not leaves:
            return updates, state
        inner: Any = jax.tree.structure(jax.eval_shape(ascent.init, leaves[0]))
        columns = [layers.flatten_up_to(tree) for tree in inner.flatten_up_to(state)]
        direction = extra_args.pop("direction", None)
        if direction is None:
            own: list[dict[str, Any]] = [{}] * len(leaves)
        else:
            own = [{"direction": d} for d in layers.flatten_up_to(direction)]
        are_stacked = _are_stacked(stacked, params)

        def advance(update: Any, state: Any, leaf: Any, own: dict[str, Any]) -> Any:
            return ascent.update(update, state, leaf, **extra_args, **own)

        parts, states = [], []
        for i, update in enumerate(layers.flatten_up_to(updates)):
            part, layer = None, inner.unflatten([column[i] for column in columns])
            if update is not None:
                each = jax.vmap(advance) if are_stacked[i] else advance
                part, layer = each(update, layer, leaves[i], own[i])
            parts.append(part)
            states.append(layer)
        return layers.unflatten(parts), joined(states, params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _are_stacked(stacked: Mask, params: PyTree) -> list[bool]:
    """Whether each leaf is stacked; a ValueError for a leaf without an axis."""
    found = jax.tree.leaves(checks.broadcast_mask(stacked, params, "stacked"))
    leaves = jax.tree.leaves_with_path(params)
    for (path, leaf), is_stacked in zip(leaves, found, strict=True):
        if is_stacked and jnp.ndim(leaf) == 0:
            raise ValueError(
                f"stacked{jax.tree_util.keystr(path)} is True, but that parameter is a "
                "scalar: choose leaves whose first axis counts layers."
            )
    return found
