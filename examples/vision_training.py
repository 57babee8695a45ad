"""One run of an image experiment: step, evaluation, checkpoints, history of epochs."""

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import image_folder
import jax
import jax.numpy as jnp
import methods
import models
import numpy as np
import optax
from command_line import write_json
from jax.sharding import AxisType, Mesh
from vision_batches import Batch, Images

import optax_vasso as ov
from optax_vasso.checkpoint import checkpoints

PyTree = Any
# A host that reads no metrics could run ahead of its device, and fill it with batches.
STEPS_AHEAD = 2


def data_mesh() -> Mesh:
    """All devices of all processes in a row."""
    devices = jax.device_count()
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def learning_rate_schedule(options: Any, steps_an_epoch: int) -> optax.Schedule:
    """From 0 in a line to the learning rate, then by a cosine to 0 at the last step."""
    total = options.epochs * steps_an_epoch
    warmup = options.warmup_epochs * steps_an_epoch
    if not warmup:
        return optax.cosine_decay_schedule(options.learning_rate, total)
    return optax.warmup_cosine_decay_schedule(0, options.learning_rate, warmup, total)


def make_optimizer(
    options: Any, schedule: optax.Schedule, seed: int
) -> optax.GradientTransformation:
    """The method around SGD with an L2 penalty, or around AdamW."""
    parts = []
    if options.local_ascent:
        parts.append(ov.average_over("data"))
    if options.clip:
        parts.append(optax.clip_by_global_norm(options.clip))
    if options.optimizer == "sgd":
        parts.append(optax.add_decayed_weights(options.weight_decay))
        parts.append(optax.sgd(schedule, momentum=options.momentum or None))
    else:
        parts.append(optax.adamw(schedule, weight_decay=options.weight_decay))
    chosen = dict(options.hyperparameters)
    if options.final_rho is not None:
        rho, final = chosen["rho"], options.final_rho
        chosen["rho"] = lambda step: (
            final + (rho - final) * schedule(step) / options.learning_rate
        )
    return methods.make_optimizer(options.method, optax.chain(*parts), chosen, seed)


