"""A shorter perturbation where a training is about to collapse."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso import numerics
from optax_vasso.automatic import projected_perturb
from optax_vasso.smoothing import vasso_ema
from optax_vasso.validation import (
    Hyperparameter,
    check_hyperparameter,
    check_params,
    check_state,
    check_transformation,
    value_at,
)

PyTree = Any


class CollapseGuardState(NamedTuple):
    """State of :func:`collapse_guard`.

    Attributes:
      step: calls so far, an int32 scalar.
      loss: the moving average of the loss, a float32 (under x64 float64) scalar.
      guarded_state: the state of the ascent chain that is guarded.
      metrics: ``guard``, the share in [0, 1] of the perturbation that was let through.
    """

    step: jax.Array
    loss: jax.Array
    guarded_state: optax.OptState
    metrics: dict[str, jax.Array]


def collapse_guard(
    ascent: optax.GradientTransformation,
    ceiling: Hyperparameter,
    *,
    margin: float = 0.04,
    weight: float = 0.05,
) -> optax.GradientTransformationExtraArgs:
    """Shorten the perturbation while the model knows hardly more than a constant.

    Training collapses where every prediction is the same, at the loss of the best
    constant prediction, and it does so in the first epochs, when the loss is about that
    high and a perturbation undoes what little was learned. So multiply ε by::

        clip((ceiling − l_t) / (margin · ceiling), 0, 1)

    with a moving average l_t of the loss: nothing is perturbed at the ceiling, all of ε
    arrives where the loss is a share ``margin`` below it, and a training that falls
    back is let go before it is lost. It costs two scalars, and accuracy where nothing
    would have collapsed, since the perturbation begins later.

    Args:
      ascent: any ascent chain. Its extra arguments are passed on.
      ceiling: the loss of the best constant prediction, > 0: for cross-entropy log C
        with C classes that are equally frequent, else the entropy of their frequencies,
        both in nats. A number, a schedule of the step, or a traced scalar.
      margin: how far below the ceiling all of ε is let through, as a share of it, > 0.
      weight: of the newest loss in the average, in (0, 1].

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` whose ``update`` needs the loss
      as the extra argument ``value``: :func:`optax_vasso.make_train_step` passes it. Of
      a lagged optimizer that is the perturbed loss. Its state reports ``guard`` among
      the metrics.

    Raises:
      ValueError: if ascent is no transformation or a number is out of its range; at
        ``init``, if the parameters have no leaves or an integer leaf; at ``update``, if
        ``value`` is missing.

    Examples:
      Halfway between the ceiling and the margin half of ε is let through:

      >>> import jax.numpy as jnp
      >>> from optax_vasso import collapse_guard, sam_perturb
      >>> ascent = collapse_guard(sam_perturb(0.5), ceiling=2.0, margin=0.125)
      >>> grads = jnp.array([3.0, 4.0])
      >>> perturbation, state = ascent.update(grads, ascent.init(grads), value=1.875)
      >>> print(perturbation, state.metrics["guard"])
      [0.15 0.2 ] 0.5
    """
    check_transformation("ascent", ascent)
    check_hyperparameter(
        "ceiling", ceiling, "a finite number > 0", lambda v: 0 < v < float("inf")
    )
    check_hyperparameter(
        "margin", margin, "a finite number > 0", lambda v: 0 < v < float("inf")
    )
    check_hyperparameter("weight", weight, "in (0, 1]", lambda v: 0 < v <= 1)
    ascent = optax.with_extra_args_support(ascent)

    def init_fn(params: PyTree) -> CollapseGuardState:
        check_params(params)
        loss, guard = numerics.state_scalar(), numerics.state_scalar()
        return CollapseGuardState(
            step=jnp.zeros((), jnp.int32),
            loss=loss,
            guarded_state=ascent.init(params),
            metrics={"guard": guard},
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
        perturbation, guarded_state = ascent.update(
            updates, state.guarded_state, params, value=value, **extra_args
        )
        dtype = state.loss.dtype
        newest, high, share, by = (
            jnp.asarray(x).astype(dtype)
            for x in (value, value_at(ceiling, state.step), weight, margin)
        )
        loss = jnp.where(
            state.step == 0, newest, state.loss + share * (newest - state.loss)
        )
        guard = jnp.clip((high - loss) / (by * high), 0, 1)
        return numerics.map_updates(
            lambda e: guard.astype(jnp.abs(e).dtype) * e, perturbation
        ), CollapseGuardState(
            step=optax.safe_increment(state.step),
            loss=loss,
            guarded_state=guarded_state,
            metrics={"guard": guard},
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def automatic_ascent(
    ceiling: Hyperparameter,
    r: Hyperparameter,
    theta: Hyperparameter,
    accumulator_dtype: Any,
) -> optax.GradientTransformationExtraArgs:
    """The ascent chain of the automatic methods."""
    smoothing = vasso_ema(theta, accumulator_dtype=accumulator_dtype)
    return collapse_guard(projected_perturb(r, smoothing), ceiling)
