"""What a step on split batches costs against SGD and SAM, at batches of many sizes.

The perceptron of the digits, 64-256-256-10, and a byte-level transformer. A
split step takes one gradient of the batch in two smaller passes, one after another,
which keep fewer cores busy. Operations are XLA's own counts; times are of steps in
turns, as ratios with quartiles.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax

import optax_vasso as ov
from benchmarks import measuring, networks
from benchmarks.optimizers import BASE, RHO
from benchmarks.transformer import Problem
from experiments.harness.command_line import positive_integer

METHODS = {
    "SGD": (BASE, {}),
    "SAM": (ov.sam(BASE, RHO), {}),
    "split": (ov.sam(BASE, RHO), ov.train.split_batch()),
}
BATCHES = (32, 128, 512, 1024, 4096)


def measure(problem: Problem, rounds: int, steps: int) -> dict[str, measuring.Measures]:
    """All methods on one network and batch."""
    programs: dict[str, Callable[[], Any]] = {}
    rows: dict[str, measuring.Measures] = {}
    for name, (optimizer, makers) in METHODS.items():
        step = ov.make_train_step(problem.loss_fn, optimizer, **makers)
        state = ov.init_train_state(problem.params, optimizer)
        program, counted = measuring.compiled(step, state, problem.batch)
        rows[name] = {"operations": counted["operations"]}
        programs[name] = _stepper(program, state, problem.batch)
    seconds = measuring.interleaved(programs, rounds, steps)
    unit = rows["SGD"]["operations"]
    return {
        name: {
            "operations / SGD": row["operations"] / unit,
            "time / SGD": measuring.ratios(seconds[name], seconds["SGD"]),
            "time / SAM": measuring.ratios(seconds[name], seconds["SAM"]),
            "milliseconds": 1e3 * min(seconds[name]),
        }
        for name, row in rows.items()
    }


def _stepper(program: Any, state: Any, batch: Any) -> Callable[[], Any]:
    held = [state]

    def step() -> jax.Array:
        held[0], metrics = program(held[0], batch)
        return metrics["loss"]

    return step


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = measuring.parser("split_cost", __doc__)
    parser.add_argument(
        "--rounds", type=positive_integer, default=20, help="interleaved rounds"
    )
    parser.add_argument(
        "--steps", type=positive_integer, default=5, help="steps in a round"
    )
    options = measuring.parse(parser, arguments)
    problems = [networks.perceptron(batch) for batch in BATCHES]
    problems.append(networks.transformer(width=64, batch=32, length=32))
    if options.smoke:
        problems, options.rounds = [networks.perceptron(16, 8)], 1
    rows = {}
    for problem in problems:
        found = measure(problem, options.rounds, options.steps)
        print(f"\n{problem.name}")
        measuring.show(found)
        rows |= {f"{problem.name}: {name}": row for name, row in found.items()}
        measuring.save(
            options, "split_cost", rows, rounds=options.rounds, steps=options.steps
        )


if __name__ == "__main__":
    sys.exit(main())
