"""Many trainings as the rows of one compiled program, split over the devices."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

PyTree = Any


def use_all_cores(compiled: Path | None = None) -> None:
    """Let JAX see each core of a CPU as a device; before JAX is first used.

    Small matrices keep one core busy, not two: rows on each core are faster than one
    row on all.

    Args:
      compiled: a folder for compiled programs, so that a run that is resumed does not
        compile again.
    """
    # Once JAX is in use, its devices stay what they are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    if compiled is not None:
        jax.config.update("jax_compilation_cache_dir", str(compiled.absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def rows_at_once() -> int:
    """How many rows one call works on: a few per device.

    A core is fastest while the parameters of its rows stay in its cache; an accelerator
    wants many.
    """
    devices = jax.local_devices()
    return len(devices) * (4 if devices[0].platform == "cpu" else 64)


def over_rows(
    function: Callable[..., PyTree], *, shared: int = 0, **options: Any
) -> Callable[..., PyTree]:
    """``function`` of one row, mapped over rows and compiled.

    Args:
      function: trees of arrays -> a tree of arrays.
      shared: how many of its first arguments are the same for all rows, as a data set.
      **options: of ``jax.jit``.

    Returns:
      A function whose other arguments, and whose results, have a leading axis of rows,
      as many as :func:`place` makes.
    """
    spec = PartitionSpec("rows")

    def mapped(same: tuple[PyTree, ...], rows: tuple[PyTree, ...]) -> PyTree:
        return jax.vmap(lambda row: function(*same, *row))(rows)

    split = jax.shard_map(
        mapped, mesh=_mesh(), in_specs=(PartitionSpec(), spec), out_specs=spec
    )
    return jax.jit(
        lambda *arguments: split(arguments[:shared], arguments[shared:]), **options
    )


def place(rows: PyTree, size: int | None = None) -> PyTree:
    """At most ``size`` rows, filled up with the last one, on the devices.

    Drop what is added, ``[:count]``, from what comes out.

    Args:
      rows: trees of arrays with a leading axis of rows.
      size: a multiple of the number of devices; ``None`` for :func:`rows_at_once`.
    """
    count = len(jax.tree.leaves(rows)[0])
    filled = np.minimum(np.arange(size or rows_at_once()), count - 1)
    return jax.device_put(
        jax.tree.map(lambda leaf: np.asarray(leaf)[filled], rows),
        NamedSharding(_mesh(), PartitionSpec("rows")),
    )


def _mesh() -> jax.sharding.Mesh:
    devices = jax.local_devices()
    return jax.make_mesh(
        (len(devices),), ("rows",), axis_types=(AxisType.Auto,), devices=devices
    )
