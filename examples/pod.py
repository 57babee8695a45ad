"""Training on all devices of a machine or a pod, with a sharded train state.

    JAX_NUM_CPU_DEVICES=8 python examples/pod.py       # eight devices of this CPU
    python examples/pod.py                             # all GPUs of this machine
    python examples/pod.py --pod --directory /shared/pod    # on every host of a pod

The state is fully sharded, with ``--model 2`` also tensor parallel, and every process
reads its own part of a batch. A killed job continues from its last checkpoint, on any
number of devices.
"""

import argparse
import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, PartitionSpec as P
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_vasso as ov
from optax_vasso.train.checkpoint import checkpoints

BATCH = 64  # of all processes together
SAVE_EVERY = 100


def init_params(key):
    """A perceptron: 64 pixels, 128 hidden units, 10 classes."""
    first, second = jax.random.split(key)
    return {
        "hidden": jax.random.normal(first, (64, 128)) / 8,
        "out": jax.random.normal(second, (128, 10)) / 128**0.5,
    }


def predict(params, images):
    """The logits, of shape (batch, 10)."""
    return jnp.tanh(images @ params["hidden"]) @ params["out"]


def loss_fn(params, batch):
    """The mean cross-entropy."""
    logits = predict(params, batch["images"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return losses.mean()


@jax.jit
def accuracy(params, images, labels):
    """The share of correct answers."""
    return jnp.mean(jnp.argmax(predict(params, images), axis=-1) == labels)


def own_rows(seed, step, size):
    """The examples of a batch that this process reads."""
    rows = np.random.default_rng((seed, step)).choice(size, BATCH, replace=False)
    return rows[jax.process_index() :: jax.process_count()]


def train(steps, seed, directory, images, labels, model=1):
    """The train state after all steps."""
    shape = np.reshape(jax.devices(), (-1, model)).shape  # raises if not divisible
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    optimizer = ov.vasso(optax.sgd(0.1, momentum=0.9), rho=0.1, theta=0.4)
    params = init_params(jax.random.key(seed))
    specs = {"hidden": P("data", "model"), "out": P(("model", "data"))}
    state = ov.init_train_state(params, optimizer)
    state = ov.train.shard_state(state, optimizer, mesh, specs)
    shardings = ov.train.state_shardings(state, optimizer, mesh, specs)
    train_step = ov.make_train_step(loss_fn, optimizer, state_shardings=shardings)
    config = {"rho": 0.1, "theta": 0.4, "seed": seed}
    saving = contextlib.closing(checkpoints(directory, config))
    with saving as saved, ov.train.stop_signals() as stop:
        state = saved.restore(state)
        for step in range(int(state.step), steps):
            rows = own_rows(seed, step, len(images))
            batch = {"images": images[rows], "labels": labels[rows]}
            state, _ = train_step(state, ov.train.shard_batch(batch, mesh))
            stopped = stop(step + 1)  # by SIGTERM, all processes at the same step
            if stopped or (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                saved.save(state)
            if stopped:
                break
    return state


def main(argv=None):
    """Train, and let process 0 print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", default="runs/pod")
    parser.add_argument("--model", type=int, default=1, help="devices per hidden layer")
    parser.add_argument("--pod", action="store_true", help="join the other hosts")
    given = parser.parse_args(argv)
    if given.steps < 1 or given.seed < 0:
        parser.error("--steps must be at least 1 and --seed at least 0")
    if given.pod:
        jax.distributed.initialize()  # finds the hosts of a TPU pod, of Slurm or of MPI
    images, labels = load_digits(return_X_y=True)
    images, test_images, labels, test_labels = train_test_split(
        images / 16, labels, random_state=0
    )
    state = train(given.steps, given.seed, given.directory, images, labels, given.model)
    seen = accuracy(state.params, images, labels)
    unseen = accuracy(state.params, test_images, test_labels)
    if jax.process_index() == 0:
        print(f"{state.step} steps, devices: {jax.device_count()}")
        print(f"training accuracy {seen:.3f}")
        print(f"test accuracy {unseen:.3f}")


if __name__ == "__main__":
    main()
