"""Bad batches: skipping them, counting them, and scales against overflow."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso.states import find_states
from optax_vasso.validation import check_integer, require_params

PyTree = Any


class SkipState(NamedTuple):
    """State of :func:`skip_nonfinite`.

    Attributes:
      finite: whether the last step was taken, a boolean.
      consecutive: steps skipped in a row until now, an int32 scalar.
      total: steps skipped since the start, an int32 scalar.
      limit: the most that may be skipped in a row, an int32 scalar.
      loss_scale: the loss scale, ``()`` without one.
      optimizer_state: the state of the optimizer, of the last step that was taken.
    """

    finite: jax.Array
    consecutive: jax.Array
    total: jax.Array
    limit: jax.Array
    loss_scale: Any
    optimizer_state: optax.OptState


def skip_nonfinite(
    optimizer: optax.GradientTransformation,
    max_consecutive: int = 20,
    *,
    loss_scale: Any = (),
) -> optax.GradientTransformationExtraArgs:
    """Leave everything as it is after a batch with a NaN or an infinity.

    :func:`optax.apply_if_finite` looks at the gradient that it is given; this looks at
    the loss, at the clean gradient, and at all that the step would write, so that an
    overflow in the perturbed pass is caught too. Then the update is zero and no
    average, moment or counter inside changes. The old averages live on until the
    perturbed pass is done: one more copy of each average of the ascent chain.
    :func:`optax_vasso.make_train_step` keeps the model state of such a step as well.

    Args:
      optimizer: any optimizer, typically a sharpness-aware one.
      max_consecutive: steps skipped in a row before :func:`check_finite` raises, >= 0.
      loss_scale: a loss scale with ``scale``, ``unscale`` and ``adjust`` as in
        ``jmp.DynamicLossScale``. :func:`optax_vasso.make_train_step` then scales the
        loss of both passes by it, and it is lowered by a step that was skipped.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`, which takes the loss as the
      optional extra argument ``value``.

    Raises:
      ValueError: if max_consecutive is not an integer >= 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso import sam, skip_nonfinite
      >>> optimizer = skip_nonfinite(sam(optax.sgd(0.1), rho=0.05))
      >>> params = jnp.array([1.0, 2.0])
      >>> state = optimizer.init(params)
      >>> overflows = lambda x: x / 0.0  # in the perturbed pass only
      >>> updates, state = optimizer.update(params, state, params, grad_fn=overflows)
      >>> print(updates, state.finite, state.total)
      [0. 0.] False 1
    """
    check_integer("max_consecutive", max_consecutive, 0)
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: PyTree) -> SkipState:
        return SkipState(
            finite=jnp.ones((), bool),
            consecutive=jnp.zeros((), jnp.int32),
            total=jnp.zeros((), jnp.int32),
            limit=jnp.asarray(max_consecutive, jnp.int32),
            # A copy, since a train step donates its state.
            loss_scale=jax.tree.map(jnp.array, loss_scale),
            optimizer_state=optimizer.init(params),
        )

    def update_fn(
        updates: PyTree, state: SkipState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, SkipState]:
        require_params(params, "skip_nonfinite")
        value = extra_args.pop("value", ())
        new_updates, optimizer_state = optimizer.update(
            updates, state.optimizer_state, params, **extra_args
        )
        finite = all_finite((value, updates, new_updates, optimizer_state))
        skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
        return (
            jax.tree.map(
                lambda u: jnp.where(finite, u, jnp.zeros_like(u)), new_updates
            ),
            SkipState(
                finite=finite,
                consecutive=(state.consecutive + 1) * skipped,
                total=state.total + skipped,
                limit=state.limit,
                loss_scale=(
                    state.loss_scale.adjust(finite)
                    if hasattr(state.loss_scale, "adjust")
                    else state.loss_scale
                ),
                optimizer_state=optax.tree.where(
                    finite, optimizer_state, state.optimizer_state
                ),
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_finite(state: PyTree) -> None:
    """Stop a training run that skips one batch after another.

    Call it where the metrics are read: it waits for the step.

    Args:
      state: a train state or an optimizer state, with :func:`skip_nonfinite` in it;
        without one, or while tracing, nothing is checked.

    Raises:
      FloatingPointError: if more than ``max_consecutive`` steps in a row were skipped.
    """
    for found in find_states(state, SkipState):
        consecutive, limit = int(found.consecutive), int(found.limit)
        if consecutive > limit:
            raise FloatingPointError(
                f"The last {consecutive} batches gave a loss or gradients that are not "
                f"finite, more than the {limit} allowed in a row "
                f"({int(found.total)} since the start). The parameters are those "
                "before them: look at the data, or lower the learning rate or rho."
            )


def all_finite(tree: PyTree) -> jax.Array:
    """Whether every float in the tree is finite, a boolean scalar."""
    finite = jnp.ones((), bool)
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            finite &= jnp.all(jnp.isfinite(leaf))
    return finite
