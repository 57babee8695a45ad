"""VaSSO in a plain Optax loop, on handwritten digits.

    python examples/optax_loop.py --steps 500

Unlike a loop for ``optax.adamw``, it passes ``grad_fn``, with which VaSSO takes a
second gradient of the same batch.
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
        "hidden": {
            "kernel": jax.random.normal(first, (64, 128)) / 8,
            "bias": jnp.zeros(128),
        },
        "out": {
            "kernel": jax.random.normal(second, (128, 10)) / 128**0.5,
            "bias": jnp.zeros(10),
        },
    }


def predict(params, images):
    """The logits, of shape (batch, 10)."""
    hidden, out = params["hidden"], params["out"]
    x = jax.nn.relu(images @ hidden["kernel"] + hidden["bias"])
    return x @ out["kernel"] + out["bias"]


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
    """Train, and print the accuracies and the number of gradients."""
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

    # Weight decay, clipping and schedules go into the base optimizer.
    learning_rate = optax.cosine_decay_schedule(3e-3, arguments.steps)
    base = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=1e-3)
    )
    optimizer = ov.vasso(base, rho=0.1, theta=0.4)

    @jax.jit
    def train_step(params, opt_state, images, labels):
        def grad_fn(params):
            return jax.grad(loss_fn)(params, images, labels)

        grads = grad_fn(params)
        updates, opt_state = optimizer.update(grads, opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), opt_state

    params = init_params(jax.random.key(arguments.seed))
    opt_state = optimizer.init(params)
    rng = np.random.default_rng(arguments.seed)
    gradients = 0
    for _ in range(arguments.steps):
        rows = rng.choice(len(images), 64, replace=False)
        params, opt_state = train_step(params, opt_state, images[rows], labels[rows])
        gradients += 1 + int(opt_state.report.metrics["ascended"])

    print(f"{arguments.steps} steps, {gradients} gradients")
    print(f"training accuracy {accuracy(params, images, labels):.3f}")
    print(f"test accuracy {accuracy(params, test_images, test_labels):.3f}")


if __name__ == "__main__":
    main()