def make_loss(model: Any, images: Images, label_smoothing: float) -> Callable[..., Any]:
    """Mean cross-entropy of augmented images; the share that is right beside it.

    Both evaluations of a step have the same key, and so the same augmented images.
    """

    def loss_fn(params: PyTree, model_state: PyTree, batch: Batch, key: jax.Array):
        x = images.augment(key, batch["image"])
        logits, new = model.apply(
            {"params": params, **model_state}, x, train=True, mutable=["batch_stats"]
        )
        targets = jax.nn.one_hot(batch["label"], images.classes, dtype=logits.dtype)
        targets = optax.smooth_labels(targets, label_smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
        right = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
        return jnp.mean(losses), (dict(new), right)

    return loss_fn


class Run(NamedTuple):
    """What training one seed needs, compiled on first use.

    Attributes:
      state: the state before the first step.
      step: (state, batch) -> (state, metrics), as of ``ov.make_train_step``.
      place: a batch of this process -> the global batch on the devices.
      statistics: state -> model state to evaluate with.
      evaluate: (state, model state) -> {"accuracy", "loss"} on the test images.
      schedule: the learning rate.
      steps_an_epoch: the remainder of an epoch is dropped.
    """

    state: ov.TrainState
    step: Callable[..., Any]
    place: Callable[[Batch], PyTree]
    statistics: Callable[[ov.TrainState], PyTree]
    evaluate: Callable[[ov.TrainState, PyTree], dict[str, float]]
    schedule: optax.Schedule
    steps_an_epoch: int


def prepare(options: Any, images: Images, mesh: Mesh, seed: int) -> Run:
    """Model, optimizer, step and evaluation of one seed."""
    model = models.create(options.model, images.classes, jnp.dtype(options.dtype))
    # Not a typed key, which cannot be put on the devices of several processes.
    init_key, run_key = jax.random.split(jax.random.PRNGKey(seed))
    shape = (1, images.side, images.side, 3)
    variables = jax.jit(lambda key: model.init(key, jnp.zeros(shape), train=False))(
        init_key
    )
    params, model_state = variables["params"], dict(variables)
    del model_state["params"]
    steps_an_epoch = images.train_count // options.batch
    schedule = learning_rate_schedule(options, steps_an_epoch)
    optimizer = make_optimizer(options, schedule, seed)
    loss_fn = make_loss(model, images, options.label_smoothing)
    gradient = ov.whole_batch
    if options.microbatches > 1:
        gradient = ov.microbatched(options.microbatches)
    rest = {"model_state": model_state, "key": run_key}
    if options.local_ascent:
        on = None if jax.device_count() == 1 else mesh
        state = ov.init_local_state(
            params, optimizer, options.local_ascent, mesh=on, **rest
        )
        step = ov.make_local_train_step(loss_fn, optimizer, mesh=on, gradient=gradient)
    else:
        state = ov.init_train_state(params, optimizer, **rest)
        shardings = ov.state_shardings(state, mesh)
        state = ov.shard_state(state, mesh)
        step = ov.make_train_step(
            loss_fn, optimizer, gradient=gradient, state_shardings=shardings
        )

    def place(batch: Batch) -> PyTree:
        return ov.shard_batch(batch, mesh)

    @jax.jit
    def count(opt_state: PyTree, params: PyTree, model_state: PyTree, batch: Batch):
        logits = model.apply(
            {"params": ov.eval_params(opt_state, params), **model_state},
            images.normalize(batch["image"]),
            train=False,
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        right = jnp.argmax(logits, -1) == batch["label"]
        weight = batch["weight"]
        return jnp.stack([jnp.sum(weight * right), weight @ losses, jnp.sum(weight)])

    def evaluate(state: ov.TrainState, model_state: PyTree) -> dict[str, float]:
        right, loss, total = sum(
            np.asarray(
                count(state.opt_state, state.params, model_state, place(batch)),
                np.float64,
            )
            for batch in images.test()
        )
        return {"accuracy": float(100 * right / total), "loss": float(loss / total)}

    @jax.jit
    def collect(state: ov.TrainState, model_state: PyTree, batch: Batch, key: Any):
        params = ov.eval_params(state.opt_state, state.params)
        return loss_fn(params, model_state, batch, key)[1][0]

    def statistics(state: ov.TrainState) -> PyTree:
        model_state = state.model_state
        if options.recollect and model_state:
            batches = image_folder.read_ahead(images.train(seed))
            for i, batch in zip(range(options.recollect), batches, strict=False):
                key = jax.random.fold_in(run_key, i)
                model_state = collect(state, model_state, place(batch), key)
        return model_state

    return Run(state, step, place, statistics, evaluate, schedule, steps_an_epoch)


def run_seed(
    options: Any,
    images: Images,
    mesh: Mesh,
    seed: int,
    result: dict[str, Any],
    configuration: Mapping[str, Any],
    on_step: Callable[[int, int], Any] = lambda step, total: None,
    on_epoch: Callable[[dict[str, Any]], Any] = lambda epoch: None,
) -> ov.TrainState:
    """Train and evaluate one seed, from its last checkpoint if there is one.

    Args:
      options: the command line.
      images: what to train on and to test on.
      mesh: the devices.
      seed: of labels, initialization, order, augmentation and dropout.
      result: is filled while training: ``epochs``, a dictionary for each.
      configuration: what makes the run what it is; a checkpoint of another
        configuration is refused.
      on_step: called with the steps done and in all.
      on_epoch: called with each epoch, those of an earlier start included.

    Raises:
      OSError: a checkpoint cannot be read or written, or is of another configuration.
      KeyboardInterrupt: after Ctrl-C, when the checkpoint is written.
    """
    run = prepare(options, images, mesh, seed)
    state, total = run.state, options.epochs * run.steps_an_epoch
    store, notes, sums = None, None, Sums()
    epochs = result["epochs"] = []
    if options.directory:
        store = checkpoints(options.directory / f"seed_{seed}", configuration)
        notes = options.directory / f"seed_{seed}_history.json"
        try:
            state = store.restore(state)
        except ValueError as error:
            raise OSError(str(error)) from error
        epochs += read_history(notes, int(state.step), sums)
    for epoch in epochs:
        on_epoch(epoch)

    def save() -> None:
        if store:
            if jax.process_index() == 0:
                write_json(notes, {"epochs": epochs, "partial": sums.as_json(state)})
            store.save(state)

    first = int(state.step)
    on_step(first, total)
    start, pending = time.perf_counter(), []
    batches = image_folder.read_ahead(images.train(seed), first)
    with noted_interrupt() as interrupted:
        for t in range(first, total):
            state, metrics = run.step(state, run.place(next(batches)))
            pending.append(metrics)
            if len(pending) > STEPS_AHEAD:
                sums.add(pending.pop(0))
            on_step(t + 1, total)
            if (t + 1) % run.steps_an_epoch == 0:
                sums.add_all(pending)
                epoch = {"epoch": (t + 1) // run.steps_an_epoch, "step": t + 1}
                epoch |= {"learning_rate": float(run.schedule(t)), **sums.means()}
                tested = run.evaluate(state, run.statistics(state))
                epoch |= {f"test_{name}": value for name, value in tested.items()}
                epoch["seconds"] = round(time.perf_counter() - start, 3)
                start = time.perf_counter()
                epochs.append(epoch)
                on_epoch(epoch)
            last = t + 1 == total
            if interrupted or last or (t + 1) % options.save_every == 0:
                sums.add_all(pending)
                # With several processes each may have been interrupted elsewhere.
                if not interrupted or jax.process_count() == 1:
                    save()
            if interrupted and not last:
                raise KeyboardInterrupt
    if store:
        store.close()
    return state


class Sums:
    """Sums of metrics over the steps of an epoch, on the host."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self.count = 0

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Take in the metrics of one step; this waits for the step."""
        metrics = dict(metrics)
        ascended = metrics.pop("ascended", None)
        if ascended is not None:
            metrics["gradients"] = 1.0 + np.asarray(ascended)
        # Microbatches and groups have theirs in front.
        metrics["train_accuracy"] = 100 * jnp.mean(metrics.pop("aux"))
        for name, value in jax.device_get(metrics).items():
            self.totals[name] = self.totals.get(name, 0.0) + float(np.mean(value))
        self.count += 1

    def add_all(self, pending: list[Mapping[str, Any]]) -> None:
        """Take in what is pending, and empty it."""
        while pending:
            self.add(pending.pop(0))

    def means(self) -> dict[str, float]:
        """The means, starting anew."""
        means = {name: total / self.count for name, total in self.totals.items()}
        self.totals, self.count = {}, 0
        return {"gradients": 1.0, **means}

    def as_json(self, state: ov.TrainState) -> dict[str, Any]:
        """What an unfinished epoch needs to go on."""
        return {"step": int(state.step), "count": self.count, "totals": self.totals}


def read_history(path: Path, step: int, sums: Sums) -> list[dict[str, Any]]:
    """The epochs before a step, and into ``sums`` what came after the last of them."""
    if not step or not path.exists():
        return []
    history = json.loads(path.read_text())
    partial = history["partial"]
    if partial["step"] == step:
        sums.totals, sums.count = partial["totals"], partial["count"]
    return [epoch for epoch in history["epochs"] if epoch["step"] <= step]


@contextlib.contextmanager
def noted_interrupt() -> Iterator[list[int]]:
    """Ctrl-C is noted in a list, for the loop to end between steps; a second one ends.

    In the middle of a step the state would be lost: its buffers are donated.
    """
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, previous)
