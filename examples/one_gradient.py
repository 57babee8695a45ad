"""Lagged VaSSO: sharpness-aware training at one gradient per step.

    python examples/one_gradient.py --steps 500

The loop is that for ``optax.sgd``. Its parameters are perturbed: evaluate and export
``eval_params(opt_state, params)``.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_vasso as ov


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


def loss_fn(params, images, labels):
    """The mean cross-entropy."""
    logits = predict(params, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


@jax.jit
def accuracy(params, images, labels):
    """The share of correct answers."""
    return jnp.mean(jnp.argmax(predict(params, images), axis=-1) == labels)


def main(argv=None):
    """Train, and print the accuracies of the clean parameters."""
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

    optimizer = ov.lagged_vasso(optax.sgd(0.05, momentum=0.9), rho=0.1, theta=0.4)

    @jax.jit
    def train_step(params, opt_state, images, labels):
        grads = jax.grad(loss_fn)(params, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = init_params(jax.random.key(arguments.seed))
    opt_state = optimizer.init(params)
    rng = np.random.default_rng(arguments.seed)
    for _ in range(arguments.steps):
        rows = rng.choice(len(images), 64, replace=False)
        params, opt_state = train_step(params, opt_state, images[rows], labels[rows])

    clean = ov.eval_params(opt_state, params)
    perturbation = optax.tree.norm(optax.tree.sub(params, clean))
    print(f"{arguments.steps} steps, {arguments.steps} gradients")
    print(f"norm of the perturbation {perturbation:.3f}")
    print(f"training accuracy {accuracy(clean, images, labels):.3f}")
    print(f"test accuracy {accuracy(clean, test_images, test_labels):.3f}")


if __name__ == "__main__":
    main()
