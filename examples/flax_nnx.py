"""VaSSO in a Flax NNX Optimizer, with batch normalization and dropout.

    python examples/flax_nnx.py --steps 500

The second gradient is that of a copy, made before the step: it has the same dropout
mask, and its updates of batch statistics and random streams are discarded.
"""

import argparse

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_vasso as ov


class Network(nnx.Module):
    """A perceptron: 64 pixels, 128 hidden units, 10 classes."""

    def __init__(self, rngs):
        """Make the layers."""
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.norm = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        """The logits, of shape (batch, 10)."""
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def loss_fn(network, images, labels):
    """The mean cross-entropy."""
    logits = network(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


@nnx.jit
def train_step(network, optimizer, images, labels):
    """One step of training, in place."""
    graph, _, rest = nnx.split(network, nnx.Param, ...)
    # As arrays, since the first pass updates variables.
    rest = nnx.to_pure_dict(rest)

    def grad_fn(perturbed):
        copy = nnx.merge(graph, perturbed, rest)
        return nnx.to_pure_dict(nnx.grad(loss_fn)(copy, images, labels))

    grads = nnx.grad(loss_fn)(network, images, labels)
    optimizer.update(network, grads, grad_fn=grad_fn)


@nnx.jit
def accuracy(network, images, labels):
    """The share of correct answers."""
    return jnp.mean(jnp.argmax(network(images), axis=-1) == labels)


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

    network = Network(nnx.Rngs(arguments.seed))
    optimizer = nnx.Optimizer(
        network,
        ov.vasso(optax.sgd(0.05, momentum=0.9), rho=0.1, theta=0.4),
        wrt=nnx.Param,
    )
    rng = np.random.default_rng(arguments.seed)
    network.train()
    for _ in range(arguments.steps):
        rows = rng.choice(len(images), 64, replace=False)
        train_step(network, optimizer, images[rows], labels[rows])

    network.eval()
    print(f"{arguments.steps} steps, {2 * arguments.steps} gradients")
    print(f"training accuracy {accuracy(network, images, labels):.3f}")
    print(f"test accuracy {accuracy(network, test_images, test_labels):.3f}")


if __name__ == "__main__":
    main()
