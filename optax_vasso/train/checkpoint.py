"""Save a train state with Orbax, so that a run killed at any step can continue.

Needs Orbax: ``pip install '.[checkpoint]'`` in a clone. Each process writes its own
shards. A checkpoint appears under its number only when it is complete, and no number is
used twice, so a crash or a full disk while saving leaves the last good one in place. A
digest detects damage to the files.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

try:
    import orbax.checkpoint as ocp
    from etils import epath  # Orbax's paths, which may be URLs
except ImportError as error:
    raise ImportError(
        "optax_vasso.train.checkpoint needs Orbax: run pip install '.[checkpoint]' in "
        "a clone of optax_vasso."
    ) from error

from optax_vasso._internal import description
from optax_vasso._internal.checks import check_integer, is_key
from optax_vasso._internal.locks import lock

PyTree = Any

_UNFINISHED = ocp.utils.TMP_DIR_SUFFIX  # in the names of incomplete checkpoints
_RETRIES = (1.0, 4.0)  # seconds to wait before reading again after a failed read


class Checkpoints(NamedTuple):
    """The checkpoints of a run, as three functions.

    Attributes:
      save: (state) -> None. Writes the state, blocks until it is complete, then deletes
        the oldest checkpoints beyond ``keep``. Those that ``restore`` found damaged are
        renamed: ``7`` becomes ``7.damaged``. The checkpoint is numbered by its step,
        the largest one if there are several, or by the next free number if the run went
        back. Raises OSError if it cannot be written; the earlier ones are kept.
      restore: (like) -> state, or ``like`` itself if there is no checkpoint yet.
        ``like`` has the structure, the shardings and the mesh to restore onto. Writes
        nothing. A damaged checkpoint, which is incomplete, cannot be decoded or has
        another digest, is skipped for the previous one with a warning. Raises
        ValueError if the newest intact one is of another format, configuration or
        state, and OSError if all are damaged, or if one cannot be read for another
        reason, even after two more attempts.
      close: () -> None, when the run is over; another run may then open the directory.
        After it, ``save`` and ``restore`` raise ValueError.
    """

    save: Callable[[PyTree], None]
    restore: Callable[[PyTree], PyTree]
    close: Callable[[], None]


def checkpoints(
    directory: str | os.PathLike, config: Mapping[str, Any], *, keep: int = 2
) -> Checkpoints:
    """Open a directory of checkpoints of train states.

    Only one process can have it open: a lock is held until every ``checkpoints`` of
    this process is closed or the process ends, however it ends. All processes of a run
    open it together, and process 0 holds the lock. A directory that cannot be written
    is opened without a lock, to restore from it.

    Args:
      directory: folder of the checkpoints, created if it does not exist. All processes
        must be able to reach it. A URL such as ``gs://bucket/run`` is passed to Orbax
        and is not locked.
      config: configuration of the run (recipe, hyperparameters, sizes): names and
        values that JSON can hold, or NumPy numbers and arrays. Restoring a checkpoint
        of another configuration raises an error; tuples equal lists, a key 1 equals a
        key "1", and NaN equals itself.
      keep: number of intact checkpoints to keep, >= 1. Two or more leave one to return
        to if the newest is damaged.

    Raises:
      ValueError: if keep is less than 1 or config has a value that JSON cannot hold.
      OSError: if the directory cannot be made, or another process has it open.
    """
    check_integer("keep", keep, 1)
    config = description.as_json(config)
    directory = os.fspath(directory)
    is_url = "://" in directory
    folder = epath.Path(directory if is_url else os.path.abspath(directory))
    make = functools.partial(folder.mkdir, parents=True, exist_ok=True)
    unlock, error = _on_process_0(make if is_url else lambda: lock(folder))
    if error:
        raise error
    _one_report()
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    damaged: set[int] = set()
    is_open = True

    def check_open() -> None:
        if not is_open:
            raise ValueError(
                f"the checkpoints in {folder} were closed: open them again with "
                "checkpoints(...)."
            )

    def newest(below: int = 2**31 - 1) -> int:
        """The newest checkpoint of a lower number, or -1; the same on all processes."""
        found, error = _on_process_0(lambda: [n for n in _whole(folder) if n < below])
        if error:
            raise error
        number = max(found or [], default=-1)
        return int(multihost_utils.broadcast_one_to_all(np.int32(number)))

    def set_aside() -> None:
        for number in damaged & _whole(folder):
            _rename(folder / str(number), f"{number}.damaged")

    def write(number: int, args: ocp.args.Composite) -> None:
        if not jax.process_index():
            if _whole(folder) - damaged:  # else only once the new one is complete
                set_aside()
            for path in list(folder.iterdir()):  # left over from failed saves
                unfinished = is_url and path.name.isdigit() and not _is_whole(path)
                if _UNFINISHED in path.name or unfinished:
                    path.rmtree()
        checkpointer.save(folder / str(number), args=args)

    def tidy() -> None:
        set_aside()
        for number in sorted(_whole(folder))[:-keep]:
            # Renamed first, so that a process killed here leaves no partial checkpoint.
            _rename(folder / str(number), f"{number}{_UNFINISHED}.old").rmtree()

    def save(state: PyTree) -> None:
        check_open()
        # Numbers are not reused, so old checkpoints stay until the new one is complete.
        step = int(jnp.max(state.step))
        number = max(step, newest() + 1)
        arrays = _as_dict(state)
        digests = description.digests(arrays)
        described = description.describe(state, config) | {"digests": digests}
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays),
            description=ocp.args.JsonSave(description.sealed(described)),
        )
        _, error = _everywhere(lambda: write(number, args))
        if error:
            raise OSError(
                f"the checkpoint of step {step} could not be written to {folder}: "
                f"{_first_line(error)}. The earlier ones are kept."
            )
        _, error = _on_process_0(tidy)
        if error:
            warnings.warn(
                f"older checkpoints in {folder} could not be removed: "
                f"{_first_line(error)}.",
                stacklevel=2,
            )
        else:
            damaged.clear()

    def restore(like: PyTree) -> PyTree:
        check_open()
        damaged.clear()
        reasons: list[str] = []
        number = newest()
        while number >= 0:
            state, error = _read(folder / str(number), like, config)
            if error is None:
                break
            if not _is_damage(error):
                raise OSError(
                    f"checkpoint {number} in {folder} cannot be read now "
                    f"({_first_line(error)}): try again later, or rename it to use the "
                    "previous one."
                )
            damaged.add(number)
            reasons.append(f"checkpoint {number}: {_first_line(error)}")
            number = newest(below=number)
        if number < 0 and reasons:
            raise OSError(
                f"no checkpoint in {folder} can be read ({'; '.join(reasons)}): "
                "restore the directory, or start again in an empty one."
            )
        if reasons:
            warnings.warn(
                f"went back to checkpoint {number} in {folder}, since a newer one is "
                f"damaged ({'; '.join(reasons)}).",
                stacklevel=2,
            )
        return like if number < 0 else state

    def close() -> None:
        nonlocal is_open
        if is_open:
            is_open = False
            checkpointer.close()
            if unlock:
                unlock()

    return Checkpoints(save, restore, close)


def _is_whole(path: epath.Path) -> bool:
    return path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path)


def _whole(folder: epath.Path) -> set[int]:
    """The numbers of the complete checkpoints in a directory."""
    return {int(path.name) for path in folder.iterdir() if _is_whole(path)}


def _rename(path: epath.Path, name: str) -> epath.Path:
    """Rename within a directory, with a number behind the name if it is taken."""
    names = itertools.chain([name], (f"{name}.{i}" for i in itertools.count(2)))
    free = next(new for n in names if not (new := path.parent / n).exists())
    return path.rename(free)


def _read(
    folder: epath.Path, like: PyTree, config: Any
) -> tuple[PyTree, Exception | None]:
    """The state in the folder of a checkpoint, or why it cannot be read.

    It uses Orbax's handlers, because its checkpointer waits for all processes and would
    hang if one cannot read its shards.
    """
    described, error = _persistently(
        lambda: description.unsealed(
            ocp.JsonCheckpointHandler().restore(folder / "description")
        )
    )
    if isinstance(error, FileNotFoundError):
        return None, ValueError("it has no description")
    if error:
        return None, error
    description.check_same(described, description.describe(like, config), folder)
    handler = ocp.StandardCheckpointHandler()
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(like))
    arrays, error = _persistently(
        lambda: handler.restore(
            folder / "arrays", args=ocp.args.StandardRestore(shapes)
        )
    )
    if error:
        return None, error
    found = description.digests(arrays)
    changed = sum(found[name] != described["digests"][name] for name in found)
    if changed:
        text = f"{changed} of its {len(found)} arrays are not as they were"
        return None, ValueError(text)
    return _from_dict(arrays, like), None


def _persistently(read: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The result of ``read``, tried again after a failure other than damage."""
    result, error = _everywhere(read)
    for pause in _RETRIES:
        if error is None or _is_damage(error):
            break
        time.sleep(pause)
        result, error = _everywhere(read)
    return result, error


