"""Two gradients per step that do not wait for each other.

SAM's second gradient depends on the first. Here both points are known when a step
begins, so that a compiler, two halves of a mesh or two machines can compute the
gradients in parallel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import checks, numerics
from optax_vasso._internal.checks import Hyperparameter, value_at
from optax_vasso._internal.extra_args import (
    passing,
    required_gradient_fn,
    with_synonyms,
)
from optax_vasso.ascent.perturb import sam_perturb
from optax_vasso.ascent.select import masked_ascent
from optax_vasso.ascent.trained import trained_by
from optax_vasso.steps.evaluation import eval_params
from optax_vasso.steps.one_gradient import LaggedState, lagged
from optax_vasso.steps.two_gradients import gradient_at

PyTree = Any


def clean_gradient() -> optax.GradientTransformationExtraArgs:
    """Feed a lagged ascent chain with the gradient at x_t: AsyncSAM's direction.

    Put it first in the ascent chain of :func:`optax_vasso.lagged`. It replaces the
    gradient at x_t + ε_{t−1} by one at x_t, from ``grad_fn``::

        lagged(optimizer, optax.chain(clean_gradient(), sam_perturb(rho)))

    The two gradients of a step are independent: the clean one determines the next
    step's perturbation.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` without a state; ``update`` needs
      ``params`` and ``grad_fn``, or the loss, as in
      :func:`optax_vasso.sharpness_aware`.

    Raises:
      ValueError: at ``update``, if ``params`` or ``grad_fn`` is missing.

    References:
      Jo et al., `Asynchronous Sharpness-Aware Minimization for Fast and Accurate Deep
      Learning <https://arxiv.org/abs/2503.11147>`_, 2025.
    """

    def update_fn(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree = None,
        *,
        grad_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        checks.require_params(params, "clean_gradient")
        grad_fn = required_gradient_fn(
            "clean_gradient", grad_fn, with_synonyms(extra_args)
        )
        return gradient_at(params, grad_fn, updates)[0], state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


class SampaState(NamedTuple):
    """State of :func:`sampa`.

    Attributes:
      step: updates so far, an int32 scalar.
      gradient: ∇f(y_t), like the parameters; zero before the first step, and where the
        optimizer freezes them.
      lagged_state: the perturbation and the state of the base optimizer, a
        :class:`optax_vasso.steps.LaggedState`.
    """

    step: jax.Array
    gradient: PyTree
    lagged_state: LaggedState


def sampa(
    optimizer: optax.GradientTransformation,
    rho: Hyperparameter = 0.1,
    *,
    learning_rate: Hyperparameter,
    lmbda: Hyperparameter = 0.2,
) -> optax.GradientTransformationExtraArgs:
    """SAM parallelized: two gradients per step, at points known in advance.

    With the loop's parameters at x̃_t = x_t + ρ ∇f(y_t)/‖∇f(y_t)‖::

        y_{t+1} = x_t − η ∇f(y_t)
        x_{t+1} = x_t + optimizer((1 − λ) ∇f(x̃_t) + λ ∇f(y_{t+1}), x_t)

    where the loop computes ∇f(x̃_t), and ``grad_fn`` returns ∇f(y_{t+1}) on the same
    batch. The first step has no perturbation. Leaves that the optimizer freezes
    (:func:`optax_vasso.ascent.trained_by`) stay where they are at both points. Evaluate
    :func:`optax_vasso.eval_params`.

    Args:
      optimizer: any Optax optimizer; the authors use SGD with momentum.
      rho: radius, >= 0: a number, a schedule of the step, or a traced scalar.
      learning_rate: η of the extrapolation, >= 0: that of the optimizer. A number, a
        schedule of the step, or a traced scalar.
      lmbda: λ, the share of the extrapolated gradient in the descent, in [0, 1].

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; ``update`` needs ``params`` and
      ``grad_fn``, or the loss, as in :func:`optax_vasso.sharpness_aware`.

    Raises:
      ValueError: if optimizer is no transformation or a hyperparameter is out of its
        range; at ``update``, if ``params`` or ``grad_fn`` is missing.

    References:
      Xie et al., `SAMPa: Sharpness-aware Minimization Parallelized
      <https://arxiv.org/abs/2410.10683>`_, 2024.
    """
    checks.check_not_negative("learning_rate", learning_rate)
    checks.check_hyperparameter("lmbda", lmbda, "in [0, 1]", lambda v: 0 <= v <= 1)
    is_trained = trained_by(optimizer)
    perturb = masked_ascent(sam_perturb(rho), is_trained)
    inner = lagged(optimizer, optax.chain(clean_gradient(), perturb))

    def init_fn(params: PyTree) -> SampaState:
        lagged_state = inner.init(params)
        gradient = optax.tree.zeros_like(params)
        return SampaState(jnp.zeros((), jnp.int32), gradient, lagged_state)

    def update_fn(
        updates: PyTree,
        state: SampaState,
        params: PyTree = None,
        *,
        grad_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SampaState]:
        checks.check_update(state, SampaState, params, "sampa")
        checks.check_structure(updates, state.gradient, "sampa")
        extra_args = with_synonyms(extra_args)
        grad_fn = required_gradient_fn("sampa", grad_fn, extra_args)
        clean = eval_params(state.lagged_state, params)
        rate = jnp.asarray(value_at(learning_rate, state.step))
        point = numerics.add_scaled(clean, -rate, state.gradient)
        gradient = gradient_at(point, grad_fn, updates)[0]
        share = jnp.asarray(value_at(lmbda, state.step))
        mixed = numerics.add_scaled(
            updates,
            share,
            numerics.difference(gradient, updates),
        )
        new_updates, lagged_state = inner.update(
            mixed,
            state.lagged_state,
            params,
            **passing(extra_args, grad_fn=lambda _: gradient),
        )
        step = optax.safe_increment(state.step)
        # Zero where the optimizer moves nothing, so that y does not move there either.
        kept = jax.tree.map(
            lambda new, old, moves: numerics.finite_or(new, old) if moves else old,
            numerics.cast_like(gradient, state.gradient),
            state.gradient,
            is_trained(params),
        )
        return new_updates, SampaState(step, kept, lagged_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
