"""Saving a train state with Orbax, so that a run killed at any step can go on.

Needs the extra ``checkpoint``: ``pip install 'optax-vasso[checkpoint]'``. Each process
writes its own shards; a checkpoint appears under its name only when it is whole, so a
machine that dies or a disk that fills while saving leaves the last good one in place.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise ImportError(
        "optax_vasso.checkpoint needs Orbax: pip install 'optax-vasso[checkpoint]'."
    ) from error

from optax_vasso.validation import is_key

PyTree = Any


class Checkpoints(NamedTuple):
    """Where the checkpoints of a run go, a pair of functions as in Optax.

    Attributes:
      save: (state) -> None. Writes the state under its step and waits until it is
        whole. Raises OSError if it cannot be written; those before it are kept.
      restore: (like) -> state, or ``like`` itself if there is no checkpoint yet.
        ``like`` has the structure, the shardings and the mesh to restore onto. Raises
        ValueError if the newest checkpoint is of another configuration or tree, and
        OSError if there are checkpoints but none can be read.
      close: () -> None, when the run is over.
    """

    save: Callable[[PyTree], None]
    restore: Callable[[PyTree], PyTree]
    close: Callable[[], None]


def checkpoints(
    directory: str | os.PathLike, config: Mapping[str, Any], *, keep: int = 2
) -> Checkpoints:
    """Open a directory of checkpoints of train states.

    Args:
      directory: where they go; made if it is not there. Several processes need one
        that all of them see.
      config: what makes this run what it is (recipe, hyperparameters, sizes): names
        and JSON values. A checkpoint of another configuration is refused.
      keep: how many to keep, >= 1. Two or more leave one to go back to if the newest
        turns out to be damaged.
    """
    if keep < 1:
        raise ValueError(f"keep must be an integer >= 1, got {keep!r}.")
    manager = ocp.CheckpointManager(
        os.path.abspath(directory),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False
        ),
        item_names=("arrays", "description"),
    )

    def save(state: PyTree) -> None:
        step = int(state.step)
        try:
            # After going back the run comes to a step again that could not be read.
            if step in manager.all_steps():
                manager.delete(step)
            manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(_as_dict(state)),
                    description=ocp.args.JsonSave(_describe(state, config)),
                ),
                force=True,  # even if a newer one, that cannot be read, is there
            )
            manager.wait_until_finished()
        except Exception as error:
            raise OSError(
                f"the checkpoint of step {step} could not be written to {directory}: "
                f"{_first_line(error)}. Those of {manager.all_steps()} are kept."
            ) from error

    def restore(like: PyTree) -> PyTree:
        manager.reload()
        steps = sorted(manager.all_steps(), reverse=True)
        damaged = []
        for step in steps:
            try:
                found = manager.restore(
                    step, args=ocp.args.Composite(description=ocp.args.JsonRestore())
                )
                description = found["description"]
            except Exception as error:
                damaged.append(f"step {step}: {_first_line(error)}")
                continue
            _check_same(description, _describe(like, config), directory, step)
            try:
                found = manager.restore(
                    step,
                    args=ocp.args.Composite(
                        arrays=ocp.args.StandardRestore(_abstract(_as_dict(like)))
                    ),
                )
                state = _from_dict(found["arrays"], like)
            except Exception as error:
                damaged.append(f"step {step}: {_first_line(error)}")
                continue
            if damaged:
                warnings.warn(
                    f"went back to the checkpoint of step {step}, since a newer one in "
                    f"{directory} cannot be read ({'; '.join(damaged)}).",
                    stacklevel=2,
                )
            return state
        if damaged:
            raise OSError(
                f"no checkpoint in {directory} can be read ({'; '.join(damaged)}): "
                "restore the directory, or start again in an empty one."
            )
        return like

    return Checkpoints(save, restore, manager.close)


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


def _describe(state: PyTree, config: Mapping[str, Any]) -> dict[str, Any]:
    tree = {
        jax.tree_util.keystr(path): f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
        for path, leaf in jax.tree.leaves_with_path(state)
    }
    return {"config": dict(config), "tree": tree}


def _check_same(found: Any, wanted: Any, directory: Any, step: int) -> None:
    """Raise a ValueError that says in what two descriptions differ."""
    absent = "nothing"
    for part, what in (("config", "configuration"), ("tree", "state")):
        old, new = found[part], wanted[part]
        different = [
            f"{name}: {old.get(name, absent)} there, {new.get(name, absent)} here"
            for name in sorted(old.keys() | new.keys())
            if old.get(name, absent) != new.get(name, absent)
        ]
        if different:
            shown = "; ".join(different[:5])
            more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
            raise ValueError(
                f"the checkpoint of step {step} in {directory} is of another {what} "
                f"({shown}{more}): go on with the same, or choose another directory."
            )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
