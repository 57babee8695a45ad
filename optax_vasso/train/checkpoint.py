"""Saving a train state with Orbax, so that a run killed at any step can go on.

Needs Orbax: ``pip install '.[checkpoint]'`` in a clone. Each process writes its own
shards. A checkpoint appears under its number only when it is whole, and no number is
used twice: a machine that dies or a disk that fills while saving leaves the last good
one in place. A digest of what was saved finds damage to the files.
"""

from __future__ import annotations

import hashlib
import json
import numbers
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise ImportError(
        "optax_vasso.train.checkpoint needs Orbax: run pip install '.[checkpoint]' in "
        "a clone of optax_vasso."
    ) from error

try:
    import fcntl
except ImportError:  # Windows has no such locks.
    fcntl = None  # type: ignore[assignment]

from optax_vasso._internal.checks import is_key

PyTree = Any


class Checkpoints(NamedTuple):
    """The checkpoints of a run, as three functions.

    Attributes:
      save: (state) -> None. Writes the state and waits until it is whole, then deletes
        checkpoints beyond ``keep`` and those that were found damaged. The checkpoint is
        numbered by its step, or by the next free number if the run went back. Raises
        OSError if it cannot be written; those before it are kept.
      restore: (like) -> state, or ``like`` itself if there is no checkpoint yet.
        ``like`` has the structure, the shardings and the mesh to restore onto. A
        damaged checkpoint gives way to the one before, with a warning. Raises
        ValueError if the newest readable one is of another configuration or tree, and
        OSError if there are checkpoints but none can be read.
      close: () -> None, when the run is over; another run may then open the directory.
    """

    save: Callable[[PyTree], None]
    restore: Callable[[PyTree], PyTree]
    close: Callable[[], None]


def checkpoints(
    directory: str | os.PathLike, config: Mapping[str, Any], *, keep: int = 2
) -> Checkpoints:
    """Open a directory of checkpoints of train states.

    Only one run can have it open: a lock is held until ``close`` or until the process
    ends, however it ends. All processes of a run open it together, and process 0 holds
    the lock.

    Args:
      directory: where they go; created if it does not exist. Several processes need one
        that all of them can reach. A URL such as ``gs://bucket/run`` is passed to Orbax
        and is not locked.
      config: what identifies this run (recipe, hyperparameters, sizes): names and
        values that JSON can hold, NumPy's numbers and arrays among them. A checkpoint
        of another configuration is refused; tuples and lists are the same here, and so
        are a key 1 and a key "1", and NaN equals itself.
      keep: how many to keep, >= 1. Two or more leave one to go back to if the newest
        turns out to be damaged.

    Raises:
      ValueError: if keep is less than 1 or config has a value that JSON cannot hold.
      OSError: if the directory cannot be made, or another process has it open.
    """
    if not isinstance(keep, numbers.Integral) or keep < 1:
        raise ValueError(f"keep must be an integer >= 1, got {keep!r}.")
    config = _as_json(config)
    directory = os.fspath(directory)
    is_url = "://" in directory
    if not is_url:
        directory = os.path.abspath(directory)
    lock, error = _everywhere(
        lambda: None if is_url or jax.process_index() else _lock(directory)
    )
    if error:
        raise error
    manager = ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            create=True,
            cleanup_tmp_directories=True,  # what a killed process left half-written
            enable_async_checkpointing=False,
        ),
        item_names=("arrays", "description"),
    )
    damaged: set[int] = set()

    def save(state: PyTree) -> None:
        # A number is never used twice: what is there stays until the new one is whole.
        number = max([int(state.step), *(n + 1 for n in manager.all_steps())])
        arrays = _as_dict(state)
        description = _describe(state, config) | {"digests": _digests(arrays)}
        try:
            manager.save(
                number,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays),
                    description=ocp.args.JsonSave(_sealed(description)),
                ),
                force=True,  # whatever Orbax thinks of the intervals
            )
            manager.wait_until_finished()
        except Exception as error:
            raise OSError(
                f"the checkpoint of step {int(state.step)} could not be written to "
                f"{directory}: {_first_line(error)}. Those of {manager.all_steps()} "
                "are kept."
            ) from error
        good = sorted(set(manager.all_steps()) - damaged)
        for old in [*sorted(damaged), *good[:-keep]]:
            manager.delete(old)
        damaged.clear()

    def restore(like: PyTree) -> PyTree:
        manager.reload()
        damaged.clear()
        reasons = []
        for number in sorted(manager.all_steps(), reverse=True):
            state, reason = _read(manager.directory / str(number), like, config)
            if reason:
                damaged.add(number)
                reasons.append(f"checkpoint {number}: {reason}")
                continue
            if reasons:
                warnings.warn(
                    f"went back to checkpoint {number} in {directory}, since a newer "
                    f"one is damaged ({'; '.join(reasons)}).",
                    stacklevel=2,
                )
            return state
        if reasons:
            raise OSError(
                f"no checkpoint in {directory} can be read ({'; '.join(reasons)}): "
                "restore the directory, or start again in an empty one."
            )
        return like

    def close() -> None:
        manager.close()
        if lock:
            lock.close()

    return Checkpoints(save, restore, close)


