"""A sweep as one program against the same trainings one by one, in one run.

The sweep is that of ``examples/sweep.py`` on the papers' grid of ρ × θ with 8 seeds.
One by one, a training is a Python loop over a step that was compiled once, with ρ and θ
traced, for all trainings: the best that a loop over minibatches does. A few trainings
are timed, before and after the sweep, and stand for all: they differ in numbers alone.
"""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import digits
import jax
import numpy as np
import optax
from command_line import (
    Parser,
    environment,
    positive_integer,
    progress_bar,
    results_folder,
    run,
    write_json,
)
from rows import one_device_per_core
from sweep import RADII, grid, make_optimizer

THETAS = (0.2, 0.4, 0.6, 0.9)
NOISE = 0.75


def one_by_one(epochs: int) -> Callable[[float, float, int], float]:
    """(ρ, θ, seed) -> test accuracy, by a step that is compiled once."""
    split = digits.test_split()
    steps_an_epoch = digits.TRAINING_IMAGES // digits.BATCH
    schedule = optax.cosine_decay_schedule(
        digits.LEARNING_RATE, epochs * steps_an_epoch
    )
    base = optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=0.9)
    )

    def optimizer(rho: Any, theta: Any) -> optax.GradientTransformation:
        return make_optimizer(base, {"rho": rho, "theta": theta}, 0)

    @jax.jit
    def start(rho: Any, theta: Any, seed: Any) -> Any:
        params = digits.init_mlp(jax.random.PRNGKey(seed))
        labels = digits.training_labels(split.labels, NOISE, seed)
        return params, optimizer(rho, theta).init(params), labels

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        params: Any, opt_state: Any, batch: Any, labels: Any, rho: Any, theta: Any
    ) -> Any:
        grad_fn = functools.partial(
            jax.grad(digits.cross_entropy),
            images=split.images[batch],
            labels=labels[batch],
        )
        updates, opt_state = optimizer(rho, theta).update(
            grad_fn(params), opt_state, params, grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates), opt_state

    evaluate = jax.jit(digits.accuracy)

    def train(rho: float, theta: float, seed: int) -> float:
        params, opt_state, labels = start(rho, theta, seed)
        random = np.random.default_rng(seed)
        for _ in range(epochs):
            order = random.permutation(len(labels))
            for batch in order.reshape(steps_an_epoch, digits.BATCH):
                params, opt_state = step(params, opt_state, batch, labels, rho, theta)
        return float(evaluate(params, split.evaluation_images, split.evaluation_labels))

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


def main() -> None:
    """Measure, print, write."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=positive_integer, default=8)
    parser.add_argument("--epochs", type=positive_integer, default=digits.EPOCHS)
    parser.add_argument(
        "--alone", type=positive_integer, default=3, help="timed before and after"
    )
    parser.add_argument("--results", type=results_folder, default="results")
    options = parser.parse_args()
    rows = grid(list(RADII), list(THETAS), options.seeds)
    count = len(rows["seed"])
    train = one_by_one(options.epochs)
    sweep = digits.trainer(
        make_optimizer, NOISE, epochs=options.epochs, evaluate_every=options.epochs
    )
    chosen = np.linspace(0, count - 1, 2 * options.alone).astype(int).reshape(2, -1)

    def alone(i: int) -> Timed:
        return timed(
            lambda: train(*(rows[name][i].item() for name in ("rho", "theta", "seed")))
        )

    def whole() -> Timed:
        settings = {name: rows[name] for name in ("rho", "theta")}
        return timed(lambda: sweep(settings, rows["seed"], digits.test_split()))

    with progress_bar() as bar:
        task = bar.add_task("trainings and sweeps", total=chosen.size + 3)

        def done(call: Timed) -> Timed:
            bar.advance(task)
            return call

        first_alone = done(alone(0))
        by_one = [done(alone(i)) for i in chosen[0]]
        first_sweep = done(whole())
        later_sweep = done(whole())
        by_one += [done(alone(i)) for i in chosen[1]]
    each = float(np.mean([call.seconds for call in by_one]))
    compiled_alone = first_alone.seconds - each
    result = {
        "environment": environment() | {"devices": jax.local_device_count()},
        "trainings": count,
        "epochs": options.epochs,
        "one_by_one_seconds_each": [round(call.seconds, 2) for call in by_one],
        "one_by_one_cores": float(np.mean([call.cores for call in by_one])),
        "one_by_one_compilation_seconds": round(compiled_alone, 2),
        "sweep_seconds": round(later_sweep.seconds, 2),
        "sweep_cores": later_sweep.cores,
        "sweep_seconds_with_compilation": round(first_sweep.seconds, 2),
        "ratio": count * each / later_sweep.seconds,
        "ratio_with_compilation": (count * each + compiled_alone) / first_sweep.seconds,
        # Other random batches, so equal on average only.
        "accuracy_one_by_one": [call.result for call in by_one],
        "accuracy_sweep": later_sweep.result.accuracy[chosen.ravel(), -1].tolist(),
    }
    for name, value in result.items():
        print(name, value)
    write_json(options.results / "sweep_cost.json", result)


if __name__ == "__main__":
    one_device_per_core()
    run(main)
