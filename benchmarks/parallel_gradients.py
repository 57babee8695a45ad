"""Two gradients at once: on two halves of a mesh, or one after the other on all of it.

SAM's second gradient waits for the first. Those of AsyncSAM and SAMPa do not, so each
half of the devices can take one. A step of the transformer of width 128 on 2 and on 8
devices of a CPU, in turns, as ratios to SAM; and XLA's counts per device. Eight devices
here share the cores of one machine, so that what counts there is the overhead.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_vasso as ov
from benchmarks import measuring, transformer
from benchmarks.plain_networks import Problem
from experiments.harness.command_line import positive_integer

PyTree = Any
RHO, RATE = 0.05, 0.1
DEVICES = (2, 8)


def mesh_of(count: int) -> jax.sharding.Mesh:
    """Two halves, each of which divides a batch over its devices."""
    return jax.make_mesh(
        (2, count // 2),
        ("half", "data"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[:count],
    )


def step_of(
    optimizer: Any,
    second_point: Any,
    problem: Problem,
    mesh: jax.sharding.Mesh,
) -> Any:
    """A step whose second gradient follows the first, or is taken beside it.

    Args:
      optimizer: what steps.
      second_point: (state, params) -> where the second gradient is taken; ``None`` if
        only the optimizer knows.
      problem: the loss.
      mesh: of two halves.
    """

    def placed(tree: PyTree, *axes: Any) -> PyTree:
        return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P(*axes)))

    def gradient(params: PyTree, batch: jax.Array) -> PyTree:
        return jax.grad(problem.loss_fn)(params, placed(batch, ("half", "data")))

    def both(first: PyTree, second: PyTree, batch: jax.Array) -> tuple[PyTree, PyTree]:
        """Gradients of the whole batch at two points, each on half of the mesh."""
        points = jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second)
        pair = jax.vmap(jax.grad(problem.loss_fn), (0, None), spmd_axis_name="half")(
            placed(points, "half"), placed(batch, "data")
        )
        return jax.tree.map(lambda g: g[0], pair), jax.tree.map(lambda g: g[1], pair)

    def step(params: PyTree, state: PyTree, batch: jax.Array) -> tuple[PyTree, PyTree]:
        if second_point is None:
            grads = gradient(params, batch)
            second = functools.partial(gradient, batch=batch)
        else:
            grads, taken = both(params, second_point(state, params), batch)
            second = lambda _: taken  # noqa: E731
        updates, state = optimizer.update(grads, state, params, grad_fn=second)
        return optax.apply_updates(params, updates), state

    return step


def extrapolated(state: Any, params: PyTree) -> PyTree:
    """Where SAMPa takes its second gradient."""
    clean = ov.eval_params(state, params)
    return optax.tree.add_scale(clean, -RATE, state.gradient)


def methods() -> dict[str, tuple[Any, Any]]:
    """Name -> the optimizer, and where its second gradient is taken at once."""
    base = optax.sgd(RATE, momentum=0.9)
    ascent = optax.chain(ov.clean_gradient(), ov.sam_perturb(RHO))
    asynchronous, parallelized = (
        ov.lagged(base, ascent),
        ov.sampa(base, RHO, learning_rate=RATE),
    )
    return {
        "SAM": (ov.sam(base, RHO), None),
        "AsyncSAM, one after the other": (asynchronous, None),
        "AsyncSAM, on two halves": (asynchronous, ov.eval_params),
        "SAMPa, one after the other": (parallelized, None),
        "SAMPa, on two halves": (parallelized, extrapolated),
        "lagged VaSSO": (ov.lagged_vasso(base, RHO), None),
        "SGD": (base, None),
    }


def measure(problem: Problem, count: int, rounds: int) -> dict[str, measuring.Measures]:
    """All methods on a mesh of so many devices."""
    mesh = mesh_of(count)
    batch = jax.device_put(problem.batch, NamedSharding(mesh, P(("half", "data"))))
    everywhere = NamedSharding(mesh, P())
    rows, running = {}, {}
    for name, (optimizer, second_point) in methods().items():
        arguments = (
            *jax.device_put(
                (problem.params, optimizer.init(problem.params)), everywhere
            ),
            batch,
        )
        step = step_of(optimizer, second_point, problem, mesh)
        program, rows[name] = measuring.compiled(step, *arguments)
        running[name] = functools.partial(program, *arguments)
    seconds = measuring.interleaved(running, rounds)
    return {
        name: {
            "operations / SAM": row["operations"] / rows["SAM"]["operations"],
            "temporary / SAM": row["temporary_bytes"] / rows["SAM"]["temporary_bytes"],
            "time / SAM": measuring.ratios(seconds[name], seconds["SAM"]),
        }
        for name, row in rows.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure on each number of devices, print, write."""
    parser = measuring.parser("parallel_gradients", __doc__)
    parser.add_argument(
        "--rounds", type=positive_integer, default=15, help="interleaved rounds"
    )
    options = measuring.parse(parser, arguments)
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    problem = transformer.small()
    if options.smoke:
        problem, options.rounds = transformer.transformer_problem(16, 8, 8, 1), 1
    rows = {}
    for count in DEVICES:
        found = measure(problem, count, options.rounds)
        rows |= {f"{count} devices: {name}": row for name, row in found.items()}
    measuring.show(rows)
    measuring.save(options, "parallel_gradients", rows, rounds=options.rounds)


if __name__ == "__main__":
    sys.exit(main())
