"""Mapped axes: one perturbation for all devices, or one per group of examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from optax_vasso._internal.checks import check_integer
from optax_vasso._internal.trees import find_states, map_ascent, map_metrics
from optax_vasso.steps.two_gradients import SharpnessAwareState
from optax_vasso.train.batches import (
    GradientFn,
    GradientMaker,
    check_examples,
    whole_batch,
)
from optax_vasso.train.losses import LossFn, as_canonical
from optax_vasso.train.mesh import check_mesh_axis
from optax_vasso.train.step import Step, TrainState, build_train_step, init_train_state

PyTree = Any


def init_local_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    groups: int,
    *,
    mesh: Mesh | None = None,
    axis: str = "data",
    model_state: PyTree = (),
    key: jax.Array | None = None,
) -> TrainState:
    """The state before the first step of :func:`make_local_train_step`.

    As :func:`optax_vasso.init_train_state`, but the state of the ascent chain has a
    leading axis: one average for each group, on the devices of that group.

    Args:
      params: initial parameters.
      optimizer: a sharpness-aware optimizer with :func:`optax_vasso.train.average_over`
        in its base.
      groups: the number of groups that each ascend on their own examples; with a mesh,
        the size of its axis.
      mesh: the devices, if there are several.
      axis: the axis of the mesh over which the batch is divided.
      model_state: as in :func:`optax_vasso.init_train_state`.
      key: as in :func:`optax_vasso.init_train_state`.

    Raises:
      ValueError: if the optimizer has no ascent or does not average behind it, or the
        mesh does not have the axis, or has it in another size.
    """
    check_integer("groups", groups, 1)
    state = init_train_state(params, optimizer, model_state=model_state, key=key)
    if not find_states(state.opt_state, SharpnessAwareState):
        raise ValueError(
            "optimizer has no ascent: local ascent needs a sharpness-aware optimizer."
        )
    if not find_states(state.opt_state, AverageOverState):
        raise ValueError(
            "optimizer never averages its gradients over the devices: put "
            f"average_over({axis!r}) first in the base optimizer, as in "
            f"vasso(optax.chain(average_over({axis!r}), optax.sgd(0.1)))."
        )
    if mesh is not None:
        check_mesh_axis(mesh, axis)
        if mesh.shape[axis] != groups:
            raise ValueError(
                f"groups is {groups}, but mesh axis {axis!r} has {mesh.shape[axis]} "
                "devices: the two have to agree."
            )
    state = map_ascent(
        lambda leaf: jnp.broadcast_to(leaf, (groups, *leaf.shape)), lambda x: x, state
    )
    if mesh is None:
        return state
    specs = map_ascent(lambda _: P(axis), lambda _: P(), state)
    return jax.device_put(state, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))


def make_local_train_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    axis: str = "data",
    has_aux: bool = False,
    separate_keys: bool = False,
    gradient: GradientMaker = whole_batch,
) -> Step:
    """Compile a step in which each device ascends on its own part of the batch.

    This is m-sharpness: a perturbation for every part, each from the gradient and the
    averages of that part, and a descent along the mean of the perturbed gradients. It
    costs one all-reduce of a gradient per step, as plain training does; the
    synchronized step costs two. Parameters are replicated over the axis; other axes of
    the mesh may divide them. Without a mesh, the groups share one device.

    Args:
      loss_fn: as in :func:`optax_vasso.make_train_step`; it is given one part.
      optimizer: a sharpness-aware optimizer with :func:`optax_vasso.train.average_over`
        of this axis first in its base.
      mesh: the devices, or ``None`` for groups on one device.
      axis: the axis over which the batch is divided.
      has_aux: as in :func:`optax_vasso.make_train_step`.
      separate_keys: as in :func:`optax_vasso.make_train_step`.
      gradient: the gradient of one part.

    Returns:
      ``train_step(state, batch) -> (state, metrics)`` as in
      :func:`optax_vasso.make_train_step`, for a state of :func:`init_local_state`. The
      metrics are means over the groups; ``aux`` has a leading axis for the groups.

    Raises:
      ValueError: if the mesh has no such axis; when the step is called, if the groups
        do not divide the batch.
    """
    if mesh is not None:
        check_mesh_axis(mesh, axis)
    step = build_train_step(
        as_canonical(loss_fn, has_aux),
        optimizer,
        has_aux=has_aux,
        separate_keys=separate_keys,
        gradient=_local_gradient(axis, gradient),
        axis_name=axis,
    )

    def on_one(state: TrainState, batch: PyTree) -> tuple[TrainState, PyTree, PyTree]:
        state, metrics = step(state, batch)
        aux = metrics.pop("aux", ())
        opt_state = map_metrics(
            lambda leaf: _mean_of_floats(leaf, axis), state.opt_state
        )
        return state._replace(opt_state=opt_state), _mean_of_floats(metrics, axis), aux

    def on_device(
        state: TrainState, batch: PyTree
    ) -> tuple[TrainState, PyTree, PyTree]:
        state = map_ascent(lambda leaf: leaf[0], lambda leaf: leaf, state)
        state, metrics, aux = on_one(state, batch)
        state = map_ascent(lambda leaf: leaf[None], lambda leaf: leaf, state)
        return state, metrics, jax.tree.map(lambda leaf: leaf[None], aux)

    def train_step(
        state: TrainState, batch: PyTree
    ) -> tuple[TrainState, dict[str, Any]]:
        groups = _groups(state)
        batch = check_examples(batch, groups, "the groups of a local ascent")
        if mesh is None:
            batch = jax.tree.map(
                lambda leaf: leaf.reshape(groups, -1, *leaf.shape[1:]), batch
            )
            axes = map_ascent(lambda _: 0, lambda _: None, state)
            mapped = jax.vmap(
                on_one, axis_name=axis, in_axes=(axes, 0), out_axes=(axes, None, 0)
            )
        else:
            specs = map_ascent(lambda _: P(axis), lambda _: P(), state)
            mapped = jax.shard_map(
                on_device,
                mesh=mesh,
                in_specs=(specs, P(axis)),
                out_specs=(specs, P(), P(axis)),
                axis_names={axis},
                check_vma=False,
            )
        state, metrics, aux = mapped(state, batch)
        return state, metrics | ({"aux": aux} if has_aux else {})

    return jax.jit(train_step, donate_argnums=0)


def synchronized(
    axis_name: str, gradient: GradientMaker = whole_batch
) -> GradientMaker:
    """Average over a mapped axis: one perturbation for the batch of all devices.

    For :func:`jax.pmap` and :func:`jax.shard_map`, where each device sees its own part
    of the batch. Loss, model state and gradients are averaged; keys differ from device
    to device. Under :func:`jax.jit` with shardings it is not needed.

    Args:
      axis_name: the mapped axis.
      gradient: the gradient on one device.
    """

    def make(loss_fn: LossFn) -> GradientFn:
        local = _local_gradient(axis_name, gradient)(loss_fn)

        def grad_fn(*args: Any) -> Any:
            value, grads = local(*args)
            return value, jax.lax.pmean(grads, axis_name)

        return grad_fn

    return make


def _local_gradient(
    axis_name: str, gradient: GradientMaker = whole_batch
) -> GradientMaker:
    """Each device keeps the gradient of its own part of the batch: m-sharpness.

    Loss and model state are averaged over the mapped axis, gradients are not: the
    optimizer has :func:`average_over` inside, after the ascent.

    Args:
      axis_name: the mapped axis.
      gradient: the gradient on one device.
    """

    def make(loss_fn: LossFn) -> GradientFn:
        grad_fn = gradient(loss_fn)

        def on_device(
            params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array | None
        ) -> Any:
            _check_axis(axis_name)
            if key is not None:
                key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
            (loss, (model_state, aux)), grads = grad_fn(params, model_state, batch, key)
            loss, model_state = _mean_of_floats((loss, model_state), axis_name)
            return (loss, (model_state, aux)), grads

        return on_device

    return make


class AverageOverState(optax.EmptyState):
    """State of :func:`average_over`: nothing, but its type says that it is there."""


def average_over(axis_name: str) -> optax.GradientTransformation:
    """Average updates over a mapped axis: the one all-reduce of a local ascent.

    Put it first in the base optimizer::

        vasso(optax.chain(average_over("data"), optax.sgd(0.1)))

    Args:
      axis_name: the axis of :func:`jax.pmap`, :func:`jax.shard_map` or
        :func:`optax_vasso.train.make_local_train_step`.
    """

    def init_fn(params: PyTree) -> AverageOverState:
        del params
        return AverageOverState()

    def update_fn(
        updates: PyTree, state: AverageOverState, params: PyTree = None
    ) -> tuple[PyTree, AverageOverState]:
        del params
        _check_axis(axis_name)
        return jax.lax.pmean(updates, axis_name), state

    return optax.GradientTransformation(init_fn, update_fn)


def _check_axis(axis_name: str) -> None:
    """Raise a ValueError if no enclosing map has this axis."""
    try:
        jax.lax.axis_index(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name {axis_name!r} is not an axis of an enclosing map: call this "
            f"inside jax.pmap(..., axis_name={axis_name!r}), jax.shard_map, or "
            "make_local_train_step."
        ) from error


def _mean_of_floats(tree: PyTree, axis_name: str) -> PyTree:
    """Average the float leaves over a mapped axis; the others agree already."""
    return jax.tree.map(
        lambda leaf: (
            jax.lax.pmean(leaf, axis_name)
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
            else leaf
        ),
        tree,
    )


def _groups(state: TrainState) -> int:
    leaves: list[Any] = []
    map_ascent(leaves.append, lambda leaf: leaf, state.opt_state)
    if not leaves or any(jnp.ndim(leaf) == 0 for leaf in leaves):
        raise ValueError(
            "state is not one of a local ascent: make it with init_local_state."
        )
    return leaves[0].shape[0]
