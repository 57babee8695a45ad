"""What ten Lanczos steps cost beside ten Hessian-vector products.

On the transformer of 0.86 M parameters: the largest eigenvalue by ten Lanczos steps
with full reorthogonalization, against ten products in one compiled loop. XLA's counts
of operations and of memory, and wall and processor times of runs that take turns, so
that what else the machine does falls on both alike. Writes the numbers as JSON.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformer import small

from optax_vasso import sharpness
from optax_vasso.sharpness.spectrum import _ritz_pairs

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from command_line import Parser, environment, positive_integer, progress_bar, write_json

STEPS = 10


@jax.jit
def products(matvec: Any, vector: Any) -> Any:
    """Ten products, each of the last one's image scaled to length 1."""

    def body(_: int, v: Any) -> Any:
        image = matvec(v)
        square = sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(image))
        return jax.tree.map(lambda leaf: leaf / jnp.sqrt(square), image)

    return jax.lax.fori_loop(0, STEPS, body, vector)


def lanczos(matvec: Any, params: Any) -> Any:
    """The largest eigenvalue with its vector, as a user asks for it."""
    return sharpness.largest_eigenpairs(matvec, params, num_matvecs=STEPS)


def interleaved(
    programs: dict[str, Any], rounds: int, on_round: Any
) -> dict[str, np.ndarray]:
    """Wall and processor seconds, (rounds, 2), the order reversed every other round."""
    times: dict[str, list] = {name: [] for name in programs}
    for i in range(rounds):
        for name in list(programs)[:: 1 if i % 2 else -1]:
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(programs[name]())
            end = time.perf_counter(), time.process_time()
            times[name].append(np.subtract(end, start))
        on_round()
    return {name: np.array(rows) for name, rows in times.items()}


def summarize(lanczos: np.ndarray, products: np.ndarray) -> dict[str, Any]:
    """Ratios of two columns of times."""
    paired = lanczos / products
    return {
        "median_of_paired_ratios": float(np.median(paired)),
        "quartiles_of_paired_ratios": np.percentile(paired, [25, 75]).tolist(),
        "ratio_of_minima": float(lanczos.min() / products.min()),
        "median_seconds": [float(np.median(lanczos)), float(np.median(products))],
    }


def main(arguments: list[str] | None = None) -> None:
    """Count, time, write."""
    parser = Parser(prog="hessian_cost.py", description=__doc__)
    parser.add_argument(
        "--rounds", type=positive_integer, default=30, help="runs of each program"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="folder to write to"
    )
    options: argparse.Namespace = parser.parse_args(arguments)

    problem = small()
    params = problem.params
    matvec = sharpness.hessian(problem.loss_fn, params, problem.batch)
    compiled = {
        "lanczos": _ritz_pairs.lower(
            matvec, params, jax.random.key(0), STEPS, 1, True, None
        ).compile(),
        "products": products.lower(matvec, params).compile(),
        "gradient": jax.jit(jax.grad(problem.loss_fn))
        .lower(params, problem.batch)
        .compile(),
    }
    gradient = jax.jit(jax.grad(problem.loss_fn))
    programs = {
        "lanczos": lambda: lanczos(matvec, params),
        "products": lambda: products(matvec, params),
        "gradient": lambda: gradient(params, problem.batch),
    }
    for program in programs.values():
        jax.block_until_ready(program())
    with progress_bar() as bar:
        task = bar.add_task(problem.name, total=options.rounds)
        times = interleaved(programs, options.rounds, lambda: bar.advance(task))
    wall, processor = (
        summarize(times["lanczos"][:, i], times["products"][:, i]) for i in range(2)
    )
    # XLA counts the body of a loop once, whatever the number of its steps.
    flops = {name: p.cost_analysis()["flops"] for name, p in compiled.items()}
    results = {
        "environment": environment(),
        "problem": problem.name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "steps": STEPS,
        "rounds": options.rounds,
        "flops_of_a_step": flops,
        "flops_ratio": flops["lanczos"] / flops["products"],
        "product_to_gradient_flops": flops["products"] / flops["gradient"],
        "temporary_bytes": {
            name: p.memory_analysis().temp_size_in_bytes for name, p in compiled.items()
        },
        "wall": wall,
        "processor": processor,
    }
    path = options.results / "hessian_cost.json"
    write_json(path, results)
    print(
        f"{problem.name}, {results['parameters']:,} parameters: {STEPS} Lanczos steps"
        f" take {wall['median_of_paired_ratios']:.3f} times as long as {STEPS} products"
        f" (median of pairs; {wall['ratio_of_minima']:.3f} of the fastest), and"
        f" {processor['median_of_paired_ratios']:.3f} times the processor time,"
        f" with {results['flops_ratio']:.3f} times the operations. A product has"
        f" {results['product_to_gradient_flops']:.2f} times those of a gradient.\n"
        f"Wrote {path}"
    )


if __name__ == "__main__":
    main()
