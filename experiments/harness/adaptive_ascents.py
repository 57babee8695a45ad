"""Hyperparameters that follow what the gradients show: the gain θ and the radius ρ."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import numerics
from optax_vasso._internal.checks import (
    Hyperparameter,
    check_accumulator_dtype,
    check_hyperparameter,
    check_not_negative,
    check_params,
    check_state,
    check_structure,
    check_transformation,
    value_at,
)
from optax_vasso._internal.trees import Report
from optax_vasso.ascent.smoothing import (
    cast_to_updates,
    moving_average,
    newest_weight,
    zeros_like,
)

PyTree = Any


class SelfTunedEmaState(NamedTuple):
    """State of :func:`self_tuned_ema`.

    Attributes:
      step: gradients taken in, an int32 scalar.
      ema: the smoothed slope d, like the parameters; zero before the first gradient.
      innovation: e_t/‖e_t‖ of the last step, e_t = g_t − d_{t−1}, likewise; zero before
        the second gradient.
      gain: θ as the innovations have left it, a float32 (under x64 float64) scalar.
      report: ``theta``, the weight that the last gradient got, likewise.
    """

    step: jax.Array
    ema: PyTree
    innovation: PyTree
    gain: jax.Array
    report: Report


class ProjectedState(NamedTuple):
    """State of :func:`projected_perturb`.

    Attributes:
      step: calls so far, an int32 scalar.
      cosine: the moving average of cos(d, g), a float32 (under x64 float64) scalar.
      smoothing_state: the state of the transformation that gives d.
      report: ``rho``, the length of the last perturbation, likewise.
    """

    step: jax.Array
    cosine: jax.Array
    smoothing_state: optax.OptState
    report: Report


def self_tuned_ema(
    start: Hyperparameter = 0.1,
    floor: Hyperparameter = 0.02,
    speed: Hyperparameter = 0.1,
    *,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformation:
    """Smooth the slope as :func:`vasso_ema` does, with a θ that finds itself.

    d_0 = g_0 and d_t = (1 − θ_t) d_{t−1} + θ_t g_t. What d_{t−1} did not foresee is the
    innovation e_t = g_t − d_{t−1}. Where it keeps its direction from step to step, the
    average lags behind, and θ is too small; where it turns round, the average follows
    the noise, and θ is too large. So::

        logit θ_t = logit θ_{t−1} + speed · cos(e_t, e_{t−1})

    For a gradient that is a random walk seen through white noise, innovations are
    uncorrelated at the gain of the steady-state Kalman filter, and there θ comes to
    rest. At a fixed point, with noise alone, 1/θ grows by speed/2 per step until θ is
    at its floor. It keeps one buffer more than :func:`vasso_ema`, the last innovation.

    Args:
      start: θ of the second gradient, in (0, 1) (the first has the weight 1): a number
        or a traced scalar.
      floor: θ stays in [floor, 1 − floor], with floor in (0, 0.5]: a number, a schedule
        of the step, or a traced scalar.
      speed: of the adaptation, >= 0; 0 keeps θ at its start. Likewise.
      accumulator_dtype: float dtype of the average in the state, as in
        :func:`vasso_ema`.

    Returns:
      A :class:`optax.GradientTransformation` whose output d_t has the dtypes of the
      gradient. Its state reports ``theta`` among the metrics.

    Raises:
      ValueError: if a number is out of its range or accumulator_dtype is no float
        dtype; at ``init``, if the parameters have no leaves or an integer leaf; at
        ``update``, if the tree has changed.

    Examples:
      Batches that disagree make θ smaller:

      >>> import jax.numpy as jnp
      >>> from experiments.harness.adaptive_ascents import self_tuned_ema
      >>> smooth = self_tuned_ema(start=0.5)
      >>> state = smooth.init(jnp.zeros(2))
      >>> for slope in (1.0, -1.0, 1.0, -1.0):
      ...     direction, state = smooth.update(jnp.full(2, slope), state)
      >>> print(state.report.metrics["theta"])
      0.450

    References:
      Mehra, On the Identification of Variances and Adaptive Kalman Filtering, IEEE
      Transactions on Automatic Control 15, 1970, has the test of the innovations.
    """
    check_hyperparameter("start", start, "in (0, 1)", lambda v: 0 < v < 1)
    check_hyperparameter("floor", floor, "in (0, 0.5]", lambda v: 0 < v <= 0.5)
    check_not_negative("speed", speed)
    check_accumulator_dtype(accumulator_dtype)

    def init_fn(params: PyTree) -> SelfTunedEmaState:
        check_params(params)
        return SelfTunedEmaState(
            step=jnp.zeros((), jnp.int32),
            ema=zeros_like(params, accumulator_dtype),
            innovation=zeros_like(params, accumulator_dtype),
            gain=numerics.state_scalar(value_at(start, jnp.zeros((), jnp.int32))),
            report=Report({"theta": numerics.state_scalar()}),
        )

    def update_fn(
        updates: PyTree, state: SelfTunedEmaState, params: PyTree = None
    ) -> tuple[PyTree, SelfTunedEmaState]:
        del params
        check_state(state, SelfTunedEmaState, "self_tuned_ema")
        check_structure(updates, state.ema, "self_tuned_ema")
        innovation = _innovation(updates, state.ema)
        gain = _adapted(
            state.gain,
            numerics.dot(innovation, state.innovation),
            value_at(floor, state.step),
            value_at(speed, state.step),
        )
        is_first = state.step == 0
        theta = newest_weight(is_first, gain)
        average = moving_average(theta, updates, state.ema)
        return cast_to_updates(average, updates), SelfTunedEmaState(
            step=optax.safe_increment(state.step),
            ema=numerics.cast_like(average, state.ema),
            innovation=_kept(innovation, state.innovation, is_first),
            gain=gain,
            report=Report({"theta": theta}),
        )

    return optax.GradientTransformation(init_fn, update_fn)


def projected_perturb(
    r: Hyperparameter,
    smoothing: optax.GradientTransformation,
    *,
    most: float = 6.0,
    weight: float = 0.05,
) -> optax.GradientTransformationExtraArgs:
    """Give a smoothed direction the length at which it is r long along the gradient.

    The smoother d, the less of ε = ρ d/‖d‖ points along the gradient g of the batch,
    and the larger is the ρ at which training collapses; ρ cos(d, g) at the cliff hardly
    depends on the smoothing. So hold that: ρ_t = r/c_t, where c_t is a moving average
    of cos(d_t, g_t) that starts at 1. To first order the loss of the batch then rises
    by r‖g‖, as for SAM with the radius r. In pure noise, with :func:`vasso_ema`,
    ρ tends to r/√(θ(2 − θ)).

    Since c starts at 1, ρ starts at r and grows with the steps over which d has been
    averaged.

    Args:
      r: length of ε along the gradient, >= 0: a number, a schedule of the step, or a
        traced scalar.
      smoothing: a transformation from g to d, such as :func:`vasso_ema`,
        :func:`self_tuned_ema` or :func:`friendly_noise`.
      most: ρ stays in [r, most · r], with most >= 1.
      weight: of the newest cosine in c, in (0, 1].

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`, a whole ascent chain: its input
      is the gradient, and its output is to be *added* to the parameters. Its state
      reports ``rho`` among the metrics.

    Raises:
      ValueError: if a number is out of its range or smoothing is no transformation; at
        ``init``, if the parameters have no leaves or an integer leaf.

    Examples:
      The average of two gradients at right angles is at 45° to the second, so the
      perturbation is on its way from 0.1 to 0.1 · √2:

      >>> import jax.numpy as jnp
      >>> from experiments.harness.adaptive_ascents import projected_perturb
      >>> from optax_vasso import vasso_ema
      >>> ascent = projected_perturb(0.1, vasso_ema(theta=0.5))
      >>> state = ascent.init(jnp.zeros(2))
      >>> for grads in (jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])):
      ...     perturbation, state = ascent.update(grads, state)
      ...     print(perturbation, state.report.metrics["rho"])
      [0.1 0. ] 0.1
      [0.072 0.072] 0.101
    """
    check_not_negative("r", r)
    check_hyperparameter("most", most, "a number >= 1", lambda v: 1 <= v < float("inf"))
    check_hyperparameter("weight", weight, "in (0, 1]", lambda v: 0 < v <= 1)
    check_transformation("smoothing", smoothing)
    smoothing = optax.with_extra_args_support(smoothing)

    def init_fn(params: PyTree) -> ProjectedState:
        check_params(params)
        return ProjectedState(
            step=jnp.zeros((), jnp.int32),
            cosine=numerics.state_scalar(1.0),
            smoothing_state=smoothing.init(params),
            report=Report({"rho": numerics.state_scalar()}),
        )

    def update_fn(
        updates: PyTree, state: ProjectedState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, ProjectedState]:
        check_state(state, ProjectedState, "projected_perturb")
        direction, smoothing_state = smoothing.update(
            updates, state.smoothing_state, params, **extra_args
        )
        unit = numerics.normalize(direction)
        cosine = numerics.dot(unit, numerics.normalize(updates))
        average = _followed(state.cosine, cosine, weight)
        rho = _radius(value_at(r, state.step), average, most)
        return numerics.map_updates(
            lambda g, u: (rho.astype(jnp.abs(u).dtype) * u).astype(g.dtype),
            updates,
            unit,
        ), ProjectedState(
            step=optax.safe_increment(state.step),
            cosine=average,
            smoothing_state=smoothing_state,
            report=Report({"rho": rho}),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _innovation(updates: PyTree, average: PyTree) -> PyTree:
    """The direction of what the average did not foresee, in float32 or wider."""
    dtype = numerics.accumulation_dtype(updates, average)
    return numerics.normalize(
        numerics.map_updates(
            lambda g, d: numerics.widen(g, dtype) - numerics.widen(d, dtype),
            updates,
            average,
        )
    )


def _kept(innovation: PyTree, last: PyTree, starts: jax.Array) -> PyTree:
    """What is remembered of an innovation: nothing of that of an average's start."""
    return numerics.cast_like(
        jax.tree.map(lambda e: jnp.where(starts, 0, e), innovation), last
    )


def _adapted(theta: jax.Array, cosine: jax.Array, floor: Any, speed: Any) -> jax.Array:
    """The logistic function of logit θ + speed · cosine, in [floor, 1 − floor]."""
    speed, cosine, floor = (jnp.asarray(x, theta.dtype) for x in (speed, cosine, floor))
    odds = theta * jnp.exp(speed * cosine)
    return jnp.clip(odds / (1 - theta + odds), floor, 1 - floor)


def _followed(average: jax.Array, cosine: jax.Array, weight: Any) -> jax.Array:
    """The moving average of the cosine."""
    weight, cosine = (jnp.asarray(x, average.dtype) for x in (weight, cosine))
    return average + weight * (cosine - average)


def _radius(r: Any, cosine: jax.Array, most: Any) -> jax.Array:
    """r/cosine, in [r, most · r]."""
    r, most = (jnp.asarray(x, cosine.dtype) for x in (r, most))
    return r / jnp.clip(cosine, 1 / most, 1.0)
