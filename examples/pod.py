"""Training on one process, on several of this machine, or on a TPU or GPU pod.

    python examples/pod.py                      # one process, all its devices
    python examples/pod.py --local-processes 4  # four processes of this machine
    python examples/pod.py --pod                # on every host of a TPU or Slurm pod
    python examples/pod.py --coordinator host0:1234 --process-count 8 --process-id 3

Handwritten digits, a perceptron, VaSSO; state fully sharded over all devices, data
read by each process for itself, checkpoints that a restart goes on from.
"""

import argparse
import hashlib
import os
import signal
import sys
from pathlib import Path

import command_line
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from sklearn.datasets import load_digits

import optax_vasso as ov
from optax_vasso.checkpoint import checkpoints


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    whole = command_line.positive_integer
    parser.add_argument("--steps", type=whole, default=400)
    parser.add_argument("--batch", type=whole, default=64, help="of all processes")
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--local-ascent", action="store_true", help="m-sharpness")
    parser.add_argument("--directory", type=Path, help="of the checkpoints")
    parser.add_argument("--save-every", type=whole, default=100)
    parser.add_argument("--smoke", action="store_true", help="20 steps")
    parser.add_argument("--die-at", type=int, help="SIGKILL before this step, to try")
    processes.add_options(parser)
    arguments = parser.parse_args()
    processes.check(parser, arguments)
    if arguments.smoke:
        arguments.steps = min(arguments.steps, 20)
    return arguments


def loss_fn(params, model_state, batch, key):
    """Mean cross-entropy; the accuracy on the batch beside it."""
    x = jnp.tanh(batch["image"] @ params["in"] + params["bias"][None])
    logits = x @ params["out"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    accuracy = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
    return jnp.mean(losses), (model_state, accuracy)


def initial_params():
    """A perceptron 64-128-10, the same on every process."""
    first, second = jax.random.split(jax.random.PRNGKey(0))
    return {
        "in": jax.random.normal(first, (64, 128)) * 0.125,
        "bias": jnp.zeros(128),
        "out": jax.random.normal(second, (128, 10)) * 0.1,
    }


def own_batches(batch: int) -> grain.MapDataset:
    """Batch t of this process at index t, for ever: a restart needs no iterator."""
    images, labels = load_digits(return_X_y=True)
    dataset = grain.MapDataset.source(range(len(labels))).seed(0).shuffle().repeat()
    mine = slice(jax.process_index(), None, jax.process_count())
    dataset = dataset[mine].map(
        lambda i: {"image": images[i] / 16, "label": np.int32(labels[i])}
    )
    return dataset.batch(batch // jax.process_count(), drop_remainder=True)


def train(arguments: argparse.Namespace) -> None:
    """Train, from the last checkpoint if there is one."""
    devices = jax.device_count()
    if arguments.batch % devices:
        raise SystemExit(
            f"--batch {arguments.batch} is not divided by {devices} devices."
        )
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    base = optax.sgd(0.1, momentum=0.9)
    params = initial_params()
    if arguments.local_ascent:
        optimizer = ov.vasso(optax.chain(ov.average_over("data"), base), arguments.rho)
        state = ov.init_local_state(params, optimizer, devices, mesh=mesh)
        step = ov.make_local_train_step(loss_fn, optimizer, mesh=mesh)
    else:
        optimizer = ov.vasso(base, arguments.rho)
        state = ov.init_train_state(params, optimizer)
        specs = ov.fsdp_specs(params, mesh)
        shardings = ov.state_shardings(state, mesh, specs)
        state = ov.shard_state(state, mesh, specs)
        step = ov.make_train_step(loss_fn, optimizer, state_shardings=shardings)
    saved = None
    if arguments.directory:
        config = {"recipe": "vasso", "rho": arguments.rho, "batch": arguments.batch}
        config["ascent"] = "local" if arguments.local_ascent else "synchronized"
        saved = checkpoints(arguments.directory, config)
        state = saved.restore(state)
    batches, first = own_batches(arguments.batch), int(state.step)
    metrics = None
    with command_line.progress_bar() as progress:
        if jax.process_index() == 0:
            task = progress.add_task("train", total=arguments.steps, completed=first)
        for t in range(first, arguments.steps):
            if t == arguments.die_at and jax.process_index() == jax.process_count() - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            state, metrics = step(state, ov.shard_batch(batches[t], mesh))
            if jax.process_index() == 0:
                progress.advance(task)
            if saved and ((t + 1) % arguments.save_every == 0):
                saved.save(state)
    if saved:
        saved.close()
    report(state, metrics)


def report(state: ov.TrainState, metrics) -> None:
    """Let process 0 print the metrics and a digest of the parameters."""
    params = multihost_utils.process_allgather(state.params, tiled=True)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    if metrics is not None:
        metrics = jax.tree.map(np.asarray, {k: metrics[k] for k in ("loss", "cosine")})
    if jax.process_index() == 0:
        digest = hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()
        for name, value in (metrics or {}).items():
            print(f"{name} {float(value):.6f}")
        print(f"sum {sum(float(leaf.sum()) for leaf in leaves)!r}")
        print(f"step {int(state.step)} digest {digest}")


def main() -> int:
    """Start the other processes, or be one of them."""
    arguments = parse()
    if processes.starts_others(arguments):
        return processes.launch(__file__, sys.argv[1:], arguments, ("--die-at",))
    processes.join(arguments)
    train(arguments)
    return 0


if __name__ == "__main__":
    command_line.run(main)
