"""Averages whose direction the lagged perturbation carries: one buffer, not two.

:func:`optax_vasso.lagged` keeps the last perturbation and passes it on to the ascent
chain. Where that is the last average but for its length, two scalars are all that is
left to store.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import numerics
from optax_vasso._internal.checks import (
    Hyperparameter,
    check_not_negative,
    check_params,
    check_state,
    check_theta,
    value_at,
)
from optax_vasso.ascent.smoothing import newest_weight

PyTree = Any


class UnbufferedState(NamedTuple):
    """State of an average without a buffer.

    Attributes:
      step: gradients taken in, an int32 scalar.
      norm: ‖d‖₂ of the average, a float32 (under x64 float64) scalar; zero where it is
        to start at the next gradient.
      radius: the ρ of the last perturbation, likewise; negative where ε points against
        the average.
    """

    step: jax.Array
    norm: jax.Array
    radius: jax.Array


class UnbufferedDescentState(UnbufferedState):
    """The same with ε against the average; neither is taken for the other."""


def unbuffered_vasso(
    rho: Hyperparameter, theta: Hyperparameter, *, sign: int = 1
) -> optax.GradientTransformationExtraArgs:
    """The chain of ``vasso_ema(theta)``, ``sam_perturb(rho)`` and ``scale(sign)``.

    With d_{t−1} = ‖d_{t−1}‖ ε_{t−1}/(± ρ_{t−1}). Where ρ was zero the average starts
    again at the newest gradient.
    """
    check_not_negative("rho", rho)
    check_theta(theta)
    kind = UnbufferedState if sign > 0 else UnbufferedDescentState

    def init_fn(params: PyTree) -> UnbufferedState:
        check_params(params)
        for path, leaf in jax.tree.leaves_with_path(params):
            if numerics.has_few_bits(leaf):
                raise ValueError(
                    f"params{jax.tree_util.keystr(path)} has dtype {leaf.dtype}, which "
                    "rounds away the average that it is to carry: pass "
                    "accumulator_dtype=jnp.float32 to keep the average apart."
                )
        norm, radius = numerics.state_scalar(), numerics.state_scalar()
        return kind(jnp.zeros((), jnp.int32), norm, radius)

    def update_fn(
        updates: PyTree,
        state: UnbufferedState,
        params: PyTree = None,
        *,
        perturbation: PyTree,
        **extra_args: Any,
    ) -> tuple[PyTree, UnbufferedState]:
        del params, extra_args
        check_state(state, kind, "lagged_vasso" if sign > 0 else "momentum_sam")
        dtype = numerics.accumulation_dtype(updates, perturbation)
        starts = state.norm == 0
        weight = newest_weight(starts, value_at(theta, state.step)).astype(dtype)
        length = ((1 - weight) * state.norm.astype(dtype)).astype(dtype)
        inverse = (1 / jnp.where(state.radius == 0, 1, state.radius)).astype(dtype)
        average = numerics.map_updates(
            lambda g, e: (
                weight * numerics.widen(g, dtype)
                # One after the other: their product may be out of range.
                + length * (inverse * numerics.widen(e, dtype))
            ),
            updates,
            perturbation,
        )
        radius = sign * jnp.asarray(value_at(rho, state.step), dtype)
        new, norm = numerics.normalize_with_norm(average, radius)
        new_state = kind(
            step=optax.safe_increment(state.step),
            norm=jnp.where(radius == 0, 0, norm).astype(state.norm.dtype),
            radius=radius.astype(state.radius.dtype),
        )
        return new, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
