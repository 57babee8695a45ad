"""What is compiled for an image experiment: the step, the evaluation, batch statistics.

Nothing here depends on the seed, so the seeds of an experiment share one compilation.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import optax_vasso as ov
from experiments.vision import image_folder, methods, models
from experiments.vision.batches import Batch, Images

PyTree = Any
# What evaluation adds to the sums of an epoch, beside the time that it took.
EVALUATED = ("evaluated_right", "evaluated_loss", "evaluated_images")


class Run(NamedTuple):
    """What training needs, compiled on first use and shared by all seeds.

    Attributes:
      init: seed -> the state before the first step, on the devices.
      step: (state, batch) -> (state, metrics), as of ``ov.make_train_step``.
      add: (sums, metrics) -> sums, on the devices.
      place: a batch of this process -> the global batch on the devices.
      replicate: a tree of arrays that all processes have -> the same on the devices.
      statistics: (state, images, seed) -> model state to evaluate with.
      evaluate: (state, model state, images) -> the sums named in ``EVALUATED``.
      schedule: the learning rate.
      steps_an_epoch: the remainder of an epoch is dropped.
    """

    init: Callable[[int], ov.TrainState]
    step: Callable[..., Any]
    add: Callable[..., dict[str, jax.Array]]
    place: Callable[[Batch], PyTree]
    replicate: Callable[[PyTree], PyTree]
    statistics: Callable[[ov.TrainState, Images, int], PyTree]
    evaluate: Callable[[ov.TrainState, PyTree, Images], np.ndarray]
    schedule: optax.Schedule
    steps_an_epoch: int


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
    if options.clip:
        parts.append(optax.clip_by_global_norm(options.clip))
    if options.optimizer == "sgd":
        parts.append(optax.add_decayed_weights(options.weight_decay))
        parts.append(optax.sgd(schedule, momentum=options.momentum or None))
    else:
        parts.append(optax.adamw(schedule, weight_decay=options.weight_decay))
    base = optax.chain(*parts)
    if options.local_ascent:
        base = ov.train.average_over(base, "data")
    chosen = dict(options.hyperparameters)
    if options.final_rho is not None:
        rho, final = chosen["rho"], options.final_rho
        chosen["rho"] = lambda step: (
            final + (rho - final) * schedule(step) / options.learning_rate
        )
    return methods.make_optimizer(options.method, base, chosen, seed)


def make_loss(model: Any, images: Images, label_smoothing: float) -> Callable[..., Any]:
    """Mean cross-entropy of augmented images; the share that is right beside it.

    Both evaluations of a step have the same key, and so the same augmented images and
    the same dropout.
    """

    def loss(params: PyTree, batch: Batch, model_state: PyTree, key: jax.Array):
        augment_key, dropout_key = jax.random.split(key)
        logits, new = model.apply(
            {"params": params, **model_state},
            images.augment(augment_key, batch["image"]),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_key},
        )
        targets = jax.nn.one_hot(batch["label"], images.classes, dtype=logits.dtype)
        targets = optax.smooth_labels(targets, label_smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
        right = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
        return jnp.mean(losses), (dict(new), right)

    return loss


def prepare(options: Any, images: Images, mesh: Mesh) -> Run:
    """Model, optimizer, step and evaluation, for all seeds with images of this kind."""
    model = models.create(options.model, images.classes, jnp.dtype(options.dtype))
    shape = (1, images.side, images.side, 3)
    init_model = jax.jit(lambda key: model.init(key, jnp.zeros(shape), train=False))
    steps_an_epoch = images.train_count // options.batch
    schedule = learning_rate_schedule(options, steps_an_epoch)
    optimizer = make_optimizer(options, schedule, 0)
    loss = make_loss(model, images, options.label_smoothing)
    gradient: Any = ov.train.whole_batch
    if options.microbatches > 1:
        gradient = ov.train.microbatched(options.microbatches)
    whole = NamedSharding(mesh, PartitionSpec())
    on = mesh if options.local_ascent and jax.device_count() > 1 else None

    def begun(seed: int) -> ov.TrainState:
        init_key, run_key = jax.random.split(jax.random.key(seed))
        model_state = dict(init_model(init_key))
        params = model_state.pop("params")
        # The seed is in the state of a gate, and nowhere in the step.
        own = make_optimizer(options, schedule, seed)
        rest = {"model_state": model_state, "key": run_key}
        if options.local_ascent:
            groups = options.local_ascent
            return ov.train.init_local_state(params, own, groups, mesh=on, **rest)
        return ov.init_train_state(params, own, **rest)

    def init(seed: int) -> ov.TrainState:
        state = begun(seed)
        if options.local_ascent:
            return state
        return ov.train.shard_state(state, optimizer, mesh)

    taken = {"has_aux": True, "gradient": gradient}
    if options.local_ascent:
        step = ov.train.make_local_train_step(loss, optimizer, mesh=on, **taken)
    else:
        shardings = ov.train.state_shardings(jax.eval_shape(begun, 0), optimizer, mesh)
        step = ov.make_train_step(loss, optimizer, state_shardings=shardings, **taken)

    def place(batch: Batch) -> PyTree:
        return ov.train.shard_batch(batch, mesh)

    def replicate(tree: PyTree) -> PyTree:
        return jax.device_put(tree, whole)

    @jax.jit
    def add(sums: dict[str, jax.Array], metrics: PyTree) -> dict[str, jax.Array]:
        new = readable(metrics)
        return {name: total + new[name] for name, total in sums.items()}

    @jax.jit
    def count(
        sums: jax.Array, state: ov.TrainState, model_state: PyTree, batch: Batch
    ) -> jax.Array:
        logits = model.apply(
            {"params": ov.eval_params(state.opt_state, state.params), **model_state},
            images.normalize(batch["image"]),
            train=False,
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        right = jnp.argmax(logits, -1) == batch["label"]
        weight = batch["weight"]
        return sums + jnp.stack([weight @ right, weight @ losses, jnp.sum(weight)])

    def evaluate(
        state: ov.TrainState, model_state: PyTree, images: Images
    ) -> np.ndarray:
        sums = replicate(np.zeros(len(EVALUATED), np.float32))
        for batch in images.held_out():
            sums = count(sums, state, model_state, place(batch))
        return np.asarray(sums)

    @jax.jit
    def collect(state: ov.TrainState, model_state: PyTree, batch: Batch, i: int):
        params = ov.eval_params(state.opt_state, state.params)
        key = jax.random.fold_in(state.key, i)
        return loss(params, batch, model_state, key)[1][0]

    def statistics(state: ov.TrainState, images: Images, seed: int) -> PyTree:
        model_state = state.model_state
        if options.recollect and model_state:
            batches = image_folder.read_ahead(images.train(seed))
            for i, batch in zip(range(options.recollect), batches, strict=False):
                model_state = collect(state, model_state, place(batch), i)
        return model_state

    return Run(
        *(init, step, add, place, replicate, statistics, evaluate, schedule),
        steps_an_epoch,
    )


def readable(metrics: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The metrics of a step as float32 scalars, by the names that results have."""
    metrics = dict(metrics) | {"steps": 1}
    # Microbatches and groups have theirs in front.
    metrics["train_accuracy"] = 100 * jnp.mean(metrics.pop("aux"))
    if "ascended" in metrics:
        metrics["gradients"] = 1 + jnp.asarray(metrics.pop("ascended"), jnp.float32)
    return {
        name: jnp.mean(jnp.asarray(value, jnp.float32))
        for name, value in metrics.items()
    }
