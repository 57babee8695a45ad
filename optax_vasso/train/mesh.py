"""Place a train state and its batches on a mesh of devices.

The train step of :func:`optax_vasso.make_train_step` then runs on any mesh.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from optax_vasso._internal.checks import (
    check_transformation,
    is_key,
    is_left_out,
    tree_difference,
)
from optax_vasso.train.batches import check_divisible
from optax_vasso.train.step import TrainState

PyTree = Any
REPLICATED = P()


def shard_batch(batch: PyTree, mesh: Mesh, axis: str = "data") -> PyTree:
    """Put a batch on a mesh, divided over one axis.

    With several processes each passes its own examples, and the global batch is all of
    them together.

    Args:
      batch: a tree of arrays whose first axis counts examples.
      mesh: mesh of devices.
      axis: name of the mesh axis that divides the batch.

    Raises:
      ValueError: if the mesh has no such axis, or its size does not divide the batch;
        nothing has been moved then.
    """
    check_mesh_axis(mesh, axis)
    processes, devices = jax.process_count(), mesh.shape[axis]
    parts = devices // math.gcd(devices, processes)
    check_divisible(batch, parts, f"the devices of mesh axis {axis!r}")
    sharding = NamedSharding(mesh, P(axis))
    if processes == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch
    )


def fsdp_specs(params: PyTree, mesh: Mesh, axis: str = "data") -> PyTree:
    """Specs that divide every parameter over an axis: fully sharded data parallelism.

    Each leaf is divided along its largest dimension that the axis divides; a leaf
    that has none is kept whole on every device.

    Args:
      params: the parameters, or their shapes.
      mesh: the devices.
      axis: the axis of the mesh to divide over.

    Raises:
      ValueError: if the mesh has no such axis.
    """
    check_mesh_axis(mesh, axis)
    devices = mesh.shape[axis]

    def spec(leaf: Any) -> P:
        sizes = [(size, -i) for i, size in enumerate(leaf.shape) if size % devices == 0]
        if not sizes or max(sizes)[0] == 0:
            return P()
        dimension = -max(sizes)[1]
        return P(*(axis if i == dimension else None for i in range(dimension + 1)))

    return jax.tree.map(spec, params)


def state_shardings(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    specs: PyTree = REPLICATED,
) -> TrainState:
    """A sharding for every array of a train state.

    What the optimizer keeps for each parameter, such as the averages of the ascent
    chain and the moments of the base optimizer, is divided as the parameters are, also
    inside of :func:`optax.partition` and :func:`optax.masked`; the rest is replicated.

    Args:
      state: the train state, or its shapes.
      optimizer: the optimizer whose state is in it: :func:`optax.tree.map_params` asks
        it which arrays belong to parameters.
      mesh: the devices.
      specs: a tree of :class:`jax.sharding.PartitionSpec` like the parameters, as
        :func:`fsdp_specs` makes it, or one for all of them.

    Raises:
      ValueError: if optimizer is no transformation, specs has another structure than
        the parameters, or a spec does not fit its parameter.
    """
    check_mesh(mesh)
    check_transformation("optimizer", optimizer)
    structure: Any = jax.tree.structure(state.params)
    if isinstance(specs, P):
        specs = jax.tree.map(lambda _: specs, state.params)
    if jax.tree.structure(specs) != structure:
        raise ValueError(
            "specs has another tree structure than the parameters "
            f"({tree_difference(specs, state.params)}): pass what fsdp_specs(params, "
            "mesh) returns, or one spec for all of them."
        )
    leaves = jax.tree.leaves_with_path(state.params)
    for (path, leaf), spec in zip(leaves, jax.tree.leaves(specs), strict=True):
        try:
            NamedSharding(mesh, spec).shard_shape(jnp.shape(leaf))
        except (AttributeError, IndexError, ValueError) as error:
            raise ValueError(
                f"specs{jax.tree_util.keystr(path)} is {spec}, which does not fit a "
                f"parameter of shape {jnp.shape(leaf)} on a mesh of "
                f"{dict(mesh.shape)}: name axes of the mesh that divide it, or keep it "
                "whole with PartitionSpec()."
            ) from error

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    whole = NamedSharding(mesh, P())
    known = optax.tree.map_params(
        optimizer,
        lambda leaf, sharding: leaf if is_left_out(leaf) else sharding,
        state.opt_state,
        shardings,
        is_leaf=is_left_out,
    )
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, NamedSharding) else whole,
        state._replace(params=shardings, opt_state=known),
    )


def shard_state(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    specs: PyTree = REPLICATED,
) -> TrainState:
    """Put a train state on a mesh, divided as :func:`state_shardings` says.

    With several processes, each passes the same whole state and keeps its part.
    """

    def put(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        if is_key(leaf):
            # JAX puts typed keys only on devices of this process, plain arrays on all.
            data = jax.device_put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jax.device_put(leaf, sharding)

    return jax.tree.map(put, state, state_shardings(state, optimizer, mesh, specs))


def check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, Mesh | jax.sharding.AbstractMesh):
        raise ValueError(
            f"mesh must be a jax.sharding.Mesh, got a {type(mesh).__name__}: make one "
            "with jax.make_mesh, and check the order of the arguments."
        )


def check_mesh_axis(mesh: Mesh, axis: str) -> None:
    check_mesh(mesh)
    if axis not in mesh.shape:
        raise ValueError(
            f"axis {axis!r} is not in the mesh, which has {tuple(mesh.shape)}: name "
            "one of these, or make a mesh that has it."
        )
