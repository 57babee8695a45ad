"""Lock a directory for one process until it ends, normally or not."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no such locks.
    fcntl = None  # type: ignore[assignment]

# The locks of this process: a directory -> its locked file, and how often it is open.
_held: dict[str, tuple[Any, int]] = {}


def lock(directory: str | os.PathLike) -> Callable[[], None]:
    """Lock a directory for this process, which may lock it again; returns the unlock.

    A directory that cannot be written stays without a lock.

    Raises:
      OSError: if another process has it locked.
    """
    directory = os.path.realpath(directory)
    file, count = _held.get(directory, (None, 0))
    _held[directory] = file or _locked_file(directory), count + 1

    def unlock() -> None:
        file, count = _held.pop(directory, (None, 0))
        if count > 1:
            _held[directory] = file, count - 1
        elif file:
            file.close()

    return unlock


def _locked_file(directory: str) -> Any:
    os.makedirs(directory, exist_ok=True)
    try:
        file = open(os.path.join(directory, "lock"), "a")  # noqa: SIM115
    except OSError:
        effective = os.access in os.supports_effective_ids
        if os.access(directory, os.W_OK, effective_ids=effective):
            raise
        return None
    try:
        _flock(file)
    except BlockingIOError:
        file.close()
        raise OSError(
            f"another run has {directory} open: wait until it ends, or choose another "
            "directory."
        ) from None
    except OSError as error:
        warnings.warn(
            f"{directory} cannot be locked ({error}): no other run may use it.",
            stacklevel=2,
        )
    return file


def _flock(file: Any) -> None:
    """Lock an open file.

    POSIX's locks of a process would end as soon as anything in it opens and closes the
    file again, such as a copy of the directory.
    """
    deadline = time.monotonic() + 1
    while fcntl:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)  # a worker of a killed run may be about to close it


def _forget() -> None:
    """In a forked child, leave the lock to the parent."""
    for file, _ in _held.values():
        if file:
            file.close()
    _held.clear()


if fcntl:
    os.register_at_fork(after_in_child=_forget)
