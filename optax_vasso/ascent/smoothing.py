"""Averages of the gradient over steps: the first part of an ascent chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import checks, numerics
from optax_vasso._internal.checks import Hyperparameter, value_at

PyTree = Any


class VassoEmaState(NamedTuple):
    """State of :func:`vasso_ema`.

    Attributes:
      step: gradients taken in, an int32 scalar.
      ema: the average d, like the parameters; zero before the first gradient.
    """

    step: jax.Array
    ema: PyTree


class FriendlyNoiseState(NamedTuple):
    """State of :func:`friendly_noise`.

    Attributes:
      step: gradients taken in, an int32 scalar.
      ema: the estimate m of the full gradient, like the parameters.
    """

    step: jax.Array
    ema: PyTree


def vasso_ema(
    theta: Hyperparameter, *, accumulator_dtype: Any = None
) -> optax.GradientTransformation:
    """Average the gradient over steps: VaSSO's variance suppression.

    d_0 = g_0 and d_t = (1 − θ) d_{t−1} + θ g_t. With θ = 1 this is the identity, and
    the chain with :func:`sam_perturb` is SAM. A smaller θ averages over about 1/θ
    gradients: at a fixed point with gradient variance σ², the mean squared error of d_t
    tends to σ² θ/(2 − θ). Non-finite entries of a gradient are skipped.

    Args:
      theta: weight of the newest gradient, in (0, 1]: a number, a schedule of the
        step, or a traced scalar. The papers use 0.4 for residual networks, 0.9
        elsewhere, and 0.2 under heavy label noise.
      accumulator_dtype: float dtype of the average in the state, its complex twin for
        complex leaves; by default that of the parameters. The average is computed in
        float32 or wider either way.

    Returns:
      A :class:`optax.GradientTransformation` whose output d_t has the dtypes of the
      gradient.

    Raises:
      ValueError: if theta is a number outside (0, 1] or accumulator_dtype is no float
        dtype; at ``init``, if the parameters have no leaves or an integer leaf; at
        ``update``, if the tree has changed.

    Examples:
      The difference between two batches cancels, their common part remains:

      >>> import jax.numpy as jnp
      >>> from optax_vasso import vasso_ema
      >>> smooth = vasso_ema(theta=0.5)
      >>> state = smooth.init(jnp.zeros(2))
      >>> for grads in (jnp.array([1.0, 1.0]), jnp.array([1.0, -1.0])):
      ...     direction, state = smooth.update(grads, state)
      >>> print(direction)
      [1. 0.]

    References:
      Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance
      Suppression <https://arxiv.org/abs/2309.15639>`_, 2023, Algorithm 1.
    """
    checks.check_theta(theta)
    return _averaging(
        VassoEmaState,
        "vasso_ema",
        lambda step: value_at(theta, step),
        lambda updates, state, average: numerics.cast_updates(average, updates),
        accumulator_dtype,
    )


class CarriedEmaState(NamedTuple):
    """State of :func:`carried_ema`.

    Attributes:
      step: gradients taken in, an int32 scalar.
    """

    step: jax.Array


def carried_ema(theta: Hyperparameter) -> optax.GradientTransformationExtraArgs:
    """:func:`vasso_ema` without a buffer, for :func:`optax_vasso.lagged`.

    ``lagged`` stores d_{t−1} as the direction of the perturbation and passes it as the
    extra argument ``direction``, whose dtype, float32 or wider, the average has.
    """
    checks.check_theta(theta)

    def init_fn(params: PyTree) -> CarriedEmaState:
        checks.check_params(params)
        return CarriedEmaState(step=jnp.zeros((), jnp.int32))

    def update_fn(
        updates: PyTree,
        state: CarriedEmaState,
        params: PyTree = None,
        *,
        direction: PyTree,
        **extra_args: Any,
    ) -> tuple[PyTree, CarriedEmaState]:
        del params, extra_args
        checks.check_state(state, CarriedEmaState, "carried_ema")
        weight = newest_weight(state.step == 0, value_at(theta, state.step))
        average = numerics.map_updates(
            lambda g, d: _combine(weight, g, 1 - weight, d), updates, direction
        )
        return average, CarriedEmaState(step=optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def friendly_noise(
    sigma: Hyperparameter, lmbda: Hyperparameter, *, accumulator_dtype: Any = None
) -> optax.GradientTransformation:
    """Subtract the average gradient, keep the noise of the batch: Friendly SAM.

    The first step passes g_0 on and sets m_0 = g_0; from then on n_t = g_t − σ m_{t−1}
    and m_t = λ m_{t−1} + (1 − λ) g_t. The paper subtracts σ m_t; the authors' code
    subtracts m_{t−1}, and so does this. At σ = 1 the two have the same direction, n_t =
    (g_t − m_t)/λ. The average skips non-finite entries.

    Args:
      sigma: share of the average gradient to subtract; 0 is SAM. A number, a schedule
        of the step, or a traced scalar.
      lmbda: decay of the average, in [0, 1): a number, a schedule, or traced.
      accumulator_dtype: dtype of the average in the state; by default that of the
        parameters.

    Returns:
      A :class:`optax.GradientTransformation` whose output n_t has the dtypes of the
      gradient; in float16 a difference that is out of range ends at ±65,504.

    Raises:
      ValueError: if sigma is not a finite number >= 0 or lmbda is outside [0, 1); at
        ``init``, if the parameters have no leaves or an integer leaf; at ``update``,
        if the tree has changed.

    Examples:
      The common part of two batches is subtracted, the rest of the second remains:

      >>> import jax.numpy as jnp
      >>> from optax_vasso import friendly_noise
      >>> noise = friendly_noise(sigma=1.0, lmbda=0.6)
      >>> state = noise.init(jnp.zeros(2))
      >>> for grads in (jnp.array([1.0, 1.0]), jnp.array([1.0, -1.0])):
      ...     direction, state = noise.update(grads, state)
      >>> print(direction)
      [ 0. -2.]

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, 2024, Algorithm 1.
    """
    checks.check_not_negative("sigma", sigma)
    checks.check_hyperparameter("lmbda", lmbda, "in [0, 1)", lambda v: 0 <= v < 1)

    def noise(updates: PyTree, state: FriendlyNoiseState, average: PyTree) -> PyTree:
        del average
        share = -jnp.asarray(value_at(sigma, state.step))
        return numerics.map_updates(
            lambda g, m: _saturated(_combine(1.0, g, share, m), g), updates, state.ema
        )

    return _averaging(
        FriendlyNoiseState,
        "friendly_noise",
        lambda step: 1.0 - value_at(lmbda, step),
        noise,
        accumulator_dtype,
    )


def _averaging(
    kind: Any,
    name: str,
    newest: Callable[[jax.Array], jax.typing.ArrayLike],
    output: Callable[[PyTree, Any, PyTree], PyTree],
    accumulator_dtype: Any,
) -> optax.GradientTransformation:
    """A transformation with a moving average of the gradients in its state.

    ``newest(step)`` is the weight of the newest gradient, and ``output(updates, state,
    average)`` what the transformation returns, from the old state and the new average.
    """
    checks.check_accumulator_dtype(accumulator_dtype)

    def init_fn(params: PyTree) -> Any:
        checks.check_params(params)
        return kind(
            step=jnp.zeros((), jnp.int32), ema=zeros_like(params, accumulator_dtype)
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree = None
    ) -> tuple[PyTree, Any]:
        del params
        checks.check_state(state, kind, name)
        checks.check_structure(updates, state.ema, name)
        weight = newest_weight(state.step == 0, newest(state.step))
        average = moving_average(weight, updates, state.ema)
        return output(updates, state, average), kind(
            step=optax.safe_increment(state.step),
            ema=numerics.cast_like(average, state.ema),
        )

    return optax.GradientTransformation(init_fn, update_fn)


def zeros_like(params: PyTree, dtype: Any) -> PyTree:
    """Zeros like the parameters, of a float dtype or its complex twin."""
    if dtype is None:
        return optax.tree.zeros_like(params)
    twin = numerics.complex_twin(jnp.dtype(dtype))
    return jax.tree.map(
        lambda x: jnp.zeros_like(x, dtype=twin if jnp.iscomplexobj(x) else dtype),
        params,
    )


def newest_weight(first: jax.Array, weight: jax.typing.ArrayLike) -> jax.Array:
    """The weight of the newest gradient in an average, which is one at the first step.

    A division, which XLA computes once; it would repeat a selection for every leaf.
    """
    weight = jnp.asarray(weight, jax.dtypes.canonicalize_dtype(float))
    return weight / jnp.where(first & (weight != 0), weight, 1.0)


def _combine(
    a: jax.typing.ArrayLike, x: jax.Array, b: jax.typing.ArrayLike, y: jax.Array
) -> jax.Array:
    """Compute a x + b y in float32 or wider."""
    dtype = numerics.accumulation_dtype(x, y)
    return jnp.asarray(a, dtype) * numerics.widen(x, dtype) + jnp.asarray(
        b, dtype
    ) * numerics.widen(y, dtype)


def _saturated(wide: jax.Array, like: jax.Array) -> jax.Array:
    """Cast, clipping to the largest number in dtypes with the range of float16.

    An infinite gradient stays infinite, so that others can see it.
    """
    info = jnp.finfo(like.dtype)
    if info.nexp < 8:
        most = float(info.max)
        wide = jnp.where(jnp.isfinite(like), jnp.clip(wide, -most, most), wide)
    return wide.astype(like.dtype)


def moving_average(
    weight: jax.typing.ArrayLike, updates: PyTree, average: PyTree
) -> PyTree:
    """(1 − w) average + w updates; the old average where an update is None.

    Entries that are not finite in the dtype of the average are skipped. The first step
    has w = 1 and an average of zeros: it returns the first gradient without rounding.
    """
    return jax.tree.map(
        lambda g, d: (
            d
            if g is None
            else _combine(weight, numerics.finite_or(g, d), 1 - weight, d)
        ),
        updates,
        average,
        is_leaf=lambda g: g is None,
    )