def _read(folder: Any, like: PyTree, config: Any) -> tuple[PyTree, str]:
    """The state in the folder of a checkpoint, or why it cannot be read.

    The handlers are used and not the manager: they wait for no other process, so one
    that cannot read its shards leaves none of them hanging.
    """
    described, error = _everywhere(
        lambda: _unsealed(ocp.JsonCheckpointHandler().restore(folder / "description"))
    )
    if error:
        return None, _first_line(error)
    _check_same(described, _describe(like, config), folder)
    handler = ocp.StandardCheckpointHandler()
    wanted = ocp.args.StandardRestore(_abstract(_as_dict(like)))
    arrays, error = _everywhere(lambda: handler.restore(folder / "arrays", args=wanted))
    if error:
        return None, _first_line(error)
    found = _digests(arrays)
    changed = sum(found[name] != described["digests"][name] for name in found)
    if changed:
        return None, f"{changed} of its {len(found)} arrays are not as they were"
    return _from_dict(arrays, like), ""


def _everywhere(read: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What ``read`` gives on this process, or an error if it fails on any of them."""
    result, error = None, None
    try:
        result = read()
    except Exception as caught:
        error = caught
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.asarray(error is not None))
        if failed.any() and error is None:
            error = OSError(f"process {np.argmax(failed)} could not do its part")
    return result, error


def _lock(directory: str) -> Any:
    """A locked file in the directory; closing it, or the end of the process, unlocks.

    The lock is the process's: workers that outlive it do not hold it, and a notebook
    may open the same directory again.
    """
    os.makedirs(directory, exist_ok=True)
    file = open(os.path.join(directory, "lock"), "a")  # noqa: SIM115
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise OSError(
            f"another run has {directory} open: wait until it ends, or choose another "
            "directory."
        ) from error
    except OSError as error:
        warnings.warn(
            f"{directory} cannot be locked ({error}): no other run may use it.",
            stacklevel=4,
        )
    return file


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as it comes back from a file."""

    def plain(value: Any) -> Any:
        if isinstance(value, (np.generic, np.ndarray, jax.Array)):
            return value.tolist()
        raise TypeError(f"{type(value).__name__} is not a type of JSON")

    normalized: dict[str, Any] = {}
    for name, value in config.items():
        try:
            normalized |= json.loads(json.dumps({name: value}, default=plain))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"config[{name!r}] is {value!r}, which JSON cannot hold ({error}): "
                "give numbers, strings, booleans, None, lists or dictionaries of them."
            ) from error
    return normalized


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _sealed(description: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(_text(description).encode()).hexdigest()
    return {"description": description, "sha256": digest}


def _unsealed(found: dict[str, Any]) -> dict[str, Any]:
    description = found["description"]
    if found["sha256"] != _sealed(description)["sha256"]:
        raise ValueError("its description is not as it was")
    return description


@jax.jit
def _digest(leaf: jax.Array) -> jax.Array:
    """A uint32 of the bits of all entries and where they stand, however it is sharded.

    Integers are summed modulo 2³², in whatever order and on whatever mesh. Each goes
    through a one-to-one mixing of its bits (the finalizer of MurmurHash3): damage to
    one always changes the sum, and other damage does but for one case in 2³².
    """
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    if leaf.dtype.itemsize == 8:
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    elif jnp.issubdtype(leaf.dtype, jnp.floating):
        bits = f"uint{jnp.finfo(leaf.dtype).bits}"
        words = jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)
    else:
        words = leaf.astype(jnp.uint32)
    position, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += along * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mix(words + _mix(position)), dtype=jnp.uint32)


def _mix(bits: jax.Array) -> jax.Array:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


def _digests(arrays: dict[str, jax.Array]) -> dict[str, int]:
    digests = {name: _digest(leaf) for name, leaf in arrays.items()}
    return {name: int(digest) for name, digest in digests.items()}


def _as_dict(state: PyTree) -> dict[str, jax.Array]:
    """The arrays of a state by number; typed random keys as their data.

    Orbax would restore tuples as lists and empty states as nothing: the structure
    comes from the state to restore into.
    """
    return {
        f"{i:05d}": jax.random.key_data(leaf) if is_key(leaf) else jnp.asarray(leaf)
        for i, leaf in enumerate(jax.tree.leaves(state))
    }


def _from_dict(arrays: dict[str, jax.Array], like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    restored = [arrays[name] for name in sorted(arrays)]
    return jax.tree.unflatten(
        structure,
        [
            jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))
            if is_key(old)
            else new
            for old, new in zip(leaves, restored, strict=True)
        ],
    )


def _abstract(arrays: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in arrays.items()
    }


def _describe(state: PyTree, config: dict[str, Any]) -> dict[str, Any]:
    tree = {
        jax.tree_util.keystr(path): f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
        for path, leaf in jax.tree.leaves_with_path(state)
    }
    return {"config": config, "tree": tree}


def _check_same(found: Any, wanted: Any, folder: Any) -> None:
    """Raise a ValueError that says in what two descriptions differ."""
    absent = "nothing"
    for part, what in (("config", "configuration"), ("tree", "state")):
        old, new = found[part], wanted[part]
        different = [
            f"{name}: {old.get(name, absent)} there, {new.get(name, absent)} here"
            for name in sorted(old.keys() | new.keys())
            if not _same(old.get(name, absent), new.get(name, absent))
        ]
        if different:
            shown = "; ".join(different[:5])
            more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
            raise ValueError(
                f"the checkpoint {folder} is of another {what} ({shown}{more}): go on "
                "with the same, or choose another directory."
            )


def _same(a: Any, b: Any) -> bool:
    return a == b or _text(a) == _text(b)  # 1 is 1.0, and NaN is NaN


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
