"""Our part of a step as a share of what the device's memory allows.

An average, a norm and a perturbation of 4 M parameters have to read g, read and write
d, then read x and d and write x + ε: six arrays. The share is the time in which the
device moves as many bytes in plain additions of arrays of that size, over the time that
the chain of VaSSO takes; SAM has no average and moves four. Both run in one compiled
loop, as inside of a step, in turns.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_vasso as ov
from benchmarks import measuring
from experiments.harness.command_line import numbers, positive_integer

PyTree = Any
SIZE = 4_000_000
LEAVES = (4, 30, 100, 300, 1000)
REPEATS = 10  # of a chain in one program
# Name, ascent chain, arrays of the parameters' size that it has to move.
CHAINS = {
    "VaSSO": (optax.chain(ov.vasso_ema(0.4), ov.sam_perturb(0.01)), 6),
    "SAM": (ov.sam_perturb(0.01), 4),
}


def split(size: int, leaves: int, value: float) -> list[jax.Array]:
    """About ``size`` entries in equal leaves, of a multiple of 8 entries each.

    Of another size, XLA's loops for the CPU take up to three times as long once it
    divides them between cores, those of ``optax.adam`` too.
    """
    return [jnp.full((8 * round(size / leaves / 8),), value) for _ in range(leaves)]


def repeated(
    body: Callable[[PyTree, PyTree], PyTree], carry: PyTree, rest: PyTree
) -> tuple[Callable[[], Any], measuring.Measures]:
    """A program that carries ``body(carry, rest)`` on for REPEATS times."""

    def loop(carry: PyTree, rest: PyTree) -> PyTree:
        return jax.lax.fori_loop(0, REPEATS, lambda _, c: body(c, rest), carry)

    program, counted = measuring.compiled(loop, carry, rest, donate=(0,))
    held = [measuring.copied(carry)]

    def run() -> PyTree:
        held[0] = program(held[0], rest)
        return held[0]

    return run, counted


def addition(size: int) -> Callable[[], Any]:
    """Add c y to x in place: what the device can do, three arrays moved."""
    x, y = jnp.ones(size), jnp.ones(size)
    return repeated(lambda x, y: x + 1e-6 * y, x, y)[0]


def ascent(
    chain: optax.GradientTransformation, size: int, leaves: int
) -> tuple[Callable[[], Any], measuring.Measures]:
    """Add ε to x, and move the state of the chain on, in place."""
    params, grads = split(size, leaves, 0.0), split(size, leaves, 1e-3)

    def body(carry: PyTree, grads: PyTree) -> PyTree:
        params, state = carry
        added, state = chain.update(grads, state, params)
        return optax.apply_updates(params, added), state

    return repeated(body, (params, chain.init(params)), grads)


def bandwidth(size: int, rounds: int) -> list[float]:
    """Gigabytes per second that an addition moves, quartiles."""
    (seconds,) = measuring.interleaved({"add": addition(size)}, rounds).values()
    return measuring.quartiles(
        12e-9 * size * REPEATS / one for one in sorted(seconds, reverse=True)
    )


def copy_bandwidth(size: int, rounds: int) -> list[float]:
    """Gigabytes per second that a copy reads and writes, quartiles.

    Of negatives, since XLA removes a copy.
    """
    run, _ = repeated(lambda x, _: -x, jnp.ones(size), ())
    (seconds,) = measuring.interleaved({"copy": run}, rounds).values()
    return measuring.quartiles(8e-9 * size * REPEATS / one for one in seconds)


def matrix_throughput(width: int, dtype: Any, rounds: int) -> list[float]:
    """10⁹ operations per second of a product of square matrices, quartiles."""
    a = jnp.ones((width, width), dtype)
    run, _ = repeated(lambda x, a: (x @ a) * (1 / width), a, a)
    (seconds,) = measuring.interleaved({"product": run}, rounds).values()
    return measuring.quartiles(2e-9 * width**3 * REPEATS / one for one in seconds)


def shares(
    size: int, leaves: int, rounds: int
) -> dict[str, tuple[float, list[float], measuring.Measures]]:
    """Of each chain: its arrays, its share, and what XLA counts."""
    programs, counted = {}, {}
    limit = addition(measuring.tree_size(split(size, leaves, 0.0)))
    for name, (chain, _) in CHAINS.items():
        programs[name], counted[name] = ascent(chain, size, leaves)
    seconds = measuring.interleaved({"limit": limit} | programs, rounds)
    return {
        name: (
            1e3 * min(seconds[name]) / REPEATS,
            measuring.ratios(
                [arrays / 3 * one for one in seconds["limit"]], seconds[name]
            ),
            counted[name],
        )
        for name, (_, arrays) in CHAINS.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = measuring.parser("limits", __doc__)
    parser.add_argument(
        "--rounds", type=positive_integer, default=15, help="interleaved rounds"
    )
    parser.add_argument(
        "--leaves",
        type=numbers(positive_integer),
        default=",".join(map(str, LEAVES)),
        help="of the parameters, several numbers with commas between",
    )
    options = measuring.parse(parser, arguments)
    size, width, rounds = SIZE, 1024, options.rounds
    if options.smoke:
        size, width, rounds, options.leaves = 40_000, 64, 2, [4, 10]
    few = min(rounds, 5)
    rows: dict[str, measuring.Measures] = {
        "device": {
            "GB_per_s": bandwidth(size, few),
            "GB_per_s, 16 times the size": bandwidth(16 * size, few),
            "GFLOP_per_s, float32": matrix_throughput(width, jnp.float32, few),
            "GFLOP_per_s, bfloat16": matrix_throughput(width, jnp.bfloat16, few),
        }
    }
    measuring.show(rows)
    for leaves in options.leaves:
        for name, (least, share, counted) in shares(size, leaves, rounds).items():
            rows[f"{name}, {leaves} leaves"] = {
                "share": share,
                "milliseconds": least,
                "compile_s": counted["compile_s"],
                "instructions": counted["instructions"],
            }
    measuring.show(rows)
    measuring.save(options, "limits", rows, parameters=size, rounds=rounds)


if __name__ == "__main__":
    sys.exit(main())
