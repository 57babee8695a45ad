"""A perturbation in proportion to how far the loss has fallen."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import numerics
from optax_vasso._internal.checks import (
    Hyperparameter,
    check_hyperparameter,
    check_integer,
    check_loss,
    check_number,
    check_params,
    check_state,
    check_transformation,
    value_at,
)
from optax_vasso._internal.trees import Report
from optax_vasso.ascent.perturb import sam_perturb
from optax_vasso.ascent.smoothing import vasso_ema

PyTree = Any


class CollapseGuardState(NamedTuple):
    """State of :func:`collapse_guard`.

    Attributes:
      step: calls so far, an int32 scalar.
      loss: the moving average of the loss, a float32 (under x64 float64) scalar.
      waited: number of calls since the average was last below the margin, an int32
        scalar.
      guarded_state: the state of the ascent chain that is guarded.
      report: ``guard``, the factor in [0, 1] on the perturbation, a float32 (under x64
        float64) scalar.
    """

    step: jax.Array
    loss: jax.Array
    waited: jax.Array
    guarded_state: optax.OptState
    report: Report


def collapse_guard(
    ascent: optax.GradientTransformation,
    ceiling: Hyperparameter,
    *,
    margin: float = 0.02,
    patience: int = 20,
    weight: float = 0.05,
) -> optax.GradientTransformationExtraArgs:
    """Shorten the perturbation of a model no better than a constant prediction.

    A collapsed training stays at the loss of the best constant prediction, where a
    perturbation undoes whatever is learned. So follow the loss by a moving average l_t.
    If it has not been below ``(1 - margin) * ceiling`` for ``patience`` steps, multiply
    ε by::

        clip((ceiling - l_t) / (margin * ceiling), 0, 1)

    until it is. Non-finite losses are skipped, and a loss above ten ceilings counts as
    ten. A training that learns within its first ``patience`` steps and does not fall
    back is not changed. Without patience and with a wide margin, the perturbation is
    proportional to how far the loss has fallen, as in :func:`optax_vasso.auto_vasso`.
    The guard costs three scalars.

    Args:
      ascent: any ascent chain. Its extra arguments are passed on.
      ceiling: the loss of the best constant prediction, > 0: for cross-entropy log C
        with C classes that are equally frequent, else the entropy of their frequencies,
        both in nats. A number, a schedule of the step, or a traced scalar.
      margin: fraction of the ceiling by which the loss must fall before ε is applied in
        full, in (0, 1).
      patience: number of steps above the margin before ε is shortened, an integer >= 0.
      weight: weight of the newest loss in the average, in (0, 1].

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` whose ``update`` needs the loss
      as the extra argument ``value``: :func:`optax_vasso.make_train_step` passes it.
      With a lagged optimizer it is the perturbed loss. Its state reports ``guard``
      among the metrics.

    Raises:
      ValueError: if ascent is no transformation or a number is out of its range; at
        ``init``, if the parameters have no leaves or an integer leaf; at ``update``, if
        ``value`` is missing or no scalar.

    Examples:
      The second step near the ceiling exhausts the patience:

      >>> import jax.numpy as jnp
      >>> from optax_vasso import sam_perturb
      >>> from optax_vasso.ascent import collapse_guard
      >>> ascent = collapse_guard(
      ...     sam_perturb(0.5), ceiling=2.0, margin=0.25, patience=2, weight=1.0
      ... )
      >>> grads = jnp.array([3.0, 4.0])
      >>> state = ascent.init(grads)
      >>> for loss in (2.0, 1.75, 1.0):
      ...     perturbation, state = ascent.update(grads, state, value=loss)
      ...     print(perturbation, state.report.metrics["guard"])
      [0.3 0.4] 1.0
      [0.15 0.2 ] 0.5
      [0.3 0.4] 1.0
    """
    check_transformation("ascent", ascent)
    check_hyperparameter(
        "ceiling", ceiling, "a finite number > 0", lambda v: 0 < v < float("inf")
    )
    check_number("margin", margin, "in (0, 1)", lambda v: 0 < v < 1)
    check_integer("patience", patience, 0)
    check_number("weight", weight, "in (0, 1]", lambda v: 0 < v <= 1)
    ascent = optax.with_extra_args_support(ascent)

    def init_fn(params: PyTree) -> CollapseGuardState:
        check_params(params)
        loss, guard = numerics.state_scalar(), numerics.state_scalar()
        return CollapseGuardState(
            step=jnp.zeros((), jnp.int32),
            loss=loss,
            waited=jnp.zeros((), jnp.int32),
            guarded_state=ascent.init(params),
            report=Report({"guard": guard}),
        )

    def update_fn(
        updates: PyTree,
        state: CollapseGuardState,
        params: PyTree = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, CollapseGuardState]:
        check_state(state, CollapseGuardState, "collapse_guard")
        if value is None:
            raise ValueError(
                "collapse_guard needs the loss as value, got None: use "
                "make_train_step, or call update(grads, state, params, value=loss)."
            )
        check_loss(value)
        perturbation, guarded_state = ascent.update(
            updates, state.guarded_state, params, value=value, **extra_args
        )
        dtype = state.loss.dtype
        newest, high, newest_share, by = (
            jnp.asarray(x).astype(dtype)
            for x in (value, value_at(ceiling, state.step), weight, margin)
        )
        is_first = state.step == 0
        last = jnp.where(is_first, high, state.loss)
        # Neither one that is not finite nor one of 1e30 may stay in the average.
        newest = jnp.where(jnp.isfinite(newest), jnp.minimum(newest, 10 * high), last)
        loss = jnp.where(is_first, newest, last + newest_share * (newest - last))
        learned = (high - loss) / (by * high)
        waited = jnp.where(learned > 1, 0, optax.safe_increment(state.waited))
        share = jnp.where(waited < patience, 1, jnp.clip(learned, 0, 1))
        return numerics.map_updates(
            lambda e: share.astype(jnp.abs(e).dtype) * e, perturbation
        ), CollapseGuardState(
            step=optax.safe_increment(state.step),
            loss=loss,
            waited=waited,
            guarded_state=guarded_state,
            report=Report({"guard": share}),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def automatic_ascent(
    ceiling: Hyperparameter,
    rho: Hyperparameter,
    theta: Hyperparameter,
    accumulator_dtype: Any,
) -> optax.GradientTransformationExtraArgs:
    """The ascent chain of the automatic methods."""
    ascent = optax.chain(
        vasso_ema(theta, accumulator_dtype=accumulator_dtype), sam_perturb(rho)
    )
    return collapse_guard(ascent, ceiling, margin=0.15, patience=0)
