"""Peak memory of whole steps, beside the least that anybody could write.

Lagged VaSSO beside its base optimizer on four networks, in a loop of the user's and in
:func:`optax_vasso.make_train_step`; recipes that descend on both gradients beside the
same method in plain lines, without checks, states, schedules or a guard against
overflow. Everything is donated and in float32, and XLA counts what it allots; bytes
are in copies of the parameters. :mod:`benchmarks.budgets` keeps the figures.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_vasso as ov
from benchmarks import measuring, networks
from benchmarks.optimizers import BASE, RECIPES, RHO, make_step
from benchmarks.transformer import Problem

PyTree = Any
RATE, MOMENTUM = 0.01, 0.9  # of BASE
# Of a loop with Optax, and in make_train_step: copies beyond the base optimizer's peak.
LAGGED = {
    "transformer, width 128, 16 × 64": (1.1, 1.05),
    "transformer, width 256, 2 × 32": (1.56, 1.3),
    "MLP 256 × 24, batch 1,024": (1.1, 1.05),
    "MLP 512 × 8, batch 8": (2.0, 1.9),
}


def measure(without: str = "") -> Iterator[tuple[str, measuring.Measures]]:
    """(row, figures) of every step, but for networks whose names begin so."""
    problems = {
        "transformer, width 128, 16 × 64": (networks.transformer, 128, 16, 64),
        "transformer, width 256, 2 × 32": (networks.transformer, 256, 2, 32),
        "MLP 256 × 24, batch 1,024": (mlp, 256, 24, 1024),
        "MLP 512 × 8, batch 8": (mlp, 512, 8, 8),
    }
    for name, (make, *sizes) in problems.items():
        if without and name.startswith(without):
            continue
        problem = make(*sizes)
        lagged = RECIPES["lagged VaSSO"](BASE)
        yield f"{name}: SGD", in_a_loop(BASE, problem)
        yield f"{name}: lagged VaSSO", in_a_loop(lagged, problem)
        yield f"{name}: lagged VaSSO, make_train_step", in_train_step(lagged, problem)
    last = mlp(512, 8, 8)
    for method, plain in {"GSAM": plain_gsam, "LookSAM, k = 5": plain_looksam}.items():
        yield f"{method}, 512 × 8", in_a_loop(RECIPES[method](BASE), last)
        yield f"{method}, 512 × 8, plainly", counted(*plain(last), last)
    vasso = RECIPES["VaSSO"](BASE)
    yield "VaSSO, 512 × 8", in_a_loop(vasso, last)
    tracked = RECIPES["VaSSO"](optax.chain(ov.metrics.track(), BASE))
    yield "VaSSO with track(), 512 × 8", in_a_loop(tracked, last)
    skipping = ov.wrappers.skip_nonfinite(vasso)
    yield "skip_nonfinite(VaSSO), 512 × 8", in_a_loop(skipping, last)


def mlp(width: int, layers: int, batch: int) -> Problem:
    """A perceptron without biases, mean squared error."""
    params = {f"layer{i:02}": jnp.eye(width) for i in range(layers)}
    example = jnp.ones((batch, width))

    def loss_fn(params: PyTree, batch: PyTree) -> jax.Array:
        x, y = batch
        for name in sorted(params):
            x = jnp.tanh(x @ params[name])
        return jnp.mean((x - y) ** 2)

    return Problem("MLP", params, (example, example), loss_fn)


def in_a_loop(
    optimizer: optax.GradientTransformation, problem: Problem
) -> measuring.Measures:
    """The step of a loop that adds the updates itself."""
    state = optimizer.init(problem.params)
    return counted(make_step(optimizer, problem.loss_fn), state, problem)


def in_train_step(
    optimizer: optax.GradientTransformation, problem: Problem
) -> measuring.Measures:
    """The step of :func:`optax_vasso.make_train_step`."""
    state = ov.init_train_state(problem.params, optimizer)
    step = ov.make_train_step(problem.loss_fn, optimizer)
    return _in_copies(step.lower(state, problem.batch).compile(), problem)


def counted(
    step: Callable[..., Any], state: PyTree, problem: Problem
) -> measuring.Measures:
    """A step (params, state, batch) -> (params, state)."""
    jitted = jax.jit(step, donate_argnums=(0, 1))
    program = jitted.lower(problem.params, state, problem.batch).compile()
    return _in_copies(program, problem)


def plain_gsam(problem: Problem) -> tuple[Callable[..., Any], PyTree]:
    """GSAM in plain lines: a step and its state."""

    def step(x: PyTree, m: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        g = jax.grad(problem.loss_fn)(x, batch)
        p = jax.grad(problem.loss_fn)(_ascended(x, g), batch)
        share = optax.tree.vdot(g, p) / optax.tree.vdot(p, p)
        d = jax.tree.map(lambda p, g: p - 0.3 * (g - share * p), p, g)
        return _descended(x, m, d)

    return step, optax.tree.zeros_like(problem.params)


def plain_looksam(problem: Problem) -> tuple[Callable[..., Any], PyTree]:
    """LookSAM in plain lines: a step and its state."""

    def step(x: PyTree, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        m, v, t = state
        g = jax.grad(problem.loss_fn)(x, batch)
        length = optax.tree.norm(g)

        def ascend() -> tuple[PyTree, PyTree]:
            p = jax.grad(problem.loss_fn)(_ascended(x, g), batch)
            share = optax.tree.vdot(g, p) / length**2
            return p, jax.tree.map(lambda p, g: p - share * g, p, g)

        def stay() -> tuple[PyTree, PyTree]:
            share = 0.7 * length / optax.tree.norm(v)
            return jax.tree.map(lambda g, v: g + share * v, g, v), v

        d, v = jax.lax.cond(t % 5 == 0, ascend, stay)
        x, m = _descended(x, m, d)
        return x, (m, v, t + 1)

    zeros = optax.tree.zeros_like(problem.params)
    return step, (zeros, zeros, jnp.zeros((), jnp.int32))


def _ascended(x: PyTree, g: PyTree) -> PyTree:
    length = RHO / optax.tree.norm(g)
    return jax.tree.map(lambda x, g: x + length * g, x, g)


def _descended(x: PyTree, m: PyTree, d: PyTree) -> tuple[PyTree, PyTree]:
    m = jax.tree.map(lambda m, d: MOMENTUM * m + d, m, d)
    return jax.tree.map(lambda x, m: x - RATE * m, x, m), m


def _in_copies(program: Any, problem: Problem) -> measuring.Measures:
    counts = measuring.counts(program)
    size = measuring.tree_bytes(problem.params)
    return {
        "peak": round(counts["peak_bytes"] / size, 4),
        "traffic": round(counts["bytes"] / size, 4),
        "instructions": counts["instructions"],
    }
