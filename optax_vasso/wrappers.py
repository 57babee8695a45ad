"""Wrappers of a whole optimizer for non-finite batches and low precision."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import checks, mapped, numerics
from optax_vasso._internal.extra_args import with_synonyms
from optax_vasso._internal.trees import Report, clear_metrics, find_states
from optax_vasso.steps.one_gradient import LaggedState

__all__ = [
    "check_finite",
    "in_float32",
    "skip_nonfinite",
]

PyTree = Any


class SkipState(NamedTuple):
    """State of :func:`skip_nonfinite`.

    Attributes:
      consecutive: number of steps skipped in a row, an int32 scalar.
      total: number of steps skipped since the start, an int32 scalar.
      loss_scale: the loss scale, ``()`` without one.
      optimizer_state: the state of the optimizer after the last step not skipped.
      report: ``finite``, whether the last step was taken, a boolean scalar; and
        ``skipped``, the total of skipped steps.
    """

    consecutive: jax.Array
    total: jax.Array
    loss_scale: Any
    optimizer_state: optax.OptState
    report: Report


def skip_nonfinite(
    optimizer: optax.GradientTransformation, *, loss_scale: Any = ()
) -> optax.GradientTransformationExtraArgs:
    """Skip every step in which a NaN or an infinity appears.

    :func:`optax.apply_if_finite` checks the gradient that it is given; this checks the
    loss, the clean gradient, the updates, and every number of the state that was
    finite, so an overflow in the perturbed pass is caught too. The update of a skipped
    step is zero, and no average, moment or counter inside changes;
    :func:`optax_vasso.make_train_step` keeps the model state as well. It needs one more
    copy of each average of the ascent chain, until the perturbed pass is done.

    Args:
      optimizer: any optimizer, typically a sharpness-aware one.
      loss_scale: a loss scale with ``scale``, ``unscale`` and ``adjust``, as
        ``jmp.DynamicLossScale`` has them. :func:`optax_vasso.make_train_step` then
        scales the loss of both passes by it; a skipped step lowers it.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`. Of the extra arguments, which
      are all passed on, it reads the loss as ``value``, and as ``axis_name`` the mapped
      axis over which devices have to agree;
      :func:`optax_vasso.train.make_local_train_step` passes both. Under the default
      checks of :func:`jax.shard_map` it finds the axis itself: there devices that share
      their parameters always agree.

    Raises:
      ValueError: if optimizer is no transformation or loss_scale is no loss scale; at
        ``update``, if ``params`` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso import sam
      >>> from optax_vasso.wrappers import skip_nonfinite
      >>> optimizer = skip_nonfinite(sam(optax.sgd(0.1), rho=0.05))
      >>> params = jnp.array([1.0, 2.0])
      >>> state = optimizer.init(params)
      >>> overflows = lambda x: x / 0.0  # in the perturbed pass only
      >>> updates, state = optimizer.update(params, state, params, grad_fn=overflows)
      >>> print(updates, *state.report.metrics.values())
      [0. 0.] False 1
    """
    checks.check_transformation("optimizer", optimizer)
    methods = ("scale", "unscale", "adjust")
    if loss_scale != () and not all(hasattr(loss_scale, name) for name in methods):
        raise ValueError(
            "loss_scale must have scale, unscale and adjust, got "
            f"{checks.shown(loss_scale)}: pass a loss scale such as "
            "jmp.DynamicLossScale(jnp.float32(1024.0))."
        )
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: PyTree) -> SkipState:
        state = SkipState(
            consecutive=jnp.zeros((), jnp.int32),
            total=jnp.zeros((), jnp.int32),
            # A copy, since a train step donates its state.
            loss_scale=jax.tree.map(jnp.array, loss_scale),
            optimizer_state=optimizer.init(params),
            report=Report(
                {"finite": jnp.ones((), bool), "skipped": jnp.zeros((), jnp.int32)}
            ),
        )
        # Devices that train separately skip their own steps, and count them.
        return mapped.vary(state, mapped.varying_axes(params))

    def update_fn(
        updates: PyTree, state: SkipState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, SkipState]:
        checks.check_update(state, SkipState, params, "skip_nonfinite")
        new_updates, optimizer_state = optimizer.update(
            updates, state.optimizer_state, params, **extra_args
        )
        finite = all_finite(
            (with_synonyms(extra_args).get("value"), updates, new_updates)
        ) & all_finite(optimizer_state, state.optimizer_state)
        finite = _agreed(finite, params, extra_args.get("axis_name"))
        skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
        return (
            jax.tree.map(
                lambda u: jnp.where(finite, u, jnp.zeros_like(u)), new_updates
            ),
            SkipState(
                consecutive=(state.consecutive + 1) * skipped,
                total=state.total + skipped,
                loss_scale=(
                    state.loss_scale.adjust(finite)
                    if state.loss_scale != ()
                    else state.loss_scale
                ),
                optimizer_state=numerics.map_updates(
                    functools.partial(jnp.where, finite),
                    optimizer_state,
                    clear_metrics(state.optimizer_state),
                ),
                report=Report({"finite": finite, "skipped": state.total + skipped}),
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_finite(state: PyTree, max_consecutive: int = 20) -> None:
    """Raise an error if too many steps in a row were skipped.

    Call it outside of :func:`jax.jit`, where you read the metrics: it blocks until the
    step has finished.

    Args:
      state: a train state or an optimizer state with :func:`skip_nonfinite` in it.
      max_consecutive: largest number of steps in a row that may be skipped, >= 0.

    Raises:
      FloatingPointError: if more than ``max_consecutive`` steps in a row were skipped.
      ValueError: if max_consecutive is not an integer >= 0, nothing in the state skips
        steps, or the state is being traced and has no values yet.
    """
    checks.check_integer("max_consecutive", max_consecutive, 0)
    found = find_states(state, SkipState)
    if not found:
        raise ValueError(
            "state has no state of skip_nonfinite in it, so no step is ever skipped: "
            "wrap the optimizer, as in skip_nonfinite(vasso(optax.sgd(0.1)))."
        )
    for skip in found:
        checks.check_known(skip.consecutive, "check_finite")
        # Under vmap and pmap there is a count for each run or device.
        consecutive = int(jnp.max(skip.consecutive))
        if consecutive > max_consecutive:
            raise FloatingPointError(
                f"The last {consecutive} batches gave a loss or gradients that are not "
                f"finite, more than the {max_consecutive} allowed in a row "
                f"({int(jnp.max(skip.total))} since the start). They changed no "
                "parameters: look at the data, or lower the "
                "learning rate or rho."
            )


def settled(
    state: PyTree, before: PyTree, params: PyTree, seen: PyTree, axis_name: Any = None
) -> PyTree:
    """The state with reports of whether the step was skipped, called or not.

    :class:`optax.MultiSteps` does not call its optimizer while it accumulates
    gradients. Such a step is skipped if what was ``seen``, loss and gradients, is not
    finite.
    """
    finite = _agreed(all_finite(seen), params, axis_name)

    def settle(new: Any, old: Any) -> Any:
        if not isinstance(new, SkipState):
            return new
        taken = finite & (new.total == old.total)
        return new._replace(report=Report({"finite": taken, "skipped": new.total}))

    return jax.tree.map(
        settle, state, before, is_leaf=lambda node: isinstance(node, SkipState)
    )


def _agreed(finite: jax.Array, params: PyTree, axis_name: Any) -> jax.Array:
    """The verdict of all devices that share their parameters."""
    axes = mapped.disagreement(finite, params, axis_name)
    return jax.lax.pmin(finite.astype(jnp.int32), axes) == 1 if axes else finite


def all_finite(tree: PyTree, *before: PyTree) -> jax.Array:
    """Whether every float in the tree is finite, or was not finite before.

    Some states hold an infinity from the start, as the best value so far of
    :func:`optax.contrib.reduce_on_plateau`.
    """

    def verdict(leaf: Any, *old: jax.Array) -> jax.Array | None:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            return None
        finite = jnp.isfinite(leaf)
        return jnp.all(finite | ~jnp.isfinite(*old) if old else finite)

    verdicts = jax.tree.leaves(numerics.map_updates(verdict, tree, *before))
    return jnp.all(jnp.stack(verdicts)) if verdicts else jnp.ones((), bool)


def in_float32(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Run an optimizer on float32 copies of parameters and gradients.

    For parameters in bfloat16 or float16: x + ε is formed in float32, ``grad_fn`` gets
    it in float32, and averages and moments are kept in float32. The model has to
    compute in that precision: a layer that casts its weights to bfloat16 rounds the
    perturbation away again. Updates come back in the dtypes of the parameters, as
    :func:`optax.apply_updates` adds them.

    A lagged optimizer keeps x_t in float32 by itself: wrap only its base optimizer, as
    in ``lagged_vasso(in_float32(optimizer))``.

    Args:
      optimizer: any optimizer but a lagged one, typically a sharpness-aware one.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that passes every extra argument
      on; ``update`` needs ``params``.

    Raises:
      ValueError: if optimizer is no transformation; at ``init``, if it is lagged.

    Examples:
      Near 1 a bfloat16 has neighbours at 1/128: a perturbation of 1/1000 is lost in it.

      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso import sam
      >>> from optax_vasso.wrappers import in_float32
      >>> params = jnp.ones(4, jnp.bfloat16)
      >>> grad_fn = lambda x: 1000 * (x - 1)
      >>> plain = sam(optax.sgd(0.5), rho=0.002)
      >>> for optimizer in (plain, in_float32(plain)):
      ...     updates, _ = optimizer.update(
      ...         jnp.ones_like(params), optimizer.init(params), params, grad_fn=grad_fn
      ...     )
      ...     print(abs(updates))
      [0 0 0 0]
      [0.5 0.5 0.5 0.5]
    """
    checks.check_transformation("optimizer", optimizer)
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: PyTree) -> optax.OptState:
        state = optimizer.init(_widen(params))
        if find_states(state, LaggedState):
            raise ValueError(
                "in_float32 cannot wrap a lagged optimizer, because its float32 copies "
                "are lost after each step: wrap the base optimizer instead, as in "
                "lagged_vasso(in_float32(optimizer))."
            )
        return state

    def update_fn(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree = None,
        **extra_args: Any,
    ) -> tuple[PyTree, optax.OptState]:
        checks.require_params(params, "in_float32")
        new_updates, state = optimizer.update(
            _widen(updates), state, _widen(params), **extra_args
        )
        return numerics.cast_updates(new_updates, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _widen(tree: PyTree) -> PyTree:
    """Cast floats of fewer than 32 bits to float32."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if numerics.has_few_bits(leaf) else leaf,
        tree,
    )
