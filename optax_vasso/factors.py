"""Balance the two factors of low-rank adapters, around their optimizer.

An adapter adds X Yᵀ to a frozen weight, and (c X, Y/c) is the same adapter for every c.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import checks, numerics, paths
from optax_vasso._internal.checks import Hyperparameter, value_at
from optax_vasso._internal.trees import perturbed_states
from optax_vasso.ascent.select import Mask
from optax_vasso.ascent.trained import trained_by

__all__ = ["BalancedState", "balanced"]

PyTree = Any


class BalancedState(NamedTuple):
    """State of :func:`balanced`.

    Attributes:
      step: calls so far, an int32 scalar: where schedules are read.
      optimizer_state: the state of the optimizer.
    """

    step: jax.Array
    optimizer_state: optax.OptState


def balanced(
    optimizer: optax.GradientTransformation,
    *,
    learning_rate: Hyperparameter,
    alpha: Hyperparameter,
    names: tuple[str, str] = ("lora_a", "lora_b"),
    stacked: Mask = False,
) -> optax.GradientTransformationExtraArgs:
    """Draw the norms of the two factors of each adapter together, as SAM does: BAR.

    For a product X Yᵀ, gradient flow preserves (‖X‖² − ‖Y‖²)/2, and SAM moves it by ρ
    (‖g_X‖² − ‖g_Y‖²)/√(‖g_X‖² + ‖g_Y‖²) per unit of time. This follows that sign
    without a second gradient: before each step of the optimizer,

        X ← (1 + α η) X, Y ← (1 − α η) Y   if ‖g_X‖ ≥ ‖g_Y‖,
        X ← (1 − α η) X, Y ← (1 + α η) Y   otherwise,

    which multiplies the adapter by 1 − (α η)² alone. The factor with the larger
    gradient is usually the smaller one: g_X = G Y and g_Y = Gᵀ X, where G is the
    gradient of the product. Each adapter is balanced separately, in one pass.

    Put it inside a perturbing optimizer, as in ``sam(balanced(optimizer, ...))``: it
    then compares the gradients that the optimizer descends on. A pair with a frozen
    factor (:func:`optax_vasso.ascent.trained_by`) or with non-finite gradients is left
    unchanged.

    Args:
      optimizer: any Optax optimizer. It sees the balanced factors as its ``params``.
      learning_rate: learning rate η of the optimizer, >= 0: a number, a schedule of the
        step, or a traced scalar.
      alpha: α, >= 0, likewise. The paper searches 0.2 to 2 and lets it fall to zero
        along a line or a cosine.
      names: names of the two factors of a pair, by default those of ``flax.nnx.LoRA``.
        Two leaves of the same parent are a pair if they are called so, or the same with
        one prefix before an underscore, as in ``kernel_lora_a``.
      stacked: leaves whose first axis counts layers, as for :func:`jax.lax.scan`; each
        layer is then a pair of its own. A tree of booleans, a prefix of one, or a
        function of the parameters that returns one; by default none.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`. The factors may have any shapes
      and dtypes; norms are computed in float32 or wider.

    Raises:
      ValueError: if optimizer is no transformation, a hyperparameter is negative or not
        finite, or names are not two different ones; at ``init``, if optimizer perturbs
        the parameters itself, no pair is found, a factor stands alone, or two factors
        are stacked differently; at ``update``, if ``params`` is missing.

    Examples:
      The second factor is zero at first, so only its own gradient is not:

      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso.factors import balanced
      >>> params = {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.zeros((1, 2))}
      >>> grads = {"lora_a": jnp.zeros((3, 1)), "lora_b": jnp.ones((1, 2))}
      >>> optimizer = balanced(optax.sgd(0.1), learning_rate=0.1, alpha=0.5)
      >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
      >>> print(updates["lora_a"].ravel(), updates["lora_b"].ravel())
      [-0.05 -0.05 -0.05] [-0.1 -0.1]

    References:
      Li et al., `Implicit Regularization of Sharpness-Aware Minimization for
      Scale-Invariant Problems <https://arxiv.org/abs/2410.14802>`_, 2024, Algorithm 2
      (nBAR), which is their form for adapters.
    """
    checks.check_transformation("optimizer", optimizer)
    checks.check_not_negative("learning_rate", learning_rate)
    checks.check_not_negative("alpha", alpha)
    if isinstance(names, str) or not len(names) == len({*names}) == 2:
        raise ValueError(
            f"names must be two different names of leaves, got {names!r}: pass those "
            'of the two factors, as in names=("lora_a", "lora_b").'
        )
    is_trained = trained_by(optimizer)
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: PyTree) -> BalancedState:
        checks.check_leaves(params)
        _check_pairs(params, names, stacked)
        state = optimizer.init(params)
        if perturbed_states(state):
            raise ValueError(
                "optimizer perturbs the parameters, and balanced would scale what it "
                "has perturbed: put it inside, as in sam(balanced(optimizer, ...))."
            )
        return BalancedState(jnp.zeros((), jnp.int32), state)

    def update_fn(
        updates: PyTree, state: BalancedState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, BalancedState]:
        checks.check_update(state, BalancedState, params, "balanced")
        dtype = numerics.accumulation_dtype(params)
        weight = jnp.asarray(value_at(alpha, state.step), dtype)
        weight = weight * jnp.asarray(value_at(learning_rate, state.step), dtype)

        structure: Any = jax.tree.structure(params)
        grads, leaves = structure.flatten_up_to(updates), jax.tree.leaves(params)
        trained = jax.tree.leaves(is_trained(params))
        layers = jax.tree.leaves(checks.broadcast_mask(stacked, params, "stacked"))
        signs: dict[int, jax.Array] = {}
        for x, y in _pairs(params, names):
            if all(trained[i] and grads[i] is not None for i in (x, y)):
                sign = _larger(grads[x], grads[y], bool(layers[x]), dtype)
                signs |= {x: sign, y: -sign}

        def add(tree: PyTree) -> PyTree:
            """The tree and ± α η times the factors, which move with the parameters."""
            new = structure.flatten_up_to(tree)
            for i, sign in signs.items():
                factor = numerics.widen(leaves[i], dtype)
                sign = sign.reshape(sign.shape + (1,) * (factor.ndim - sign.ndim))
                moved = numerics.widen(new[i], dtype) + weight * sign * factor
                new[i] = moved.astype(new[i].dtype)
            return structure.unflatten(new)

        new_updates, optimizer_state = optimizer.update(
            updates, state.optimizer_state, add(params), **extra_args
        )
        step = optax.safe_increment(state.step)
        return add(new_updates), BalancedState(step, optimizer_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _pairs(params: PyTree, names: tuple[str, str]) -> list[tuple[int, int]]:
    """The indices of the two leaves of each pair; a ValueError for a single one."""
    found: dict[tuple[str, ...], dict[str, int]] = {}
    for i, (path, _) in enumerate(jax.tree.leaves_with_path(params)):
        *parents, last = paths.names_on(path) or ("",)
        for name in names:
            if last == name or last.endswith(f"_{name}"):
                stem = last.removesuffix(name)
                found.setdefault((*parents, stem), {})[name] = i
    for (*parents, stem), pair in found.items():
        if len(pair) == 1:
            (alone,) = pair
            (missing,) = {*names} - {alone}
            raise ValueError(
                f"params has {'/'.join([*parents, stem + alone])} without "
                f"{stem}{missing} beside it: keep both factors in the tree of one "
                "optimizer, or pass their names."
            )
    return [(pair[names[0]], pair[names[1]]) for pair in found.values()]


def _check_pairs(params: PyTree, names: tuple[str, str], stacked: Mask) -> None:
    """Raise a ValueError without any pair, or if only one of two factors is stacked."""
    leaves = jax.tree.leaves_with_path(params)
    if not leaves:
        return  # the placeholder of map_params
    pairs = _pairs(params, names)
    if not pairs:
        raise ValueError(
            f"params has no two leaves named {' and '.join(names)} beside each other, "
            f"but {jax.tree_util.keystr(leaves[0][0])} and the like: pass the names "
            "of the two factors."
        )
    layers = jax.tree.leaves(checks.broadcast_mask(stacked, params, "stacked"))
    for pair in pairs:
        counts = {jnp.shape(leaves[i][1])[:1] if layers[i] else None for i in pair}
        if len(counts) > 1 or () in counts:
            raise ValueError(
                f"stacked must give {jax.tree_util.keystr(leaves[pair[0]][0])} and its "
                f"other factor one axis of as many layers, got {counts}."
            )


def _larger(
    x: jax.Array, y: jax.Array, is_stacked: bool, dtype: jnp.dtype
) -> jax.Array:
    """The sign of ‖x‖ − ‖y‖, 1 if they are equal and 0 if either is not finite.

    A scalar, or one number per layer. Entries are divided by the largest of both before
    they are squared, so that none overflows.
    """
    moduli = [jnp.abs(numerics.widen(g, dtype)) for g in (x, y)]
    axes = [tuple(range(is_stacked, g.ndim)) for g in moduli]
    largest = jnp.maximum(
        *(jnp.max(g, axis, initial=0) for g, axis in zip(moduli, axes, strict=True))
    )
    unit = jnp.where(largest < jnp.finfo(dtype).tiny, 1, largest)
    squares = (
        jnp.sum((g / unit.reshape(unit.shape + (1,) * len(axis))) ** 2, axis)
        for g, axis in zip(moduli, axes, strict=True)
    )
    sign = jnp.where(jnp.greater_equal(*squares), 1, -1)
    return jnp.where(jnp.isfinite(largest), sign, 0).astype(dtype)
