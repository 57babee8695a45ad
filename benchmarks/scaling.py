"""How time, memory and compilation grow, each with the exponent of a fitted power.

Parameters, leaves, microbatches, seeds under ``vmap``, blocks of a transformer, and
devices. Leaves are those of the ascent chain alone, against the same mathematics
written plainly and ``optax.adam``; blocks are whole steps against Optax's SAM. With
more devices only counts are taken: forced devices share the cores. An exponent is the
slope of a least-squares line through the logarithms of all points of an axis; with an
offset, such as the time to compile anything at all, it lies below that of the growth.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_vasso as ov
from benchmarks import budgets, limits, measuring, networks
from benchmarks.optimizers import ALL, BASE, Running, make_step
from experiments.harness.command_line import positive_integer, some_of

PyTree = Any
Point = tuple[str, str, float, measuring.Measures]  # axis, series, size, measures
FITTED = ("milliseconds", "compile_s", "instructions", "temporary_bytes", "peak_bytes")
# What a lagged step is compared with: its base, with a norm of the gradients.
CLIPPED = "SGD, clipped"
COMPARED = ("SGD", "SAM", "VaSSO", "lagged VaSSO", "optax.contrib.sam, opaque")


def plain_vasso() -> optax.GradientTransformation:
    """VaSSO's perturbation without any care: what a chain is compared with."""

    def init(params: PyTree) -> Any:
        return jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)

    def update(grads: PyTree, state: Any, params: PyTree = None) -> Any:
        step, average = state
        weight = jnp.where(step == 0, 1.0, 0.4)
        average = jax.tree.map(
            lambda g, d: weight * g + (1 - weight) * d, grads, average
        )
        length = optax.tree.norm(average)
        return jax.tree.map(lambda d: 0.1 * d / length, average), (step + 1, average)

    return optax.GradientTransformation(init, update)


CHAINS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "VaSSO's chain": lambda: optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(0.1)),
    "the same, plainly": plain_vasso,
    "optax.adam": lambda: optax.adam(1e-3),
}


def timed(
    programs: dict[str, tuple[Callable[[], Any], measuring.Measures]], rounds: int
) -> dict[str, measuring.Measures]:
    """Counts with milliseconds, quartiles of programs in turns."""
    seconds = measuring.interleaved({n: p for n, (p, _) in programs.items()}, rounds)
    return {
        name: counted
        | {"milliseconds": [1e3 * q for q in measuring.quartiles(seconds[name])]}
        for name, (_, counted) in programs.items()
    }


def clipped(base: optax.GradientTransformation) -> optax.GradientTransformation:
    """The base optimizer behind a clipping by the global norm."""
    return optax.chain(optax.clip_by_global_norm(1.0), base)


def step_of(
    problem: Any, make: Callable[..., Any]
) -> tuple[Callable[[], Any], measuring.Measures]:
    """A whole step of a problem."""
    optimizer = make(BASE)
    params = measuring.copied(problem.params)
    state = measuring.copied(optimizer.init(params))
    program, counted = measuring.compiled(
        make_step(optimizer, problem.loss_fn),
        params,
        state,
        problem.batch,
        donate=(0, 1),
    )
    return Running(program, params, state, problem.batch), counted


def parameters(smoke: bool, most: int, rounds: int) -> Iterator[Point]:
    """Steps of a perceptron of more and more weights, on 16 examples."""
    sizes = (1e3, 1e4) if smoke else (1e5, 1e6, 1e7, 1e8)
    for size in (int(size) for size in sizes if size <= most):
        problem = networks.perceptron(16, round(size**0.5))
        count = measuring.tree_size(problem.params)
        programs = {name: step_of(problem, ALL[name]) for name in COMPARED}
        for name, row in timed(programs, rounds).items():
            yield "parameters", name, count, row


def leaves(smoke: bool, most: int, rounds: int) -> Iterator[Point]:
    """An ascent chain on 4 M parameters in more and more leaves."""
    for count in (4, 8) if smoke else (4, 30, 100, 300, 1000, 3000):
        size = 4000 if smoke else limits.SIZE
        programs = {
            name: limits.ascent(make(), size, count) for name, make in CHAINS.items()
        }
        for name, row in timed(programs, rounds).items():
            yield "leaves", name, count, row


def blocks(smoke: bool, most: int, rounds: int) -> Iterator[Point]:
    """Steps of a transformer of width 64 with more and more blocks."""
    for count in (1, 2) if smoke else (1, 4, 12, 24):
        problem = networks.transformer(8 if smoke else 64, 2, 32, count)
        makers = {name: ALL[name] for name in COMPARED} | {CLIPPED: clipped}
        programs = {name: step_of(problem, make) for name, make in makers.items()}
        for name, row in timed(programs, rounds).items():
            yield "blocks", name, count, row


