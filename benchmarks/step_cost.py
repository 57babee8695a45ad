"""What a training step costs: operations, bytes, memory, compilation and time.

Every recipe and ``optax.contrib.sam`` in both modes on two byte-level transformers,
against one gradient, SGD, and the least that two gradients can cost: two gradients at
one point and the base optimizer's update, in one program. Operations, bytes and memory
are XLA's own counts and do not vary. Seconds to trace and compile are of the process,
the least of several compilations; times are of steps in turns, as ratios with
quartiles. Where a gate decides, the share of the steps that ascended stands beside.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import optax

from benchmarks import measuring, transformer
from benchmarks.optimizers import ALL, BASE, Running, make_step
from benchmarks.plain_networks import Problem
from experiments.harness.command_line import positive_integer

PyTree = Any
LEAST = "two gradients and the update"
UNIT = "optax.contrib.sam, opaque"


def two_gradients(problem: Problem) -> Callable[..., Any]:
    """Two gradients on two batches and one update by their sum."""

    def step(params: PyTree, state: PyTree, batch: jax.Array) -> tuple[PyTree, PyTree]:
        first, second = (
            jax.grad(problem.loss_fn)(params, tokens) for tokens in (batch, batch + 1)
        )
        updates, state = BASE.update(optax.tree.add(first, second), state, params)
        return optax.apply_updates(params, updates), state

    return step


def steps_of(problem: Problem) -> dict[str, tuple[Callable[..., Any], Any]]:
    """Name -> a step and what makes its first optimizer state."""
    found = {}
    for name, make in ALL.items():
        optimizer = make(BASE)
        found[name] = make_step(optimizer, problem.loss_fn), optimizer.init
    found[LEAST] = two_gradients(problem), BASE.init
    return found


def compiled_least(
    step: Callable[..., Any], arguments: tuple[Any, ...], repeats: int
) -> tuple[Any, measuring.Measures]:
    """Compile several times; the least seconds of each."""
    runs = []
    for _ in range(repeats):
        jax.clear_caches()
        runs.append(measuring.compiled(step, *arguments, donate=(0, 1)))
    program, counted = runs[-1]
    for key in ("trace_s", "compile_s"):
        counted[key] = min(run[1][key] for run in runs)
    return program, counted


def measure(
    problem: Problem, rounds: int, steps: int, repeats: int
) -> dict[str, measuring.Measures]:
    """Every method on one network."""
    size = measuring.tree_bytes(problem.params)
    gradient, unit = measuring.compiled(
        jax.grad(problem.loss_fn), problem.params, problem.batch
    )
    rows, running, ascents = {}, {}, {}
    for name, (step, init) in steps_of(problem).items():
        state = measuring.copied(init(problem.params))
        program, counted = compiled_least(
            step, (problem.params, state, problem.batch), repeats
        )
        params = measuring.copied(problem.params)
        running[name] = Running(program, params, state, problem.batch)
        rows[name] = {
            "operations": counted["operations"] / unit["operations"],
            "bytes": counted["bytes"] / unit["bytes"],
            "state": measuring.tree_bytes(state) / size,
            "temporary": counted["temporary_bytes"] / size,
            "peak": counted["peak_bytes"] / size,
            "instructions": counted["instructions"],
            "trace_s": counted["trace_s"],
            "compile_s": counted["compile_s"],
        }

    def stepper(name: str) -> Callable[[], Any]:
        def step() -> PyTree:
            params = running[name]()
            metrics = getattr(running[name].state, "metrics", {})
            if "ascended" in metrics:
                ascents.setdefault(name, []).append(metrics["ascended"])
            return params

        return step

    programs = {"gradient": lambda: gradient(problem.params, problem.batch)}
    programs |= {name: stepper(name) for name in running}
    seconds = measuring.interleaved(programs, rounds, steps)
    for name, row in rows.items():
        row["time / gradient"] = measuring.ratios(seconds[name], seconds["gradient"])
        row["time / SGD"] = measuring.ratios(seconds[name], seconds["SGD"])
        row["time / least"] = measuring.ratios(seconds[name], seconds[LEAST])
        row["time / contrib"] = measuring.ratios(seconds[name], seconds[UNIT])
        row["compile / contrib"] = row["compile_s"] / rows[UNIT]["compile_s"]
        row["milliseconds"] = 1e3 * min(seconds[name])
        if name in ascents and not all(map(bool, ascents[name])):
            row["ascents"] = sum(map(float, ascents[name])) / len(ascents[name])
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure both networks, print, write."""
    parser = measuring.parser("step_cost", __doc__)
    parser.add_argument(
        "--rounds", type=positive_integer, default=20, help="interleaved rounds"
    )
    parser.add_argument(
        "--steps", type=positive_integer, default=3, help="steps in a round"
    )
    parser.add_argument(
        "--repeats", type=positive_integer, default=2, help="compilations of each step"
    )
    options = measuring.parse(parser, arguments)
    problems = [transformer.small(), transformer.large()]
    if options.smoke:
        problems = [transformer.transformer_problem(16, 2, 8, 1)]
        options.rounds = options.repeats = 1
    rows = {}
    for problem in problems:
        found = measure(problem, options.rounds, options.steps, options.repeats)
        print(f"\n{problem.name}: {measuring.tree_size(problem.params):,} parameters")
        measuring.show(found)
        rows |= {f"{problem.name}: {name}": row for name, row in found.items()}
        measuring.save(
            options, "step_cost", rows, rounds=options.rounds, steps=options.steps
        )


if __name__ == "__main__":
    sys.exit(main())
