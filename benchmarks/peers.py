"""Ours against Optax's SAM and against PyTorch: the same weights, batches and steps.

    pip install torch==2.13.0 pytorch_optimizer==4.1.0

First both sides take the same steps: the loss after each has to agree. Then they take
turns, each a whole step with its gradients; ratios are of the same round, with
quartiles. ``first step`` is the time from a function to its first result: tracing,
compiling and running in JAX, running in PyTorch. The digits experiment is VaSSO on the
perceptron for 60 epochs of 1,000 images in batches of 50: one seed as one compiled
loop, and 32 seeds as the rows of one program, against one eager loop in PyTorch for
each seed.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_vasso as ov
from benchmarks import measuring, networks
from benchmarks.optimizers import OPTAX, Running, make_step
from experiments.harness.command_line import positive_integer

RHO, THETA, LMBDA = 0.05, 0.4, 0.6
RATE, MOMENTUM = 0.01, 0.9
# Larger steps of ResNet-18 amplify rounding, and the trajectories part.
RESNET_RATE = 1e-4
STEPS = 5  # of the trajectories that are compared
AGREES = 2e-4  # relative difference of the losses, float32 in another order
OURS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "SGD: Optax": lambda base: base,
    "SAM: optax_vasso": lambda base: ov.sam(base, RHO),
    "VaSSO: optax_vasso": lambda base: ov.vasso(base, RHO, theta=THETA),
    "Friendly SAM: optax_vasso": lambda base: ov.friendly_sam(
        base, RHO, sigma=1.0, lmbda=LMBDA
    ),
    "lagged VaSSO: optax_vasso": lambda base: ov.lagged_vasso(base, RHO, theta=THETA),
    **{f"SAM: {name}": make for name, make in OPTAX.items()},
}
# Which of ours a row is compared with, by what its name begins with.
UNITS = {name.split(":")[0]: name for name in list(OURS)[:5]}


def in_jax(
    problem: Any, make: Callable[..., Any], rate: float
) -> tuple[Running, float]:
    """A compiled step, and the seconds to its first result."""
    optimizer = make(optax.sgd(rate, momentum=MOMENTUM))
    params = measuring.copied(problem.params)
    state = measuring.copied(optimizer.init(params))
    start = time.perf_counter()
    step = jax.jit(make_step(optimizer, problem.loss_fn), donate_argnums=(0, 1))
    running = Running(step, params, state, problem.batch)
    jax.block_until_ready(running())
    return running, time.perf_counter() - start


def in_torch(problem: Any, rate: float) -> dict[str, tuple[Any, float]]:
    """Eager steps in PyTorch, and the seconds to their first results."""
    from benchmarks import in_torch

    host = jax.tree.map(np.asarray, (problem.params, problem.batch))
    base = {"lr": rate, "momentum": MOMENTUM}
    found = {}
    for name, make in in_torch.optimizers(RHO, THETA, LMBDA, base).items():
        start = time.perf_counter()
        running = in_torch.Running(*host, make)
        running()
        found[name] = running, time.perf_counter() - start
    return found


def losses(problem: Any, running: Any) -> list[float]:
    """After each of the first steps, the first of which has been taken."""
    found = []
    for i in range(STEPS):
        if i:
            running()
        if isinstance(running, Running):
            params = ov.eval_params(running.state, running.params)
            found.append(float(problem.loss_fn(params, problem.batch)))
        else:
            found.append(running.loss())
    return found


def measure(
    problem: Any, rounds: int, steps: int, rate: float
) -> dict[str, measuring.Measures]:
    """All sides on one network: agreement, then times."""
    sides = {name: in_jax(problem, make, rate) for name, make in OURS.items()}
    # ResNet-18 is compared within JAX alone.
    if isinstance(problem.params, list) or "Embed_0" in problem.params:
        sides |= in_torch(problem, rate)
    reached = {name: losses(problem, side) for name, (side, _) in sides.items()}
    rows: dict[str, measuring.Measures] = {}
    for name, (_, first) in sides.items():
        unit = UNITS[name.split(":")[0]]
        off = np.abs(np.divide(reached[name], reached[unit]) - 1).max()
        if off > AGREES:
            raise SystemExit(
                f"{problem.name}: {name} and {unit} part by {off:.2g} of the loss "
                f"within {STEPS} steps: {reached[name]} and {reached[unit]}"
            )
        rows[name] = {"difference of the losses": off, "first step (s)": first}
    programs = {name: side for name, (side, _) in sides.items()}
    seconds = measuring.interleaved(programs, rounds, steps)
    for name, row in rows.items():
        unit = UNITS[name.split(":")[0]]
        row["milliseconds"] = 1e3 * min(seconds[name])
        row["time / ours"] = measuring.ratios(seconds[name], seconds[unit])
    return rows


def digits(epochs: int, rounds: int, seeds: int) -> measuring.Measures:
    """The digits experiment here and in PyTorch; to be run in a process of its own."""
    from benchmarks import in_torch
    from experiments import tasks
    from experiments.harness import methods, rows as harness_rows, training

    harness_rows.use_all_cores()
    task = tasks.load("digits-50")
    method = methods.METHODS["vasso"]
    chosen = {"learning_rate": 0.1, "weight_decay": 5e-4, "rho": 0.5, "theta": 0.2}
    steps = epochs * task.steps_per_epoch
    split = tasks.split(task, 0)
    optimizer = method.make(methods.base(chosen, steps), chosen, 0)
    random = np.random.default_rng(0)
    params = jax.tree.map(jnp.asarray, task.network.init(random))
    orders = np.stack([random.permutation(split.training) for _ in range(epochs)])
    batches = orders.reshape(steps, task.batch)
    inputs, labels = task.inputs[batches], split.given_labels[batches]

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return training.cross_entropy(task.network.logits(params, batch[0]), batch[1])

    step = ov.make_train_step(loss_fn, optimizer)

    @jax.jit
    def one_seed() -> Any:
        state = ov.init_train_state(params, optimizer)
        return jax.lax.scan(step, state, (inputs, labels))[0].params

    def all_seeds() -> Any:
        return training.train(
            task, method, [chosen] * seeds, range(seeds), epochs=epochs
        ).gradients

    host = jax.tree.map(np.asarray, params)

    def eager() -> None:
        import torch

        model = in_torch.network(host)
        vasso = in_torch.SAM(
            model.parameters(),
            *(chosen["rho"], chosen["theta"]),
            lr=chosen["learning_rate"],
            momentum=methods.MOMENTUM,
            weight_decay=chosen["weight_decay"],
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(vasso.base, steps)
        for batch in zip(inputs, labels, strict=True):
            closure = in_torch.loss_of(model, batch)
            closure()
            vasso.step(closure)
            schedule.step()

    programs = {"one": one_seed, "all": all_seeds, "eager": eager}
    seconds = measuring.interleaved(programs, rounds)
    return {
        "seconds, one seed": measuring.quartiles(seconds["one"]),
        f"seconds, {seeds} seeds": measuring.quartiles(seconds["all"]),
        "seconds, one seed in PyTorch": measuring.quartiles(seconds["eager"]),
        "speedup, one seed": measuring.ratios(seconds["eager"], seconds["one"]),
        f"speedup, {seeds} seeds": measuring.ratios(
            [seeds * one for one in seconds["eager"]], seconds["all"]
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    """Compare, time, print, write."""
    parser = measuring.parser("peers", __doc__)
    parser.add_argument(
        "--rounds", type=positive_integer, default=15, help="interleaved rounds"
    )
    parser.add_argument(
        "--digits", action="store_true", help="print the digits experiment alone"
    )
    options = measuring.parse(parser, arguments)
    smoke, rounds = options.smoke, options.rounds
    if options.digits:
        found = digits(3 if smoke else 60, 1 if smoke else 3, 4 if smoke else 32)
        print(json.dumps(found))
        return
    import torch

    rows: dict[str, measuring.Measures] = {}

    def add(found: dict[str, measuring.Measures]) -> None:
        """What there is is written after each part: the whole takes many minutes."""
        rows.update(found)
        measuring.show(found)
        measuring.save(options, "peers", rows, rounds=rounds, torch=torch.__version__)

    command = [sys.executable, "-m", "benchmarks.peers", "--digits"]
    output = subprocess.run(
        [*command, *["--smoke"] * smoke],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    ).stdout
    add({"digits, 60 epochs of VaSSO": json.loads(output.splitlines()[-1])})
    problems = [
        (networks.perceptron(), 50, RATE),
        (networks.transformer(256, 2, 32), 3, RATE),
        (networks.transformer(128, 16, 64), 1, RATE),
        (networks.resnet(), 1, RESNET_RATE),
    ]
    if smoke:
        problems = [
            (networks.perceptron(4, 8), 1, RATE),
            (networks.transformer(8, 2, 4), 1, RATE),
        ]
        rounds = 1
    for problem, steps, rate in problems:
        found = measure(problem, rounds, steps, rate)
        add({f"{problem.name}: {name}": row for name, row in found.items()})


if __name__ == "__main__":
    sys.exit(main())
