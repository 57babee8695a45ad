"""Check that the perturbation reaches the parameters and points uphill."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_vasso._internal import checks, mapped, numerics
from optax_vasso._internal.trees import Report, collect_metrics, displaced, find_states
from optax_vasso.steps.one_gradient import LaggedState, perturbation_of

PyTree = Any


class ArrivalState(NamedTuple):
    """State of :func:`track_arrival`.

    Attributes:
      expected: ⟨y, ε⟩ of the parameters as they should be at the next step, a scalar.
      report: ``arrived``, the share of ‖ε‖² that the parameters took in.
      optimizer_state: the state of the optimizer.
    """

    expected: jax.Array
    report: Report
    optimizer_state: optax.OptState


def track_arrival(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Check that the perturbation of a lagged optimizer reaches the parameters.

    Freezing, clipping or scaling the updates after :func:`optax_vasso.lagged`, or
    overwriting the parameters, changes the perturbation too, and
    :func:`optax_vasso.eval_params` then returns a wrong point. The metric ``arrived``
    is the share of ‖ε‖² found in the parameters of the next step: 1 if all is well, 0
    if they were frozen, in between if some were. It costs two products of the
    parameters with the perturbation, and no buffer.

    Args:
      optimizer: :func:`optax_vasso.lagged` or a recipe of it, without a wrapper in
        between.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; read the number with
      ``optax.tree.get(state, "arrived")``, or among the metrics of
      :func:`optax_vasso.make_train_step`.

    Raises:
      ValueError: if optimizer is no transformation; at ``init``, if it is not lagged.

    Examples:
      The updates of a lagged optimizer, halved by mistake:

      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso import lagged_vasso
      >>> from optax_vasso.metrics import track_arrival
      >>> optimizer = track_arrival(lagged_vasso(optax.sgd(0.0), rho=0.5))
      >>> params = jnp.array([3.0, 4.0])
      >>> state = optimizer.init(params)
      >>> for _ in range(2):
      ...     updates, state = optimizer.update(params, state, params)
      ...     params = optax.apply_updates(params, 0.5 * updates)
      >>> print(state.report.metrics["arrived"])
      0.5
    """
    checks.check_transformation("optimizer", optimizer)
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: PyTree) -> ArrivalState:
        optimizer_state = optimizer.init(params)
        if not isinstance(optimizer_state, LaggedState):
            raise ValueError(
                "optimizer is not lagged, so there is no perturbation to arrive: wrap "
                "lagged or lagged_vasso itself."
            )
        zero = mapped.vary(numerics.state_scalar(), mapped.varying_axes(params))
        report = Report({"arrived": jnp.ones_like(zero)})
        return ArrivalState(zero, report, optimizer_state)

    def update_fn(
        updates: PyTree, state: ArrivalState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, ArrivalState]:
        checks.check_update(state, ArrivalState, params, "track_arrival")
        before = perturbation_of(state.optimizer_state)
        square = numerics.dot(before, before)
        missing = numerics.dot(before, params) - state.expected
        arrived = 1 + missing / jnp.where(square == 0, 1, square)
        new_updates, optimizer_state = optimizer.update(
            updates, state.optimizer_state, params, **extra_args
        )
        following = displaced(params, new_updates)
        expected = numerics.dot(perturbation_of(optimizer_state), following)
        dtype = state.expected.dtype
        report = Report({"arrived": arrived.astype(dtype)})
        return new_updates, ArrivalState(
            expected.astype(dtype), report, optimizer_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_uphill(state: PyTree, least: float = 0.0) -> None:
    """Warn if the perturbation has pointed downhill on average.

    A lagged perturbation follows the gradients of past steps. If the optimizer
    overshoots, the newest gradient points the other way, and the perturbation lowers
    the loss. With two gradients per step this happens if an optimizer stands in the
    ascent chain without ``optax.scale(-1.0)`` after it. Track the running mean of the
    cosine between perturbation and gradient, and call this from time to time, such as
    after each epoch::

        base = optax.chain(track(running_mean(cosine)), optimizer)
        ...
        check_uphill(state)

    Args:
      state: any state with the metric ``mean_cosine`` in it, once or in several groups
        of a partition, of which the lowest counts.
      least: the mean cosine below which to warn, in [−1, 1].

    Raises:
      ValueError: if no part of the state tracks ``mean_cosine``, the state is being
        traced and has no values yet, or least is outside [−1, 1].

    Warns:
      RuntimeWarning: if the running mean is below ``least``.
    """
    checks.check_number("least", least, "in [-1, 1]", lambda v: -1 <= v <= 1)
    means = [
        value
        for name, value in collect_metrics(state).items()
        if name.split("/")[0] == "mean_cosine"
    ]
    if not means:
        raise ValueError(
            "check_uphill reads the metric mean_cosine, which is not in this state: "
            "chain track(running_mean(cosine)) before the base optimizer."
        )
    for mean in means:
        checks.check_known(mean, "check_uphill")
    slope = min(float(np.mean(mean)) for mean in means)
    if slope < least:
        if find_states(state, LaggedState):
            remedy = (
                "Lower the learning rate, raise theta, or take the opposite sign: "
                "momentum_sam perturbs against the average, lagged_vasso along it."
            )
        else:
            remedy = (
                "Raise theta or lower sigma, and put optax.scale(-1.0) after an "
                "optimizer in the ascent chain."
            )
        warnings.warn(
            "The perturbation points downhill: its mean cosine with the gradient is "
            f"{slope:.2f}, below {least:g}. {remedy}",
            RuntimeWarning,
            stacklevel=2,
        )
