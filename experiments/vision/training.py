"""One run of an image experiment: step, evaluation, checkpoints, history of epochs.

The host asks the device for nothing between the first and the last step of an epoch:
metrics are summed where they arise, and many steps are under way at once.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

import optax_vasso as ov
from experiments.vision import image_folder
from experiments.vision.batches import Batch, Images
from experiments.vision.programs import EVALUATED, Run, readable
from optax_vasso.train.checkpoint import Checkpoints, checkpoints

# A host that waits for nothing would fill the device with batches: so many bytes of
# them, and so many steps, are under way at most.
BYTES_AHEAD = 2**28
STEPS_AHEAD = 64


class Progress(NamedTuple):
    """All that a run needs to go on: one tree, so that no part is newer than another.

    Attributes:
      state: the train state.
      sums: of the metrics over the steps of the epoch that is not finished.
      history: (epochs, columns) float32, a row for each finished epoch.
    """

    state: ov.TrainState
    sums: dict[str, jax.Array]
    history: jax.Array

    @property
    def step(self) -> jax.Array:
        """Under which a checkpoint is kept."""
        return self.state.step


def run_seed(
    options: Any,
    run: Run,
    images: Images,
    seed: int,
    result: dict[str, Any],
    configuration: Mapping[str, Any],
    on_step: Callable[[int, int], Any] = lambda step, total: None,
    on_epoch: Callable[[dict[str, Any]], Any] = lambda epoch: None,
) -> ov.TrainState:
    """Train and evaluate one seed, from its last checkpoint if there is one.

    Args:
      options: the command line.
      run: what was prepared for these options.
      images: what to train on and to evaluate on.
      seed: of labels, initialization, order, augmentation and dropout.
      result: is filled while training: ``epochs``, a dictionary for each.
      configuration: what makes the run what it is; a checkpoint of another
        configuration is refused.
      on_step: called with the steps begun and in all.
      on_epoch: called with each epoch, those of an earlier start included.

    Raises:
      OSError: a checkpoint cannot be read or written, or is of another configuration.
      KeyboardInterrupt: after Ctrl-C, when the checkpoint is written; after SIGTERM,
        whatever its handler raises.
    """
    state, total = run.init(seed), options.epochs * run.steps_an_epoch
    train = images.train(seed)
    zeros = run.replicate(no_sums(run, state, train[0]))
    columns = (*sorted(zeros), *EVALUATED, "seconds")
    history = np.zeros((options.epochs, len(columns)), np.float32)
    sums, epochs = zeros, []
    result["epochs"] = epochs
    what = "validation" if options.validation else "test"

    def finish_epoch(number: int) -> None:
        step = (number + 1) * run.steps_an_epoch
        values = dict(zip(columns, history[number].tolist(), strict=True))
        rate = float(run.schedule(step - 1))
        epoch = {"epoch": number + 1, "step": step, "learning_rate": rate}
        epochs.append(epoch | epoch_means(values, what))
        on_epoch(epochs[-1])

    with (
        opened(options.directory, seed, configuration) as store,
        ov.train.stop_signals() as stop,
    ):
        if store:
            try:
                progress = Progress(state, sums, run.replicate(history))
                state, sums, found = store.restore(progress)
            except ValueError as error:
                raise OSError(str(error)) from error
            history = np.array(found)
        first = int(state.step)
        for number in range(first // run.steps_an_epoch):
            finish_epoch(number)
        on_step(first, total)
        start = time.perf_counter()
        batches = image_folder.read_ahead(train, first)
        ahead = steps_ahead(train[0])
        under_way: collections.deque[jax.Array] = collections.deque()
        for t in range(first, total):
            state, metrics = run.step(state, run.place(next(batches)))
            sums = run.add(sums, metrics)
            under_way.append(sums["steps"])
            if len(under_way) > ahead:
                under_way.popleft().block_until_ready()
            on_step(t + 1, total)
            if (t + 1) % run.steps_an_epoch == 0:
                model_state = run.statistics(state, images, seed)
                tested = run.evaluate(state, model_state, images)
                summed = jax.device_get(sums)
                seconds = round(time.perf_counter() - start, 3)
                number = t // run.steps_an_epoch
                history[number] = [*map(summed.get, sorted(summed)), *tested, seconds]
                start, sums = time.perf_counter(), zeros
                finish_epoch(number)
            stopped, last = stop(t + 1), t + 1 == total
            if store and (stopped or last or (t + 1) % options.save_every == 0):
                # Each process has measured seconds of its own.
                history = np.array(multihost_utils.broadcast_one_to_all(history))
                store.save(Progress(state, sums, run.replicate(history)))
            if stopped:
                break
    return state


@contextlib.contextmanager
def opened(
    directory: Path | None, seed: int, configuration: Mapping[str, Any]
) -> Iterator[Checkpoints | None]:
    """The checkpoints of a seed, closed at the end; none without a directory."""
    if directory is None:
        yield None
        return
    store = checkpoints(directory / f"seed_{seed}", configuration)
    try:
        yield store
    finally:
        store.close()


def no_sums(run: Run, state: ov.TrainState, batch: Batch) -> dict[str, np.ndarray]:
    """The sums before the first step of an epoch."""
    _, metrics = jax.eval_shape(run.step, state, run.place(batch))
    return {
        name: np.zeros((), np.float32) for name in jax.eval_shape(readable, metrics)
    }


def epoch_means(values: dict[str, float], what: str) -> dict[str, float]:
    """The means of an epoch from its sums; ``what`` it was evaluated on names them."""
    right, loss, images = (values.pop(name) for name in EVALUATED)
    seconds, steps = round(values.pop("seconds"), 3), values.pop("steps")
    means = {name: total / steps for name, total in values.items()}
    return {
        "gradients": 1.0,
        **means,
        f"{what}_accuracy": 100 * right / images,
        f"{what}_loss": loss / images,
        "seconds": seconds,
    }


def steps_ahead(batch: Batch) -> int:
    """How many steps may be under way at once, by the memory that batches take."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    return int(np.clip(BYTES_AHEAD // size, 2, STEPS_AHEAD))
