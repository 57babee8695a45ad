"""Delay Ctrl-C and SIGTERM until the state is saved."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Delay Ctrl-C and SIGTERM until the training loop has saved its state.

    Slurm, Kubernetes and preemptible machines send SIGTERM before they kill a job. In
    the middle of a step the state would be lost, since its buffers are donated. So the
    loop asks after each step whether to stop; if so, it saves and breaks. When the
    block ends, the signal takes effect: Ctrl-C raises KeyboardInterrupt, and SIGTERM
    calls the previous handler or, without one, raises SystemExit(143). A second Ctrl-C
    ends the program at once.

    Several processes that were joined by :func:`jax.distributed.initialize` stop at the
    same step, whichever of them receives the signal, through JAX's preemption service.
    Call ``jax.distributed.initialize`` first, because it handles SIGTERM from then on.

    Yields:
      A function (step) -> bool, which says whether to save and leave the loop. Call it
      once after each step, in every process, with a number that grows by one.

    Raises:
      ValueError: outside the main thread, where Python handles no signals.

    Examples:
      >>> import optax_vasso as ov
      >>> with ov.train.stop_signals() as stop:
      ...     for step in range(3):
      ...         if stop(step + 1):
      ...             break  # after store.save(state)
    """
    received: list[int] = []
    joined = jax.distributed.is_initialized()

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if joined:
            signal.raise_signal(signal.SIGTERM)  # JAX tells the other processes.

    def stop(step: int) -> bool:
        if not joined:
            return bool(received)
        reached = multihost_utils.reached_preemption_sync_point(step)
        if reached and not received:
            received.append(signal.SIGTERM)
        return reached

    held = [signal.SIGINT] if joined else [signal.SIGINT, signal.SIGTERM]
    before = {
        number: signal.signal(number, note) or signal.SIG_DFL
        for number in held
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        takes_effect = signal.getsignal(received[0])
        if not callable(takes_effect):
            raise SystemExit(128 + received[0])
        takes_effect(received[0], None)
