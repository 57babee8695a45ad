"""Many trainings as the rows of one compiled program, split over the devices."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

PyTree = Any


def one_device_per_core() -> None:
    """Let JAX see each core of a CPU as a device; before JAX is first used.

    Small matrices keep one core busy, not two: a row on each core is faster than one
    row on all.
    """
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)


def over_rows(
    function: Callable[..., Any], *, shared: int = 0, **options: Any
) -> Callable[..., Any]:
    """``function`` of one row, mapped over the rows of :func:`split_rows` and compiled.

    Args:
      function: trees of arrays -> a tree of arrays.
      shared: how many of its first arguments are the same for all rows, as a data set.
      **options: of ``jax.jit``.
    """
    mesh = _mesh()

    def mapped(same: tuple[PyTree, ...], rows: tuple[PyTree, ...]) -> PyTree:
        at_once = _at_once(len(jax.tree.leaves(rows)[0]))
        return jax.lax.map(lambda row: function(*same, *row), rows, batch_size=at_once)

    spec = PartitionSpec("rows")
    # The rows know nothing of each other, so there is nothing to check.
    split = jax.shard_map(
        mapped,
        mesh=mesh,
        in_specs=(PartitionSpec(), spec),
        out_specs=spec,
        check_vma=False,
    )
    return jax.jit(
        lambda *arguments: split(arguments[:shared], arguments[shared:]), **options
    )


def split_rows(rows: PyTree) -> PyTree:
    """Arrays with a leading axis of rows, placed on the devices.

    The last row is repeated until all devices are busy with as many: drop what is
    added, ``[:count]``, from what comes out.
    """
    mesh = _mesh()
    count = len(jax.tree.leaves(rows)[0])
    a_device = -(-count // mesh.size)
    a_device += -a_device % _at_once(a_device)
    padded = np.minimum(np.arange(a_device * mesh.size), count - 1)
    return jax.device_put(
        jax.tree.map(lambda leaf: np.asarray(leaf)[padded], rows),
        NamedSharding(mesh, PartitionSpec("rows")),
    )


def _mesh() -> jax.sharding.Mesh:
    devices = jax.local_devices()
    return jax.make_mesh(
        (len(devices),), ("rows",), axis_types=(AxisType.Auto,), devices=devices
    )


def _at_once(rows_a_device: int) -> int:
    """How many rows a device works on at a time.

    A core is fastest while the parameters of its rows stay in its cache; an accelerator
    wants all it has.
    """
    on_cpu = jax.local_devices()[0].platform == "cpu"
    return max(1, min(4, rows_a_device) if on_cpu else rows_a_device)
