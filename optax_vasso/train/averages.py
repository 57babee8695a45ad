"""Averages over mapped axes, before or after the ascent."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_vasso._internal import mapped
from optax_vasso._internal.checks import check_state, check_transformation
from optax_vasso._internal.mapped import AxisName
from optax_vasso.train.gradients import GradientFn, GradientMaker, Inputs, whole_batch
from optax_vasso.train.losses import LossFn

PyTree = Any


def synchronized(
    axis_name: AxisName, gradient: GradientMaker = whole_batch
) -> GradientMaker:
    """Average gradients over a mapped axis: one perturbation for all devices.

    For :func:`jax.pmap` and :func:`jax.shard_map`, where each device sees its own part
    of the batch. Loss, model state and gradients are averaged; keys differ from device
    to device. Under :func:`jax.jit` with shardings it is not needed.

    Args:
      axis_name: the mapped axis, or a tuple of axes.
      gradient: the gradient on one device.

    Raises:
      ValueError: when the step is traced, if no enclosing map has the axis.
    """

    def make(loss_fn: LossFn) -> GradientFn:
        local = local_gradient(axis_name, gradient)(loss_fn)

        def grad_fn(at: Inputs) -> Any:
            value, grads = local(at)
            return value, jax.lax.pmean(grads, axis_name)

        return grad_fn

    return make


def local_gradient(
    axis_name: AxisName, gradient: GradientMaker = whole_batch
) -> GradientMaker:
    """Each device keeps the gradient of its own part of the batch: m-sharpness.

    Loss and model state are averaged over the mapped axis, gradients are not: the
    optimizer has :func:`average_over` inside, after the ascent.
    """

    def make(loss_fn: LossFn) -> GradientFn:
        grad_fn = gradient(loss_fn)

        def on_device(at: Inputs) -> Any:
            _check_axis(axis_name)
            params, clean = _own((at.params, at.clean), axis_name)
            key = at.key
            if key is not None:
                key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
            (loss, (model_state, aux)), grads = grad_fn(
                at._replace(params=params, key=key, clean=clean)
            )
            loss, model_state = mean_of_floats((loss, model_state), axis_name)
            return (loss, (model_state, aux)), grads

        return on_device

    return make


class AverageOverState(NamedTuple):
    """State of :func:`average_over`.

    Attributes:
      optimizer_state: the state of the optimizer, the same on all devices.
    """

    optimizer_state: optax.OptState


def average_over(
    optimizer: optax.GradientTransformation, axis_name: AxisName
) -> optax.GradientTransformationExtraArgs:
    """Average gradients over a mapped axis after local ascents.

    Put it around the base optimizer. It separates the perturbations, one per device,
    from everything that must be the same on every device::

        vasso(average_over(optax.sgd(0.1), "data"))

    A transformation chained before it sees the gradient of one device, and may keep no
    state.

    The gradient is averaged, and with it the extra arguments ``clean_grads``, ``grad``
    and ``value``, and ``value_fn`` and ``obj_fn`` become means of the loss over the
    devices: so the descent transforms and line searches inside it take the same step
    everywhere. The compiler removes the averages that the optimizer does not read.

    Each device must bring the gradient of its own examples. Inside
    :func:`jax.shard_map` JAX *sums* the gradients of parameters that the devices share,
    before any optimizer sees them; differentiate at
    ``jax.lax.pcast(params, axis_name, to="varying")`` instead, as
    :func:`optax_vasso.train.make_local_train_step` does. Gradients that are the same on
    all devices raise an error, because they may be a sum.

    Args:
      optimizer: the base optimizer.
      axis_name: the axis of :func:`jax.pmap`, :func:`jax.shard_map` or
        :func:`optax_vasso.train.make_local_train_step`, or a tuple of axes.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that passes every extra argument
      on.

    Raises:
      ValueError: if optimizer is no transformation; at ``update``, if no enclosing map
        has the axis, or in :func:`jax.shard_map` the updates do not vary over it.

    Examples:
      Two groups of examples, each with a gradient and a perturbation of its own:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_vasso import sam
      >>> from optax_vasso.train import average_over
      >>> optimizer = sam(average_over(optax.sgd(1.0), "groups"), rho=0.5)
      >>> params = jnp.array([2.0, 1.0])
      >>> def update(weight):
      ...     grad_fn = lambda x: weight * x
      ...     return optimizer.update(
      ...         grad_fn(params), optimizer.init(params), params, grad_fn=grad_fn
      ...     )[0]
      >>> print(jax.vmap(update, axis_name="groups")(jnp.array([1.0, -1.0])))
      [[-0.45 -0.22]
       [-0.45 -0.22]]
    """
    check_transformation("optimizer", optimizer)
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: PyTree) -> AverageOverState:
        return AverageOverState(optimizer.init(params))

    def update_fn(
        updates: PyTree,
        state: AverageOverState,
        params: PyTree = None,
        **extra_args: Any,
    ) -> tuple[PyTree, AverageOverState]:
        check_state(state, AverageOverState, "average_over")
        _check_axis(axis_name)
        _check_varies(updates, axis_name)
        for name in ("clean_grads", "grad", "value"):
            if extra_args.get(name) is not None:
                extra_args[name] = jax.lax.pmean(extra_args[name], axis_name)
        for name in ("value_fn", "obj_fn"):
            if extra_args.get(name) is not None:
                extra_args[name] = _mean_fn(extra_args[name], axis_name)
        new_updates, optimizer_state = optimizer.update(
            jax.lax.pmean(updates, axis_name),
            state.optimizer_state,
            params,
            **extra_args,
        )
        return new_updates, AverageOverState(optimizer_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _mean_fn(value_fn: Callable[..., jax.Array], axis_name: AxisName) -> Any:
    """The mean of a loss over a mapped axis, and with it of its gradient."""

    @functools.wraps(value_fn)
    def mean(params: PyTree, *args: Any, **kwargs: Any) -> jax.Array:
        value = value_fn(_own(params, axis_name), *args, **kwargs)
        return jax.lax.pmean(value, axis_name)

    return mean


def _own(params: PyTree, axis_name: AxisName) -> PyTree:
    """The parameters of one device, at which it differentiates alone.

    The gradient of a mean over devices is then the mean of the devices' gradients.
    """
    tracked = mapped.tracked_axes(axis_name)
    untracked = tuple(n for n in mapped.axis_names(axis_name) if n not in tracked)
    # Where JAX does not track what varies, it differentiates a mean over devices as if
    # there were one device.
    if untracked:
        params = _average_cotangents(params, untracked)
    return mapped.vary(params, tracked)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _average_cotangents(params: PyTree, axes: tuple[str, ...]) -> PyTree:
    del axes
    return params


_average_cotangents.defvjp(
    lambda params, axes: (params, None),
    lambda axes, _, cotangents: (jax.lax.pmean(cotangents, axes),),
)


def _check_axis(axis_name: AxisName) -> None:
    """Raise a ValueError if no enclosing map has this axis."""
    try:
        jax.lax.axis_index(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name {axis_name!r} is not an axis of an enclosing map: call this "
            f"inside jax.pmap(..., axis_name={axis_name!r}), jax.shard_map, or "
            "make_local_train_step."
        ) from error


def _check_varies(updates: PyTree, axis_name: AxisName) -> None:
    """Raise a ValueError for gradients that were already summed or averaged."""
    tracked = mapped.tracked_axes(axis_name)
    for path, leaf in jax.tree.leaves_with_path(updates):
        shared = sorted(tracked - mapped.varying_axes(leaf))
        if shared:
            raise ValueError(
                f"updates{jax.tree_util.keystr(path)} is the same on all devices of "
                f"axis {shared[0]!r}, so it is already a sum or a mean: "
                "differentiate at jax.lax.pcast(params, "
                f'{shared[0]!r}, to="varying"), or leave average_over out.'
            )


def mean_of_floats(tree: PyTree, axis_name: AxisName) -> PyTree:
    """Average the float leaves over a mapped axis; the others agree already."""
    return jax.tree.map(
        lambda leaf: (
            jax.lax.pmean(leaf, axis_name)
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
            else leaf
        ),
        tree,
    )
