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

from optax_vasso import numerics
from optax_vasso.automatic import (
    adapted,
    check_adaptation,
    check_projection,
    followed_cosine,
    innovation_of,
    kept,
    projected_radius,
    scalar,
)
from optax_vasso.smoothing import moving_average, newest_weight, zeros_like
from optax_vasso.validation import (
    Hyperparameter,
    check_not_negative,
    check_params,
    check_state,
    check_theta,
    value_at,
)

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


def unbuffered_vasso(
    rho: Hyperparameter, theta: Hyperparameter, *, sign: int = 1
) -> optax.GradientTransformationExtraArgs:
    """The chain of ``vasso_ema(theta)``, ``sam_perturb(rho)`` and ``scale(sign)``.

    With d_{t−1} = ‖d_{t−1}‖ ε_{t−1}/(± ρ_{t−1}). Where ρ was zero the average starts
    again at the newest gradient.
    """
    check_not_negative("rho", rho)
    check_theta(theta)

    def init_fn(params: PyTree) -> UnbufferedState:
        check_params(params)
        check_carries_average(params)
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
        check_state(state, UnbufferedState, "lagged_vasso")
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
        new_state = UnbufferedState(
            step=optax.safe_increment(state.step),
            norm=jnp.where(radius == 0, 0, norm).astype(state.norm.dtype),
            radius=radius.astype(state.radius.dtype),
        )
        return new, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class UnbufferedAutomaticState(NamedTuple):
    """State of :func:`unbuffered_automatic`: scalars but for one buffer.

    Attributes:
      step: gradients taken in.
      innovation: as in :class:`optax_vasso.automatic.SelfTunedEmaState`.
      norm: ‖d‖₂ of the smoothed slope; zero where the average is to start at the next
        gradient.
      gain: as in :class:`optax_vasso.automatic.SelfTunedEmaState`.
      cosine: as in :class:`optax_vasso.automatic.ProjectedState`.
      radius: ρ of the last perturbation.
      metrics: ``theta`` and ``rho``.
    """

    step: jax.Array
    innovation: PyTree
    norm: jax.Array
    gain: jax.Array
    cosine: jax.Array
    radius: jax.Array
    metrics: dict[str, jax.Array]


def unbuffered_automatic(
    r: Hyperparameter,
    *,
    start: float = 0.1,
    floor: float = 0.02,
    speed: float = 0.1,
    most: float = 6.0,
    weight: float = 0.05,
) -> optax.GradientTransformationExtraArgs:
    """``projected_perturb(r, self_tuned_ema())`` without a buffer for the average.

    For :func:`optax_vasso.lagged`, whose last perturbation carries the average, as in
    :func:`unbuffered_vasso`.
    """
    check_adaptation(start, floor, speed)
    check_projection(r, most, weight)

    def init_fn(params: PyTree) -> UnbufferedAutomaticState:
        check_params(params)
        check_carries_average(params)
        return UnbufferedAutomaticState(
            step=jnp.zeros((), jnp.int32),
            innovation=zeros_like(params, None),
            norm=scalar(0.0),
            gain=scalar(start),
            cosine=scalar(1.0),
            radius=scalar(0.0),
            metrics={"theta": scalar(0.0), "rho": scalar(0.0)},
        )

    def update_fn(
        updates: PyTree,
        state: UnbufferedAutomaticState,
        params: PyTree = None,
        *,
        perturbation: PyTree,
        **extra_args: Any,
    ) -> tuple[PyTree, UnbufferedAutomaticState]:
        del params, extra_args
        check_state(state, UnbufferedAutomaticState, "auto_lagged_vasso")
        before = recovered_average(updates, perturbation, state.norm, state.radius)
        innovation = innovation_of(updates, before)
        cosine = numerics.dot(innovation, state.innovation)
        gain = adapted(state.gain, cosine, floor, speed)
        starts = state.norm == 0
        theta = newest_weight(starts, gain)
        average = moving_average(theta, updates, before)
        unit, norm = numerics.normalize_with_norm(average, 1.0)
        cosine = numerics.dot(unit, numerics.normalize(updates))
        followed = followed_cosine(state.cosine, cosine, weight)
        rho = projected_radius(value_at(r, state.step), followed, most)
        return numerics.map_updates(
            lambda u: rho.astype(jnp.abs(u).dtype) * u, unit
        ), UnbufferedAutomaticState(
            step=optax.safe_increment(state.step),
            innovation=kept(innovation, state.innovation, starts),
            norm=jnp.where(rho == 0, 0, norm).astype(state.norm.dtype),
            gain=gain,
            cosine=followed,
            radius=rho,
            metrics={"theta": theta, "rho": rho},
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_carries_average(params: PyTree) -> None:
    """Raise a ValueError if a perturbation like the parameters would round too much."""
    for path, leaf in jax.tree.leaves_with_path(params):
        if numerics.has_few_bits(leaf):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has dtype {leaf.dtype}, which "
                "rounds away the average that it is to carry: pass "
                "accumulator_dtype=jnp.float32 to keep the average apart."
            )


def recovered_average(
    updates: PyTree, perturbation: PyTree, norm: jax.Array, radius: jax.Array
) -> PyTree:
    """The last average, from its length and the perturbation of the signed radius.

    In float32 or wider, where there is an update; zero where ``norm`` is.
    """
    dtype = numerics.accumulation_dtype(updates, perturbation)
    inverse = (1 / jnp.where(radius == 0, 1, radius)).astype(dtype)
    length = norm.astype(dtype)
    return numerics.map_updates(
        # One after the other: their product may be out of range.
        lambda _, e: length * (inverse * numerics.widen(e, dtype)),
        updates,
        perturbation,
    )
