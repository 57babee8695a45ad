"""Training of many networks at once, with every hyperparameter a traced number.

A compiled program serves all trainings of one method on tasks of one shape: any noise,
seed, length and hyperparameters, in the search as in the test.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_vasso as ov
from experiments import tasks
from experiments.harness.methods import Method, base
from experiments.harness.networks import Network, cross_entropy
from experiments.harness.progress import Progress
from experiments.harness.rows import over_rows, place, rows_at_once
from experiments.tasks import Task

# Training inputs whose statistics batch normalization is evaluated with.
REFERENCE = 256


class Trained(NamedTuple):
    """What came of some trainings; accuracies in percent, (trainings, evaluations).

    Attributes:
      epochs: (evaluations,), after which was evaluated.
      noisy_validation: on the validation examples with the labels that were given.
      clean_validation: on the same with their true labels.
      test: on the test examples; ``None`` unless it was asked for.
      gradients: (trainings,), as counted.
      params: those to evaluate at the end, with a leading axis of trainings; ``None``
        like ``test``.
    """

    epochs: np.ndarray
    noisy_validation: np.ndarray
    clean_validation: np.ndarray
    test: np.ndarray | None
    gradients: np.ndarray
    params: Any


def budget_epochs(task: Task, method: Method, budget: str) -> int:
    """Epochs of a training at equal 'gradients' or at equal 'epochs'."""
    if budget == "epochs":
        return task.epochs
    calls = task.epochs / task.epochs_per_call / method.gradients
    return max(1, round(calls)) * task.epochs_per_call


def gradients_of(task: Task, method: Method, budget: str) -> float:
    """Gradients of one training; the unit of work of all progress bars."""
    epochs = budget_epochs(task, method, budget)
    return epochs * task.steps_per_epoch * method.gradients


def train(
    task: Task,
    method: Method,
    hyperparameters: Sequence[dict[str, float]],
    seeds: Sequence[int],
    *,
    epochs: int,
    test: bool = False,
    curve: bool = True,
    progress: Progress | None = None,
    watch: Callable[[int, ov.TrainState], Any] | None = None,
) -> Trained:
    """Train one network for each pair of hyperparameters and seed.

    Args:
      task: what is learned.
      method: the optimizer; all trainings have the same one.
      hyperparameters: one for each training, by the names of ``method.space``.
      seeds: one for each training: it draws split, labels, initialization and batches,
        so that trainings of one seed may be compared in pairs.
      epochs: length of all trainings, a multiple of ``task.epochs_per_call``.
      test: evaluate on the test set too.
      curve: with ``test``, evaluate while training, too, and not at the end alone.
      progress: advanced by the gradients that were taken.
      watch: called after every ``task.epochs_per_call`` epochs with the epoch and the
        states of those trainings that run together, in their order.
    """
    progress = progress or Progress("", 0)
    program = _program(method, task.network, task.gradient_noise > 0)
    splits = {seed: tasks.split(task, seed) for seed in set(seeds)}
    found: list[tuple[np.ndarray, ...]] = []
    size = rows_at_once()
    for begin in range(0, len(seeds), size):
        some = slice(begin, begin + size)
        chosen = [splits[seed] for seed in seeds[some]]
        rows = {
            "hyperparameters": {
                name: np.array([h[name] for h in hyperparameters[some]], np.float32)
                for name in method.space
            },
            "seed": np.array(seeds[some], np.uint32),
            "steps": np.full(len(chosen), epochs * task.steps_per_epoch, np.float32),
            "noise": np.full(len(chosen), task.gradient_noise, np.float32),
            "labels": np.stack([split.given_labels for split in chosen]),
            "training": np.stack([split.training for split in chosen]),
            "evaluated": np.stack(
                [
                    np.concatenate([split.validation, task.test])
                    if test
                    else split.validation
                    for split in chosen
                ]
            ),
        }
        found.append(
            _train_rows(
                task, method, program, rows, epochs, test, curve, progress, watch
            )
        )
    predicted, gradients, params = jax.tree.map(
        lambda *parts: np.concatenate(parts), *found
    )
    every = task.epochs_per_call if test and curve else epochs
    return _scored(
        task,
        [splits[seed] for seed in seeds],
        predicted,
        gradients,
        np.arange(every, epochs + 1, every),
        test,
    )._replace(params=params)


def _train_rows(
    task: Task,
    method: Method,
    program: "Program",
    rows: dict[str, Any],
    epochs: int,
    test: bool,
    curve: bool,
    progress: Progress,
    watch: Callable[[int, ov.TrainState], Any] | None,
) -> tuple[np.ndarray, np.ndarray, Any]:
    """Predictions (rows, evaluations, evaluated), gradients, and parameters of rows."""
    doing = f"{method.label}, {task.name}"
    progress.describe(doing if program.compiled else f"{method.label}: compiling")
    count = len(rows["seed"])
    random = [np.random.default_rng([seed, 1]) for seed in rows["seed"]]
    params = [task.network.init(r) for r in random]
    params = place(jax.tree.map(lambda *leaves: np.stack(leaves), *params))
    taken = task.steps_per_epoch * task.batch

    def orders() -> Any:
        """Which examples the steps of a call take: every epoch a new permutation."""
        epochs = range(task.epochs_per_call)
        drawn = [
            [r.permutation(examples)[:taken] for _ in epochs]
            for r, examples in zip(random, rows["training"], strict=True)
        ]
        return place(np.array(drawn).reshape(count, -1, task.batch))

    placed = place(rows)
    inputs = jnp.asarray(task.inputs)
    carry = jax.block_until_ready(program.start(params, placed))
    work = count * task.epochs_per_call * task.steps_per_epoch * method.gradients
    predicted, calls = [], epochs // task.epochs_per_call
    for call in range(calls):
        carry = jax.block_until_ready(program.run(inputs, carry, placed, orders()))
        if (test and curve) or call == calls - 1:
            labels = program.predict(inputs, carry, placed)
            predicted.append(np.asarray(labels)[:count])
        if not program.compiled:
            program.compiled.append(True)
            progress.describe(doing)
        if watch is not None:
            # On the host: slices of rows on several devices would be collectives.
            state = jax.device_get(carry[0]._replace(key=None))
            state = jax.tree.map(lambda leaf: leaf[:count], state)
            watch((call + 1) * task.epochs_per_call, state)
        progress.advance(work)
    params = program.params(carry) if test else None
    params = jax.tree.map(lambda leaf: np.asarray(leaf)[:count], params)
    return np.stack(predicted, 1), np.asarray(carry[-1])[:count], params


def _scored(
    task: Task,
    splits: Sequence[tasks.Split],
    predicted: np.ndarray,
    gradients: np.ndarray,
    epochs: np.ndarray,
    test: bool,
) -> Trained:
    """Accuracies of the predictions."""
    held = predicted[..., : task.validation]

    def accuracy(labels: np.ndarray, found: np.ndarray) -> np.ndarray:
        return 100 * (found == labels[:, None]).mean(axis=-1)

    given = np.stack([split.given_labels[split.validation] for split in splits])
    true = np.stack([task.labels[split.validation] for split in splits])
    return Trained(
        epochs=epochs,
        noisy_validation=accuracy(given, held),
        clean_validation=accuracy(true, held),
        test=accuracy(task.labels[task.test][None], predicted[..., task.validation :])
        if test
        else None,
        gradients=gradients,
        params=None,
    )


class Program(NamedTuple):
    """Compiled functions of rows.

    Attributes:
      start: (parameters, rows) -> carry.
      run: (inputs, carry, rows, examples of each step) -> carry, that many steps later.
      predict: (inputs, carry, rows) -> the labels that the network predicts.
      params: carry -> the parameters to evaluate.
      compiled: empty until ``run`` has been compiled.
    """

    start: Callable[..., Any]
    run: Callable[..., Any]
    predict: Callable[..., Any]
    params: Callable[..., Any]
    compiled: list[bool]


@functools.cache
def _program(method: Method, network: Network, tilted: bool) -> Program:
    makers = method.makers()

    def optimizer_of(row: dict[str, Any]) -> optax.GradientTransformation:
        chosen = row["hyperparameters"] | {"steps": row["steps"]}
        return method.make(base(chosen, row["steps"]), chosen, row["seed"])

    def start(params: Any, row: dict[str, Any]) -> Any:
        key = jax.random.key(row["seed"]) if tilted else None
        return ov.init_train_state(params, optimizer_of(row), key=key), jnp.zeros(())

    def run(
        inputs: jax.Array, carry: Any, row: dict[str, Any], batches: jax.Array
    ) -> Any:
        def loss(params: Any, indices: jax.Array) -> jax.Array:
            logits = network.logits(params, inputs[indices])
            return cross_entropy(logits, row["labels"][indices])

        def tilted_loss(params: Any, indices: jax.Array, key: jax.Array) -> jax.Array:
            # A linear term adds its slope to every gradient and no curvature. The key
            # is the same in both gradients of a step.
            slope = _noise(key, params, row["noise"])
            return loss(params, indices) + optax.tree.vdot(slope, params)

        train_step = ov.make_train_step(
            tilted_loss if tilted else loss, optimizer_of(row), **makers
        )

        def step(carry: Any, indices: jax.Array) -> tuple[Any, None]:
            state, gradients = carry
            state, metrics = train_step(state, indices)
            # Two parts of a batch are one gradient of it.
            second = not makers and jnp.asarray(metrics.get("ascended", False))
            return (state, gradients + 1 + second), None

        return jax.lax.scan(step, carry, batches)[0]

    def params(carry: Any) -> Any:
        state, _ = carry
        return ov.eval_params(state.opt_state, state.params)

    def predict(inputs: jax.Array, carry: Any, row: dict[str, Any]) -> jax.Array:
        reference = inputs[row["training"][:REFERENCE]]
        logits = network.logits(params(carry), inputs[row["evaluated"]], reference)
        return jnp.argmax(logits, axis=-1).astype(jnp.uint8)

    return Program(
        over_rows(start),
        over_rows(run, shared=1, donate_argnums=1),
        over_rows(predict, shared=1),
        over_rows(params),
        [],
    )


def _noise(key: jax.Array, params: Any, norm: jax.Array) -> Any:
    """Gaussian noise like the parameters, of the expected squared norm ``norm``²."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    normal = optax.tree.random_like(key, params)
    return optax.tree.scale(norm / np.sqrt(size), normal)
