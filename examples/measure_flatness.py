"""How flat is the minimum? SGD and SAM, measured on the training data.

    python examples/measure_flatness.py --steps 500

Prints the largest eigenvalue of the Hessian, its trace, and the rise of the loss at a
distance of 0.1 along its gradient, all smaller at a flatter minimum.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_vasso as ov
from optax_vasso import sharpness


def init_params(key):
    """A perceptron: 64 pixels, 32 hidden units, 10 classes."""
    first, second = jax.random.split(key)
    return {
        "hidden": jax.random.normal(first, (64, 32)) / 8,
        "out": jax.random.normal(second, (32, 10)) / 32**0.5,
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
def accuracy(params, batch):
    """The share of correct answers."""
    logits = predict(params, batch["images"])
    return jnp.mean(jnp.argmax(logits, axis=-1) == batch["labels"])


def train(optimizer, data, steps, seed):
    """The parameters after a number of steps."""
    train_step = ov.make_train_step(loss_fn, optimizer)
    state = ov.init_train_state(init_params(jax.random.key(seed)), optimizer)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.choice(len(data["labels"]), 64, replace=False)
        batch = {"images": data["images"][rows], "labels": data["labels"][rows]}
        state, _ = train_step(state, batch)
    return ov.eval_params(state.opt_state, state.params)


def measure(params, data):
    """The largest eigenvalue, the trace, and the rise of the loss."""
    hessian = sharpness.hessian(loss_fn, params, data)
    largest = sharpness.eigenpairs(hessian, params, k=1).values[0]
    trace = sharpness.trace(hessian, params).mean
    rise = sharpness.ascent_sharpness(loss_fn, params, data, rho=0.1).rise
    return largest, trace, rise


def main(argv=None):
    """Train with both optimizers, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.seed < 0:
        parser.error("--steps must be at least 1 and --seed at least 0")

    images, labels = load_digits(return_X_y=True)
    images = np.float32(images / 16)
    images, test_images, labels, test_labels = train_test_split(
        images, labels, random_state=0
    )
    data = {"images": images, "labels": labels}
    test = {"images": test_images, "labels": test_labels}

    base = optax.sgd(0.1, momentum=0.9)
    optimizers = {"SGD": base, "SAM": ov.sam(base, rho=0.2)}
    print("      loss    test  eigenvalue   trace    rise  gradients")
    for name, optimizer in optimizers.items():
        params = train(optimizer, data, arguments.steps, arguments.seed)
        largest, trace, rise = measure(params, data)
        gradients = arguments.steps * (1 if optimizer is base else 2)
        print(
            f"{name}  {loss_fn(params, data):.4f}  {accuracy(params, test):.3f}  "
            f"{largest:10.3f}  {trace:6.2f}  {rise:.4f}  {gradients:9}"
        )


if __name__ == "__main__":
    main()