def microbatches(smoke: bool, most: int, rounds: int) -> Iterator[Point]:
    """A step of VaSSO on the transformer of width 128 in more and more parts."""
    problem = networks.transformer(*((8, 8, 8) if smoke else (128, 16, 64)))
    optimizer = ALL["VaSSO"](BASE)
    for count in (1, 2, 4, 8):
        step = ov.make_train_step(
            problem.loss_fn, optimizer, gradient=ov.train.microbatched(count)
        )
        state = ov.init_train_state(measuring.copied(problem.params), optimizer)
        program, counted = measuring.compiled(step, state, problem.batch)
        held = [state]

        def run(program: Any = program, held: list[Any] = held) -> Any:
            held[0], metrics = program(held[0], problem.batch)
            return metrics

        counted["temporary / parameters"] = counted[
            "temporary_bytes"
        ] / measuring.tree_bytes(problem.params)
        (row,) = timed({"VaSSO": (run, counted)}, rounds).values()
        yield "microbatches", "VaSSO", count, row


def seeds(smoke: bool, most: int, rounds: int) -> Iterator[Point]:
    """Steps of VaSSO on the perceptron of the digits, vmapped over seeds."""
    problem = networks.perceptron()
    optimizer = ALL["VaSSO"](BASE)
    step = make_step(optimizer, problem.loss_fn)
    for count in (1, 2) if smoke else (1, 4, 16, 64):
        rows = jax.tree.map(
            lambda leaf, count=count: jnp.repeat(leaf[None], count, 0), problem.params
        )
        state = jax.vmap(optimizer.init)(rows)
        program, counted = measuring.compiled(
            jax.vmap(step, in_axes=(0, 0, None)),
            *(rows, state, problem.batch),
            donate=(0, 1),
        )
        running = Running(program, rows, state, problem.batch)
        (row,) = timed({"VaSSO": (running, counted)}, rounds).values()
        yield "seeds", "VaSSO", count, row


def devices(smoke: bool, most: int, rounds: int) -> Iterator[Point]:
    """Counts of VaSSO's step, parameters divided over more and more devices."""
    for count in (1, 2) if smoke else (1, 2, 4, 8):
        program, _, size = budgets.program(ALL["VaSSO"](BASE), 2, "fsdp", count)
        row = measuring.counts(program) | budgets.sent(program, size, "fsdp")
        yield "devices", "VaSSO, fsdp", count, row


AXES = {
    axis.__name__: axis
    for axis in (parameters, leaves, blocks, microbatches, seeds, devices)
}


def on_forced_devices(smoke: bool) -> list[Point]:
    """The axis of devices, in a process of its own that has eight."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.scaling",
        "--axes",
        "devices",
        "--json",
    ]
    output = subprocess.run(
        command + ["--smoke"] * smoke,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
    ).stdout
    return [tuple(point) for point in json.loads(output.splitlines()[-1])]


def exponents(points: list[Point]) -> dict[str, measuring.Measures]:
    """Of each axis and series, for each measure that grows."""
    fitted: dict[str, measuring.Measures] = {}
    for axis, series in dict.fromkeys(point[:2] for point in points):
        own = [point for point in points if point[:2] == (axis, series)]
        row = fitted[f"exponent over {axis}: {series}"] = {}
        for key in FITTED:
            values = [point[3].get(key) for point in own]
            values = [v[1] if isinstance(v, list) else v for v in values]
            if len(own) > 1 and all(values):
                size = np.log([point[2] for point in own])
                row[key] = float(np.polyfit(size, np.log(values), 1)[0])
    return fitted


def main(arguments: list[str] | None = None) -> None:
    """Measure each axis, fit, print, write."""
    parser = measuring.parser("scaling", __doc__)
    parser.add_argument("--axes", type=some_of(AXES), default="all", help="or some")
    parser.add_argument(
        "--parameters",
        type=positive_integer,
        default=20_000_000,
        help="at most so many; 1e8 of them take 6 GB",
    )
    parser.add_argument("--rounds", type=positive_integer, default=7)
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    options = measuring.parse(parser, arguments)
    points: list[Point] = []
    for name in options.axes:
        if name == "devices" and jax.device_count() < 8 and not options.json:
            points += on_forced_devices(options.smoke)
        else:
            rounds = 1 if options.smoke else options.rounds
            points += AXES[name](options.smoke, options.parameters, rounds)
    if options.json:
        print(json.dumps(points))
        return
    rows = {f"{axis} {size:,}: {name}": row for axis, name, size, row in points}
    rows |= exponents(points)
    measuring.show(rows)
    measuring.save(options, "scaling", rows, rounds=options.rounds)


if __name__ == "__main__":
    sys.exit(main())
