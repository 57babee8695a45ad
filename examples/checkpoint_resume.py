"""A run that may be killed at any time and continues from its last checkpoint.

    python examples/checkpoint_resume.py --steps 300
    python examples/checkpoint_resume.py --steps 600   # continues from step 300

A batch depends on the seed and the step alone, so an interrupted run ends bit-identical
to an uninterrupted one.
"""

import argparse
import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_vasso as ov
from optax_vasso.train.checkpoint import checkpoints

RHO, LEARNING_RATE = 0.1, 0.05
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
    return jax.nn.relu(images @ params["hidden"]) @ params["out"]


def loss_fn(params, batch):
    """The mean cross-entropy."""
    logits = predict(params, batch["images"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return losses.mean()


@jax.jit
def accuracy(params, images, labels):
    """The share of correct answers."""
    return jnp.mean(jnp.argmax(predict(params, images), axis=-1) == labels)


def train(steps, seed, directory, images, labels):
    """The train state after all steps, and how many of them this run took."""
    base = optax.sgd(LEARNING_RATE, momentum=0.9)
    optimizer = ov.vasso(base, rho=RHO, theta=0.4)
    train_step = ov.make_train_step(loss_fn, optimizer)
    state = ov.init_train_state(init_params(jax.random.key(seed)), optimizer)

    config = {"rho": RHO, "learning_rate": LEARNING_RATE, "seed": seed}
    with (
        contextlib.closing(checkpoints(directory, config)) as saved,
        ov.train.stop_signals() as stop,
    ):
        state = saved.restore(state)  # unchanged if nothing was saved
        first = int(state.step)
        for step in range(first, steps):
            rng = np.random.default_rng((seed, step))
            rows = rng.choice(len(images), 64, replace=False)
            batch = {"images": images[rows], "labels": labels[rows]}
            state, _ = train_step(state, batch)
            stopped = stop(step + 1)
            if stopped or (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                saved.save(state)
            if stopped:
                break  # the signal takes effect at the end of the block
    return state, int(state.step) - first


def main(argv=None):
    """Train from the last checkpoint, and print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="in all runs together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", default="runs/checkpoint_resume")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.seed < 0:
        parser.error("--steps must be at least 1 and --seed at least 0")

    images, labels = load_digits(return_X_y=True)
    images = np.float32(images / 16)
    images, test_images, labels, test_labels = train_test_split(
        images, labels, random_state=0
    )
    state, done = train(
        arguments.steps, arguments.seed, arguments.directory, images, labels
    )
    print(f"{state.step} steps, {done} of them in this run ({2 * done} gradients)")
    print(f"training accuracy {accuracy(state.params, images, labels):.3f}")
    print(f"test accuracy {accuracy(state.params, test_images, test_labels):.3f}")


if __name__ == "__main__":
    main()