# TensorStore's status codes for content that is missing or cannot be decoded.
_DAMAGED = "DATA_LOSS|FAILED_PRECONDITION|INVALID_ARGUMENT|NOT_FOUND|OUT_OF_RANGE"


def _is_damage(error: Exception) -> bool:
    """Whether a read error means that the content is not what was written.

    A failing disk, network or memory is no damage, since it may recover.
    """
    text = str(error)
    code = re.search(r"os_error_code='(\d+)'", text)  # TensorStore raises no OSErrors
    if code:
        error = OSError(int(code[1]), text)  # of the class that belongs to the number
    if isinstance(error, OSError):
        missing = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
        return isinstance(error, missing)
    status = re.match(r"([A-Z_]+): ", text)
    if status:
        return bool(re.fullmatch(_DAMAGED, status[1]))
    return isinstance(error, (ValueError, LookupError, TypeError, AttributeError))


def _everywhere(action: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The result of an action on this process, or the worst error on any process."""
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = _root(caught)
    if jax.process_count() > 1:
        own = 0 if error is None else 1 if _is_damage(error) else 2
        found = multihost_utils.process_allgather(np.asarray(own))
        if found.max() > own:
            kind = ValueError if found.max() == 1 else OSError
            error = kind(f"process {found.argmax()} could not do its part")
    return result, error


def _on_process_0(action: Callable[[], Any]) -> tuple[Any, Exception | None]:
    return _everywhere(lambda: None if jax.process_index() else action())


def _root(error: BaseException) -> Any:
    """The cause of an error, without its long context."""
    while error.__cause__ is not None:
        error = error.__cause__
    error.__context__ = None
    return error.with_traceback(None)


@functools.cache
def _one_report() -> None:
    """Silence what Orbax prints beside the errors that it raises.

    If an array cannot be read, the unfinished reads of the others each write dozens of
    lines to stderr, perhaps much later, when they are collected or find the event loop
    closed. If one cannot be written, each thread of the save logs its error as well.
    """
    report_others = sys.unraisablehook

    def report(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        of_orbax = "orbax" in getattr(code, "co_filename", "")
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            report_others(unraisable)

    sys.unraisablehook = report
    logging.getLogger("absl").addFilter(
        lambda record: "_SignalingThread.run() raised" not in str(record.msg)
    )


def _name(number: int) -> str:
    return f"{number:05d}"


def _as_dict(state: PyTree) -> dict[str, jax.Array]:
    """The arrays of a state by number; typed random keys as their data.

    Orbax would restore tuples as lists and drop empty states, so the structure comes
    from the state to restore into. Arrays of size zero, which it refuses, are left out.
    """
    return {
        _name(i): jax.random.key_data(leaf) if is_key(leaf) else jnp.asarray(leaf)
        for i, leaf in enumerate(jax.tree.leaves(state))
        if jnp.size(leaf)
    }


def _from_dict(arrays: dict[str, jax.Array], like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    for i, leaf in enumerate(leaves):
        new = arrays.get(_name(i), leaf)
        if is_key(leaf) and new is not leaf:
            new = jax.random.wrap_key_data(new, impl=jax.random.key_impl(leaf))
        leaves[i] = new
    return jax.tree.unflatten(structure, leaves)


def _first_line(error: BaseException) -> str:
    """An error in one line, without TensorStore's description of the request."""
    text = str(error).partition(" [tensorstore_spec")[0].strip()
    line = text.splitlines()[0][:300] if text else ""
    return line if type(error) is ValueError else f"{type(error).__name__}: {line}"
