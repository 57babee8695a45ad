"""Lagged VaSSO on the LoRA adapters of a Flax NNX network.

    python examples/lora.py --steps 500

A network that reads digits learns to read them mirrored. Only the adapters are
perturbed; those of ``eval_params`` are merged into the weights for the test.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_vasso as ov

BASE = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))


class Network(nnx.Module):
    """A perceptron: 64 pixels, 256 hidden units, 10 classes; adapters of rank 4."""

    def __init__(self, rngs):
        """Make the layers."""
        self.hidden = nnx.LoRALinear(64, 256, lora_rank=4, rngs=rngs)
        self.out = nnx.LoRALinear(256, 10, lora_rank=4, rngs=rngs)

    def __call__(self, x):
        """The logits, of shape (batch, 10)."""
        return self.out(nnx.relu(self.hidden(x)))


def loss_fn(network, images, labels):
    """The mean cross-entropy."""
    losses = optax.softmax_cross_entropy_with_integer_labels(network(images), labels)
    return losses.mean()


@nnx.jit(static_argnames="trained")
def train_step(network, optimizer, images, labels, trained):
    """One step of training, in place."""
    grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, trained))(
        network, images, labels
    )
    optimizer.update(network, grads)


def train(network, optimizer, images, labels, trained, steps, seed):
    """Train on random batches of 64."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.choice(len(images), 64, replace=False)
        train_step(network, optimizer, images[rows], labels[rows], trained)


def merged(network, optimizer):
    """A copy to export, with the clean adapters added to the weights."""
    copy = nnx.clone(network)
    adapters = nnx.state(network, nnx.LoRAParam)
    nnx.update(copy, ov.eval_params(optimizer.opt_state, adapters))
    for layer in (copy.hidden, copy.out):
        layer.kernel[...] += layer.lora.lora_a[...] @ layer.lora.lora_b[...]
        layer.lora.lora_b[...] *= 0
    return copy


@nnx.jit
def accuracy(network, images, labels):
    """The share of correct answers."""
    return jnp.mean(jnp.argmax(network(images), axis=-1) == labels)


def size(tree):
    """How many numbers a tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def main(argv=None):
    """Train, and print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.seed < 0:
        parser.error("--steps must be at least 1 and --seed at least 0")
    steps, seed = arguments.steps, arguments.seed

    images, labels = load_digits(return_X_y=True)
    images, test_images, labels, test_labels = train_test_split(
        np.float32(images / 16), labels, random_state=0
    )
    network = Network(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(network, optax.adamw(3e-3), wrt=BASE)
    train(network, optimizer, images, labels, BASE, 200, seed)

    images, test_images = (
        x.reshape(-1, 8, 8)[:, :, ::-1].reshape(-1, 64) for x in (images, test_images)
    )
    print(f"accuracy before {accuracy(network, test_images, test_labels):.3f}")
    tx = ov.lagged_vasso(optax.adamw(3e-2), rho=0.1)
    optimizer = nnx.Optimizer(network, tx, wrt=nnx.LoRAParam)
    train(network, optimizer, images, labels, nnx.LoRAParam, steps, seed)

    tuned = merged(network, optimizer)
    adapters, base = (nnx.state(network, which) for which in (nnx.LoRAParam, BASE))
    print(f"{size(adapters)} weights trained, {size(base)} frozen")
    print(f"{size(nnx.state(optimizer)) / size(adapters):.2f} numbers kept for each")
    print(f"{steps} steps, {steps} gradients")
    print(f"training accuracy {accuracy(tuned, images, labels):.3f}")
    print(f"test accuracy {accuracy(tuned, test_images, test_labels):.3f}")


if __name__ == "__main__":
    main()
