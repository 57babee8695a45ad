"""m-sharpness: one perturbation per group of examples, on one or many devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from optax_vasso._internal import mapped
from optax_vasso._internal.checks import check_integer
from optax_vasso._internal.trees import find_states, map_ascent, map_metrics
from optax_vasso.steps.two_gradients import SharpnessAwareState
from optax_vasso.train.averages import (
    AverageOverState,
    local_gradient,
    mean_of_floats,
)
from optax_vasso.train.batches import check_examples
from optax_vasso.train.gradients import GradientMaker, whole_batch
from optax_vasso.train.losses import as_canonical
from optax_vasso.train.mesh import check_mesh_axis
from optax_vasso.train.step import (
    Step,
    TrainState,
    build_train_step,
    check_roles,
    compiled_step,
    init_train_state,
)

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
        around its base.
      groups: number of groups, each of which ascends on its own examples; with a mesh,
        the size of its axis.
      mesh: mesh of devices, if there are several.
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
            "average_over around the base optimizer, as in "
            f"vasso(average_over(optax.sgd(0.1), {axis!r}))."
        )
    if mesh is not None:
        check_mesh_axis(mesh, axis)
        if mesh.shape[axis] != groups:
            raise ValueError(
                f"groups is {groups}, but mesh axis {axis!r} has {mesh.shape[axis]} "
                "devices: the two have to agree."
            )
    state = map_ascent(
        state, lambda leaf: jnp.broadcast_to(leaf, (groups, *leaf.shape))
    )
    if mesh is None:
        return state
    specs = map_ascent(state, lambda _: P(axis), lambda _: P())
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
    ascent_gradient: GradientMaker | None = None,
) -> Step:
    """Compile a step in which each device ascends on its own part of the batch.

    This is m-sharpness: each part has its own perturbation and averages, and the
    descent follows the mean of the perturbed gradients. It costs one all-reduce of a
    gradient per step, as plain training does; the synchronized step costs two.
    Parameters are replicated over the axis; other axes of the mesh may divide them.
    Without a mesh, the groups share one device.

    Args:
      loss_fn: as in :func:`optax_vasso.make_train_step`; it receives one part.
      optimizer: a sharpness-aware optimizer with :func:`optax_vasso.train.average_over`
        of this axis around its base.
      mesh: the devices, or ``None`` for groups on one device.
      axis: the axis over which the batch is divided.
      has_aux: as in :func:`optax_vasso.make_train_step`.
      separate_keys: as in :func:`optax_vasso.make_train_step`.
      gradient: the gradient of one part.
      ascent_gradient: that of the ascent, where it differs, as in
        :func:`optax_vasso.make_train_step`.

    Returns:
      ``train_step(state, batch) -> (state, metrics)`` as in
      :func:`optax_vasso.make_train_step`, for a state of :func:`init_local_state`. The
      metrics are means over the groups; ``aux`` has a leading axis for the groups.

    Raises:
      ValueError: if the mesh has no such axis; when the step is called, if the groups
        do not divide the batch, or something that they share would come to differ
        between them, such as the average of a transform outside ``average_over``.
    """
    if mesh is not None:
        check_mesh_axis(mesh, axis)
    step = build_train_step(
        as_canonical(loss_fn, has_aux),
        optimizer,
        has_aux=has_aux,
        separate_keys=separate_keys,
        gradient=local_gradient(axis, gradient),
        ascent_gradient=ascent_gradient and local_gradient(axis, ascent_gradient),
        axis_name=axis,
    )

    def on_one(state: TrainState, batch: PyTree) -> tuple[TrainState, PyTree, PyTree]:
        state, metrics = step(state, batch)
        aux = metrics.pop("aux", ())
        opt_state = map_metrics(
            lambda leaf: mean_of_floats(leaf, axis), state.opt_state
        )
        return state._replace(opt_state=opt_state), mean_of_floats(metrics, axis), aux

    def on_device(
        state: TrainState, batch: PyTree
    ) -> tuple[TrainState, PyTree, PyTree]:
        state = map_ascent(state, lambda leaf: leaf[0])
        state, metrics, aux = on_one(state, batch)
        shared = map_ascent(state, lambda _: None)
        for name, tree in (("state", shared), ("metrics", metrics)):
            for path, leaf in jax.tree.leaves_with_path(tree):
                if axis in mapped.varying_axes(leaf):
                    raise _not_shared(f"{name}{jax.tree_util.keystr(path)}", axis)
        state = map_ascent(state, lambda leaf: leaf[None])
        return state, metrics, jax.tree.map(lambda leaf: leaf[None], aux)

    def train_step(
        state: TrainState, batch: PyTree
    ) -> tuple[TrainState, dict[str, Any]]:
        check_roles(state, batch)
        groups = _groups(state)
        batch = check_examples(batch, groups, "the groups of a local ascent")
        if mesh is None:
            batch = jax.tree.map(
                lambda leaf: leaf.reshape(groups, -1, *leaf.shape[1:]), batch
            )
            axes = map_ascent(state, lambda _: 0, lambda _: None)
            step_of_all = jax.vmap(
                on_one, axis_name=axis, in_axes=(axes, 0), out_axes=(axes, None, 0)
            )
        else:
            specs = map_ascent(state, lambda _: P(axis), lambda _: P())
            step_of_all = jax.shard_map(
                on_device,
                mesh=mesh,
                in_specs=(specs, P(axis)),
                out_specs=(specs, P(), P(axis)),
                axis_names={axis},
            )
        try:
            state, metrics, aux = step_of_all(state, batch)
        except ValueError as error:
            if "out_axes is None" not in str(error):  # as vmap says it
                raise
            raise _not_shared("something in the state or the metrics", axis) from error
        return state, metrics | ({"aux": aux} if has_aux else {})

    return compiled_step(train_step)


def _not_shared(what: str, axis: str) -> ValueError:
    return ValueError(
        f"{what} would differ between the groups of axis {axis!r}, which share it: put "
        "the transform that makes it inside average_over, or average it by "
        f"jax.lax.pmean(..., {axis!r})."
    )


def _groups(state: TrainState) -> int:
    leaves: list[Any] = []
    map_ascent(state.opt_state, leaves.append)
    if not leaves or any(jnp.ndim(leaf) == 0 for leaf in leaves):
        raise ValueError(
            "state is not one of a local ascent: make it with init_local_state."
        )
    return leaves[0].shape[0]
