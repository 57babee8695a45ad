"""Averages whose direction the lagged perturbation carries: one buffer, not two.

:func:`optax_vasso.lagged` keeps the last perturbation and passes it on to the ascent
chain. Where that is the last average but for its length, two scalars are all that is
left to store.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso import numerics
from optax_vasso.validation import (
    Hyperparameter,
    check_hyperparameter,
    check_not_negative,
    check_params,
    check_state,
    check_theta,
    value_at,
)

PyTree = Any
# The step -> weights of the average so far and of the newest gradient.
Weights = Callable[[jax.Array], tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]]


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


def unbuffered_vasso(
    rho: Hyperparameter, theta: Hyperparameter
) -> optax.GradientTransformationExtraArgs:
    """The chain of ``vasso_ema(theta)`` and ``sam_perturb(rho)``.

    Where ρ was zero the average starts again at the newest gradient.
    """
    check_theta(theta)

    def weights(step: jax.Array) -> Any:
        share = value_at(theta, step)
        return 1 - share, share

    return _unbuffered(rho, weights, sign=1)


def unbuffered_momentum(
    rho: Hyperparameter, momentum: Hyperparameter
) -> optax.GradientTransformationExtraArgs:
    """The chain of ``optax.trace(momentum)``, ``sam_perturb(rho)`` and ``scale(-1)``.

    Where ρ was zero the momentum starts again at the newest gradient.
    """
    check_hyperparameter("momentum", momentum, "in [0, 1)", lambda v: 0 <= v < 1)
    return _unbuffered(rho, lambda step: (value_at(momentum, step), 1.0), sign=-1)


def _unbuffered(
    rho: Hyperparameter, weights: Weights, *, sign: int
) -> optax.GradientTransformationExtraArgs:
    """ε = ± ρ d/‖d‖ with d_{t−1} = ‖d_{t−1}‖ ε_{t−1}/(± ρ_{t−1})."""
    check_not_negative("rho", rho)

    def init_fn(params: PyTree) -> UnbufferedState:
        check_params(params)
        for path, leaf in jax.tree.leaves_with_path(params):
            if numerics.has_few_bits(leaf):
                raise ValueError(
                    f"params{jax.tree_util.keystr(path)} has dtype {leaf.dtype}, which "
                    "rounds away the average that it is to carry: pass "
                    "accumulator_dtype=jnp.float32 to keep the average apart."
                )
        # Not one zero twice: a buffer can be donated only once.
        norm, radius = (
            jnp.zeros((), jax.dtypes.canonicalize_dtype(float)) for _ in range(2)
        )
        return UnbufferedState(jnp.zeros((), jnp.int32), norm, radius)

    def update_fn(
        updates: PyTree,
        state: UnbufferedState,
        params: PyTree = None,
        *,
        perturbation: PyTree,
        **extra_args: Any,
    ) -> tuple[PyTree, UnbufferedState]:
        del params, extra_args
        check_state(state, UnbufferedState, "this average")
        dtype = numerics.accumulation_dtype(updates, perturbation)
        keep, take = weights(state.step)
        take = jnp.where(state.norm == 0, 1.0, take).astype(dtype)
        length = (keep * state.norm.astype(dtype)).astype(dtype)
        inverse = (1 / jnp.where(state.radius == 0, 1, state.radius)).astype(dtype)
        average = numerics.map_updates(
            lambda g, e: (
                take * numerics.widen(g, dtype)
                # One after the other: their product may be out of range.
                + length * (inverse * numerics.widen(e, dtype))
            ),
            updates,
            perturbation,
        )
        unit, norm = numerics.unit_and_norm(average)
        radius = sign * jnp.asarray(value_at(rho, state.step), dtype)
        new_state = UnbufferedState(
            step=optax.safe_increment(state.step),
            norm=jnp.where(radius == 0, 0, norm).astype(state.norm.dtype),
            radius=radius.astype(state.radius.dtype),
        )
        return numerics.map_updates(lambda u: radius * u, unit), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
