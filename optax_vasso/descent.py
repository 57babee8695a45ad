"""(Clean, perturbed) gradient → descent gradient: first links of a base optimizer.

Each is an Optax transformation that reads the extra arguments ``clean_grads`` and
``ascended`` which :func:`optax_vasso.sharpness_aware` passes, and is chained before
the optimizer inside it::

    sharpness_aware(optax.chain(gsam_descent(0.3), optax.sgd(0.1)), sam_perturb(0.1))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import checks, mapped, numerics
from optax_vasso._internal.checks import Hyperparameter, value_at
from optax_vasso.ascent.trained import trained_by

__all__ = [
    "decoupled_descent",
    "gsam_descent",
    "looksam_descent",
    "weighted_descent",
]

PyTree = Any


class DescentState(NamedTuple):
    """State of :func:`gsam_descent` and :func:`weighted_descent`.

    Attributes:
      step: calls so far, an int32 scalar: where a schedule is read.
    """

    step: jax.Array


class LookSamState(NamedTuple):
    """State of :func:`looksam_descent`.

    Attributes:
      step: calls so far, an int32 scalar.
      orthogonal: the component of the last perturbed gradient that is orthogonal to
        the clean one; like the parameters, and zero before the first ascent.
      rounding: the largest norm of it that rounding alone may have left, a float32
        (under x64 float64) scalar.
    """

    step: jax.Array
    orthogonal: PyTree
    rounding: jax.Array


class DecoupledState(NamedTuple):
    """State of :func:`decoupled_descent`.

    Attributes:
      step: calls so far, an int32 scalar: where schedules are read.
      optimizer_state: the state of the base optimizer.
    """

    step: jax.Array
    optimizer_state: optax.OptState


def gsam_descent(alpha: Hyperparameter) -> optax.GradientTransformationExtraArgs:
    """Also minimize the surrogate gap f(x + ε) − f(x): GSAM's direction.

    g = g_p − α (g_c − ⟨g_c, ĝ_p⟩ ĝ_p): it climbs the component of the clean gradient
    orthogonal to the perturbed one, which lowers f(x + ε) − f(x) and, to first order,
    does not change f(x + ε).

    Args:
      alpha: weight of the gap, >= 0; 0 leaves the perturbed gradient. A number, a
        schedule of the step, or a traced scalar.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if alpha is negative or not finite; at ``update``, if it is not
        called from inside :func:`optax_vasso.sharpness_aware`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_vasso.descent import gsam_descent
      >>> clean, perturbed = jnp.array([1.0, 1.0]), jnp.array([2.0, 0.0])
      >>> descent = gsam_descent(alpha=0.3)
      >>> direction, _ = descent.update(
      ...     perturbed, descent.init(clean), clean_grads=clean, ascended=True
      ... )
      >>> print(direction)
      [ 2.  -0.3]

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, 2022, Algorithm 1.
    """
    checks.check_not_negative("alpha", alpha)

    def direction(perturbed: PyTree, clean: PyTree, weight: jax.Array) -> PyTree:
        return numerics.add_scaled(
            perturbed, -weight, numerics.orthogonal_to(clean, perturbed)
        )

    return _descent("gsam_descent", alpha, direction)


def weighted_descent(gamma: Hyperparameter) -> optax.GradientTransformationExtraArgs:
    """Weighted SAM, coupled: sharpness as a weighted regularization term.

    g = g_c + γ/(1 − γ) (g_p − g_c). γ = 1/2 is SAM, γ = 0 plain training. Momentum and
    scaling after it see the sharpness too; in :func:`decoupled_descent`, the authors'
    choice and that of :func:`optax_vasso.wsam`, they do not.

    Args:
      gamma: weight of the sharpness, in [0, 1): a number, a schedule of the step, or a
        traced scalar.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if gamma is outside [0, 1); at ``update``, if it is not called from
        inside :func:`optax_vasso.sharpness_aware`.

    Examples:
      γ = 3/4 goes three times as far from the clean to the perturbed gradient as SAM:

      >>> import jax.numpy as jnp
      >>> from optax_vasso.descent import weighted_descent
      >>> clean, perturbed = jnp.array([1.0, 1.0]), jnp.array([1.0, 2.0])
      >>> descent = weighted_descent(gamma=0.75)
      >>> direction, _ = descent.update(
      ...     perturbed, descent.init(clean), clean_grads=clean, ascended=True
      ... )
      >>> print(direction)
      [1. 4.]

    References:
      Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
      Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023, equation 7.
    """
    _check_gamma(gamma)

    def direction(perturbed: PyTree, clean: PyTree, weight: jax.Array) -> PyTree:
        return numerics.add_scaled(
            clean, weight / (1 - weight), numerics.difference(perturbed, clean)
        )

    return _descent("weighted_descent", gamma, direction)


def decoupled_descent(
    optimizer: optax.GradientTransformation,
    *,
    learning_rate: Hyperparameter,
    gamma: Hyperparameter,
) -> optax.GradientTransformationExtraArgs:
    """Weighted SAM, decoupled: add the sharpness to the optimizer's step.

    The optimizer steps along the clean gradient, and −η γ/(1 − γ) (g_p − g_c) is added
    to its step, so momentum holds no sharpness of past steps and clipping does not
    include it. For plain SGD of the learning rate η, this equals
    :func:`weighted_descent`. Leaves that the optimizer freezes
    (:func:`optax_vasso.ascent.trained_by`) do not move.

    Args:
      optimizer: any Optax optimizer.
      learning_rate: η, >= 0: a number, a schedule of the step, or a traced scalar.
      gamma: weight of the sharpness, in [0, 1), likewise.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` to use as the base optimizer in
      :func:`optax_vasso.sharpness_aware`.

    Raises:
      ValueError: if optimizer is no transformation or a hyperparameter is out of its
        range; at ``update``, if it is not called from inside
        :func:`optax_vasso.sharpness_aware`.

    References:
      Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
      Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023; the default of
      their `code <https://github.com/intelligent-machine-learning/dlrover>`_.
    """
    checks.check_transformation("optimizer", optimizer)
    checks.check_not_negative("learning_rate", learning_rate)
    _check_gamma(gamma)
    is_trained = trained_by(optimizer)
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: PyTree) -> DecoupledState:
        return DecoupledState(jnp.zeros((), jnp.int32), optimizer.init(params))

    def update_fn(
        updates: PyTree,
        state: DecoupledState,
        params: PyTree = None,
        *,
        clean_grads: PyTree = None,
        **extra_args: Any,
    ) -> tuple[PyTree, DecoupledState]:
        checks.check_update(state, DecoupledState, params, "decoupled_descent")
        _require_clean_grads("decoupled_descent", updates, clean_grads)
        steps, optimizer_state = optimizer.update(
            clean_grads,
            state.optimizer_state,
            params,
            clean_grads=clean_grads,
            **extra_args,
        )
        dtype = numerics.accumulation_dtype(updates)
        rate, weight = (
            jnp.asarray(value_at(value, state.step), dtype)
            for value in (learning_rate, gamma)
        )
        sharpness = numerics.map_updates(
            lambda s, moves: s if moves else jnp.zeros_like(s),
            numerics.difference(updates, clean_grads),
            is_trained(params),
        )
        new_updates = numerics.add_scaled(
            steps, -rate * weight / (1 - weight), sharpness
        )
        step = optax.safe_increment(state.step)
        return new_updates, DecoupledState(step, optimizer_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def looksam_descent(alpha: Hyperparameter) -> optax.GradientTransformationExtraArgs:
    """Reuse the part of the perturbed gradient that changes slowly: LookSAM.

    On a step that ascended, pass g_p on and store v = g_p − ⟨g_p, ĝ_c⟩ ĝ_c. On any
    other, pass on g_c + α (‖g_c‖/‖v‖) v, or g_c itself if v is so short that rounding
    alone may have left it, as with a radius of zero. It is made for the gate
    :func:`optax_vasso.gate.every`.

    Args:
      alpha: weight of the stored component, >= 0: a number, a schedule of the step, or
        a traced scalar.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` whose state holds v.

    Raises:
      ValueError: if alpha is negative or not finite; at ``update``, if it is not
        called from inside :func:`optax_vasso.sharpness_aware`.

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022, Algorithm 1.
    """
    checks.check_not_negative("alpha", alpha)

    def init_fn(params: PyTree) -> LookSamState:
        checks.check_leaves(params)
        rounding = mapped.vary(numerics.state_scalar(), mapped.varying_axes(params))
        return LookSamState(
            jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), rounding
        )

    def update_fn(
        updates: PyTree,
        state: LookSamState,
        params: PyTree = None,
        *,
        clean_grads: PyTree = None,
        ascended: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, LookSamState]:
        del params, extra_args
        checks.check_state(state, LookSamState, "looksam_descent")
        _require_clean_grads("looksam_descent", updates, clean_grads)
        checks.check_structure(updates, state.orthogonal, "looksam_descent")
        dtype = numerics.accumulation_dtype(updates)
        weight = jnp.asarray(value_at(alpha, state.step), dtype)
        # Outside the branches, where XLA shares them with the ascent.
        overlap = numerics.overlap(updates, clean_grads)
        norm = numerics.norm(clean_grads)
        length = weight * norm

        def renew() -> tuple[PyTree, PyTree]:
            orthogonal = numerics.without(updates, clean_grads, overlap)
            return updates, numerics.cast_like(orthogonal, state.orthogonal)

        def reuse() -> tuple[PyTree, PyTree]:
            unit, stored, _ = numerics.normalize_beside(state.orthogonal, ())
            reused = jnp.where(stored > state.rounding, length, 0)
            direction = numerics.add_scaled(clean_grads, reused, unit)
            return numerics.cast_like(direction, updates), state.orthogonal

        direction, orthogonal = mapped.cond(ascended, renew, reuse)
        # Relative to the gradients of the ascent, whatever the size of later ones.
        left = (_rounding(updates) * norm).astype(state.rounding.dtype)
        rounding = jnp.where(ascended, left, state.rounding)
        return direction, LookSamState(
            optax.safe_increment(state.step),
            orthogonal,
            mapped.vary_like(rounding, state.rounding),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _descent(
    name: str,
    hyperparameter: Hyperparameter,
    direction: Callable[[PyTree, PyTree, jax.Array], PyTree],
) -> optax.GradientTransformationExtraArgs:
    """Pass on a direction on steps that ascended, the gradient itself on others."""

    def init_fn(params: PyTree) -> DescentState:
        checks.check_leaves(params)
        return DescentState(jnp.zeros((), jnp.int32))

    def update_fn(
        updates: PyTree,
        state: DescentState,
        params: PyTree = None,
        *,
        clean_grads: PyTree = None,
        ascended: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, DescentState]:
        del params, extra_args
        checks.check_state(state, DescentState, name)
        _require_clean_grads(name, updates, clean_grads)
        dtype = numerics.accumulation_dtype(updates)
        weight = jnp.asarray(value_at(hyperparameter, state.step), dtype)
        new_updates = optax.tree.where(
            ascended, direction(updates, clean_grads, weight), updates
        )
        return new_updates, DescentState(optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rounding(grads: PyTree) -> float:
    """The relative difference of equal gradients that rounding may cause.

    Compilers round to a dtype of few bits in one place and not in another.
    """
    accumulated = 16 * jnp.finfo(numerics.accumulation_dtype(grads)).eps
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(grads)}
    stored = [jnp.finfo(d).eps for d in dtypes if jnp.issubdtype(d, jnp.inexact)]
    return float(max(accumulated, *stored))


def _check_gamma(gamma: Hyperparameter) -> None:
    checks.check_hyperparameter("gamma", gamma, "in [0, 1)", lambda v: 0 <= v < 1)


def _require_clean_grads(name: str, updates: PyTree, clean_grads: PyTree) -> None:
    if clean_grads is None:
        raise ValueError(
            f"{name} needs the extra argument clean_grads: put it inside "
            f"sharpness_aware, as in sharpness_aware(optax.chain({name}(...), "
            "optimizer), ascent)."
        )
    structure: Any = jax.tree.structure(updates)
    if jax.tree.structure(clean_grads) != structure:
        raise ValueError(
            f"{name} got clean_grads of another tree structure than the perturbed "
            "gradient: inside optax.partition or optax.masked, pass them "
            "mask_compatible_extra_args=True."
        )
