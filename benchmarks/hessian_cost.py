"""What ten Lanczos steps cost beside ten Hessian-vector products, and beside matfree's.

On the transformer of 0.86 M parameters: the largest eigenvalue by ten Lanczos steps
with full reorthogonalization, ours and matfree's where it is installed
(``pip install '.[peers]'``), against ten products in one compiled loop. XLA's counts of
operations and of memory, and wall and processor times of runs that take turns, so that
what else the machine does falls on all alike. Then the eigenvalues that both find of
diagonal matrices whose Krylov space is complete before the last product. Writes the
numbers as JSON.
"""

import importlib.util
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from benchmarks import measuring
from benchmarks.transformer import small, transformer_problem
from experiments.harness.command_line import positive_integer
from optax_vasso import sharpness
from optax_vasso.sharpness.spectrum import _ritz_pairs

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
    return sharpness.eigenpairs(matvec, params, num_matvecs=STEPS)


def matfree_eigenpairs(matvec: Any, params: Any, steps: int) -> tuple[Any, Any]:
    """All Ritz values, ascending, and their vectors by matfree."""
    from matfree import decomp, eig

    flat, unravel = ravel_pytree(params)
    start = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
    eigh = eig.eigh_partial(decomp.tridiag_sym(steps, custom_vjp=False))
    return eigh(lambda v: ravel_pytree(matvec(unravel(v)))[0], start)


@jax.jit
def matfree_lanczos(matvec: Any, params: Any) -> tuple[Any, Any]:
    """The largest eigenvalue with its vector by matfree."""
    values, vectors = matfree_eigenpairs(matvec, params, STEPS)
    return values[-1], vectors[-1]


# Name -> the diagonal of a matrix, and the number of products.
COMPLETE = {
    "three times the identity, n = 9": (np.full(9, 3.0), 9),
    "zero, n = 9": (np.zeros(9), 4),
    "rank 2, n = 30": (np.r_[7.0, -3.0, np.zeros(28)], 10),
    "rank 20, n = 1000": (np.r_[np.arange(1.0, 21.0), np.zeros(980)], 40),
    "0 to 9 twice each, n = 20": (np.repeat(np.arange(10.0), 2), 20),
}


def multiply(diagonal: jax.Array, vector: jax.Array) -> jax.Array:
    """A diagonal matrix."""
    return diagonal * vector


def largest_values(with_matfree: bool) -> dict[str, dict[str, list[float]]]:
    """The three largest eigenvalues of each matrix: true, ours and matfree's."""
    found = {}
    for name, (diagonal, steps) in COMPLETE.items():
        params = jnp.zeros(diagonal.size)
        matvec = Partial(multiply, jnp.asarray(diagonal, params.dtype))
        ours = sharpness.eigenpairs(matvec, params, 3, num_matvecs=steps).values
        row = {"true": sorted(diagonal)[:-4:-1], "ours": ours}
        if with_matfree:
            row["matfree"] = matfree_eigenpairs(matvec, params, steps)[0][:-4:-1]
        # JSON has no NaN.
        found[name] = {
            who: [float(v) if np.isfinite(v) else str(v) for v in values]
            for who, values in row.items()
        }
    return found


def interleaved(programs: dict[str, Any], rounds: int) -> dict[str, np.ndarray]:
    """Wall and processor seconds, (rounds, 2), the order reversed every other round."""
    times: dict[str, list] = {name: [] for name in programs}
    for i in range(rounds):
        for name in list(programs)[:: 1 if i % 2 else -1]:
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(programs[name]())
            end = time.perf_counter(), time.process_time()
            times[name].append(np.subtract(end, start))
    return {name: np.array(rows) for name, rows in times.items()}


def main(arguments: list[str] | None = None) -> None:
    """Count, time, print, write."""
    parser = measuring.parser("hessian_cost", __doc__)
    parser.add_argument(
        "--rounds", type=positive_integer, default=30, help="runs of each program"
    )
    options = measuring.parse(parser, arguments)
    problem = transformer_problem(8, 2, 4, 1) if options.smoke else small()
    params = problem.params
    matvec = sharpness.hessian(problem.loss_fn, params, problem.batch)
    with_matfree = importlib.util.find_spec("matfree") is not None
    gradient = jax.jit(jax.grad(problem.loss_fn))
    compiled = {
        "optax_vasso": _ritz_pairs.lower(
            matvec, params, jax.random.key(0), STEPS, 1, True, None
        ).compile(),
        "products": products.lower(matvec, params).compile(),
        "gradient": gradient.lower(params, problem.batch).compile(),
    }
    programs = {
        "optax_vasso": lambda: lanczos(matvec, params),
        "products": lambda: products(matvec, params),
        "gradient": lambda: gradient(params, problem.batch),
    }
    if with_matfree:
        compiled["matfree"] = matfree_lanczos.lower(matvec, params).compile()
        programs["matfree"] = lambda: matfree_lanczos(matvec, params)
    for program in programs.values():
        jax.block_until_ready(program())
    times = interleaved(programs, 1 if options.smoke else options.rounds)
    counted = {name: measuring.counts(program) for name, program in compiled.items()}
    unit = counted["products"]
    rows: dict[str, measuring.Measures] = {
        f"{STEPS} Lanczos steps / {STEPS} products, {name}": {
            "time": measuring.ratios(times[name][:, 0], times["products"][:, 0]),
            "processor time": measuring.ratios(
                times[name][:, 1], times["products"][:, 1]
            ),
            "operations": counted[name]["operations"] / unit["operations"],
            "temporary": counted[name]["temporary_bytes"] / unit["temporary_bytes"],
        }
        for name in programs
        if name not in ("products", "gradient")
    }
    # XLA counts the body of a loop once, whatever the number of its steps.
    rows["a product / a gradient"] = {
        "operations": unit["operations"] / counted["gradient"]["operations"]
    }
    measuring.show(rows)
    values = largest_values(with_matfree)
    for name, row in values.items():
        print(name, row)
    measuring.save(
        *(options, "hessian_cost", rows),
        problem=problem.name,
        rounds=options.rounds,
        largest_eigenvalues=values,
    )


if __name__ == "__main__":
    sys.exit(main())
