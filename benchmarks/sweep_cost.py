"""Trainings as the rows of one program against the same trainings one by one.

    python -m benchmarks.sweep_cost

The trainings are VaSSO on digits with 75 % random labels, at a grid of ρ × θ with 8
seeds. One by one, a training is a Python loop over a step that was compiled once, with
ρ and θ traced, for all trainings: the best that a loop over minibatches does. A few are
timed, before and after the rows, and stand for all: they differ in numbers alone.
"""

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import optax_vasso as ov
from experiments import tasks
from experiments.harness import command_line, files, progress, rows, training
from experiments.harness.methods import METHODS, base
from experiments.harness.networks import cross_entropy
from experiments.tasks import Task

RADII, THETAS = (0.05, 0.1, 0.2, 0.5), (0.2, 0.4, 0.6, 0.9)
SETTING = {"learning_rate": 0.05, "weight_decay": 0.005}
VASSO = METHODS["vasso"]


def one_by_one(task: Task) -> Callable[[dict[str, float], int], float]:
    """(hyperparameters, seed) -> accuracy, by a step that is compiled once."""
    inputs, steps = jnp.asarray(task.inputs), task.epochs * task.steps_per_epoch

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, indices: Any, labels: Any, chosen: Any) -> Any:
        def loss(params: Any, indices: Any) -> Any:
            logits = task.network.logits(params, inputs[indices])
            return cross_entropy(logits, labels[indices])

        optimizer = VASSO.make(base(chosen, steps), chosen, 0)
        return ov.make_train_step(loss, optimizer)(state, indices)[0]

    @jax.jit
    def start(params: Any, chosen: Any) -> Any:
        optimizer = VASSO.make(base(chosen, steps), chosen, 0)
        return ov.init_train_state(params, optimizer)

    @jax.jit
    def predict(params: Any, indices: Any) -> Any:
        return task.network.logits(params, inputs[indices]).argmax(-1)

    def train(chosen: dict[str, float], seed: int) -> float:
        split, random = tasks.split(task, seed), np.random.default_rng([seed, 1])
        state = start(task.network.init(random), chosen)
        labels = jnp.asarray(split.given_labels)
        for _ in range(task.epochs):
            order = random.permutation(split.training)
            for indices in order.reshape(-1, task.batch):
                state = step(state, indices, labels, chosen)
        found = predict(state.params, split.validation)
        return float(100 * np.mean(found == task.labels[split.validation]))

    return train


class Timed(NamedTuple):
    """How long a call took, how many cores it kept busy, and what it returned."""

    seconds: float
    cores: float
    result: Any


def timed(function: Callable[[], Any]) -> Timed:
    """Call, and time."""
    began, processor_began = time.perf_counter(), time.process_time()
    result = function()
    seconds = time.perf_counter() - began
    return Timed(seconds, (time.process_time() - processor_began) / seconds, result)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = command_line.Parser(
        prog="python -m benchmarks.sweep_cost", description=__doc__
    )
    count = command_line.positive_integer
    parser.add_argument("--seeds", type=count, default=8, help="per point of the grid")
    parser.add_argument("--alone", type=count, default=3, help="timed before and after")
    parser.add_argument("--results", type=command_line.folder, default="results")
    options = parser.parse_args(arguments)
    rows.use_all_cores()
    task = tasks.load("digits-75")
    points = [
        (SETTING | {"rho": rho, "theta": theta}, seed)
        for theta, rho, seed in itertools.product(THETAS, RADII, range(options.seeds))
    ]
    train = one_by_one(task)
    chosen = np.linspace(0, len(points) - 1, 2 * options.alone).astype(int)

    def alone(number: int) -> Timed:
        return timed(lambda: train(*points[number]))

    def together() -> Timed:
        settings, seeds = zip(*points, strict=True)
        return timed(
            lambda: training.train(task, VASSO, settings, seeds, epochs=task.epochs)
        )

    with progress.over("sweep_cost", len(chosen) + 3) as bar:

        def done(call: Timed) -> Timed:
            bar.advance(1)
            return call

        first_alone = done(alone(0))
        by_one = [done(alone(number)) for number in chosen[: options.alone]]
        first = done(together())
        later = done(together())
        by_one += [done(alone(number)) for number in chosen[options.alone :]]
    each = float(np.mean([call.seconds for call in by_one]))
    compiling = first_alone.seconds - each
    result = {
        "environment": files.environment() | {"devices": jax.local_device_count()},
        "trainings": len(points),
        "epochs": task.epochs,
        "one_by_one_seconds_each": [round(call.seconds, 2) for call in by_one],
        "one_by_one_cores": float(np.mean([call.cores for call in by_one])),
        "one_by_one_compilation_seconds": round(compiling, 2),
        "sweep_seconds": round(later.seconds, 2),
        "sweep_cores": later.cores,
        "sweep_seconds_with_compilation": round(first.seconds, 2),
        "ratio": len(points) * each / later.seconds,
        "ratio_with_compilation": (len(points) * each + compiling) / first.seconds,
        "accuracy_one_by_one": [call.result for call in by_one],
        "accuracy_sweep": later.result.clean_validation[chosen, -1].tolist(),
    }
    for name, value in result.items():
        print(name, value)
    files.write_json(options.results / "sweep_cost.json", result)
    return 0


if __name__ == "__main__":
    command_line.run(main)
