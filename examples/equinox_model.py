"""Friendly SAM on an Equinox module, with dropout.

    python examples/equinox_model.py --steps 500

Both gradients of a step use the same keys, and so the same dropout masks.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_vasso as ov


class Network(eqx.Module):
    """A perceptron: 64 pixels, 128 hidden units, 10 classes."""

    hidden: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    out: eqx.nn.Linear

    def __init__(self, key):
        """Make the layers."""
        first, second = jax.random.split(key)
        self.hidden = eqx.nn.Linear(64, 128, key=first)
        self.dropout = eqx.nn.Dropout(0.1)
        self.out = eqx.nn.Linear(128, 10, key=second)

    def __call__(self, image, key=None):
        """The logits of one image, of shape (10,)."""
        return self.out(self.dropout(jax.nn.relu(self.hidden(image)), key=key))


@eqx.filter_jit
def accuracy(network, images, labels):
    """The share of correct answers."""
    logits = jax.vmap(network)(images)
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def main(argv=None):
    """Train, and print the accuracies."""
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

    optimizer = ov.friendly_sam(optax.sgd(0.05, momentum=0.9), rho=0.1)

    @eqx.filter_jit
    def train_step(network, opt_state, images, labels, key):
        params, static = eqx.partition(network, eqx.is_inexact_array)
        keys = jax.random.split(key, len(images))

        def loss_fn(params):
            network = eqx.combine(params, static)
            logits = jax.vmap(network)(images, keys)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        grad_fn = jax.grad(loss_fn)
        updates, opt_state = optimizer.update(
            grad_fn(params), opt_state, params, grad_fn=grad_fn
        )
        return eqx.apply_updates(network, updates), opt_state

    init_key, dropout_key = jax.random.split(jax.random.key(arguments.seed))
    network = Network(init_key)
    opt_state = optimizer.init(eqx.filter(network, eqx.is_inexact_array))
    rng = np.random.default_rng(arguments.seed)
    for step in range(arguments.steps):
        rows = rng.choice(len(images), 64, replace=False)
        key = jax.random.fold_in(dropout_key, step)
        network, opt_state = train_step(
            network, opt_state, images[rows], labels[rows], key
        )

    network = eqx.nn.inference_mode(network)
    print(f"{arguments.steps} steps, {2 * arguments.steps} gradients")
    print(f"training accuracy {accuracy(network, images, labels):.3f}")
    print(f"test accuracy {accuracy(network, test_images, test_labels):.3f}")


if __name__ == "__main__":
    main()
