"""VaSSO in a Flax Linen TrainState, with batch normalization and dropout.

    python examples/flax_linen.py --steps 500

Both gradients of a step use the same dropout mask. Only the first updates the batch
statistics.
"""

import argparse
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_vasso as ov


class Network(nn.Module):
    """A perceptron: 64 pixels, 128 hidden units, 10 classes."""

    @nn.compact
    def __call__(self, x, train):
        """The logits, of shape (batch, 10)."""
        x = nn.Dense(128)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(10)(x)


class TrainState(train_state.TrainState):
    """Flax's train state with batch statistics and a random key."""

    batch_stats: Any
    key: jax.Array


@jax.jit
def train_step(state, images, labels):
    """One step of training."""
    dropout_key = jax.random.fold_in(state.key, state.step)

    def loss_fn(params):
        logits, variables = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), variables["batch_stats"]

    def grad_fn(params):
        return jax.grad(loss_fn, has_aux=True)(params)[0]

    # In place of state.apply_gradients, which takes no grad_fn.
    grads, batch_stats = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = state.tx.update(
        grads, state.opt_state, state.params, grad_fn=grad_fn
    )
    return state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        batch_stats=batch_stats,
    )


@jax.jit
def accuracy(state, images, labels):
    """The share of correct answers."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, images, train=False)
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

    init_key, dropout_key = jax.random.split(jax.random.key(arguments.seed))
    network = Network()
    variables = network.init(init_key, images[:1], train=False)
    state = TrainState.create(
        apply_fn=network.apply,
        params=variables["params"],
        tx=ov.vasso(optax.sgd(0.05, momentum=0.9), rho=0.1, theta=0.4),
        batch_stats=variables["batch_stats"],
        key=dropout_key,
    )
    rng = np.random.default_rng(arguments.seed)
    for _ in range(arguments.steps):
        rows = rng.choice(len(images), 64, replace=False)
        state = train_step(state, images[rows], labels[rows])

    print(f"{arguments.steps} steps, {2 * arguments.steps} gradients")
    print(f"training accuracy {accuracy(state, images, labels):.3f}")
    print(f"test accuracy {accuracy(state, test_images, test_labels):.3f}")


if __name__ == "__main__":
    main()
